"""One study from its runs: contrasts over seeds, baselines, and the verdict that they allow.

An arm is a run folder's name, "arm@setting" where there is a second factor; settings are never pooled. A diverged run
is counted, never averaged.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from common.study.design import Metric, MustBeat, Study, guards_of
from common.study.results import Runs, notes, provenance, values
from common.study.statistics import paired, summary, verdict, welch
from common.study.tables import NOT_INFORMATIVE, ONE_SEED, finding

WORDS = ("lower", "higher", "no difference")  # the verdicts that count as a finding
Rule = Callable[[list[dict[str, Any]]], str | None]


def summarise(study: Study, runs: Runs, metrics: Mapping[str, Metric], rule: Rule | None = None) -> dict[str, Any]:
    """All that the tables and the page say of a study, as one dictionary that JSON can hold.

    `runs` are those of `study.arms`. `rule` turns the metrics of an arm's finished, not diverged seeds into the
    paper's own word: a phrase that reads on after the arm's name ("collapsed in every seed"), or None.
    """
    key = study.metric
    every = [
        _contrast(runs, arm, reference, name, metric, study.margin if name == key else None)
        | {"primary": name == key and place < study.primary}
        for name, metric in metrics.items()
        for place, (arm, reference) in enumerate(study.pairs)
    ]
    result: dict[str, Any] = {
        "study": study.name,
        "question": study.question,
        "published": study.published,
        "primary_metric": key,
        "margin": study.margin,
        "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "contrasts": [contrast for contrast in every if contrast["metric"] == key],
        "all_contrasts": every,
        "controls": [_control(runs, one, metrics[one.metric].better == "lower") for one in study.must_beat],
        "rows": [_row(runs, arm, metrics, rule) for arm in runs],
        "notes": notes(runs, metrics),
        "provenance": provenance(runs),
    }
    primary = [contrast for contrast in result["contrasts"] if contrast["primary"]]
    for control in result["controls"]:
        control["primary"] = any(control in _guards(contrast, result["controls"]) for contrast in primary)
    arms = [contrast["arm"] for contrast in primary]
    verdicts = {
        one["arm"] if arms.count(one["arm"]) == 1 else f"{one['arm']}:{one['reference']}": judge(
            one, result["controls"]
        )
        for one in primary
    }
    alike = len(set(verdicts.values())) == 1
    named = [f"{arm}: {word}" for arm, word in verdicts.items()]
    result["verdict"] = next(iter(verdicts.values())) if alike else "; ".join(named)
    result["counted"] = any(word in WORDS for word in verdicts.values())
    return result | {"finding": finding(result)}


def _contrast(runs: Runs, arm: str, reference: str, key: str, metric: Metric, margin: float | None) -> dict[str, Any]:
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


def _control(runs: Runs, one: MustBeat, lower_wins: bool) -> dict[str, Any]:
    """`passed`: arm minus baseline lies wholly on the better side of zero; None without an interval."""
    own = values(runs, one.arm, one.metric)
    other = values(runs, one.baseline_arm or one.arm, one.baseline_metric or one.metric)
    result = asdict(one) | {"lower_wins": lower_wins} | dict.fromkeys(("mean", "low", "high", "passed"))
    if own and other:
        difference = welch(list(own.values()), list(other.values()))
        result |= asdict(difference)
        result["arm_mean"], result["control_mean"] = (summary(list(x.values())).mean for x in (own, other))
        if difference.low is not None:
            result["passed"] = verdict(difference) == ("lower" if lower_wins else "higher")
    return result


def _guards(contrast: dict[str, Any], controls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The baselines that guard a contrast."""
    places = guards_of(contrast["arm"], contrast["reference"], [control["arm"] for control in controls])
    return [controls[place] for place in places]


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
