"""Sweeps: swept values, means with verdicts, and the verdict over three learning rates."""

import importlib
import json
from dataclasses import replace

import pytest

from common import cli
from common.study import plotting, results, sweeps
from common.study.design import (
    RATES,
    ROBUSTNESS,
    Arm,
    Design,
    DesignError,
    Metric,
    MustBeat,
    Settings,
    Study,
    Sweep,
    load,
)

METRICS = {"knn": Metric("kNN accuracy", "%", 1, "higher"), "spread": Metric("std ratio", "", 2)}
ROBUST = Sweep(("knn", "spread"))
LEAK = Sweep(("knn", "spread"), "leak", "share")
AT_OTHER_RATES = ["arm@third:base@third", "arm@triple:base@triple"]


def run(root, arm, seed, knn, spread=0.5, **arguments):
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    given = {"seed": seed, "lr": 0.1, "out": str(folder), "leak": 0.0} | arguments
    (folder / "args.json").write_text(json.dumps({"arguments": given, "provenance": {"commit": "c"}}))
    (folder / "metrics.json").write_text(json.dumps({"knn": knn, "spread": spread, "untrained": 10.0 + seed}))


def arm(root, name, accuracies, **arguments):
    for seed, knn in enumerate(accuracies):
        run(root, name, seed, knn, **arguments)


def untrained(name):
    return MustBeat(name, "untrained", "knn", "untrained")


def draw(root, contrasts, tested, sweep, primary=1):
    """Draw a study of these contrasts with plotting.main and return its summary. `tested`: arms with a baseline."""
    study = Study("toy-x", ROBUSTNESS if sweep is ROBUST else "How much?", contrasts, "knn", primary,
                  [untrained(name) for name in tested], extra=True, sweep=sweep)  # fmt: skip
    arms = [Arm(name, f"--name {name} --leak 0") for name in study.arms]
    design = Design("toy", "toy", "demo", METRICS, [study], arms, baselines=["untrained"])
    argv = ["toy-x", "--runs", str(root), "--seeds", "0", "1", "2", "--results", str(root / "results")]
    plotting.main(argv, None, lambda scale, settings: design, describe, no_figures)
    return json.loads((root / "results" / "toy-x.json").read_text())


def describe(runs):
    return "ten pictures" if any(run.args for by_seed in runs.values() for run in by_seed.values()) else ""


def no_figures(view):
    raise AssertionError("the draw function of a paper must not be called for a sweep")


@pytest.mark.parametrize(
    ("third", "base", "triple", "verdict"),
    [
        ("worse", "worse", "worse", sweeps.ALL_RATES),
        ("worse", "worse", "unclear", sweeps.TWO_RATES),
        ("too weak to test", "worse", "unclear", sweeps.BASE_RATE_ONLY),
        ("worse", "worse", "better", sweeps.REVERSED),
        ("better", "worse", "too weak to test", sweeps.REVERSED),
        ("worse", "unclear", "worse", sweeps.NO_FINDING),
        ("too weak to test",) * 3 + (sweeps.NO_FINDING,),
    ],
)
def test_robustness_verdict_combines_the_verdicts_at_three_rates(third, base, triple, verdict):
    assert sweeps.robustness_verdict({"third": third, "": base, "triple": triple}) == verdict


def test_robust_verdict_requires_runs_at_all_three_rates():
    for third in ({}, {"third": "worse"}, {"third": "unclear"}, {"third": "worse", "triple": "not run"}):
        assert sweeps.robustness_verdict({"": "worse"} | third) == sweeps.INCOMPLETE
    assert sweeps.robustness_verdict({"third": "better", "": "worse"}) == sweeps.REVERSED


def test_robustness_from_runs_to_verdict(tmp_path, capsys):
    """The arm is lower at a third and at the base rate. At three times they overlap. The spread never differs."""
    for rate in ("", "@third", "@triple"):
        arm(tmp_path, f"base{rate}", [60.0, 61.0, 62.0])
        arm(tmp_path, f"arm{rate}", [20.0, 21.0, 22.0] if rate != "@triple" else [59.0, 62.0, 61.5])
        arm(tmp_path, f"other{rate}", [90.0, 91.0, 92.0])
    others = [contrast.replace("arm", "other") for contrast in AT_OTHER_RATES]
    tested = ("base", "base@third", "base@triple")
    summary = draw(tmp_path, ["arm:base", "other:base", *AT_OTHER_RATES, *others], tested, ROBUST, 2)
    assert summary["verdict"] == f"{sweeps.TWO_RATES}: arm − base; {sweeps.ALL_RATES}: other − base"
    finding = " ".join(summary["finding"])
    assert summary["has_finding"] and "better at all three rates" in finding
    assert "arm − base, kNN accuracy: worse at a third and base's rate, unclear at three times" in finding
    assert summary["headline"].startswith(
        "arm − base: worse at a third and base's rate, unclear at three times; other − base"
    )
    assert "a third -40.0 (-40.0 to -40.0)" in finding
    assert "arm − base, std ratio: unclear at all three rates" in finding
    assert (tmp_path / "results" / "toy-x-sweep.svg").exists() and finding in capsys.readouterr().out


def test_a_rate_at_which_base_fails_its_baseline_is_too_weak(tmp_path):
    """At three times the rate base is no better than untrained, so the contrast there is too weak to test."""
    for rate in ("", "@third", "@triple"):
        arm(tmp_path, f"base{rate}", [60.0, 61.0, 62.0] if rate != "@triple" else [11.0, 10.0, 12.0])
        arm(tmp_path, f"arm{rate}", [2.0, 3.0, 4.0])
    summary = draw(tmp_path, ["arm:base", *AT_OTHER_RATES], ("base", "base@third", "base@triple"), ROBUST)
    assert summary["verdict"] == f"{sweeps.TWO_RATES}: arm − base"
    assert "too weak to test at three times" in " ".join(summary["finding"]) and not summary["has_finding"]


def test_robustness_without_runs_at_other_rates(tmp_path):
    arm(tmp_path, "base", [60.0, 61.0, 62.0])
    arm(tmp_path, "arm", [20.0, 21.0, 22.0])
    summary = draw(tmp_path, ["arm:base", *AT_OTHER_RATES], ["base"], ROBUST)
    assert summary["verdict"] == f"{sweeps.INCOMPLETE}: arm − base" and "third" not in " ".join(summary["finding"])
    assert summary["not_run"] == ["base@third", "base@triple", "arm@third", "arm@triple"]
    assert summary["notes"] == ["Not run: base@third, base@triple, arm@third, arm@triple."]


def test_a_curve_has_the_arms_that_differ_only_in_the_swept_argument(tmp_path):
    for name, leak in {"base": 0.0, "half": 0.5, "all": 1.0, "tenth": 0.1}.items():
        arm(tmp_path, name, [1.0], leak=leak)
    arm(tmp_path, "other", [1.0], leak=0.3, lr=0.2)
    names = ["base", "all", "half", "tenth", "other", "absent"]
    runs = results.read_runs(tmp_path, dict.fromkeys(names, (0,)))
    swept = sweeps.swept_values(runs, "base", LEAK)
    assert list(swept.items()) == [("base", 0), ("tenth", 0.1), ("half", 0.5), ("all", 1)]
    covarying = Sweep(("knn",), "leak", covarying=("lr",))
    assert list(sweeps.swept_values(runs, "base", covarying)) == ["base", "tenth", "other", "half", "all"]
    assert sweeps.swept_values(runs, "absent", LEAK) == {}


def test_a_curve_has_arms_whose_first_runs_have_other_seeds_and_so_other_data(tmp_path):
    run(tmp_path, "base", 0, 1.0, leak=0.0, data_seed=0)
    run(tmp_path, "all", 1, 1.0, leak=1.0, data_seed=1)
    runs = results.read_runs(tmp_path, {"base": (0,), "all": (1,)})
    assert sweeps.swept_values(runs, "base", LEAK) == {"base": 0, "all": 1}


def test_a_curve_from_runs_to_finding(tmp_path):
    for name, leak, knn in [("base", 0.0, 60), ("x", 0.1, 59.5), ("y", 0.5, 30), ("all", 1.0, 12)]:
        arm(tmp_path, name, [knn, knn + 1.0, knn + 2.0], leak=leak)
    summary = draw(tmp_path, ["all:base", "x:base", "y:base", "absent:base"], ["base"], LEAK)
    assert summary["not_run"] == ["absent"]
    assert summary["verdict"] == "worse" and summary["question"] == "How much?"
    assert (
        summary["headline"] == "kNN accuracy, against base: 61.0 at 0, 60.5 at 0.1, 31.0 at 0.5, 13.0 at 1 (all worse)."
    )
    spread = "std ratio, against base: 0.50 at 0, 0.50 at 0.1, 0.50 at 0.5, 0.50 at 1 (all unclear)."
    assert " ".join(summary["finding"]) == f"{summary['headline']} {spread}"
    svg = (tmp_path / "results" / "toy-x-sweep.svg").read_text()
    assert svg.count(">base<") == 2 and ">x<" not in svg  # only the main study's arms have labels, in both panels


def test_a_curve_names_the_verdict_of_each_value_if_they_differ(tmp_path):
    for name, leak, knn in [("low", 0.0, 40), ("base", 0.1, 60), ("all", 1.0, 65)]:
        arm(tmp_path, name, [knn, knn + 1.0, knn + 2.0], leak=leak)
    summary = draw(tmp_path, ["all:base", "low:base"], ["base"], LEAK)
    assert summary["headline"] == "kNN accuracy, against base: 41.0 at 0 (worse), 61.0 at 0.1, 66.0 at 1 (better)."


def test_a_curve_is_drawn_before_the_arm_of_its_first_contrast_has_run(tmp_path):
    for name, leak in {"base": 0.0, "x": 0.1}.items():
        arm(tmp_path, name, [60.0, 61.0, 62.5], leak=leak)
    summary = draw(tmp_path, ["all:base", "x:base"], ["base"], LEAK)
    assert summary["headline"] == "kNN accuracy, against base: 61.2 at 0, 61.2 at 0.1 (unclear)."


def test_runs_without_a_reference_are_not_drawn(tmp_path, capsys):
    """Only an arm of a secondary contrast has a run."""
    arm(tmp_path, "x", [1.0], leak=0.1)
    with pytest.raises(FileNotFoundError):
        draw(tmp_path, ["all:base", "x:base"], ["base"], LEAK)
    assert "no finished runs" in capsys.readouterr().out


def test_a_curve_of_unfinished_runs_has_no_value(tmp_path):
    for name in ("base", "all"):
        arm(tmp_path, name, [1.0], leak=0.1)
        (tmp_path / name / "0/metrics.json").unlink()
    assert " ".join(draw(tmp_path, ["all:base"], ["base"], LEAK)["finding"]) == "No value yet."


def test_nothing_is_written_without_runs(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        draw(tmp_path, ["arm:base"], ["base"], LEAK)
    assert "no finished runs" in capsys.readouterr().out and not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------- papers


@pytest.mark.parametrize("scale", cli.SCALES)
@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord", "bsa", "seqvcr"])
def test_all_arms_of_a_sweep_have_different_arguments(paper, scale, tmp_path):
    """No two arms resolve to equal arguments. The other rates multiply the arm's own learning rate."""
    train = importlib.import_module(f"{paper}.train")
    design = load(paper, scale)
    extra = {("seqvcr", "paper"): ["--init-from", "none"], ("bsa", "paper"): ["--data", "x.npy"]}.get(
        (paper, scale), []
    )

    def arguments(name: str) -> dict:
        flags = design.arm(name).flags.split()
        args = vars(train.parse_args(["--scale", scale, "--out", str(tmp_path / "x" / "0"), *extra, *flags]))
        return {key: value for key, value in args.items() if key not in cli.NON_METHOD_FLAGS}

    sweep_studies = [study for study in design.studies if study.sweep]
    assert sweep_studies[0].name == f"{paper}-robustness" and len(sweep_studies) > 1
    for study in sweep_studies:
        resolved = {name: arguments(name) for name in study.arms if not name.startswith("no-pretraining")}
        assert len({json.dumps(args, sort_keys=True, default=str) for args in resolved.values()}) == len(resolved)
        for name, args in resolved.items():
            at_base_rate, _, rate = name.rpartition("@")
            if rate in RATES:
                factor = {"third": 0.333, "triple": 3}[rate]
                expected = arguments(at_base_rate)
                assert args == expected | {"lr": pytest.approx(factor * expected["lr"])}
        arm, reference = study.pairs[0]
        if study.sweep.argument:
            varied = {study.sweep.argument, *study.sweep.covarying}
            fixed = resolved[arm].keys() - varied
            assert {key for key, value in resolved[arm].items() if value != resolved[reference][key]} == varied
            swept = [name for name, other in study.pairs if other == reference]
            assert len(swept) >= 2  # at least three values with that of the reference
            assert all(resolved[name][key] == resolved[reference][key] for name in swept for key in fixed)


PAPERS = ["simsiam", "conmim", "cocord", "bsa", "seqvcr"]


@pytest.mark.parametrize("scale", cli.SCALES)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_an_a_a_study(paper, scale):
    """The arm has the flags of base and another seed. Metric and margin are those of the main studies."""
    design = load(paper, scale)
    study, main_study = design.study(f"{paper}-base-again"), design.studies[0]
    ((arm, reference),) = study.pairs
    assert reference == design.base and arm.replace("-again", "") == reference
    again, base = design.arm(arm), design.arm(reference)
    assert again.flags.split() == [*base.flags.split(), "--seed-offset", "1000"] and again.needs == base.needs
    assert study.expected == {arm: "no difference"} and study.extra and study.group == "calibration"
    assert (study.metric, study.margin) == (main_study.metric, main_study.margin)
    assert study.margin and not study.must_beat
    assert study.seeds == main_study.seeds == study.seeds_of(arm) == study.seeds_of(reference)


@pytest.mark.parametrize("scale", cli.SCALES)
@pytest.mark.parametrize("paper", PAPERS)
def test_seeds_depend_on_the_scale_and_on_the_contrast(paper, scale):
    """Primary contrasts have all seeds of a scale, others the first n_other."""
    first, n = {"demo": (10, 10), "gpu": (0, 5), "paper": (0, 5)}[scale]
    for study in load(paper, scale).studies:
        assert study.seeds == tuple(range(first, first + min(study.n, n)))
        for arm in study.arms:
            primary = arm in study.primary_only.arms
            assert study.seeds_of(arm) == (study.seeds if primary else study.seeds[: study.n_other])


MEASURED_IF_DIVERGED = {  # metrics that a diverged run has too: they do not depend on its weights
    "simsiam": {"untrained_knn_accuracy"},
    "conmim": set(),
    "cocord": {"teacher_accuracy", "examples_per_second"},
    "bsa": {"untrained_fixed_topk_reconstruction_loss"},
    "seqvcr": {"chance_exact_match"},
}


@pytest.mark.parametrize("paper", PAPERS)
def test_a_diverged_run_has_no_value_of_a_metric_that_depends_on_its_weights(paper):
    evaluate = importlib.import_module(f"{paper}.eval")
    for scale in cli.SCALES:
        design = load(paper, scale)
        shown = {*design.metrics, *design.baselines}
        assert shown - set(evaluate.METRICS_IF_FINITE) == MEASURED_IF_DIVERGED[paper] & shown
        assert set(design.chance) <= set(evaluate.METRICS_IF_FINITE)


@pytest.mark.parametrize("scale", ["demo", "gpu"])
@pytest.mark.parametrize("paper", PAPERS)
def test_chance_is_declared_for_every_judged_metric_and_data_set(paper, scale, tmp_path):
    train, design = importlib.import_module(f"{paper}.train"), load(paper, scale)
    judged = {study.metric for study in design.studies}
    judged |= {item.metric for study in design.studies for item in study.must_beat}
    for arm in dict.fromkeys(arm for study in design.studies for arm in study.arms):
        flags = design.arm(arm).flags.split()
        args = train.parse_args(["--scale", scale, "--out", str(tmp_path / "x" / "0"), *flags])
        for metric in (name for name in judged if design.metrics[name].better):
            chance = design.chance[metric]
            assert chance.get(getattr(args, "data_set", ""), chance.get("")) is not None


def toy_design(study, **options):
    arms = [Arm(name, f"--name {name}") for name in ("base", "arm", "more")]
    return Design("toy", "Toy", "demo", METRICS, [study], arms, baselines=["untrained"], **options)


def toy_study(**options):
    contrasts = ["arm:base", "more:base"]
    return Study("toy-x", "How much?", contrasts, "knn", must_beat=[untrained("base")], margin=1.0, **options)


@pytest.mark.parametrize(
    ("contrasts", "expected", "message"),
    [
        (["arm:base"], {"more": "worse"}, "expected must name the arms of the primary contrasts"),
        (["arm:base", "more:base"], {"arm": "worse"}, "expected must name the arms of the primary contrasts"),
        (["arm:base"], {"arm": "worse", "more": "worse"}, "expected must name the arms of the primary contrasts"),
        (["arm:base", "arm:more"], {"arm": "worse"}, "each once"),
        (["arm:base"], {"arm": "unclear"}, "invalid expected 'unclear': give one of no difference, worse, better"),
        (["arm:base"], {"arm": "worst"}, "invalid expected 'worst'"),
    ],
)
def test_expected_names_every_primary_arm_with_a_finding(contrasts, expected, message):
    must_beat = [untrained("base"), untrained("more")]
    study = Study("toy-x", "How much?", contrasts, "knn", len(contrasts), must_beat, extra=True, expected=expected)
    with pytest.raises(DesignError, match=message):
        toy_design(study)


def test_a_calibration_is_a_group_and_its_expected_verdicts_are_kept():
    study = replace(toy_study(), extra=True, expected={"arm": "worse"})
    assert toy_design(study).study("toy-x").group == "calibration"
    design = toy_design(toy_study())
    assert [study.group for study in design.studies] == ["all", "calibration"]
    with pytest.raises(DesignError, match="metric 'kNN' is not declared"):
        toy_design(toy_study(), chance={"kNN": {"": 10.0}})


def test_plot_reads_the_declared_seeds_of_every_arm(tmp_path):
    """Also if a secondary arm has more runs. With --seeds all arms have the same seeds."""
    for seed in (10, 11, 12):
        for name, knn in (("base", 60.0), ("arm", 40.0), ("more", 50.0)):
            run(tmp_path, name, seed, knn + seed % 2, data_seed=seed)
    design, views = toy_design(toy_study(n=3, n_other=2), chance={"knn": {"": 1.0}}), []

    def draw_nothing(view):
        views.append(view)
        return {}

    for seeds in ([], ["--seeds", "11", "12"]):
        argv = ["toy-x", "--runs", str(tmp_path), "--results", str(tmp_path / "results"), *seeds]
        plotting.main(argv, None, lambda scale, settings: design, describe, draw_nothing)
    declared, given = views
    assert [list(by_seed) for by_seed in declared.runs.values()] == [[10, 11, 12], [10, 11, 12], [10, 11]]
    assert [list(by_seed) for by_seed in given.runs.values()] == [[11, 12]] * 3
    assert (list(declared.seeds), list(given.seeds)) == ([10, 11, 12], [11, 12])
    assert declared.chance == {"knn": {"": 1.0}} and not declared.summary["notes"]
    assert {view.summary["seed_draws"] for view in views} == {"data, initial weights and order"}


@pytest.mark.parametrize("paper", PAPERS)
def test_robustness_is_derived_from_the_primary_contrasts(paper):
    design = load(paper, "demo")
    main_studies = [study for study in design.studies if not study.extra]
    for metric in {study.metric for study in main_studies}:
        primary = dict.fromkeys(
            contrast
            for study in main_studies
            if study.metric == metric
            for contrast in study.contrasts[: study.primary]
        )
        (study,) = (other for other in design.studies if "-robustness" in other.name and other.metric == metric)
        assert list(study.contrasts[: study.primary]) == list(primary)
        for rate in RATES:
            shifted = {f"{arm}@{rate}:{reference}@{rate}" for arm, reference in study.pairs[: study.primary]}
            assert shifted < set(study.contrasts)
    # Every primary contrast has a baseline, except in calibrations.
    assert all(study.primary_only.must_beat or study.expected for study in design.studies)


def test_pairs_tasks_and_own_data_change_the_design():
    pairs, tasks = Settings(pairs=("vgg13-vgg8",)), Settings(tasks=("lis",))
    study = load("cocord", "gpu", pairs).study("cocord-teacher-momentum")
    assert {arm.partition("@")[2] for arm in study.arms} == {"vgg13-vgg8", "vgg8"}
    assert "73.99" in study.published and "75.48" not in study.published
    assert load("seqvcr", "gpu", tasks).study("seqvcr-projection-width").pairs[0] == ("width-4096@lis", "width-512@lis")
    assert load("simsiam", "gpu").data and not load("simsiam", "gpu", Settings(own_data=True)).data
