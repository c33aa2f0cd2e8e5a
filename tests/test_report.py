"""From run folders to statistics, verdicts, findings, tables and figures of a toy study. test_page.py: the page."""

import csv
import json
import re
from dataclasses import replace

import pytest
from scipy import stats

from common.study import analysis, figures, results, tables
from common.study.design import Metric, MustBeat, Study

METRICS = {
    "knn": Metric("kNN accuracy", "%", 1, "higher"),
    "spread": Metric("std ratio", "", 2),
    "loss": Metric("training loss", "", 3, judged=False),
}
BASE = [60.0, 64.0, 62.0, 66.0, 61.0]
ARM = [12.0, 13.0, 11.0, 12.5, 11.5]
UNTRAINED = [20.0, 21.0, 19.0, 20.5, 20.2]


def study(**changes) -> Study:
    default = Study(
        name="toy-arm",
        question="What does <b>the arm</b> do?",
        contrasts=["arm:base"],
        metric="knn",
        must_beat=[MustBeat("base", "untrained", "knn", baseline_metric="untrained_knn")],
    )
    return replace(default, **changes)


ABOUT = {"paper": "toy", "scale": "demo", "data": "ten pictures", "reproduce": "make toy-arm SCALE=demo", "not_run": []}


def run(root, arm, seed, knn, untrained=20.0, source="a" * 64, device="cpu", **metrics):
    """Write the files of a finished run. `knn` None: the run diverged."""
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    provenance = {"commit": "c", "dirty": False, "torch": "2", "device": device, "threads": 1, "world": 1}
    provenance |= {"data": "d" * 64, "source": source}
    arguments = {"seed": seed, "epochs": 2, "out": str(folder)}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, "provenance": provenance}))
    lines = [{"epoch": epoch, "knn": epoch * (knn or 1.0), "loss": -epoch} for epoch in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "flags").write_text(f"flags: --{arm}\n")
    metrics = {"knn": knn, "spread": 0.5 + seed / 10, "loss": -0.5, "untrained_knn": untrained} | metrics
    if knn is None:
        metrics = dict.fromkeys(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics | {"diverged": knn is None, "seconds": 36.0}))
    return folder


def grid(root, **arms):
    """Write runs of several arms, one kNN accuracy per seed. The untrained accuracies are UNTRAINED."""
    for arm, accuracies in arms.items():
        for seed, knn in enumerate(accuracies):
            run(root, arm.replace("_", "-"), seed, knn, UNTRAINED[seed % 5])


def summarise(root, seeds=5, remark_of=None, **changes):
    design = study(**changes)
    return ABOUT | analysis.summarise(design, results.read_runs(root, design.arms, range(seeds)), METRICS, remark_of)


def test_numbers_equal_scipy(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    summary = summarise(tmp_path)
    contrast = summary["contrasts"][0]
    expected = stats.ttest_rel(ARM, BASE)
    low, high = expected.confidence_interval()
    assert (contrast["mean"], contrast["arm_mean"], contrast["reference_mean"]) == pytest.approx((-50.6, 12.0, 62.6))
    assert (contrast["low"], contrast["high"], contrast["p"]) == pytest.approx((low, high, expected.pvalue))
    assert contrast["correlation"] == pytest.approx(stats.pearsonr(ARM, BASE).statistic)
    assert (summary["version"], summary["verdict"], summary["counted"]) == (2, "worse", True)
    baseline = stats.ttest_rel(BASE, UNTRAINED).confidence_interval()
    assert (summary["controls"][0]["low"], summary["controls"][0]["passed"]) == (pytest.approx(baseline.low), True)
    row = summary["rows"][0]
    assert (row["arm"], row["flags"], row["metrics"]["knn"]["values"]["3"]) == ("base", "--base", 66.0)
    assert summary["headline"] == "arm hurts: kNN accuracy 62.6 -> 12.0 % (untrained 20.1)."
    numbers = f"arm 12.0, base 62.6; 95 % interval {low:.1f} to {high:.1f}, n = 5"
    assert summary["finding"] == f"kNN accuracy: arm minus base is -50.6 points, worse ({numbers})."
    assert summary["provenance"]["source"] == "a" * 64 and summary["provenance"]["hours"] == pytest.approx(0.1)
    assert summary["notes"] == []


def test_missing_and_inconsistent_runs_are_counted_and_reported(tmp_path):
    grid(tmp_path, base=BASE[:3], arm=[12.0, None, 13.0, 11.0])
    run(tmp_path, "base", 4, 65.0, source="b" * 64, device="NVIDIA H200")
    (tmp_path / "arm" / "3" / "metrics.json").write_text('{"knn": 11')
    with open(tmp_path / "base" / "0" / "train.jsonl", "a") as log:
        log.write('{"epoch": 3, "kn')
    arguments = json.loads((tmp_path / "arm" / "2" / "args.json").read_text())
    arguments["arguments"]["epochs"] = 7
    (tmp_path / "arm" / "2" / "args.json").write_text(json.dumps(arguments))
    summary = summarise(tmp_path)
    assert summary["notes"] == [
        "base: 1 of 5 missing (seed 3).",
        "base, seed 0: skipped an unreadable line of train.jsonl.",
        "arm: 2 of 5 missing (seed 3, 4).",
        "arm: 1 of 5 diverged, not averaged (seed 1).",
        "arm, seed 3: metrics.json cannot be read: delete it, and make evaluates the run again.",
        "arm: its seeds differ in --epochs (2, 7).",
        "The runs mix versions of the code (sha256): aaaaaaaaaaaa, bbbbbbbbbbbb.",
        "The runs mix devices: NVIDIA H200, cpu.",
    ]
    row = summary["rows"][1]
    assert (row["diverged"], row["missing"]) == ([1], [3, 4])
    assert (row["metrics"]["knn"]["n"], row["metrics"]["knn"]["mean"]) == (2, 12.5)
    contrast = summary["contrasts"][0]  # of the seeds that both arms have finished
    assert (contrast["n"], contrast["arm_mean"], contrast["reference_mean"]) == (2, 12.5, 61.0)
    assert "arm: 1 of 5 diverged, not averaged." in summary["finding"] and "n = 2" in summary["finding"]
    cells = tables.arms_table(summary)[2]
    assert cells[-2:] == ["2", "1 of 5 diverged; 2 of 5 missing"]


def test_a_difference_is_that_of_the_seeds_that_both_arms_have_finished(tmp_path):
    for seed in (0, 1, 2):
        run(tmp_path, "base", seed, 60.0 + 10 * seed, untrained=20.0)
        run(tmp_path, "arm", seed + 1, 60.0 + 10 * (seed + 1) - seed, untrained=20.0)
    contrast = summarise(tmp_path)["contrasts"][0]
    assert (contrast["n"], contrast["mean"]) == (2, -0.5) and contrast["reference_mean"] == 75.0


def test_a_finite_value_of_a_diverged_run_is_not_averaged(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM[:4])
    run(tmp_path, "arm", 4, 99.0, diverged=True)
    path = tmp_path / "arm" / "4" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": True}))
    assert summarise(tmp_path)["rows"][1]["metrics"]["knn"]["n"] == 4


def test_null_and_non_finite_values_are_excluded(tmp_path):
    for seed, knn in enumerate([60.0, float("nan"), float("inf")]):
        run(tmp_path, "base", seed, knn)
    run(tmp_path, "base", 3, 62.0, spread=None)
    runs = results.read_runs(tmp_path, ["base"], range(4))
    assert results.values(runs, "base", "knn") == {0: 60.0, 3: 62.0}
    assert list(results.values(runs, "base", "spread")) == [0, 1, 2]
    assert results.notes(runs, ["spread"]) == []  # null means "does not apply"; only an absent key is noted
    assert results.notes(runs, ["sprad"]) == ["base: 4 of 4 without sprad (seed 0, 1, 2, 3)."]


def test_an_arm_with_only_diverged_seeds_has_no_verdict(tmp_path):
    grid(tmp_path, base=BASE, arm=[None] * 5)
    summary = summarise(tmp_path)
    assert (summary["verdict"], summary["counted"]) == ("arm: 5 of 5 diverged", False)
    assert "arm:base cannot be compared on kNN accuracy" in summary["finding"]


def test_a_study_whose_base_fails_its_baseline_is_too_weak(tmp_path):
    grid(tmp_path, base=UNTRAINED[::-1], arm=ARM)  # base learnt nothing, although the arm is much lower
    summary = summarise(tmp_path)
    assert summary["contrasts"][0]["high"] < 0 and summary["controls"][0]["passed"] is False
    assert (summary["contrasts"][0]["word"], summary["verdict"]) == ("too weak to test", "too weak to test")
    assert (
        not summary["counted"]
        and summary["headline"]
        == "Too weak to test: kNN accuracy of base (20.1) is not clearly above that of untrained (20.1)."
    )
    assert summary["finding"].startswith("Too weak to test: kNN accuracy of base (20.1)")
    spread = [contrast for contrast in summary["all_contrasts"] if contrast["metric"] == "spread"]
    assert [contrast["word"] for contrast in spread] == ["unclear"]  # the baseline says nothing about other metrics


def test_a_failed_baseline_of_another_reference_does_not_change_the_primary_verdict(tmp_path):
    """`other` fails its baseline. Contrasts with it are not informative; the primary contrast keeps its verdict."""
    for seed in range(5):
        for arm, knn in (("base", 60.0), ("arm", 40.0), ("other", 15.0)):
            run(tmp_path, arm, seed, knn + seed, untrained=15.0 + seed)
    must_beat = [MustBeat(arm, "untrained", "knn", baseline_metric="untrained_knn") for arm in ("base", "other")]
    summary = summarise(tmp_path, contrasts=["arm:base", "arm:other"], must_beat=must_beat)
    assert [baseline["passed"] for baseline in summary["controls"]] == [True, False]
    assert summary["verdict"] == "worse" and not summary["finding"].startswith("Too weak")
    assert "Contrasts with other are too weak to test" in summary["finding"]


def test_the_baseline_of_a_contrasts_arm_takes_precedence_over_those_of_its_setting(tmp_path):
    """Two arms of one setting have baselines. `low` fails, and only its contrast is not informative."""
    for seed in range(5):
        for arm, knn in (("base", 60.0), ("high", 80.0), ("low", 15.0)):
            run(tmp_path, arm, seed, knn + seed, untrained=15.0 + seed)
    must_beat = [MustBeat(arm, "chance", "knn", baseline_metric="untrained_knn") for arm in ("low", "high")]
    summary = summarise(tmp_path, contrasts=["high:base", "low:base"], primary=2, must_beat=must_beat)
    assert summary["verdict"] == "high: better; low: too weak to test"


def test_baselines_by_arm_direction_and_setting(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM, scratch=UNTRAINED)
    other = [MustBeat("base", "no pretraining", "knn", baseline_arm="scratch")]
    assert summarise(tmp_path, must_beat=other)["controls"][0]["passed"] is True
    design, lower = study(must_beat=other), METRICS | {"knn": replace(METRICS["knn"], better="lower")}
    summary = analysis.summarise(design, results.read_runs(tmp_path, design.arms, range(5)), lower)
    assert (summary["controls"][0]["passed"], summary["counted"]) == (False, False)
    for setting, accuracies in {"a": BASE, "b": UNTRAINED[::-1]}.items():  # base learns only in setting a
        grid(tmp_path, **{f"base@{setting}": accuracies, f"arm@{setting}": ARM})
    must_beat = [MustBeat(f"base@{setting}", "untrained", "knn", "untrained_knn") for setting in "ab"]
    both = summarise(tmp_path, contrasts=["arm@a:base@a", "arm@b:base@b"], primary=2, must_beat=must_beat)
    assert both["verdict"] == "arm@a: worse; arm@b: too weak to test" and both["counted"]


def test_there_is_no_finding_if_the_baseline_was_not_run(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    missing = summarise(tmp_path, must_beat=[MustBeat("base", "no pretraining", "knn", baseline_arm="scratch")])
    assert (missing["verdict"], missing["counted"]) == ("no baseline", False)


def test_the_clearest_effect_on_another_metric_is_said_as_descriptive(tmp_path):
    metrics = METRICS | {
        "linear": Metric("linear accuracy", "%", 1, "higher"),
        "noise": Metric("noise", "", 1, "higher"),
    }
    for seed in range(5):
        run(tmp_path, "base", seed, BASE[seed], UNTRAINED[seed], linear=80.0 + seed, noise=float(seed % 2))
        run(
            tmp_path,
            "arm",
            seed,
            BASE[seed] - 0.1 * seed,
            UNTRAINED[seed],
            linear=70.0 + seed % 3,
            noise=float(seed % 3),
        )
    design = study()
    summary = analysis.summarise(design, results.read_runs(tmp_path, design.arms, range(5)), metrics)
    assert summary["remark"] == "Descriptive: linear accuracy of arm 82.0 -> 70.8 %."
    assert summarise(tmp_path)["remark"] == ""  # std ratio has no better side, training loss is not judged


def test_no_difference_requires_a_margin(tmp_path):
    grid(tmp_path, base=BASE, arm=[value + noise for value, noise in zip(BASE, (0.1, -0.2, 0.3, 0, -0.1), strict=True)])
    assert summarise(tmp_path)["verdict"] == "unclear"
    wide = summarise(tmp_path, margin=4.0)
    assert (wide["verdict"], wide["counted"]) == ("no difference", True)
    assert "the interval lies within the margin of 4.0 points" in wide["finding"]
    assert wide["headline"] == "arm makes no difference: kNN accuracy 62.6 -> 62.6 % (untrained 20.1)."
    assert {contrast["word"] for contrast in wide["all_contrasts"] if contrast["metric"] == "spread"} == {"unclear"}


def test_an_unclear_contrast_says_how_many_seeds_its_spread_needs(tmp_path):
    """The number depends on spread and margin, never on the observed effect."""
    noise = [3.0, -4.0, 1.0, -2.0, 2.5]
    for effect in (0.0, 0.5):
        folder = tmp_path / str(effect)
        grid(folder, base=BASE, arm=[value + effect + e for value, e in zip(BASE, noise, strict=True)])
        contrast = summarise(folder, margin=1.0)["contrasts"][0]
        assert (contrast["word"], contrast["seeds_needed"]) == ("unclear", 38)
    assert "38 seeds would give a half-width of the margin" in summarise(folder, margin=1.0)["finding"]
    assert summarise(folder)["contrasts"][0]["seeds_needed"] is None  # without a margin


def test_one_seed_gives_values_but_no_interval(tmp_path):
    grid(tmp_path, base=[60.0], arm=[12.0])
    summary = summarise(tmp_path, seeds=1)
    assert (summary["verdict"], summary["counted"]) == ("one seed", False)
    assert summary["controls"][0]["passed"] is None and summary["contrasts"][0]["low"] is None
    expected = "kNN accuracy: arm minus base is -48.0 points (arm 12.0, base 60.0; one seed, no interval)."
    assert summary["finding"] == expected
    assert summary["headline"] == "arm, one seed: kNN accuracy 60.0 -> 12.0 % (untrained 20.0)."
    assert "±" not in tables.markdown(tables.arms_table(summary)) and "one" in tables.caption(summary)


def test_a_metric_with_judged_false_gets_no_verdict(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    contrasts = summarise(tmp_path)["all_contrasts"]
    assert {contrast["word"] for contrast in contrasts if contrast["metric"] == "loss"} == {"not judged"}


def test_remark_of_gets_only_finished_seeds_and_the_finding_contains_its_remark(tmp_path):
    grid(tmp_path, base=BASE, arm=[*ARM[:4], None], other=ARM)
    seeds_per_call = []

    def remark_of(metrics):
        seeds_per_call.append(len(metrics))
        return "collapsed in every seed" if all(seed["knn"] < 15 for seed in metrics) else None

    summary = summarise(tmp_path, remark_of=remark_of, contrasts=["arm:base", "other:base"])
    assert seeds_per_call == [5, 4, 5]
    assert [row["word"] for row in summary["rows"]] == [None, *["collapsed in every seed"] * 2]
    assert "arm collapsed in every seed" in summary["finding"]
    assert re.search(r"\(descriptive\): other:base worse \(-50\.6, -\d+\.\d to -\d+\.\d\)\.$", summary["finding"])


def test_json_csv_and_markdown_contain_the_same_numbers(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    summary = summarise(tmp_path)
    tables.write_tables(summary, tmp_path)
    assert json.loads((tmp_path / "toy-arm.json").read_text()) == json.loads(json.dumps(summary))
    rows = list(csv.DictReader((tmp_path / "toy-arm.csv").open()))
    knn = [row for row in rows if row["metric"] == "knn"]
    assert [float(row["value"]) for row in knn if row["kind"] == "seed" and row["arm"] == "arm"] == ARM
    assert [float(row["mean"]) for row in knn if row["kind"] == "arm"] == pytest.approx([62.6, 12.0])
    difference = next(row for row in knn if row["kind"] == "difference")
    assert (difference["reference"], difference["word"]) == ("base", "worse") and difference["correlation"]
    half = stats.t.ppf(0.975, 4) * stats.sem(BASE)
    text = tables.as_markdown(summary)
    assert f"| base | --base | 62.6 ± {half:.1f} |" in text and "95 % Student-t interval" in text


def test_numbers_are_never_shown_as_negative_zero():
    assert tables.format_number(-0.04, vars(METRICS["knn"])) == "0.0"
    assert tables.format_number(None, vars(METRICS["knn"])) == "–"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two folders with the same two figures, each drawn separately."""
    root = tmp_path_factory.mktemp("drawn")
    grid(root / "runs", base=BASE, arm=ARM)
    for name in ("one", "two"):
        (root / name).mkdir()
        draw(root / "runs", root / name, ("toy-arm", "toy-arm-width-dots"))
    return root


def draw(root, folder, names):
    design = study()
    runs = results.read_runs(root, design.arms, range(5))
    panels = [figures.Curves("kNN accuracy (%)", results.series(runs, "knn"), {"chance": 10.0})]
    styles = figures.arm_styles(design.arms, [design.arms])
    figures.save(figures.curves(panels, styles).figure, folder, names[0])
    accuracies = {arm: list(results.values(runs, arm, "knn").values()) for arm in design.arms}
    dots = [figures.Dots("kNN", accuracies, {"base": UNTRAINED})]
    dots += [figures.Dots("again", accuracies, lines={"chance": 10.0})]
    figures.save(figures.dots(dots, styles, {"arm": "1 of 5 diverged"}).figure, folder, names[1])


def test_curves_show_mean_and_range_of_complete_seeds(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    (tmp_path / "arm" / "1" / "train.jsonl").write_text('{"epoch": 0, "knn": 1}\n{"epoch": 1, "knn": NaN}\n')
    runs = results.read_runs(tmp_path, ["base", "arm"], range(6))
    curves = results.series(runs, "knn")
    assert len(curves["base"]) == 5 and curves["base"][1] == ([0, 1, 2], [0.0, 64.0, 128.0])
    assert curves["arm"][1] == ([0], [1])
    styles = figures.arm_styles(["base", "arm"], [])
    axis = figures.curves([figures.Curves("x", curves)], styles).figure.axes[0]
    means = [line.get_ydata()[-1] for line in axis.lines if len(line.get_xdata()) == 3]
    complete = [knn for seed, knn in enumerate(ARM) if seed != 1]  # the shorter curve is not averaged
    assert means == pytest.approx([2 * sum(complete) / 4, 2 * sum(BASE) / 5])
    band = axis.collections[-1].get_paths()[0].vertices
    assert set(band[band[:, 0] == 2, 1]) == {120.0, 132.0}  # lowest and highest seed of base in the last epoch


def test_figures_are_reproducible_and_arms_have_different_styles(drawn):
    for path in (drawn / "one").iterdir():
        assert path.read_bytes() == (drawn / "two" / path.name).read_bytes(), path.name
    assert len(list((drawn / "one").iterdir())) == 4
    arms = ["base", *map(str, range(7))]
    styles = figures.arm_styles(arms, [arms])
    assert styles["base"]["color"] == figures.BASE and len({str(style) for style in styles.values()}) == 8


def test_each_setting_has_separate_tables_that_include_its_references(tmp_path):
    for arm in ("off@a", "on@a", "on@b"):
        run(tmp_path / "runs", arm, 0, 50.0)
    design = study(contrasts=["on@a:off@a", "on@b:off@a"], must_beat=[])
    summary = analysis.summarise(design, results.read_runs(tmp_path / "runs", design.arms, [0]), METRICS)
    assert tables.arms_by_setting(summary) == {"a": ["off@a", "on@a"], "b": ["off@a", "on@b"]}
    assert [row[0] for row in tables.arms_table(summary, ["off@a", "on@b"])] == ["arm", "off@a", "on@b"]
    assert [row[0] for row in tables.differences_table(summary, ["off@a", "on@b"])] == ["contrast", "on@b:off@a"]
    text = tables.as_markdown(summary)
    assert text.index("**a**") < text.index("| on@a |") < text.index("**b**") < text.index("| on@b |")


def test_arms_without_a_setting_share_one_table(tmp_path):
    for arm in ("base", "arm", "scratch"):
        run(tmp_path, arm, 0, 50.0)
    design = study(must_beat=[MustBeat("base", "scratch", "knn", baseline_arm="scratch")])
    summary = analysis.summarise(design, results.read_runs(tmp_path, design.arms, [0]), METRICS)
    assert tables.arms_by_setting(summary) == {"": ["base", "arm", "scratch"]}


def test_the_x_axis_does_not_exceed_the_limits():
    values = {"base": [95.0, 99.0], "other": [10.0, 90.0]}
    styles = figures.arm_styles(list(values), [list(values)])
    unlimited, limited = (
        figures.dots([figures.Dots("accuracy", values, **options)], styles).figure.axes[0].get_xlim()
        for options in ({}, {"limits": (0, 100)})
    )
    assert unlimited[0] < 0 and unlimited[1] > 100 and limited == (0, 100)
