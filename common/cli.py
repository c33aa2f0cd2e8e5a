"""The command line of every script: its scales, the flags that all papers share, its exit codes and how it fails."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER = 2  # exit code: a wrong flag, missing or broken data; nothing was started
EXIT_DISK = 4  # exit code: no space, or the disk failed; what was finished stands
EXIT_INTERRUPTED = 75  # exit code: SIGTERM or SIGINT; the same command goes on
SHARED = "RUNS_ON_THIS_GPU"  # environment: how many runs share this GPU (common.study.slots); their timings are marked
NON_METHOD_FLAGS = frozenset(
    {"out", "replace", "data", "device", "workers", "weights"}
)  # flags that say where, not what
SCALES = ("demo", "gpu", "paper")
Defaults = Mapping[str, tuple[Any, Any, Any]]  # flag -> its default at demo, gpu and paper scale


def fail(sentence: str, code: int = EXIT_USER) -> NoReturn:
    """Print one sentence (what, where, what to do) to stderr and end with `code`. Raises SystemExit."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and answers a mistake with one line and exit code 2."""

    def __init__(self, description: str | None, defaults: Defaults | None = None):
        table = "\n".join(
            f"  --{name.replace('_', '-'):20}" + "".join(f"{value!s:>14}" for value in row)
            for name, row in (defaults or {}).items()
        )
        header = "  " + " " * 22 + "".join(f"{scale:>14}" for scale in SCALES)
        super().__init__(
            description=(description or "").strip(),
            epilog=f"defaults by scale:\n{header}\n{table}" if table else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def run_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Add the flags that mean the same in all five papers; returns the group `data` for a paper's own."""
    run = parser.add_argument_group("run")
    run.add_argument("--scale", choices=SCALES, default="demo", help="column of the table below")
    run.add_argument("--out", type=Path, default=Path("runs/scratch"), help="folder of this run")
    run.add_argument("--seed", type=int_min(0), default=0, help="initial weights, batches and views follow from it")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    run.add_argument("--threads", type=int_min(1), default=1, help="CPU threads; equal bits need equal threads")
    run.add_argument("--replace", action="store_true", help="move a run with other flags aside instead of refusing")
    run.add_argument("--rehearse", type=int_min(1), help="two epochs of this many steps, measured on as few examples")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, default=Path("data"), help="where data sets lie and caches go")
    return data


def parse(parser: Parser, defaults: Defaults, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`; flags that were not given take their default from the column of --scale."""
    column = SCALES.index(parser.parse_known_args(argv)[0].scale)
    parser.set_defaults(**{name: row[column] for name, row in defaults.items()})
    return parser.parse_args(argv)


def int_min(least: int):
    """A type for add_argument: a whole number of at least `least`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    convert.__name__ = "whole number"
    return convert


def float_in(low: float, high: float = float("inf")):
    """A type for add_argument: a finite number in [low, high]."""

    def convert(text: str) -> float:
        value = float(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    convert.__name__ = "number"
    return convert
