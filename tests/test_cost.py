"""What runs cost, from finished runs and from rehearsals; and which fit an evening."""

import json

import pytest

from common import cost


def finished(folder, seconds, **facts):
    folder.mkdir(parents=True)
    metrics = {"seconds": seconds, "examples_per_second": 50.0, "peak_memory": 2**30, "diverged": False}
    (folder / "metrics.json").write_text(json.dumps(metrics | facts))


def rehearsed(folder, rate):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"arguments": {"batch": 100}, "provenance": {"steps": 3600}}))
    lines = [{"epoch": 1, "examples_per_second": 1.0, "peak_memory": 5}]
    lines += [{"epoch": 2, "examples_per_second": rate, "peak_memory": 2**29}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_finished_runs_tell_more_than_a_rehearsal(tmp_path):
    runs, rehearsals = tmp_path / "runs", tmp_path / "rehearsals"
    rehearsed(rehearsals / "toy/base/0", rate=50.0)
    assert cost.of_arm("toy/base", rehearsals, runs) == (2.0, 50.0, 2**29, "rehearsal")  # 360,000 examples
    finished(runs / "toy/base/0", 3600.0)
    finished(runs / "toy/base/1", 7200.0)
    finished(runs / "toy/base/2", 1.0, diverged=True)
    finished(runs / "toy/base/3", 90000.0, runs_on_this_gpu=4)
    finished(runs / "toy/base/0.replaced-1", 90000.0)
    assert cost.of_arm("toy/base", rehearsals, runs) == (1.5, 50.0, 2**30, "2 finished")
    assert cost.of_arm("toy/base", rehearsals, None) == (2.0, 50.0, 2**29, "rehearsal")
    assert cost.of_arm("toy/other", rehearsals, runs) is None
    (rehearsals / "toy/base/0/train.jsonl").write_text("")
    assert cost.of_arm("toy/base", rehearsals, None) is None


def test_an_evening_takes_the_cheapest_first_and_pays_shared_arms_once():
    costs = {f"toy/{arm}": cost.Cost(hours, 1.0, 1, "") for arm, hours in {"base": 2, "a": 1, "b": 2, "c": 9}.items()}
    studies = {"toy-c": ["c:base"], "toy-b": ["b:base", "base:a"], "toy-a": ["a:base"], "toy-d": ["d:base"]}
    assert cost.fitting(studies, costs, 1, 2.9) == []
    assert cost.fitting(studies, costs, 1, 3) == ["toy-a"]
    assert cost.fitting(studies, costs, 1, 5) == ["toy-a", "toy-b"]  # 1 + 2, then 2 more: base is paid for
    assert cost.fitting(studies, costs, 2, 9.9) == ["toy-a"]
    assert cost.fitting(studies, costs, 1, 14) == ["toy-a", "toy-b", "toy-c"]


def test_the_tables_count_shared_arms_once_and_say_what_is_not_known(tmp_path, capsys):
    rehearsed(tmp_path / "toy/base/0", rate=50.0)
    rehearsed(tmp_path / "toy/a/0", rate=100.0)
    cost.main([str(tmp_path), "toy-one=a:base", "toy-two=a:base,gone:base", "--seeds", "0", "1", "2"])
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert lines["toy/a"] == ["toy/a", "100", "0.50", "1.0", "h", "rehearsal"]
    assert lines["toy-one"] == ["toy-one", "6", "9.0", "h"]
    assert lines["toy-two"][:4] == ["toy-two", "9", "9.0", "h"] and "not known" in printed
    assert lines["together, shared arms once"][-8:-6] == ["9.0", "h"] or "9.0 h" in printed
    cost.main([str(tmp_path), "toy-one=a:base", "toy-two=b:base", "--seeds", "0", "--fitting", "3"])
    assert capsys.readouterr().out == "toy-one=a:base\n"
    with pytest.raises(SystemExit) as end:
        cost.main([str(tmp_path), "toy-one"])
    assert end.value.code == 2 and "is no study" in capsys.readouterr().err


def test_durations_have_the_readers_unit():
    assert [cost.duration(hours) for hours in (26.04, 0.5, 0.005)] == ["26.0 h", "30.0 min", "18 s"]
