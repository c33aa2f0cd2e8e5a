"""Figures, tables and finding of one ConMIM study.

    python conmim/plot.py conmim-asymmetry --scale demo --seeds 0 1 2

Reads the runs' metrics.json, train.jsonl and similarity.npz, computes nothing new, and draws what there is; missing
runs are holes.
"""

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import NON_METHOD_FLAGS
from common.study import figures, plotting, results, statistics, tables
from common.study.analysis import WORDS
from common.study.design import MustBeat
from conmim.studies import METRICS, design

PRIMARY, ONLINE = "finetune_accuracy", "finetune_accuracy_online"
INFORMATIVE = (20.0, 80.0)  # percent: where the control's accuracy must lie for one above it to tell anything
DISAGREE = "averaged and online weights disagree in sign"
KEYS = {"ema": ("ema", 0.0), "online": ("online", 0.0), "online, no\nstop-gradient": ("online", 1.0)}
VIEWS = ("asymmetric", "basic")
Cell = tuple[str, int]  # views, place in KEYS


class Effect(NamedTuple):
    """A row of the factorial's right panel: its name, the weights of the cells, and whether it is a simple effect."""

    name: str
    weights: Mapping[Cell, float]
    simple: bool = False


def factors() -> list[Effect]:
    """The factorial's effects: each main effect and its two simple ones, and what they differ by."""

    def minus(one: Cell, other: Cell) -> dict[Cell, float]:
        return {one: 1.0, other: -1.0}

    def both(one: Mapping[Cell, float], other: Mapping[Cell, float], sign: int, scale: float) -> dict[Cell, float]:
        return {cell: scale * (one.get(cell, 0) + sign * other.get(cell, 0)) for cell in [*one, *other]}

    asymmetric, basic = VIEWS
    keys = [minus((views, 1), (views, 0)) for views in VIEWS]
    seen = [minus((basic, place), (asymmetric, place)) for place in (0, 1)]
    held = [minus((views, 2), (views, 1)) for views in VIEWS]
    return [
        Effect("keys: online − ema", both(*keys, 1, 0.5)),
        *(Effect(f"at {views} views", one, True) for views, one in zip(VIEWS, keys, strict=True)),
        Effect("views: basic − asymmetric", both(*seen, 1, 0.5)),
        *(Effect(f"at {name} keys", one, True) for name, one in zip(("ema", "online"), seen, strict=True)),
        Effect("keys × views", both(seen[1], seen[0], -1, 1)),
        Effect("both: symmetric − base", minus((basic, 1), (asymmetric, 0))),
        Effect("stop-gradient: without − with", both(*held, 1, 0.5)),
        *(Effect(f"at {views} views", one, True) for views, one in zip(VIEWS, held, strict=True)),
        Effect("stop-gradient × views", both(held[1], held[0], -1, 1)),
    ]


class Combination(NamedTuple):
    """A weighted sum of means with its 95 % interval, None where a mean rests on one value."""

    mean: float
    low: float | None
    high: float | None


def position_code(runs: list[dict[str, Any]]) -> str | None:
    """The rule for the word: position R² and the share found in another image above 0.95, in every seed."""
    every = all(run["position_r2"] > 0.95 and run["cross_top1"] > 0.95 for run in runs)
    return "has a position code for keys in every seed" if every else None


# ------------------------------------------------------------------------------------------------- what the runs say


def arguments_of(by_seed: Mapping[int, results.Record]) -> dict[str, Any]:
    """The arguments of the first run that is there, or none."""
    return next((run.args["arguments"] for run in by_seed.values() if run.args), {})


def describe(runs: results.Runs) -> str:
    """Data and recipe in words, of the first pre-trained run that is there, else of any; "" where there is none."""
    found = [one for one in map(arguments_of, runs.values()) if one]
    if not found:
        return ""
    first = max(found, key=lambda one: one["epochs"] > 0)
    names = {"glyphs36": "glyphs (synthetic characters, 36 classes)", "glyphs10": "glyphs (synthetic digits)"}
    names |= {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "folder": f"images, {first['size']} px"}
    recipe = f"{first['network']}, {first['positions']} positions, {first['epochs']} epochs of batch {first['batch']}"
    return f"{names.get(first['data_set'], first['data_set'])}, {recipe}"


def cells(runs: results.Runs, base: str) -> dict[Cell, str]:
    """The arm of every cell of the factorial that is there: runs that differ from `base` in its three factors alone."""
    factors, found = {"keys", "views", "gradient_leak"}, {}

    def rest(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {key: one for key, one in arguments.items() if key not in factors | NON_METHOD_FLAGS | {"seed"}}

    shared = rest(arguments_of(runs[base]))
    places = {key: place for place, key in enumerate(KEYS.values())}
    for arm, by_seed in runs.items():
        own = arguments_of(by_seed)
        if own and rest(own) == shared and (own["keys"], own["gradient_leak"]) in places:
            found.setdefault((own["views"], places[own["keys"], own["gradient_leak"]]), arm)
    return found


def combine(values: Sequence[Sequence[float]], weights: Sequence[float]) -> Combination | None:
    """sum of weight * mean with Welch's interval (unequal variances, Satterthwaite's df); None where values miss.

    Of two arms with weights 1 and -1 it is Welch's interval of their difference.
    """
    if not all(values):
        return None
    parts = [statistics.summary(one) for one in values]
    total = sum(weight * part.mean for weight, part in zip(weights, parts, strict=True))
    if any(part.sd is None for part in parts):
        return Combination(total, None, None)
    terms = [(w * (part.sd or 0)) ** 2 / part.n for w, part in zip(weights, parts, strict=True)]
    variance, half = sum(terms), 0.0
    if variance > 0:
        df = 1 / sum((term / variance) ** 2 / (part.n - 1) for term, part in zip(terms, parts, strict=True))
        half = statistics.student_t_quantile(0.975, df) * math.sqrt(variance)
    return Combination(total, total - half, total + half)


def effect(runs: results.Runs, found: Mapping[Cell, str], weights: Mapping[Cell, float], metric: str):
    """`combine` over cells of the factorial; None where one has no run."""
    values = [list(results.values(runs, found.get(cell, ""), metric).values()) for cell in weights]
    return combine(values, list(weights.values()))


# ------------------------------------------------------------------------------------------------- what follows


def told(contrasts: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Difference and interval of the primary contrast on a metric."""
    one = next(c for c in contrasts if c["metric"] == metric)
    if one["mean"] is None:
        return f"{METRICS[metric].label} {tables.HOLE}"
    bounds = "" if one["low"] is None else f" ({tables.interval(one, vars(METRICS[metric]))})"
    return f"{METRICS[metric].label} {tables.number(one['mean'], vars(METRICS[metric]))}{bounds}"


def judged(summary: dict[str, Any], runs: results.Runs, control: MustBeat) -> dict[str, Any]:
    """The summary after the rules that only this paper has.

    The control's accuracy must lie between 20 and 80 %, else nothing follows from accuracy. A verdict on accuracy needs
    the online weights to agree in sign. The position diagnostics are told in any case.
    """
    primary = next(one for one in summary["contrasts"] if one["primary"])
    arm, reference = primary["arm"], primary["reference"]
    own = [one for one in summary["all_contrasts"] if (one["arm"], one["reference"]) == (arm, reference)]
    notes, finding = [], summary["finding"]
    level = results.values(runs, control.baseline_arm, PRIMARY)
    if level and not INFORMATIVE[0] <= mean(level.values()) <= INFORMATIVE[1]:
        place = f"{control.baseline_arm} has {mean(level.values()):.1f} %, outside {INFORMATIVE[0]:.0f} to "
        notes.append(f"Accuracy is {tables.NOT_INFORMATIVE}: {place}{INFORMATIVE[1]:.0f} %.")
        if summary["verdict"] != tables.NOT_INFORMATIVE:
            finding = f"{tables.NOT_INFORMATIVE.capitalize()}: {place}{INFORMATIVE[1]:.0f} %. {finding}"
        summary |= {"verdict": tables.NOT_INFORMATIVE, "counted": False}
    other = next(one for one in own if one["metric"] == ONLINE)
    if None not in (primary["mean"], other["mean"]) and primary["mean"] * other["mean"] < 0:
        sentence = (
            f"{arm}:{reference} is {told(own, PRIMARY)} with averaged, "
            f"{told(own, ONLINE).removeprefix(METRICS[ONLINE].label + ' ')} with online weights: they disagree in "
            "sign, so no claim is made on accuracy."
        )
        notes.append(sentence)
        finding = f"{finding} {sentence}"
        if summary["verdict"] in WORDS:
            summary |= {"verdict": DISAGREE, "counted": False}
    positions = "; ".join(told(own, name) for name in ("own_top1", "cross_top1", "position_r2"))
    sentence = f"Position diagnostics, which need no labels: {arm} minus {reference}: {positions}."
    words = [f"{row['arm']} {row['word']}" for row in summary["rows"] if row["word"]]
    notes.append(" ".join([sentence, *([f"{'; '.join(words)}."] if words else [])]))
    if summary["verdict"] in (tables.NOT_INFORMATIVE, DISAGREE):
        finding = f"{finding} {sentence}"
    return summary | {"finding": finding, "notes": notes + summary["notes"]}


# ------------------------------------------------------------------------------------------------- figures


def interval_line(axis: Axes, x: float, found: Combination, horizontal: bool, **look: Any) -> None:
    """A dot with its interval as a line."""
    places = ([found.low, found.high], [x, x]) if horizontal else ([x, x], [found.low, found.high])
    if found.low is not None:
        axis.plot(*places, color=look["color"], linewidth=1.6, solid_capstyle="butt", zorder=3)
    axis.plot(*((found.mean, x) if horizontal else (x, found.mean)), zorder=4, linestyle="", **look)


def interaction_panel(
    axis: Axes, runs: results.Runs, found: Mapping[Cell, str], control: str, metric: str, looks: Mapping[str, Any]
) -> None:
    """One line a setting of the views over the kinds of keys: mean, 95 % interval, a faint dot a seed; the control."""
    axis.set(xticks=range(len(KEYS)), xlim=(-0.35, len(KEYS) - 0.65), axisbelow=True)
    axis.set_xticklabels(list(KEYS), fontsize=9)
    axis.margins(y=0.08)
    axis.set_title(METRICS[metric].title)
    axis.set_xlabel("keys from")
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    level = combine([list(results.values(runs, control, metric).values())], [1])
    if level:
        if level.low is not None:
            axis.axhspan(level.low, level.high, color=figures.GREY, alpha=0.15, linewidth=0)
        axis.axhline(level.mean, color=figures.GREY, linewidth=1, linestyle=":")
    for views, shift in zip(VIEWS, (-0.06, 0.06), strict=True):
        way: dict[int, float] = {}
        for place in range(len(KEYS)):
            values = list(results.values(runs, found.get((views, place), ""), metric).values())
            if whole := combine([values], [1]):
                way[place] = whole.mean
                axis.plot([place + 2.4 * shift] * len(values), values, "o", ms=3.5, mec="none", alpha=0.45,
                          color=looks[views]["color"])  # fmt: skip
                interval_line(axis, place + shift, whole, False, color=looks[views]["color"], marker="o", ms=6)
        for place in way:
            if place + 1 in way:  # nothing is drawn across a hole
                axis.plot([place + shift, place + 1 + shift], [way[place], way[place + 1]], alpha=0.8, **looks[views])


def effects_panel(axis: Axes, runs: results.Runs, found: Mapping[Cell, str]) -> None:
    """Effects with intervals, the simple ones smaller under their main effect; online weights hollow."""
    rows = factors()
    axis.axvline(0, color=figures.GREY, linewidth=1)
    axis.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), axisbelow=True, xlabel="points")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.set_title("effects on fine-tuned accuracy")
    for label, row in zip(axis.set_yticklabels([row.name for row in rows]), rows, strict=True):
        label.set(fontsize=8.5 if row.simple else 10, color=figures.GREY if row.simple else figures.REFERENCE)
    for place, row in enumerate(rows):
        colour, size = (figures.GREY, 4) if row.simple else (figures.REFERENCE, 6)
        if whole := effect(runs, found, row.weights, PRIMARY):
            interval_line(axis, place - 0.14, whole, True, color=colour, marker="o", ms=size)
        if online := effect(runs, found, row.weights, ONLINE):
            interval_line(axis, place + 0.14, online, True, color=colour, marker="o", ms=size, mfc="white", mew=1.2)


def factorial(runs: results.Runs, base: str, control: str, caption: str) -> Figure:
    """The six cells as the factorial that they are: accuracy and position R² by keys and views, and the effects."""
    found = cells(runs, base)
    looks = figures.looks(["asymmetric views", "basic views"], "asymmetric views")
    by_views = dict(zip(VIEWS, looks.values(), strict=True))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(12.4, 4.8), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
        for axis, metric in zip(axes, (PRIMARY, "position_r2"), strict=False):
            interaction_panel(axis, runs, found, control, metric, by_views)
        effects_panel(axes[2], runs, found)
        shown: dict[str, Any] = {name: look | {"marker": "o"} for name, look in looks.items()}
        shown |= {f"{control} (mean, interval)": {"color": figures.GREY, "linestyle": ":"}}
        missing = [f"{views} views, keys {key}".replace("\n", " ") for views in VIEWS for place, key in enumerate(KEYS)
                   if (views, place) not in found]  # fmt: skip
        holes = f"Not there: {'; '.join(missing)}. " if missing else ""
        several = any(len(by_seed) > 1 for by_seed in runs.values())
        bars = "Bars: 95 % intervals over training seeds (right: Welch's, descriptive and unadjusted); faint: seeds. "
        text = (bars if several else "One training seed: no interval. ") + (
            "Right: filled, averaged weights; hollow, online weights; ×: the effect at basic views minus that at "
            "asymmetric ones. With ema keys the stop-gradient changes nothing, bit for bit. "
        )
        return figures.finish(figure, shown, text + holes + caption)


def curve_panels(runs: results.Runs, floor: float | None) -> list[figures.Curves]:
    """Loss and position diagnostics over the epochs."""
    titles = {
        "loss": "training loss", "position_r2": "position R² of the keys", "own_top1": "own key found",
        "cross_top1": "position found in another image",
    }  # fmt: skip
    lines = {"loss": {"floor": floor} if floor is not None else {}}
    return [
        figures.Curves(title, results.series(runs, key), lines.get(key, {})) for key, title in titles.items()
    ]  # fmt: skip


def dot_panels(runs: results.Runs) -> list[figures.Dots]:
    """Final accuracies with those of the online weights hollow, and what of them is position."""
    keys = [PRIMARY, "linear_accuracy", "knn_accuracy", "position_r2"]
    return [
        figures.Dots(
            METRICS[key].title,
            {arm: list(results.values(runs, arm, key).values()) for arm in runs},
            {arm: list(results.values(runs, arm, f"{key}_online").values()) for arm in runs}
            if f"{key}_online" in METRICS
            else {},
            within=(0, 100 if METRICS[key].unit == "%" else 1),
        )
        for key in keys
    ]


def read_similarity(path: Path) -> dict[str, np.ndarray] | None:
    """What similarity.npz holds; None where it is missing. Raises ValueError where it cannot be used."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as read:
            found = {name: read[name] for name in ("own", "other", "mask", "picture")}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive raises many kinds
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
    patches = len(found["mask"])
    side = round(patches**0.5)
    square = found["own"].shape == found["other"].shape == (patches, patches) and side * side == patches
    if not square or found["picture"].ndim != 3 or found["picture"].shape[2] % side:
        raise ValueError(f"{path} does not hold the similarities of one image")
    return found


def similarities(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], caption: str
) -> tuple[Figure | None, list[str]]:
    """(one image's queries by keys, of its own above and of another image's below; sentences on unreadable files)."""
    found, notes = {}, []
    for arm in arms:
        for seed in seeds:
            try:
                if arm not in found and (read := read_similarity(folder / arm / str(seed) / "similarity.npz")):
                    found[arm] = (seed, read)
            except ValueError as error:
                notes.append(f"{arm}, seed {seed}: {str(error).partition(' ')[0].rpartition('/')[2]} cannot be used.")
    if not found:
        return None, notes
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(2.0 + 2.9 * len(arms), 6.6), layout="constrained")
        axes = figure.subplots(2, 1 + len(arms), width_ratios=[0.62] + [1] * len(arms))
        _, first = next(iter(found.values()))
        show_picture(axes[0][0], first["picture"], None, "the image")
        show_picture(axes[1][0], first["picture"], first["mask"], "masked as its\nqueries see it")
        for column, arm in enumerate(arms, 1):
            for row, (key, label) in enumerate({"own": "of its own keys", "other": "of another image's keys"}.items()):
                axis = axes[row][column]
                if arm not in found:
                    axis.text(0.5, 0.5, "no run", ha="center", va="center", transform=axis.transAxes, **figures.SMALL)
                    axis.set(xticks=[], yticks=[])
                else:
                    seed, read = found[arm]
                    drawn = show_matrix(axis, read[key], read["mask"])
                    axis.set_xlabel(f"position {label}")
                axis.set_title(arm if row == 0 else "")
            axes[0][column].set_ylabel("query position" if column == 1 else "")
            axes[1][column].set_ylabel("query position" if column == 1 else "")
        bar = figure.colorbar(drawn, ax=list(axes[:, -1]), shrink=0.6, pad=0.04)
        bar.set_label("cosine")
        seeds_shown = {seed for seed, _ in found.values()}
        told = ", ".join(f"{arm} {seed}" for arm, (seed, _) in found.items())
        told = f"Seeds: {told}. " if len(seeds_shown) > 1 else f"Seed {seeds_shown.pop()}. "
        text = (
            "Cosine of one test image's queries with keys: above with its own, below with those of another image. A "
            "diagonal above and none below: what is there was recognised. The same diagonal below: a key says where it "
            f"is, whatever the picture shows. {told}"
        )
        marked = {"masked query: only these have a loss": {"color": "black", "linewidth": 4}}
        return figures.finish(figure, marked, text + caption), notes


def show_picture(axis: Axes, picture: np.ndarray, mask: np.ndarray | None, title: str) -> None:
    """A picture (3, S, S) uint8, its masked patches grey."""
    shown = picture.transpose(1, 2, 0).copy()
    if mask is not None:
        side = round(len(mask) ** 0.5)
        patch = shown.shape[0] // side
        shown[np.kron(mask.reshape(side, side), np.ones((patch, patch))).astype(bool)] = 128
    axis.imshow(shown, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def show_matrix(axis: Axes, matrix: np.ndarray, mask: np.ndarray) -> Any:
    """A matrix (N, N) of cosines with a strip on its left for the masked rows."""
    count = len(mask)
    drawn = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    strip = np.where(mask, 0.0, np.nan)[:, None]
    width = max(1.5, 0.03 * count)
    axis.imshow(strip, cmap="gray", vmin=0, vmax=1, extent=(-0.5 - 2 * width, -0.5 - width, count - 0.5, -0.5),
                aspect="auto", interpolation="nearest")  # fmt: skip
    axis.set(xlim=(-0.5 - 2 * width, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    side = round(count**0.5)
    axis.set(xticks=range(0, count, 2 * side), yticks=range(0, count, 2 * side))
    axis.spines[:].set_visible(False)
    return drawn


# ------------------------------------------------------------------------------------------------- main


def every_arm(folder: Path, known: Sequence[str]) -> list[str]:
    """The study's arms, and those of other studies that lie beside them: the factorial's cells are among them."""
    others = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return list(dict.fromkeys([*known, *others]))


def draw(view: results.View) -> dict[str, Figure]:
    """The figures of a study; the rules that only this paper has change its verdict."""
    runs, seeds = view.runs, view.args.seeds
    control = view.study.must_beat[-1]
    base, untrained = control.arm, control.baseline_arm
    view.summary |= judged(view.summary, runs, control)
    remarks = {
        row["arm"]: ", ".join(f"{len(row[what])} {what}" for what in ("diverged", "missing") if row[what])
        for row in view.summary["rows"]
    }
    caption = view.caption + "".join(f"{arm}: {text}. " for arm, text in remarks.items() if text)
    everything = results.read_runs(view.args.runs, every_arm(view.args.runs, view.study.arms), seeds)
    floors = [value for arm in runs for value in results.values(runs, arm, "loss_floor").values()]
    trained = {arm: by_seed for arm, by_seed in runs.items() if arm != untrained}
    lines = curve_panels(trained, min(floors, default=None))
    shown = list(dict.fromkeys([base, view.reference, view.study.pairs[0][0]]))
    pictures, unread = similarities(view.args.runs, shown, seeds, view.caption)
    view.summary["notes"] += unread
    return {
        "factorial": factorial(everything, base, untrained, caption),
        "curves": figures.whole_epochs(figures.curves(lines, list(trained), view.reference, caption)),
        "metrics": figures.dots(
            dot_panels(runs), view.study.arms, view.reference, remarks, "online weights", view.caption
        ),
    } | ({"similarity": pictures} if pictures else {})


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw, position_code)


if __name__ == "__main__":
    main()
