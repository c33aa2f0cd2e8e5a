"""Figures, tables and finding of one BSA study.

    python bsa/plot.py bsa-alignment-loss --scale demo --seeds 0 1 2

Reads the runs' metrics.json, train.jsonl and activations.json, and draws what there is; missing runs are holes. Trains
nothing; the one number it makes itself is the loss at equal activity (`at_activity`), for the study on alpha.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.studies import METRICS, design
from common.files import read_json
from common.study import figures, plotting, results, statistics, tables

PRIMARY = "fixed_topk_reconstruction_loss"
UNTRAINED = {PRIMARY: "untrained_fixed_topk_reconstruction_loss"}
MANY = 8  # arms; above it a figure has fewer panels, or groups of arms
FAMILIES = {  # (alignment, reconstruction): how a family of arms that differ in alpha is called
    ("cosine", "cosine"): "cosine alignment",
    ("mse", "cosine"): "mse alignment",
    ("mse", "mse"): "mse alignment and reconstruction",
    ("cosine", "mse"): "mse reconstruction",
    ("l1", "cosine"): "l1",
    ("l1", "mse"): "l1, mse reconstruction",
}
Which = Literal["x", "y"]


class Point(NamedTuple):
    """A run on the way of its family: mean number of active features a row, and reconstruction loss."""

    active: float
    loss: float


class Activations(NamedTuple):
    """Of one run: shares of rows (N,) in which each feature is on, falling; shares of rows (n,) by active count."""

    features: np.ndarray
    rows: np.ndarray


# ------------------------------------------------------------------------------------------------- what the runs say


def describe(runs: results.Runs) -> str:
    """Data and recipe in words, of the first run that is there; "" where there is none."""
    first = results.first_arguments(runs)
    if not first:
        return ""
    names = {"planted": "planted concepts", "mesh": "MeSH terms embedded by MiniLM", "file": "a user's own embeddings"}
    data = names.get(first["data_set"], first["data_set"])
    recipe = f"N = {first['latent']}, K = {first['active']}, {first['steps']} steps of batch {first['batch']}"
    return f"{data}, {recipe}"


def holes(summary: Mapping[str, Any]) -> dict[str, str]:
    """By arm, how many of its seeds diverged and how many are missing; nothing for an arm that is whole."""
    told = {
        row["arm"]: ", ".join(f"{len(row[what])} {what}" for what in ("diverged", "missing") if row[what])
        for row in summary["rows"]
    }
    return {arm: text for arm, text in told.items() if text}


def unsettled(runs: results.Runs) -> list[str]:
    """A sentence for each arm with seeds that still moved at the end: they are not in the mean of `settled_step`."""
    result = []
    for arm, by_seed in runs.items():
        finished = {s: run.metrics for s, run in by_seed.items() if run.metrics and not run.metrics.get("diverged")}
        asked = [seed for seed, metrics in finished.items() if "settled_step" in metrics]
        if moving := [seed for seed in asked if finished[seed]["settled_step"] is None]:
            listed = ", ".join(map(str, moving))
            result.append(
                f"{arm}: in {len(moving)} of {len(asked)} loss or active count still moved by 1 % or more over the "
                f"last fifth of the steps (seed {listed})."
            )
    return result


def family(arguments: Mapping[str, Any]) -> str:
    """How a run is called apart from its alpha: by the arguments of args.json, never by the arm's name."""
    if arguments["code"] != "round":
        return f"{arguments['code']} code"
    pair = (arguments["alignment"], arguments["reconstruction"])
    name = FAMILIES.get(pair, f"{pair[0]} alignment, {pair[1]} reconstruction")
    apart = {"init": "sparse", "target": "binary", "mse_reduction": "mean"}
    others = [f"{arguments[key]} {key.split('_')[-1]}" for key, usual in apart.items() if arguments[key] != usual]
    return ", ".join([name, *others])


def families(runs: results.Runs) -> dict[str, dict[str, float]]:
    """By family its arms with their alpha, rising; an arm without a run belongs to none."""
    result: dict[str, dict[str, float]] = {}
    for arm, by_seed in runs.items():
        if found := [run.args["arguments"] for run in by_seed.values() if run.args]:
            result.setdefault(family(found[0]), {})[arm] = float(found[0]["alpha"])
    return {name: dict(sorted(arms.items(), key=lambda item: item[1])) for name, arms in result.items()}


def interpolate(points: Sequence[Point | None], active: float) -> float | None:
    """The loss at `active` features, linear in log(active) between neighbours in the order of alpha.

    A None is a run that is missing: nothing is interpolated across it. None where no two neighbours enclose `active`;
    the lowest loss where the way crosses it more often, since alpha may be chosen.
    """
    found = []
    for one, other in zip(points, [*points[1:], *points[-1:]], strict=True):  # the last with itself: it may be alone
        if one is None or other is None or min(one.active, other.active) <= 0:
            continue
        low, high = sorted((one, other))
        if low.active <= active <= high.active:
            width = math.log(high.active / low.active)
            share = math.log(active / low.active) / width if width else 0.0
            found.append(low.loss + share * (high.loss - low.loss))
    return min(found, default=None)


def at_activity(runs: results.Runs, arms: Sequence[str], active: float) -> dict[int, float | None]:
    """By seed, the reconstruction loss at `active` features of arms in the order of alpha; None outside their range.

    A seed without any value of these arms is left out.
    """
    counts = [results.values(runs, arm, "active_mean") for arm in arms]
    losses = [results.values(runs, arm, "reconstruction_loss") for arm in arms]
    result = {}
    for seed in sorted({seed for found in counts for seed in found}):
        ways = zip(counts, losses, strict=True)
        points = [Point(count[seed], loss[seed]) if seed in count and seed in loss else None for count, loss in ways]
        result[seed] = interpolate(points, active)
    return result


def matched(runs: results.Runs, reference: str) -> list[str]:
    """What each family loses at the reference's mean active count, and by how much it differs from the reference.

    The reference's own loss is measured, not interpolated: where the count hardly answers to alpha that would tell
    nothing.
    """
    ways, metric = families(runs), vars(METRICS["reconstruction_loss"])
    own = next((name for name, arms in ways.items() if reference in arms), None)
    counts = list(results.values(runs, reference, "active_mean").values())
    if own is None or not counts:
        return []
    active = mean(counts)
    found = {name: at_activity(runs, list(ways[name]), active) for name in sorted(ways, key=lambda name: name != own)}
    kept = {name: [loss for loss in losses.values() if loss is not None] for name, losses in found.items()}
    kept[own] = list(results.values(runs, reference, "reconstruction_loss").values())
    parts = []
    for name, losses in kept.items():
        if not losses:
            parts.append(f"{name}: outside its range")
            continue
        whole = statistics.summary(losses)
        facts = [f"95 % interval {tables.interval(vars(whole), metric)}"] if whole.low is not None else []
        outside = len(found[name]) - whole.n if name != own else 0
        facts.append(f"n = {whole.n}" + (f", {outside} more outside its range" if outside else ""))
        if name != own and kept[own]:
            apart = statistics.welch(losses, kept[own])
            bounds = "" if apart.low is None else f", {tables.interval(vars(apart), metric)}"
            facts.append(f"minus {reference} {tables.number(apart.mean, metric)}{bounds}")
        parts.append(f"{reference if name == own else name}: {tables.number(whole.mean, metric)} ({'; '.join(facts)})")
    return [
        f"Reconstruction loss at the {active:.1f} active features of {reference}, the others' interpolated in "
        f"log(active) between neighbouring alphas, descriptive: {'; '.join(parts)}."
    ]


def read_activations(folder: Path, runs: results.Runs) -> tuple[dict[str, list[Activations]], list[str]]:
    """(by arm the activations of its finished seeds, sentences on those that cannot be read)."""
    found: dict[str, list[Activations]] = {arm: [] for arm in runs}
    notes = []
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            if not run.metrics or run.metrics.get("diverged"):
                continue
            try:
                read = read_json(folder / arm / str(seed) / "activations.json")
                parts = [np.array(read[key], float) for key in ("feature_shares", "rows_by_active_count")]
                if any(part.ndim != 1 or not part.sum() > 0 for part in parts):
                    raise ValueError
                found[arm].append(Activations(parts[0], parts[1] / parts[1].sum()))
            except (ValueError, TypeError, KeyError, OSError):
                notes.append(f"{arm}, seed {seed}: activations.json is missing or cannot be read; not in that figure.")
    return found, notes


# ------------------------------------------------------------------------------------------------- figures


def is_wide(found: Sequence[float], ratio: float = 10) -> bool:
    """Whether positive values differ so much that they need a log axis."""
    positive = [value for value in found if value > 0]
    return bool(positive) and max(positive) > ratio * min(positive)


def log_axis(axis: Axes, which: Which) -> None:
    """A log axis of at least a factor of 2.5, labelled with plain numbers."""
    axis.set(**{f"{which}scale": "log"})
    low, high = getattr(axis, f"get_{which}lim")()
    if high < 2.5 * low:
        low, high = (math.sqrt(low * high * ratio) for ratio in (1 / 2.5, 2.5))
    decades = math.log10(high / low)
    steps = [1, 1.5, 2, 3, 4, 5, 6, 8] if decades < 0.8 else [1, 2, 3, 5] if decades < 1.3 else [1, 3]
    steps = steps if decades < 2.6 else [1]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    own = getattr(axis, f"{which}axis")
    own.set_minor_locator(NullLocator())
    own.set_major_locator(FixedLocator(ticks))
    own.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(**{f"{which}lim": (low, high)})


def curve_panels(runs: results.Runs, active: int) -> list[figures.Curves]:
    """Loss, its two parts and the active count over the steps. An arm whose alpha is 0 has no alignment loss.

    Of many arms reconstruction loss and active count alone, a pair of panels for each family.
    """
    target = {f"K = {active}": float(active)}
    if len(runs) > MANY:
        parts = {name: {arm: runs[arm] for arm in arms} for name, arms in families(runs).items()}
        return [
            figures.Curves(f"{label}\n{name}", results.series(part, key, x="step"), lines, "step", y_scale=scale)
            for name, part in parts.items()
            for label, key, lines, scale in (
                ("reconstruction loss, as trained", "reconstruction_loss", {}, "linear"),
                ("active features", "active_mean", target, "log"),
            )
        ]
    aligned = {
        arm: by_seed
        for arm, by_seed in runs.items()
        if any(run.args["arguments"]["alpha"] for run in by_seed.values() if run.args)
    }
    titles: dict[str, tuple[str, results.Runs, dict[str, float]]] = {
        "loss": ("training loss, each in its own unit", runs, {}),
        "reconstruction_loss": ("reconstruction loss, as trained", runs, {}),
        "alignment_loss": ("alignment loss, before × α", aligned, {}),
        "active_mean": ("active features", runs, target),
    }
    panels = []
    for key, (title, shown, lines) in titles.items():
        found = results.series(shown, key, x="step")
        heights = [y for curves in found.values() for _, ys in curves for y in ys]
        scale = "log" if key == "active_mean" or is_wide(heights) else "linear"
        panels.append(figures.Curves(title, found, lines, x_label="step", y_scale=scale))
    return panels


def dot_panels(runs: results.Runs, active: int) -> list[figures.Dots]:
    """The plan's metrics and the kNN overlap, with the untrained code as hollow marks; three panels of many arms."""
    keys = ["reconstruction_loss", PRIMARY, "active_mean"]
    keys += ["active_std", "knn_overlap", "dead_fraction"] if len(runs) <= MANY else []
    return [
        figures.Dots(
            METRICS[key].title,
            {arm: list(results.values(runs, arm, key).values()) for arm in runs},
            {arm: list(results.values(runs, arm, UNTRAINED[key]).values()) for arm in runs} if key in UNTRAINED else {},
            {f"K = {active}": float(active)} if key == "active_mean" else {},
        )
        for key in keys
    ]


def plain_logs(figure: Figure, panels: Sequence[figures.Curves], arms: int) -> Figure:
    """Plain numbers on the log axes of `figures.curves`, and room for the legend of many arms."""
    figure.set_figheight(figure.get_figheight() + (0.1 * arms if arms > MANY else 0))
    for axis, panel in zip(figure.axes, panels, strict=True):
        if panel.y_scale == "log":
            log_axis(axis, "y")
    return figure


def wide_dots(figure: Figure, panels: Sequence[figures.Dots]) -> Figure:
    """Room for the titles of `figures.dots`, and log axes for active features that differ widely."""
    figure.set_figwidth(figure.get_figwidth() + 1)
    for axis, panel in zip(figure.axes, panels, strict=True):
        counts = [value for found in panel.values.values() for value in found]
        if "active" in panel.title and is_wide(counts, 4):
            axis.set_xlim(min(value for value in counts if value > 0) / 1.3, max(counts) * 1.3)
            log_axis(axis, "x")
    return figure


def framed(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of rows x columns panels, width and height of one in inches."""
    figure = Figure(figsize=(columns * width, rows * height + 1.1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def target_line(axis: Axes, active: int) -> None:
    """K as a dotted vertical line, labelled above the panel."""
    axis.axvline(active, color=figures.GREY, linewidth=1, linestyle=":", zorder=1)
    axis.annotate(
        f"K = {active}", (active, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", **figures.SMALL,
    )  # fmt: skip


def pairs(runs: results.Runs, arm: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Two metrics of an arm's seeds that have both."""
    xs, ys = results.values(runs, arm, x), results.values(runs, arm, y)
    both = sorted(xs.keys() & ys.keys())
    return [xs[seed] for seed in both], [ys[seed] for seed in both]


def frame(axis: Axes, x: str, y: str, active: int) -> None:
    """Title, axes and target line of one panel of a trade-off."""
    labels = {"active_mean": "active features a row (mean, log scale)", "bits_per_row": "bits a row (log scale)"}
    axis.set_title(METRICS[y].label, pad=18)
    axis.set(xlabel=labels[x], xscale="log")
    axis.grid(color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(0.1)
    if x == "active_mean":
        target_line(axis, active)


def tradeoff(
    runs: results.Runs, reference: str, active: int, caption: str, sign: Mapping[str, float] | None = None
) -> Figure:
    """Losses against active features, a dot a run. With the metrics of the `sign` code also what the bits are worth."""
    panels = [("active_mean", "reconstruction_loss"), ("active_mean", PRIMARY)]
    panels += [("bits_per_row", "reconstruction_loss"), ("bits_per_row", "knn_overlap")] if sign else []
    looks = figures.looks(list(runs), reference)
    marks = dict(zip(runs, ("os^Dv<>P" * len(runs)), strict=False))
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = framed(len(panels) // 2, 2, 4.6, 3.3)
        for axis, (x, y) in zip([axis for row in axes for axis in row], panels, strict=True):
            frame(axis, x, y, active)
            for arm in runs:
                axis.plot(*pairs(runs, arm, x, y), marks[arm], ms=6, alpha=0.75, mec="white", mew=0.5,
                          color=looks[arm]["color"])  # fmt: skip
            if sign and x == "bits_per_row":
                place = sign["sign_bits_per_row"], sign[f"sign_{y}"]
                axis.plot(*place, "o", ms=8, mfc="none", mec=figures.REFERENCE)
                axis.annotate("signs", place, xytext=(-8, -3), textcoords="offset points", ha="right", **figures.SMALL)
            log_axis(axis, "x")
        shown = {arm: {"color": looks[arm]["color"], "marker": marks[arm], "linestyle": ""} for arm in runs}
        if sign:
            caption = (
                f"Hollow: the sign of every channel, {sign['sign_bits_per_row']:.0f} bits a row, reconstruction loss "
                f"{sign['sign_reconstruction_loss']:.3f}, kNN overlap {sign['sign_knn_overlap']:.2f}. {caption}"
            )
        return figures.finish(figure, shown, f"A mark for each run (training seed). {caption}")


def alpha_tradeoff(runs: results.Runs, reference: str, active: int, caption: str) -> Figure:
    """Losses against active features: means over seeds, a family's joined in the order of alpha; a faint dot a run.

    The ways may lie on one another, so each alpha stands below, over its family's name and its own active count.
    """
    ways = families(runs)
    own = next((name for name, arms in ways.items() if reference in arms), "")
    looks = figures.looks(list(ways), own)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(11.2, 5.4 + 0.4 * len(ways)), layout="constrained")
        heights = [3.6, 0.42 * len(ways)]
        axes = figure.subplots(2, 2, sharex=True, height_ratios=heights).T
        for (axis, rail), y in zip(axes, ("reconstruction_loss", PRIMARY), strict=True):
            frame(axis, "active_mean", y, active)
            for row, (name, arms) in enumerate(ways.items()):
                colour = looks[name]["color"]
                found = {alpha: pairs(runs, arm, "active_mean", y) for arm, alpha in arms.items()}
                way = [(mean(xs), mean(ys), alpha) for alpha, (xs, ys) in found.items() if xs]
                for xs, ys in found.values():
                    axis.plot(xs, ys, "o", ms=4, alpha=0.35, mec="none", color=colour)
                axis.plot([x for x, _, _ in way], [loss for _, loss, _ in way], marker="o", ms=5, **looks[name])
                rail.plot([x for x, _, _ in way], [row] * len(way), "o", ms=4, color=colour)
                for place, (x, _, alpha) in enumerate(sorted(way)):
                    rail.annotate(
                        f"{alpha:.3g}", (x, row), xytext=(0, -4 if place % 2 else 4), textcoords="offset points",
                        color=colour, fontsize=8, ha="center", va="top" if place % 2 else "bottom",
                    )  # fmt: skip
            if counts := results.values(runs, reference, "active_mean"):
                axis.axvline(mean(counts.values()), color=looks[own]["color"], linewidth=0.6, zorder=1)
            log_axis(axis, "x")
            axis.tick_params(labelbottom=True)
            rail.set(yticks=[], ylim=(len(ways) - 0.4, -0.6), xlabel="α at these active features")
            rail.tick_params(axis="x", length=0, labelbottom=False)
            rail.spines[["left", "bottom"]].set_visible(False)
        text = "Joined: means over seeds in the order of α; faint: runs; below: the α of each mean. "
        return figures.finish(figure, looks, f"{text}Thin line: active features of {reference}. {caption}")


def mean_of(found: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of vectors (n,), shorter ones filled up with zeros."""
    length = max(len(one) for one in found)
    return np.mean([np.pad(one, (0, length - len(one))) for one in found], axis=0)


def count_edges(largest: int) -> np.ndarray:
    """Edges of bins for counts from 1 to `largest`: halfway between whole numbers, about a tenth of the count wide."""
    edges = [0.5]
    while edges[-1] < largest:
        edges.append(edges[-1] + max(1, round(edges[-1] * 0.1)))
    return np.array(edges)


def rows_per_doubling(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Shares of rows by active count (n,) in bins, divided by the bin's width in log2: equal areas on a log axis."""
    shares, _ = np.histogram(np.arange(len(rows)), edges, weights=rows)
    return shares / np.diff(np.log2(edges))


def activations(
    found: Mapping[str, Sequence[Activations]], reference: str, active: int, caption: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Figure:  # fmt: skip
    """Which features are on how often, and how many in a row: means over seeds. A row of panels for each group."""
    looks = figures.looks(list(found), reference)
    there = {arm: runs for arm, runs in found.items() if runs}
    features = {arm: mean_of([run.features for run in runs]) for arm, runs in there.items()}
    rows = {arm: mean_of([run.rows for run in runs]) for arm, runs in there.items()}
    smallest = min((run.features[run.features > 0].min() for runs in there.values() for run in runs), default=0.01)
    floor = min(math.floor(2 * math.log10(smallest)) / 2, -1.0)
    bins, dead = np.linspace(floor, 0, round(-4 * floor) + 1), 1.24 * floor
    seen = [active, *(int(n) for shares in rows.values() for n in np.flatnonzero(shares > 1e-4) if n)]
    edges = count_edges(max(seen))
    groups = groups or {"": list(found)}
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = framed(len(groups), 3, 3.5, 2.9)
        for (group, arms), (by_rank, by_share, by_row) in zip(groups.items(), axes, strict=True):
            shown = sorted((arm for arm in arms if arm in there), key=lambda arm: arm == reference)
            slot = -0.22 * floor / max(len(shown), 1)
            for place, arm in enumerate(shown):
                line = features[arm][: np.count_nonzero(features[arm])]
                by_rank.plot(np.arange(1, len(line) + 1), line, **looks[arm])
                shares = [
                    np.histogram(np.log10(run.features[run.features > 0]), bins)[0] / len(run.features)
                    for run in there[arm]
                ]
                by_share.stairs(np.mean(shares, axis=0), bins, linewidth=1.5, **looks[arm])
                none = mean(float((run.features == 0).mean()) for run in there[arm])
                by_share.bar(dead + (place - (len(shown) - 1) / 2) * slot, none, slot, color=looks[arm]["color"])
                by_row.stairs(rows_per_doubling(rows[arm], edges), edges, linewidth=1.5, **looks[arm])
            by_rank.set_title(group or "how often features are on", pad=18)
            by_rank.set(xlabel="feature, most used first", ylabel="share of rows", yscale="log")
            log_axis(by_rank, "y")
            by_share.set_title("" if group else "features by how often", pad=18)
            by_share.set(xlabel="share of rows (log scale)", ylabel="share of features")
            step = 1 if floor >= -4 else 2
            whole = list(range(0, math.ceil(floor) - 1, -step))  # powers of ten
            by_share.set_xticks([dead, *whole], ["dead", *(f"{10.0**power:g}" for power in whole)])
            by_share.axvline(1.08 * floor, color="#BBBBBB", linewidth=0.8)
            by_row.set_title("" if group else "rows by active features", pad=18)
            by_row.set(xlabel="active features (log scale)", ylabel="share of rows per doubling", xscale="log")
            target_line(by_row, active)
            by_row.set_xlim(max(min(seen) / 1.3, 0.5), edges[-1])
            log_axis(by_row, "x")
        text = "Means over seeds. Dead: on in no training row. "
        if empty := {arm: shares[0] for arm, shares in rows.items() if shares[0] >= 0.0005}:
            told = ", ".join(f"{arm} {100 * share:.1f} %" for arm, share in empty.items())
            text += f"Not in the right panel, rows without an active feature: {told}. "
        return figures.finish(figure, looks, text + caption)


# ------------------------------------------------------------------------------------------------- main


def draw(view: results.View) -> dict[str, Figure]:
    """The figures of a study, and notes on what had not settled or cannot be read."""
    runs, study, reference, summary = view.runs, view.study, view.reference, view.summary
    found, unread = read_activations(view.args.runs, runs)
    summary["notes"] += unsettled(runs) + unread
    active, remarks = results.first_arguments(runs)["active"], holes(summary)
    caption = view.caption + "".join(f"{arm}: {text}. " for arm, text in remarks.items())
    lines, marks, groups = curve_panels(runs, active), dot_panels(runs, active), None
    curves = figures.curves(lines, study.arms, reference, caption)
    dots = figures.dots(marks, study.arms, reference, remarks, "the untrained code", view.caption)
    if study.name == "bsa-alpha":
        summary["finding"] = " ".join([summary["finding"], *matched(runs, reference)])
        trade = alpha_tradeoff(runs, reference, active, caption)
        groups = {name: list(arms) for name, arms in families(runs).items()}
    else:
        keys = ("sign_reconstruction_loss", "sign_knn_overlap", "sign_bits_per_row")
        sign = {key: mean(values.values()) for key in keys if (values := results.values(runs, reference, key))}
        whole = study.name == "bsa-baselines" and len(sign) == len(keys)
        trade = tradeoff(runs, reference, active, caption, sign if whole else None)
    return {
        "curves": plain_logs(curves, lines, len(study.arms)),
        "metrics": wide_dots(dots, marks),
        "tradeoff": trade,
        "activations": activations(found, reference, active, caption, groups),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw)


if __name__ == "__main__":
    main()
