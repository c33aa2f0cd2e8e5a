"""The page: the studies of a results folder in one file that opens from disk, extras in a second one beside it.

    python -m common.study.page --results runs/demo/report --scale demo --studies simsiam-stop-gradient ...

Reads <study>.json and <study>-*.svg (or .png where there is none); runs nothing. A study of the plan without a JSON
file is shown as a hole; an extra without one is left out.
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
from common.study.statistics import counts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.wide { overflow-x: auto; } .wide > svg, .wide > img { display: block; max-width: 100%; min-width: 36rem;
  height: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; }
.short { white-space: nowrap; } tr { border-bottom: 1px solid #ddd; }
figure { margin: 1rem 0; } code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.finding { border-left: 4px solid #0072b2; padding-left: .8rem; } .hole { border-left: 4px solid #d55e00;
  padding-left: .8rem; } small, .small { font-size: .8rem; color: #555; overflow-wrap: anywhere; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } body { max-width: none; } }
"""
HEADER = ["study", "question", "primary contrast", "n", "positive control", "verdict", "published"]


def read(folder: Path, study: str) -> dict[str, Any] | str:
    """A study's summary, or a sentence that says why there is none."""
    try:
        return dict(read_json(folder / f"{study}.json"))
    except FileNotFoundError:
        return "It has not been run"
    except (ValueError, TypeError):
        return f"{study}.json cannot be read"


def pictures(folder: Path, studies: Sequence[str]) -> dict[str, list[Path]]:
    """The figures <study>-*.svg of each study, .png where there is no .svg; the longest name that fits owns it."""
    result: dict[str, list[Path]] = {study: [] for study in [*studies, *(p.stem for p in folder.glob("*.json"))]}
    found = {path.stem: path for kind in ("png", "svg") for path in folder.glob(f"*.{kind}")}
    for stem, path in sorted(found.items()):
        owners = [study for study in result if stem == study or stem.startswith(f"{study}-")]
        if owners:
            result[max(owners, key=len)].append(path)
    return result


def inline(path: Path) -> str:
    """A figure as an element of the page; of an SVG no prolog, its ids made unique by the file's name."""
    if path.suffix == ".png":
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>|<script.*?</script>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{path.stem}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(path.stem)}"', 1)


def overview(study: str, found: Mapping[str, Any] | str) -> list[str]:
    """A study's line of the first table, under HEADER."""
    if isinstance(found, str):
        return [study, found, *[tables.HOLE] * 5]
    metric = found["metrics"][found["primary_metric"]]
    primary = [one for one in found["contrasts"] if one["primary"]]
    told = [
        f"{one['arm']}:{one['reference']} {tables.number(one['mean'], metric)}"
        + (f" ({tables.interval(one, metric)})" if one["low"] is not None else "")
        for one in primary
    ]
    words = {True: "passed", False: "not passed", None: "no interval"}
    guards = [one for one in found["controls"] if one["primary"]]
    others = [one["passed"] for one in found["controls"] if not one["primary"]]
    several = len(found["controls"]) > 1
    passed = [
        (f"{one['arm']} against " if several else "") + f"{one['name']}: {words[one['passed']]}" for one in guards
    ] + ([f"{others.count(True)} of {len(others)} others passed"] if others else [])
    contrast = f"{metric['label']}: {'; '.join(told)}"
    n = "; ".join(dict.fromkeys(counts(one["n"], one["n_reference"]) for one in primary))
    return [study, found["question"], contrast, n, "; ".join(passed), found["verdict"], found["published"]]


def table(rows: Sequence[Sequence[str]], links: bool = False) -> str:
    """An HTML table of escaped cells, the first row its header; `links`: the first column links to its anchor."""
    lines = []
    for place, row in enumerate(rows):
        cells = [escape(cell) for cell in row]
        if links and place:
            cells[0] = f'<a href="#{cells[0]}">{cells[0]}</a>'
        tag, kinds = "td" if place else "th", [' class="short"' if len(cell) < 25 else "" for cell in row]
        line = "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        lines.append(f"<tr>{line}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def numbers(found: Mapping[str, Any], setting: str, arms: Sequence[str]) -> str:
    """The two tables of one setting, under its name where there is one."""
    parts = [f"<h3>{escape(setting)}</h3>"] if setting else []
    for rows, small in (
        (tables.arms_table(found, arms), tables.caption(found)),
        (tables.differences_table(found, arms), tables.UNADJUSTED),
    ):
        parts.append(table(rows) + f'<p class="small">{escape(small)}</p>')
    return "\n".join(parts)


def section(study: str, found: Mapping[str, Any] | str, figures: Sequence[Path], command: str) -> str:
    """One study of the page."""
    head = f'<section id="{escape(study)}">\n<h2>{escape(study)}</h2>\n'
    if isinstance(found, str):
        return f'{head}<p class="hole">{escape(found)}. Run it: <code>{escape(command)}</code></p>\n</section>'
    facts = []
    for key, value in found["provenance"].items():
        told = ", ".join(str(one)[:20] for one in (value if isinstance(value, list) else [value]))
        facts.append(f"{key}: {told}")
    notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
    parts = [
        f"<p><strong>{escape(found['question'])}</strong></p>",
        f'<p class="finding"><strong>Verdict: {escape(found["verdict"])}.</strong> {escape(found["finding"])}</p>',
        *(f'<figure class="wide">{inline(path)}</figure>' for path in figures),
        *(numbers(found, setting, arms) for setting, arms in tables.settings(found).items()),
        f"<p>Published: {escape(found['published'])}.</p>",
        f"<p>Here: scale {escape(found['scale'])}; {escape(found['data'])}.</p>",
        f"<p>Reproduce: <code>{escape(found['reproduce'])}</code></p>",
        f"<ul>{notes}</ul>" if notes else "",
        f'<p class="small">{escape("; ".join(facts))}</p>',
    ]
    return head + "\n".join(parts) + "\n</section>"


TITLES = {"index": "Ablation studies", "extras": "Robustness, curves and other extras"}  # by the page's file name


def lead(everything: Mapping[str, Mapping[str, Any] | str]) -> str:
    """How many studies there are, how many have been run, and with how many findings."""
    summaries = [found for found in everything.values() if not isinstance(found, str)]
    counted = sum(one["counted"] for one in summaries)
    return f"{len(everything)} studies, {len(summaries)} run, {counted} with a finding."


def write(folder: Path, name: str, scale: str, studies: Sequence[str], command: str, other: str = "") -> list[str]:
    """Write <name>.html into `folder`; returns one line a study of what was found. `other`: a page to link to."""
    everything = {study: read(folder, study) for study in studies}
    drawn, title = pictures(folder, studies), f"{TITLES[name]}, scale {scale}"
    rows = [HEADER, *(overview(study, found) for study, found in everything.items())]
    sections = [
        section(study, found, drawn[study], command.replace("{}", study)) for study, found in everything.items()
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
<p>{lead(everything)} Differences with Welch's 95 % intervals over training seeds; data and split are fixed.
Published values are the papers' own, on their data and at their length: not to be compared with ours in size.{link}</p>
{table(rows, links=True)}
{"".join(sections)}
</body>
</html>
"""
    write_text(folder / f"{name}.html", page)
    return [line(study, found) for study, found in everything.items()]


def write_pages(folder: Path, scale: str, studies: Sequence[str], extras: Sequence[str], command: str) -> list[str]:
    """Write index.html, and extras.html where there are any; returns one line a study of what was found."""
    there = [study for study in extras if (folder / f"{study}.json").exists()]
    lines = write(folder, "index", scale, studies, command, "extras" if there else "")
    return lines + (write(folder, "extras", scale, there, command, "index") if there else [])


def readme(folder: Path, name: str, scale: str, studies: Sequence[str], command: str) -> str:
    """The page as Markdown: overview, findings, figures, and the tables folded."""
    everything = {study: read(folder, study) for study in studies}
    drawn = pictures(folder, studies)
    rows = [HEADER, *(overview(study, found) for study, found in everything.items())]
    parts = [f"# {TITLES[name]}, scale {scale}"]
    parts += [f"{lead(everything)} The same as one HTML page: `make page SCALE={scale}`.", tables.markdown(rows)]
    for study, found in everything.items():
        parts += [f"## {study}"]
        if isinstance(found, str):
            parts += [f"{found}. Run it: `{command.replace('{}', study)}`"]
            continue
        parts += [found["question"], found["finding"]]
        parts += [f"![{path.stem}]({path.stem}.png)" for path in drawn[study]]
        parts += ["<details><summary>Tables</summary>", tables.as_markdown(found), "</details>"]
    return "\n\n".join(parts) + "\n"


def line(study: str, found: Mapping[str, Any] | str) -> str:
    """A study in one line of a terminal: its verdict and its primary contrasts."""
    if isinstance(found, str):
        return f"{study}: {found}"
    _, _, contrast, _, _, verdict, _ = overview(study, found)
    return f"{study}: {verdict}. {contrast}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring. Stops (exit 2) on a name that cannot be a study's."""
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder of the studies' tables and figures")
    parser.add_argument("--scale", required=True, help="named in the heading")
    parser.add_argument("--command", default="make {}", help="what runs a study, {} being its name")
    parser.add_argument("--studies", nargs="+", required=True, metavar="STUDY", help="in the order of the page")
    parser.add_argument("--extras", nargs="+", default=[], metavar="STUDY", help="studies of the second page")
    args = parser.parse_args(argv)
    names = [*args.studies, *args.extras]
    for study in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", study) or names.count(study) > 1:
            fail(f"{study}: a study is a make target's name, given once")
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--results {args.results} cannot be made ({error.strerror}): choose another folder")
    lines = write_pages(args.results, args.scale, args.studies, args.extras, args.command)
    print("\n".join([*lines, f"the page: {args.results / 'index.html'}"]))


if __name__ == "__main__":
    main()
