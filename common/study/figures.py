"""Figures in one style: training curves, and values per seed with 95 % intervals. Uses matplotlib without pyplot.

The position of an arm in its study determines its colour; the reference is dark grey. The palette is Okabe and Ito's,
which is safe for colour-blind readers. Dash patterns distinguish the arms in black-and-white prints.
"""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from common.files import write_bytes
from common.study.results import Curve
from common.study.statistics import summary

REFERENCE, GREY = "#333333", "#777777"
SMALL: Any = {"fontsize": 8.5, "color": "#555555"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (3, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: Any = {  # Any, because matplotlib types every key of rcParams
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # keeps text searchable
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "figures",
}


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


def arm_styles(arms: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Return the colour and line style of every arm, as matplotlib keywords."""
    styles = {arm: {"color": REFERENCE, "linestyle": "-"} for arm in arms}
    others = [arm for arm in arms if arm != reference]
    for i, arm in enumerate(others):
        styles[arm] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
    return styles


def grid(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its `count` axes: one row of up to three panels, else two columns.

    `width` and `height` are those of one panel in inches. `options` go to `Figure.subplots`.
    """
    columns = count if count <= 3 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, columns * width), rows * height + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _reference_lines(axis: Axes, lines: Mapping[str, float], vertical: bool) -> None:
    """Draw dotted lines, labelled outside the data area: at the top if vertical, else on the right."""
    style: Any = {"color": GREY, "linewidth": 1, "linestyle": ":", "zorder": 1}
    for label, level in lines.items():
        if vertical:
            axis.axvline(level, **style)
            position: Any = {"xy": (level, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3)}
            position |= {"va": "bottom", "ha": "center"}
        else:
            axis.axhline(level, **style)
            position = {"xy": (1, level), "xycoords": ("axes fraction", "data"), "xytext": (3, 0), "va": "center"}
        axis.annotate(label, textcoords="offset points", **position, **SMALL)


def _caption(figure: Figure, text: str) -> None:
    """Add a caption under the panels, wrapped to the figure's width (about 14 characters per inch)."""
    figure.supxlabel(textwrap.fill(text, int(14 * figure.get_figwidth())), x=0.01, ha="left", **SMALL)


def finish(figure: Figure, styles: Mapping[str, Mapping[str, Any]], caption: str) -> Figure:
    """Add a legend above the panels, in as many columns as fit, and a caption below. Return the figure."""
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    widths = [6.5 * len(name) + 50 for name in styles]  # approximate width of each legend entry in points
    available = figure.get_figwidth() * 72
    columns = max(1, int(available / max(widths))) if sum(widths) > available else len(styles)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)
    _caption(figure, caption)
    return figure


def curves(panels: Sequence[Curves], arms: Sequence[str], reference: str, caption: str = "") -> Figure:
    """Return a figure of training curves: line for the mean over seeds, band from lowest to highest seed.

    A seed whose curve is shorter than the longest of its arm is drawn as a thin line and never averaged.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(panels), 3.5, 2.7)
        style = arm_styles(arms, reference)
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(xlabel=panel.x_label, title=panel.title, xscale=panel.x_scale, yscale=panel.y_scale)
            for arm in sorted(arms, key=lambda arm: arm == reference):  # draws the reference last, on top
                _band(axis, panel.values.get(arm, []), style[arm])
            _reference_lines(axis, panel.lines, vertical=False)
        seed_curves = [by_seed for panel in panels for by_seed in panel.values.values()]
        text = "One seed. "
        if any(len(by_seed) > 1 for by_seed in seed_curves):
            text = "Line: mean over seeds; band: lowest to highest seed. "
        if any(len({len(x) for x, _ in by_seed}) > 1 for by_seed in seed_curves):
            text += "Thin line: a seed that stopped early. "
        return finish(figure, {arm: style[arm] for arm in arms}, text + caption)


def integer_x_ticks(figure: Figure) -> Figure:
    """Restrict the ticks of all x axes to integers, for runs of few epochs. Return the figure."""
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def _band(axis: Axes, seeds: Sequence[Curve], style: Mapping[str, Any]) -> None:
    """Draw the mean and the range of the complete seeds of one arm, and shorter seeds as thin lines."""
    longest = max((x for x, _ in seeds), key=len, default=[])
    complete = [y for x, y in seeds if x == longest]
    for x, y in seeds:
        if x != longest:
            axis.plot(x, y, linewidth=0.8, marker="x", markevery=[len(x) - 1], **style)
    if complete:
        low, high = np.min(complete, axis=0), np.max(complete, axis=0)
        marker = "o" if len(longest) <= 8 else ""
        axis.fill_between(longest, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axis.plot(longest, np.mean(complete, axis=0), marker=marker, markersize=4, **style)


def dots(
    panels: Sequence[Dots],
    arms: Sequence[str],
    reference: str,
    remarks: Mapping[str, str] | None = None,
    hollow: str = "untrained",
    caption: str = "",
) -> Figure:
    """Return a figure with the arms on the y axis: a dot per seed, a stroke for the mean, a bar for the 95 % interval.

    `remarks` appear under an arm's name (for example diverged seeds). `hollow` describes the hollow markers.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(panels), 3.3, 0.45 * len(arms) + 0.5, sharey=True)
        style = arm_styles(arms, reference)
        names = [f"{arm}\n{remarks[arm]}" if remarks and remarks.get(arm) else arm for arm in arms]
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(yticks=range(len(arms)), yticklabels=names, ylim=(max(1, len(arms)) - 0.5, -0.5), axisbelow=True)
            axis.set_title(panel.title, pad=18 if panel.lines else 6)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
            axis.margins(x=0.08)
            axis.locator_params(axis="x", nbins=4)
            for row, arm in enumerate(arms):
                _interval(axis, row, panel.values.get(arm, []), style[arm]["color"])
                if hollow_values := panel.hollow.get(arm):
                    axis.plot(np.mean(hollow_values), row - 0.12, "D", color=style[arm]["color"], mfc="white", ms=6)
            _reference_lines(axis, panel.lines, vertical=True)
            left, right = axis.get_xlim()
            axis.set_xlim(max(left, panel.limits[0]), min(right, panel.limits[1]))
        text = "Dots: training seeds; stroke: mean; bar: 95 % Student-t interval (data and split fixed)"
        if all(len(seeds) < 2 for panel in panels for seeds in panel.values.values()):
            text = "One training seed: no interval"
        marks = f"; hollow: {hollow}. " if any(panel.hollow for panel in panels) else ". "
        _caption(figure, text + marks + caption)
    return figure


def _interval(axis: Axes, row: int, values: Sequence[float], colour: str) -> None:
    """Draw the seeds, the mean and the 95 % interval of one arm. One seed is drawn without an interval."""
    if not values:
        return
    stats, y = summary(values), row - 0.12
    if stats.low is None or stats.high is None:
        axis.plot(values, [y], "o", color=colour, ms=6)
        return
    axis.plot(values, np.full(stats.n, y + 0.3), "o", color=colour, ms=4, alpha=0.6, mec="none")
    axis.plot(stats.mean, y, "|", color=colour, ms=11, mew=2)
    axis.plot([stats.low, stats.high], [y, y], color=colour, lw=8, alpha=0.35, solid_capstyle="butt")


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.svg and <name>.png (200 dpi, 256 colours) atomically. Equal figures give identical bytes."""
    removed_metadata = {"svg": ("Date", "Creator", "Format", "Type"), "png": ("Software",)}
    for extension, keys in removed_metadata.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=extension, dpi=200, metadata=dict.fromkeys(keys))
        data = _number_clips(buffer.getvalue()) if extension == "svg" else quantise_png(buffer.getvalue())
        write_bytes(Path(folder) / f"{name}.{extension}", data)


def quantise_png(png: bytes) -> bytes:
    """Reduce a PNG to a palette of 256 colours: a third of the size, without a visible difference."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    quantised = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    quantised.save(buffer, "PNG", optimize=True, dpi=(200, 200))
    return buffer.getvalue()


def _number_clips(svg: bytes) -> bytes:
    """Rename clip paths to clip0, clip1, ...

    matplotlib names them by a hash of coordinates, whose last digit differs between equal figures.
    """
    names: dict[bytes, bytes] = {}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda match: names.setdefault(match[0], b"clip%d" % len(names)), svg)
