"""Studies along one number: curves between two arms, and contrasts at other learning rates.

A curve is a study whose arms differ in one argument, its dose. Its first contrast names the plan's arms; those between
and beyond them show what such a contrast cannot: where the effect sets in. A robustness study has its primary contrasts
first, arm:reference, then each again as arm@third:reference@third and arm@triple:reference@triple.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cli import NON_METHOD_FLAGS
from common.study import analysis, figures, results, tables
from common.study.design import Sweep

RATES = {"third": "a third", "": "base's rate", "triple": "three times"}  # by what stands behind the arm's last "@"
ALL, ONLY, NOT = "holds at all three rates", "only at base's rate", "no finding at base's rate"
SOME, TURNS = "holds at base's rate and one other", "is the reverse at another rate"


# ------------------------------------------------------------------------------------------------- curves


def doses(runs: results.Runs, reference: str, sweep: Sweep) -> dict[str, float]:
    """By arm its dose, rising: the arms that differ from `reference` in the dose alone, and have a run."""
    found = {arm: next((run.args["arguments"] for run in by.values() if run.args), None) for arm, by in runs.items()}
    apart = {sweep.argument, *sweep.moving, "seed", *NON_METHOD_FLAGS}

    def rest(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {key: one for key, one in arguments.items() if key not in apart}

    own = found.get(reference)
    along = {
        arm: float(arguments[sweep.argument])
        for arm, arguments in found.items()
        if own and arguments and rest(arguments) == rest(own)
    }
    return dict(sorted(along.items(), key=lambda item: item[1]))


def onset(summary: Mapping[str, Any], along: Mapping[str, float], metric: str) -> str:
    """From which dose on, seen from the reference, every dose differs in the same direction: a phrase, "" without one.

    There is none without intervals, or where the reference has no run.
    """
    reference = next(one["reference"] for one in summary["contrasts"] if one["primary"])
    words = {one["arm"]: one["word"] for one in summary["all_contrasts"] if one["metric"] == metric and
             one["reference"] == reference}  # fmt: skip
    order, told = list(along), []
    if reference not in order:
        return ""
    place = order.index(reference)
    for side, arms in (("up", order[place + 1 :]), ("down", order[:place][::-1])):
        known = [words.get(arm, "") for arm in arms]
        if not known or tables.ONE_SEED in known:
            continue
        ends = known[-1]
        first = next((i for i in range(len(known)) if set(known[i:]) == {ends}), None)
        if ends in ("lower", "higher") and first is not None:
            told.append(f"{ends} from {along[arms[first]]:g} {side}")
        else:
            told.append(f"no lasting difference {side} to {along[arms[-1]]:g}")
    return "; ".join(told)


def curve_finding(summary: Mapping[str, Any], along: Mapping[str, float], sweep: Sweep) -> str:
    """The means in the order of the dose, and where the difference to the reference sets in."""
    rows, sentences = {row["arm"]: row["metrics"] for row in summary["rows"]}, []
    reference = next(one["reference"] for one in summary["contrasts"] if one["primary"])
    for metric in sweep.metrics:
        described = summary["metrics"][metric]
        points = [
            f"{tables.number(rows[arm][metric]['mean'], described)} at {dose:g}"
            for arm, dose in along.items()
            if metric in rows[arm]
        ]
        if not points:
            continue
        against = onset(summary, along, metric) if described["judged"] else ""
        against = f"; against {reference}: {against}" if against else ""
        sentences.append(f"{described['label']}: {', '.join(points)}{against}.")
    return " ".join(sentences) or "No value yet."


def curve(
    runs: results.Runs, along: Mapping[str, float], named: Sequence[str], sweep: Sweep,
    metrics: Mapping[str, Mapping[str, Any]], caption: str,
) -> Figure:  # fmt: skip
    """A panel a metric over the doses, evenly spaced: a dot a seed, a line through the means; `named` arms by name."""
    arms = list(along)
    ticks = [
        f"{dose:g}" + (f"\n{textwrap.fill(short(arm), 13)}" if arm in named else "") for arm, dose in along.items()
    ]
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.grid(len(sweep.metrics), max(4.4, 0.58 * len(arms)), 3.0)
        for axis, metric in zip(axes, sweep.metrics, strict=True):
            values = {arm: list(results.values(runs, arm, metric).values()) for arm in arms}
            means = [(place, float(np.mean(values[arm]))) for place, arm in enumerate(arms) if values[arm]]
            axis.plot([x for x, _ in means], [y for _, y in means], color=figures.COLOURS[0], zorder=2)
            for place, arm in enumerate(arms):
                colour = figures.REFERENCE if arm in named else figures.COLOURS[0]
                axis.plot([place] * len(values[arm]), values[arm], "o", color=colour, ms=4, alpha=0.6, mec="none")
            for place, mean in means:
                colour = figures.REFERENCE if arms[place] in named else figures.COLOURS[0]
                axis.plot(place, mean, "s" if arms[place] in named else "_", color=colour, ms=8, mew=2, zorder=3)
            axis.set(xlabel=sweep.label, axisbelow=True, xlim=(-0.4, len(arms) - 0.6))
            axis.set_title(tables.title(metrics[metric]))
            axis.set_xticks(range(len(arms)), ticks)
            axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        marks: dict[str, dict[str, Any]] = {
            "the plan's arms (mean)": {"color": figures.REFERENCE, "marker": "s", "linestyle": "", "markersize": 8},
            "between and beyond": {"color": figures.COLOURS[0]},
        }
        return figures.finish(figure, marks, f"Dots: training seeds; line: means; doses evenly spaced. {caption}")


def short(arm: str) -> str:
    """An arm without its setting."""
    return arm.partition("@")[0]


# ------------------------------------------------------------------------------------------------- robustness


def at_rates(summary: Mapping[str, Any], metric: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By primary contrast, "arm:reference", its contrast at every rate of RATES that was asked for, on `metric`."""
    every = {(one["arm"], one["reference"]): one for one in summary["all_contrasts"] if one["metric"] == metric}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in summary["contrasts"]:
        if one["primary"]:
            arm, reference = one["arm"], one["reference"]
            at = {rate: (f"{arm}@{rate}", f"{reference}@{rate}") if rate else (arm, reference) for rate in RATES}
            found[f"{arm}:{reference}"] = {rate: every[pair] for rate, pair in at.items() if pair in every}
    return found


def held(words: Mapping[str, str]) -> str:
    """What the words at the rates amount to: one of ALL, SOME, ONLY, TURNS, NOT."""
    own = words.get("", "")
    if own not in analysis.WORDS:
        return NOT
    if {"lower", "higher"} <= set(words.values()):
        return TURNS
    same = sum(word == own for word in words.values())
    return ALL if same == len(RATES) else SOME if same == 2 else ONLY


def robustness(summary: dict[str, Any], sweep: Sweep) -> dict[str, Any]:
    """The summary with its verdict, and a sentence for every primary contrast, over the three rates."""
    verdicts: dict[str, list[str]] = {}
    controls, sentences = summary["controls"], []
    for metric in sweep.metrics:
        described, primary = summary["metrics"][metric], metric == summary["primary_metric"]
        for name, by_rate in at_rates(summary, metric).items():
            judged = {rate: analysis.judge(one, controls) if primary else one["word"] for rate, one in by_rate.items()}
            words = {rate: word.removesuffix(" at this scale") for rate, word in judged.items()}
            if primary:
                verdicts.setdefault(held(words), []).append(name)
            alike = dict.fromkeys(words.values())
            told = (
                f"{next(iter(alike))} at all three rates"
                if len(alike) == 1 and len(words) == len(RATES)
                else "; ".join(f"{word} at {RATES[rate]}" for rate, word in words.items())
            )
            values = ", ".join(
                f"{RATES[rate]} {tables.number(one['mean'], described)}"
                + ("" if one["low"] is None else f" ({tables.interval(one, described)})")
                for rate, one in by_rate.items()
            )
            sentences.append(f"{described['label']}, {name}: {told} [{values}]")
    verdict = "; ".join(f"{word}: {', '.join(names)}" for word, names in verdicts.items())
    text = ". ".join(sentences) + "."
    return summary | {"verdict": verdict, "finding": text, "counted": ALL in verdicts}


def rates_figure(runs: results.Runs, summary: Mapping[str, Any], sweep: Sweep, caption: str) -> Figure:
    """A row a metric, a column a primary contrast: its difference at the three rates, a faint dot a seed."""
    columns = list(at_rates(summary, summary["primary_metric"]))
    with matplotlib.rc_context(figures.STYLE):
        size = (max(5.0, 3.3 * len(columns)), 2.7 * len(sweep.metrics) + 0.9)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(sweep.metrics), len(columns), squeeze=False, sharey="row")
        for row, metric in enumerate(sweep.metrics):
            found = at_rates(summary, metric)
            guards = summary["controls"] if metric == summary["primary_metric"] else None
            for axis, name in zip(axes[row], columns, strict=True):
                rates_panel(axis, runs, found[name], metric, guards)
                if row == 0:
                    axis.set_title(titled(name))
                if row == len(axes) - 1:
                    axis.set_xlabel("times the learning rate")
            axes[row][0].set_ylabel(tables.title(summary["metrics"][metric]))
        marks = {
            "clear of zero": {"color": figures.COLOURS[0], "marker": "o"},
            "not resolved, or not informative": {"color": figures.COLOURS[0], "marker": "o", "mfc": "white"},
        }
        text = "Difference of the means with Welch's 95 % interval; faint: seed by seed. "
        return figures.finish(figure, marks, text + caption)


def titled(contrast: str) -> str:
    """ "arm:reference" as a panel is headed, with the arm's setting once."""
    arm, reference = contrast.split(":")
    setting = arm.partition("@")[2]
    return f"{short(arm)}\nminus {short(reference)}" + (f"\n({setting})" if setting else "")


def rates_panel(
    axis: Axes, runs: results.Runs, by_rate: Mapping[str, Mapping[str, Any]], metric: str,
    controls: list[dict[str, Any]] | None,
) -> None:  # fmt: skip
    """One contrast's differences at its rates."""
    colour = figures.COLOURS[0]
    axis.axhline(0, color=figures.GREY, linewidth=1)
    axis.set(xlim=(-0.5, len(RATES) - 0.5), axisbelow=True)
    axis.set_xticks(range(len(RATES)), ["⅓", "1", "3"])
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    for place, rate in enumerate(RATES):
        one = by_rate.get(rate)
        if one is None or one["mean"] is None:
            axis.text(place, 0.5, "no value", ha="center", transform=axis.get_xaxis_transform(), **figures.SMALL)
            continue
        word = one["word"] if controls is None else analysis.judge(dict(one), controls)
        mine, other = (results.values(runs, one[side], metric) for side in ("arm", "reference"))
        seeds = sorted(mine.keys() & other.keys())
        axis.plot([place + 0.16] * len(seeds), [mine[s] - other[s] for s in seeds], "o", color=colour, ms=4, alpha=0.5,
                  mec="none")  # fmt: skip
        if one["low"] is not None:
            axis.plot([place, place], [one["low"], one["high"]], color=colour, linewidth=1.8)
        filled: dict[str, Any] = {} if word in analysis.WORDS else {"mfc": "white"}
        axis.plot(place, one["mean"], "o", color=colour, ms=7, **filled)


# ------------------------------------------------------------------------------------------------- both


def draw(view: results.View) -> dict[str, Figure]:
    """The figure of a sweep; its finding, and of robustness its verdict too, replace those of the summary."""
    sweep, summary, runs = view.study.sweep, view.summary, view.runs
    assert sweep
    if sweep.argument:
        named = list(view.study.pairs[0])
        along = doses(runs, named[1], sweep)
        summary["finding"] = curve_finding(summary, along, sweep)
        return {"sweep": curve(runs, along, named, sweep, summary["metrics"], view.caption)}
    summary |= robustness(summary, sweep)
    return {"sweep": rates_figure(runs, summary, sweep, view.caption)}
