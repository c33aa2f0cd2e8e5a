"""Draw the figures and write the tables and the finding of one BSA study.

    python bsa/plot.py bsa-alignment-loss --scale demo --seeds 0 1 2

Reads metrics.json, train.jsonl and activations.json of the runs. Missing runs are left out and listed in the
notes. Nothing is computed here except the loss at equal activity (`loss_at_activity`), for the study bsa-alpha.
"""

import itertools
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

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.studies import METRICS, design
from common.files import read_json
from common.study import figures, plotting, results, statistics, tables

PRIMARY_METRIC = "fixed_topk_reconstruction_loss"
BASELINE_METRICS = {PRIMARY_METRIC: "untrained_fixed_topk_reconstruction_loss"}
MANY_ARMS = 8  # with more arms a figure has fewer panels, or one row of panels per family
FAMILIES = {  # (alignment, reconstruction): name of the family of arms that differ only in alpha
    ("cosine", "cosine"): "cosine alignment",
    ("mse", "cosine"): "mse alignment",
    ("mse", "mse"): "mse alignment and reconstruction",
    ("cosine", "mse"): "mse reconstruction",
    ("l1", "cosine"): "l1",
    ("l1", "mse"): "l1, mse reconstruction",
}


class Point(NamedTuple):
    """Mean number of active features per row, and reconstruction loss, of one run."""

    active: float
    loss: float


class Activations(NamedTuple):
    """Activation statistics of one run.

    features: share of rows in which each feature is active, (N,), in descending order.
    rows: share of rows with 0, 1, 2 ... active features, (n,).
    """

    features: np.ndarray
    rows: np.ndarray


# ------------------------------------------------------------------------------------------------- text


def describe(runs: results.Runs) -> str:
    """Return a description of the data, and of the settings that all arms share; "" without any run."""
    first = results.first_arguments(runs)
    if not first:
        return ""
    names = {"planted": "planted concepts", "mesh": "MeSH terms embedded by MiniLM", "file": "user-provided embeddings"}
    data = names.get(first["data_set"], first["data_set"])
    texts = {"latent": "N = {}", "active": "K = {}", "steps": "{} steps", "batch": "batch {}"}
    arms = results.arm_arguments(runs).values()
    shared = [text.format(first[key]) for key, text in texts.items() if len({arm[key] for arm in arms}) == 1]
    return ", ".join([data, *shared])


def incomplete_arms(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of diverged and missing seeds as text, for each arm that has any."""
    remarks = {}
    for row in summary["rows"]:
        parts = [f"{len(row[problem])} {problem}" for problem in ("diverged", "missing") if row[problem]]
        if parts:
            remarks[row["arm"]] = ", ".join(parts)
    return remarks


def not_converged_notes(runs: results.Runs) -> list[str]:
    """Return a sentence for each arm with runs not converged. The mean of `settled_step` excludes these runs."""
    notes = []
    for arm, by_seed in runs.items():
        finished = {s: run.metrics for s, run in by_seed.items() if run.metrics and not run.metrics.get("diverged")}
        steps = {seed: metrics["settled_step"] for seed, metrics in finished.items() if "settled_step" in metrics}
        seeds = [seed for seed, step in steps.items() if step is None]
        if seeds:
            notes.append(
                f"{arm}: {len(seeds)} of {len(steps)} runs not converged: loss or active count changed by 1 % or more "
                f"over the last 20 % of training (seed {', '.join(map(str, seeds))})."
            )
    return notes


def family(arguments: Mapping[str, Any]) -> str:
    """Return the name of a run's settings without alpha. It depends on its arguments only, not on the arm's name."""
    if arguments["code"] != "round":
        return f"{arguments['code']} code"
    alignment, reconstruction = arguments["alignment"], arguments["reconstruction"]
    name = FAMILIES.get((alignment, reconstruction), f"{alignment} alignment, {reconstruction} reconstruction")
    defaults = {"init": "sparse", "target": "binary", "mse_reduction": "mean"}
    changed = [key for key, default in defaults.items() if arguments[key] != default]
    others = [f"{arguments[key]} {key.split('_')[-1]}" for key in changed]
    return ", ".join([name, *others])


def families(runs: results.Runs) -> dict[str, dict[str, float]]:
    """Return the alpha of each arm, grouped by family and in ascending order. Arms without a run are left out."""
    groups: dict[str, dict[str, float]] = {}
    for arm, arguments in results.arm_arguments(runs).items():
        groups.setdefault(family(arguments), {})[arm] = float(arguments["alpha"])
    return {name: dict(sorted(alphas.items(), key=lambda item: item[1])) for name, alphas in groups.items()}


def interpolate(points: Sequence[Point | None], active: float) -> float | None:
    """Return the loss at `active` features, linear in log(active) between neighbouring points.

    `points` are in the order of alpha. None is a missing run; nothing is interpolated across it. If several pairs of
    neighbours enclose `active`, the lowest loss is returned, because alpha is a free choice. None if no pair does.
    """
    losses = []
    neighbours = zip(points, [*points[1:], *points[-1:]], strict=True)  # the last point also forms a pair with itself
    for point, neighbour in neighbours:
        if point is None or neighbour is None or min(point.active, neighbour.active) <= 0:
            continue
        low, high = sorted((point, neighbour))
        if low.active <= active <= high.active:
            width = math.log(high.active / low.active)
            share = math.log(active / low.active) / width if width else 0.0
            losses.append(low.loss + share * (high.loss - low.loss))
    return min(losses, default=None)


def loss_at_activity(runs: results.Runs, arms: Sequence[str], active: float) -> dict[int, float | None]:
    """Return for each seed the reconstruction loss at `active` features, interpolated between arms.

    `arms` are in the order of alpha. The loss is None if `active` is outside their range. Seeds without any run of
    these arms are left out.
    """
    counts = [results.values(runs, arm, "active_mean") for arm in arms]
    losses = [results.values(runs, arm, "reconstruction_loss") for arm in arms]
    result = {}
    for seed in sorted({seed for by_seed in counts for seed in by_seed}):
        points = [
            Point(count[seed], loss[seed]) if seed in count and seed in loss else None
            for count, loss in zip(counts, losses, strict=True)
        ]
        result[seed] = interpolate(points, active)
    return result


def matched_activity_finding(runs: results.Runs, reference: str) -> list[str]:
    """Return a sentence: each family's loss at the mean active count of the reference, and its difference to it.

    The list is empty if the reference has no run. The loss of the reference itself is measured, not interpolated:
    where the active count hardly depends on alpha, an interpolated loss would be arbitrary.
    """
    groups, metric = families(runs), vars(METRICS["reconstruction_loss"])
    reference_family = next((name for name, alphas in groups.items() if reference in alphas), None)
    counts = list(results.values(runs, reference, "active_mean").values())
    if reference_family is None or not counts:
        return []
    active = mean(counts)
    reference_losses = results.values(runs, reference, "reconstruction_loss")
    parts = []
    for name in sorted(groups, key=lambda name: name != reference_family):  # the reference's family comes first
        by_seed = loss_at_activity(runs, list(groups[name]), active)
        losses = reference_losses
        if name != reference_family:
            losses = {seed: loss for seed, loss in by_seed.items() if loss is not None}
        if not losses:
            parts.append(f"{name}: outside its range")
            continue
        summary = statistics.mean_interval(list(losses.values()))
        details = [f"95 % interval {tables.format_interval(vars(summary), metric)}"] if summary.low is not None else []
        outside = len(by_seed) - summary.n if name != reference_family else 0
        details.append(f"n = {summary.n}" + (f", {outside} more outside its range" if outside else ""))
        seeds = sorted(losses.keys() & reference_losses.keys())
        if name != reference_family and seeds:
            difference = statistics.paired([losses[seed] for seed in seeds], [reference_losses[seed] for seed in seeds])
            bounds = "" if difference.low is None else f", {tables.format_interval(vars(difference), metric)}"
            details.append(f"minus {reference} {tables.format_number(difference.mean, metric)}{bounds}")
        label = reference if name == reference_family else name
        parts.append(f"{label}: {tables.format_number(summary.mean, metric)} ({'; '.join(details)})")
    return [
        f"Reconstruction loss at the {active:.1f} active features of {reference} (descriptive; other families are "
        f"interpolated in log(active) between neighbouring alphas): {'; '.join(parts)}."
    ]


def read_activations(folder: Path, runs: results.Runs) -> tuple[dict[str, list[Activations]], list[str]]:
    """Return the activations of the finished seeds of each arm, and a sentence for each file that cannot be read."""
    by_arm: dict[str, list[Activations]] = {arm: [] for arm in runs}
    notes = []
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            if not run.metrics or run.metrics.get("diverged"):
                continue
            try:
                content = read_json(folder / arm / str(seed) / "activations.json")
                features = np.array(content["feature_shares"], float)
                rows = np.array(content["rows_by_active_count"], float)
                if any(values.ndim != 1 or not values.sum() > 0 for values in (features, rows)):
                    raise ValueError
                by_arm[arm].append(Activations(features, rows / rows.sum()))
            except (ValueError, TypeError, KeyError, OSError):
                notes.append(f"{arm}, seed {seed}: activations.json is missing or cannot be read; not in that figure.")
    return by_arm, notes


# ------------------------------------------------------------------------------------------------- axes


def needs_log_axis(values: Sequence[float], ratio: float = 10) -> bool:
    """Return whether the largest positive value is more than `ratio` times the smallest positive one."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > ratio * min(positive)


def set_log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, over at least a factor of 2.5, with plain numbers as tick labels."""
    axes.set(**{f"{which}scale": "log"})
    low, high = getattr(axes, f"get_{which}lim")()
    if high < 2.5 * low:
        low, high = (math.sqrt(low * high * ratio) for ratio in (1 / 2.5, 2.5))
    # The wider the range, the fewer ticks per decade.
    decades = math.log10(high / low)
    if decades < 0.8:
        steps = [1, 1.5, 2, 3, 4, 5, 6, 8]
    elif decades < 1.3:
        steps = [1, 2, 3, 5]
    elif decades < 2.6:
        steps = [1, 3]
    else:
        steps = [1]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    axis = getattr(axes, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(**{f"{which}lim": (low, high)})


def mark_target(axes: Axes, active: int) -> None:
    """Draw K as a dotted vertical line, labelled above the panel."""
    figures.reference_lines(axes, {f"K = {active}": active}, vertical=True)


def panel_grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure of rows x columns panels, each `width` x `height` inches."""
    figure = Figure(figsize=(columns * width, rows * height + 1.1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


# ------------------------------------------------------------------------------------------------- curves and dots


def curve_panels(runs: results.Runs, active: int, data_set: str) -> list[figures.Curves]:
    """Return panels of training loss, reconstruction loss, alignment loss and active count over the steps.

    Arms with alpha 0 have no alignment loss. With many arms there are only two panels per family: reconstruction loss
    and active count.
    """
    target = {f"K = {active}": float(active)}
    panels = []
    if len(runs) > MANY_ARMS:
        for name, alphas in families(runs).items():
            members = {arm: runs[arm] for arm in alphas}
            losses = results.series(members, "reconstruction_loss", x="step")
            counts = results.series(members, "active_mean", x="step")
            panels.append(figures.Curves(f"reconstruction loss, as trained, {data_set}\n{name}", losses, {}, "step"))
            panels.append(figures.Curves(f"active features, {data_set}\n{name}", counts, target, "step", y_scale="log"))
        return panels
    aligned = {
        arm: by_seed
        for arm, by_seed in runs.items()
        if any(run.args["arguments"]["alpha"] for run in by_seed.values() if run.args)
    }
    contents: dict[str, tuple[str, results.Runs, dict[str, float]]] = {
        "loss": ("training loss", runs, {}),
        "reconstruction_loss": ("reconstruction loss, as trained", runs, {}),
        "alignment_loss": ("alignment loss, before × α", aligned, {}),
        "active_mean": ("active features", runs, target),
    }
    for key, (title, shown, lines) in contents.items():
        series = results.series(shown, key, x="step")
        values = [y for curves in series.values() for _, ys in curves for y in ys]
        scale = "log" if key == "active_mean" or needs_log_axis(values) else "linear"
        panels.append(figures.Curves(f"{title}, {data_set}", series, lines, x_label="step", y_scale=scale))
    return panels


def dot_panels(runs: results.Runs, active: int, data_set: str) -> list[figures.Dots]:
    """Return panels of the main metrics and the kNN overlap, three panels if there are many arms.

    Hollow marks show the untrained code.
    """
    keys = ["reconstruction_loss", PRIMARY_METRIC, "active_mean"]
    if len(runs) <= MANY_ARMS:
        keys += ["active_std", "knn_overlap", "dead_fraction"]
    return [
        figures.Dots(
            f"{METRICS[key].title}, {data_set}",
            results.values_by_arm(runs, key),
            results.values_by_arm(runs, BASELINE_METRICS[key]) if key in BASELINE_METRICS else {},
            {f"K = {active}": float(active)} if key == "active_mean" else {},
        )
        for key in keys
    ]


def format_curves(drawing: figures.Drawing, panels: Sequence[figures.Curves], arms: int) -> figures.Drawing:
    """Set plain numbers on the log axes of a figure of `figures.curves`, and make room for the legend of many arms."""
    if arms > MANY_ARMS:
        drawing.figure.set_figheight(drawing.figure.get_figheight() + 0.1 * arms)
    for axes, panel in zip(drawing.figure.axes, panels, strict=True):
        if panel.y_scale == "log":
            set_log_axis(axes, "y")
    return drawing


def format_dots(drawing: figures.Drawing, panels: Sequence[figures.Dots]) -> figures.Drawing:
    """Widen a figure of `figures.dots` for its titles, and set log axes for active counts that differ widely."""
    drawing.figure.set_figwidth(drawing.figure.get_figwidth() + 1)
    for axes, panel in zip(drawing.figure.axes, panels, strict=True):
        counts = [value for by_seed in panel.values.values() for value in by_seed]
        if "active" in panel.title and needs_log_axis(counts, 4):
            axes.set_xlim(min(value for value in counts if value > 0) / 1.3, max(counts) * 1.3)
            set_log_axis(axes, "x")
    return drawing


# ------------------------------------------------------------------------------------------------- trade-offs


def metric_pairs(runs: results.Runs, arm: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the values of two metrics for the seeds of an arm that have both."""
    xs, ys = results.values(runs, arm, x), results.values(runs, arm, y)
    both = sorted(xs.keys() & ys.keys())
    return [xs[seed] for seed in both], [ys[seed] for seed in both]


def format_tradeoff(axes: Axes, x: str, y: str, active: int) -> None:
    """Set title, labels, grid and target line of one trade-off panel."""
    labels = {"active_mean": "active features per row (mean, log scale)", "bits_per_row": "bits per row (log scale)"}
    axes.set_title(METRICS[y].label)
    axes.set(xlabel=labels[x], xscale="log")
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.1)
    if x == "active_mean":
        mark_target(axes, active)


def tradeoff_figure(
    runs: results.Runs,
    styles: Mapping[str, figures.Style],
    active: int,
    caption: str,
    sign: Mapping[str, float] | None = None,
) -> figures.Drawing:
    """Return a scatter plot of losses against active features, one mark per run.

    `sign`: metrics of the sign code. If given, two panels against bits per row are added, with the sign code as a
    hollow mark.
    """
    panels = [("active_mean", "reconstruction_loss"), ("active_mean", PRIMARY_METRIC)]
    if sign:
        panels += [("bits_per_row", "reconstruction_loss"), ("bits_per_row", "knn_overlap")]
        caption = (
            f"Hollow: the sign code (sign of every channel), {sign['sign_bits_per_row']:.0f} bits per row, "
            f"reconstruction loss {sign['sign_reconstruction_loss']:.3f}, "
            f"kNN overlap {sign['sign_knn_overlap']:.2f}. {caption}"
        )
    markers = dict(zip(runs, "os^Dv<>P" * len(runs), strict=False))
    with matplotlib.rc_context(figures.STYLE):
        figure, rows = panel_grid(len(panels) // 2, 2, 4.6, 3.3)
        for axes, (x, y) in zip([axes for row in rows for axes in row], panels, strict=True):
            format_tradeoff(axes, x, y, active)
            for arm in runs:
                xs, ys = metric_pairs(runs, arm, x, y)
                colour = styles[arm]["color"]
                axes.plot(xs, ys, markers[arm], ms=6, alpha=0.75, mec="white", mew=0.5, color=colour)
            if sign and x == "bits_per_row":
                point = sign["sign_bits_per_row"], sign[f"sign_{y}"]
                axes.plot(*point, "o", ms=8, mfc="none", mec=figures.BASE)
                axes.annotate(
                    "sign code", point, xytext=(-8, -3), textcoords="offset points", ha="right", **figures.SMALL
                )
            set_log_axis(axes, "x")
        legend = {arm: {"color": styles[arm]["color"], "marker": markers[arm], "linestyle": ""} for arm in runs}
        return figures.add_legend(figure, legend, f"One mark per run (training seed). {caption}")


def near_alphas(alphas: Mapping[float, float]) -> list[tuple[float, str]]:
    """Return (active features, label) for each group of alphas whose active features differ by less than 12 %.

    alphas: the mean active features at each alpha. A label lists the alphas of its group in ascending order.
    """
    groups: list[list[float]] = []
    for alpha in sorted(alphas, key=lambda alpha: alphas[alpha]):
        if groups and alphas[alpha] < 1.12 * alphas[groups[-1][-1]]:
            groups[-1].append(alpha)
        else:
            groups.append([alpha])
    return [(mean(alphas[alpha] for alpha in group), ", ".join(f"{x:.3g}" for x in sorted(group))) for group in groups]


def alpha_figure(runs: results.Runs, reference: str, active: int, caption: str) -> figures.Drawing:
    """Return a figure of losses against active features; lines join the arms of a family in the order of alpha.

    Joined marks are means over seeds; faint dots are runs. The curves may overlap, so a second row of panels shows for
    each family the active count at each alpha. The family of `reference` is black.
    """
    groups = families(runs)
    reference_family = next((name for name, alphas in groups.items() if reference in alphas), "")
    others = [name for name in groups if name != reference_family]
    colours = {reference_family: figures.BASE} | dict(zip(others, itertools.cycle(figures.COLOURS), strict=False))
    styles = {name: {"color": colours[name], "linestyle": "-"} for name in groups}
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(11.2, 5.4 + 0.4 * len(groups)), layout="constrained")
        columns = figure.subplots(2, 2, sharex=True, height_ratios=[3.6, 0.42 * len(groups)]).T
        for (axes, alpha_axes), y in zip(columns, ("reconstruction_loss", PRIMARY_METRIC), strict=True):
            format_tradeoff(axes, "active_mean", y, active)
            for row, (name, alphas) in enumerate(groups.items()):
                colour = styles[name]["color"]
                means = {}
                for arm, alpha in alphas.items():
                    xs, ys = metric_pairs(runs, arm, "active_mean", y)
                    axes.plot(xs, ys, "o", ms=4, alpha=0.35, mec="none", color=colour)
                    if xs:
                        means[alpha] = mean(xs), mean(ys)
                axes.plot(*zip(*means.values(), strict=True), marker="o", ms=5, **styles[name])
                counts = {alpha: x for alpha, (x, _) in means.items()}
                alpha_axes.plot(list(counts.values()), [row] * len(counts), "o", ms=4, color=colour)
                for index, (x, label) in enumerate(near_alphas(counts)):
                    # Labels alternate above and below, so that neighbours do not overlap.
                    offset, anchor = (-4, "top") if index % 2 else (4, "bottom")
                    alpha_axes.annotate(
                        label, (x, row), xytext=(0, offset), textcoords="offset points", color=colour,
                        fontsize=8, ha="center", va=anchor,
                    )  # fmt: skip
            if of_reference := results.values(runs, reference, "active_mean"):
                axes.axvline(
                    mean(of_reference.values()), color=styles[reference_family]["color"], linewidth=0.6, zorder=1
                )
            set_log_axis(axes, "x")
            axes.tick_params(labelbottom=True)
            alpha_axes.set(yticks=[], ylim=(len(groups) - 0.4, -0.6), xlabel="α at these active features")
            alpha_axes.tick_params(axis="x", length=0, labelbottom=False)
            alpha_axes.spines[["left", "bottom"]].set_visible(False)
        text = "Joined marks: means over seeds, in the order of α. Faint: runs. Below: the α of each mean. "
        return figures.add_legend(figure, styles, f"{text}Thin line: active features of {reference}. {caption}")


# ------------------------------------------------------------------------------------------------- activations


def padded_mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of vectors (n,); shorter ones are padded with zeros at the end."""
    length = max(len(vector) for vector in vectors)
    return np.mean([np.pad(vector, (0, length - len(vector))) for vector in vectors], axis=0)


def count_bin_edges(largest: int) -> np.ndarray:
    """Return bin edges for counts from 1 to `largest`.

    Edges lie halfway between integers. A bin is about as wide as a tenth of its count, and at least 1.
    """
    edges = [0.5]
    while edges[-1] < largest:
        edges.append(edges[-1] + max(1, round(edges[-1] * 0.1)))
    return np.array(edges)


def rows_per_doubling(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of rows in each bin of the active count, divided by the bin's width in log2.

    `rows` (n,) is the share of rows by active count. On a log axis equal areas are equal shares.
    """
    shares, _ = np.histogram(np.arange(len(rows)), edges, weights=rows)
    return shares / np.diff(np.log2(edges))


def activation_figure(
    by_arm: Mapping[str, Sequence[Activations]],
    styles: Mapping[str, figures.Style],
    active: int,
    caption: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> figures.Drawing:
    """Return the distributions of feature frequencies and of active counts, means over seeds.

    The three panels are: frequency by rank, histogram of frequencies with a separate bar for dead features, and rows by
    active count. `groups`: arms of each row of panels, by the row's title; default: all arms in one row.
    """
    by_arm = {arm: seeds for arm, seeds in by_arm.items() if seeds}
    features = {arm: padded_mean([run.features for run in seeds]) for arm, seeds in by_arm.items()}
    rows = {arm: padded_mean([run.rows for run in seeds]) for arm, seeds in by_arm.items()}
    smallest = min((run.features[run.features > 0].min() for seeds in by_arm.values() for run in seeds), default=0.01)
    floor = min(math.floor(2 * math.log10(smallest)) / 2, -1.0)  # left end of the axis of log10(frequency)
    bins = np.linspace(floor, 0, round(-4 * floor) + 1)
    dead = 1.24 * floor  # dead features have no logarithm: their bar is left of the axis
    counts = [active, *(int(n) for shares in rows.values() for n in np.flatnonzero(shares > 1e-4) if n)]
    edges = count_bin_edges(max(counts))
    groups = groups or {"": list(styles)}
    with matplotlib.rc_context(figures.STYLE):
        figure, panels = panel_grid(len(groups), 3, 3.5, 2.9)
        for (group, arms), (by_rank, by_frequency, by_count) in zip(groups.items(), panels, strict=True):
            shown = [arm for arm in arms if arm in by_arm]
            shown.sort(key=lambda arm: styles[arm]["color"] == figures.BASE)  # base on top
            bar_width = -0.22 * floor / max(len(shown), 1)
            for index, arm in enumerate(shown):
                alive = features[arm][: np.count_nonzero(features[arm])]
                by_rank.plot(np.arange(1, len(alive) + 1), alive, **styles[arm])
                shares = [
                    np.histogram(np.log10(run.features[run.features > 0]), bins)[0] / len(run.features)
                    for run in by_arm[arm]
                ]
                by_frequency.stairs(np.mean(shares, axis=0), bins, linewidth=1.5, **styles[arm])
                dead_share = mean(float((run.features == 0).mean()) for run in by_arm[arm])
                x = dead + (index - (len(shown) - 1) / 2) * bar_width
                by_frequency.bar(x, dead_share, bar_width, color=styles[arm]["color"])
                by_count.stairs(rows_per_doubling(rows[arm], edges), edges, linewidth=1.5, **styles[arm])
            by_rank.set_title(group or "feature frequency by rank")
            by_rank.set(xlabel="rank of the feature", ylabel="share of rows", yscale="log")
            set_log_axis(by_rank, "y")
            by_frequency.set_title("" if group else "histogram of feature frequencies")
            by_frequency.set(xlabel="share of rows (log scale)", ylabel="share of features")
            powers = list(range(0, math.ceil(floor) - 1, -1 if floor >= -4 else -2))
            by_frequency.set_xticks([dead, *powers], ["dead", *(f"{10.0**power:g}" for power in powers)])
            by_frequency.axvline(1.08 * floor, color="#BBBBBB", linewidth=0.8)
            by_count.set_title("" if group else "rows by active features")
            by_count.set(xlabel="active features (log scale)", ylabel="share of rows per doubling", xscale="log")
            mark_target(by_count, active)
            by_count.set_xlim(max(min(counts) / 1.3, 0.5), edges[-1])
            set_log_axis(by_count, "x")
        text = "Means over seeds. Dead: active in no training row. "
        empty = [f"{arm} {100 * shares[0]:.1f} %" for arm, shares in rows.items() if shares[0] >= 0.0005]
        if empty:
            text += f"Rows without an active feature are not in the right panel: {', '.join(empty)}. "
        return figures.add_legend(figure, styles, text + caption)


# ------------------------------------------------------------------------------------------------- main


def overlap_remark(summary: dict[str, Any]) -> str:
    """Return the kNN overlap of the primary contrasts, so that no distance is judged only by its own loss."""
    key = "fixed_topk_knn_overlap"
    metric, parts = summary["metrics"].get(key), []
    primary = [contrast["arm"] for contrast in tables.primary_contrasts(summary)]
    for contrast in summary["all_contrasts"]:
        if contrast["metric"] == key and contrast["arm"] in primary and contrast["mean"] is not None:
            means = [tables.format_number(contrast[side], metric) for side in ("reference_mean", "arm_mean")]
            parts.append(f"{contrast['arm']} {' -> '.join(means)} ({contrast['verdict']})")
    return f"Descriptive: kNN overlap with exactly K features: {'; '.join(parts)}." if parts else ""


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study. Adds notes on runs not converged and on unreadable files to the summary."""
    runs, study, reference, summary = view.runs, view.study, view.reference, view.summary
    by_arm, unread = read_activations(view.folder, runs)
    summary["notes"] += not_converged_notes(runs) + unread
    if study.name == "bsa-distance":
        summary["remark"] = overlap_remark(summary)
    arguments = results.first_arguments(runs)
    active, data_set = arguments["active"], arguments["data_set"]
    styles = {arm: view.styles[arm] for arm in study.arms}
    remarks = incomplete_arms(summary)
    caption = view.caption + "".join(f"{arm}: {text}. " for arm, text in remarks.items())
    lines, dots, groups = curve_panels(runs, active, data_set), dot_panels(runs, active, data_set), None
    curve_figure = figures.curves(lines, styles, view.highlight, caption)
    dot_figure = figures.dots(dots, styles, remarks, "the untrained code", view.caption)
    if study.name == "bsa-alpha":
        summary["finding"] += matched_activity_finding(runs, reference)
        tradeoff = alpha_figure(runs, reference, active, caption)
        groups = {name: list(alphas) for name, alphas in families(runs).items()}
    else:
        keys = ("sign_reconstruction_loss", "sign_knn_overlap", "sign_bits_per_row")
        sign = {key: mean(values.values()) for key in keys if (values := results.values(runs, reference, key))}
        shows_sign = study.name == "bsa-baselines" and len(sign) == len(keys)
        tradeoff = tradeoff_figure(runs, styles, active, caption, sign if shows_sign else None)
    return {
        "curves": format_curves(curve_figure, lines, len(study.arms)),
        "metrics": format_dots(dot_figure, dots),
        "tradeoff": tradeoff,
        "activations": activation_figure(by_arm, styles, active, caption, groups),
        "summary": figures.summary_slide(summary, dots[1], styles, hollow="the untrained code"),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.main(argv, __doc__, design, describe, draw)


if __name__ == "__main__":
    main()
