"""Figures, tables and the finding of one CoCoRD study.

    python cocord/plot.py cocord-prediction-loss --scale demo --seeds 0 1 2

Reads metrics.json and train.jsonl of the runs. Missing runs are left out of the figures.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord.studies import METRICS, design
from common.study import figures, plotting, results, tables
from common.study.names import without_setting

PRIMARY = "accuracy"

# ------------------------------------------------------------------------------------------------- descriptions


def describe(runs: results.Runs) -> str:
    """Return data set, epochs and batch size of the first run in words, "" if there are no runs."""
    arguments = results.first_arguments(runs)
    if not arguments:
        return ""
    names = {
        "glyphs36": "glyphs (synthetic characters, 36 classes)",
        "glyphs36-hard": "glyphs (synthetic characters with clutter, 36 classes)",
        "cifar100": "CIFAR-100",
    }
    data = names.get(arguments["data_set"], arguments["data_set"])
    labels = f"{arguments['labels']} labels, " if arguments.get("labels") else ""
    return f"{data}, {labels}{arguments['epochs']} epochs, batch size {arguments['batch']}"


# ------------------------------------------------------------------------------------------------- figures


def curve_panels(
    runs: results.Runs, groups: Mapping[str, Sequence[str]], metrics: Mapping[str, str], chance: Mapping[str, float]
) -> list[figures.Curves]:
    """Return one panel per pair and metric of the log; `chance` by data set."""
    data_set = results.first_arguments(runs)["data_set"]
    panels = []
    for pair, arms in groups.items():
        for key, title in metrics.items():
            curves = results.series({arm: runs[arm] for arm in arms}, key)
            if key != "test_accuracy":  # the other metrics are about keys, which need a contrastive loss
                curves = {arm: seeds if has_contrast(runs[arm]) else [] for arm, seeds in curves.items()}
            values = {without_setting(arm): seeds for arm, seeds in curves.items()}
            lines = {"chance": chance[data_set]} if key == "test_accuracy" and data_set in chance else {}
            panels.append(figures.Curves(f"{title}\n{pair.replace('-', ' → ')}", values, lines))
    return panels


def has_contrast(seeds: Mapping[int, results.RunFiles]) -> bool:
    """Return whether an arm was trained with the contrastive loss."""
    return any(run.args and run.args["arguments"]["lambda_contrast"] for run in seeds.values())


def seed_values(runs: results.Runs, arms: Sequence[str], key: str) -> dict[str, list[float]]:
    """Return the values of a metric over seeds, by arm without its pair."""
    return {without_setting(arm): values for arm, values in results.values_by_arm(runs, key, arms).items()}


def dot_panels(runs: results.Runs, groups: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> list[figures.Dots]:
    """Return one panel per pair and metric. Hollow marks in the accuracy panel show the slow student."""
    panels = []
    for pair, arms in groups.items():
        for key in metrics:
            values = seed_values(runs, arms, key)
            slow = seed_values(runs, arms, "accuracy_slow_student")
            title = f"{METRICS[key].title}\n{pair.replace('-', ' → ')}"
            limits = (0.0, 100.0) if METRICS[key].unit == "%" else (-math.inf, math.inf)
            panels.append(figures.Dots(title, values, slow if key == PRIMARY else {}, limits=limits))
    return panels


# ------------------------------------------------------------------------------------------------- main


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study by name."""
    groups = tables.arms_by_setting(view.summary)
    names = [without_setting(arm) for group in groups.values() for arm in group]
    arms = sorted(dict.fromkeys(names), key=lambda arm: -names.count(arm))  # arms that all pairs have come first
    remarks = {
        without_setting(row["arm"]): f"{len(row['diverged'])} of {row['seeds']} diverged"
        for row in view.summary["rows"]
        if row["diverged"]
    }
    curve_metrics = {"test_accuracy": "test accuracy (%)", "contrastive_accuracy": "contrastive top-1"}
    dot_metrics = [PRIMARY, "contrastive_accuracy"]
    if view.study.name == "cocord-teacher-momentum":
        dot_metrics.append("teacher_head_shift")
    styles = {arm: view.styles[arm] for arm in arms}
    highlight = list(dict.fromkeys(map(without_setting, view.highlight)))
    panels = curve_panels(view.runs, groups, curve_metrics, view.chance[PRIMARY])
    dots = dot_panels(view.runs, groups, dot_metrics)
    top1 = dots[1]  # of the first pair: shows more than the curves of accuracy, unless only one arm has a contrast
    slide_panel = top1 if sum(map(bool, top1.values.values())) > 1 else panels[0]
    return {
        "curves": figures.integer_x_ticks(figures.curves(panels, styles, highlight, view.caption)),
        "metrics": figures.dots(dots, styles, remarks, "slow student", view.caption),
        "summary": figures.summary_slide(view.summary, slide_panel, styles, highlight),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.main(argv, __doc__, design, describe, draw)


if __name__ == "__main__":
    main()
