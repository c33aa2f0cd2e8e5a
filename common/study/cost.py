"""Hours of every arm and study, from runs that were made: `make rehearsal`, `make cost`.

    python -m common.study.cost PAPERS="simsiam bsa" SCALE=gpu --rehearsals runs/rehearsal/gpu

An arm's hours are those of its finished runs with the flags that are asked for, else what the last epoch of its
rehearsal says of a whole run's training; monitors and evaluation then come on top. An arm counts once for all studies
that share it. With --unknown only the metrics.json that a rehearsal must make are printed. Standard library alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from common import files
from common.cli import fail
from common.study.design import Design, DesignError, Study
from common.study.request import Request, read

Arms = dict[str, int]  # "paper/arm" -> how many runs


class Cost(NamedTuple):
    """Of one run: hours on one device (or on the ranks that it was launched with), bytes, and where they come from."""

    hours: float
    examples_per_second: float
    peak_memory: int
    told_by: str


def finished(request: Request, design: Design, arm: str) -> list[dict]:
    """metrics.json of the finished runs of an arm that have the flags asked for.

    Diverged runs and runs that shared a GPU do not tell what one costs.
    """
    expected = request.flags_text(design, design.arm(arm))
    folders = [path.parent for path in sorted((request.runs / design.paper / arm).glob("*/metrics.json"))]
    found = [_object(folder / "metrics.json") for folder in folders
             if folder.name.isdecimal() and read(folder / "flags") == expected]  # fmt: skip
    alone = [one for one in found if one.get("runs_on_this_gpu", 1) == 1]
    return [one for one in alone if "seconds" in one and not one.get("diverged")]


def of_runs(found: Sequence[dict]) -> Cost:
    """The mean of finished runs."""
    hours = mean(one["seconds"] for one in found) / 3600
    rate = mean(one["examples_per_second"] for one in found)
    return Cost(hours, rate, max(one["peak_memory"] for one in found), f"{len(found)} finished")


def of_rehearsal(folder: Path) -> Cost | None:
    """What the last epoch of a rehearsal says of a whole run; None where there is none."""
    facts = _object(folder / "args.json")
    try:
        last = files.read_lines(folder / "train.jsonl")[-1]
        examples = facts["provenance"]["steps"] * facts["arguments"]["batch"]
        rate = last["examples_per_second"]
        return Cost(examples / rate / 3600, rate, last["peak_memory"], "rehearsal")
    except (files.DamagedFile, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None


def _object(path: Path) -> dict:
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def arms_of(request: Request, design: Design, studies: Sequence[Study]) -> Arms:
    """The arms of the studies, and how many runs each is: an arm of several studies has its seeds once."""
    seeds: dict[str, set[int]] = {}
    for study in studies:
        for arm in study.arms:
            seeds.setdefault(f"{design.paper}/{arm}", set()).update(request.seeds_of(study))
    return {arm: len(own) for arm, own in seeds.items()}


def show(studies: dict[str, Arms], every: Arms, costs: dict[str, Cost]) -> str:
    """Two tables: a line an arm, and a line a study."""
    rows = [["arm", "examples/s", "peak GiB", "a run", "from"]]
    for arm in every:
        cost = costs.get(arm)
        cells = ["", "", "", "no run, no rehearsal"]
        if cost:
            memory = f"{cost.peak_memory / 2**30:.2f}"
            cells = [f"{cost.examples_per_second:.4g}", memory, duration(cost.hours), cost.told_by]
        rows.append([arm, *cells])
    sums = [["study", "runs", "all of them"]]
    for study, arms in [*studies.items(), ("together, shared arms once", every)]:
        unknown = " and what is not known" if any(arm not in costs for arm in arms) else ""
        hours = sum(count * costs[arm].hours for arm, count in arms.items() if arm in costs)
        sums.append([study, str(sum(arms.values())), duration(hours) + unknown])
    note = (
        "One run at a time; `rehearsal`: training alone, monitors and evaluation come on top. CoCoRD's teachers, "
        "trained once for all seeds, are not counted."
    )
    return "\n\n".join([columns(rows), columns(sums), note])


def duration(hours: float) -> str:
    """Hours in the unit that a reader would take."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows as aligned text."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(words: Sequence[str]) -> None:
    """Command line; see the module's docstring."""
    words = list(words)
    rehearsals = Path("runs/rehearsal")
    if "--rehearsals" in words:
        place = words.index("--rehearsals")
        rehearsals = Path(words[place + 1])
        del words[place : place + 2]
    unknown = "--unknown" in words
    try:
        request = Request.parse(word for word in words if word != "--unknown")
    except DesignError as error:
        fail(str(error))
    studies: dict[str, Arms] = {}
    every: Arms = {}
    costs: dict[str, Cost] = {}
    lacking = []
    for design in request.designs.values():
        first = {arm: study.seeds[0] for study in reversed(design.studies) for arm in study.arms}
        plan = [study for study in design.studies if not study.extra]
        studies |= {study.name: arms_of(request, design, [study]) for study in plan}
        arms = arms_of(request, design, plan)
        every |= arms
        for name in arms:
            arm = name.partition("/")[2]
            if runs := finished(request, design, arm):
                costs[name] = of_runs(runs)
                continue
            folder = rehearsals / name / str(first[arm])  # a rehearsal takes a study's first seed
            lacking.append(folder / "metrics.json")
            if cost := of_rehearsal(folder):
                costs[name] = cost
    print(" ".join(map(str, lacking)) if unknown else show(studies, every, costs))


if __name__ == "__main__":
    main(sys.argv[1:])
