"""Curves and robustness: doses, onsets, and what the verdicts at three rates amount to."""

import importlib
import json

import pytest

from common import cli
from common.study import plotting, results, sweeps
from common.study.design import RATES, ROBUSTNESS, Arm, Design, Metric, MustBeat, Settings, Study, Sweep, load

METRICS = {"knn": Metric("kNN accuracy", "%", 1, "higher"), "spread": Metric("std ratio", "", 2)}
ROBUST = Sweep(("knn", "spread"))
LEAK = Sweep(("knn", "spread"), "leak", "share")
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


def untrained(name):
    return MustBeat(name, "untrained", "knn", "untrained")


def draw(root, contrasts, guards, sweep, primary=1):
    """The summary of a study of these contrasts, drawn by what all plot.py share."""
    study = Study("toy-x", ROBUSTNESS if sweep is ROBUST else "How much?", contrasts, "knn", primary,
                  [untrained(name) for name in guards], extra=True, sweep=sweep)  # fmt: skip
    arms = [Arm(name, f"--name {name} --leak 0") for name in study.arms]
    design = Design("toy", "toy", METRICS, [study], arms, baselines=["untrained"])
    argv = ["toy-x", "--runs", str(root), "--seeds", "0", "1", "2", "--results", str(root / "results")]
    plotting.draw(argv, None, lambda scale, settings: design, described, no_figures)
    return json.loads((root / "results" / "toy-x.json").read_text())


def described(runs):
    return "ten pictures" if any(one.args for by_seed in runs.values() for one in by_seed.values()) else ""


def no_figures(view):
    raise AssertionError("a sweep has its own figure")


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
    guards = ("base", "base@third", "base@triple")
    found = draw(tmp_path, ["arm:base", "other:base", *TRIPLED, *others], guards, ROBUST, 2)
    assert found["verdict"] == f"{sweeps.SOME}: arm:base; {sweeps.ALL}: other:base"
    assert found["counted"] and "higher at all three rates" in found["finding"]
    assert "lower at a third; lower at base's rate; not resolved at n = 3 at three times" in found["finding"]
    assert "a third -40.0 (-42.3 to -37.7)" in found["finding"]
    assert "std ratio, arm:base: not resolved at n = 3 at all three rates" in found["finding"]
    assert (tmp_path / "results" / "toy-x-sweep.svg").exists() and found["finding"] in capsys.readouterr().out


def test_a_rate_whose_control_fails_is_no_finding_there(tmp_path):
    """At three times the rate base falls to its untrained level: what the arm loses against it says nothing."""
    for rate in ("", "@third", "@triple"):
        arm(tmp_path, f"base{rate}", [60.0, 61.0, 62.0] if rate != "@triple" else [11.0, 10.0, 12.0])
        arm(tmp_path, f"arm{rate}", [2.0, 3.0, 4.0])
    found = draw(tmp_path, ["arm:base", *TRIPLED], ("base", "base@third", "base@triple"), ROBUST)
    assert found["verdict"] == f"{sweeps.SOME}: arm:base"
    assert "not informative at three times" in found["finding"] and not found["counted"]


def test_robustness_with_rates_that_have_no_run(tmp_path):
    arm(tmp_path, "base", [60.0, 61.0, 62.0])
    arm(tmp_path, "arm", [20.0, 21.0, 22.0])
    found = draw(tmp_path, ["arm:base", *TRIPLED], ["base"], ROBUST)
    assert found["verdict"] == f"{sweeps.ONLY}: arm:base" and "third" not in found["finding"]
    assert found["not_run"] == ["base@third", "base@triple", "arm@third", "arm@triple"]
    assert found["notes"] == ["Not run: base@third, base@triple, arm@third, arm@triple."]


def test_a_curve_takes_the_arms_that_differ_in_the_dose_alone(tmp_path):
    for name, leak in {"base": 0.0, "half": 0.5, "all": 1.0, "tenth": 0.1}.items():
        arm(tmp_path, name, [1.0], leak=leak)
    arm(tmp_path, "other", [1.0], leak=0.3, lr=0.2)
    names = ["base", "all", "half", "tenth", "other", "absent"]
    runs = results.read_runs(tmp_path, names, [0])
    assert list(sweeps.doses(runs, "base", LEAK).items()) == [("base", 0), ("tenth", 0.1), ("half", 0.5), ("all", 1)]
    moving = Sweep(("knn",), "leak", moving=("lr",))
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
    found = draw(tmp_path, ["all:base", "x:base", "y:base", "absent:base"], ["base"], LEAK)
    assert found["not_run"] == ["absent"]
    assert found["verdict"] == "lower" and found["question"] == "How much?"
    assert found["finding"].startswith(
        "kNN accuracy: 61.0 at 0, 60.5 at 0.1, 31.0 at 0.5, 13.0 at 1; against base: lower"
    )
    svg = (tmp_path / "results" / "toy-x-sweep.svg").read_text()
    assert svg.count(">base<") == 2 and ">x<" not in svg  # the plan's arms by name, in both panels


def test_runs_that_cannot_be_compared_are_not_drawn(tmp_path, capsys):
    """Only a further arm has a run: nothing to compare it with."""
    arm(tmp_path, "x", [1.0], leak=0.1)
    with pytest.raises(FileNotFoundError):
        draw(tmp_path, ["all:base", "x:base"], ["base"], LEAK)
    assert "no runs" in capsys.readouterr().out


def test_a_curve_whose_runs_have_only_begun_has_no_value(tmp_path):
    for name in ("base", "all"):
        arm(tmp_path, name, [1.0], leak=0.1)
        (tmp_path / name / "0/metrics.json").unlink()
    assert draw(tmp_path, ["all:base"], ["base"], LEAK)["finding"] == "No value yet."


def test_without_runs_nothing_is_written(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        draw(tmp_path, ["arm:base"], ["base"], LEAK)
    assert "no runs" in capsys.readouterr().out and not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------- the papers'


@pytest.mark.parametrize("scale", cli.SCALES)
@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord", "bsa", "seqvcr"])
def test_every_arm_of_a_sweep_is_another_run(paper, scale, tmp_path):
    """No two arms of a sweep resolve to equal arguments; a third and three times are of the arm's own rate."""
    train = importlib.import_module(f"{paper}.train")
    design = load(paper, scale)
    extra = {("seqvcr", "paper"): ["--init-from", "none"], ("bsa", "paper"): ["--data", "x.npy"]}.get(
        (paper, scale), []
    )

    def arguments(name: str) -> dict:
        flags = design.arm(name).flags.split()
        given = vars(train.parse_args(["--scale", scale, "--out", str(tmp_path / "x" / "0"), *extra, *flags]))
        return {key: value for key, value in given.items() if key not in cli.NON_METHOD_FLAGS}

    found = [study for study in design.studies if study.sweep]
    assert found[0].name == f"{paper}-robustness" and len(found) > 1
    for study in found:
        resolved = {name: arguments(name) for name in study.arms if not name.startswith("no-pretraining")}
        assert len({json.dumps(one, sort_keys=True, default=str) for one in resolved.values()}) == len(resolved)
        for name, one in resolved.items():
            own, _, rate = name.rpartition("@")
            if rate in RATES:
                factor = {"third": 0.333, "triple": 3}[rate]
                assert one == arguments(own) | {"lr": pytest.approx(factor * arguments(own)["lr"])}
        arm, reference = study.pairs[0]
        if study.sweep.argument:
            varied = {study.sweep.argument, *study.sweep.moving}
            fixed = resolved[arm].keys() - varied
            assert {key for key, value in resolved[arm].items() if value != resolved[reference][key]} == varied
            along = [one for one, other in study.pairs if other == reference]
            assert len(along) >= 4
            assert all(resolved[one][key] == resolved[reference][key] for one in along for key in fixed)


@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord", "bsa", "seqvcr"])
def test_robustness_is_derived_from_the_primary_contrasts(paper):
    design = load(paper, "demo")
    plan = [study for study in design.studies if not study.extra]
    primary = dict.fromkeys(contrast for study in plan for contrast in study.contrasts[: study.primary])
    study = design.study(f"{paper}-robustness")
    assert list(study.contrasts[: study.primary]) == list(primary)
    for rate in RATES:
        shifted = {f"{arm}@{rate}:{reference}@{rate}" for arm, reference in study.pairs[: study.primary]}
        assert shifted < set(study.contrasts)
    assert all(study.primary_only.must_beat for study in design.studies)  # something guards every primary contrast


def test_settings_reach_the_design():
    pairs, tasks = Settings(pairs=("vgg13-vgg8",)), Settings(tasks=("lis",))
    study = load("cocord", "gpu", pairs).study("cocord-teacher-momentum")
    assert {arm.partition("@")[2] for arm in study.arms} == {"vgg13-vgg8", "vgg8"}
    assert "73.99" in study.published and "75.48" not in study.published
    assert load("seqvcr", "gpu", tasks).study("seqvcr-projection-width").pairs[0] == ("width-4096@lis", "width-512@lis")
    assert load("simsiam", "gpu").data and not load("simsiam", "gpu", Settings(own_data=True)).data
