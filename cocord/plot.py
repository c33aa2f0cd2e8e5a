"""Figures, tables and finding of one CoCoRD study.

    python cocord/plot.py cocord-prediction-loss --scale demo --seeds 0 1 2

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev

from matplotlib.figure import Figure

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord.studies import METRICS, design
from common.study import figures, plotting, results, statistics, tables

PRIMARY = "accuracy"
SPREAD = 0.18  # points; sample sd of five published CIFAR-100 runs (DKD, resnet32x4 to resnet8x4, mdistiller #7)
# ------------------------------------------------------------------------------------------------- what the runs say


def describe(runs: results.Runs) -> str:
    """Data and recipe in words, of the first run that is there; "" where there is none."""
    first = results.first_arguments(runs)
    if not first:
        return ""
    names = {"glyphs36": "glyphs (synthetic characters, 36 classes)", "cifar100": "CIFAR-100"}
    data = names.get(first["data_set"], first["data_set"])
    return f"{data}, {first['epochs']} epochs of batch {first['batch']}"


def resolution(runs: results.Runs, reference: str, seeds: int) -> str:
    """Which difference of two means so many seeds resolve: the half-width of Welch's interval at equal spread."""
    if seeds < 2:
        return "One seed resolves no difference."

    def half(spread: float) -> float:
        return statistics.student_t_quantile(0.975, 2 * seeds - 2) * spread * (2 / seeds) ** 0.5

    text = f"{seeds} seeds an arm resolve differences above about {half(SPREAD):.2f} points at the spread published "
    text += f"for CIFAR-100 (sd {SPREAD})"
    found = list(results.values(runs, reference, PRIMARY).values())
    if len(found) > 1:
        text += f", above {half(stdev(found)):.2f} at that of {reference} here (sd {stdev(found):.2f})"
    return text + "."


# ------------------------------------------------------------------------------------------------- figures


def short(arm: str) -> str:
    """An arm without its pair."""
    return arm.partition("@")[0]


def curve_panels(
    runs: results.Runs, groups: Mapping[str, Sequence[str]], metrics: Mapping[str, str]
) -> list[figures.Curves]:
    """For each pair a panel for each metric of the log."""
    panels = []
    for pair, arms in groups.items():
        for key, title in metrics.items():
            curves = results.series({arm: runs[arm] for arm in arms}, key)
            made = {short(arm): kept(runs[arm], key, found) for arm, found in curves.items()}
            panels.append(figures.Curves(f"{title}\n{pair.replace('-', ' → ')}", made))
    return panels


def kept(seeds: Mapping[int, results.Record], key: str, found: list[results.Curve]) -> list[results.Curve]:
    """No curve where an arm has no contrast, and so no keys."""
    contrasted = any(run.args and run.args["arguments"]["lambda_contrast"] for run in seeds.values())
    return found if contrasted or key == "test_accuracy" else []


def dot_panels(runs: results.Runs, groups: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> list[figures.Dots]:
    """For each pair a panel for each metric; the slow student as hollow marks beside the accuracy."""
    panels = []
    for pair, arms in groups.items():
        for key in metrics:
            values = {short(arm): list(results.values(runs, arm, key).values()) for arm in arms}
            slow = {short(arm): list(results.values(runs, arm, "accuracy_slow_student").values()) for arm in arms}
            title = f"{METRICS[key].title}\n{pair.replace('-', ' → ')}"
            percent = {"within": (0, 100)} if METRICS[key].unit == "%" else {}
            panels.append(figures.Dots(title, values, slow if key == PRIMARY else {}, **percent))
    return panels


# ------------------------------------------------------------------------------------------------- main


def draw(view: results.View) -> dict[str, Figure]:
    """The figures of a study; a note says which difference so many seeds resolve."""
    view.summary["notes"].insert(0, resolution(view.runs, view.reference, len(view.args.seeds)))
    groups = tables.settings(view.summary)
    names = [short(arm) for group in groups.values() for arm in group]
    arms = sorted(dict.fromkeys(names), key=lambda arm: -names.count(arm))  # what every pair has stands first
    remarks = {short(row["arm"]): "diverged" for row in view.summary["rows"] if row["diverged"]}
    curves, shown = {"test_accuracy": "test accuracy (%)"}, [PRIMARY]
    if view.study.name == "cocord-teacher-momentum":
        curves["key_consistency"] = "keys, cosine epoch to epoch"
        shown.append("teacher_head_shift")
    else:
        curves["contrastive_accuracy"] = "contrastive top-1"
        shown.append("contrastive_accuracy")
    look = (arms, short(view.reference))
    lines = figures.curves(curve_panels(view.runs, groups, curves), *look, caption=view.caption)
    dots = figures.dots(dot_panels(view.runs, groups, shown), *look, remarks, "slow student", view.caption)
    return {"curves": figures.whole_epochs(lines), "metrics": dots}


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw)


if __name__ == "__main__":
    main()
