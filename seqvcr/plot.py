"""Figures, tables and finding of one Seq-VCR study.

    python seqvcr/plot.py seqvcr-coefficients --scale demo --seeds 0 1 2

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.study import figures, plotting, results, tables
from seqvcr.studies import METRICS, design

PRIMARY = "exact_match"
SHOWN = ("exact_match", "entropy_mean", "entropy_batch_level", "digit_accuracy")
SOLVED = {"solved": 90.0}  # percent of exact match
TASKS = {"multiplication": "{0}x{0} digits", "arithmetic": "{0} operators modulo 11", "lis": "sequences of {0} numbers"}


def solved(runs: list[dict[str, Any]]) -> str:
    """How many seeds ended with an exact match of 90 % at least: that is bimodal, so a mean alone would mislead."""
    return f"{sum(bool(run['solved']) for run in runs)} of {len(runs)} solved"


# ------------------------------------------------------------------------------------------------- what the runs say


def arguments_of(runs: results.Runs) -> dict[str, dict[str, Any]]:
    """By arm the arguments of its first run that is there."""
    found = {
        arm: next((run.args["arguments"] for run in seeds.values() if run.args), None) for arm, seeds in runs.items()
    }
    return {arm: arguments for arm, arguments in found.items() if arguments}


def describe(runs: results.Runs) -> str:
    """Tasks and recipe in words; "" where there is no run."""
    arguments = list(arguments_of(runs).values())
    if not arguments:
        return ""
    first = arguments[0]
    named = dict.fromkeys(TASKS[one["task"]].format(one["size"]) for one in arguments)
    shape = f"{first['layers']} blocks of width {first['width']}"
    return f"{' and '.join(named)}, {shape}, {first['steps']} steps of batch {first['batch']}"


def label(study: str, arm: str, arguments: Mapping[str, Any] | None) -> str:
    """What an arm is called in a figure of its study, whatever its setting."""
    if arguments is None:
        return arm.partition("@")[0]
    coefficients = arguments["lambda1"], arguments["lambda2"]
    if study in ("seqvcr-coefficients", "seqvcr-projection-width", "seqvcr-last-width") and not any(coefficients):
        return "off"
    if study == "seqvcr-coefficients":
        return "λ {:g}, {:g}".format(*coefficients)
    if "width" in study:
        return f"d = {arguments['projection_width']}"
    return arm.partition("@")[0]


def by_setting(
    summary: Mapping[str, Any], study: str, arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """By setting its arms with their labels; an arm that two settings are compared with stands in both."""
    return {
        name: {arm: label(study, arm, arguments[arm]) for arm in arms if arm in arguments}
        for name, arms in tables.settings(summary).items()
    }


def levels(runs: results.Runs, arm: str, metric: str) -> list[results.Curve]:
    """A list metric of every finished seed over its index."""
    found = [run.metrics for run in runs[arm].values() if run.metrics and not run.metrics.get("diverged")]
    return [(list(map(float, range(len(one[metric])))), one[metric]) for one in found if one.get(metric)]


# ------------------------------------------------------------------------------------------------- figures


def titled(title: str, name: str, groups: Mapping[str, Any]) -> str:
    """A panel's title, with its setting where there are several."""
    return f"{title}\n{name}" if len(groups) > 1 else title


def entropy_panels(runs: results.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Both entropies by level, a pair of panels for each setting."""
    titles = {"entropy": "matrix entropy over tokens (eq. 2)", "entropy_batch": "entropy over the batch"}
    return [
        figures.Curves(
            titled(title, name, groups),
            {text: levels(runs, arm, metric) for arm, text in arms.items()},
            x_label="level",
        )
        for name, arms in groups.items()
        for metric, title in titles.items()
    ]


def whole_levels(figure: Figure) -> Figure:
    """Levels are whole numbers."""
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def position_panels(runs: results.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Accuracy of each position of the answer on validation rows over the steps; settings side by side."""
    keys = {key for seeds in runs.values() for run in seeds.values() for line in run.log for key in line}
    positions = sorted(int(key.removeprefix("accuracy_")) for key in keys if key.startswith("accuracy_"))
    panels = []
    for place in positions:
        found = results.series(runs, f"accuracy_{place}", x="step")
        for name, arms in groups.items():
            shown = {text: found[arm] for arm, text in arms.items() if found[arm]}
            if shown:
                title = titled(f"token {place + 1} of the answer (%)", name, groups)
                panels.append(figures.Curves(title, shown, x_label="step"))
    return panels


def dot_panels(runs: results.Runs) -> list[figures.Dots]:
    """The plan's metrics, with chance as a hollow mark."""
    return [
        figures.Dots(
            METRICS[key].title,
            {arm: list(results.values(runs, arm, key).values()) for arm in runs},
            {arm: list(results.values(runs, arm, "chance_exact_match").values()) for arm in runs}
            if key == PRIMARY
            else {},
        )
        for key in SHOWN
    ]


def solved_panels(runs: results.Runs) -> list[figures.Dots]:
    """Exact match beside the mark of a solved seed, and after how many steps seeds were solved."""
    keys = {"exact_match": SOLVED, "steps_to_solve": {}}
    values = {key: {arm: list(results.values(runs, arm, key).values()) for arm in runs} for key in keys}
    return [
        figures.Dots(METRICS[key].title, values[key], lines=lines)
        for key, lines in keys.items()
        if key == PRIMARY or any(values[key].values())
    ]


def prediction(runs: results.Runs, reference: str, caption: str) -> Figure:
    """Deviation and loss of the regularised runs as measured, with what is predicted as hollow marks."""
    arms = [arm for arm in runs if results.values(runs, arm, "projected_std")]
    pairs = {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    panels = [
        figures.Dots(
            METRICS[key].label,
            {arm: list(results.values(runs, arm, key).values()) for arm in arms},
            {arm: list(results.values(runs, arm, other).values()) for arm in arms},
        )
        for key, other in pairs.items()
    ]
    return figures.dots(panels, arms, reference, hollow="predicted from rank, width and coefficients", caption=caption)


def width_curves(runs: results.Runs, arguments: Mapping[str, Mapping[str, Any]], caption: str) -> Figure:
    """Accuracy, entropies, deviation and loss over the projection's width, with `off` as a dotted line."""
    on = {arm: one["projection_width"] for arm, one in arguments.items() if one["lambda1"] or one["lambda2"]}
    on = dict(sorted(on.items(), key=lambda item: item[1]))
    off = [arm for arm in runs if arm in arguments and arm not in on]
    seeds = list(dict.fromkeys(seed for arm in on for seed in runs[arm]))

    def over_width(metric: str) -> list[results.Curve]:
        found = {width: results.values(runs, arm, metric) for arm, width in on.items()}
        curves = [[(width, values[seed]) for width, values in found.items() if seed in values] for seed in seeds]
        return [([float(width) for width, _ in curve], [value for _, value in curve]) for curve in curves if curve]

    panels, predicted = [], {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    for key in ("exact_match", "entropy_mean", *predicted):
        lines = {arm.partition("@")[0]: list(results.values(runs, arm, key).values()) for arm in off}
        values = {"measured": over_width(key)} | ({"predicted": over_width(predicted[key])} if key in predicted else {})
        level = {name: mean(found) for name, found in lines.items() if found}
        panels.append(figures.Curves(METRICS[key].title, values, level, "projection width d", "log"))
    figure = figures.curves(panels, ["measured", "predicted"], "predicted", caption)
    ticks = sorted(set(on.values()))
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    return figure


# ------------------------------------------------------------------------------------------------- main


def draw(view: results.View) -> dict[str, Figure]:
    """The figures of a study."""
    runs, study, own = view.runs, view.study, view.reference
    arguments, caption = arguments_of(runs), view.caption
    groups = by_setting(view.summary, study.name, arguments)
    labels = list(dict.fromkeys(text for arms in groups.values() for text in arms.values()))
    reference = label(study.name, own, arguments.get(own))
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in view.summary["rows"] if row["diverged"]}
    words = {row["arm"]: row["word"] or "" for row in view.summary["rows"]}
    ordered = list(dict.fromkeys([*(arm for arms in groups.values() for arm in arms), *study.arms]))
    drawn = {
        "entropy": whole_levels(figures.curves(entropy_panels(runs, groups), labels, reference, caption)),
        "metrics": figures.dots(dot_panels(runs), ordered, own, remarks, "the most frequent answer", caption),
        "prediction": prediction({arm: runs[arm] for arm in ordered}, own, caption),
        "solved": figures.dots(solved_panels(runs), ordered, own, words, caption=caption),
    }
    if positions := position_panels(runs, groups):  # there are none before the first validation
        drawn["positions"] = figures.curves(positions, labels, reference, caption)
    if "width" in study.name:
        drawn["width"] = width_curves(runs, arguments, caption)
    return drawn


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw, solved)


if __name__ == "__main__":
    main()
