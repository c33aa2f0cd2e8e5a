"""Estimated hours of arms and studies, from finished runs and from rehearsals."""

import json

import pytest

from common.study import cost
from common.study.request import Request


def finished_run(folder, seconds, flags="flags:", **metrics):
    folder.mkdir(parents=True)
    defaults = {"seconds": seconds, "examples_per_second": 50.0, "peak_memory": 2**30, "diverged": False}
    (folder / "metrics.json").write_text(json.dumps(defaults | metrics))
    (folder / "flags").write_text(flags + "\n")


def rehearsal(folder, rate):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"arguments": {"batch": 100}, "provenance": {"steps": 3600}}))
    lines = [{"epoch": 1, "examples_per_second": 1.0, "peak_memory": 5}]
    lines += [{"epoch": 2, "examples_per_second": rate, "peak_memory": 2**29}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def parse_request(tmp_path, *words):
    return Request.parse(["PAPERS=bsa", "SCALE=demo", f"RUNS={tmp_path / 'runs'}", *words])


def test_cost_is_the_mean_of_comparable_finished_runs(tmp_path):
    """Excluded: diverged runs, runs that shared a GPU, runs with other flags, and replaced runs."""
    runs, request = tmp_path / "runs/bsa/base", parse_request(tmp_path)
    design = request.designs["bsa"]
    finished_run(runs / "0", 3600.0)
    finished_run(runs / "1", 7200.0)
    finished_run(runs / "2", 1.0, diverged=True)
    finished_run(runs / "3", 90000.0, runs_on_this_gpu=4)
    finished_run(runs / "4", 90000.0, flags="flags: --epochs 9")
    finished_run(runs / "0.replaced-1", 90000.0)
    finished = cost.finished_metrics(request, design, "base")
    assert cost.cost_of_runs(finished) == (1.5, 50.0, 2**30, "2 finished")
    assert len(cost.finished_metrics(parse_request(tmp_path, "EXTRA=--epochs  9"), design, "base")) == 1
    assert cost.finished_metrics(request, design, "mse") == []


def test_the_cost_of_a_full_run_is_extrapolated_from_a_rehearsal(tmp_path):
    rehearsal(tmp_path / "base/0", rate=50.0)
    assert cost.cost_of_rehearsal(tmp_path / "base/0") == (2.0, 50.0, 2**29, "rehearsal")  # 360,000 examples
    assert cost.cost_of_rehearsal(tmp_path / "other/0") is None
    (tmp_path / "base/0/train.jsonl").write_text("")
    assert cost.cost_of_rehearsal(tmp_path / "base/0") is None


def test_a_run_of_zero_epochs_has_hours_but_no_speed(tmp_path):
    """For example ConMIM without pre-training: its evaluation takes time."""
    request = parse_request(tmp_path)
    finished_run(tmp_path / "runs/bsa/base/0", 1800.0, examples_per_second=None)
    finished = cost.cost_of_runs(cost.finished_metrics(request, request.designs["bsa"], "base"))
    assert finished == (0.5, None, 2**30, "1 finished")
    table = cost.cost_tables({"study": {("bsa", "base"): {0, 1}}}, {("bsa", "base"): finished})
    assert "bsa/base" in table and "1.00      30.0 min  1 finished" in table
    rehearsal(tmp_path / "none/0", rate=50.0)
    (tmp_path / "none/0/args.json").write_text(json.dumps({"arguments": {"batch": 9}, "provenance": {"steps": 0}}))
    (tmp_path / "none/0/train.jsonl").write_text(json.dumps({"epoch": 0, "peak_memory": 5}) + "\n")
    assert cost.cost_of_rehearsal(tmp_path / "none/0") == (0.0, None, 5, "rehearsal")


def test_cost_tables_count_shared_arms_once_and_mark_unknown_arms(tmp_path, capsys):
    rehearsals = tmp_path / "rehearsals"
    rehearsal(rehearsals / "bsa/base/10", rate=50.0)
    rehearsal(rehearsals / "bsa/no-alignment/10", rate=100.0)
    finished_run(tmp_path / "runs/bsa/mse/0", 1800.0, flags="flags: --reconstruction mse --alignment mse")
    words = ["PAPERS=bsa", "SCALE=demo", f"RUNS={tmp_path / 'runs'}", "SEEDS=0 1 2", "--rehearsals", str(rehearsals)]
    cost.main(words)
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert lines["bsa/no-alignment"] == ["bsa/no-alignment", "100", "0.50", "1.0", "h", "rehearsal"]
    assert lines["bsa/mse"][3:] == ["30.0", "min", "1", "finished"]
    assert lines["bsa-alignment-loss"][:4] == ["bsa-alignment-loss", "12", "9.0", "h"] and "unknown arms" in printed
    assert lines["bsa-distance"][:4] == ["bsa-distance", "15", "7.5", "h"]
    assert "24 10.5 h + unknown arms" in " ".join(printed.split())  # base belongs to both studies
    cost.main([*words, "--unknown"])
    unknown = capsys.readouterr().out.split()
    assert f"{rehearsals}/bsa/base/10/metrics.json" in unknown and not any("/mse/" in path for path in unknown)
    with pytest.raises(SystemExit) as end:
        cost.main(["PAPERS=toy"])
    assert end.value.code == 2 and "no paper 'toy'" in capsys.readouterr().err


def test_only_the_arms_of_primary_contrasts_are_counted_with_all_seeds(tmp_path):
    """Ten seeds at demo scale, five for the other arms. At other scales and with SEEDS all arms have the same seeds."""

    def counts(*words):
        request = parse_request(tmp_path, *words)
        design = request.designs["bsa"]
        seeds = cost.seeds_of_arms(request, design, [design.study("bsa-distance")])
        return {arm: len(arm_seeds) for (_, arm), arm_seeds in seeds.items()}

    demo, gpu, given = counts(), counts("SCALE=gpu"), counts("SEEDS=3 4")
    assert {arm: demo[arm] for arm in ("base", "mse", "mse-alignment")} == {
        "base": 10, "mse": 10, "mse-alignment": 5
    }  # fmt: skip
    assert set(gpu.values()) == {5} and set(given.values()) == {2}


def test_teachers_are_counted_once_per_data_seed(tmp_path):
    """At demo scale a seed has its own teacher; elsewhere one teacher serves all seeds."""
    for scale, teachers in (("demo", 10), ("gpu", 1)):
        request = Request.parse(["PAPERS=cocord", f"SCALE={scale}", f"RUNS={tmp_path / 'runs'}"])
        design = request.designs["cocord"]
        studies = [study for study in design.studies if not study.extra]
        seeds = cost.seeds_of_arms(request, design, studies)
        name = design.arm(studies[0].arms[0]).needs
        assert name.startswith("teacher@") and len(seeds["cocord", name]) == teachers


def test_the_rehearsal_of_a_teacher_is_found(tmp_path, capsys):
    words = ["PAPERS=cocord", "SCALE=gpu", "PAIRS=vgg13-vgg8", f"RUNS={tmp_path}", "--rehearsals", str(tmp_path / "r")]
    cost.main([*words, "--unknown"])
    assert f"{tmp_path}/r/cocord/teacher@vgg13/0/model.pt" in capsys.readouterr().out.split()
    rehearsal(tmp_path / "r/cocord/teacher@vgg13/0", rate=50.0)
    cost.main(words)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cocord/teacher@vgg13"))
    assert line.split()[1:] == ["50", "0.50", "2.0", "h", "rehearsal"]


def test_durations_are_given_in_hours_minutes_or_seconds():
    assert [cost.duration(hours) for hours in (26.04, 0.5, 0.005)] == ["26.0 h", "30.0 min", "18 s"]
