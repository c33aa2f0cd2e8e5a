"""The HTML page and README.md: overview, verdict words, legend, Holm's dagger, links, figures, phone width."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from common.study import analysis, page, tables

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="900pt" viewBox="0 0 9 3"><g id="a"/></svg>'
METRIC = {"label": "kNN accuracy", "unit": "%", "digits": 1, "better": "higher", "judged": True}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def contrast(word="worse", p=0.001, arm="arm", reference="base", **changes):
    values = {"mean": -40.0, "low": -45.0, "high": -35.0, "p": p, "n": 5, "seeds_needed": None}
    if word in ("one seed", "not run"):
        values |= {"low": None, "high": None, "p": None}
    names = {"arm": arm, "reference": reference, "metric": "knn", "primary": True, "verdict": word}
    return names | values | changes


def row(arm):
    knn = {"mean": 50.0, "sd": 1.0, "n": 5, "low": 48.0, "high": 52.0, "values": {"0": 50.0}}
    return {"arm": arm, "flags": "", "remark": None, "metrics": {"knn": knn}, "diverged": [], "missing": [], "seeds": 5}


def summary(*contrasts, **changes):
    contrasts = contrasts or (contrast(),)
    words = list(dict.fromkeys(item["verdict"] for item in contrasts))
    verdict = words[0] if len(words) == 1 else "; ".join(f"{item['arm']}: {item['verdict']}" for item in contrasts)
    arms = dict.fromkeys(name for item in contrasts for name in (item["arm"], item["reference"]))
    default = {
        "version": analysis.VERSION,
        "paper": "Toy",
        "scale": "demo",
        "question": "What does it do?",
        "data": "ten pictures",
    }
    default |= {"published": "67.7 with, 0.1 without (table 1; ImageNet)", "reproduce": "make toy", "margin": 5.0}
    default |= {"primary_metric": "knn", "metrics": {"knn": METRIC}, "seeds": [0, 1, 2, 3, 4], "baselines": []}
    default |= {"contrasts": list(contrasts), "all_contrasts": [], "rows": [row(arm) for arm in arms], "notes": []}
    default |= {"provenance": {"commit": "c"}, "verdict": verdict, "has_finding": True, "not_run": []}
    default |= {"remark": "", "captions": {}, "calibration": {}, "second_metric": None, "seed_draws": "weights"}
    default |= {"headline": "It hurts: 50.0 -> 10.0 %.", "finding": ["Accuracy falls by 40.0.", "Third.", "Fourth."]}
    return default | changes


def write(folder, studies, **options):
    """Write the summaries (name -> dictionary, text or None for a missing file) and the page. Return it parsed."""
    folder.mkdir(exist_ok=True)
    for name, content in studies.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content | {"study": name})
            (folder / f"{name}.json").write_text(text)
    lines = page.write_pages(folder, "demo", list(studies), options.get("extras", []), "make {} SCALE=demo")
    return Page((folder / "index.html").read_text()), lines


class Page(HTMLParser):
    """Collect ids, links, tags and verdicts of a page. Fails if tags are not properly nested and closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.ids, self.links, self.tags, self.words = text, [], [], [], set(), []
        self.feed(text)
        assert self.open == []
        legend = re.search(r'<p class="legend">(.*?)</p>', text, re.DOTALL)[1]
        self.legend = html.unescape(re.sub("<.*?>", "", legend))
        self.overview = re.search(r'<table class="overview">.*?</table>', text, re.DOTALL)[0]

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
            if name == "class" and value.startswith("verdict "):
                self.words.append([value.removeprefix("verdict "), ""])

    def handle_data(self, data):
        if self.words and self.open[-1:] == ["span"] and not self.words[-1][1]:
            self.words[-1][1] = data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


EVERY_WORD = {f"toy-{index}": summary(contrast(word)) for index, word in enumerate(tables.VERDICT_COLOURS)}


def test_each_verdict_has_its_colour_and_the_legend_names_it_in_at_most_90_words(tmp_path):
    weak = contrast("higher", p=0.9, arm="weak")
    parsed, _ = write(tmp_path, EVERY_WORD | {"toy-weak": summary(weak), "toy-gone": None})
    assert {word for _, word in parsed.words} >= {*tables.VERDICT_COLOURS, "higher†"}
    for name, word in parsed.words:
        assert name == word.rstrip("†").replace(" ", "-")
        assert f".verdict.{name} {{ background: {tables.VERDICT_COLOURS[word.rstrip('†')]};" in parsed.text
        assert word.rstrip("†") in parsed.legend
    assert "†" in parsed.legend
    assert len(parsed.legend.split()) <= 90
    few, _ = write(tmp_path / "few", {"toy-arm": summary()})
    assert "worse" in few.legend and not any(text in few.legend for text in ("better", "unclear", "†"))


def luminance(colour):
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_text_of_a_verdict_is_readable_on_its_colour():
    rules = re.findall(r"background: (#\w{6}); color: (#\w{3});", page.verdict_styles())
    assert len(rules) == len(tables.VERDICT_COLOURS)
    for background, text in rules:
        dark, light = sorted([luminance(background), luminance("#" + text[1:] * 2)])
        assert (light + 0.05) / (dark + 0.05) > 4.4, (background, text)


def test_holm_over_the_primary_contrasts_of_the_page_decides_the_dagger(tmp_path):
    """Four tests: 0.001 < 0.05/4 survives, 0.02 > 0.05/3 does not, and no larger p-value after it."""
    studies = {
        "toy-a": summary(contrast(p=0.001), contrast("better", p=0.02, arm="second")),
        "toy-b": summary(contrast("no difference", p=0.04)),
        "toy-c": summary(contrast("unclear", p=0.3)),
        "toy-d": summary(contrast("too weak to test", p=0.0001)),  # not in the family
        "toy-e": summary(contrast(p=0.03, primary=False), contrast("one seed", arm="x"), verdict="one seed"),
    }
    assert page.daggers(studies) == {("toy-a", "second", "base")}
    parsed, lines = write(tmp_path, studies)
    assert [word for _, word in parsed.words if "†" in word] == ["better†"] * 2  # overview and section
    alone = {"toy-a": studies["toy-a"]}
    assert page.daggers(alone) == set()
    assert "better†" in page.readme(tmp_path, "index", "demo", list(studies), "make {}")
    assert lines[2] == "toy-c: unclear. It hurts: 50.0 → 10.0 %."


def rates(third, triple):
    """A study of learning rates: its primary contrast at base's rate, and the same contrast at the two others."""
    contrasts = [contrast()]
    for rate, word in (("third", third), ("triple", triple)):
        contrasts.append(contrast(word, arm=f"arm@{rate}", reference=f"base@{rate}", primary=False))
    return summary(*contrasts, all_contrasts=contrasts)


@pytest.mark.parametrize(("triple", "shown"), [("better", "worse, depends on the learning rate"), ("unclear", "worse")])
def test_a_verdict_that_another_rate_reverses_says_so(tmp_path, triple, shown):
    parsed, _ = write(tmp_path, {"toy-a": summary(), "toy-rates": rates("worse", triple), "other-a": summary()})
    assert [word for _, word in parsed.words if "worse" in word][1] == shown  # the first is the legend's
    assert f"| {shown} |" in page.readme(tmp_path, "index", "demo", ["toy-a"], "make {}")
    assert page.DEPENDS_ON_RATE not in page.readme(tmp_path, "index", "demo", ["other-a"], "make {}")


def test_the_overview_has_a_row_per_study_grouped_by_paper(tmp_path):
    studies = {"toy-a": summary(), "toy-b": None, "other-c": summary(paper="Other & Co"), "other-d": "{"}
    parsed, lines = write(tmp_path, studies)
    rows = re.findall("<tr.*?</tr>", parsed.overview, re.DOTALL)[1:]
    cells = [re.sub("<.*?>", "", row) for row in rows]
    assert cells[0] == "Toy" and cells[3] == "Other &amp; Co" and len(rows) == 6
    assert cells[1].startswith("toy-aIt hurts: 50.0 → 10.0 %.worse-40.0 points (-45.0 to -35.0), n\u00a0=\u00a05")
    assert cells[1].endswith("67.7 with, 0.1 without")  # the remark in brackets is in the section only
    assert "(table 1; ImageNet)" in parsed.text and "not run" in cells[2] and "cannot be read" in cells[5]
    assert "4 studies, 2 run, 2 with a finding" in parsed.text
    assert "Run it: <code>make toy-b SCALE=demo</code>" in parsed.text and lines[-1] == "not run yet: 1 of 4 studies"
    readme = page.readme(tmp_path, "index", "demo", list(studies), "make {} SCALE=demo")
    order = [
        readme.index(text) for text in ("| **Toy**", "[toy-a](#toy-a)", "| **Other & Co**", "## toy-a", "## other-d")
    ]
    assert order == sorted(order) and "`make toy-b SCALE=demo`" in readme


def calibration(**results):
    """A summary of a calibration: arm -> result."""
    return summary(expected=dict.fromkeys(results, "worse"), calibration=results)


def test_the_page_counts_false_alarms_and_known_effects(tmp_path):
    studies = {
        "toy-base-again": summary(contrast("no difference")),
        "other-base-again": summary(contrast("worse")),
        "third-base-again": summary(contrast("unclear")),
        "fourth-base-again": summary(contrast("not run")),  # no test
        "toy-known": calibration(a="reproduced", b="reversed", c="not reproduced", d="unclear", e="not run"),
        "toy-more": summary(),  # an extra without expected results
    }
    sentence = "A/A tests: 1 of 3 gave a false difference (1 no difference, 1 unclear). "
    sentence += "Known effects: 1 reproduced, 1 reversed, 1 not reproduced, 1 unclear."
    for name, content in studies.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"study": name}))
    parsed, _ = write(tmp_path, {"toy-a": summary()}, extras=[*studies, "toy-gone"])
    assert f"1 study, 1 run, 1 with a finding. {sentence} Published values" in parsed.text
    assert sentence in (tmp_path / "extras.html").read_text()
    assert page.calibration_sentence(tmp_path, list(studies)) == sentence
    only_equal = page.calibration_sentence(tmp_path, ["other-base-again", "toy-more"])
    assert only_equal == "A/A tests: 1 of 1 gave a false difference."
    assert page.calibration_sentence(tmp_path, ["toy-more", "fourth-base-again", "toy-gone"]) == ""
    readme = page.readme(tmp_path, "index", "demo", ["toy-a"], "make {}", sentence)
    assert f"1 with a finding. {sentence} As an HTML page" in readme
    assert "A/A" not in page.readme(tmp_path, "index", "demo", ["toy-a"], "make {}")


def test_many_data_digests_are_counted_and_not_listed(tmp_path):
    digests = [str(seed) * 32 for seed in range(10, 20)]
    parsed, _ = write(tmp_path, {"toy-a": summary(provenance={"data": digests, "device": ["cpu", "cuda"]})})
    assert "data: 10 different; device: cpu, cuda" in parsed.text


def test_the_bar_shows_margin_zero_interval_and_mean_on_the_scale_of_its_paper(tmp_path):
    small = contrast("better", mean=10.0, low=0.0, high=20.0, seeds_needed=31)
    studies = {"toy-a": summary(), "toy-b": summary(small, margin=None), "toy-c": summary(contrast("one seed"))}
    parsed, _ = write(tmp_path, studies)
    first, second, third = re.findall(r'<svg class="bar.*?</svg>', parsed.overview)
    x = [float(value) for value in re.findall(r'(?:x|x1|x2|cx)="([\d.]+)"', first)]
    margin, zero, zero_again, low, high, mean = x[0], *x[3:]
    assert low == 6 and zero == zero_again == 100 and [high, mean] == [26.9, 16.4]  # 45 points are 94 units
    assert margin == pytest.approx(100 - 94 * 5 / 45, abs=0.1) and 'class="bar worse"' in first
    assert "margin" not in second and 'x1="100.0" x2="141.8"' in second and 'class="bar better"' in second
    assert (
        "interval" not in third and "circle" in third and "half-width = margin at n\u00a0=\u00a031" in parsed.overview
    )


def test_a_summary_of_another_version_is_named_and_not_shown(tmp_path):
    parsed, lines = write(tmp_path, {"toy-a": summary(version=2)})
    sentence = "toy-a.json was written by another version of this project"
    assert sentence in parsed.overview and "It hurts" not in parsed.text
    assert lines == [f"toy-a: {sentence}"]


def test_anchors_resolve_and_links_point_to_files(tmp_path):
    for name in ("simsiam-stop-gradient-curves.png", "simsiam-stop-gradient-differences.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "simsiam-stop-gradient.csv").write_text("")
    (tmp_path / "toy-a-curves.svg").write_text(SVG)  # without a PNG
    (tmp_path / "toy-a-x.svg").write_text(SVG)
    (tmp_path / "toy-more.json").write_text(json.dumps(summary() | {"study": "toy-more"}))
    extras = ["toy-more", "toy-gone"]
    parsed, _ = write(tmp_path, {"simsiam-stop-gradient": summary(), "toy-a": summary()}, extras=extras)
    extra = Page((tmp_path / "extras.html").read_text())
    for each in (parsed, extra):
        assert len(each.ids) == len(set(each.ids)) and not each.tags & {"script", "link", "iframe"}
        for link in each.links:
            if link.startswith("#"):
                assert link[1:] in each.ids
            elif not link.startswith("data:"):
                assert (tmp_path / link).resolve().is_file(), link
    assert {"#toy-a", "#simsiam-stop-gradient", "extras.html", "simsiam-stop-gradient.csv"} <= set(parsed.links)
    assert {"toy-a.json", "simsiam-stop-gradient-curves.png"} <= set(parsed.links)
    assert any(link.endswith("/simsiam/train.py") for link in parsed.links)
    assert any(link.endswith("/simsiam/studies.py") for link in parsed.links)
    assert not any("toy/" in link or link in ("toy-a.csv", "toy-a-curves.png") for link in parsed.links)
    assert "toy-more" in extra.ids and "toy-more" not in parsed.ids and "index.html" in extra.links
    assert "toy-gone" not in extra.text  # an extra without runs is omitted
    assert {"toy-a-curves-a", "toy-a-x-a"} <= set(parsed.ids)
    readme = page.readme(tmp_path, "index", "demo", ["simsiam-stop-gradient"], "make {}")
    for link in re.findall(r"\]\(([^)]*)\)", readme):
        assert link == "#simsiam-stop-gradient" or (tmp_path / link).resolve().is_file(), link


def test_differences_summary_and_curves_come_first_and_the_rest_is_folded(tmp_path):
    for name in ("a-metrics", "curves", "differences", "summary"):
        (tmp_path / f"toy-a-{name}.png").write_bytes(PNG)
    for name in ("b-entropy", "b-metrics"):
        (tmp_path / f"toy-{name}.png").write_bytes(PNG)
    captions = {"toy-a-curves": "Mean of <5> seeds."}
    parsed, _ = write(tmp_path, {"toy-a": summary(captions=captions), "toy-b": summary()})
    first, second = parsed.text.split("<section")[1:]
    shown, folded = first.split("<details>")
    assert re.findall('alt="(.*?)"', shown) == ["toy-a-differences", "toy-a-summary", "toy-a-curves"]
    assert re.findall('alt="(.*?)"', folded) == ["toy-a-a-metrics"] and "<table" in folded and "<table" not in shown
    assert re.search("Mean of &lt;5&gt; seeds.*</figcaption>", shown)
    assert re.findall('alt="(.*?)"', second.split("<details>")[0]) == ["toy-b-metrics"]
    assert "It hurts" in shown and "Accuracy falls" in shown and "Third" not in shown and "Third. Fourth." in folded
    readme = page.readme(tmp_path, "index", "demo", ["toy-a"], "make {}")
    assert re.findall(r"!\[toy-a-(.*?)\]", readme) == ["differences", "summary", "curves", "a-metrics"]
    assert "toy-a-curves.png)\n\nMean of <5> seeds.\n" in readme
    assert readme.index("toy-a-curves.png") < readme.index("<details>") < readme.index("toy-a-a-metrics.png")


def test_the_remark_on_a_second_metric_follows_the_headline(tmp_path):
    parsed, _ = write(tmp_path, {"toy-a": summary(remark="Second metric: 1 -> 2.")})
    readme = page.readme(tmp_path, "index", "demo", ["toy-a"], "make {}")
    assert "Second metric: 1 → 2." in parsed.text and "** Second metric: 1 → 2.\n" in readme


def test_a_figure_belongs_to_the_longest_matching_study(tmp_path):
    (tmp_path / "toy-arm-width-dots.png").write_bytes(PNG)
    figures = page.find_figures(tmp_path, ["toy-arm", "toy-arm-width"])
    assert figures["toy-arm"] == [] and len(figures["toy-arm-width"]) == 1


def test_each_setting_has_separate_tables(tmp_path):
    contrasts = [contrast(arm="on@a", reference="off@a"), contrast(arm="on@b", reference="off@b")]
    parsed, _ = write(tmp_path, {"toy-a": summary(*contrasts), "toy-b": summary()})
    first, second = parsed.text.split("<section")[1:]
    assert first.count("<h3>") == 2 and first.count("<table") == 4
    assert "<h3>" not in second and second.count("<table") == 2
    assert "on − off (a): " in parsed.overview and "arm − base: " not in parsed.overview


def test_a_robustness_verdict_is_shown_beside_the_words(tmp_path):
    parsed, _ = write(tmp_path, {"toy-a": summary(verdict="holds at all three rates: arm:base"), "toy-b": summary()})
    assert parsed.overview.count("holds at all three rates: arm:base") == 1
    assert parsed.overview.count(">worse</span>") == 2


def test_names_and_texts_are_escaped(tmp_path):
    evil = "<script>alert(1)</script> & <b>x</b>"
    arms = contrast(arm="<i>arm</i>"), contrast(arm="other", reference="<i>arm</i>")
    texts = dict.fromkeys(("question", "headline", "published", "data", "paper", "reproduce"), evil)
    parsed, _ = write(
        tmp_path, {"toy-a": summary(*arms, notes=[evil], finding=[evil], **texts), "toy-b": summary(headline=evil)}
    )
    assert not parsed.tags & {"script", "b", "i"} and "&lt;script&gt;" in parsed.text
    page.write_page(tmp_path, "index", "A < B", ["toy-a"], "make <b>")
    text = (tmp_path / "index.html").read_text()
    assert "A < B" not in text and text.count("A &lt; B") == 2 and text.count("<!DOCTYPE") == 1


def test_the_command_line_writes_the_page_and_prints_a_line_per_study(tmp_path, capsys):
    (tmp_path / "toy-a.json").write_text(json.dumps(summary()))
    page.main(["--results", str(tmp_path), "--scale", "demo", "--studies", "toy-a", "toy-b", "--command", "make {}"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "toy-a: worse. It hurts: 50.0 → 10.0 %." and printed[-1].endswith("index.html")
    assert len(printed) == 3


@pytest.mark.parametrize("names", [["../etc"], ["a", "a"], ["A b"]])
def test_an_invalid_study_name_exits_with_one_line(tmp_path, names, capsys):
    with pytest.raises(SystemExit) as end:
        page.main(["--results", str(tmp_path), "--scale", "t", "--studies", *names])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "index.html").exists()


def overflow(folder, source):
    """Return by how many pixels a page is wider than a browser frame of 390 pixels. All <details> are open."""
    script = "<script>onload = () => { const root = document.documentElement; "
    script += "parent.postMessage(root.scrollWidth - root.clientWidth, '*') }</script>"
    (folder / "copy.html").write_text(
        source.replace("<details>", "<details open>").replace("</body>", script + "</body>")
    )
    frame = folder / "frame.html"  # headless windows are at least 500 pixels wide, frames are not
    frame.write_text(
        "<title>none</title><script>onmessage = event => document.title = 'overflow ' + event.data</script>"
        '<iframe src="copy.html" width="390" height="800" style="border: 0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", frame.as_uri()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return int(re.search(r"<title>overflow (\d+)</title>", output)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to measure the page at 390 pixels")
def test_the_page_fits_on_a_phone(tmp_path):
    (tmp_path / "toy-0-curves.png").write_bytes(PNG)
    (tmp_path / "toy-1-curves.svg").write_text(SVG)
    arm = "a-very-long-name-of-an-arm-without-any-space@architecture_of_teacher-architecture_of_student"
    long = summary(contrast(arm=arm), contrast("better", arm="x"), headline=f"{arm}: hurts.", verdict=f"{arm}: worse")
    many = long | {"metrics": {f"m{index}": METRIC for index in range(12)} | {"knn": METRIC}}
    studies = EVERY_WORD | {"toy-long": many, "toy-gone": None}
    parsed, _ = write(tmp_path, studies)
    assert overflow(tmp_path, parsed.text) == 0
    assert overflow(tmp_path, parsed.text.replace(page.STYLE, "")) > 0  # the measurement can fail


def test_the_table_of_the_readme_names_the_contrast_of_each_verdict_if_they_differ(tmp_path):
    studies = {
        "toy-a": summary(contrast("worse", arm="x"), contrast("no difference", arm="y")),
        "toy-b": summary(contrast("worse", arm="x"), contrast("worse", arm="y")),
    }
    write(tmp_path, studies)
    cells = [line.split(" | ")[-1] for line in page.results_table(tmp_path, list(studies), "README.md").split("\n")[2:]]
    assert cells == ["x − base: worse; y − base: no difference |", "worse |"]


def test_only_a_study_that_is_too_weak_to_test_shows_its_remark_in_the_overviews(tmp_path):
    remark = {"remark": "Descriptive: loss of arm: 0.5 -> 0.1."}
    studies = {"toy-a": summary(contrast("too weak to test"), **remark), "toy-b": summary(**remark)}
    parsed, _ = write(tmp_path, studies)
    texts = (parsed.overview, page.results_table(tmp_path, list(studies), "README.md"))
    assert [text.count("loss of arm: 0.5 → 0.1.") for text in texts] == [1, 1]
