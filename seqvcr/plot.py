"""Draw the figures and write the tables and the finding of one Seq-VCR study.

    python seqvcr/plot.py seqvcr-coefficients --scale demo --seeds 0 1 2

Reads metrics.json and train.jsonl of the runs. Missing runs are left out and listed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.ticker import NullLocator

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.study import figures, plotting, results, tables
from common.study.names import without_setting
from seqvcr.studies import METRICS, design

PRIMARY = "exact_match"
PLOTTED = ("exact_match", "entropy_mean", "entropy_batch_level", "digit_accuracy")
SOLVED_LINE = {"solved": 90.0}  # exact match (%), a dotted line
TASK_NAMES = {
    "multiplication": "{0}x{0} digits",
    "arithmetic": "{0} operators modulo 11",
    "lis": "sequences of {0} numbers",
}


def count_solved(runs: list[dict[str, Any]]) -> str:
    """Return "m of n solved" (90 % exact match). Exact match is bimodal, so its mean alone is misleading."""
    return f"{sum(bool(run['solved']) for run in runs)} of {len(runs)} solved"


# ------------------------------------------------------------------------------------------------- arms


def tasks(runs: results.Runs) -> str:
    """Return the tasks of the runs in words."""
    arguments = results.arm_arguments(runs).values()
    return " and ".join(dict.fromkeys(TASK_NAMES[args["task"]].format(args["size"]) for args in arguments))


def describe(runs: results.Runs) -> str:
    """Return tasks, network, steps and batch size as a caption; "" if there are no runs."""
    arguments = list(results.arm_arguments(runs).values())
    if not arguments:
        return ""
    first = arguments[0]
    network = f"{first['layers']} blocks of width {first['width']}"
    steps = " and ".join(map(str, sorted({args["steps"] for args in arguments})))
    return f"{tasks(runs)}, {network}, {steps} steps, batch size {first['batch']}"


def arm_label(study: str, arm: str, arguments: Mapping[str, Any] | None) -> str:
    """Return the label of an arm in the figures of a study, without its setting."""
    if arguments is None:
        return without_setting(arm)
    coefficients = arguments["lambda1"], arguments["lambda2"]
    if (study == "seqvcr-coefficients" or "width" in study) and not any(coefficients):
        return without_setting(arm)
    if study == "seqvcr-coefficients":
        return "λ {:g}, {:g}".format(*coefficients)
    if "width" in study:
        return f"d = {arguments['projection_width']}"
    return without_setting(arm)


def by_setting(
    summary: Mapping[str, Any], study: str, arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """Return the arms and their labels by setting. A reference shared by two settings is in both."""
    return {
        name: {arm: arm_label(study, arm, arguments[arm]) for arm in arms if arm in arguments}
        for name, arms in tables.arms_by_setting(summary).items()
    }


def level_curves(runs: results.Runs, arm: str, metric: str) -> list[results.Curve]:
    """Return a metric with one value per level as a curve for each finished seed of an arm."""
    curves = []
    for run in runs[arm].values():
        values = run.metrics.get(metric) if run.metrics and not run.metrics.get("diverged") else None
        if values:
            curves.append((list(map(float, range(len(values)))), values))
    return curves


# ------------------------------------------------------------------------------------------------- figures


def panel_title(title: str, setting: str) -> str:
    """Return the title of a panel, followed by its setting, the name of the data."""
    return f"{title}, {setting}" if setting else title


def entropy_panels(runs: results.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Return two panels per setting: both entropies by level."""
    titles = {"entropy": "matrix entropy over tokens (eq. 2)", "entropy_batch": "entropy over the batch"}
    return [
        figures.Curves(
            panel_title(title, setting),
            {label: level_curves(runs, arm, metric) for arm, label in arms.items()},
            x_label="level",
        )
        for setting, arms in groups.items()
        for metric, title in titles.items()
    ]


def position_panels(runs: results.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Return a panel per answer position and setting: validation accuracy over the steps."""
    keys = {key for seeds in runs.values() for run in seeds.values() for line in run.log for key in line}
    positions = sorted(int(key.removeprefix("accuracy_")) for key in keys if key.startswith("accuracy_"))
    panels = []
    for position in positions:
        by_arm = results.series(runs, f"accuracy_{position}", x="step")
        for setting, arms in groups.items():
            curves = {label: by_arm[arm] for arm, label in arms.items() if by_arm[arm]}
            if curves:
                title = panel_title(f"token {position + 1} of the answer (%)", setting)
                panels.append(figures.Curves(title, curves, x_label="step"))
    return panels


def dots_panel(runs: results.Runs, key: str) -> figures.Dots:
    """Return the panel of a metric; for exact match hollow marks show the most frequent answer as a baseline."""
    majority = results.values_by_arm(runs, "chance_exact_match") if key == PRIMARY else {}
    return figures.Dots(f"{METRICS[key].title}, {tasks(runs)}", results.values_by_arm(runs, key), majority)


def curve_panels(runs: results.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Return two panels per setting: exact match on validation rows and training cross entropy over the steps."""
    panels = []
    for setting, arms in groups.items():
        for key in (PRIMARY, "cross_entropy"):
            curves = results.series(runs, key, x="step")
            title = panel_title(METRICS[key].title, setting)
            panels.append(figures.Curves(title, {label: curves[arm] for arm, label in arms.items()}, x_label="step"))
    return panels


def solved_panels(runs: results.Runs) -> list[figures.Dots]:
    """Return the panels of exact match, with a line at 90 %, and of the steps until a seed was solved."""
    keys = {"exact_match": SOLVED_LINE, "steps_to_solve": {}}
    values = {key: results.values_by_arm(runs, key) for key in keys}
    return [
        figures.Dots(f"{METRICS[key].title}, {tasks(runs)}", values[key], lines=lines)
        for key, lines in keys.items()
        if key == PRIMARY or any(values[key].values())
    ]


def prediction_figure(runs: results.Runs, styles: Mapping[str, figures.Style], caption: str) -> figures.Drawing:
    """Return measured std and regulariser loss of the regularised runs; hollow marks are predictions."""
    arms = [arm for arm in runs if results.values(runs, arm, "projected_std")]
    pairs = {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    panels = [
        figures.Dots(
            f"{METRICS[key].label}, {tasks(runs)}",
            results.values_by_arm(runs, key, arms),
            results.values_by_arm(runs, predicted, arms),
        )
        for key, predicted in pairs.items()
    ]
    styles = {arm: styles[arm] for arm in arms}
    return figures.dots(panels, styles, hollow="predicted from rank, width and coefficients", caption=caption)


def width_figure(runs: results.Runs, arguments: Mapping[str, Mapping[str, Any]], caption: str) -> figures.Drawing:
    """Return accuracy, entropy, std and loss over the projection width; `off` at the same level is a dotted line."""
    width_of = {arm: args["projection_width"] for arm, args in arguments.items() if args["lambda1"] or args["lambda2"]}
    width_of = dict(sorted(width_of.items(), key=lambda item: item[1]))
    levels = {arguments[arm]["layer"] for arm in width_of}  # another level has another entropy
    off_arms = [arm for arm in runs if arm not in width_of and arguments.get(arm, {}).get("layer") in levels]
    seeds = list(dict.fromkeys(seed for arm in width_of for seed in runs[arm]))

    def over_width(metric: str) -> list[results.Curve]:
        """Return a curve (widths, values) per seed."""
        by_width = {width: results.values(runs, arm, metric) for arm, width in width_of.items()}
        curves = []
        for seed in seeds:
            widths = [width for width, values in by_width.items() if seed in values]
            if widths:
                curves.append(([float(width) for width in widths], [by_width[width][seed] for width in widths]))
        return curves

    panels, predictions = [], {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    for key in ("exact_match", "entropy_batch_level", *predictions):
        curves = {"measured": over_width(key)}
        if key in predictions:
            curves["predicted"] = over_width(predictions[key])
        lines = {}
        for arm in off_arms:
            values = list(results.values(runs, arm, key).values())
            if values:
                lines[without_setting(arm)] = mean(values)
        title = f"{METRICS[key].title}, {tasks(runs)}"
        panels.append(figures.Curves(title, curves, lines, "projection width d", "log"))
    styles = {
        "measured": {"color": figures.COLOURS[0], "linestyle": "-"},
        "predicted": {"color": figures.GREY, "linestyle": figures.DASHES[0]},
    }
    drawing = figures.curves(panels, styles, caption=caption)
    ticks = sorted(set(width_of.values()))
    for axis in drawing.figure.axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    return drawing


# ------------------------------------------------------------------------------------------------- main


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study by name. "positions" needs a validated run, "width" a study of widths."""
    runs, study, caption = view.runs, view.study, view.caption
    arguments = results.arm_arguments(runs)
    groups = by_setting(view.summary, study.name, arguments)
    names = {arm: label for group in groups.values() for arm, label in group.items()}
    label_styles: dict[str, figures.Style] = {}
    for arm, label in names.items():
        label_styles.setdefault(label, view.styles[arm])
    highlight = list(dict.fromkeys(names[arm] for arm in view.highlight if arm in names))
    tested = [arm for item in study.must_beat for arm in (item.arm, item.baseline_arm)]
    tested = list(dict.fromkeys([*(names[arm] for arm in tested if arm in names), *highlight]))
    training = curve_panels(runs, groups)
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in view.summary["rows"] if row["diverged"]}
    solved = {row["arm"]: row["remark"] or "" for row in view.summary["rows"]}
    arms = list(dict.fromkeys([*(arm for group in groups.values() for arm in group), *study.arms]))
    styles = {arm: label_styles[names[arm]] if arm in names else view.styles[arm] for arm in arms}
    entropy = figures.curves(entropy_panels(runs, groups), label_styles, highlight, caption)
    drawn = {
        "curves": figures.curves(training, label_styles, tested, caption),
        "entropy": figures.integer_x_ticks(entropy),
        "metrics": figures.dots(
            [dots_panel(runs, key) for key in PLOTTED], styles, remarks, "the most frequent answer", caption
        ),
        "prediction": prediction_figure({arm: runs[arm] for arm in arms}, styles, caption),
        "solved": figures.dots(solved_panels(runs), styles, solved, caption=caption),
    }
    if study.metric == PRIMARY:
        slide = figures.summary_slide(view.summary, training[0], label_styles, tested)
    else:
        slide = figures.summary_slide(view.summary, dots_panel(runs, study.metric), styles)
    drawn["summary"] = slide
    positions = position_panels(runs, groups)
    if positions:  # empty if no run has been validated
        drawn["positions"] = figures.curves(positions, label_styles, highlight, caption)
    if "width" in study.name:
        drawn["width"] = width_figure(runs, arguments, caption)
    return drawn


def main(argv: list[str] | None = None) -> None:
    plotting.main(argv, __doc__, design, describe, draw, count_solved)


if __name__ == "__main__":
    main()
