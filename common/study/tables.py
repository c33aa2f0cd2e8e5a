"""What a study's numbers say: the finding in plain sentences, and the tables as Markdown, CSV and JSON.

`summary` is always the dictionary that `analysis.summarise` makes, or the same one read back from JSON.
"""

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common.files import write_json, write_text
from common.study.statistics import counts

ONE_SEED = "one seed: no interval"
NOT_INFORMATIVE = "not informative at this scale"
HOLE = "–"
UNADJUSTED = (
    "Differences with Welch's 95 % interval. Only a primary contrast carries the verdict; the others are "
    "descriptive and unadjusted."
)
CSV = ["kind", "arm", "reference", "metric", "seed", "value", "mean", "sd", "n", "n_reference", "low", "high"]
CSV += ["paired_mean", "paired_low", "paired_high", "correlation", "word"]


def number(value: float | None, metric: Mapping[str, Any]) -> str:
    """A value with the metric's digits, never "-0.0"; a dash where there is none."""
    digits = metric["digits"]
    return HOLE if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def title(metric: Mapping[str, Any]) -> str:
    """Label and unit, as a column or a panel is headed."""
    return f"{metric['label']} ({metric['unit']})" if metric["unit"] else metric["label"]


def interval(found: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Low to high, or a dash."""
    return HOLE if found["low"] is None else f"{number(found['low'], metric)} to {number(found['high'], metric)}"


def finding(summary: Mapping[str, Any]) -> str:
    """Two or three sentences made of the numbers alone."""
    metric, rows = summary["metrics"][summary["primary_metric"]], {row["arm"]: row for row in summary["rows"]}
    failed = [control for control in summary["controls"] if control["passed"] is False]
    sentences = [f"{NOT_INFORMATIVE.capitalize()}: {_failed(one, summary)}" for one in failed if one["primary"]]
    primary = [contrast for contrast in summary["contrasts"] if contrast["primary"]]
    sentences += [_sentence(contrast, metric, rows, summary["margin"]) for contrast in primary]
    remarks = []
    for arm in dict.fromkeys(arm for contrast in primary for arm in (contrast["arm"], contrast["reference"])):
        diverged = len(rows[arm]["diverged"])
        remarks += [f"{arm} {rows[arm]['word']}"] if rows[arm]["word"] else []
        remarks += [f"{arm}: {diverged} of {len(summary['seeds'])} diverged, not averaged"] if diverged else []
    further = []
    for one in summary["contrasts"]:
        if not one["primary"] and one["mean"] is not None:
            facts = number(one["mean"], metric) + ("" if one["low"] is None else f", {interval(one, metric)}")
            further.append(f"{one['arm']}:{one['reference']} {one['word']} ({facts})")
    sentences += ["; ".join(remarks)] if remarks else []
    sentences += ["Further, descriptive: " + "; ".join(further)] if further else []
    sentences += [
        f"Nothing follows from contrasts to {one['arm']}: {_failed(one, summary)}"
        for one in failed
        if not one["primary"]
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def _failed(control: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    metric = summary["metrics"][control["metric"]]
    means = [number(control[side], metric) for side in ("arm_mean", "control_mean")]
    side = "below" if control["lower_wins"] else "above"
    facts = f"{means[1]}; difference {number(control['mean'], metric)}, 95 % interval {interval(control, metric)}"
    return (
        f"{metric['label']} of {control['arm']} ({means[0]}) is not clearly {side} its positive control, "
        f"{control['name']} ({facts})"
    )


def _sentence(
    contrast: Mapping[str, Any], metric: Mapping[str, Any], rows: Mapping[str, Any], margin: float | None
) -> str:
    arm, reference, word, label = contrast["arm"], contrast["reference"], contrast["word"], metric["label"]
    if contrast["mean"] is None:
        return f"{arm}:{reference} cannot be compared in {label} ({word})"

    def amount(value: float) -> str:
        unit = "points" if metric["unit"] == "%" else metric["unit"]
        return f"{number(value, metric)} {unit}".strip()

    found = [rows[name]["metrics"][contrast["metric"]]["mean"] for name in (arm, reference)]
    means = f"{arm}: {number(found[0], metric)}, {reference}: {number(found[1], metric)}"
    n = f"n = {counts(contrast['n'], contrast['n_reference'])}"
    facts = f"({means}; 95 % interval {interval(contrast, metric)}, {n})"
    if contrast["low"] is None:
        return f"{label}: {arm} minus {reference} is {amount(contrast['mean'])} ({means}); no interval at {n}"
    if word in ("lower", "higher"):
        return f"{label} is {amount(abs(contrast['mean']))} {word} for {arm} than for {reference} {facts}"
    if word == "no difference":
        return f"{label}: no difference between {arm} and {reference} within {amount(margin or 0)} {facts}"
    return f"{label}: {arm} minus {reference} is {amount(contrast['mean'])}, {word} {facts}"


def settings(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """By setting, what stands behind an arm's "@", the arms of its tables: its own, and what they are compared with."""
    own = {row["arm"]: row["arm"].partition("@")[2] for row in summary["rows"]}
    needed: dict[str, set[str]] = {}
    for one in summary["contrasts"]:
        needed.setdefault(own[one["arm"]], set()).update((one["arm"], one["reference"]))
    named = set().union(*needed.values())
    return {
        setting: [arm for arm in own if arm in some or (arm not in named and own[arm] == setting)]
        for setting, some in needed.items()
    }


def arms_table(summary: Mapping[str, Any], arms: Collection[str] | None = None) -> list[list[str]]:
    """Header and one line an arm: mean ± half-width of the 95 % interval, or the one value. `arms`: only these."""
    metrics = summary["metrics"]
    table = [["arm", "flags", *map(title, metrics.values()), "n", "remarks"]]
    for row in (row for row in summary["rows"] if arms is None or row["arm"] in arms):
        cells = []
        for name, metric in metrics.items():
            found = row["metrics"].get(name, {"mean": None, "low": None})
            half = "" if found["low"] is None else f" ± {number(found['high'] - found['mean'], metric)}"
            cells.append(number(found["mean"], metric) + half)
        holes = [f"{len(row[w])} of {len(summary['seeds'])} {w}" for w in ("diverged", "missing") if row[w]]
        remarks = "; ".join(([row["word"]] if row["word"] else []) + holes)
        n = row["metrics"].get(summary["primary_metric"], {"n": 0})["n"]
        table.append([row["arm"], row["flags"], *cells, str(n), remarks])
    return table


def differences_table(summary: Mapping[str, Any], arms: Collection[str] | None = None) -> list[list[str]]:
    """Header and one line a contrast, on the primary metric. `arms`: only contrasts between these."""
    metric = summary["metrics"][summary["primary_metric"]]
    table = [["contrast", f"difference in {title(metric)}", "95 % interval", "n", "word"]]
    for one in summary["contrasts"]:
        if arms is not None and not {one["arm"], one["reference"]} <= set(arms):
            continue
        name = f"{one['arm']}:{one['reference']}" + (" (primary)" if one["primary"] else "")
        n = counts(one["n"], one["n_reference"])
        table.append([name, number(one["mean"], metric), interval(one, metric), n, one["word"]])
    return table


def caption(summary: Mapping[str, Any]) -> str:
    """What the numbers of `arms_table` are."""
    n = len(summary["seeds"])
    if n == 1:
        return "Values of one training seed: no interval."
    return f"Mean and 95 % Student-t interval over n training seeds, {n} asked for (data and split fixed)."


def markdown(table: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Both tables of every setting, and the notes."""
    parts, groups = [], settings(summary)
    for setting, arms in groups.items():
        parts += [f"**{setting or 'no setting'}**"] if len(groups) > 1 else []
        parts += [markdown(arms_table(summary, arms)), caption(summary)]
        parts += [markdown(differences_table(summary, arms)), UNADJUSTED]
    parts += ["\n".join(f"- {note}" for note in summary["notes"])] if summary["notes"] else []
    return "\n\n".join(parts)


def write_tables(summary: Mapping[str, Any], folder: Path) -> None:
    """Write <study>.json and <study>.csv (long form, full precision) into `folder`, atomically."""
    name = summary["study"]
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in summary["rows"]:
        for key, found in row["metrics"].items():
            same = {"arm": row["arm"], "metric": key}
            writer.writerows(same | {"kind": "seed", "seed": s, "value": v} for s, v in found["values"].items())
            writer.writerow(same | found | {"kind": "arm"})
    writer.writerows({**contrast, "kind": "difference"} for contrast in summary["all_contrasts"])
    write_text(Path(folder) / f"{name}.csv", file.getvalue())
    write_json(Path(folder) / f"{name}.json", dict(summary))
