"""The house style of every figure: curves over training, and dots with intervals. Made without pyplot.

An arm's colour follows from its place in the study; the reference is dark grey. Colours: Okabe and Ito's,
which colour-blind readers can tell apart; dashes help where a print has no colour.
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
STYLE: Any = {  # Any: matplotlib types its keys one by one
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
    "svg.fonttype": "none",  # text can be searched; a missing font falls back to a narrower one
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "figures",
}


class Curves(NamedTuple):
    """One panel of `curves`: by arm the (x, y) of each seed, and dotted horizontal lines by their label."""

    title: str
    values: Mapping[str, Sequence[Curve]]
    lines: Mapping[str, float] = {}
    x_label: str = "epoch"
    x_scale: str = "linear"
    y_scale: str = "linear"


class Dots(NamedTuple):
    """One panel of `dots`: by arm one value a seed and those of a hollow mark; vertical lines by label."""

    title: str
    values: Mapping[str, Sequence[float]]
    hollow: Mapping[str, Sequence[float]] = {}
    lines: Mapping[str, float] = {}
    within: tuple[float, float] = (-math.inf, math.inf)  # possible values: an interval beyond them is cut


def looks(arms: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Colour and dashes of every arm, for the figures here and a paper's own."""
    others = [arm for arm in arms if arm != reference]
    found = {
        arm: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]} for i, arm in enumerate(others)
    }
    return {arm: found.get(arm, {"color": REFERENCE, "linestyle": "-"}) for arm in arms}


def grid(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of `count` panels, three in a row at most, two if more; width and height of one in inches."""
    columns = count if count <= 3 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, columns * width), rows * height + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _reference_lines(axis: Axes, lines: Mapping[str, float], vertical: bool) -> None:
    """Dotted lines with their labels outside the data, at the top or on the right."""
    for label, level in lines.items():
        (axis.axvline if vertical else axis.axhline)(level, color=GREY, linewidth=1, linestyle=":", zorder=1)
        place: dict[str, Any] = {"xy": (1, level), "xycoords": ("axes fraction", "data"), "va": "center"}
        if vertical:
            place = {"xy": (level, 1), "xycoords": ("data", "axes fraction"), "va": "bottom", "ha": "center"}
        axis.annotate(label, xytext=(0, 3) if vertical else (3, 0), textcoords="offset points", **place, **SMALL)


def _caption(figure: Figure, text: str) -> None:
    """Small print under the panels, broken to the figure's width (about 14 characters an inch)."""
    figure.supxlabel(textwrap.fill(text, int(14 * figure.get_figwidth())), x=0.01, ha="left", **SMALL)


def finish(figure: Figure, looks: Mapping[str, Mapping[str, Any]], caption: str) -> Figure:
    """The legend of `looks` above the panels, in as many columns as fit, and the caption below them."""
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    widths, room = [6.5 * len(name) + 50 for name in looks], figure.get_figwidth() * 72  # points, about
    columns = max(1, int(room / max(widths))) if sum(widths) > room else len(looks)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)
    _caption(figure, caption)
    return figure


def curves(panels: Sequence[Curves], arms: Sequence[str], reference: str, caption: str = "") -> Figure:
    """Panels side by side (two columns if more than three): mean line over seeds, band from low to high.

    A seed that ends before its arm's others is drawn alone, thin, and never averaged.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(panels), 3.5, 2.7)
        style = looks(arms, reference)
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(xlabel=panel.x_label, title=panel.title, xscale=panel.x_scale, yscale=panel.y_scale)
            for arm in sorted(arms, key=lambda arm: arm == reference):  # the reference on top
                _band(axis, panel.values.get(arm, []), style[arm])
            _reference_lines(axis, panel.lines, vertical=False)
        seeds = [found for panel in panels for found in panel.values.values()]
        text = "One seed. "
        if any(len(found) > 1 for found in seeds):
            text = "Line: mean over seeds; band: lowest to highest seed. "
        if any(len({len(x) for x, _ in found}) > 1 for found in seeds):
            text += "Thin line: a seed that stopped early. "
        return finish(figure, {arm: style[arm] for arm in arms}, text + caption)


def whole_epochs(figure: Figure) -> Figure:
    """The same figure with whole numbers on its x axes: epochs, where they are few."""
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def _band(axis: Axes, seeds: Sequence[Curve], style: Mapping[str, Any]) -> None:
    longest = max((x for x, _ in seeds), key=len, default=[])
    whole = [y for x, y in seeds if x == longest]
    for x, y in seeds:
        if x != longest:
            axis.plot(x, y, linewidth=0.8, marker="x", markevery=[len(x) - 1], **style)
    if whole:
        low, high, marker = np.min(whole, axis=0), np.max(whole, axis=0), "o" if len(longest) <= 8 else ""
        axis.fill_between(longest, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axis.plot(longest, np.mean(whole, axis=0), marker=marker, markersize=4, **style)


def dots(
    panels: Sequence[Dots],
    arms: Sequence[str],
    reference: str,
    remarks: Mapping[str, str] | None = None,
    hollow: str = "untrained",
    caption: str = "",
) -> Figure:
    """Arms on the y axis: a dot a seed, a stroke for the mean, a bar for its 95 % interval.

    `remarks` stand under an arm's name (diverged seeds); `hollow` says what the hollow marks are.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(panels), 3.3, 0.45 * len(arms) + 0.5, sharey=True)
        style = looks(arms, reference)
        names = [f"{arm}\n{remarks[arm]}" if remarks and remarks.get(arm) else arm for arm in arms]
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(yticks=range(len(arms)), yticklabels=names, ylim=(max(1, len(arms)) - 0.5, -0.5), axisbelow=True)
            axis.set_title(panel.title, pad=18 if panel.lines else 6)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
            axis.margins(x=0.08)
            axis.locator_params(axis="x", nbins=4)
            for place, arm in enumerate(arms):
                _interval(axis, place, panel.values.get(arm, []), style[arm]["color"])
                if marked := panel.hollow.get(arm):
                    axis.plot(np.mean(marked), place - 0.12, "D", color=style[arm]["color"], mfc="white", ms=6)
            _reference_lines(axis, panel.lines, vertical=True)
            left, right = axis.get_xlim()
            axis.set_xlim(max(left, panel.within[0]), min(right, panel.within[1]))
        text = "Dots: training seeds; stroke: mean; bar: 95 % Student-t interval (data and split fixed)"
        if all(len(found) < 2 for panel in panels for found in panel.values.values()):
            text = "One training seed: no interval"
        marks = f"; hollow: {hollow}. " if any(panel.hollow for panel in panels) else ". "
        _caption(figure, text + marks + caption)
    return figure


def _interval(axis: Axes, place: int, found: Sequence[float], colour: str) -> None:
    if not found:
        return
    whole, level = summary(found), place - 0.12
    if whole.low is None or whole.high is None:
        axis.plot(found, [level], "o", color=colour, ms=6)
        return
    axis.plot(found, np.full(whole.n, level + 0.3), "o", color=colour, ms=4, alpha=0.6, mec="none")
    axis.plot(whole.mean, level, "|", color=colour, ms=11, mew=2)
    axis.plot([whole.low, whole.high], [level, level], color=colour, lw=8, alpha=0.35, solid_capstyle="butt")


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.svg and <name>.png (200 dpi, 256 colours) atomically; equal figures give equal bytes."""
    for kind, facts in {"svg": ("Date", "Creator", "Format", "Type"), "png": ("Software",)}.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=kind, dpi=200, metadata=dict.fromkeys(facts))
        data = _number_clips(buffer.getvalue()) if kind == "svg" else palette(buffer.getvalue())
        write_bytes(Path(folder) / f"{name}.{kind}", data)


def palette(png: bytes) -> bytes:
    """The same PNG with a palette of 256 colours: a third of the size, no difference that one sees."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True, dpi=(200, 200))
    return buffer.getvalue()


def _number_clips(svg: bytes) -> bytes:
    """Clip paths by number: their names hash coordinates, whose last digit the layout does not settle."""
    names: dict[bytes, bytes] = {}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda found: names.setdefault(found[0], b"clip%d" % len(names)), svg)
