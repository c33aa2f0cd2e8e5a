"""Figures: differences, the slide, colours, faint curves, captions, and labels that do not overlap."""

import io
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from common.study import figures, plotting
from common.study.design import Arm, Design, Metric, MustBeat, Study
from common.study.names import short_names, without_setting
from common.study.results import View

quantise_png = figures.quantise_png  # the fixture of conftest.py replaces it
METRICS = {"knn": Metric("kNN accuracy", "%", 1, "higher"), "loss": Metric("loss", "", 2, "lower")}


def make_summary(by_arm, words, metric="knn", margin=5.0):
    """Return the parts of a summary that figures read. `by_arm`: values over seeds; all arms against base."""
    contrasts = []
    for index, word in enumerate(words):
        arm = list(by_arm)[1 + index]
        differences = [a - b for a, b in zip(by_arm[arm], by_arm["base"], strict=True)]
        mean, n = sum(differences) / len(differences), len(differences)
        low, high = (mean - 1, mean + 1) if n > 1 else (None, None)
        contrast = {"arm": arm, "reference": "base", "metric": metric, "primary": index == 0, "n": n, "verdict": word}
        contrasts.append(contrast | {"mean": mean, "low": low, "high": high})
    rows = [
        {"arm": arm, "metrics": {metric: {"values": {str(seed): value for seed, value in enumerate(values)}}}}
        for arm, values in by_arm.items()
    ]
    summary = {"contrasts": contrasts, "rows": rows, "primary_metric": metric, "margin": margin}
    summary |= {"metrics": {name: vars(item) for name, item in METRICS.items()}, "seeds": [0, 1, 2]}
    headline = "arm hurts: kNN accuracy 47.9 -> 11.9 % (untrained 14.5)."
    return summary | {"headline": headline, "paper": "SimSiam", "data": "glyphs (synthetic digits), resnet8"}


def texts(figure):
    """Return the visible texts of a figure with their bounding boxes."""
    figure.draw_without_rendering()
    artists = [*figure.texts, *itertools.chain(*(legend.get_texts() for legend in figure.legends))]
    for axis in figure.axes:
        artists += [*axis.texts, axis._left_title, axis.xaxis.label, axis.yaxis.label]
        artists += axis.get_legend().get_texts() if axis.get_legend() else []
        for ticks, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            artists += [tick.label1 for tick in ticks.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
    artists = [artist for artist in artists if artist.get_visible() and artist.get_text()]
    return [(artist.get_text(), artist.get_window_extent()) for artist in artists]


def overlapping(figure):
    """Return the pairs of texts whose boxes overlap by more than a pixel in both directions."""
    pairs = []
    for (text, a), (other, b) in itertools.combinations(texts(figure), 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 1 and height > 1:
            pairs.append((text, other))
    return pairs


# ------------------------------------------------------------------------------------------------- differences


def test_differences_show_zero_margin_seeds_and_verdicts():
    drawing = figures.differences(make_summary({"base": [60, 61, 63], "arm": [20, 22, 23]}, ["worse"]))
    (axis,) = drawing.figure.axes
    zero = [line for line in axis.lines if list(line.get_xdata()) == [0, 0]]
    assert zero and zero[0].get_color() == figures.BASE
    low, high = axis.get_xlim()
    assert low < -41 and high >= 7.5
    dots = next(line for line in axis.lines if len(line.get_xdata()) == 3)
    assert list(dots.get_xdata()) == [-40, -39, -40]
    bar = next(line for line in axis.lines if line.get_color() == figures.VERDICT_COLOURS["worse"])
    assert list(bar.get_xdata()) == pytest.approx([-40.67, -38.67], abs=0.01)
    shown = dict(texts(drawing.figure))
    assert {"worse", "better →", "arm"} <= set(shown)
    assert "difference in kNN accuracy (points), arm\xa0−\xa0base" in shown
    assert shown["better →"].x1 == pytest.approx(axis.get_window_extent().x1, abs=2)
    assert "margin" in drawing.caption and not any("margin" in text for text in shown)


@pytest.mark.parametrize(
    ("margin", "metric", "least"), [(5.0, "knn", 7.5), (None, "knn", 2.5), (0.01, "loss", 0.015), (None, "loss", 0)]
)
def test_an_axis_of_differences_never_turns_noise_into_an_effect(margin, metric, least):
    summary = make_summary({"base": [1.0, 2.0, 3.0], "arm": [1.001, 2.001, 3.001]}, ["no difference"], metric, margin)
    for contrast in summary["contrasts"]:
        contrast["low"], contrast["high"] = 0.0009, 0.0011
    low, high = figures.differences(summary).figure.axes[0].get_xlim()
    assert low <= -least and high >= least and low < 0 < high


def test_one_seed_and_no_seed_have_no_bar():
    summary = make_summary({"base": [60], "arm": [20], "other": [59]}, ["one seed", "one seed"])
    summary["rows"][2]["metrics"] = {}
    summary["contrasts"][1] |= {"mean": None, "low": None, "high": None, "n": 0, "verdict": "not run"}
    drawing = figures.differences(summary)
    assert {"one seed", "not run"} <= set(dict(texts(drawing.figure))) and "no interval" in drawing.caption
    assert not [line for line in drawing.figure.axes[0].lines if line.get_color() == figures.NO_VERDICT]


def test_contrasts_with_different_references_are_named_in_full():
    pairs = [("a@x", "base@x"), ("b@x", "base@x")]
    contrasts = [{"arm": arm, "reference": reference} for arm, reference in pairs]
    assert figures.contrast_labels(contrasts) == (["a", "b"], "arm − base (x)")
    contrasts.append({"arm": "base@x", "reference": "cross-entropy-alone@y"})
    labels, what = figures.contrast_labels(contrasts)
    assert labels == ["a − base (x)", "b − base (x)", "base@x\n− cross-entropy-alone@y"] and what == "arm − reference"


# ------------------------------------------------------------------------------------------------- slide


def curves_of(arms, ends=None, seeds=3, spread=0.1):
    """Return for every arm curves that end at `ends`, one per seed."""
    ends = ends or {arm: 10.0 * (1 + index) for index, arm in enumerate(arms)}
    return {
        arm: [([0, 1, 2], [10.0, ends[arm] / 2, ends[arm] + spread * seed]) for seed in range(seeds)] for arm in arms
    }


def test_names_have_no_setting_if_all_arms_share_it():
    assert short_names(["base@a", "arm@a"]) == ["base", "arm"]
    assert short_names(["base@a", "arm@b"]) == ["base@a", "arm@b"]
    assert short_names(["base", "arm@b"]) == ["base", "arm@b"]


def test_the_slide_is_16_to_9_with_large_text_and_at_most_five_contrasts(tmp_path, monkeypatch):
    monkeypatch.undo()  # full resolution
    arms = ["base", *(f"arm-{index}" for index in range(7))]
    summary = make_summary({arm: [60, 61, 63] for arm in arms}, ["no difference"] * 7)
    styles = figures.arm_styles(arms, [arms])
    panel = figures.Curves("kNN accuracy (%), glyphs10", curves_of(arms), {"chance": 10, "untrained": 11})
    drawing = figures.summary_slide(summary, panel, styles, arms)
    figures.save(drawing.figure, tmp_path, "slide")
    with Image.open(tmp_path / "slide.png") as image:
        assert image.mode == "P" and image.width * 9 == image.height * 16 and image.width >= 1280
    sizes = [text.get_fontsize() for text in drawing.figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))]
    assert min(sizes) >= 14
    shown = dict(texts(drawing.figure))
    assert "arm-4" in shown and "arm-5" not in shown and "Contrasts left out: 2" in drawing.caption
    assert "arm hurts: kNN accuracy 47.9 → 11.9 % (untrained 14.5)." in shown and overlapping(drawing.figure) == []
    dots = figures.Dots("accuracy (%)", {arm: [60, 61, 63] for arm in arms}, {"base": [10, 11, 12]})
    assert overlapping(figures.summary_slide(summary, dots, styles).figure) == []


def test_a_long_headline_has_smaller_letters():
    size, text = figures._headline("forward-only@vgg_s32-vgg_s hurts: accuracy 73.45 -> 60.00 %; " * 4)
    assert size < 20 and "→" in text and "->" not in text
    assert figures._headline("It hurts.") == (25, "It hurts.")


# ------------------------------------------------------------------------------------------------- styles


@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord", "bsa", "seqvcr"])
def test_an_arm_has_one_style_in_its_paper_and_arms_of_a_study_differ(paper):
    from common.study.design import load

    design = load(paper, "demo")
    studies = [study for study in design.studies if not study.sweep]
    styles = figures.arm_styles(list(design.by_name), [study.arms for study in studies])
    bases = {arm for arm in styles if arm.partition("@")[0] == "base"}
    assert {arm for arm, style in styles.items() if style["color"] == figures.BASE} == bases
    assert all(style == styles[without_setting(arm)] for arm, style in styles.items())
    for study in studies:
        names = {without_setting(arm) for arm in study.arms}
        assert len({str(styles[name]) for name in names}) == len(names), study.name
        if len(names) <= 8:
            assert len({styles[name]["color"] for name in names}) == len(names), study.name


def test_only_three_curves_of_a_panel_are_highlighted():
    arms = ["x", "y", "base", "arm", "z"]
    styles = figures.arm_styles(arms, [arms])
    drawing = figures.curves([figures.Curves("loss", curves_of(arms))], styles, ["base", "arm"])
    (axis,) = drawing.figure.axes
    clear = {line.get_color() for line in axis.lines if line.get_alpha() == 1}
    assert clear == {styles[arm]["color"] for arm in ("base", "arm", "x")} and "Faint" in drawing.caption
    legend = {text.get_text(): text.get_color() for text in drawing.figure.legends[0].get_texts()}
    assert list(legend)[:2] == ["base", "arm"] and legend["z"] == styles["z"]["color"]
    assert len(axis.collections) == 3  # no bands for faint arms
    few = figures.curves([figures.Curves("loss", curves_of(arms[:3]))], figures.arm_styles(arms[:3], []))
    assert "Faint" not in few.caption


def test_arms_of_primary_contrasts_are_more_important_than_their_references():
    study = Study("toy", "?", ["second:off", "base:off", "first:base", "third:base"], "knn", primary=3)
    view = View(Path("runs"), [0], study, {}, {}, "", {}, {})
    assert view.highlight == ["base", "second", "first", "off", "third"]


@pytest.mark.parametrize(("spread", "lines"), [(0.1, False), (10.0, True)])
def test_seeds_that_spread_are_lines_and_not_bands(spread, lines):
    values = curves_of(["base", "arm"], {"base": 50.0, "arm": 60.0}, spread=spread)
    drawing = figures.curves([figures.Curves("accuracy (%)", values)], figures.arm_styles(["base", "arm"], []))
    (axis,) = drawing.figure.axes
    assert (len(axis.collections), len(axis.lines)) == ((0, 8) if lines else (2, 2))
    assert ("thin line per seed" in drawing.caption) == lines


@pytest.mark.parametrize(("title", "span"), [("kNN accuracy (%)", 5), ("position R²", 0.1), ("cosine", 0.1)])
def test_axes_have_a_least_span(title, span):
    styles = figures.arm_styles(["base"], [])
    curve = figures.curves([figures.Curves(title, {"base": [([0, 1], [0.01, 0.02])]})], styles)
    low, high = curve.figure.axes[0].get_ylim()
    assert high - low >= span and (low >= 0 or "%" not in title)
    dots = figures.dots([figures.Dots(title, {"base": [0.01, 0.02]}, limits=(0, 100))], styles)
    low, high = dots.figure.axes[0].get_xlim()
    assert high - low >= span - 1e-9 and low == 0


def test_labels_and_titles_do_not_overlap():
    lines = {"chance": 10.0, "untrained": 10.5, "collapse": 10.6, "two\nlines": 11.0}
    title = "a long title of the accuracy in percent of all the images of a data set (%)"
    styles = figures.arm_styles(["base", "arm"], [])
    values = curves_of(["base", "arm"])
    curves = figures.curves([figures.Curves(title, values, lines)] * 4, styles)
    points = {arm: [value for _, (*_, value) in seeds] for arm, seeds in values.items()}
    dots = figures.dots([figures.Dots(title, points, lines=lines)] * 3, styles)
    for drawing in (curves, dots):
        assert overlapping(drawing.figure) == []
        shown = [text for text, _ in texts(drawing.figure)]
        assert shown.count("chance") == len(drawing.figure.axes)


# ------------------------------------------------------------------------------------------------- captions


def test_captions_are_in_the_summary_and_not_in_the_figures(tmp_path):
    for arm, accuracy in {"base": 60.0, "arm": 20.0}.items():
        for seed in range(3):
            folder = tmp_path / "runs" / arm / str(seed)
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps({"arguments": {"seed": seed}, "provenance": {}}))
            (folder / "metrics.json").write_text(json.dumps({"knn": accuracy + seed, "untrained": 10.0 + seed}))
    must_beat = [MustBeat("base", "untrained", "knn", "untrained")]
    study = Study("toy-x", "How much?", ["arm:base"], "knn", 1, must_beat, 5.0)
    design = Design("toy", "Toy", "demo", METRICS, [study], [Arm("base"), Arm("arm", "--x")], baselines=["untrained"])

    def draw(view):
        dots = [figures.Dots("kNN accuracy (%), toy", {"base": [60.0], "arm": [20.0]})]
        return {"metrics": figures.dots(dots, view.styles, caption="A sentence about the data.")}

    argv = ["toy-x", "--runs", str(tmp_path / "runs"), "--seeds", "0", "1", "2", "--results", str(tmp_path / "report")]
    plotting.main(argv, None, lambda scale, settings: design, lambda runs: "ten pictures", draw)
    summary = json.loads((tmp_path / "report/toy-x.json").read_text())
    assert list(summary["captions"]) == ["toy-x-differences", "toy-x-metrics"]
    assert summary["captions"]["toy-x-metrics"].endswith("A sentence about the data.")
    for name, caption in summary["captions"].items():
        svg = (tmp_path / f"report/{name}.svg").read_text()
        assert (tmp_path / f"report/{name}.png").exists()
        assert not any(sentence in svg for sentence in caption.split(". ") if len(sentence) > 12)


def test_a_row_of_dots_shows_only_the_arms_that_have_a_value_in_it():
    styles = {arm: {"color": "#000000"} for arm in ("base", "arm", "other")}
    pairs = [{"base": [1.0], "arm": [2.0]}, {"base": [1.0], "other": [3.0]}]
    panels = [figures.Dots(f"accuracy {pair} {metric}", values) for pair, values in enumerate(pairs) for metric in "ab"]
    axes = figures.dots(panels, styles, {"other": "diverged"}).figure.axes
    labels = [[label.get_text() for label in axis.get_yticklabels()] for axis in axes[::2]]
    assert labels == [["base", "arm", "other\ndiverged"], ["base", "other\ndiverged"]]


def test_figures_whose_coordinates_differ_in_the_last_digit_are_written_equally():
    first = b'<path clip-path="url(#p0123456789)" d="M 175.152803 438.646703"/>'
    second = b'<path clip-path="url(#pabcdef0123)" d="M 175.152802 438.646703"/>'
    expected = b'<path clip-path="url(#clip0)" d="M 175.152 438.646"/>'
    assert figures.normalise_svg(first) == figures.normalise_svg(second) == expected


def test_quantised_png_has_a_palette_and_the_same_colours():
    image = Image.new("RGB", (64, 64), "white")
    image.paste((213, 94, 0), (8, 8, 40, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    quantised = Image.open(io.BytesIO(quantise_png(buffer.getvalue())))
    assert quantised.mode == "P" and quantised.size == (64, 64)
    assert quantised.convert("RGB").tobytes() == image.tobytes()
