"""What arms and studies cost, from runs that were made: `make rehearsal`, `make cost`, `make evening`.

    python -m common.cost runs/rehearsal/gpu simsiam-stop-gradient=no-stop-gradient:base --seeds 0 1 2 --runs runs/gpu

An arm's hours are those of its finished runs, else what the last epoch of its rehearsal says of a whole run's training;
monitors and evaluation then come on top. An arm counts once for all studies that share it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from common import files
from common.command import Parser, number
from common.exits import stop


class Cost(NamedTuple):
    """Of one run: hours on one device (or on the ranks that it was launched with), bytes, and where they come from."""

    hours: float
    examples_per_second: float
    peak_memory: int
    told_by: str


def of_arm(arm: str, rehearsals: Path, runs: Path | None) -> Cost | None:
    """The mean over the finished runs <runs>/<arm>/<seed>/, else from <rehearsals>/<arm>/0/; None where there is none.

    Diverged runs and runs that shared a GPU do not tell what one costs.
    """
    paths = sorted((runs / arm).glob("*/metrics.json")) if runs else []
    found = [one for path in paths if path.parent.name.isdecimal() and "seconds" in (one := _object(path))]
    found = [one for one in found if not one.get("diverged") and one.get("runs_on_this_gpu", 1) == 1]
    if found:
        hours = mean(one["seconds"] for one in found) / 3600
        rate = mean(one["examples_per_second"] for one in found)
        return Cost(hours, rate, max(one["peak_memory"] for one in found), f"{len(found)} finished")
    told = _object(rehearsals / arm / "0" / "args.json")
    try:
        last = files.read_lines(rehearsals / arm / "0" / "train.jsonl")[-1]
        examples = told["provenance"]["steps"] * told["arguments"]["batch"]
        rate = last["examples_per_second"]
        return Cost(examples / rate / 3600, rate, last["peak_memory"], "rehearsal")
    except (files.Damaged, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None


def _object(path: Path) -> dict:
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def arms_of(study: str, contrasts: Sequence[str]) -> list[str]:
    """Every arm of the contrasts, once, as paper/arm."""
    return list(dict.fromkeys(f"{study.split('-')[0]}/{arm}" for one in contrasts for arm in one.split(":")))


def fitting(studies: Mapping[str, list[str]], costs: Mapping[str, Cost], seeds: int, hours: float) -> list[str]:
    """Which studies' contrasts fit into `hours` at `seeds` seeds: the cheapest first, shared arms paid once."""
    paid: set[str] = set()
    chosen: list[str] = []
    while True:
        prices = {}
        for study, contrasts in studies.items():
            arms = arms_of(study, contrasts)
            if study not in chosen and all(arm in costs for arm in arms):
                prices[study] = seeds * sum(costs[arm].hours for arm in arms if arm not in paid)
        if not prices or prices[cheapest := min(prices, key=lambda study: prices[study])] > hours:
            return chosen
        hours -= prices[cheapest]
        paid |= set(arms_of(cheapest, studies[cheapest]))
        chosen.append(cheapest)


def show(studies: Mapping[str, list[str]], costs: Mapping[str, Cost], seeds: int) -> str:
    """Two tables: a line an arm, and a line a study."""
    arms = {study: arms_of(study, contrasts) for study, contrasts in studies.items()}
    every = list(dict.fromkeys(arm for some in arms.values() for arm in some))
    rows = [["arm", "examples/s", "peak GiB", "a run", "from"]]
    for arm in every:
        cost = costs.get(arm)
        told = ["", "", "", "no run, no rehearsal"]
        if cost:
            told = [f"{cost.examples_per_second:.4g}", f"{cost.peak_memory / 2**30:.2f}", duration(cost.hours), cost[3]]
        rows.append([arm, *told])
    sums = [["study", "runs", "all of them"]]
    for study, some in [*arms.items(), ("together, shared arms once", every)]:
        unknown = " and what is not known" if any(arm not in costs for arm in some) else ""
        hours = seeds * sum(costs[arm].hours for arm in some if arm in costs)
        sums.append([study, str(seeds * len(some)), duration(hours) + unknown])
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("rehearsals", type=Path, help="folder of rehearsals, PAPER/ARM/0")
    parser.add_argument("studies", nargs="+", metavar="STUDY=CONTRAST,CONTRAST")
    parser.add_argument("--seeds", nargs="+", default=["0"], help="how many there are counts")
    parser.add_argument(
        "--runs", type=Path, help="folder of whole runs, PAPER/ARM/SEED; they tell more than rehearsals"
    )
    parser.add_argument("--fitting", type=number(0), metavar="HOURS", help="only name the studies that fit")
    args = parser.parse_args(argv)
    studies = {}
    for one in args.studies:
        study, _, contrasts = one.partition("=")
        if not contrasts or any(contrast.count(":") != 1 for contrast in contrasts.split(",")):
            stop(f"{one!r} is no study: write STUDY=arm:reference,arm:reference")
        studies[study] = contrasts.split(",")
    every = {arm for study, contrasts in studies.items() for arm in arms_of(study, contrasts)}
    costs = {arm: cost for arm in every if (cost := of_arm(arm, args.rehearsals, args.runs))}
    if args.fitting is None:
        print(show(studies, costs, len(args.seeds)))
    else:
        chosen = fitting(studies, costs, len(args.seeds), args.fitting)
        print(" ".join(f"{study}={','.join(studies[study])}" for study in chosen))


if __name__ == "__main__":
    main()
