"""Analyse the runs of one study: contrasts over seeds, baselines and the verdict.

An arm is the name of a run folder. With a second factor the name is "arm@setting", and settings are never pooled.
A diverged run counts as chance in the metrics of Design.chance, and is left out of all others of the trained network.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from common.study.design import FINDINGS, Metric, MustBeat, Study, required_baselines
from common.study.results import Runs, notes, provenance, values
from common.study.statistics import mean_interval, paired, seeds_needed, verdict
from common.study.tables import descriptive_remark, finding, headline, primary_contrasts

VERSION = 3  # of the JSON files that plot.py writes
NOT_TESTED = ("not run", "one seed")
COMPARED = ("reproduced", "reversed", "not reproduced", "unclear")  # with the expected verdict, see `_as_expected`
TOO_WEAK = "too weak to test"  # a baseline that the contrast requires was not beaten
NO_BASELINE = "no baseline"  # that baseline has no interval
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
        "version": VERSION,
        "study": study.name,
        "question": study.question,
        "published": study.published,
        "primary_metric": key,
        "second_metric": study.second_metric,
        "margin": study.margin,
        "expected": dict(study.expected),
        "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "contrasts": [contrast for contrast in contrasts if contrast["metric"] == key],
        "all_contrasts": contrasts,
        "baselines": [_baseline(runs, item, metrics[item.metric].better == "lower") for item in study.must_beat],
        "rows": [_row(runs, arm, metrics, remark_of) for arm in runs],
        "notes": notes(runs, metrics, key),
        "provenance": provenance(runs),
    }
    for contrast in result["contrasts"]:  # on other metrics the baselines say nothing
        contrast["verdict"] = verdict_with_baselines(contrast, result["baselines"])
    primary = primary_contrasts(result)
    for baseline in result["baselines"]:
        baseline["primary"] = any(
            baseline in _required_baselines(contrast, result["baselines"]) for contrast in primary
        )
    result |= verdict_of(result)
    return result | {"remark": descriptive_remark(result), "finding": finding(result)}


def verdict_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return "verdict", "calibration", "has_finding" and "headline" of a summary, from its primary contrasts."""
    primary = primary_contrasts(summary)
    arms = [contrast["arm"] for contrast in primary]
    verdicts = {}
    for contrast in primary:
        arm, reference = contrast["arm"], contrast["reference"]
        verdicts[arm if arms.count(arm) == 1 else f"{arm}:{reference}"] = contrast["verdict"]
    distinct = set(verdicts.values())
    return {
        "verdict": distinct.pop() if len(distinct) == 1 else "; ".join(": ".join(item) for item in verdicts.items()),
        "calibration": {arm: _as_expected(verdicts[arm], expected) for arm, expected in summary["expected"].items()},
        "has_finding": any(found in FINDINGS for found in verdicts.values()),
        "headline": headline(summary),
    }


def _as_expected(found: str, expected: str) -> str:
    """Compare the verdict `found` with the expected one: one of COMPARED, or "not run".

    "not reproduced": a difference was expected and there is none, or the reverse.
    """
    if found == expected:
        return "reproduced"
    if found in NOT_TESTED:
        return "not run"
    if found not in FINDINGS:
        return "unclear"
    return "not reproduced" if "no difference" in (found, expected) else "reversed"


def _contrast(runs: Runs, arm: str, reference: str, key: str, metric: Metric, margin: float | None) -> dict[str, Any]:
    """Compare an arm with its reference on one metric, over the seeds that both have finished.

    "verdict" uses only the interval; `verdict_with_baselines` completes it.
    """
    by_seed, reference_by_seed = values(runs, arm, key), values(runs, reference, key)
    seeds = sorted(by_seed.keys() & reference_by_seed.keys())
    statistics = ("mean", "sd", "low", "high", "p", "correlation", "arm_mean", "reference_mean", "seeds_needed")
    result = {"arm": arm, "reference": reference, "metric": key, "n": len(seeds), **dict.fromkeys(statistics)}
    if not seeds:
        diverged = {
            name: sum(
                bool(run.metrics and run.metrics.get("diverged")) and seed not in measured
                for seed, run in runs[name].items()
            )
            for name, measured in ((arm, by_seed), (reference, reference_by_seed))
        }
        reasons = [f"{name}: {count} of {len(runs[name])} diverged" for name, count in diverged.items() if count]
        return result | {"verdict": "; ".join(reasons) or "not run"}
    arm_values, reference_values = [by_seed[seed] for seed in seeds], [reference_by_seed[seed] for seed in seeds]
    difference = paired(arm_values, reference_values)
    result |= asdict(difference)
    result |= {"arm_mean": mean_interval(arm_values).mean, "reference_mean": mean_interval(reference_values).mean}
    result["verdict"] = verdict(difference, metric.better, margin) if metric.judged else "not judged"
    if result["verdict"] == "unclear" and margin and difference.sd:
        needed = seeds_needed(difference.sd, margin)
        result["seeds_needed"] = needed if needed > len(seeds) else None
    return result


def _baseline(runs: Runs, must_beat: MustBeat, lower_is_better: bool) -> dict[str, Any]:
    """Compare an arm with the baseline that it must beat.

    `beaten` is True if the interval of arm minus baseline excludes zero on the better side, and None without an
    interval.
    """
    arm = values(runs, must_beat.arm, must_beat.metric)
    baseline_arm = must_beat.baseline_arm or must_beat.arm
    baseline = values(runs, baseline_arm, must_beat.baseline_metric or must_beat.metric)
    seeds = sorted(arm.keys() & baseline.keys())
    statistics = ("mean", "low", "high", "arm_mean", "baseline_mean", "beaten")
    result = asdict(must_beat) | {"lower_is_better": lower_is_better, "n": len(seeds)} | dict.fromkeys(statistics)
    if seeds:
        difference = paired([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds])
        result |= {"mean": difference.mean, "low": difference.low, "high": difference.high}
        result["arm_mean"] = mean_interval([arm[seed] for seed in seeds]).mean
        result["baseline_mean"] = mean_interval([baseline[seed] for seed in seeds]).mean
        if difference.low is not None:
            result["beaten"] = verdict(difference, "lower" if lower_is_better else "higher") == "better"
    return result


def _required_baselines(contrast: dict[str, Any], baselines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the baselines that a contrast requires: if one is not beaten, the contrast is not informative."""
    tested = [(baseline["arm"], baseline["baseline_arm"]) for baseline in baselines]
    return [baselines[index] for index in required_baselines(contrast["arm"], contrast["reference"], tested)]


def verdict_with_baselines(contrast: dict[str, Any], baselines: list[dict[str, Any]]) -> str:
    """Return the verdict of a contrast, or TOO_WEAK or NO_BASELINE if a baseline that it requires was not beaten."""
    if contrast["low"] is None or contrast["verdict"] == "not judged":
        return contrast["verdict"]
    beaten = [baseline["beaten"] for baseline in _required_baselines(contrast, baselines)]
    if False in beaten:
        return TOO_WEAK
    return NO_BASELINE if None in beaten else contrast["verdict"]


def _row(runs: Runs, arm: str, metrics: Mapping[str, Metric], remark_of: RemarkFunction | None) -> dict[str, Any]:
    """Summarise one arm: flags, remark, statistics of every metric, diverged and missing seeds."""
    measured = {seed: run.metrics for seed, run in runs[arm].items() if run.metrics}
    diverged = [seed for seed, run_metrics in measured.items() if run_metrics.get("diverged")]
    finished = [run_metrics for run_metrics in measured.values() if not run_metrics.get("diverged")]
    by_metric = {name: values(runs, arm, name) for name in metrics}
    return {
        "arm": arm,
        "flags": next((run.flags for run in runs[arm].values() if run.flags), ""),
        "remark": remark_of(finished) if remark_of and finished else None,
        "metrics": {
            name: asdict(mean_interval(list(by_seed.values())))
            | {"values": {str(seed): value for seed, value in by_seed.items()}}
            for name, by_seed in by_metric.items()
            if by_seed
        },
        "diverged": diverged,
        "missing": [seed for seed in runs[arm] if seed not in measured],
        "seeds": len(runs[arm]),
    }
