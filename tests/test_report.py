"""From run folders to statistics, verdicts, findings, tables and figures of a toy study. test_page.py: the page."""

import csv
import json
import re
from dataclasses import replace

import pytest
from scipy import stats

from common.study import analysis, figures, plotting, results, tables
from common.study.design import Metric, MustBeat, Settings, Study
from common.study.results import RunFiles
from simsiam.studies import design as simsiam_design

METRICS = {
    "knn": Metric("kNN accuracy", "%", 1, "higher"),
    "spread": Metric("std ratio", "", 2),
    "loss": Metric("training loss", "", 3, judged=False),
}
CHANCE = {"knn": {"glyphs": 8.0, "": 1.0}}  # by data set
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
ABOUT |= {"seed_draws": "initial weights"}


def run(
    root, arm, seed, knn, untrained=20.0, *, source="a" * 64, device="cpu", data="d" * 64, data_seed=0, **metrics
):  # fmt: skip
    """Write the files of a finished run. `knn` None: the run diverged."""
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    provenance = {"commit": "c", "dirty": False, "torch": "2", "device": device, "threads": 1, "world": 1}
    provenance |= {"data": data, "source": source}
    arguments = {"seed": seed, "data_seed": data_seed, "epochs": 2, "data_set": "glyphs", "out": str(folder)}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, "provenance": provenance}))
    lines = [{"epoch": epoch, "knn": epoch * (knn or 1.0), "loss": -epoch} for epoch in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "flags").write_text(f"flags: --{arm}\n")
    measured = {"knn": knn, "spread": 0.5 + seed / 10, "loss": -0.5}
    if knn is None:
        measured = dict.fromkeys(measured)
    metrics = measured | {"untrained_knn": untrained, "eval_source": "e" * 64} | metrics
    (folder / "metrics.json").write_text(json.dumps(metrics | {"diverged": knn is None, "seconds": 36.0}))
    return folder


def grid(root, **arms):
    """Write runs of several arms, one kNN accuracy per seed. The untrained accuracies are UNTRAINED."""
    for arm, accuracies in arms.items():
        for seed, knn in enumerate(accuracies):
            run(root, arm.replace("_", "-"), seed, knn, UNTRAINED[seed % 5])


def read(root, arms, seeds, chance=None):
    """Read the same seeds of every arm."""
    return results.read_runs(root, dict.fromkeys(arms, seeds), chance)


def summarise(root, seeds=5, remark_of=None, chance=None, **changes):
    design = study(**changes)
    return ABOUT | analysis.summarise(design, read(root, design.arms, range(seeds), chance), METRICS, remark_of)


def test_numbers_equal_scipy(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    summary = summarise(tmp_path)
    contrast = summary["contrasts"][0]
    expected = stats.ttest_rel(ARM, BASE)
    low, high = expected.confidence_interval()
    assert (contrast["mean"], contrast["arm_mean"], contrast["reference_mean"]) == pytest.approx((-50.6, 12.0, 62.6))
    assert (contrast["low"], contrast["high"], contrast["p"]) == pytest.approx((low, high, expected.pvalue))
    assert contrast["correlation"] == pytest.approx(stats.pearsonr(ARM, BASE).statistic)
    assert (summary["version"], summary["verdict"], summary["has_finding"]) == (analysis.VERSION, "worse", True)
    baseline = stats.ttest_rel(BASE, UNTRAINED).confidence_interval()
    assert (summary["baselines"][0]["low"], summary["baselines"][0]["beaten"]) == (pytest.approx(baseline.low), True)
    row = summary["rows"][0]
    assert (row["arm"], row["flags"], row["metrics"]["knn"]["values"]["3"]) == ("base", "--base", 66.0)
    assert summary["headline"] == "arm hurts: kNN accuracy 62.6 -> 12.0 % (untrained 20.1)."
    numbers = f"arm 12.0, base 62.6; 95 % interval {low:.1f} to {high:.1f}, n = 5"
    assert " ".join(summary["finding"]) == f"kNN accuracy: arm minus base is -50.6 points, worse ({numbers})."
    assert summary["provenance"]["source"] == "a" * 64 and summary["provenance"]["hours"] == pytest.approx(0.1)
    assert summary["notes"] == []


def test_missing_and_inconsistent_runs_are_counted_and_reported(tmp_path):
    grid(tmp_path, base=BASE[:3], arm=[12.0, None, 13.0, 11.0])
    run(tmp_path, "base", 4, 65.0, source="b" * 64, device="NVIDIA H200", eval_source="f" * 64, data="c" * 64)
    (tmp_path / "arm" / "3" / "metrics.json").write_text('{"knn": 11')
    with open(tmp_path / "base" / "0" / "train.jsonl", "a") as log:
        log.write('{"epoch": 3, "kn')
    (tmp_path / "base" / "3").mkdir()
    (tmp_path / "base" / "3" / "failure.txt").write_text("out of memory on cuda: use --batch 64\n\nTraceback\n")
    arguments = json.loads((tmp_path / "arm" / "2" / "args.json").read_text())
    arguments["arguments"]["epochs"] = 7
    (tmp_path / "arm" / "2" / "args.json").write_text(json.dumps(arguments))
    summary = summarise(tmp_path, chance=CHANCE)
    assert summary["notes"] == [
        "base: 1 of 5 missing (seed 3).",
        "base, seed 0: skipped an unreadable line of train.jsonl.",
        "base, seed 3 failed: out of memory on cuda: use --batch 64.",
        "arm: 2 of 5 missing (seed 3, 4).",
        "arm: 1 of 5 diverged, counted as chance (seed 1).",
        "arm, seed 3: metrics.json cannot be read: delete it, and make evaluates the run again.",
        "arm: its seeds differ in --epochs (2, 7).",
        "The runs mix versions of the training code (sha256): aaaaaaaaaaaa, bbbbbbbbbbbb.",
        f"The runs mix versions of the evaluation code (sha256): {'e' * 12}, {'f' * 12}.",
        "The runs mix data digests: cccccccccccc, dddddddddddd.",
        "The runs mix devices: NVIDIA H200, cpu.",
    ]
    row = summary["rows"][1]
    assert (row["diverged"], row["missing"]) == ([1], [3, 4])
    assert (row["seeds"], row["metrics"]["knn"]["n"], row["metrics"]["knn"]["mean"]) == (5, 3, 11.0)
    contrast = summary["contrasts"][0]  # of the seeds that both arms have finished
    assert (contrast["n"], contrast["arm_mean"], contrast["reference_mean"]) == (3, 11.0, 62.0)
    assert "arm: 1 of 5 diverged, counted as chance." in " ".join(summary["finding"]) and "n = 3" in " ".join(
        summary["finding"]
    )
    cells = tables.arms_table(summary)[2]
    assert cells[-2:] == ["3", "1 of 5 diverged; 2 of 5 missing"]


def test_a_difference_is_that_of_the_seeds_that_both_arms_have_finished(tmp_path):
    for seed in (0, 1, 2):
        run(tmp_path, "base", seed, 60.0 + 10 * seed, untrained=20.0)
        run(tmp_path, "arm", seed + 1, 60.0 + 10 * (seed + 1) - seed, untrained=20.0)
    contrast = summarise(tmp_path)["contrasts"][0]
    assert (contrast["n"], contrast["mean"]) == (2, -0.5) and contrast["reference_mean"] == 75.0


def test_a_finite_value_of_a_diverged_run_is_replaced_by_chance(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM[:4])
    path = run(tmp_path, "arm", 4, 99.0) / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": True}))
    assert summarise(tmp_path, chance=CHANCE)["rows"][1]["metrics"]["knn"]["values"]["4"] == 8.0
    unknown = {"knn": {"mnist5k": 10.0}}  # no value for this data set
    assert list(summarise(tmp_path, chance=unknown)["rows"][1]["metrics"]["knn"]["values"]) == ["0", "1", "2", "3"]


def test_a_diverged_run_counts_as_chance(tmp_path):
    """The contrast, the verdict, the baseline and the notes count it. Its other metrics have no value."""
    grid(tmp_path, base=BASE, arm=[*BASE[:3], None, None], weak=BASE)
    without = summarise(tmp_path)
    assert (without["verdict"], without["contrasts"][0]["n"]) == ("unclear", 3)
    assert "arm: 2 of 5 diverged, not averaged (seed 3, 4)." in without["notes"]
    assert "arm: 2 of 5 diverged, not averaged." in " ".join(without["finding"])
    summary = summarise(tmp_path, chance=CHANCE, margin=5.0)
    contrast = summary["contrasts"][0]
    expected = stats.ttest_rel([*BASE[:3], 8.0, 8.0], BASE).confidence_interval()
    assert (contrast["n"], contrast["low"], contrast["high"]) == pytest.approx((5, expected.low, expected.high))
    assert summarise(tmp_path, margin=5.0)["verdict"] == "no difference" and summary["verdict"] == "unclear"
    assert "arm: 2 of 5 diverged, counted as chance (seed 3, 4)." in summary["notes"]
    assert "arm: 2 of 5 diverged, counted as chance." in " ".join(summary["finding"])
    row = summary["rows"][1]
    assert (row["diverged"], row["metrics"]["knn"]["n"], row["metrics"]["spread"]["n"]) == ([3, 4], 5, 3)
    spread = next(item for item in summary["all_contrasts"] if item["metric"] == "spread")
    assert spread["n"] == 3
    must_beat = [MustBeat("arm", "untrained", "knn", "untrained_knn")]  # the arm is the reference
    kept, counted = (
        summarise(tmp_path, chance=chance, contrasts=["weak:arm"], must_beat=must_beat) for chance in (None, CHANCE)
    )
    assert (kept["baselines"][0]["beaten"], kept["baselines"][0]["n"]) == (True, 3)
    assert (counted["baselines"][0]["beaten"], counted["baselines"][0]["n"]) == (False, 5)
    assert counted["verdict"] == "too weak to test"


def test_an_arm_with_only_diverged_seeds_is_worse_if_chance_is_declared(tmp_path):
    grid(tmp_path, base=BASE, arm=[None] * 5)
    summary = summarise(tmp_path, chance=CHANCE)
    assert (summary["verdict"], summary["has_finding"], summary["contrasts"][0]["arm_mean"]) == ("worse", True, 8.0)
    assert summarise(tmp_path, chance={"knn": {"": 1.0}})["contrasts"][0]["arm_mean"] == 1.0  # any other data set


def test_a_diverged_run_that_counts_is_no_reason_for_a_missing_value(tmp_path):
    """base diverged in seed 0, the arm was run only with seed 1, which base lacks."""
    run(tmp_path, "base", 0, None)
    run(tmp_path, "arm", 1, 50.0)
    assert summarise(tmp_path)["contrasts"][0]["verdict"] == "base: 1 of 5 diverged"
    assert summarise(tmp_path, chance=CHANCE)["contrasts"][0]["verdict"] == "not run"


def test_different_data_of_different_blocks_are_not_reported(tmp_path):
    for arm in ("base", "arm"):
        for seed in (10, 11):
            run(tmp_path, arm, seed, 50.0, data=str(seed) * 32, data_seed=seed)
    runs = read(tmp_path, ["base", "arm"], (10, 11))
    assert results.data_seeds(runs) == {10, 11} and results.notes(runs, METRICS) == []
    assert results.provenance(runs)["data"] == ["10" * 32, "11" * 32]
    run(tmp_path, "arm", 12, 50.0, data_seed=12, source="b" * 64)
    runs = read(tmp_path, ["base", "arm"], (10, 11, 12))
    assert any("versions of the training code" in note for note in results.notes(runs, METRICS))


def test_the_evaluation_code_of_an_unfinished_run_is_not_reported(tmp_path):
    grid(tmp_path, base=BASE[:2])
    (tmp_path / "base" / "1" / "metrics.json").unlink()
    runs = read(tmp_path, ["base"], (0, 1))
    assert results.provenance(runs)["eval_source"] == "e" * 64 and len(results.notes(runs, METRICS)) == 1


def test_each_arm_has_its_own_seeds(tmp_path):
    """Primary arms have ten seeds, others five. Differences pair the seeds that both arms have."""
    accuracies = [60.0 + seed % 3 for seed in range(10)]
    grid(tmp_path, base=accuracies, arm=[value - 40 for value in accuracies], more=accuracies[:5])
    design = study(contrasts=["arm:base", "more:base"], seeds=tuple(range(10)))
    runs = results.read_runs(tmp_path, {arm: design.seeds_of(arm) for arm in design.arms})
    summary = ABOUT | analysis.summarise(design, runs, METRICS)
    assert [row["seeds"] for row in summary["rows"]] == [10, 10, 5] and summary["seeds"] == list(range(10))
    assert [contrast["n"] for contrast in summary["contrasts"]] == [10, 5]
    assert summary["notes"] == []  # the seeds 5 to 9 of `more` are not missing
    assert [row[-2] for row in tables.arms_table(summary)[1:]] == ["10", "10", "5"]


def test_the_caption_says_what_a_seed_draws(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    summary = summarise(tmp_path) | {"seed_draws": "data, initial weights and order"}
    assert tables.caption(summary).endswith("over n seeds. A seed draws data, initial weights and order.")


def test_seeds_of_given_data_draw_their_split():
    paper = simsiam_design("demo", Settings())
    runs = {"base": {seed: RunFiles(None, {"arguments": {"data_seed": seed}}, []) for seed in (10, 11)}}
    for study, words in (("simsiam-predictor", "data"), ("simsiam-predictor-mnist5k", "the split of the same data")):
        drawn = plotting.varies_with_seed(paper, paper.study(study), runs)
        assert drawn == f"{words}, initial weights and order"


@pytest.mark.parametrize(
    ("arm", "expected", "word"),
    [
        ([value - 40 for value in BASE], "worse", "reproduced"),
        ([value + 20 for value in BASE], "worse", "reversed"),
        ([value - 40 for value in BASE], "no difference", "not reproduced"),
        (BASE, "no difference", "reproduced"),
        (BASE, "worse", "not reproduced"),
        ([50.0, 74.0, 72.0, 56.0, 61.0], "no difference", "unclear"),
        ([50.0, 74.0, 72.0, 56.0, 61.0], "worse", "unclear"),
        (ARM[:1], "worse", "not run"),
        ([], "worse", "not run"),
        ([None] * 5, "worse", "unclear"),
    ],
)
def test_a_calibration_compares_the_verdict_with_the_expected_one(tmp_path, arm, expected, word):
    noise = [0.1, -0.2, 0.3, 0.0, -0.1]
    arm = [value if value is None else value + e for value, e in zip(arm, noise, strict=False)]
    grid(tmp_path, base=BASE, arm=arm)
    summary = summarise(tmp_path, margin=5.0, expected={"arm": expected})
    assert summary["calibration"] == {"arm": word} and summary["expected"] == {"arm": expected}
    assert summarise(tmp_path)["calibration"] == {}


def test_a_calibration_whose_reference_is_too_weak_is_unclear(tmp_path):
    grid(tmp_path, base=UNTRAINED[::-1], arm=ARM)
    summary = summarise(tmp_path, expected={"arm": "worse"})
    assert summary["verdict"] == "too weak to test" and summary["calibration"] == {"arm": "unclear"}


def test_null_and_non_finite_values_are_excluded(tmp_path):
    for seed, knn in enumerate([60.0, float("nan"), float("inf")]):
        run(tmp_path, "base", seed, knn)
    run(tmp_path, "base", 3, 62.0, spread=None)
    runs = read(tmp_path, ["base"], range(4))
    assert results.values(runs, "base", "knn") == {0: 60.0, 3: 62.0}
    assert list(results.values(runs, "base", "spread")) == [0, 1, 2]
    assert results.notes(runs, ["spread"]) == []  # null means "does not apply"; only an absent key is noted
    assert results.notes(runs, ["sprad"]) == ["base: 4 of 4 without sprad (seed 0, 1, 2, 3)."]


def test_an_arm_with_only_diverged_seeds_has_no_verdict(tmp_path):
    grid(tmp_path, base=BASE, arm=[None] * 5)
    summary = summarise(tmp_path)
    assert (summary["verdict"], summary["has_finding"]) == ("arm: 5 of 5 diverged", False)
    assert "arm:base cannot be compared on kNN accuracy" in " ".join(summary["finding"])


def test_a_study_whose_base_fails_its_baseline_is_too_weak(tmp_path):
    grid(tmp_path, base=UNTRAINED[::-1], arm=ARM)  # base learnt nothing, although the arm is much lower
    summary = summarise(tmp_path)
    assert summary["contrasts"][0]["high"] < 0 and summary["baselines"][0]["beaten"] is False
    assert (summary["contrasts"][0]["verdict"], summary["verdict"]) == ("too weak to test", "too weak to test")
    assert (
        not summary["has_finding"]
        and summary["headline"]
        == "Too weak to test: kNN accuracy of base (20.1) is not clearly above that of untrained (20.1)."
    )
    assert " ".join(summary["finding"]).startswith("Too weak to test: kNN accuracy of base (20.1)")
    spread = [contrast for contrast in summary["all_contrasts"] if contrast["metric"] == "spread"]
    assert [contrast["verdict"] for contrast in spread] == ["unclear"]  # the baseline says nothing about other metrics


def test_a_failed_baseline_of_another_reference_does_not_change_the_primary_verdict(tmp_path):
    """`other` fails its baseline. Contrasts with it are not informative; the primary contrast keeps its verdict."""
    for seed in range(5):
        for arm, knn in (("base", 60.0), ("arm", 40.0), ("other", 15.0)):
            run(tmp_path, arm, seed, knn + seed, untrained=15.0 + seed)
    must_beat = [MustBeat(arm, "untrained", "knn", baseline_metric="untrained_knn") for arm in ("base", "other")]
    summary = summarise(tmp_path, contrasts=["arm:base", "arm:other"], must_beat=must_beat)
    assert [baseline["beaten"] for baseline in summary["baselines"]] == [True, False]
    finding = " ".join(summary["finding"])
    assert summary["verdict"] == "worse" and not finding.startswith("Too weak")
    assert "Contrasts with other are too weak to test" in finding


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
    assert summarise(tmp_path, must_beat=other)["baselines"][0]["beaten"] is True
    design, lower = study(must_beat=other), METRICS | {"knn": replace(METRICS["knn"], better="lower")}
    summary = analysis.summarise(design, read(tmp_path, design.arms, range(5)), lower)
    assert (summary["baselines"][0]["beaten"], summary["has_finding"]) == (False, False)
    for setting, accuracies in {"a": BASE, "b": UNTRAINED[::-1]}.items():  # base learns only in setting a
        grid(tmp_path, **{f"base@{setting}": accuracies, f"arm@{setting}": ARM})
    must_beat = [MustBeat(f"base@{setting}", "untrained", "knn", "untrained_knn") for setting in "ab"]
    both = summarise(tmp_path, contrasts=["arm@a:base@a", "arm@b:base@b"], primary=2, must_beat=must_beat)
    assert both["verdict"] == "arm@a: worse; arm@b: too weak to test" and both["has_finding"]


def test_a_contrast_with_a_baseline_arm_or_without_a_tested_arm_requires_no_baseline(tmp_path):
    """The method against its baseline has a verdict of its own, also if another arm of the study fails."""
    grid(tmp_path, base=BASE, arm=ARM, weak=UNTRAINED, scratch=UNTRAINED, other=BASE)
    must_beat = [MustBeat(name, "no pretraining", "knn", baseline_arm="scratch") for name in ("base", "weak")]
    contrasts = ["arm:base", "base:scratch", "weak:scratch", "arm:weak", "weak:other", "arm:other"]
    summary = summarise(tmp_path, contrasts=contrasts, must_beat=must_beat)
    words = {f"{contrast['arm']}:{contrast['reference']}": contrast["verdict"] for contrast in summary["contrasts"]}
    assert words == {
        "arm:base": "worse",
        "base:scratch": "better",
        "weak:scratch": "unclear",
        "arm:weak": "too weak to test",
        "weak:other": "too weak to test",
        "arm:other": "worse",
    }


def test_a_failed_baseline_does_not_hide_the_other_primary_contrasts(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM, weak=[value - 5 for value in UNTRAINED])
    must_beat = [MustBeat(name, "the untrained network", "knn", "untrained_knn") for name in ("base", "weak")]
    summary = summarise(tmp_path, contrasts=["arm:base", "arm:weak"], primary=2, must_beat=must_beat)
    assert summary["verdict"] == "arm:base: worse; arm:weak: too weak to test"
    parts = summary["headline"].split("; ")
    assert parts[0].startswith("arm hurts: kNN accuracy 62.6 -> ") and len(parts) == 3
    assert parts[1].startswith("arm (instead of weak) cannot be tested:")
    assert parts[2] == "kNN accuracy of weak (15.1) is below that of the untrained network (20.1)."
    both = summarise(tmp_path, contrasts=["arm:weak"], must_beat=must_beat[1:])
    assert both["headline"] == (
        "Too weak to test: kNN accuracy of weak (15.1) is below that of the untrained network (20.1)."
    )


def test_there_is_no_finding_if_the_baseline_was_not_run(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    missing = summarise(tmp_path, must_beat=[MustBeat("base", "no pretraining", "knn", baseline_arm="scratch")])
    assert (missing["verdict"], missing["has_finding"]) == ("no baseline", False)


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
    summary = analysis.summarise(design, read(tmp_path, design.arms, range(5)), metrics)
    assert summary["remark"] == "Descriptive: linear accuracy of arm: 82.0 -> 70.8 %."
    second = analysis.summarise(replace(design, second_metric="linear"), read(tmp_path, design.arms, range(5)), metrics)
    assert second["remark"] == "Second metric: linear accuracy of arm: 82.0 -> 70.8 % (worse)."
    assert summarise(tmp_path)["remark"] == ""  # std ratio has no better side, training loss is not judged


def test_the_headline_of_a_metric_without_a_better_side_names_the_direction(tmp_path):
    for seed in range(3):
        run(tmp_path, "base", seed, 60.0 + seed)
        run(tmp_path, "arm", seed, 60.0 + seed, spread=0.1 + seed / 10)
    summary = summarise(tmp_path, seeds=3, metric="spread")
    assert summary["verdict"] == "lower" and summary["headline"] == "arm lowers std ratio 0.60 -> 0.20."


def test_no_difference_requires_a_margin(tmp_path):
    grid(tmp_path, base=BASE, arm=[value + noise for value, noise in zip(BASE, (0.1, -0.2, 0.3, 0, -0.1), strict=True)])
    assert summarise(tmp_path)["verdict"] == "unclear"
    wide = summarise(tmp_path, margin=4.0)
    assert (wide["verdict"], wide["has_finding"]) == ("no difference", True)
    assert "the interval lies within the margin of 4.0 points" in " ".join(wide["finding"])
    assert wide["headline"] == "arm makes no difference: kNN accuracy 62.6 -> 62.6 % (untrained 20.1)."
    assert {contrast["verdict"] for contrast in wide["all_contrasts"] if contrast["metric"] == "spread"} == {"unclear"}


def test_an_unclear_contrast_says_how_many_seeds_its_spread_needs(tmp_path):
    """The number depends on spread and margin, never on the observed effect."""
    noise = [3.0, -4.0, 1.0, -2.0, 2.5]
    for effect in (0.0, 0.5):
        folder = tmp_path / str(effect)
        grid(folder, base=BASE, arm=[value + effect + e for value, e in zip(BASE, noise, strict=True)])
        contrast = summarise(folder, margin=1.0)["contrasts"][0]
        assert (contrast["verdict"], contrast["seeds_needed"]) == ("unclear", 38)
    assert "38 seeds would give a half-width of the margin" in " ".join(summarise(folder, margin=1.0)["finding"])
    assert summarise(folder)["contrasts"][0]["seeds_needed"] is None  # without a margin


def test_one_seed_gives_values_but_no_interval(tmp_path):
    grid(tmp_path, base=[60.0], arm=[12.0])
    summary = summarise(tmp_path, seeds=1)
    assert (summary["verdict"], summary["has_finding"]) == ("one seed", False)
    assert summary["baselines"][0]["beaten"] is None and summary["contrasts"][0]["low"] is None
    expected = "kNN accuracy: arm minus base is -48.0 points (arm 12.0, base 60.0; one seed, no interval)."
    assert " ".join(summary["finding"]) == expected
    assert summary["headline"] == "arm, one seed: kNN accuracy 60.0 -> 12.0 % (untrained 20.0)."
    assert (
        "±" not in tables.markdown(tables.arms_table(summary))
        and tables.caption(summary) == "Values of one seed: no interval."
    )


def test_a_metric_with_judged_false_gets_no_verdict(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    contrasts = summarise(tmp_path)["all_contrasts"]
    assert {contrast["verdict"] for contrast in contrasts if contrast["metric"] == "loss"} == {"not judged"}


def test_remark_of_gets_only_finished_seeds_and_the_finding_contains_its_remark(tmp_path):
    grid(tmp_path, base=BASE, arm=[*ARM[:4], None], other=ARM)
    seeds_per_call = []

    def remark_of(metrics):
        seeds_per_call.append(len(metrics))
        return "collapsed in every seed" if all(seed["knn"] < 15 for seed in metrics) else None

    summary = summarise(tmp_path, remark_of=remark_of, contrasts=["arm:base", "other:base"])
    assert seeds_per_call == [5, 4, 5]
    assert [row["remark"] for row in summary["rows"]] == [None, *["collapsed in every seed"] * 2]
    finding = " ".join(summary["finding"])
    assert "arm collapsed in every seed" in finding
    assert re.search(r"\(descriptive\): other:base worse \(-50\.6, -\d+\.\d to -\d+\.\d\)\.$", finding)


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
    assert (difference["reference"], difference["verdict"]) == ("base", "worse") and difference["correlation"]
    half = stats.t.ppf(0.975, 4) * stats.sem(BASE)
    text = tables.as_markdown(summary)
    assert f"| base | --base | 62.6 ± {half:.1f} |" in text and "95 % Student-t interval" in text


def test_latex_tables_have_escaped_text_and_a_cell_for_each_column(tmp_path):
    grid(tmp_path, base=BASE, arm=ARM)
    summary = summarise(tmp_path)
    tables.write_tables(summary, tmp_path)
    lines = (tmp_path / "toy-arm.tex").read_text().splitlines()
    table = tables.arms_table(summary)
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == len(table) + len(tables.differences_table(summary))
    assert all(row.count(" & ") == len(table[0]) - 1 for row in rows[: len(table)])
    assert any(row.startswith(r"base & -{}-base & 62.6 $\pm$") for row in rows)
    assert tables.latex_text("50 % of a_b -> −0.5, -0.5 ± 1") == r"50 \% of a\_b -$>$ $-$0.5, $-$0.5 $\pm$ 1"


def test_unreadable_files_of_a_run_are_noted(tmp_path):
    for seed, (name, content) in enumerate([("train.jsonl", None), ("args.json", '{"x": 1}'), ("flags", None)]):
        path = run(tmp_path, "base", seed, 50.0) / name
        path.unlink()
        path.mkdir() if content is None else path.write_text(content)
    runs = read(tmp_path, ["base"], range(3))
    assert [runs["base"][seed].notes for seed in range(3)] == [
        ["base, seed 0: train.jsonl cannot be read (Is a directory)."],
        ["base, seed 1: args.json cannot be read."],
        ["base, seed 2: flags cannot be read (Is a directory)."],
    ]
    assert runs["base"][0].log == [] and runs["base"][1].args == {}
    assert results.first_arguments(runs)["epochs"] == 2 and results.data_seeds(runs) == {0}
    assert results.series(runs, "knn")["base"] and len(results.values(runs, "base", "knn")) == 3


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
    runs = read(root, design.arms, range(5))
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
    runs = read(tmp_path, ["base", "arm"], range(6))
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
    summary = analysis.summarise(design, read(tmp_path / "runs", design.arms, [0]), METRICS)
    assert tables.arms_by_setting(summary) == {"a": ["off@a", "on@a"], "b": ["off@a", "on@b"]}
    assert [row[0] for row in tables.arms_table(summary, ["off@a", "on@b"])] == ["arm", "off@a", "on@b"]
    assert [row[0] for row in tables.differences_table(summary, ["off@a", "on@b"])] == ["contrast", "on@b:off@a"]
    text = tables.as_markdown(summary)
    assert text.index("**a**") < text.index("| on@a |") < text.index("**b**") < text.index("| on@b |")


def test_arms_without_a_setting_share_one_table(tmp_path):
    for arm in ("base", "arm", "scratch"):
        run(tmp_path, arm, 0, 50.0)
    design = study(must_beat=[MustBeat("base", "scratch", "knn", baseline_arm="scratch")])
    summary = analysis.summarise(design, read(tmp_path, design.arms, [0]), METRICS)
    assert tables.arms_by_setting(summary) == {"": ["base", "arm", "scratch"]}


def test_the_x_axis_does_not_exceed_the_limits():
    values = {"base": [95.0, 99.0], "other": [10.0, 90.0]}
    styles = figures.arm_styles(list(values), [list(values)])
    unlimited, limited = (
        figures.dots([figures.Dots("accuracy", values, **options)], styles).figure.axes[0].get_xlim()
        for options in ({}, {"limits": (0, 100)})
    )
    assert unlimited[0] < 0 and unlimited[1] > 100 and limited == (0, 100)
