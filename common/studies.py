"""The arithmetic of one study: contrasts over seeds, positive controls, and the verdict that they allow.

A study is a list of contrasts "arm:reference". An arm is a run folder's name, "arm@setting" where there is a
second factor; settings are never pooled. A diverged run is counted, never averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from common import figures, tables
from common.records import Runs, notes, provenance, values
from common.statistics import paired, summary, verdict, welch
from common.tables import NOT_INFORMATIVE, ONE_SEED, finding

WORDS = ("lower", "higher", "no difference")  # the verdicts that count as a finding
Rule = Callable[[list[dict[str, Any]]], str | None]


class Metric(NamedTuple):
    """How a number of metrics.json is shown; `judged` is False where no verdict is due (training loss)."""

    label: str
    unit: str
    digits: int
    judged: bool = True


class Control(NamedTuple):
    """What `arm` must beat on `metric`: `other_metric` (or the same one) of `other_arm` (or its own)."""

    name: str
    metric: str
    arm: str = "base"
    other_metric: str | None = None
    other_arm: str | None = None
    lower_wins: bool = False


class Study(NamedTuple):
    """A study's design, and the words around it."""

    study: str  # its name, which is its make target
    paper: str
    scale: str
    question: str
    data: str
    reproduce: str  # the command
    primary_metric: str
    contrasts: Sequence[str]  # "arm:reference", the primary ones first
    controls: Sequence[Control]  # each guards its own arm's contrasts, and those to its "@setting" that have none
    published: str = "none published"
    primaries: int = 1
    margin: float | None = None  # in the primary metric's unit; only within it "no difference" is said

    @property
    def arms(self) -> list[str]:
        """Every arm that is needed: references first, then the others as declared, then controls."""
        pairs = [contrast.split(":") for contrast in self.contrasts]
        controls = [arm for control in self.controls for arm in (control.arm, control.other_arm) if arm]
        return list(dict.fromkeys([pair[1] for pair in pairs] + [pair[0] for pair in pairs] + controls))


def summarise(study: Study, runs: Runs, metrics: Mapping[str, Metric], rule: Rule | None = None) -> dict[str, Any]:
    """All that the tables and the page say of a study, as one dictionary that JSON can hold.

    `runs` are those of `study.arms`. `rule` turns the metrics of an arm's finished, not diverged seeds into the
    paper's own word: a phrase that reads on after the arm's name ("collapsed in every seed"), or None.
    Raises ValueError if the primary metric or a control's is not described, or the primary may not be judged.
    """
    key = study.primary_metric
    if unknown := {key, *(control.metric for control in study.controls)} - metrics.keys():
        raise ValueError(f"no description of the metrics {', '.join(sorted(unknown))}")
    if not metrics[key].judged:
        raise ValueError(f"{key} may not be judged, so it cannot be the primary metric")
    every = [
        _contrast(runs, contrast, name, metric, study.margin if name == key else None)
        | {"primary": name == key and place < study.primaries}
        for name, metric in metrics.items()
        for place, contrast in enumerate(study.contrasts)
    ]
    result = study._asdict() | {
        "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
        "contrasts": [contrast for contrast in every if contrast["metric"] == key],
        "all_contrasts": every,
        "controls": [_control(runs, control) for control in study.controls],
        "rows": [_row(runs, arm, metrics, rule) for arm in runs],
        "notes": notes(runs, metrics),
        "provenance": provenance(runs),
    }
    primary = [contrast for contrast in result["contrasts"] if contrast["primary"]]
    for control in result["controls"]:
        control["primary"] = any(control in _guards(contrast, result["controls"]) for contrast in primary)
    verdicts = {contrast["arm"]: judge(contrast, result["controls"]) for contrast in primary}
    alike = len(set(verdicts.values())) == 1
    named = [f"{arm}: {word}" for arm, word in verdicts.items()]
    result["verdict"] = next(iter(verdicts.values())) if alike else "; ".join(named)
    result["counted"] = any(word in WORDS for word in verdicts.values())
    return result | {"finding": finding(result)}


def publish(summary: Mapping[str, Any], drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write a study's figures (<study>-<name>.svg and .png) and tables into `folder`, and print its finding."""
    study = summary["study"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, folder, f"{study}-{name}")
    tables.write_tables(summary, folder)
    print(f"{study}: {summary['finding']}")


def _contrast(runs: Runs, contrast: str, key: str, metric: Metric, margin: float | None) -> dict[str, Any]:
    arm, reference = contrast.split(":")
    one, other = values(runs, arm, key), values(runs, reference, key)
    empty = ("mean", "low", "high", "paired_mean", "paired_low", "paired_high", "correlation")
    result = {"arm": arm, "reference": reference, "metric": key, **dict.fromkeys(empty)}
    result |= {"n": len(one), "n_reference": len(other), "word": "no value"}
    if not one or not other:
        for name in (arm, reference):
            diverged = sum(bool(run.metrics and run.metrics.get("diverged")) for run in runs[name].values())
            if diverged:
                result["word"] = f"{name}: {diverged} of {len(runs[name])} diverged"
        return result
    difference = welch(list(one.values()), list(other.values()))
    word = ONE_SEED if difference.low is None else verdict(difference, margin)
    result |= asdict(difference) | {"word": word if metric.judged else "not judged"}
    if both := sorted(one.keys() & other.keys()):
        matched, correlation = paired([one[seed] for seed in both], [other[seed] for seed in both])
        result |= {"paired_mean": matched.mean, "paired_low": matched.low, "paired_high": matched.high}
        result["correlation"] = correlation
    return result


def _control(runs: Runs, control: Control) -> dict[str, Any]:
    """`passed`: arm minus control lies wholly on the winning side of zero; None without an interval."""
    one = values(runs, control.arm, control.metric)
    other = values(runs, control.other_arm or control.arm, control.other_metric or control.metric)
    result = control._asdict() | dict.fromkeys(("mean", "low", "high", "passed"))
    if one and other:
        difference = welch(list(one.values()), list(other.values()))
        result |= asdict(difference)
        result["arm_mean"], result["control_mean"] = (summary(list(x.values())).mean for x in (one, other))
        if difference.low is not None:
            result["passed"] = verdict(difference) == ("lower" if control.lower_wins else "higher")
    return result


def _guards(contrast: dict[str, Any], controls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The controls that guard a contrast: its reference's, else its arm's, else those of the reference's setting."""
    setting = contrast["reference"].partition("@")[2]
    for side in ("reference", "arm"):
        if own := [control for control in controls if control["arm"] == contrast[side]]:
            return own
    return [control for control in controls if control["arm"].partition("@")[2] == setting]


def judge(contrast: dict[str, Any], controls: list[dict[str, Any]]) -> str:
    """A contrast's word, after the positive controls that guard it have been asked."""
    passed = [control["passed"] for control in _guards(contrast, controls)]
    if False in passed:
        return NOT_INFORMATIVE
    if contrast["low"] is not None and (not passed or None in passed):
        return "no positive control"
    return contrast["word"]


def _row(runs: Runs, arm: str, metrics: Mapping[str, Metric], rule: Rule | None) -> dict[str, Any]:
    found = {seed: run.metrics for seed, run in runs[arm].items() if run.metrics}
    diverged = [seed for seed, one in found.items() if one.get("diverged")]
    finished = [one for one in found.values() if not one.get("diverged")]
    by_metric = {name: values(runs, arm, name) for name in metrics}
    return {
        "arm": arm,
        "flags": next((run.flags for run in runs[arm].values() if run.flags), ""),
        "word": rule(finished) if rule and finished else None,
        "metrics": {
            name: asdict(summary(list(by_seed.values())))
            | {"values": {str(seed): value for seed, value in by_seed.items()}}
            for name, by_seed in by_metric.items()
            if by_seed
        },
        "diverged": diverged,
        "missing": [seed for seed in runs[arm] if seed not in found],
    }
