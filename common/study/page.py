"""Write the studies of a results folder as self-contained HTML: index.html, and extras.html for the extras.

    python -m common.study.page --results runs/demo/report --scale demo --studies simsiam-stop-gradient ...

Reads <study>.json and <study>-*.svg, or .png if there is no .svg. A main study without a JSON file is shown as
missing; an extra without one is omitted.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.cli import Parser, fail
from common.files import read_json, write_text
from common.study import tables
from common.study.statistics import format_counts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.wide { overflow-x: auto; } .wide > svg, .wide > img { display: block; max-width: 100%; min-width: 36rem;
  height: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; }
.short { white-space: nowrap; } tr { border-bottom: 1px solid #ddd; }
figure { margin: 1rem 0; } code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.finding { border-left: 4px solid #0072b2; padding-left: .8rem; } .missing { border-left: 4px solid #d55e00;
  padding-left: .8rem; } small, .small { font-size: .8rem; color: #555; overflow-wrap: anywhere; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } body { max-width: none; } }
"""
HEADER = ["study", "question", "primary contrast", "n", "baseline to beat", "verdict", "published"]


def read_summary(folder: Path, study: str) -> dict[str, Any] | str:
    """Return a study's summary, or a sentence that says why it is missing."""
    try:
        return dict(read_json(folder / f"{study}.json"))
    except FileNotFoundError:
        return "Not run yet"
    except (ValueError, TypeError):
        return f"{study}.json cannot be read"


def find_figures(folder: Path, studies: Sequence[str]) -> dict[str, list[Path]]:
    """Return the figures <study>-*.svg of each study, or .png if there is no .svg.

    If several study names are prefixes of a file name, the longest one gets the figure.
    """
    names = [*studies, *(path.stem for path in folder.glob("*.json"))]
    result: dict[str, list[Path]] = {study: [] for study in names}
    by_stem = {path.stem: path for extension in ("png", "svg") for path in folder.glob(f"*.{extension}")}
    for stem, path in sorted(by_stem.items()):
        matches = [study for study in result if stem == study or stem.startswith(f"{study}-")]
        if matches:
            result[max(matches, key=len)].append(path)
    return result


def figure_html(path: Path) -> str:
    """Return a figure as inline HTML. The ids of an SVG get the file name as a prefix, so that they stay unique."""
    if path.suffix == ".png":
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>|<script.*?</script>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{path.stem}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(path.stem)}"', 1)


def overview_row(study: str, summary: Mapping[str, Any] | str) -> list[str]:
    """Return a study's row of the overview table; the columns are HEADER."""
    if isinstance(summary, str):
        return [study, summary, *[tables.DASH] * 5]
    metric = summary["metrics"][summary["primary_metric"]]
    primary = [contrast for contrast in summary["contrasts"] if contrast["primary"]]
    differences = [
        f"{contrast['arm']}:{contrast['reference']} {tables.format_number(contrast['mean'], metric)}"
        + (f" ({tables.format_interval(contrast, metric)})" if contrast["low"] is not None else "")
        for contrast in primary
    ]
    results = {True: "passed", False: "not passed", None: "no interval"}
    several = len(summary["controls"]) > 1
    baselines = []
    for baseline in summary["controls"]:
        if baseline["primary"]:
            arm = f"{baseline['arm']} against " if several else ""
            baselines.append(f"{arm}{baseline['name']}: {results[baseline['passed']]}")
    others = [baseline["passed"] for baseline in summary["controls"] if not baseline["primary"]]
    if others:
        baselines.append(f"{others.count(True)} of {len(others)} others passed")
    contrast_cell = f"{metric['label']}: {'; '.join(differences)}"
    n = "; ".join(dict.fromkeys(format_counts(contrast["n"], contrast["n_reference"]) for contrast in primary))
    verdict, published = summary["verdict"], summary["published"]
    return [study, summary["question"], contrast_cell, n, "; ".join(baselines), verdict, published]


def html_table(rows: Sequence[Sequence[str]], links: bool = False) -> str:
    """Return an HTML table of escaped cells; the first row is the header. `links`: link the first column to its id."""
    lines = []
    for index, row in enumerate(rows):
        cells = [escape(cell) for cell in row]
        if links and index:
            cells[0] = f'<a href="#{cells[0]}">{cells[0]}</a>'
        tag = "td" if index else "th"
        classes = [' class="short"' if len(cell) < 25 else "" for cell in row]
        line = "".join(f"<{tag}{name}>{cell}</{tag}>" for name, cell in zip(classes, cells, strict=True))
        lines.append(f"<tr>{line}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def setting_html(summary: Mapping[str, Any], setting: str, arms: Sequence[str]) -> str:
    """Return the two tables of one setting, with its name as a heading unless it is ""."""
    parts = [f"<h3>{escape(setting)}</h3>"] if setting else []
    for rows, caption in (
        (tables.arms_table(summary, arms), tables.caption(summary)),
        (tables.differences_table(summary, arms), tables.DIFFERENCES_CAPTION),
    ):
        parts.append(html_table(rows) + f'<p class="small">{escape(caption)}</p>')
    return "\n".join(parts)


def study_html(study: str, summary: Mapping[str, Any] | str, figures: Sequence[Path], command: str) -> str:
    """Return the section of one study."""
    head = f'<section id="{escape(study)}">\n<h2>{escape(study)}</h2>\n'
    if isinstance(summary, str):
        return f'{head}<p class="missing">{escape(summary)}. Run it: <code>{escape(command)}</code></p>\n</section>'
    provenance = []
    for key, value in summary["provenance"].items():
        values = value if isinstance(value, list) else [value]
        provenance.append(f"{key}: {', '.join(str(item)[:20] for item in values)}")
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary["notes"])
    parts = [
        f"<p><strong>{escape(summary['question'])}</strong></p>",
        f'<p class="finding"><strong>Verdict: {escape(summary["verdict"])}.</strong> {escape(summary["finding"])}</p>',
        *(f'<figure class="wide">{figure_html(path)}</figure>' for path in figures),
        *(setting_html(summary, setting, arms) for setting, arms in tables.arms_by_setting(summary).items()),
        f"<p>Published: {escape(summary['published'])}.</p>",
        f"<p>Here: scale {escape(summary['scale'])}; {escape(summary['data'])}.</p>",
        f"<p>Reproduce: <code>{escape(summary['reproduce'])}</code></p>",
        f"<ul>{notes}</ul>" if notes else "",
        f'<p class="small">{escape("; ".join(provenance))}</p>',
    ]
    return head + "\n".join(parts) + "\n</section>"


TITLES = {"index": "Ablation studies", "extras": "Robustness, curves and other extras"}  # file name -> title


def study_counts(summaries: Mapping[str, Mapping[str, Any] | str]) -> str:
    """Return one sentence: the number of studies, of those run, and of those with a finding."""
    run = [summary for summary in summaries.values() if not isinstance(summary, str)]
    findings = sum(summary["counted"] for summary in run)
    return f"{len(summaries)} studies, {len(run)} run, {findings} with a finding."


def write_page(folder: Path, name: str, scale: str, studies: Sequence[str], command: str, other: str = "") -> list[str]:
    """Write <name>.html into `folder`. Return one line per study with its verdict. `other`: page to link to."""
    summaries = {study: read_summary(folder, study) for study in studies}
    figures, title = find_figures(folder, studies), f"{TITLES[name]}, scale {scale}"
    rows = [HEADER, *(overview_row(study, summary) for study, summary in summaries.items())]
    sections = [
        study_html(study, summary, figures[study], command.replace("{}", study)) for study, summary in summaries.items()
    ]
    link = f' See also: <a href="{other}.html">{escape(TITLES[other])}</a>.' if other else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{study_counts(summaries)} Differences have Welch's 95 % intervals over training seeds; data and split are fixed.
Published values come from the papers' data and training length. Do not compare their size with ours.{link}</p>
{html_table(rows, links=True)}
{"".join(sections)}
</body>
</html>
"""
    write_text(folder / f"{name}.html", page)
    return [terminal_line(study, summary) for study, summary in summaries.items()]


def write_pages(folder: Path, scale: str, studies: Sequence[str], extras: Sequence[str], command: str) -> list[str]:
    """Write index.html, and extras.html if an extra has a summary. Return one line per study with its verdict."""
    finished_extras = [study for study in extras if (folder / f"{study}.json").exists()]
    lines = write_page(folder, "index", scale, studies, command, "extras" if finished_extras else "")
    if finished_extras:
        lines += write_page(folder, "extras", scale, finished_extras, command, "index")
    return lines


def readme(folder: Path, name: str, scale: str, studies: Sequence[str], command: str) -> str:
    """Return the page as Markdown: overview, findings, figures and folded tables."""
    summaries = {study: read_summary(folder, study) for study in studies}
    figures = find_figures(folder, studies)
    rows = [HEADER, *(overview_row(study, summary) for study, summary in summaries.items())]
    parts = [f"# {TITLES[name]}, scale {scale}"]
    parts += [f"{study_counts(summaries)} As an HTML page: `make page SCALE={scale}`.", tables.markdown(rows)]
    for study, summary in summaries.items():
        parts += [f"## {study}"]
        if isinstance(summary, str):
            parts += [f"{summary}. Run it: `{command.replace('{}', study)}`"]
            continue
        parts += [summary["question"], summary["finding"]]
        parts += [f"![{path.stem}]({path.stem}.png)" for path in figures[study]]
        parts += ["<details><summary>Tables</summary>", tables.as_markdown(summary), "</details>"]
    return "\n\n".join(parts) + "\n"


def terminal_line(study: str, summary: Mapping[str, Any] | str) -> str:
    """Return a study's verdict and primary contrasts as one line."""
    if isinstance(summary, str):
        return f"{study}: {summary}"
    _, _, contrast, _, _, verdict, _ = overview_row(study, summary)
    return f"{study}: {verdict}. {contrast}"


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
