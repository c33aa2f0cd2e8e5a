"""Draw the figures of one ConMIM study and write its tables and finding.

    python conmim/plot.py conmim-asymmetry --scale demo --seeds 0 1 2

Reads metrics.json, train.jsonl and similarity.npz of the runs. Missing runs are left blank.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import NON_METHOD_FLAGS
from common.study import figures, plotting, results, statistics, tables
from common.study.analysis import TOO_WEAK, verdict_of
from common.study.names import in_setting, setting_of
from conmim.studies import METRICS, design

PRIMARY, ONLINE = "finetune_accuracy", "finetune_accuracy_online"
DISAGREE = "signs differ"  # verdict if EMA and online weights disagree in sign
KEYS = {"ema": ("ema", 0.0), "online": ("online", 0.0), "online, no\nstop-gradient": ("online", 1.0)}  # keys, leak
VIEWS = ("asymmetric", "basic")
Cell = tuple[str, int]  # views, index in KEYS


class Effect(NamedTuple):
    """A row of the right panel of the factorial figure. A simple effect holds the other factor fixed."""

    name: str
    weights: Mapping[Cell, float]
    simple: bool = False


def factorial_effects() -> list[Effect]:
    """Return the effects of the factorial: each main effect with its two simple effects, and the interactions."""

    def difference(cell: Cell, reference: Cell) -> dict[Cell, float]:
        return {cell: 1.0, reference: -1.0}

    def weighted_sum(
        first: Mapping[Cell, float], second: Mapping[Cell, float], weight_1: float, weight_2: float
    ) -> dict[Cell, float]:
        return {cell: weight_1 * first.get(cell, 0) + weight_2 * second.get(cell, 0) for cell in [*first, *second]}

    ema, online, no_stop_gradient = range(len(KEYS))
    asymmetric, basic = VIEWS
    keys_asymmetric, keys_basic = (difference((views, online), (views, ema)) for views in VIEWS)
    views_ema, views_online = (difference((basic, keys), (asymmetric, keys)) for keys in (ema, online))
    stop_asymmetric, stop_basic = (difference((views, no_stop_gradient), (views, online)) for views in VIEWS)
    return [
        Effect("keys: online − ema", weighted_sum(keys_asymmetric, keys_basic, 0.5, 0.5)),
        Effect("at asymmetric views", keys_asymmetric, simple=True),
        Effect("at basic views", keys_basic, simple=True),
        Effect("views: basic − asymmetric", weighted_sum(views_ema, views_online, 0.5, 0.5)),
        Effect("at ema keys", views_ema, simple=True),
        Effect("at online keys", views_online, simple=True),
        Effect("keys × views", weighted_sum(views_online, views_ema, 1.0, -1.0)),
        Effect("both: symmetric − base", difference((basic, online), (asymmetric, ema))),
        Effect("stop-gradient: without − with", weighted_sum(stop_asymmetric, stop_basic, 0.5, 0.5)),
        Effect("at asymmetric views", stop_asymmetric, simple=True),
        Effect("at basic views", stop_basic, simple=True),
        Effect("stop-gradient × views", weighted_sum(stop_basic, stop_asymmetric, 1.0, -1.0)),
    ]


def position_code(runs: list[dict[str, Any]]) -> str | None:
    """Return the remark on an arm whose position R² and cross-image top-1 are above 0.95 in every seed, else None."""
    is_code = all(run["position_r2"] > 0.95 and run["cross_top1"] > 0.95 for run in runs)
    return "has a position code for keys in every seed" if is_code else None


# ------------------------------------------------------------------------------------------------- runs


def describe(runs: results.Runs) -> str:
    """Describe data and recipe of the first pre-trained run, or else of the first run; "" if there is none."""
    existing = results.arm_arguments(runs)
    if not existing:
        return ""
    first = max(existing.values(), key=lambda arguments: arguments["epochs"] > 0)
    names = {"glyphs10-light": "glyphs (synthetic light digits)"}
    names |= {"mnist5k": "MNIST-5k", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
    names |= {"folder": f"images, {first['size']} px"}
    recipe = f"{first['network']}, {first['positions']} positions, {first['epochs']} epochs of batch {first['batch']}"
    return f"{names.get(first['data_set'], first['data_set'])}, {recipe}"


def cells(runs: results.Runs, base: str) -> dict[Cell, str]:
    """Return the arm of each cell of the factorial. An arm qualifies if it differs from `base` only in the factors."""
    ignored = {"keys", "views", "gradient_leak", "seed", "data_seed"} | NON_METHOD_FLAGS
    key_index = {setting: index for index, setting in enumerate(KEYS.values())}

    def other_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name not in ignored}

    by_arm = results.arm_arguments(runs)
    shared = other_arguments(by_arm.get(base, {}))
    arms: dict[Cell, str] = {}
    for arm, arguments in by_arm.items():
        if other_arguments(arguments) != shared:
            continue
        keys = (arguments["keys"], arguments["gradient_leak"])
        if keys in key_index:
            arms.setdefault((arguments["views"], key_index[keys]), arm)
    return arms


def seed_summary(
    runs: results.Runs, arms: Sequence[str], weights: Sequence[float], metric: str
) -> statistics.MeanInterval | None:
    """Return mean and 95 % interval, over seeds, of the weighted sum of a metric over `arms`.

    The sum is taken seed by seed, over the seeds that all arms have; None if there is no such seed.
    """
    values = [results.values(runs, arm, metric) for arm in arms]
    seeds = sorted(set.intersection(*map(set, values)))
    sums = [sum(weight * of_arm[seed] for weight, of_arm in zip(weights, values, strict=True)) for seed in seeds]
    return statistics.mean_interval(sums) if sums else None


# ------------------------------------------------------------------------------------------------- verdict


def difference_text(contrasts: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return label, difference and interval of the contrast on `metric`."""
    contrast = next(contrast for contrast in contrasts if contrast["metric"] == metric)
    if contrast["mean"] is None:
        return f"{METRICS[metric].label} {tables.DASH}"
    bounds = "" if contrast["low"] is None else f" ({tables.format_interval(contrast, vars(METRICS[metric]))})"
    return f"{METRICS[metric].label} {tables.format_number(contrast['mean'], vars(METRICS[metric]))}{bounds}"


def apply_paper_rules(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary after a rule of this paper, with the position diagnostics added to the notes.

    The verdicts "worse" and "better" require that EMA and online weights agree in sign.
    """
    notes, added = [], []
    for compared in summary["contrasts"]:
        arm, reference = compared["arm"], compared["reference"]
        contrasts = [
            contrast
            for contrast in summary["all_contrasts"]
            if contrast["arm"] == arm and contrast["reference"] == reference
        ]
        online = next(contrast for contrast in contrasts if contrast["metric"] == ONLINE)
        disagree = None not in (compared["mean"], online["mean"]) and compared["mean"] * online["mean"] < 0
        if disagree and compared["verdict"] in ("worse", "better"):
            compared["verdict"] = DISAGREE
        if not compared["primary"]:
            continue
        if disagree:
            sentence = (
                f"{arm}:{reference}: {difference_text(contrasts, PRIMARY)} with EMA weights and "
                f"{difference_text(contrasts, ONLINE).removeprefix(METRICS[ONLINE].label + ' ')} with online weights "
                "disagree in sign."
            )
            notes.append(sentence)
            added.append(sentence)
        diagnostics = "; ".join(difference_text(contrasts, name) for name in ("own_top1", "cross_top1", "position_r2"))
        sentence = f"Position diagnostics (they need no labels), {arm} minus {reference}: {diagnostics}."
        notes.append(sentence)
        if compared["verdict"] in (TOO_WEAK, DISAGREE):
            added.append(sentence)
    remarks = [f"{row['arm']} {row['remark']}" for row in summary["rows"] if row["remark"]]
    if remarks:
        notes.append(f"{'; '.join(remarks)}.")
    finding = tables.finding(summary) + added
    return summary | verdict_of(summary) | {"finding": finding, "notes": notes + summary["notes"]}


# ------------------------------------------------------------------------------------------------- figures


def draw_interval(axis: Axes, position: float, result: statistics.MeanInterval, horizontal: bool, **style: Any) -> None:
    """Draw the mean as a dot and the interval as a line, at `position` on the other axis."""
    bounds, fixed = [result.low, result.high], [position, position]
    if result.low is not None:
        x, y = (bounds, fixed) if horizontal else (fixed, bounds)
        axis.plot(x, y, color=style["color"], linewidth=1.6, solid_capstyle="butt", zorder=3)
    x, y = (result.mean, position) if horizontal else (position, result.mean)
    axis.plot(x, y, zorder=4, linestyle="", **style)


def interaction_panel(
    axis: Axes,
    runs: results.Runs,
    arms: Mapping[Cell, str],
    baselines: Mapping[str, Mapping[str, Any]],
    metric: str,
    styles: Mapping[str, Any],
) -> None:
    """Plot a metric against the keys, one line per setting of the views: means, 95 % intervals, faint dots for seeds.

    `baselines` maps arms to styles: each is a line with a grey band for its interval.
    """
    axis.set(xticks=range(len(KEYS)), xlim=(-0.35, len(KEYS) - 0.65), axisbelow=True)
    axis.set_xticklabels(list(KEYS), fontsize=9)
    axis.margins(y=0.08)
    axis.set_title(f"{METRICS[metric].title}, {results.first_arguments(runs)['data_set']}")
    axis.set_xlabel("keys from")
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    for baseline, style in baselines.items():
        result = seed_summary(runs, [baseline], [1], metric)
        if result:
            if result.low is not None:
                axis.axhspan(result.low, result.high, color=figures.GREY, alpha=0.15, linewidth=0)
            axis.axhline(result.mean, linewidth=1, **style)
    for views, shift in zip(VIEWS, (-0.06, 0.06), strict=True):
        means: dict[int, float] = {}
        colour = styles[views]["color"]
        for keys in range(len(KEYS)):
            arm = arms.get((views, keys), "")
            values = list(results.values(runs, arm, metric).values())
            result = seed_summary(runs, [arm], [1], metric)
            if result:
                means[keys] = result.mean
                x = [keys + 2.4 * shift] * len(values)
                axis.plot(x, values, "o", ms=3.5, mec="none", alpha=0.45, color=colour)
                draw_interval(axis, keys + shift, result, False, color=colour, marker="o", ms=6)
        for keys in means:
            if keys + 1 in means:  # no line across a missing cell
                axis.plot([keys + shift, keys + 1 + shift], [means[keys], means[keys + 1]], alpha=0.8, **styles[views])
    figures.widen(axis, "y", METRICS[metric].title)


def effects_panel(axis: Axes, runs: results.Runs, arms: Mapping[Cell, str]) -> None:
    """Plot the effects on fine-tuned accuracy with intervals. Simple effects are small, online weights are hollow."""
    rows = factorial_effects()
    axis.axvline(0, color=figures.GREY, linewidth=1)
    axis.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), axisbelow=True, xlabel="points")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.set_title("effects on fine-tuned accuracy")
    for label, row in zip(axis.set_yticklabels([row.name for row in rows]), rows, strict=True):
        label.set(fontsize=8.5 if row.simple else 10, color=figures.GREY if row.simple else figures.BASE)
    for y, row in enumerate(rows):
        style: dict[str, Any] = {"color": figures.BASE, "marker": "o", "ms": 6}
        if row.simple:
            style |= {"color": figures.GREY, "ms": 4}
        of_cells, weights = [arms.get(cell, "") for cell in row.weights], list(row.weights.values())
        ema = seed_summary(runs, of_cells, weights, PRIMARY)
        if ema:
            draw_interval(axis, y - 0.14, ema, True, **style)
        online = seed_summary(runs, of_cells, weights, ONLINE)
        if online:
            draw_interval(axis, y + 0.14, online, True, **style, mfc="white", mew=1.2)


def factorial_figure(runs: results.Runs, base: str, baselines: Sequence[str], caption: str) -> figures.Drawing:
    """Return the factorial of six cells: accuracy and position R² by keys and views, and the effects."""
    arms = cells(runs, base)
    lines = {
        name: {"color": figures.GREY, "linestyle": dashes} for name, dashes in zip(baselines, (":", "--"), strict=False)
    }
    styles = {
        "asymmetric": {"color": figures.BASE, "linestyle": "-"},
        "basic": {"color": figures.COLOURS[0], "linestyle": figures.DASHES[0]},
    }
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(12.4, 4.8), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
        for axis, metric in zip(axes, (PRIMARY, "position_r2"), strict=False):
            interaction_panel(axis, runs, arms, lines, metric, styles)
        effects_panel(axes[2], runs, arms)
        legend = {f"{views} views": style | {"marker": "o"} for views, style in styles.items()}
        legend |= {f"{name} (mean, interval)": style for name, style in lines.items()}
        text = "One training seed: no interval. "
        if any(len(by_seed) > 1 for by_seed in runs.values()):
            text = "Bars: 95 % intervals over training seeds (right: of paired differences, unadjusted); faint: seeds. "
        text += (
            "Right: EMA weights filled, online weights hollow; ×: interaction, the effect with basic views minus the "
            "effect with asymmetric views. With ema keys the stop-gradient has no effect (bit-identical weights). "
        )
        missing = [
            f"{views} views, keys {label}".replace("\n", " ")
            for views in VIEWS
            for keys, label in enumerate(KEYS)
            if (views, keys) not in arms
        ]
        if missing:
            text += f"Missing: {'; '.join(missing)}. "
        return figures.add_legend(figure, legend, text + caption)


def curve_panels(runs: results.Runs, minimum: float | None, data_set: str) -> list[figures.Curves]:
    """Return the panels of loss and position diagnostics over the epochs."""
    line = {} if minimum is None else {"minimum": minimum}
    panels = [figures.Curves(f"{METRICS['train_loss'].title}, {data_set}", results.series(runs, "loss"), line)]
    for name in ("position_r2", "own_top1", "cross_top1"):
        panels.append(figures.Curves(f"{METRICS[name].title}, {data_set}", results.series(runs, name)))
    return panels


def dot_panels(runs: results.Runs, data_set: str, chance: Mapping[str, float]) -> list[figures.Dots]:
    """Return the panels of final accuracies, with the online weights as hollow marks, and of position R².

    Lines show `chance` (in percent, by data set) and the accuracy of pixels.
    """
    pixels = [value for arm in runs for value in results.values(runs, arm, "pixel_accuracy").values()]
    panels = []
    for name in (PRIMARY, "linear_accuracy", "knn_accuracy"):
        title, lines = f"{METRICS[name].title}, {data_set}", {}
        if data_set in chance:
            lines["chance"] = chance[data_set]
        if name == PRIMARY and pixels:
            lines["1-NN on pixels"] = mean(pixels)
        ema, online = (results.values_by_arm(runs, key) for key in (name, f"{name}_online"))
        panels.append(figures.Dots(title, ema, online, lines, limits=(0, 100)))
    title = f"{METRICS['position_r2'].title}, {data_set}"
    panels.append(figures.Dots(title, results.values_by_arm(runs, "position_r2"), limits=(0, 1.02)))
    return panels


def read_similarity(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of similarity.npz, or None if the file is missing. Raises ValueError if it cannot be used."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("own", "other", "mask", "picture")}
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy raises many types for a damaged archive
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
    patches = len(arrays["mask"])
    side = round(patches**0.5)
    square = arrays["own"].shape == arrays["other"].shape == (patches, patches) and side * side == patches
    if not square or arrays["picture"].ndim != 3 or arrays["picture"].shape[2] % side:
        raise ValueError(f"{path} has arrays of unexpected shapes")
    return arrays


def similarity_figure(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], caption: str
) -> tuple[figures.Drawing | None, list[str]]:
    """Return the similarity matrices of one image, and one note per unreadable file.

    Each arm has one column, from its first seed with a readable file. The keys are those of the image itself in the
    first row and those of another image in the second.
    """
    shown: dict[str, tuple[int, dict[str, np.ndarray]]] = {}
    notes = []
    for arm in arms:
        for seed in seeds:
            try:
                arrays = read_similarity(folder / arm / str(seed) / "similarity.npz") if arm not in shown else None
            except ValueError:
                notes.append(f"{arm}, seed {seed}: similarity.npz cannot be used.")
                continue
            if arrays:
                shown[arm] = (seed, arrays)
    if not shown:
        return None, notes
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(2.0 + 2.9 * len(arms), 6.6), layout="constrained")
        axes = figure.subplots(2, 1 + len(arms), width_ratios=[0.62] + [1] * len(arms))
        _, first = next(iter(shown.values()))
        show_image(axes[0][0], first["picture"], None, "image")
        show_image(axes[1][0], first["picture"], first["mask"], "masked image\n(query side)")
        for column, arm in enumerate(arms, 1):
            for row, (name, label) in enumerate({"own": "the same image", "other": "another image"}.items()):
                axis = axes[row][column]
                if arm in shown:
                    _, arrays = shown[arm]
                    matrix = show_matrix(axis, arrays[name], arrays["mask"])
                    axis.set_xlabel(f"key position in {label}")
                else:
                    axis.text(0.5, 0.5, "no run", ha="center", va="center", transform=axis.transAxes, **figures.SMALL)
                    axis.set(xticks=[], yticks=[])
                axis.set_title(arm if row == 0 else "")
                axis.set_ylabel("query position" if column == 1 else "")
        bar = figure.colorbar(matrix, ax=list(axes[:, -1]), shrink=0.6, pad=0.04)
        bar.set_label("cosine")
        by_arm = {arm: seed for arm, (seed, _) in shown.items()}
        if len(set(by_arm.values())) > 1:
            seed_text = f"Seeds: {', '.join(f'{arm} {seed}' for arm, seed in by_arm.items())}. "
        else:
            seed_text = f"Seed {next(iter(by_arm.values()))}. "
        text = (
            "Cosine similarity of one test image's queries with its own keys (above) and the keys of another image "
            "(below). A diagonal only above: keys encode content. The same diagonal below: keys encode position, "
            f"independent of the image. {seed_text}"
        )
        legend = {"masked query: only these have a loss": {"color": "black", "linewidth": 4}}
        return figures.add_legend(figure, legend, text + caption), notes


def show_image(axis: Axes, image: np.ndarray, mask: np.ndarray | None, title: str) -> None:
    """Show an image (3, S, S) uint8 with its masked patches in grey."""
    pixels = image.transpose(1, 2, 0).copy()
    if mask is not None:
        side = round(len(mask) ** 0.5)
        patch = pixels.shape[0] // side
        pixels[np.kron(mask.reshape(side, side), np.ones((patch, patch))).astype(bool)] = 128
    axis.imshow(pixels, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def show_matrix(axis: Axes, matrix: np.ndarray, mask: np.ndarray) -> Any:
    """Show a matrix (N, N) of cosines with a strip on its left that marks the masked rows. Returns the image artist."""
    count = len(mask)
    artist = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    strip = np.where(mask, 0.0, np.nan)[:, None]
    width = max(1.5, 0.03 * count)
    extent = (-0.5 - 2 * width, -0.5 - width, count - 0.5, -0.5)
    axis.imshow(strip, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    axis.set(xlim=(-0.5 - 2 * width, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    side = round(count**0.5)
    axis.set(xticks=range(0, count, 2 * side), yticks=range(0, count, 2 * side))
    axis.spines[:].set_visible(False)
    return artist


# ------------------------------------------------------------------------------------------------- main


def all_arms(folder: Path, study_arms: Sequence[str]) -> list[str]:
    """Return the arms of the study and all other arms in `folder`, which may be further cells of the factorial."""
    others = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return list(dict.fromkeys([*study_arms, *others]))


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study by name."""
    runs, seeds = view.runs, view.seeds
    base = in_setting("base", setting_of(view.reference))
    baselines = list(dict.fromkeys(item.baseline_arm for item in view.study.must_beat))
    remarks = {
        row["arm"]: ", ".join(f"{len(row[name])} {name}" for name in ("diverged", "missing") if row[name])
        for row in view.summary["rows"]
    }
    caption = view.caption + "".join(f"{arm}: {text}. " for arm, text in remarks.items() if text)
    seeds_by_arm = dict.fromkeys(all_arms(view.folder, view.study.arms), seeds)
    runs_of_all_studies = results.read_runs(view.folder, seeds_by_arm, view.chance)
    minima = [value for arm in runs for value in results.values(runs, arm, "loss_minimum").values()]
    pretrained = {arm: by_seed for arm, by_seed in runs.items() if arm not in baselines}
    data_set = results.first_arguments(runs)["data_set"]
    styles = {arm: view.styles[arm] for arm in view.study.arms}
    curves = figures.curves(
        curve_panels(pretrained, min(minima, default=None), data_set),
        {arm: styles[arm] for arm in pretrained},
        view.highlight,
        caption,
    )
    dots = dot_panels(runs, data_set, view.chance[PRIMARY])
    drawn = {
        "curves": figures.integer_x_ticks(curves),
        "metrics": figures.dots(dots, styles, remarks, "online weights", view.caption),
        "summary": figures.summary_slide(view.summary, dots[0], styles, hollow="online weights"),
    }
    if not view.study.extra and runs_of_all_studies.get(base):
        drawn = {"factorial": factorial_figure(runs_of_all_studies, base, baselines, caption), **drawn}
    arms = [arm for arm in dict.fromkeys([base, view.reference, view.study.pairs[0][0]]) if arm in runs_of_all_studies]
    similarity, unreadable = similarity_figure(view.folder, arms, seeds, view.caption)
    if similarity:
        drawn["similarity"] = similarity
    view.summary["notes"] += unreadable
    return drawn


def main(argv: list[str] | None = None) -> None:
    plotting.main(argv, __doc__, design, describe, draw, position_code, apply_paper_rules)


if __name__ == "__main__":
    main()
