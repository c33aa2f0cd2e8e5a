"""Sweeps over one argument ("curves"), and robustness to the learning rate: findings, verdicts and figures.

The arms of a curve differ in one argument, the swept argument. The figure names the two arms of its first contrast,
usually arms of a main study. A robustness study has the primary contrasts arm:reference first, then each of them as
arm@third:reference@third and arm@triple:reference@triple.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cli import NON_METHOD_FLAGS
from common.study import figures, results, tables
from common.study.analysis import NOT_TESTED, TOO_WEAK
from common.study.design import FINDINGS, Sweep
from common.study.names import contrast_name, in_setting, without_setting

RATE_LABELS = {"third": "a third", "": "base's rate", "triple": "three times"}  # text after an arm's last "@" -> label
OPPOSITE = {"worse": "better", "better": "worse", "higher": "lower", "lower": "higher"}
# Verdicts of a robustness study.
ALL_RATES = "holds at all three rates"
TWO_RATES = "holds at base's rate and one other"
BASE_RATE_ONLY = "only at base's rate"
INCOMPLETE = "other rates are not run"
NO_FINDING = "no finding at base's rate"
REVERSED = "is reversed at another rate"


# ------------------------------------------------------------------------------------------------- curves


def swept_values(runs: results.Runs, reference: str, sweep: Sweep) -> dict[str, float]:
    """Return arm -> value of the swept argument, in rising order.

    Contains the arms that have a run and whose arguments otherwise equal those of `reference`.
    """
    arguments = results.arm_arguments(runs)
    varying = {sweep.argument, *sweep.covarying, "seed", "data_seed", *NON_METHOD_FLAGS}

    def fixed(arm_arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arm_arguments.items() if name not in varying}

    reference_arguments = arguments.get(reference)
    if not reference_arguments:
        return {}
    swept = {
        arm: float(arm_arguments[sweep.argument])
        for arm, arm_arguments in arguments.items()
        if fixed(arm_arguments) == fixed(reference_arguments)
    }
    return dict(sorted(swept.items(), key=lambda item: item[1]))


def sweep_finding(summary: Mapping[str, Any], swept: Mapping[str, float], sweep: Sweep) -> list[str]:
    """Return a sentence per metric: the means in the order of the swept values, with verdicts against the reference."""
    rows, sentences = {row["arm"]: row["metrics"] for row in summary["rows"]}, []
    reference = tables.primary_contrasts(summary)[0]["reference"]
    for name in sweep.metrics:
        metric = summary["metrics"][name]
        contrasts = summary["contrasts" if name == summary["primary_metric"] else "all_contrasts"]
        verdicts = {
            contrast["arm"]: contrast["verdict"]
            for contrast in contrasts
            if contrast["metric"] == name and contrast["reference"] == reference and contrast["arm"] in swept
        }
        verdicts = verdicts if metric["judged"] else {}
        same = len(verdicts) > 1 and len(set(verdicts.values())) == 1
        points = []
        for arm, value in swept.items():
            if name in rows[arm]:
                verdict = f" ({verdicts[arm]})" if arm in verdicts and not same else ""
                points.append(f"{tables.format_number(rows[arm][name]['mean'], metric)} at {value:g}{verdict}")
        if points:
            against = f", against {without_setting(reference)}" if verdicts else ""
            common = f" (all {next(iter(verdicts.values()))})" if same else ""
            sentences.append(f"{metric['label']}{against}: {', '.join(points)}{common}.")
    return sentences or ["No value yet."]


def sweep_figure(view: results.View, swept: Mapping[str, float], sweep: Sweep) -> figures.Drawing:
    """Return one panel per metric: a dot and a thin line per seed, and a line through the means.

    The swept values are evenly spaced. The two arms of the first contrast are labelled by name.
    """
    arms, named = list(swept), view.study.pairs[0]
    ticks = []
    for arm, value in swept.items():
        ticks.append(f"{value:g}" + (f"\n{textwrap.fill(without_setting(arm), 13)}" if arm in named else ""))
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.grid(len(sweep.metrics), max(4.4, 0.58 * len(arms)), 3.0)
        colours = {arm: view.styles[arm]["color"] if arm in named else figures.GREY for arm in arms}
        for axis, metric in zip(axes, sweep.metrics, strict=True):
            values = results.values_by_arm(view.runs, metric, arms)
            for seed in sorted(set().union(*(view.runs[arm] for arm in arms))):
                by_arm = [results.values(view.runs, arm, metric).get(seed, np.nan) for arm in arms]
                axis.plot(range(len(arms)), by_arm, color=figures.GREY, linewidth=0.7, alpha=0.35, zorder=1)
            means = [(x, float(np.mean(values[arm]))) for x, arm in enumerate(arms) if values[arm]]
            axis.plot([x for x, _ in means], [mean for _, mean in means], color=figures.GREY, zorder=2)
            for x, arm in enumerate(arms):
                colour = colours[arm]
                axis.plot([x] * len(values[arm]), values[arm], "o", color=colour, ms=4, alpha=0.6, mec="none")
            for x, mean in means:
                colour = colours[arms[x]]
                axis.plot(x, mean, "s" if arms[x] in named else "_", color=colour, ms=8, mew=2, zorder=3)
            axis.set(xlabel=sweep.label, axisbelow=True, xlim=(-0.4, len(arms) - 0.6))
            title = tables.title(view.summary["metrics"][metric])
            axis.set_title(title)
            figures.widen(axis, "y", title)
            axis.set_xticks(range(len(arms)), ticks)
            axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        markers: dict[str, dict[str, Any]] = {
            f"{without_setting(arm)} (mean)": {
                "color": colours[arm],
                "marker": "s",
                "linestyle": "",
                "markersize": 8,
            }
            for arm in named[::-1]
            if arm in arms
        }
        markers["other values"] = {"color": figures.GREY}
        text = f"Dots and thin lines: seeds; thick line: means; values evenly spaced. {view.caption}"
        return figures.add_legend(figure, markers, text)


# ------------------------------------------------------------------------------------------------- robustness


def contrasts_by_rate(summary: Mapping[str, Any], metric: str) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Return (arm, reference) -> rate -> contrast on `metric`, for every primary contrast and declared rate."""
    contrasts = {}
    for contrast in summary["all_contrasts"]:
        if contrast["metric"] == metric:
            contrasts[contrast["arm"], contrast["reference"]] = contrast
    result = {}
    for contrast in summary["contrasts"]:
        if contrast["primary"]:
            arm, reference = contrast["arm"], contrast["reference"]
            pairs = {rate: (in_setting(arm, rate), in_setting(reference, rate)) for rate in RATE_LABELS}
            by_rate = {rate: contrasts[pair] for rate, pair in pairs.items() if pair in contrasts}
            result[arm, reference] = by_rate
    return result


def opposite_at_another_rate(summary: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return (arm, reference) of the contrasts of a robustness study whose verdict another rate resolves oppositely."""
    result = set()
    for pair, by_rate in contrasts_by_rate(summary, summary["primary_metric"]).items():
        verdicts = {rate: contrast["verdict"] for rate, contrast in by_rate.items()}
        if OPPOSITE.get(verdicts.get("", "")) in verdicts.values():
            result.add(pair)
    return result


def robustness_verdict(verdicts: Mapping[str, str]) -> str:
    """Combine the verdicts (rate -> verdict) of one contrast into its robustness verdict."""
    at_base_rate = verdicts.get("", "")
    if at_base_rate not in FINDINGS:
        return NO_FINDING
    if OPPOSITE.get(at_base_rate) in verdicts.values():
        return REVERSED
    if any(verdicts.get(rate, "not run") in NOT_TESTED for rate in RATE_LABELS):
        return INCOMPLETE
    same = sum(verdict == at_base_rate for verdict in verdicts.values())
    if same == len(RATE_LABELS):
        return ALL_RATES
    return TWO_RATES if same == 2 else BASE_RATE_ONLY


def robustness(summary: dict[str, Any], sweep: Sweep) -> dict[str, Any]:
    """Return the summary with the verdict and the finding over the three rates, one sentence per primary contrast."""
    names_by_verdict: dict[str, list[str]] = {}
    sentences, headline = [], []
    for key in sweep.metrics:
        metric, primary = summary["metrics"][key], key == summary["primary_metric"]
        for (arm, reference), by_rate in contrasts_by_rate(summary, key).items():
            name = contrast_name(arm, reference)
            verdicts: dict[str, str] = {}
            rates_by_verdict: dict[str, list[str]] = {}
            numbers = []
            for rate, contrast in by_rate.items():
                verdicts[rate] = contrast["verdict"]
                rates_by_verdict.setdefault(contrast["verdict"], []).append(RATE_LABELS[rate])
                bounds = "" if contrast["low"] is None else f" ({tables.format_interval(contrast, metric)})"
                numbers.append(f"{RATE_LABELS[rate]} {tables.format_number(contrast['mean'], metric)}{bounds}")
            if primary:
                names_by_verdict.setdefault(robustness_verdict(verdicts), []).append(name)
            if len(rates_by_verdict) == 1 and len(verdicts) == len(RATE_LABELS):
                phrase = f"{verdicts['']} at all three rates"
            else:
                phrase = ", ".join(f"{verdict} at {' and '.join(rates)}" for verdict, rates in rates_by_verdict.items())
            sentences.append(f"{name}, {metric['label']}: {phrase} [{', '.join(numbers)}].")
            if primary:
                headline.append(f"{name}: {phrase}")
    return summary | {
        "verdict": "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in names_by_verdict.items()),
        "headline": "; ".join(headline) + ".",
        "finding": sentences,
        "has_finding": ALL_RATES in names_by_verdict,
    }


def rates_figure(summary: Mapping[str, Any], sweep: Sweep, caption: str) -> figures.Drawing:
    """Return the differences at the three rates: a row per metric, a column per primary contrast."""
    columns = list(contrasts_by_rate(summary, summary["primary_metric"]))
    with matplotlib.rc_context(figures.STYLE):
        size = (max(5.0, 3.3 * len(columns)), 2.7 * len(sweep.metrics) + 0.9)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(sweep.metrics), len(columns), squeeze=False, sharey="row")
        for row, metric in enumerate(sweep.metrics):
            contrasts = contrasts_by_rate(summary, metric)
            for axis, pair in zip(axes[row], columns, strict=True):
                rates_panel(axis, summary, contrasts[pair])
                if row == 0:
                    axis.set_title(contrast_name(*pair, minus="\nminus "))
                if row == len(axes) - 1:
                    axis.set_xlabel("times the learning rate")
            label = summary["metrics"][metric]["label"]
            unit = {"%": " (points)", "": ""}.get(summary["metrics"][metric]["unit"], "")
            axes[row][0].set_ylabel(textwrap.fill(f"difference in {label}{unit}", 30))
            if metric == summary["primary_metric"] and summary["margin"] is not None:
                for axis in axes[row]:
                    axis.axhspan(
                        -summary["margin"], summary["margin"], color="#0072B2", alpha=0.1, linewidth=0, zorder=0
                    )
        verdicts = {
            contrast["verdict"]
            for metric in sweep.metrics
            for by_rate in contrasts_by_rate(summary, metric).values()
            for contrast in by_rate.values()
        }
        markers = {
            verdict: {"color": figures.verdict_colour(verdict), "marker": "o", "linestyle": ""}
            for verdict in figures.VERDICT_COLOURS
            if verdict in verdicts
        }
        if verdicts - set(figures.VERDICT_COLOURS):
            markers["no verdict"] = {"color": figures.NO_VERDICT, "marker": "o", "linestyle": ""}
        text = "Mean paired difference with 95 % interval; faint dots: differences of the seeds; light band: margin. "
        return figures.add_legend(figure, markers, text + caption)


def rates_panel(axis: Axes, summary: Mapping[str, Any], by_rate: Mapping[str, dict[str, Any]]) -> None:
    """Draw the differences of one contrast at its rates."""
    axis.axhline(0, color=figures.BASE, linewidth=1.4)
    axis.set(xlim=(-0.5, len(RATE_LABELS) - 0.5), axisbelow=True)
    axis.set_xticks(range(len(RATE_LABELS)), ["⅓", "1", "3"])
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    for x, rate in enumerate(RATE_LABELS):
        contrast = by_rate.get(rate)
        if contrast is None or contrast["mean"] is None:
            axis.text(x, 0.5, "no value", ha="center", transform=axis.get_xaxis_transform(), **figures.SMALL)
            continue
        differences = figures.paired_differences(summary, contrast)
        colour = figures.verdict_colour(contrast["verdict"])
        axis.plot([x + 0.16] * len(differences), differences, "o", color="#333333", ms=4, alpha=0.5, mec="none")
        if contrast["low"] is not None:
            axis.plot([x, x], [contrast["low"], contrast["high"]], color=colour, linewidth=2.4)
        axis.plot(x, contrast["mean"], "o", color=colour, ms=7)


# ------------------------------------------------------------------------------------------------- entry point


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figure of a sweep. Replaces the finding of `view.summary`, and its verdict if it is robustness."""
    sweep, summary = view.study.sweep, view.summary
    assert sweep
    if sweep.argument:
        swept = swept_values(view.runs, view.reference, sweep)
        summary["finding"] = sweep_finding(summary, swept, sweep)
        if summary["verdict"] != TOO_WEAK:
            summary["headline"] = summary["finding"][0]
        return {"sweep": sweep_figure(view, swept, sweep)}
    summary |= robustness(summary, sweep)
    return {"sweep": rates_figure(summary, sweep, view.caption)}
