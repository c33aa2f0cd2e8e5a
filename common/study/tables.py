"""Write a study's results: the finding as sentences, and tables as Markdown, LaTeX, CSV and JSON.

`summary` is the dictionary that `analysis.summarise` returns, or the same dictionary read from JSON.
"""

import csv
import io
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common.files import write_json, write_text
from common.study.names import have_one_setting, setting_of, without_setting

DASH = "–"
DIFFERENCES_CAPTION = (
    "Paired differences over seeds with 95 % Student-t interval. Verdicts count for the primary contrasts; the others "
    "are descriptive and not adjusted for multiple comparisons. seeds needed: the number of seeds at which the "
    "half-width of an interval that includes zero would equal the margin, from the spread."
)
CSV_COLUMNS = ["kind", "arm", "reference", "metric", "seed", "value", "mean", "sd", "n", "low", "high", "p"]
CSV_COLUMNS += ["correlation", "arm_mean", "reference_mean", "seeds_needed", "verdict"]
NO_VERDICT = "#AAAAAA"
VERDICT_COLOURS = {  # on the page and in figures
    "worse": "#D55E00",
    "better": "#009E73",
    "no difference": "#0072B2",
    "higher": "#7B4FA3",
    "lower": "#7B4FA3",
    "unclear": "#777777",
    "signs differ": "#777777",
    "too weak to test": NO_VERDICT,
    "no baseline": NO_VERDICT,
    "one seed": NO_VERDICT,
    "not run": NO_VERDICT,
}
PHRASES = {  # verdict -> what the arm does, compared with its reference
    "worse": "{arm} hurts:",
    "better": "{arm} helps:",
    "no difference": "{arm} makes no difference:",
    "higher": "{arm} raises",
    "lower": "{arm} lowers",
    "unclear": "{arm} has an unclear effect:",
    "too weak to test": "{arm} cannot be tested:",
    "no baseline": "{arm} cannot be judged:",
    "one seed": "{arm}, one seed:",
}


def format_number(value: float | None, metric: Mapping[str, Any]) -> str:
    """Format a value with the metric's decimal places, never as "-0.0". None becomes a dash."""
    digits = metric["digits"]
    return DASH if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def title(metric: Mapping[str, Any]) -> str:
    """Return label and unit, the title of a column or panel."""
    return f"{metric['label']} ({metric['unit']})" if metric["unit"] else metric["label"]


def format_interval(stats: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Format an interval as "low to high", or as a dash if there is none."""
    if stats["low"] is None:
        return DASH
    return f"{format_number(stats['low'], metric)} to {format_number(stats['high'], metric)}"


def amount(value: float, metric: Mapping[str, Any]) -> str:
    """Format a difference with its unit; differences of percentages are in points."""
    unit = "points" if metric["unit"] == "%" else metric["unit"]
    return f"{format_number(value, metric)} {unit}".strip()


def headline(summary: Mapping[str, Any]) -> str:
    """Return the result as one sentence: "no-stop-gradient hurts: kNN accuracy 47.9 -> 11.9 % (untrained 14.5)."

    Several primary contrasts are separated by semicolons. If a required baseline is not beaten, the sentence names it.
    A setting that all contrasts share is left out.
    """
    metric = summary["metrics"][summary["primary_metric"]]
    primary = primary_contrasts(summary)
    baselines = [baseline for baseline in summary["baselines"] if baseline["primary"] and baseline["mean"] is not None]
    failed = []
    for baseline in baselines:
        if baseline["beaten"] is False:
            baseline_metric = summary["metrics"][baseline["metric"]]
            own, other = (format_number(baseline[key], baseline_metric) for key in ("arm_mean", "baseline_mean"))
            arm = f"{baseline_metric['label']} of {_short(baseline['arm'], summary)} ({own})"
            failed.append(f"{arm} {relation(baseline)} that of {baseline['name']} ({other})")
    if failed and {contrast["verdict"] for contrast in primary} == {"too weak to test"}:
        return f"Too weak to test: {failed[0]}."
    parts = []
    for contrast in primary:
        name, reference = _short(contrast["arm"], summary), _short(contrast["reference"], summary)
        if without_setting(reference) != "base":
            name = f"{name} (instead of {reference})"
        if contrast["mean"] is None:
            parts.append(f"{name}: {contrast['verdict']}")
            continue
        phrase = PHRASES.get(contrast["verdict"], f"{{arm}}: no verdict ({contrast['verdict']}):").format(arm=name)
        before, after = (format_number(contrast[key], metric) for key in ("reference_mean", "arm_mean"))
        parts.append(f"{phrase} {metric['label']} {before} -> {after} {metric['unit']}".strip())
    shown = {
        f"{baseline['name'].removeprefix('the ')} {format_number(baseline['baseline_mean'], metric)}"
        for baseline in baselines
        if baseline["metric"] == summary["primary_metric"]
    }
    context = f" ({shown.pop()})" if len(shown) == 1 and not failed else ""
    return "; ".join([*parts, *failed]) + context + "."


def relation(baseline: Mapping[str, Any]) -> str:
    """Describe how an arm that does not beat its baseline compares with it: "is not clearly above" or "is below"."""
    better, worse = ("below", "above") if baseline["lower_is_better"] else ("above", "below")
    clearly_worse = baseline["low"] > 0 if baseline["lower_is_better"] else baseline["high"] < 0
    return f"is {worse}" if clearly_worse else f"is not clearly {better}"


def descriptive_remark(summary: Mapping[str, Any]) -> str:
    """Return a sentence on the primary contrasts in the second metric, and one on their clearest effects on others.

    These are at most two, by mean / standard deviation of the paired differences: one on a metric with a better side,
    and one on a metric without. They carry no verdict of the study.
    """
    second = summary["second_metric"]
    sentences = []
    if second:
        parts = [
            f"{_change(contrast, summary)} ({contrast['verdict']})"
            for primary in summary["contrasts"]
            if primary["primary"]
            for contrast in summary["all_contrasts"]
            if contrast["metric"] == second
            and contrast["mean"] is not None
            and (contrast["arm"], contrast["reference"]) == (primary["arm"], primary["reference"])
        ]
        sentences += [f"Second metric: {'; '.join(parts)}."] if parts else []
    pairs = {(contrast["arm"], contrast["reference"]) for contrast in primary_contrasts(summary)}
    clearest = []
    for words in (("worse", "better"), ("higher", "lower")):
        effects = [
            contrast
            for contrast in summary["all_contrasts"]
            if contrast["metric"] not in (summary["primary_metric"], second)
            and (contrast["arm"], contrast["reference"]) in pairs
            and contrast["verdict"] in words
        ]
        effects.sort(key=lambda contrast: abs(contrast["mean"]) / max(contrast["sd"], 1e-12), reverse=True)
        clearest += effects[:1]
    if clearest:
        sentences.append(f"Descriptive: {'; '.join(_change(contrast, summary) for contrast in clearest)}.")
    return " ".join(sentences)


def _change(contrast: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Describe a contrast by its means: "linear accuracy of narrow: 73.2 -> 70.1 %"."""
    metric = summary["metrics"][contrast["metric"]]
    before, after = (format_number(contrast[key], metric) for key in ("reference_mean", "arm_mean"))
    return f"{metric['label']} of {_short(contrast['arm'], summary)}: {before} -> {after} {metric['unit']}".strip()


def _short(arm: str, summary: Mapping[str, Any]) -> str:
    """Return the name of an arm, without its setting if all primary contrasts are in the same one."""
    primary = [contrast["arm"] for contrast in primary_contrasts(summary)]
    return without_setting(arm) if have_one_setting(primary) else arm


def primary_contrasts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the contrasts that carry the verdict."""
    return [contrast for contrast in summary["contrasts"] if contrast["primary"]]


def finding(summary: Mapping[str, Any]) -> list[str]:
    """Return the finding as sentences: failed baselines, primary contrasts, remarks on their arms, the others."""
    metric = summary["metrics"][summary["primary_metric"]]
    rows = {row["arm"]: row for row in summary["rows"]}
    failed = [baseline for baseline in summary["baselines"] if baseline["beaten"] is False]
    sentences = [
        f"Too weak to test: {_failed_baseline(baseline, summary)}" for baseline in failed if baseline["primary"]
    ]
    primary = primary_contrasts(summary)
    sentences += [_contrast_sentence(contrast, metric, summary["margin"]) for contrast in primary]
    remarks = []
    for arm in dict.fromkeys(arm for contrast in primary for arm in (contrast["arm"], contrast["reference"])):
        row = rows[arm]
        remarks += [f"{arm} {row['remark']}"] if row["remark"] else []
        if row["diverged"]:
            values = row["metrics"].get(summary["primary_metric"], {"values": {}})["values"]
            treatment = "counted as chance" if str(row["diverged"][0]) in values else "not averaged"
            remarks.append(f"{arm}: {len(row['diverged'])} of {row['seeds']} diverged, {treatment}")
    secondary = []
    for contrast in summary["contrasts"]:
        if not contrast["primary"] and contrast["mean"] is not None:
            numbers = format_number(contrast["mean"], metric)
            if contrast["low"] is not None:
                numbers += f", {format_interval(contrast, metric)}"
            secondary.append(f"{contrast['arm']}:{contrast['reference']} {contrast['verdict']} ({numbers})")
    if remarks:
        sentences.append("; ".join(remarks))
    if secondary:
        sentences.append("Secondary contrasts (descriptive): " + "; ".join(secondary))
    sentences += [
        f"Contrasts with {baseline['arm']} are too weak to test: {_failed_baseline(baseline, summary)}"
        for baseline in failed
        if not baseline["primary"]
    ]
    return [f"{sentence}." for sentence in sentences]


def _failed_baseline(baseline: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Describe an arm that did not beat its baseline."""
    metric = summary["metrics"][baseline["metric"]]
    arm_mean = format_number(baseline["arm_mean"], metric)
    baseline_mean = format_number(baseline["baseline_mean"], metric)
    difference = format_number(baseline["mean"], metric)
    return (
        f"{metric['label']} of {baseline['arm']} ({arm_mean}) {relation(baseline)} its baseline, {baseline['name']} "
        f"({baseline_mean}; difference {difference}, 95 % interval {format_interval(baseline, metric)})"
    )


def _contrast_sentence(contrast: Mapping[str, Any], metric: Mapping[str, Any], margin: float | None) -> str:
    """Describe a primary contrast with its verdict, means, interval and number of seeds."""
    arm, reference, verdict, label = contrast["arm"], contrast["reference"], contrast["verdict"], metric["label"]
    if contrast["mean"] is None:
        return f"{arm}:{reference} cannot be compared on {label} ({verdict})"
    arm_mean, reference_mean = (format_number(contrast[key], metric) for key in ("arm_mean", "reference_mean"))
    details = f"{arm} {arm_mean}, {reference} {reference_mean}"
    difference = amount(contrast["mean"], metric)
    if contrast["low"] is None:
        return f"{label}: {arm} minus {reference} is {difference} ({details}; one seed, no interval)"
    interval = f"95 % interval {format_interval(contrast, metric)}, n = {contrast['n']}"
    text = f"{label}: {arm} minus {reference} is {difference}, {verdict} ({details}; {interval})"
    if verdict == "no difference":
        text += f"; the interval lies within the margin of {amount(margin or 0, metric)}"
    if contrast["seeds_needed"]:
        text += f"; with this spread {contrast['seeds_needed']} seeds would give a half-width of the margin"
    return text


def arms_by_setting(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return setting -> arms of its tables: the arms "NAME@SETTING" and the references they are compared with."""
    settings = {row["arm"]: setting_of(row["arm"]) for row in summary["rows"]}
    compared: dict[str, set[str]] = {}
    for contrast in summary["contrasts"]:
        arms = compared.setdefault(settings[contrast["arm"]], set())
        arms.update((contrast["arm"], contrast["reference"]))
    in_a_contrast = set().union(*compared.values())
    result = {}
    for setting, arms in compared.items():
        others = {arm for arm in settings if arm not in in_a_contrast and settings[arm] == setting}
        result[setting] = [arm for arm in settings if arm in arms or arm in others]
    return result


def arms_table(summary: Mapping[str, Any], arms: Collection[str] | None = None) -> list[list[str]]:
    """Return a header and one row per arm, with mean ± half-width of the 95 % interval. `arms`: only these.

    At n = 1 a cell is the value.
    """
    metrics = summary["metrics"]
    table = [["arm", "flags", *map(title, metrics.values()), "n", "remarks"]]
    for row in (row for row in summary["rows"] if arms is None or row["arm"] in arms):
        cells = []
        for name, metric in metrics.items():
            stats = row["metrics"].get(name, {"mean": None, "low": None})
            half_width = "" if stats["low"] is None else f" ± {format_number(stats['high'] - stats['mean'], metric)}"
            cells.append(format_number(stats["mean"], metric) + half_width)
        remarks = [row["remark"]] if row["remark"] else []
        for state in ("diverged", "missing"):
            if row[state]:
                remarks.append(f"{len(row[state])} of {row['seeds']} {state}")
        n = row["metrics"].get(summary["primary_metric"], {"n": 0})["n"]
        table.append([row["arm"], row["flags"], *cells, str(n), "; ".join(remarks)])
    return table


def differences_table(summary: Mapping[str, Any], arms: Collection[str] | None = None) -> list[list[str]]:
    """Return a header and one row per contrast on the primary metric. `arms`: only contrasts between these."""
    metric = summary["metrics"][summary["primary_metric"]]
    table = [["contrast", f"difference in {title(metric)}", "95 % interval", "n", "seeds needed", "result"]]
    for contrast in summary["contrasts"]:
        arm, reference = contrast["arm"], contrast["reference"]
        if arms is not None and not {arm, reference} <= set(arms):
            continue
        name = f"{arm}:{reference}" + (" (primary)" if contrast["primary"] else "")
        difference, bounds = format_number(contrast["mean"], metric), format_interval(contrast, metric)
        seeds = str(contrast["seeds_needed"] or DASH)
        table.append([name, difference, bounds, str(contrast["n"]), seeds, contrast["verdict"]])
    return table


def caption(summary: Mapping[str, Any]) -> str:
    """Return the caption of `arms_table`."""
    if len(summary["seeds"]) == 1:
        return "Values of one seed: no interval."
    return f"Mean and 95 % Student-t interval over n seeds. A seed draws {summary['seed_draws']}."


def markdown(table: list[list[str]]) -> str:
    """Return a Markdown table. The first row is the header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def latex(table: list[list[str]]) -> str:
    """Return a LaTeX table for the package booktabs. The first row is the header."""
    rows = [" & ".join(map(latex_text, row)) + r" \\" for row in table]
    columns = "l" + "r" * (len(table[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def latex_text(text: str) -> str:
    """Escape LaTeX's special characters, and replace the others that are not in every font."""
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "--": "-{}-"}
    special |= {
        "±": r"$\pm$",
        "–": "--",
        "−": "$-$",
        "×": r"$\times$",
        "√": r"$\surd$",
        "₁": "$_1$",
        "₂": "$_2$",
        "²": "$^2$",
        "†": r"$\dagger$",
    }
    special |= {character: f"${character}$" for character in "<>|"}
    special |= {"α": r"$\alpha$", "λ": r"$\lambda$", "→": r"$\to$"}
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return re.sub("--|.", lambda match: special.get(match[0], match[0]), text)


def as_latex(summary: Mapping[str, Any]) -> str:
    """Return both tables of every setting as LaTeX, with a comment before each table."""
    parts = [f"% {summary['study']}: {summary['question']} Needs \\usepackage{{booktabs}}."]
    for setting, arms in arms_by_setting(summary).items():
        comment = f"% {setting}: " if setting else "% "
        parts += [f"{comment}{caption(summary)}\n{latex(arms_table(summary, arms))}"]
        parts += [f"{comment}{DIFFERENCES_CAPTION}\n{latex(differences_table(summary, arms))}"]
    return "\n\n".join(parts) + "\n"


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Return both tables of every setting, and the notes, as Markdown."""
    parts, groups = [], arms_by_setting(summary)
    for setting, arms in groups.items():
        if len(groups) > 1:
            parts.append(f"**{setting or 'no setting'}**")
        parts += [markdown(arms_table(summary, arms)), caption(summary)]
        parts += [markdown(differences_table(summary, arms)), DIFFERENCES_CAPTION]
    if summary["notes"]:
        parts.append("\n".join(f"- {note}" for note in summary["notes"]))
    return "\n\n".join(parts)


def write_tables(summary: Mapping[str, Any], folder: Path) -> None:
    """Write <study>.json, <study>.csv (long format, full precision) and <study>.tex into `folder`, atomically."""
    name = summary["study"]
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in summary["rows"]:
        for key, stats in row["metrics"].items():
            common = {"arm": row["arm"], "metric": key}
            for seed, value in stats["values"].items():
                writer.writerow(common | {"kind": "seed", "seed": seed, "value": value})
            writer.writerow(common | stats | {"kind": "arm"})
    writer.writerows({**contrast, "kind": "difference"} for contrast in summary["all_contrasts"])
    write_text(Path(folder) / f"{name}.csv", file.getvalue())
    write_text(Path(folder) / f"{name}.tex", as_latex(summary))
    write_json(Path(folder) / f"{name}.json", dict(summary))
