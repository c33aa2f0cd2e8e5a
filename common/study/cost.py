"""Estimate the hours of the main studies and their arms from finished runs or rehearsals: `make cost`.

    python -m common.study.cost PAPERS="simsiam bsa" SCALE=gpu --rehearsals runs/rehearsal/gpu

The hours of an arm are the mean of its finished runs with the requested flags: training and eval.py, without the kNN
evaluation after each epoch. Without such runs, the speed of the last epoch of its rehearsal gives the training time
alone. Arms and teachers that several studies share are counted once. --unknown prints only the files that a rehearsal
must create. Needs only the standard library.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from common import files
from common.cli import Parser, fail
from common.study.design import Design, DesignError, Study
from common.study.request import Request, read_text

ArmKey = tuple[str, str]  # paper, name


class Cost(NamedTuple):
    """Cost of one run: hours on the devices that it was launched with, peak memory in bytes, and the source.

    A run of zero epochs has no speed.
    """

    hours: float
    examples_per_second: float | None
    peak_memory: int
    source: str


def finished_metrics(request: Request, design: Design, arm: str) -> list[dict[str, Any]]:
    """Return metrics.json of the finished runs of an arm that have the requested flags.

    Diverged runs and runs that shared a GPU are excluded.
    """
    expected = request.flags_text(design, design.arm(arm))
    finished = []
    for path in sorted((request.runs / design.paper / arm).glob("*/metrics.json")):
        if not path.parent.name.isdecimal() or read_text(path.parent / "flags") != expected:
            continue
        metrics = _read_object(path)
        shared_gpu = metrics.get("runs_on_this_gpu", 1) != 1
        if "seconds" in metrics and not shared_gpu and not metrics.get("diverged"):
            finished.append(metrics)
    return finished


def cost_of_runs(finished: Sequence[dict[str, Any]]) -> Cost:
    """Mean hours and speed, and the largest peak memory, of finished runs."""
    hours = mean(metrics["seconds"] for metrics in finished) / 3600
    rates = [rate for metrics in finished if (rate := metrics["examples_per_second"]) is not None]
    peak_memory = max(metrics["peak_memory"] for metrics in finished)
    return Cost(hours, mean(rates) if rates else None, peak_memory, f"{len(finished)} finished")


def cost_of_rehearsal(folder: Path) -> Cost | None:
    """Cost of a full run, extrapolated from the last epoch of a rehearsal. None if there is no rehearsal."""
    saved = _read_object(folder / "args.json")
    try:
        last_epoch = files.read_lines(folder / "train.jsonl")[-1]
        examples = saved["provenance"]["steps"] * saved["arguments"]["batch"]
        rate = last_epoch["examples_per_second"] if examples else None
        hours = 0.0 if rate is None else examples / rate / 3600
        return Cost(hours, rate, last_epoch["peak_memory"], "rehearsal")
    except (files.DamagedFile, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} if the file is missing or invalid."""
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def seeds_of_arms(request: Request, design: Design, studies: Sequence[Study]) -> dict[ArmKey, set[int]]:
    """Return the seeds of all runs of the studies, and of their teachers. Shared runs are counted once."""
    seeds: dict[ArmKey, set[int]] = {}
    for study in studies:
        for name in study.arms:
            arm_seeds = request.seeds_of(study, name)
            seeds.setdefault((design.paper, name), set()).update(arm_seeds)
            if teacher := design.arm(name).needs:
                seeds.setdefault((design.paper, teacher), set()).update(map(request.data_seed, arm_seeds))
    return seeds


def rehearsal_target(request: Request, folder: Path, design: Design, arm: str) -> Path:
    """Return the file that a rehearsal of an arm or teacher must create. It runs the first declared seed."""
    is_teacher = arm in design.teacher_names()
    studies = [
        study
        for study in design.studies
        if arm in (design.arm(name).needs if is_teacher else name for name in study.arms)
    ]
    seed = studies[0].seeds[0]
    # A teacher has no evaluation: teacher.py itself writes metrics.json.
    name = "model.pt" if is_teacher else "metrics.json"
    return folder / design.paper / arm / str(request.data_seed(seed) if is_teacher else seed) / name


def cost_tables(studies: Mapping[str, Mapping[ArmKey, set[int]]], costs: Mapping[ArmKey, Cost]) -> str:
    """Return two text tables: one row per arm, and one row per study (name -> arm -> seeds)."""
    total: dict[ArmKey, set[int]] = {}
    for arms in studies.values():
        for arm, seeds in arms.items():
            total[arm] = total.get(arm, set()) | seeds
    arm_rows = [["arm", "examples/s", "peak GiB", "per run", "source"]]
    for arm in total:
        cost = costs.get(arm)
        cells = ["", "", "", "no run, no rehearsal"]
        if cost:
            memory = f"{cost.peak_memory / 2**30:.2f}"
            speed = "" if cost.examples_per_second is None else f"{cost.examples_per_second:.4g}"
            cells = [speed, memory, duration(cost.hours), cost.source]
        arm_rows.append(["/".join(arm), *cells])
    study_rows = [["study", "runs", "total"]]
    for study, arms in [*studies.items(), ("all, shared arms counted once", total)]:
        unknown = " + unknown arms" if any(arm not in costs for arm in arms) else ""
        hours = sum(len(seeds) * costs[arm].hours for arm, seeds in arms.items() if arm in costs)
        study_rows.append([study, str(sum(map(len, arms.values()))), duration(hours) + unknown])
    note = "Runs one after the other, without the kNN evaluation after each epoch. Source `rehearsal`: training only."
    return "\n\n".join([align(arm_rows), align(study_rows), note])


def duration(hours: float) -> str:
    """Format hours as hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as left-aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module docstring. Exits with code 2 if a variable or a design is invalid."""
    parser = Parser(__doc__)
    parser.add_argument("variables", nargs="*", metavar="VARIABLE=VALUE", help="make's variables")
    parser.add_argument("--rehearsals", type=Path, default=Path("runs/rehearsal"), help="folder of rehearsals")
    parser.add_argument("--unknown", action="store_true", help="print only the files that a rehearsal must create")
    args = parser.parse_args(argv)
    try:
        request = Request.parse(args.variables)
    except DesignError as error:
        fail(str(error))
    studies: dict[str, dict[ArmKey, set[int]]] = {}
    costs: dict[ArmKey, Cost] = {}
    unknown = []
    for design in request.designs.values():
        main_studies = [study for study in design.studies if not study.extra]
        studies |= {study.name: seeds_of_arms(request, design, [study]) for study in main_studies}
        for paper, name in seeds_of_arms(request, design, main_studies):
            if finished := finished_metrics(request, design, name):
                costs[paper, name] = cost_of_runs(finished)
                continue
            target = rehearsal_target(request, args.rehearsals, design, name)
            unknown.append(target)
            if cost := cost_of_rehearsal(target.parent):
                costs[paper, name] = cost
    print(" ".join(map(str, unknown)) if args.unknown else cost_tables(studies, costs))


if __name__ == "__main__":
    main()
