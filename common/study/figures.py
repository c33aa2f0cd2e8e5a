"""Figures in one style: differences, training curves, values per seed, and a slide. Uses matplotlib without pyplot.

An arm has one colour in all figures of its paper, and `base` is black. The palette is Okabe and Ito's, which is safe
for colour-blind readers. Dash patterns distinguish the arms in black-and-white prints. Captions are never drawn: a
function that makes a figure returns a Drawing, the figure with the text of its caption.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, ScaledTranslation
from PIL import Image

from common.files import write_bytes
from common.study.names import contrast_name, have_one_setting, setting_of, short_names, without_setting
from common.study.results import Curve
from common.study.statistics import mean_interval
from common.study.tables import NO_VERDICT, VERDICT_COLOURS

BASE, GREY = "#000000", "#777777"
SMALL: Any = {"fontsize": "small", "color": "#555555"}
# Vermilion and green come last, because they also mean worse and better.
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#8C6D31", "#D55E00", "#009E73")
DASHES: tuple[Any, ...] = ((0, (6, 1.5)), (0, (3, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-")
HIGHLIGHTED = 3  # the other curves of a panel are faint
SLIDE_CONTRASTS = 5
STYLE: Any = {  # Any, because matplotlib types every key of rcParams
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "figure.dpi": 200,
    "svg.fonttype": "none",  # keeps text searchable
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "figures",
}
SLIDE: Any = STYLE | {"font.size": 17, "axes.titlesize": 16, "lines.linewidth": 2.8, "figure.dpi": 120}
Style = Mapping[str, Any]  # colour and line style, as matplotlib keywords


class Drawing(NamedTuple):
    """A figure and its caption. The caption is shown as text beside the figure, never in its pixels."""

    figure: Figure
    caption: str


class Curves(NamedTuple):
    """One panel of `curves`. `values`: for each arm the (x, y) of every seed. `lines`: label -> y of a dotted line."""

    title: str
    values: Mapping[str, Sequence[Curve]]
    lines: Mapping[str, float] = {}
    x_label: str = "epoch"
    x_scale: str = "linear"
    y_scale: str = "linear"


class Dots(NamedTuple):
    """One panel of `dots`. `values`: for each arm one value per seed. `lines`: label -> x of a dotted line.

    `hollow`: for each arm the values whose mean is drawn as a hollow marker.
    """

    title: str
    values: Mapping[str, Sequence[float]]
    hollow: Mapping[str, Sequence[float]] = {}
    lines: Mapping[str, float] = {}
    limits: tuple[float, float] = (-math.inf, math.inf)  # range of possible values; the x axis never exceeds it


# ------------------------------------------------------------------------------------------------- style


def arm_styles(arms: Sequence[str], studies: Sequence[Collection[str]]) -> dict[str, dict[str, Any]]:
    """Return the style of every arm of a paper, by its name with and without "@setting".

    `base` is black. The others take, in the order of `arms`, the style that the arms of their `studies` use least.
    """
    together = [{without_setting(arm) for arm in study} for study in studies]
    numbers: dict[str, int] = {}
    for name in dict.fromkeys(map(without_setting, arms)):
        neighbours = [numbers[other] for study in together if name in study for other in study if other in numbers]

        def use(number: int, used: Sequence[int] = neighbours) -> tuple[int, int, int]:
            same_colour = sum(number % len(COLOURS) == other % len(COLOURS) for other in used)
            return used.count(number), same_colour, number

        if name != "base":
            numbers[name] = min(range(len(COLOURS) * len(DASHES)), key=use)
    styles = {"base": {"color": BASE, "linestyle": "-"}}
    for name, number in numbers.items():
        styles[name] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
    return styles | {arm: styles[without_setting(arm)] for arm in arms}


def verdict_colour(verdict: str) -> str:
    """Return the colour of a verdict. Any other text is light grey."""
    return VERDICT_COLOURS.get(verdict, NO_VERDICT)


def minimum_span(title: str) -> float:
    """Return the least span of an axis, so that noise does not look like an effect; 0 for an unknown quantity."""
    if "%" in title:
        return 5.0
    return 0.1 if any(word in title for word in ("R²", "cosine", "top-1", "overlap", "std of z", "entropy")) else 0.0


def widen(axis: Axes, which: str, title: str, limits: tuple[float, float] = (-math.inf, math.inf)) -> None:
    """Clip the "x" or "y" axis to the possible values, and widen it to the least span of its quantity."""
    low, high = getattr(axis, f"get_{which}lim")()
    low, high = max(low, limits[0]), min(high, limits[1])
    missing = minimum_span(title) - (high - low)
    if missing > 0 and getattr(axis, f"get_{which}scale")() == "linear":
        low, high = low - missing / 2, high + missing / 2
        shift = max(0.0, limits[0] - low) - max(0.0, high - limits[1])
        low, high = low + shift, high + shift
    getattr(axis, f"set_{which}lim")(max(low, limits[0]), min(high, limits[1]))


def columns_of(count: int) -> int:
    """Return the number of columns of a figure with `count` panels: one row of up to three panels, else two columns."""
    return count if count <= 3 else 2


def grid(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its `count` axes, in the columns of `columns_of`.

    `width` and `height` are those of one panel in inches (mean over the rows). `options` go to `Figure.subplots`.
    """
    columns = columns_of(count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, columns * width), rows * height + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def integer_x_ticks(drawing: Drawing) -> Drawing:
    """Restrict the ticks of all x axes to integers, for runs of few epochs. Return the drawing."""
    for axis in drawing.figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return drawing


# ------------------------------------------------------------------------------------------------- labels


def reference_lines(axis: Axes, lines: Mapping[str, float], vertical: bool) -> None:
    """Draw dotted lines, labelled outside the data area: at the top if vertical, else on the right.

    `separate_labels` moves labels that overlap.
    """
    style: Any = {"color": GREY, "linewidth": 1, "linestyle": ":", "zorder": 1}
    for label, level in lines.items():
        if vertical:
            axis.axvline(level, **style)
            position: Any = {"xy": (level, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3)}
            position |= {"va": "bottom", "ha": "center"}
        else:
            axis.axhline(level, **style)
            position = {"xy": (1, level), "xycoords": ("axes fraction", "data"), "xytext": (3, 0), "va": "center"}
        text = axis.annotate(label, textcoords="offset points", **position, **SMALL)
        text.set_label("line above" if vertical else "line beside")


def separate_labels(figure: Figure) -> None:
    """Break titles to the width of their panels, and move labels of `reference_lines` up until none overlap."""
    lay_out(figure)
    broken = False
    for axis in figure.axes:
        left = axis.get_window_extent().x0
        starts = [other.get_window_extent().x0 for other in figure.axes]  # a title may end where the next panel starts
        right = min([start for start in starts if start > left + 1], default=figure.bbox.width)
        width = right - left - 0.1 * figure.dpi
        lines = axis.get_title("left").split("\n")
        title = axis._left_title  # type: ignore[attr-defined]  # has no public name
        title_width = title.get_window_extent().width
        if title_width > width:
            characters = max(12, int(max(map(len, lines)) * width / title_width))
            title.set_text("\n".join(textwrap.fill(line, characters) for line in lines))
            broken = True
    if broken:
        lay_out(figure)
    points = 72 / figure.dpi
    for axis in figure.axes:
        beside = sorted(line_labels(axis, "beside"), key=_bottom)
        for lower, upper in itertools.pairwise(beside):
            overlap = _top(lower) - _bottom(upper)
            if overlap > 0:
                upper.xyann = (upper.xyann[0], upper.xyann[1] + overlap * points)
        placed: list[Any] = []
        for text in line_labels(axis, "above"):
            while any(Bbox.intersection(text.get_window_extent().padded(4), other) for other in placed):
                text.xyann = (text.xyann[0], text.xyann[1] + 2)
            placed.append(text.get_window_extent())
        if placed:
            height = max(box.y1 for box in placed) - axis.get_window_extent().y1
            axis.set_title(axis.get_title("left"), pad=height * points + 4)


def lay_out(figure: Figure) -> None:
    """Compute the positions of the panels. It takes half the time of a drawing, which does the same."""
    engine = figure.get_layout_engine()
    if engine:
        engine.execute(figure)


def line_labels(axis: Axes, place: str) -> list[Annotation]:
    """Return the labels of `reference_lines` "above" or "beside" a panel."""
    return [text for text in axis.texts if isinstance(text, Annotation) and text.get_label() == f"line {place}"]


def _bottom(text: Any) -> float:
    """Return the lower edge of a text in pixels."""
    return float(text.get_window_extent().y0)


def _top(text: Any) -> float:
    """Return the upper edge of a text in pixels."""
    return float(text.get_window_extent().y1)


def add_legend(figure: Figure, styles: Mapping[str, Style], caption: str, faint: Collection[str] = ()) -> Drawing:
    """Add a legend above the panels, in as many columns as fit, and separate labels. Return figure and caption.

    The handles of `faint` arms are faint, their names have the arm's colour.
    """
    handles = [Line2D([], [], label=name, alpha=0.4 if name in faint else 1, **styles[name]) for name in styles]
    widths = [6.5 * len(name) + 50 for name in styles]  # approximate width of each legend entry in points
    available = figure.get_figwidth() * 72
    columns = max(1, int(available / max(widths))) if sum(widths) > available else len(styles)
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)
    for text in legend.get_texts():
        if text.get_text() in faint:
            text.set_color(styles[text.get_text()]["color"])
    separate_labels(figure)
    return Drawing(figure, caption.strip())


# ------------------------------------------------------------------------------------------------- curves


def curves(
    panels: Sequence[Curves], styles: Mapping[str, Style], highlight: Sequence[str] = (), caption: str = ""
) -> Drawing:
    """Return training curves: the mean over seeds, and a band from the lowest to the highest seed or a line per seed.

    `styles` has the arms; the legend begins with `highlight`. A panel with more than three arms highlights the first
    three of `highlight` and draws the others faintly. A seed whose curve is shorter than the longest of its arm is a
    thin line and never averaged.
    """
    with matplotlib.rc_context(STYLE):
        width = 3.9 if len(panels) > 1 else 6.0
        figure, axes = grid(len(panels), width, 2.9)
        faint, clear, by_seed_panels = set(), set(), 0
        for axis, panel in zip(axes, panels, strict=True):
            axis.set_title(panel.title)
            in_panel, lines_by_seed = draw_curves(axis, panel, styles, highlight)
            by_seed_panels += lines_by_seed
            faint |= in_panel
            clear |= {arm for arm in panel.values if panel.values[arm] and arm not in in_panel}
        seed_curves = [by_seed for panel in panels for by_seed in panel.values.values()]
        text = "One seed. "
        if any(len(by_seed) > 1 for by_seed in seed_curves):
            text = "Line: mean over seeds; band: lowest to highest seed. "
            if by_seed_panels:
                text = text.replace("seed. ", "seed; where seeds spread as much as arms, a thin line per seed. ")
        if any(len({len(x) for x, _ in by_seed}) > 1 for by_seed in seed_curves):
            text += "Thin line that ends at a cross: a seed that stopped early. "
        if faint:
            text += f"Faint: the mean of further arms ({HIGHLIGHTED} arms of a panel are highlighted). "
        legend = {arm: styles[arm] for arm in dict.fromkeys([*highlight, *styles]) if arm in styles}
        return add_legend(figure, legend, text + caption, faint - clear)


def draw_curves(
    axis: Axes, panel: Curves, styles: Mapping[str, Style], highlight: Sequence[str] = ()
) -> tuple[set[str], bool]:
    """Draw one panel of `curves`. Return its faint arms, and whether the seeds are drawn as lines instead of bands."""
    axis.set(xlabel=panel.x_label, xscale=panel.x_scale, yscale=panel.y_scale)
    shown = [arm for arm in dict.fromkeys([*highlight, *styles]) if panel.values.get(arm)]
    faint = set(shown[HIGHLIGHTED:])
    by_seed = _seeds_spread([panel.values[arm] for arm in shown if arm not in faint])
    for arm in shown[::-1]:  # the most important arm last, on top
        _draw_arm(axis, panel.values[arm], styles[arm], arm in faint, by_seed)
    reference_lines(axis, panel.lines, vertical=False)
    is_share = "%" in panel.title and axis.dataLim.y0 >= 0 and axis.dataLim.y1 <= 100
    widen(axis, "y", panel.title, (0, 100) if is_share else (-math.inf, math.inf))
    return faint, by_seed


def _complete(seeds: Sequence[Curve]) -> tuple[list[float], list[list[float]]]:
    """Return the x of the longest curve, and the y of all seeds with this x."""
    longest = max((x for x, _ in seeds), key=len, default=[])
    return longest, [y for x, y in seeds if x == longest]


def _seeds_spread(arms: Sequence[Sequence[Curve]]) -> bool:
    """Return whether the seeds of an arm (n >= 3) spread more than half as much as the means of the arms, at the end.

    Bands would then overlap and hide each other.
    """
    last = [[y[-1] for y in _complete(seeds)[1]] for seeds in arms]
    means = [float(np.mean(values)) for values in last]
    return len(means) > 1 and any(len(values) >= 3 and np.ptp(values) > np.ptp(means) / 2 for values in last)


def _draw_arm(axis: Axes, seeds: Sequence[Curve], style: Style, faint: bool, by_seed: bool) -> None:
    """Draw the mean of an arm's complete seeds with their range, and shorter seeds as thin lines."""
    x, complete = _complete(seeds)
    alpha = 0.35 if faint else 1.0
    for short_x, y in seeds:
        if short_x != x:
            axis.plot(short_x, y, linewidth=0.8, marker="x", markevery=[len(short_x) - 1], alpha=alpha, **style)
    if len(complete) > 1 and not faint:
        if by_seed:
            for y in complete:
                axis.plot(x, y, linewidth=0.7, alpha=0.45, color=style["color"])
        else:
            low, high = np.min(complete, axis=0), np.max(complete, axis=0)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if complete:
        marker = "o" if len(x) <= 8 and not faint else ""
        axis.plot(x, np.mean(complete, axis=0), marker=marker, markersize=4, alpha=alpha, **style)


# ------------------------------------------------------------------------------------------------- dots


def dots(
    panels: Sequence[Dots],
    styles: Mapping[str, Style],
    remarks: Mapping[str, str] | None = None,
    hollow: str = "untrained",
    caption: str = "",
) -> Drawing:
    """Return a figure with the arms on the y axis: a dot per seed, a stroke for the mean, a bar for the 95 % interval.

    `styles` has the arms from top to bottom; a row of panels shows the arms that have a value in it. `remarks` appear
    under an arm's name (for example diverged seeds). `hollow` describes the hollow markers.
    """
    columns = columns_of(len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    shown = [{arm for panel in row for arm in styles if panel.values.get(arm)} | set(remarks or ()) for row in rows]
    arms = [[arm for arm in styles if arm in in_row] for in_row in shown]
    heights = [0.42 * len(in_row) + 1.0 for in_row in arms]
    with matplotlib.rc_context(STYLE):
        mean_height = sum(heights) / len(heights)
        figure, axes = grid(len(panels), 3.7, mean_height, sharey="row", height_ratios=heights)
        for index, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            axis.set_title(panel.title)
            draw_dots(axis, panel, {arm: styles[arm] for arm in arms[index // columns]}, remarks)
        text = "Dots: seeds; stroke: mean; bar: 95 % Student-t interval"
        if all(len(seeds) < 2 for panel in panels for seeds in panel.values.values()):
            text = "One seed: no interval"
        marks = f"; hollow: {hollow}. " if any(panel.hollow for panel in panels) else ". "
        separate_labels(figure)
        return Drawing(figure, (text + marks + caption).strip())


def draw_dots(axis: Axes, panel: Dots, styles: Mapping[str, Style], remarks: Mapping[str, str] | None = None) -> None:
    """Draw one panel of `dots`."""
    names = [f"{arm}\n{remarks[arm]}" if remarks and remarks.get(arm) else arm for arm in styles]
    axis.set(yticks=range(len(styles)), yticklabels=names, ylim=(max(1, len(styles)) - 0.5, -0.5), axisbelow=True)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.margins(x=0.08)
    axis.locator_params(axis="x", nbins=4)
    for row, (arm, style) in enumerate(styles.items()):
        _interval(axis, row, panel.values.get(arm, []), style["color"])
        if hollow_values := panel.hollow.get(arm):
            axis.plot(np.mean(hollow_values), row - 0.12, "D", color=style["color"], mfc="white", ms=6)
    reference_lines(axis, panel.lines, vertical=True)
    widen(axis, "x", panel.title, panel.limits)


def _interval(axis: Axes, row: int, values: Sequence[float], colour: str) -> None:
    """Draw the seeds, the mean and the 95 % interval of one arm. One seed is drawn without an interval."""
    if not values:
        return
    stats, y = mean_interval(values), row - 0.12
    if stats.low is None or stats.high is None:
        axis.plot(values, [y], "o", color=colour, ms=6)
        return
    axis.plot(values, np.full(stats.n, y + 0.3), "o", color=colour, ms=4, alpha=0.6, mec="none")
    axis.plot(stats.mean, y, "|", color=colour, ms=11, mew=2)
    axis.plot([stats.low, stats.high], [y, y], color=colour, lw=8, alpha=0.35, solid_capstyle="butt")


# ------------------------------------------------------------------------------------------------- differences


def differences(summary: Mapping[str, Any]) -> Drawing:
    """Return the differences on the primary metric with their 95 % intervals: the first figure of every study."""
    contrasts = _ordered_contrasts(summary)
    with matplotlib.rc_context(STYLE):
        labels, _ = contrast_labels(contrasts)
        height = 1.1 + 0.42 * max(2, len(labels)) + 0.1 * "".join(labels).count("\n")
        figure = Figure(figsize=(7.8, height), layout="constrained")
        draw_differences(figure.subplots(), summary, contrasts)
    text = "Dots: paired differences, one per seed; stroke: mean; bar: 95 % Student-t interval over the seeds. "
    if all(contrast["low"] is None for contrast in contrasts):
        text = "Dots: paired differences. One seed: no interval. "
    if summary["margin"] is not None:
        text += "Light band: the margin, declared beforehand; an interval inside it means no difference. "
    if not all(contrast["primary"] for contrast in contrasts):
        text += "Bold: primary contrasts, which carry the verdict; the others are descriptive. "
    return Drawing(figure, text.strip())


def contrast_labels(contrasts: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return the labels of the rows and of what they show: arms "− base" if all share a reference.

    Otherwise a row has arm and reference, in two lines if they are long. A common setting is shown once.
    """
    pairs = [(contrast["arm"], contrast["reference"]) for contrast in contrasts]
    arms = [arm for pair in pairs for arm in pair]
    where = ""
    if have_one_setting(arms):
        where = f" ({setting_of(arms[0])})" if setting_of(arms[0]) else ""
        pairs = [(without_setting(arm), without_setting(reference)) for arm, reference in pairs]
    if len({reference for _, reference in pairs}) == 1:
        return [arm for arm, _ in pairs], f"arm − {pairs[0][1]}{where}"
    labels = [contrast_name(*pair) for pair in pairs]
    return [label.replace(" − ", "\n− ") if len(label) > 29 else label for label in labels], f"arm − reference{where}"


def _ordered_contrasts(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the contrasts on the primary metric, the primary ones first."""
    return sorted(summary["contrasts"], key=lambda contrast: not contrast["primary"])


def paired_differences(summary: Mapping[str, Any], contrast: Mapping[str, Any]) -> list[float]:
    """Return arm minus reference for every seed that both finished, on the metric of the contrast."""
    values = {row["arm"]: row["metrics"].get(contrast["metric"], {}).get("values", {}) for row in summary["rows"]}
    arm, reference = values.get(contrast["arm"], {}), values.get(contrast["reference"], {})
    return [arm[seed] - reference[seed] for seed in arm if seed in reference]


def difference_limits(values: Sequence[float], margin: float | None, title: str) -> tuple[float, float]:
    """Return the limits of an axis of differences.

    Zero is inside, and ± 1.5 margins or half the least span of the quantity are visible. Each side is at least 30 % of
    the other one, so that an effect is seen relative to zero.
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    reach = max(1.5 * (margin or 0.0), minimum_span(title) / 2, 0.3 * (high - low)) or 1.0
    low, high = min(1.08 * low, -reach), max(1.08 * high, reach)
    return low, high


def draw_differences(axis: Axes, summary: Mapping[str, Any], contrasts: Sequence[Mapping[str, Any]]) -> None:
    """Draw one row per contrast: a dot per seed, the interval in the colour of its verdict, and the verdict."""
    metric, margin = summary["metrics"][summary["primary_metric"]], summary["margin"]
    unit = "points" if metric["unit"] == "%" else metric["unit"]
    size = matplotlib.rcParams["font.size"] / 10
    by_row = [paired_differences(summary, contrast) for contrast in contrasts]
    bounds = [contrast[key] for contrast in contrasts for key in ("low", "high") if contrast[key] is not None]
    title = f"{metric['label']} ({metric['unit']})"
    low, high = difference_limits([*bounds, *(value for row in by_row for value in row)], margin, title)
    axis.set(xlim=(low, high), ylim=(max(len(contrasts) - 0.4, 0.9), -0.7), axisbelow=True)
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.locator_params(axis="x", nbins=4 if size > 1 else 6)
    axis.axvline(0, color=BASE, linewidth=1.6 * size, zorder=2)
    if margin is not None:
        axis.axvspan(-margin, margin, color="#0072B2", alpha=0.1, linewidth=0, zorder=0)
    labels, what = contrast_labels(contrasts)
    axis.set_yticks(range(len(contrasts)), labels)
    below = axis.transData + ScaledTranslation(0, -9 * size / 72, axis.figure.dpi_scale_trans)
    axis.tick_params(axis="y", length=0)
    for y, (contrast, values) in enumerate(zip(contrasts, by_row, strict=True)):
        colour = verdict_colour(contrast["verdict"])
        axis.get_yticklabels()[y].set(**{"fontweight": "bold"} if contrast["primary"] else {"color": "#666666"})
        if contrast["low"] is not None:
            ends = [contrast["low"], contrast["high"]]
            axis.plot(ends, [y, y], color=colour, lw=8 * size, alpha=0.6, solid_capstyle="butt", zorder=3)
            axis.plot(contrast["mean"], y, "|", color="#222222", ms=11 * size, mew=2 * size, zorder=4)
        place: dict[str, Any] = {"ms": 5 * size} if contrast["low"] is None else {"ms": 3.5 * size, "transform": below}
        axis.plot(values, [y] * len(values), "o", color="#333333", alpha=0.55, mec="none", zorder=3, **place)
        weight = "bold" if contrast["primary"] else "normal"
        axis.annotate(
            contrast["verdict"], (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontweight=weight, color="#555555" if colour == NO_VERDICT else colour,
        )  # fmt: skip
    label = f"difference in {metric['label']}" + (f" ({unit})" if unit else "")
    label += f", {what.replace(' ', chr(160))}"  # not to be broken
    axis.set_xlabel(textwrap.fill(label, 42 if size > 1 else 75))
    if metric["better"]:
        x, text, side = (1, "better →", "right") if metric["better"] == "higher" else (0, "← better", "left")
        place = {"xytext": (0, 4), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axis.annotate(text, (x, 1), xycoords="axes fraction", **place, **SMALL)


# ------------------------------------------------------------------------------------------------- slide


def summary_slide(
    summary: Mapping[str, Any],
    panel: Curves | Dots,
    styles: Mapping[str, Style],
    highlight: Sequence[str] = (),
    hollow: str = "untrained",
) -> Drawing:
    """Return a slide (16:9): the headline, at most five differences on the left, and one panel of curves or dots."""
    contrasts = _ordered_contrasts(summary)
    left_out = len(contrasts) - SLIDE_CONTRASTS
    contrasts = contrasts[:SLIDE_CONTRASTS]
    counts = sorted({contrast["n"] for contrast in contrasts})
    seeds = f"{' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"
    with matplotlib.rc_context(SLIDE):
        figure = Figure(figsize=(12.8, 7.2))
        size, title = _headline(summary["headline"])
        figure.text(0.02, 0.965, title, fontsize=size, fontweight="bold", va="top", linespacing=1.15)
        top = 0.955 - (title.count("\n") + 1) * size * 1.25 / (7.2 * 72)
        subtitle = f"{summary['paper']}: {summary['data']}; {seeds}"
        subtitle = textwrap.fill(subtitle, 108)
        figure.text(0.02, top, subtitle, fontsize=14, color="#555555", va="top")
        top -= (subtitle.count("\n") + 1) * 14 * 1.25 / (7.2 * 72)
        figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, top - 0.04), wspace=0.04)
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
        draw_differences(left, summary, contrasts)
        for label in left.get_yticklabels():
            label.set_fontsize(14.5)
        anchor = {"loc": "upper left", "bbox_to_anchor": (-0.05, -0.14)}
        right.set_title(panel.title)
        if isinstance(panel, Curves):
            order = [arm for arm in dict.fromkeys([*highlight, *styles]) if panel.values.get(arm)]
            grey = {arm: {**styles[arm], "color": GREY} for arm in order[HIGHLIGHTED:]}  # as "other arms" in the legend
            faint, _ = draw_curves(right, panel, {**styles, **grey}, highlight)
            if panel.x_scale == "linear":
                right.locator_params(axis="x", nbins=5)
            clear = [arm for arm in styles if panel.values.get(arm) and arm not in faint]
            names = short_names(clear)
            handles = [Line2D([], [], label=name, **styles[arm]) for name, arm in zip(names, clear, strict=True)]
            handles += [Line2D([], [], label="other arms", color=GREY, alpha=0.4)] if faint else []
            columns = 1 if max(map(len, names), default=0) > 17 else 2
            right.legend(handles=handles, ncols=columns, handlelength=2.4, fontsize=15, **anchor)
        else:
            shown = {arm: style for arm, style in styles.items() if panel.values.get(arm)}
            shown = dict(list(shown.items())[:8])
            draw_dots(right, panel, shown)
            right.set_yticklabels([textwrap.fill(name, 17) for name in short_names(shown)])
            right.set_title(panel.title, pad=18 if panel.lines else 6)
            for label in right.get_yticklabels():
                label.set_fontsize(14.5)
            if panel.hollow:
                mark = Line2D([], [], label=hollow, marker="D", linestyle="", color="#333333", mfc="white", ms=7)
                right.legend(handles=[mark], fontsize=15, **anchor | {"bbox_to_anchor": (-0.05, -0.06)})
        separate_labels(figure)
    text = "Left: paired differences with 95 % intervals; light band: margin. "
    if left_out > 0:
        text += f"Contrasts left out: {left_out}, see the figure of all differences. "
    return Drawing(figure, text + f"Right: {panel.title}.".replace("\n", ", "))


def _headline(text: str) -> tuple[int, str]:
    """Return the largest font size at which the headline fits on one or two lines, and its lines."""
    text = text.replace("->", "→")
    for size, characters, most in ((25, 59, 1), (22, 67, 1), (20, 73, 1), (22, 67, 2), (19, 78, 2), (16, 92, 3)):
        lines = textwrap.wrap(text, characters)
        if len(lines) <= most:
            return size, "\n".join(lines)
    return 14, textwrap.fill(text, 105)


# ------------------------------------------------------------------------------------------------- files


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.svg and <name>.png (256 colours) atomically. Equal figures give identical bytes."""
    removed_metadata = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}
    for extension, keys in removed_metadata.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=extension, dpi=figure.dpi, metadata=dict.fromkeys(keys))
        figure.set_layout_engine("none")  # the first file has computed the layout
        data = normalise_svg(buffer.getvalue()) if extension == "svg" else quantise_png(buffer.getvalue())
        write_bytes(Path(folder) / f"{name}.{extension}", data)


def quantise_png(png: bytes) -> bytes:
    """Reduce a PNG to a palette of 256 colours: a third of the size, without a visible difference."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    quantised = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    quantised.save(buffer, "PNG", optimize=True, dpi=(200, 200))
    return buffer.getvalue()


def normalise_svg(svg: bytes) -> bytes:
    """Rename clip paths to clip0, clip1, ... and cut coordinates to three decimal places.

    The last of matplotlib's six digits differs between equal figures. Clip paths are named by a hash of coordinates.
    """
    svg = re.sub(rb"(\d\.\d{3})\d{3}\b", rb"\1", svg)
    names: dict[bytes, bytes] = {}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda match: names.setdefault(match[0], b"clip%d" % len(names)), svg)
