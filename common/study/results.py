"""Read the run folders of a study: metrics, arguments, logs, and notes on missing or inconsistent runs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import NON_METHOD_FLAGS
from common.files import FAILURE_FILE, read_json
from common.study.design import Study
from common.study.names import without_setting

PROVENANCE = {  # key in args.json's provenance -> plural for the note about differing values
    "source": "versions of the training code (sha256)",
    "eval_source": "versions of the evaluation code (sha256)",
    "data": "data digests",
    "device": "devices",
    "torch": "torch versions",
    "threads": "numbers of threads",
    "world": "numbers of ranks",
}


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. `metrics` is None if metrics.json is missing or unreadable."""

    metrics: dict[str, Any] | None
    args: dict[str, Any]
    log: list[dict[str, Any]]
    flags: str = ""
    notes: list[str] = field(default_factory=list)


Runs = Mapping[str, Mapping[int, RunFiles]]
Curve = tuple[list[float], list[float]]


@dataclass
class View:
    """Input of a paper's plot.draw: the study, its runs and the summary of `analysis.summarise`.

    `folder` contains the arms. `caption` describes data and training setup in a sentence. `styles`: see
    `figures.arm_styles`. `chance`: see `Design`.
    """

    folder: Path
    seeds: Sequence[int]
    study: Study
    runs: Runs
    summary: dict[str, Any]
    caption: str
    styles: Mapping[str, Mapping[str, Any]]
    chance: Mapping[str, Mapping[str, float]]

    @property
    def reference(self) -> str:
        """The reference of the first contrast."""
        return self.study.pairs[0][1]

    @property
    def highlight(self) -> list[str]:
        """The arms by importance in a figure: base, the arms of primary contrasts, their references, the others."""
        base = [arm for arm in self.study.arms if without_setting(arm) == "base"]
        arms, references = zip(*self.study.pairs[: self.study.primary], strict=True)
        return list(dict.fromkeys([*base, *arms, *references, *self.study.arms]))


def read_runs(
    folder: Path, seeds: Mapping[str, Sequence[int]], chance: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, dict[int, RunFiles]]:
    """Read the runs <folder>/<arm>/<seed>/; `seeds` has the seeds of every arm.

    A diverged run gets the values of `chance` (see Design). Unreadable files are reported in the notes of the run.
    """
    runs = {arm: {seed: _read_run(Path(folder), arm, seed) for seed in seeds[arm]} for arm in seeds}
    for run in _all_runs(runs):
        if run.metrics and run.metrics.get("diverged"):
            data_set = run.args.get("arguments", {}).get("data_set", "")
            for metric, by_data_set in (chance or {}).items():
                run.metrics[metric] = by_data_set.get(data_set, by_data_set.get(""))
    return runs


def _read_run(folder: Path, arm: str, seed: int) -> RunFiles:
    """Read the files of one run."""
    folder, run_name = folder / arm / str(seed), f"{arm}, seed {seed}"
    contents: dict[str, dict[str, Any] | None] = {"metrics": None, "args": None}
    log, notes = [], []

    def read_text(name: str) -> str:
        """Return the content of a text file, "" if it is missing or cannot be read, with a note."""
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            notes.append(f"{run_name}: {name} cannot be read ({error.strerror}).")
            return ""

    for name in contents:
        try:
            contents[name] = dict(read_json(folder / f"{name}.json"))
            if name == "args" and not isinstance((contents["args"] or {}).get("arguments"), dict):
                contents["args"] = None
                raise ValueError("no arguments")
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, OSError):
            remedy = ": delete it, and make evaluates the run again" if name == "metrics" else ""
            notes.append(f"{run_name}: {name}.json cannot be read{remedy}.")
    for line in read_text("train.jsonl").splitlines():
        try:
            log.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the process was killed during the write
            notes.append(f"{run_name}: skipped an unreadable line of train.jsonl.")
    if contents["metrics"] is None and (folder / FAILURE_FILE).exists():
        reason = read_text(FAILURE_FILE).partition("\n")[0]
        notes.append(f"{run_name} failed: {reason.rstrip('.') or 'unknown reason'}.")
    flags = read_text("flags").removeprefix("flags:").strip()
    return RunFiles(contents["metrics"], contents["args"] or {}, log, flags, notes)


def _finite(value: object) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _all_runs(runs: Runs) -> list[RunFiles]:
    """Return the runs of all arms and seeds."""
    return [run for by_seed in runs.values() for run in by_seed.values()]


def values(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """Return seed -> value of a metric for one arm. Values that are not finite numbers are excluded.

    In a diverged run the metrics of the trained network are null, except for those in `chance` of `read_runs`.
    """
    by_seed = {seed: run.metrics.get(metric) for seed, run in runs.get(arm, {}).items() if run.metrics}
    return {seed: float(value) for seed, value in by_seed.items() if value is not None and _finite(value)}


def values_by_arm(runs: Runs, metric: str, arms: Iterable[str] | None = None) -> dict[str, list[float]]:
    """Return arm -> the `values` of a metric, for all arms or for `arms`."""
    return {arm: list(values(runs, arm, metric).values()) for arm in (runs if arms is None else arms)}


def data_seeds(runs: Runs) -> set[int]:
    """Return the values of --data-seed in the runs; {0} if all seeds share the data."""
    return {run.args["arguments"].get("data_seed", 0) for run in _all_runs(runs) if run.args}


def arm_arguments(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return the arguments of the first run of each arm; arms without a run are left out."""
    by_arm = {arm: [run.args["arguments"] for run in by_seed.values() if run.args] for arm, by_seed in runs.items()}
    return {arm: arguments[0] for arm, arguments in by_arm.items() if arguments}


def first_arguments(runs: Runs) -> dict[str, Any]:
    """Return the arguments of the first run that has any, {} if there is none."""
    return next((run.args["arguments"] for run in _all_runs(runs) if run.args), {})


def series(runs: Runs, key: str, x: str = "epoch") -> dict[str, list[Curve]]:
    """Return for each arm one curve (x, y) per seed from train.jsonl, for `figures.curves`.

    Records in which x or y is not finite are skipped.
    """
    result: dict[str, list[Curve]] = {}
    for arm, by_seed in runs.items():
        result[arm] = []
        for run in by_seed.values():
            records = [record for record in run.log if _finite(record.get(x)) and _finite(record.get(key))]
            if records:
                result[arm].append(([record[x] for record in records], [record[key] for record in records]))
    return result


def provenance(runs: Runs) -> dict[str, Any]:
    """Return the provenance of args.json, number of runs and hours. A value on which runs differ becomes a list."""
    result: dict[str, Any] = {}
    for key in (*PROVENANCE, "commit", "dirty"):
        measured = [run for run in _all_runs(runs) if run.metrics or key != "eval_source"]
        records = [(run.metrics or {}) | run.args.get("provenance", {}) for run in measured]
        distinct = {record.get(key) for record in records if record}
        result[key] = next(iter(distinct), None) if len(distinct) < 2 else sorted(distinct, key=str)
    seconds = [run.metrics.get("seconds") or 0 for run in _all_runs(runs) if run.metrics]
    return result | {"runs": len(seconds), "hours": round(sum(seconds) / 3600, 2)}


def notes(runs: Runs, metrics: Iterable[str], primary_metric: str = "") -> list[str]:
    """Return one sentence for each missing or diverged run, absent metric, unreadable file and inconsistency.

    A diverged run counts as chance if it has a value of `primary_metric` (see `read_runs`).
    """
    result = []
    for arm, by_seed in runs.items():
        measured = {seed: run.metrics for seed, run in by_seed.items() if run.metrics}
        gaps = {"missing": [seed for seed in by_seed if seed not in measured]}
        diverged = {seed: saved for seed, saved in measured.items() if saved.get("diverged")}
        counted = [seed for seed, saved in diverged.items() if _finite(saved.get(primary_metric))]
        gaps |= {"diverged, counted as chance": counted}
        gaps |= {"diverged, not averaged": [seed for seed in diverged if seed not in counted]}
        gaps |= {f"without {key}": [seed for seed, saved in measured.items() if key not in saved] for key in metrics}
        for gap, seeds in gaps.items():
            if seeds:
                listed = ", ".join(map(str, seeds))
                result.append(f"{arm}: {len(seeds)} of {len(by_seed)} {gap} (seed {listed}).")
        result += [note for run in by_seed.values() for note in run.notes]
        arguments = [run.args["arguments"] for run in by_seed.values() if run.args.get("arguments")]
        names = {name for run_arguments in arguments for name in run_arguments}
        for name in sorted(names - NON_METHOD_FLAGS - {"seed", "data_seed"}):
            distinct = sorted({str(run_arguments.get(name)) for run_arguments in arguments})
            if len(distinct) > 1:
                result.append(f"{arm}: its seeds differ in --{name.replace('_', '-')} ({', '.join(distinct)}).")
    shared = max((run.args.get("provenance", {}).get("runs_on_this_gpu", 1) for run in _all_runs(runs)), default=1)
    if shared > 1:
        result.append(f"Up to {shared} runs shared a GPU: their times and speeds are not those of a single run.")
    for key, value in provenance(runs).items():
        if key in PROVENANCE and isinstance(value, list) and not (key == "data" and len(data_seeds(runs)) > 1):
            length = 12 if key in ("source", "eval_source", "data") else None
            shown = ", ".join(str(item)[:length] for item in value)
            result.append(f"The runs mix {PROVENANCE[key]}: {shown}.")
    return result
