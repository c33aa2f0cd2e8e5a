"""Curves over a dose and contrasts at three learning rates: what make asks for, and what is said of the runs."""

import argparse
import importlib
import json
import os
import subprocess

import pytest
from conftest import ROOT

from common import command, records, studies, sweeps
from common.studies import Control, Metric, Study

METRICS = {"knn": Metric("kNN accuracy", "%", 1), "spread": Metric("std ratio", "", 2)}
ROBUST = sweeps.Sweep(sweeps.ROBUSTNESS, ("knn", "spread"))
LEAK = sweeps.Sweep("How much?", ("knn", "spread"), "leak", "share")
TRIPLED = ["arm@third:base@third", "arm@triple:base@triple"]


def run(root, arm, seed, knn, spread=0.5, **arguments):
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    given = {"seed": seed, "lr": 0.1, "out": str(folder), "leak": 0.0} | arguments
    (folder / "args.json").write_text(json.dumps({"arguments": given, "provenance": {"commit": "c"}}))
    (folder / "metrics.json").write_text(json.dumps({"knn": knn, "spread": spread, "untrained": 10.0 + seed}))


def arm(root, name, found, **arguments):
    for seed, knn in enumerate(found):
        run(root, name, seed, knn, **arguments)


def study(*contrasts, controls=()) -> Study:
    return Study("toy", "toy", "demo", "?", "", "make toy", "knn", list(contrasts), list(controls))


def untrained(name):
    return Control("untrained", "knn", name, "untrained")


def draw(root, design, sweep, seeds=3):
    args = argparse.Namespace(runs=root, seeds=list(range(seeds)), results=root / "results")
    sweeps.draw(args, design, sweep, METRICS, lambda runs: "ten pictures" if any(map(has_run, runs.values())) else "")
    return json.loads((root / "results" / "toy.json").read_text())


def has_run(by_seed):
    return any(one.args for one in by_seed.values())


@pytest.mark.parametrize(
    ("third", "own", "triple", "word"),
    [
        ("lower", "lower", "lower", sweeps.ALL),
        ("lower", "lower", "not resolved at n = 3", sweeps.SOME),
        ("not informative", "lower", "not resolved at n = 3", sweeps.ONLY),
        ("lower", "lower", "higher", sweeps.TURNS),
        ("higher", "lower", "not informative", sweeps.TURNS),
        ("lower", "not resolved at n = 3", "lower", sweeps.NOT),
        ("not informative",) * 3 + (sweeps.NOT,),
    ],
)
def test_what_the_words_at_three_rates_amount_to(third, own, triple, word):
    assert sweeps.held({"third": third, "": own, "triple": triple}) == word


def test_all_three_needs_all_three():
    assert sweeps.held({"third": "lower", "": "lower"}) == sweeps.SOME  # the third rate has not been run


def test_robustness_from_runs_to_verdict(tmp_path, capsys):
    """Lower at a third and once; at three times the arms overlap. The spread is the same everywhere."""
    for rate in ("", "@third", "@triple"):
        arm(tmp_path, f"base{rate}", [60.0, 61.0, 62.0])
        arm(tmp_path, f"arm{rate}", [20.0, 21.0, 22.0] if rate != "@triple" else [59.0, 62.0, 61.5])
        arm(tmp_path, f"other{rate}", [90.0, 91.0, 92.0])
    others = [one.replace("arm", "other") for one in TRIPLED]
    controls = map(untrained, ("base", "base@third", "base@triple"))
    found = draw(tmp_path, study("arm:base", "other:base", *TRIPLED, *others, controls=controls), ROBUST)
    assert found["verdict"] == f"{sweeps.SOME}: arm:base; {sweeps.ALL}: other:base"
    assert found["counted"] and found["primaries"] == 2 and "higher at all three rates" in found["finding"]
    assert "lower at a third; lower at base's rate; not resolved at n = 3 at three times" in found["finding"]
    assert "a third -40.0 (-42.3 to -37.7)" in found["finding"]
    assert "std ratio, arm:base: not resolved at n = 3 at all three rates" in found["finding"]
    assert (tmp_path / "results" / "toy-sweep.svg").exists() and found["finding"] in capsys.readouterr().out
    assert "arm@third" in (tmp_path / "results" / "toy.md").read_text()


def test_a_rate_whose_control_fails_is_no_finding_there(tmp_path):
    """At three times the rate base falls to its untrained level: what the arm loses against it says nothing."""
    for rate in ("", "@third", "@triple"):
        arm(tmp_path, f"base{rate}", [60.0, 61.0, 62.0] if rate != "@triple" else [11.0, 10.0, 12.0])
        arm(tmp_path, f"arm{rate}", [2.0, 3.0, 4.0])
    design = study("arm:base", *TRIPLED, controls=map(untrained, ("base", "base@third", "base@triple")))
    found = draw(tmp_path, design, ROBUST)
    assert found["verdict"] == f"{sweeps.SOME}: arm:base"
    assert "not informative at three times" in found["finding"] and not found["counted"]


def test_robustness_with_rates_that_have_no_run(tmp_path):
    arm(tmp_path, "base", [60.0, 61.0, 62.0])
    arm(tmp_path, "arm", [20.0, 21.0, 22.0])
    found = draw(tmp_path, study("arm:base", *TRIPLED, controls=[untrained("base")]), ROBUST)
    assert found["verdict"] == f"{sweeps.ONLY}: arm:base" and "a third –" in found["finding"]
    assert sum("3 of 3 missing" in note for note in found["notes"]) == 4


def test_a_curve_takes_the_arms_that_differ_in_the_dose_alone(tmp_path):
    for name, leak in {"base": 0.0, "half": 0.5, "all": 1.0, "tenth": 0.1}.items():
        arm(tmp_path, name, [1.0], leak=leak)
    arm(tmp_path, "other", [1.0], leak=0.3, lr=0.2)
    names = ["base", "all", "half", "tenth", "other", "absent"]
    runs = records.read_runs(tmp_path, names, [0])
    assert list(sweeps.doses(runs, "base", LEAK).items()) == [("base", 0), ("tenth", 0.1), ("half", 0.5), ("all", 1)]
    moving = sweeps.Sweep("?", ("knn",), "leak", moving=("lr",))
    assert list(sweeps.doses(runs, "base", moving)) == ["base", "tenth", "other", "half", "all"]
    assert sweeps.doses(runs, "absent", LEAK) == {}


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ({"a": "not resolved at n = 3", "b": "lower", "c": "lower"}, "lower from 0.2 up"),
        ({"a": "lower", "b": "not resolved at n = 3", "c": "lower"}, "lower from 0.5 up"),
        ({"a": "lower", "b": "lower", "c": "not resolved at n = 3"}, "no lasting difference up to 0.5"),
        ({"a": "higher", "b": "lower", "c": "lower"}, "lower from 0.2 up"),
    ],
)
def test_where_a_difference_sets_in(words, phrase):
    contrasts = [
        {"arm": name, "reference": "base", "metric": "knn", "word": word, "primary": name == "c"}
        for name, word in words.items()
    ]
    summary = {"contrasts": contrasts, "all_contrasts": contrasts}
    assert sweeps.onset(summary, {"base": 0.0, "a": 0.1, "b": 0.2, "c": 0.5}, "knn") == phrase


def test_a_reference_in_the_middle_is_left_both_ways():
    words = {"low": "lower", "mid": "not resolved at n = 3", "high": "higher"}
    contrasts = [
        {"arm": name, "reference": "base", "metric": "knn", "word": word, "primary": name == "low"}
        for name, word in words.items()
    ]
    summary = {"contrasts": contrasts, "all_contrasts": contrasts}
    along = {"low": 0.0, "mid": 0.2, "base": 0.5, "high": 4.0}
    assert sweeps.onset(summary, along, "knn") == "higher from 4 up; lower from 0 down"


def test_a_curve_from_runs_to_finding(tmp_path):
    for name, leak, found in [("base", 0.0, 60), ("x", 0.1, 59.5), ("y", 0.5, 30), ("all", 1.0, 12)]:
        arm(tmp_path, name, [found, found + 1.0, found + 2.0], leak=leak)
    design = study("all:base", "x:base", "y:base", "absent:base", controls=[untrained("base")])
    found = draw(tmp_path, design, LEAK)
    assert found["verdict"] == "lower" and found["question"] == "How much?"
    assert found["finding"].startswith(
        "kNN accuracy: 61.0 at 0, 60.5 at 0.1, 31.0 at 0.5, 13.0 at 1; against base: lower"
    )
    svg = (tmp_path / "results" / "toy-sweep.svg").read_text()
    assert svg.count(">base<") == 2 and ">x<" not in svg  # the plan's arms by name, in both panels


def test_without_runs_nothing_is_written(tmp_path, capsys):
    args = argparse.Namespace(runs=tmp_path, seeds=[0], results=tmp_path / "results")
    sweeps.draw(args, study("arm:base"), LEAK, METRICS, lambda runs: "")
    assert "no runs" in capsys.readouterr().out and not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------- the Makefile's


def asked(paper: str, scale: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(all arms with their flags, the sweeps with their contrasts) as make has them."""
    show = f"show: ; @$(foreach study,$({paper}.sweeps),echo 'study $(study) $($(study))';) $(foreach arm,$(call "
    show += f"every-arm,{paper},$({paper}.sweeps)),echo 'arm $(arm) $({paper}.$(arm))';)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    lines = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), f"SCALE={scale}", f"--eval={show}", "show"],
        env=clean, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    words = [line.split() for line in lines]
    arms = {name: flags for kind, name, *flags in words if kind == "arm"}
    return arms, {name: contrasts for kind, name, *contrasts in words if kind == "study"}


@pytest.mark.parametrize("scale", command.SCALES)
@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord", "bsa", "seqvcr"])
def test_every_arm_of_a_sweep_is_another_run(paper, scale, tmp_path):
    """No two arms of a sweep resolve to equal arguments; a third and three times are of the arm's own rate."""
    train = importlib.import_module(f"{paper}.train")
    arms, found = asked(paper, scale)
    extra = {("seqvcr", "paper"): ["--init-from", "none"], ("bsa", "paper"): ["--data", "x.npy"]}.get(
        (paper, scale), []
    )

    def arguments(name: str) -> dict:
        given = vars(train.parse_args(["--scale", scale, "--out", str(tmp_path / "x" / "0"), *extra, *arms[name]]))
        return {key: value for key, value in given.items() if key not in command.PLACES}

    assert f"{paper}-robustness" in found and len(found) > 1
    for study_name, contrasts in found.items():
        names = sorted({name for one in contrasts for name in one.split(":")})
        resolved = {name: arguments(name) for name in names if not name.startswith("no-pretraining")}
        assert len({json.dumps(one, sort_keys=True, default=str) for one in resolved.values()}) == len(resolved)
        for name, one in resolved.items():
            own, _, rate = name.rpartition("@")
            if rate in ("third", "triple"):
                factor = {"third": 0.333, "triple": 3}[rate]
                assert one == arguments(own) | {"lr": pytest.approx(factor * arguments(own)["lr"])}
        ends = [arguments(name) for name in contrasts[0].split(":")]
        sweep = importlib.import_module(f"{paper}.plot").SWEEPS[study_name]
        if sweep.dose:
            differing = {key for key in ends[0] if ends[0][key] != ends[1][key]}
            assert differing == {sweep.dose, *sweep.moving}
            reference, fixed = contrasts[0].split(":")[1], ends[0].keys() - {sweep.dose, *sweep.moving}
            along = [arm for arm, _, other in (one.partition(":") for one in contrasts) if other == reference]
            assert len(along) >= 4
            assert all(resolved[arm][key] == ends[1][key] for arm in along for key in fixed)


def test_judge_is_what_a_studys_verdict_is_made_of(tmp_path):
    arm(tmp_path, "base", [60.0, 61.0])
    arm(tmp_path, "arm", [20.0, 21.0])
    design = study("arm:base", controls=[untrained("base")])
    found = studies.summarise(design, records.read_runs(tmp_path, design.arms, [0, 1]), METRICS)
    assert studies.judge(found["contrasts"][0], found["controls"]) == found["verdict"] == "lower"
