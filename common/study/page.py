"""Write the studies of a results folder as self-contained HTML: index.html, and extras.html for the extras.

    python -m common.study.page --results runs/demo/report --scale demo --studies simsiam-stop-gradient ...

Reads <study>.json and <study>-*.svg, or .png if there is no .svg. A main study without a JSON file is shown as
not run; an extra without one is omitted. Verdicts come from the JSON files. The page adds only two marks: Holm's
dagger, and "depends on the learning rate" where the verdict is the opposite at another learning rate.
"""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.cli import Parser, fail
from common.files import read_json, write_text
from common.study import analysis, sweeps, tables
from common.study.figures import GREY
from common.study.names import contrast_name
from common.study.statistics import holm

Summary = Mapping[str, Any]
Marks = Mapping[tuple[str, str, str], str]  # (study, arm, reference) -> text after the verdict
ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "index": "Ablation studies",
    "extras": "Calibration, robustness, curves and other extras",
}  # file name -> title
RESOLVED = ("worse", "better", "higher", "lower")  # verdicts that Holm's correction can put in doubt
TESTED = (*RESOLVED, "no difference", "unclear")
LEGEND = {  # verdicts -> what they mean
    ("no difference",): "interval inside the margin",
    ("worse", "better"): "interval excludes zero, not inside the margin",
    ("higher", "lower"): "the same, no better side",
    ("signs differ",): "two metrics disagree in sign",
    ("unclear",): "none of these",
    ("too weak to test",): "reference does not clearly beat its baseline",
    ("no baseline", "one seed", "not run"): "no test possible",
}
CHANGE = "a → b: reference → arm."
BARS = f"{CHANGE} Bar: arm − reference, 95 % interval over n seeds; band: margin; "
BARS += "one scale per paper and metric."
DIFFERENCES = f"{CHANGE} Difference: arm − reference, 95 % interval over n seeds."
DAGGER = "†: does not survive Holm's correction over this page"
DEPENDS_ON_RATE = "depends on the learning rate"
NOT_RUN = "Not run yet"
FIRST_FIGURES = ("differences", "summary", "curves")  # shown in this order; the others are folded
FALLBACK_FIGURES = ("sweep", "metrics", "")  # the first that exists is shown if there is none of FIRST_FIGURES
STYLE = """
:root { color-scheme: light dark; --text: #1d1d1f; --soft: #5c5c61; --line: #d9d9de; --back: #fff; --card: #f6f6f8;
  --link: #0b57d0; --band: #0072b226; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --soft: #a9a9b0; --line: #3a3a40; --back: #16171a;
  --card: #202126; --link: #8ab4f8; --band: #56b4e940; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 74rem;
  margin: auto; padding: 1rem; overflow-wrap: anywhere; }
a { color: var(--link); } h1, h2 { line-height: 1.2; } h1 { margin: .5rem 0; } p { margin: .5rem 0; }
h2 { margin: 0; font-size: 1.3rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.5rem; }
section > *, details > * { max-width: 56rem; } section > details, .wide { max-width: none; }
small, .small { line-height: 1.35; font-size: .82rem; color: var(--soft); }
code { background: var(--card); padding: .1rem .3rem; }
.legend { font-size: .85rem; color: var(--soft); line-height: 1.9; }
.verdict { display: inline-block; border-radius: .3rem; padding: 0 .5rem; font-size: .85rem; font-weight: 600;
  line-height: 1.5rem; background: #aaa; color: #000; overflow-wrap: normal; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; }
.overview { width: 100%; font-size: .95rem; }
.overview th, .overview td { padding: .6rem 1rem .6rem 0; border-bottom: 1px solid var(--line); }
.overview thead th { font-size: .82rem; color: var(--soft); font-weight: 400; padding: .2rem 1rem .2rem 0; }
.overview .paper th { font-size: 1.05rem; padding-top: 1.4rem; border-bottom: 2px solid var(--text); }
.overview td:first-child { width: 11rem; } .overview td:nth-child(3) { width: 23rem; }
.overview td:last-child { width: 13rem; padding-right: 0; }
.contrast { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem .8rem; margin-bottom: .3rem; }
.contrast small { flex-basis: 100%; line-height: 1.3; }
.bar { width: 180px; height: 24px; flex: none; color: #aaa; }
.bar * { vector-effect: non-scaling-stroke; } .bar .axis { stroke: var(--line); } .bar .zero { stroke: var(--text); }
.bar .margin { fill: var(--band); } .bar .interval { stroke: currentColor; stroke-width: 4; }
.bar circle { fill: currentColor; stroke: var(--back); stroke-width: 1.5; }
.data { font-size: .82rem; } .data th, .data td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
.short { white-space: nowrap; } .wide { overflow-x: auto; } .data td:last-child { min-width: 10rem; }
.card { background: #fff; border-radius: .4rem; padding: .4rem; overflow-x: auto; }
.card a, .card svg, .card img { display: block; }
.card svg, .card img { max-width: 100%; height: auto; }
figure { margin: 1.2rem 0; } figcaption { font-size: .82rem; color: var(--soft); margin-top: .3rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--link); }
@media (max-width: 44rem) {
  .card svg, .card img { max-width: none; width: 44rem; }
  body { padding: .7rem; } h1 { font-size: 1.5rem; }
  .overview, .overview tbody, .overview tr, .overview td, .overview th { display: block; width: auto !important; }
  .overview thead { display: none; } .overview td, .overview .paper th { border: 0; padding: .15rem 0; }
  .overview tr { background: var(--card); border-radius: .6rem; padding: .6rem .8rem; margin: .6rem 0; }
  .overview .paper { background: none; padding: 0; margin: 1.4rem 0 0; }
  .overview td:first-child { font-weight: 600; } .overview td:last-child::before { content: "paper: "; }
}
@media print { figure, table { break-inside: avoid; } body { max-width: none; } }
"""


def css_class(verdict: str) -> str:
    """Return the CSS class of a verdict."""
    return verdict.replace(" ", "-") if verdict in tables.VERDICT_COLOURS else "other"


def verdict_styles() -> str:
    """Return the CSS rules of the verdicts: background with readable text, and the colour of the bar."""
    rules = []
    for verdict, colour in tables.VERDICT_COLOURS.items():
        text = "#fff" if colour in ("#0072B2", "#7B4FA3", GREY) else "#000"
        rules.append(f".verdict.{css_class(verdict)} {{ background: {colour}; color: {text}; }}")
        rules.append(f".bar.{css_class(verdict)} {{ color: {colour}; }}")
    return "\n".join(rules)


def read_summary(folder: Path, study: str) -> Summary | str:
    """Return a study's summary, or a sentence that says why it cannot be shown."""
    try:
        summary = dict(read_json(folder / f"{study}.json"))
    except FileNotFoundError:
        return NOT_RUN
    except (ValueError, TypeError):
        return f"{study}.json cannot be read"
    if summary.get("version") != analysis.VERSION:
        return f"{study}.json was written by another version of this project"
    return summary


def find_figures(folder: Path, studies: Sequence[str]) -> dict[str, list[Path]]:
    """Return the figures <study>-*.svg of each study, or .png if there is no .svg, in the order of the page.

    If several study names are prefixes of a file name, the longest one gets the figure.
    """
    names = [*studies, *(path.stem for path in folder.glob("*.json"))]
    result: dict[str, list[Path]] = {study: [] for study in names}
    by_stem = {path.stem: path for extension in ("png", "svg") for path in folder.glob(f"*.{extension}")}
    for stem, path in sorted(by_stem.items()):
        matches = [study for study in result if stem == study or stem.startswith(f"{study}-")]
        if matches:
            result[max(matches, key=len)].append(path)
    order = (*FIRST_FIGURES, *FALLBACK_FIGURES)
    for study, paths in result.items():
        suffixes = {path: path.stem.removeprefix(study)[1:] for path in paths}
        paths.sort(key=lambda path: order.index(suffixes[path]) if suffixes[path] in order else len(order))
    return result


def split_figures(study: str, figures: Sequence[Path]) -> tuple[Sequence[Path], Sequence[Path]]:
    """Return the figures of a study that are shown and those that are folded."""
    count = sum(path.stem.removeprefix(f"{study}-") in FIRST_FIGURES for path in figures) or 1
    return figures[:count], figures[count:]


def sentences(summary: Summary) -> list[str]:
    """Return the headline and the sentences of the finding that add to it."""
    headline = summary["headline"]
    added = [text for text in summary["finding"] if text.rstrip(".").removeprefix("Too weak to test: ") not in headline]
    return [text.replace(" -> ", " → ") for text in (headline, *added)]


def result_sentence(summary: Summary) -> str:
    """Return the headline, and if the study is too weak to test also what else was seen."""
    remark = summary["remark"] if summary["verdict"] == analysis.TOO_WEAK else ""
    return f"{sentences(summary)[0]} {remark.replace(' -> ', ' → ')}".strip()


def daggers(summaries: Mapping[str, Summary | str]) -> set[tuple[str, str, str]]:
    """Return (study, arm, reference) of the resolved primary contrasts that do not survive Holm's correction.

    The family is all tested primary contrasts of the page.
    """
    tested = {
        (study, contrast["arm"], contrast["reference"]): contrast
        for study, summary in summaries.items()
        if not isinstance(summary, str)
        for contrast in tables.primary_contrasts(summary)
        if contrast["p"] is not None and contrast["verdict"] in TESTED
    }
    survivors = holm({key: contrast["p"] for key, contrast in tested.items()})
    return {key for key, contrast in tested.items() if contrast["verdict"] in RESOLVED and key not in survivors}


def marks_of(folder: Path, summaries: Mapping[str, Summary | str]) -> Marks:
    """Return the marks of the primary contrasts: a dagger, "depends on the learning rate", or both.

    The studies of learning rates are those of the same paper in `folder` that have the contrast at other rates.
    """
    result = dict.fromkeys(daggers(summaries), "†")
    for study, summary in summaries.items():
        if isinstance(summary, str):
            continue
        primary = {(contrast["arm"], contrast["reference"]) for contrast in tables.primary_contrasts(summary)}
        for path in sorted(folder.glob(f"{study.partition('-')[0]}-*.json")):
            other = read_summary(folder, path.stem)
            if isinstance(other, str) or other["primary_metric"] != summary["primary_metric"]:
                continue
            for arm, reference in sorted(primary & sweeps.opposite_at_another_rate(other)):
                key = (study, arm, reference)
                if DEPENDS_ON_RATE not in result.get(key, ""):
                    result[key] = f"{result.get(key, '')}, {DEPENDS_ON_RATE}"
    return result


def mark_of(study: str, contrast: Mapping[str, Any], marks: Marks) -> str:
    """Return the mark of a contrast, "" if it has none."""
    return marks.get((study, contrast["arm"], contrast["reference"]), "")


def shown_verdicts(summaries: Mapping[str, Summary | str]) -> set[str]:
    """Return the verdicts on a page."""
    verdicts = set()
    for summary in summaries.values():
        if isinstance(summary, str):
            verdicts.add("not run")
        else:
            verdicts.update(contrast["verdict"] for contrast in tables.primary_contrasts(summary))
    return verdicts


def verdict_html(verdict: str, mark: str = "") -> str:
    """Return a verdict and its mark as coloured HTML."""
    return f'<span class="verdict {css_class(verdict)}">{escape(verdict + mark)}</span>'


def legend(summaries: Mapping[str, Summary | str], markup: bool) -> str:
    """Return the legend of the verdicts that occur, as HTML (`markup`) or Markdown."""
    verdicts = shown_verdicts(summaries)
    parts = []
    for group, meaning in LEGEND.items():
        present = [verdict for verdict in group if verdict in verdicts]
        if present:
            named = (
                " ".join(map(verdict_html, present)) if markup else ", ".join(f"**{verdict}**" for verdict in present)
            )
            parts.append(f"{named} {meaning}" if markup else f"{named}: {meaning}")
    parts += [DAGGER] if daggers(summaries) else []
    return f"{BARS if markup else DIFFERENCES} {'; '.join(parts)}."


def numbers(contrast: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Return difference, interval and number of seeds in words."""
    if contrast["mean"] is None:
        return "no value"
    text = tables.amount(contrast["mean"], metric)
    if contrast["low"] is not None:
        text += f" ({tables.format_interval(contrast, metric)})"
    text += f", n\u00a0=\u00a0{contrast['n']}"
    if contrast["seeds_needed"]:
        text += f"; half-width = margin at n\u00a0=\u00a0{contrast['seeds_needed']}"
    return text


def bar_scale(summary: Summary) -> float:
    """Return the largest absolute value that the interval bars of a study show."""
    ends = [contrast[key] for contrast in tables.primary_contrasts(summary) for key in ("mean", "low", "high")]
    return max([abs(end) for end in [*ends, summary["margin"]] if end is not None], default=0.0)


def bar_html(contrast: Mapping[str, Any], margin: float | None, scale: float) -> str:
    """Return the difference of a contrast as an SVG: margin, zero, interval and mean. "" if there is no value.

    Values from -scale to scale fill the width, so that zero is in the middle.
    """
    if contrast["mean"] is None:
        return ""

    def x(value: float) -> float:
        return round(100 + 94 * value / (scale or 1), 1)

    parts = ['<line class="axis" x1="0" x2="200" y1="12" y2="12"/>']
    if margin:
        width = round(x(margin) - x(-margin), 1)
        parts.insert(0, f'<rect class="margin" x="{x(-margin)}" y="0" width="{width}" height="24"/>')
    parts.append('<line class="zero" x1="100" x2="100" y1="0" y2="24"/>')
    if contrast["low"] is not None:
        parts.append(f'<line class="interval" x1="{x(contrast["low"])}" x2="{x(contrast["high"])}" y1="12" y2="12"/>')
    parts.append(f'<circle cx="{x(contrast["mean"])}" cy="12" r="5"/>')
    style = css_class(contrast["verdict"])
    return f'<svg class="bar {style}" viewBox="0 0 200 24" aria-hidden="true">{"".join(parts)}</svg>'


def contrasts_html(study: str, summary: Summary, marks: Marks, scale: float | None = None) -> str:
    """Return verdict, and with a `scale` also bar and numbers, of every primary contrast."""
    metric, contrasts = summary["metrics"][summary["primary_metric"]], tables.primary_contrasts(summary)
    verdicts, rows = [], []
    for contrast in contrasts:
        verdicts.append(verdict_html(contrast["verdict"], mark_of(study, contrast, marks)))
        label = f"{contrast_name(contrast['arm'], contrast['reference'])}: " if len(contrasts) > 1 else ""
        text = f"<small>{escape(label + numbers(contrast, metric))}</small>"
        bar = "" if scale is None else bar_html(contrast, summary["margin"], scale)
        rows.append(f'<div class="contrast">{bar}{verdicts[-1]}{text}</div>')
    parts = list(dict.fromkeys(verdicts)) if scale is None else rows
    if has_study_verdict(summary):
        parts.append(f'<span class="small">{escape(summary["verdict"])}</span>')
    return " ".join(parts)


def has_study_verdict(summary: Summary) -> bool:
    """Return whether the verdict says more than the verdicts of the contrasts, as that of a robustness study does."""
    verdicts = {contrast["verdict"] for contrast in tables.primary_contrasts(summary)}
    return any(part.rpartition(": ")[2] not in verdicts for part in summary["verdict"].split("; "))


def paper_groups(summaries: Mapping[str, Summary | str]) -> dict[str, list[str]]:
    """Return paper -> its studies. A study's name begins with the folder of its paper."""
    folders: dict[str, list[str]] = {}
    for study in summaries:
        folders.setdefault(study.partition("-")[0], []).append(study)
    groups: dict[str, list[str]] = {}
    for folder, studies in folders.items():
        found = [summary["paper"] for study in studies if not isinstance(summary := summaries[study], str)]
        groups.setdefault(found[0] if found else paper_title(folder), []).extend(studies)
    return groups


def paper_title(folder: str) -> str:
    """Return the name of a paper from the first line of its README, "# NAME: ...", or the folder's without a README."""
    path = ROOT / folder / "README.md"
    return path.read_text(encoding="utf-8").partition(":")[0].removeprefix("# ") if path.exists() else folder


def without_brackets(text: str) -> str:
    """Return a text without its remarks in brackets; the study's section shows it in full."""
    return re.sub(r" ?\([^()]*\)", "", text)


def paper_link(folder: Path, study: str) -> str:
    """Return the relative path of the README of a study's paper, which explains its arms, or "" if there is none."""
    path = ROOT / study.partition("-")[0] / "README.md"
    return Path(os.path.relpath(path, folder.resolve())).as_posix() if path.exists() else ""


def overview_html(summaries: Mapping[str, Summary | str], marks: Marks, folder: Path) -> str:
    """Return the overview: a row per study, grouped by paper. Bars of one paper and metric have the same scale."""
    header = "".join(f"<th>{name}</th>" for name in ("study", "result", "difference and verdict", "paper's value"))
    parts = [f'<table class="overview"><thead><tr>{header}</tr></thead>']
    for paper, studies in paper_groups(summaries).items():
        title = (
            f'<a href="{escape(link)}">{escape(paper)}</a>'
            if (link := paper_link(folder, studies[0]))
            else escape(paper)
        )
        rows = [f'<tr class="paper"><th colspan="4" scope="rowgroup">{title}</th></tr>']
        scales: dict[str, float] = {}
        for study in studies:
            if not isinstance(summary := summaries[study], str):
                metric = summary["primary_metric"]
                scales[metric] = max(scales.get(metric, 0.0), bar_scale(summary))
        for study in studies:
            summary = summaries[study]
            if isinstance(summary, str):
                cells = [escape(f"{summary}."), verdict_html("not run"), tables.DASH]
            else:
                verdict = contrasts_html(study, summary, marks, scales[summary["primary_metric"]])
                cells = [escape(result_sentence(summary)), verdict, escape(without_brackets(summary["published"]))]
            name = escape(study)
            cells.insert(0, f'<a href="#{name}">{name}</a>')
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        parts.append("<tbody>" + "\n".join(rows) + "</tbody>")
    return "\n".join([*parts, "</table>"])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of escaped cells; the first row is the header."""
    lines = []
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        classes = [' class="short"' if len(cell) < 25 else "" for cell in row]
        cells = zip(classes, row, strict=True)
        lines.append(f"<tr>{''.join(f'<{tag}{name}>{escape(cell)}</{tag}>' for name, cell in cells)}</tr>")
    return '<div class="wide"><table class="data">' + "\n".join(lines) + "</table></div>"


def figure_html(path: Path, caption: str) -> str:
    """Return a figure as inline HTML with a caption and a link to its PNG file.

    The ids of an SVG get the file name as a prefix, so that they stay unique.
    """
    if path.suffix == ".png":
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
    else:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"<metadata>.*?</metadata>|<script.*?</script>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{path.stem}-", text)
        image = text.replace("<svg", f'<svg role="img" aria-label="{escape(path.stem)}"', 1)
    link, png = "", escape(path.with_suffix(".png").name)
    if path.with_suffix(".png").exists():
        image, link = f'<a href="{png}">{image}</a>', f' <a href="{png}">PNG</a>'
    return f'<figure><div class="card">{image}</div><figcaption>{escape(caption)}{link}</figcaption></figure>'


def study_links(folder: Path, study: str) -> dict[str, str]:
    """Return label -> relative path of the data and code of a study, where the file exists."""
    paper, root = study.partition("-")[0], os.path.relpath(ROOT, folder.resolve())
    links = {"CSV": f"{study}.csv", "JSON": f"{study}.json"}
    links |= {name: f"{Path(root).as_posix()}/{paper}/{name}" for name in ("train.py", "studies.py")}
    return {label: link for label, link in links.items() if (folder.resolve() / link).exists()}


def published_sentence(study: str, summary: Summary) -> str:
    """Return the paper's result, or in an A/A test the expected one."""
    return f"{'Expected' if is_equal_arms(study) else 'In the paper'}: {summary['published']}."


def is_equal_arms(study: str) -> bool:
    """Return whether a study is an A/A test."""
    return study.endswith("-base-again")


def setting_html(summary: Summary, setting: str, arms: Sequence[str]) -> str:
    """Return the two tables of one setting, with its name as a heading unless it is ""."""
    parts = [f"<h3>{escape(setting)}</h3>"] if setting else []
    for rows, caption in (
        (tables.arms_table(summary, arms), tables.caption(summary)),
        (tables.differences_table(summary, arms), tables.DIFFERENCES_CAPTION),
    ):
        parts.append(html_table(rows) + f'<p class="small">{escape(caption)}</p>')
    return "\n".join(parts)


def study_html(
    study: str,
    summary: Summary | str,
    folder: Path,
    figures: Sequence[Path],
    command: str,
    marks: Marks,
) -> str:
    """Return the section of one study."""
    head = f'<section id="{escape(study)}">\n<h2>{escape(study)}</h2>\n'
    links = " · ".join(f'<a href="{escape(link)}">{label}</a>' for label, link in study_links(folder, study).items())
    links = f'<p class="small">{links}</p>' if links else ""
    if isinstance(summary, str):
        text = f"{verdict_html('not run')} {escape(summary)}. Run it: <code>{escape(command)}</code>"
        return f"{head}<p>{text}</p>\n{links}</section>"
    provenance = []
    for key, value in summary["provenance"].items():
        values = value if isinstance(value, list) else [value]
        text = ", ".join(str(item)[:20] for item in values) if len(values) < 5 else f"{len(values)} different"
        provenance.append(f"{key}: {text}")
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary["notes"])
    headline, *others = sentences(summary)
    second = summary["remark"].replace(" -> ", " → ") or (others.pop(0) if others and len(others[0]) < 300 else "")
    captions = summary["captions"]
    shown, folded = (
        [figure_html(path, captions.get(path.stem, "")) for path in paths] for paths in split_figures(study, figures)
    )
    parts = [
        f"<p>{escape(summary['question'])}</p>",
        f"<p>{contrasts_html(study, summary, marks)} <strong>{escape(headline)}</strong> {escape(second)}</p>",
        f'<p class="small">{escape(published_sentence(study, summary))}</p>',
        *shown,
        links,
        "<details><summary>Tables, notes, provenance and further figures</summary>",
        f"<p>{escape(' '.join(others))}</p>" if others else "",
        *(setting_html(summary, setting, arms) for setting, arms in tables.arms_by_setting(summary).items()),
        f"<p>Here: scale {escape(summary['scale'])}; {escape(summary['data'])}.</p>",
        f"<p>Reproduce: <code>{escape(summary['reproduce'])}</code></p>",
        f"<ul>{notes}</ul>" if notes else "",
        f'<p class="small">{escape("; ".join(provenance))}</p>',
        *folded,
        "</details>",
    ]
    return head + "\n".join(part for part in parts if part) + "\n</section>"


def calibration_sentence(folder: Path, extras: Sequence[str]) -> str:
    """Return one sentence each on the A/A tests and on the known effects in `folder`. "" if there are none."""
    equal_arms: list[str] = []
    effects: list[str] = []
    for name in extras:
        summary = read_summary(folder, name)
        if isinstance(summary, str):
            continue
        if is_equal_arms(name):
            verdicts = [contrast["verdict"] for contrast in tables.primary_contrasts(summary)]
            equal_arms += [verdict for verdict in verdicts if verdict not in analysis.NOT_TESTED]
        else:
            effects += [verdict for verdict in summary["calibration"].values() if verdict != "not run"]
    parts = []
    if equal_arms:
        false = sum(verdict in RESOLVED for verdict in equal_arms)
        others = [verdict for verdict in dict.fromkeys(equal_arms) if verdict not in RESOLVED]
        counts = ", ".join(f"{equal_arms.count(verdict)} {verdict}" for verdict in others)
        text = f"A/A tests: {false} of {len(equal_arms)} gave a false difference"
        parts.append(f"{text} ({counts})." if counts else f"{text}.")
    if effects:
        verdicts = [verdict for verdict in analysis.COMPARED if verdict in effects]
        parts.append(f"Known effects: {', '.join(f'{effects.count(verdict)} {verdict}' for verdict in verdicts)}.")
    return " ".join(parts)


def study_counts(summaries: Mapping[str, Summary | str]) -> str:
    """Return one sentence: the number of studies, of those run, and of those with a finding."""
    run = [summary for summary in summaries.values() if not isinstance(summary, str)]
    findings = sum(summary["has_finding"] for summary in run)
    noun = "study" if len(summaries) == 1 else "studies"
    return f"{len(summaries)} {noun}, {len(run)} run, {findings} with a finding."


def write_page(
    folder: Path, name: str, scale: str, studies: Sequence[str], command: str, other: str = "", counts: str = ""
) -> list[str]:
    """Write <name>.html into `folder`. Return one line per study with its verdict. `other`: page to link to.

    `counts`: see `calibration_sentence`.
    """
    summaries = {study: read_summary(folder, study) for study in studies}
    figures, title, marks = find_figures(folder, studies), f"{TITLES[name]}, scale {scale}", marks_of(folder, summaries)
    sections = [
        study_html(study, summary, folder, figures[study], command.replace("{}", study), marks)
        for study, summary in summaries.items()
    ]
    link = f' See also: <a href="{other}.html">{escape(TITLES[other])}</a>.' if other else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{verdict_styles()}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{study_counts(summaries)} {counts} Published values come from the papers' data and training length: compare signs,
not sizes.{link}</p>
<p class="legend">{legend(summaries, markup=True)}</p>
{overview_html(summaries, marks, folder)}
{"".join(sections)}
</body>
</html>
"""
    write_text(folder / f"{name}.html", page)
    return terminal_lines(summaries)


def write_pages(folder: Path, scale: str, studies: Sequence[str], extras: Sequence[str], command: str) -> list[str]:
    """Write index.html, and extras.html if an extra has a summary. Return `terminal_lines` of both."""
    finished_extras = [study for study in extras if (folder / f"{study}.json").exists()]
    counts = calibration_sentence(folder, finished_extras)
    lines = write_page(folder, "index", scale, studies, command, "extras" if finished_extras else "", counts)
    if finished_extras:
        lines += write_page(folder, "extras", scale, finished_extras, command, "index", counts)
    return lines


def overview_markdown(summaries: Mapping[str, Summary | str], marks: Marks, folder: Path) -> str:
    """Return the overview as a Markdown table with a row per study, grouped by paper."""
    rows = [["study", "result", "difference", "verdict", "paper's value"]]
    for paper, studies in paper_groups(summaries).items():
        readme_link = paper_link(folder, studies[0])
        rows.append([f"**[{paper}]({readme_link})**" if readme_link else f"**{paper}**", "", "", "", ""])
        for study in studies:
            summary, link = summaries[study], f"[{study}](#{study})"
            if isinstance(summary, str):
                rows.append([link, f"{summary}.", tables.DASH, "not run", tables.DASH])
                continue
            metric = summary["metrics"][summary["primary_metric"]]
            contrasts = tables.primary_contrasts(summary)
            differences = [
                f"{contrast_name(contrast['arm'], contrast['reference'])}: {numbers(contrast, metric)}"
                for contrast in contrasts
            ]
            verdicts = [contrast["verdict"] + mark_of(study, contrast, marks) for contrast in contrasts]
            verdict = "<br>".join(verdicts if len(set(verdicts)) > 1 else verdicts[:1])
            if has_study_verdict(summary):
                verdict = f"{verdict}<br>{summary['verdict']}"
            published = without_brackets(summary["published"])
            rows.append([link, result_sentence(summary), "<br>".join(differences), verdict, published])
    return tables.markdown(rows)


def results_table(folder: Path, studies: Sequence[str], link: str) -> str:
    """Return the table of the project's README: study, result by meaning and verdict. `link`: file that has it all."""
    summaries = {study: read_summary(folder, study) for study in studies}
    marks, rows = marks_of(folder, summaries), [["study", "result", "verdict"]]
    for study, summary in summaries.items():
        name = f"[{study}]({link}#{study})"
        if isinstance(summary, str):
            rows.append([name, f"{summary}.", "not run"])
        else:
            by_contrast = {
                contrast_name(contrast["arm"], contrast["reference"]): contrast["verdict"]
                + mark_of(study, contrast, marks)
                for contrast in tables.primary_contrasts(summary)
            }
            verdicts = dict.fromkeys(by_contrast.values())
            if len(verdicts) > 1:
                verdicts = dict.fromkeys(f"{label}: {verdict}" for label, verdict in by_contrast.items())
            sentence = result_sentence(summary).removeprefix("Too weak to test: ")
            rows.append([name, sentence, "; ".join(verdicts)])
    return tables.markdown(rows)


def readme(folder: Path, name: str, scale: str, studies: Sequence[str], command: str, counts: str = "") -> str:
    """Return the page as Markdown: overview, legend, then each study with its figures and folded tables.

    `counts`: see `calibration_sentence`.
    """
    summaries = {study: read_summary(folder, study) for study in studies}
    figures = find_figures(folder, studies)
    parts = [
        f"# {TITLES[name]}, scale {scale}",
        f"{study_counts(summaries)} {counts}".strip() + f" As an HTML page: `make page SCALE={scale}`.",
        overview_markdown(summaries, marks_of(folder, summaries), folder),
        legend(summaries, markup=False),
    ]
    for study, summary in summaries.items():
        parts.append(f"## {study}")
        if isinstance(summary, str):
            parts.append(f"{summary}. Run it: `{command.replace('{}', study)}`")
            continue
        headline, *others = sentences(summary)
        captions = summary["captions"]
        shown, folded = (
            [f"![{path.stem}]({path.stem}.png)\n\n{captions.get(path.stem, '')}".strip() for path in paths]
            for paths in split_figures(study, figures[study])
        )
        text = tables.as_markdown(summary)
        links = [f"[{label}]({link})" for label, link in study_links(folder, study).items()]
        remark = summary["remark"].replace(" -> ", " → ")
        parts += [summary["question"], f"**{headline}** {remark}".strip(), published_sentence(study, summary)]
        parts += shown
        parts += [" · ".join(links), "<details><summary>Tables, notes and further figures</summary>"]
        parts += [" ".join(others), text, *folded, f"Reproduce: `{summary['reproduce']}`", "</details>"]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal_lines(summaries: Mapping[str, Summary | str]) -> list[str]:
    """Return a line per study with its verdict and headline, and the number of studies that have not run."""
    lines = [
        f"{study}: {summary}" if isinstance(summary, str) else f"{study}: {summary['verdict']}. {sentences(summary)[0]}"
        for study, summary in summaries.items()
        if summary != NOT_RUN
    ]
    missing = len(summaries) - len(lines)
    return [*lines, f"not run yet: {missing} of {len(summaries)} studies"] if missing else lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module docstring. Exits with code 2 if a study name is invalid or given twice."""
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder with tables and figures of the studies")
    parser.add_argument("--scale", required=True, help="scale in the heading")
    parser.add_argument("--command", default="make {}", help="command that runs a study; {} is its name")
    parser.add_argument("--studies", nargs="+", required=True, metavar="STUDY", help="main studies, in page order")
    parser.add_argument("--extras", nargs="+", default=[], metavar="STUDY", help="studies on the second page")
    args = parser.parse_args(argv)
    names = [*args.studies, *args.extras]
    for study in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", study) or names.count(study) > 1:
            fail(f"invalid or repeated study '{study}': give each name once, lower-case letters, digits and -")
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot create --results {args.results} ({error.strerror}): give another folder")
    lines = write_pages(args.results, args.scale, args.studies, args.extras, args.command)
    print("\n".join([*lines, f"page: {args.results / 'index.html'}"]))


if __name__ == "__main__":
    main()
