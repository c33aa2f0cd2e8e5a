"""Analyse the runs of one study: contrasts over seeds, baselines and the verdict.

An arm is the name of a run folder. With a second factor the name is "arm@setting", and settings are never pooled.
Diverged runs are counted and never averaged.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from common.study.design import Metric, MustBeat, Study, required_baselines
from common.study.results import Runs, notes, provenance, values
from common.study.statistics import paired, summary, verdict, welch
from common.study.tables import NOT_INFORMATIVE, ONE_SEED, finding

FINDINGS = ("lower", "higher", "no difference")  # the verdicts that count as a finding
NO_BASELINE = "no interval for the baseline"
RemarkFunction = Callable[[list[dict[str, Any]]], str | None]  # see `summarise`


def summarise(
    study: Study, runs: Runs, metrics: Mapping[str, Metric], remark_of: RemarkFunction | None = None
) -> dict[str, Any]:
    """Return the study's contrasts, baselines, arms, notes, provenance and verdict as a JSON-serialisable dictionary.

    `runs` contains the runs of `study.arms`. `remark_of` takes the metrics of an arm's finished seeds, without diverged
    ones. It returns a remark that follows the arm's name in a sentence ("collapsed in every seed"), or None.
    """
    key = study.metric
    contrasts = [
        _contrast(runs, arm, reference, name, metric, study.margin if name == key else None)
        | {"primary": name == key and index < study.primary}
        for name, metric in metrics.items()
        for index, (arm, reference) in enumerate(study.pairs)
    ]
    result: dict[str, Any] = {
        "study": study.name,
        "question": study.question,
        "published": study.published,
        "primary_metric": key,
        "margin": study.margin,
        "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "contrasts": [contrast for contrast in contrasts if contrast["metric"] == key],
        "all_contrasts": contrasts,
        "controls": [_baseline(runs, item, metrics[item.metric].better == "lower") for item in study.must_beat],
        "rows": [_row(runs, arm, metrics, remark_of) for arm in runs],
        "notes": notes(runs, metrics),
        "provenance": provenance(runs),
    }
    primary = [contrast for contrast in result["contrasts"] if contrast["primary"]]
    for baseline in result["controls"]:
        baseline["primary"] = any(baseline in _required_baselines(contrast, result["controls"]) for contrast in primary)
    arms = [contrast["arm"] for contrast in primary]
    verdicts = {}
    for contrast in primary:
        arm, reference = contrast["arm"], contrast["reference"]
        name = arm if arms.count(arm) == 1 else f"{arm}:{reference}"
        verdicts[name] = verdict_with_baselines(contrast, result["controls"])
    if len(set(verdicts.values())) == 1:
        result["verdict"] = next(iter(verdicts.values()))
    else:
        result["verdict"] = "; ".join(f"{name}: {text}" for name, text in verdicts.items())
    result["counted"] = any(text in FINDINGS for text in verdicts.values())
    return result | {"finding": finding(result)}


def _contrast(runs: Runs, arm: str, reference: str, key: str, metric: Metric, margin: float | None) -> dict[str, Any]:
    """Compare an arm with its reference on one metric: Welch and paired differences, and the verdict ("word")."""
    by_seed, reference_by_seed = values(runs, arm, key), values(runs, reference, key)
    numbers = ("mean", "low", "high", "paired_mean", "paired_low", "paired_high", "correlation")
    result = {"arm": arm, "reference": reference, "metric": key, **dict.fromkeys(numbers)}
    result |= {"n": len(by_seed), "n_reference": len(reference_by_seed), "word": "no value"}
    if not by_seed or not reference_by_seed:
        for name in (arm, reference):
            diverged = sum(bool(run.metrics and run.metrics.get("diverged")) for run in runs[name].values())
            if diverged:
                result["word"] = f"{name}: {diverged} of {len(runs[name])} diverged"
        return result
    difference = welch(list(by_seed.values()), list(reference_by_seed.values()))
    result |= asdict(difference)
    if not metric.judged:
        result["word"] = "not judged"
    else:
        result["word"] = ONE_SEED if difference.low is None else verdict(difference, margin)
    shared_seeds = sorted(by_seed.keys() & reference_by_seed.keys())
    if shared_seeds:
        matched, correlation = paired(
            [by_seed[seed] for seed in shared_seeds], [reference_by_seed[seed] for seed in shared_seeds]
        )
        result |= {"paired_mean": matched.mean, "paired_low": matched.low, "paired_high": matched.high}
        result["correlation"] = correlation
    return result


def _baseline(runs: Runs, must_beat: MustBeat, lower_is_better: bool) -> dict[str, Any]:
    """Compare an arm with the baseline that it must beat.

    `passed` is True if the interval of arm minus baseline excludes zero on the better side, and None without an
    interval.
    """
    arm = list(values(runs, must_beat.arm, must_beat.metric).values())
    baseline_arm = must_beat.baseline_arm or must_beat.arm
    baseline = list(values(runs, baseline_arm, must_beat.baseline_metric or must_beat.metric).values())
    result = asdict(must_beat) | {"lower_wins": lower_is_better} | dict.fromkeys(("mean", "low", "high", "passed"))
    if arm and baseline:
        difference = welch(arm, baseline)
        result |= asdict(difference)
        result["arm_mean"] = summary(arm).mean
        result["control_mean"] = summary(baseline).mean
        if difference.low is not None:
            result["passed"] = verdict(difference) == ("lower" if lower_is_better else "higher")
    return result


def _required_baselines(contrast: dict[str, Any], baselines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the baselines that a contrast requires: if one is not beaten, the contrast is not informative."""
    indices = required_baselines(contrast["arm"], contrast["reference"], [baseline["arm"] for baseline in baselines])
    return [baselines[index] for index in indices]


def verdict_with_baselines(contrast: dict[str, Any], baselines: list[dict[str, Any]]) -> str:
    """Return the verdict of a contrast, or the reason why it has none if a baseline that it requires was not beaten."""
    passed = [baseline["passed"] for baseline in _required_baselines(contrast, baselines)]
    if False in passed:
        return NOT_INFORMATIVE
    if contrast["low"] is not None and (not passed or None in passed):
        return NO_BASELINE
    return contrast["word"]


def _row(runs: Runs, arm: str, metrics: Mapping[str, Metric], remark_of: RemarkFunction | None) -> dict[str, Any]:
    """Summarise one arm: flags, remark, statistics of every metric, diverged and missing seeds."""
    measured = {seed: run.metrics for seed, run in runs[arm].items() if run.metrics}
    diverged = [seed for seed, run_metrics in measured.items() if run_metrics.get("diverged")]
    finished = [run_metrics for run_metrics in measured.values() if not run_metrics.get("diverged")]
    by_metric = {name: values(runs, arm, name) for name in metrics}
    return {
        "arm": arm,
        "flags": next((run.flags for run in runs[arm].values() if run.flags), ""),
        "word": remark_of(finished) if remark_of and finished else None,
        "metrics": {
            name: asdict(summary(list(by_seed.values())))
            | {"values": {str(seed): value for seed, value in by_seed.items()}}
            for name, by_seed in by_metric.items()
            if by_seed
        },
        "diverged": diverged,
        "missing": [seed for seed in runs[arm] if seed not in measured],
    }
