"""What the run folders of a study hold: metrics, arguments and logs, and what is missing or mixed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import NON_METHOD_FLAGS
from common.files import read_json
from common.study.design import Study

FACTS = {  # of args.json's provenance, and what a mixture of each is called
    "source": "versions of the code (sha256)",
    "data": "data digests",
    "device": "devices",
    "torch": "torch versions",
    "threads": "numbers of threads",
    "world": "numbers of ranks",
}


@dataclass(frozen=True)
class Record:
    """One run; `metrics` is None where metrics.json is missing or unreadable."""

    metrics: dict[str, Any] | None
    args: dict[str, Any]
    log: list[dict[str, Any]]
    flags: str = ""
    notes: list[str] = field(default_factory=list)


Runs = Mapping[str, Mapping[int, Record]]
Curve = tuple[list[float], list[float]]


@dataclass
class View:
    """What a paper's figures are drawn from. `data`: data and recipe in words; `caption`: the same as a sentence."""

    args: Any
    study: Study
    runs: Runs
    summary: dict[str, Any]
    data: str
    caption: str

    @property
    def reference(self) -> str:
        """The reference of the first contrast."""
        return self.study.pairs[0][1]


def read_runs(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, Record]]:
    """The runs <folder>/<arm>/<seed>/. What cannot be read becomes a sentence in its notes."""
    return {arm: {seed: _read(Path(folder), arm, seed) for seed in seeds} for arm in arms}


def _read(folder: Path, arm: str, seed: int) -> Record:
    folder, name = folder / arm / str(seed), f"{arm}, seed {seed}"
    parts: dict[str, dict[str, Any] | None] = {"metrics": None, "args": None}
    log, notes = [], []
    for part in parts:
        try:
            parts[part] = dict(read_json(folder / f"{part}.json"))
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, OSError):
            mend = ": delete it, and make evaluates the run again" if part == "metrics" else ""
            notes.append(f"{name}: {part}.json cannot be read{mend}.")
    path = folder / "train.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            log.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # a kill in the middle of the write
            notes.append(f"{name}: an unreadable line of train.jsonl is left out.")
    flags = (
        (folder / "flags").read_text(encoding="utf-8").removeprefix("flags:").strip()
        if (folder / "flags").exists()
        else ""
    )
    return Record(parts["metrics"], parts["args"] or {}, log, flags, notes)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def values(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """One arm's finite values of a metric by seed, diverged runs left out."""
    found = {seed: run.metrics for seed, run in runs.get(arm, {}).items() if run.metrics}
    kept = {seed: metrics.get(metric) for seed, metrics in found.items() if not metrics.get("diverged")}
    return {seed: float(value) for seed, value in kept.items() if value is not None and _finite(value)}


def first_arguments(runs: Runs) -> dict[str, Any]:
    """The arguments of the first run that is there; {} where there is none."""
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    return next((run.args["arguments"] for run in every if run.args), {})


def series(runs: Runs, key: str, x: str = "epoch") -> dict[str, list[Curve]]:
    """By arm, one curve a seed: the x and y of train.jsonl where both are finite. For `figures.curves`."""
    result: dict[str, list[Curve]] = {}
    for arm, by_seed in runs.items():
        logs = [[one for one in run.log if _finite(one.get(x)) and _finite(one.get(key))] for run in by_seed.values()]
        result[arm] = [([one[x] for one in log], [one[key] for one in log]) for log in logs if log]
    return result


def provenance(runs: Runs) -> dict[str, Any]:
    """The facts of args.json, one value where all runs agree, else their list; runs and hours."""
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    result: dict[str, Any] = {}
    for key in (*FACTS, "commit", "dirty"):
        found = {run.args["provenance"].get(key) for run in every if run.args.get("provenance")}
        result[key] = next(iter(found), None) if len(found) < 2 else sorted(found, key=str)
    seconds = [run.metrics.get("seconds") or 0 for run in every if run.metrics]
    return result | {"runs": len(seconds), "hours": round(sum(seconds) / 3600, 2)}


def notes(runs: Runs, metrics: Iterable[str]) -> list[str]:
    """One sentence for each hole, divergence, unreadable file and mixture."""
    result = []
    for arm, by_seed in runs.items():
        found = {seed: run.metrics for seed, run in by_seed.items() if run.metrics}
        holes = {"missing": [seed for seed in by_seed if seed not in found]}
        holes["diverged, not averaged"] = [seed for seed, one in found.items() if one.get("diverged")]
        holes |= {f"without {key}": [seed for seed, one in found.items() if key not in one] for key in metrics}
        for what, seeds in holes.items():
            if seeds:
                listed = ", ".join(map(str, seeds))
                result.append(f"{arm}: {len(seeds)} of {len(by_seed)} {what} (seed {listed}).")
        result += [note for run in by_seed.values() for note in run.notes]
        arguments = [run.args["arguments"] for run in by_seed.values() if run.args.get("arguments")]
        for name in sorted({name for one in arguments for name in one} - NON_METHOD_FLAGS - {"seed"}):
            if len(told := sorted({str(one.get(name)) for one in arguments})) > 1:
                result.append(f"{arm}: its seeds differ in --{name.replace('_', '-')} ({', '.join(told)}).")
    packed = [run.args.get("provenance", {}).get("runs_on_this_gpu", 1) for by in runs.values() for run in by.values()]
    if most := max([one for one in packed if one > 1], default=0):
        result.append(f"Up to {most} runs shared a GPU: speeds and seconds are not those of a run alone.")
    for key, value in provenance(runs).items():
        if key in FACTS and isinstance(value, list):
            shown = ", ".join(str(one)[: 12 if key in ("source", "data") else None] for one in value)
            result.append(f"The runs mix {FACTS[key]}: {shown}.")
    return result
