"""Shared command-line code: scales, common flags, argument types, exit codes and error messages."""

import argparse
import atexit
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

# Exit codes.
EXIT_USER = 2  # a wrong flag, missing or damaged data, out of memory, or divergence without a checkpoint
EXIT_DISK = 4  # the disk is full or failed; finished files stay valid
EXIT_INTERRUPTED = 75  # a signal, a closed pipe or a dead worker; the same command resumes the run

RUNS_ON_THIS_GPU = "RUNS_ON_THIS_GPU"  # environment variable of common.study.slots: number of runs that share this GPU
# Flags for paths and hardware: they do not define a run.
NON_METHOD_FLAGS = frozenset(
    {"out", "replace", "data", "device", "workers", "weights", "resume_elsewhere", "tensorboard"}
)
SCALES = ("demo", "gpu", "paper")
MAX_THREADS = 1024  # torch crashes when it cannot create its threads
MAX_WORKERS = 256  # processes of a DataLoader
MAX_WIDTH = 2**20  # of a layer, a code or a queue
MAX_LAYERS = 1000  # of blocks or tokens that are added one by one
MAX_NUMBER = 1e30  # float32 ends at 3.4e38
Defaults = Mapping[str, tuple[Any, Any, Any]]  # flag -> default at demo, gpu and paper scale


class Failure(SystemExit):
    """The exit of a process with `code`, after `message` was printed. `record`: see `fail`."""

    def __init__(self, message: str, code: int, record: bool):
        super().__init__(code)
        self.message, self.record = message, record


def fail(message: str, code: int = EXIT_USER, record: bool = True) -> NoReturn:
    """Print `message` as one line to stderr and exit with `code`. Raises Failure, a SystemExit.

    The message names the flag or file, what is wrong and what to do. With `record`, `run_lock` writes it to failure.txt
    in the run folder. Pass False if the command is refused and the run in the folder is not affected.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise Failure(message, code, record)


def open_closed_streams() -> None:
    """Open /dev/null in place of closed standard streams: otherwise the next file opened would get their messages."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (stays open)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (stays open)


def prepare_streams() -> None:
    """Prepare a script's standard output and error for closed ones, any terminal, early ends of pipes and Ctrl-C."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a path shows escapes instead
    atexit.unregister(flush_stdout)
    atexit.register(flush_stdout)
    sys.excepthook = report_exception


def flush_stdout() -> None:
    """Write the buffered output. If its reader has ended, as in `| head`, the rest goes to /dev/null."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def report_exception(exception_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line after Ctrl-C, a traceback for other exceptions. `run_lock` handles Ctrl-C in a run."""
    if issubclass(exception_type, KeyboardInterrupt):
        print("error: interrupted; run the same command again", file=sys.stderr)
    else:
        sys.__excepthook__(exception_type, error, trace)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Append its default to the help of each flag, except for switches and where the default depends on --scale."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = isinstance(action.default, bool) or action.default in (None, "", [], argparse.SUPPRESS)
        return action.help if no_default else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviated flags. A usage error prints one line and exits with code 2."""

    def __init__(self, description: str | None, defaults: Defaults | None = None):
        table = "\n".join(
            f"  --{name.replace('_', '-'):20}" + "".join(f"{value!s:>16}" for value in row)
            for name, row in (defaults or {}).items()
        )
        prepare_streams()
        header = "  " + " " * 22 + "".join(f"{scale:>16}" for scale in SCALES)
        super().__init__(
            description=(description or "").strip(),
            epilog=f"defaults by scale:\n{header}\n{table}" if table else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def run_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Add the flags that all five papers share. Returns the argument group `data`, to which a paper adds its flags."""
    run = parser.add_argument_group("run")
    run.add_argument("--scale", choices=SCALES, default="demo", help="scale of the defaults (data, network, training "
                     "length): see the table below")  # fmt: skip
    run.add_argument("--out", type=Path, default=Path("runs/scratch"), help="output folder of this run")
    run.add_argument("--seed", type=int_in(0), default=0, help="determines initial weights, batches and "
                     "augmentation; see also --data-seed")  # fmt: skip
    run.add_argument("--seed-offset", type=int_in(0), default=0, metavar="N", help="added to --seed: other initial "
                     "weights and batches on the same data (arm base-again, an A/A test); args.json records the sum as "
                     "seed")  # fmt: skip
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--threads", type=int_in(1, MAX_THREADS), default=1,
                     help="CPU threads; changing it changes floating-point rounding")  # fmt: skip
    precisions = ("auto", "float32", "bfloat16")
    run.add_argument("--precision", choices=precisions, default="auto", help="precision of the networks' forward pass "
                     "in training; losses are computed in float32 from its outputs. auto: bfloat16 on CUDA, else "
                     "float32")  # fmt: skip
    run.add_argument("--replace", action="store_true", help="if --out contains a run with other flags, rename it to "
                     "OUT.replaced-N")  # fmt: skip
    run.add_argument("--resume-elsewhere", action="store_true", help="resume on another device, torch version, number "
                     "of threads or processes: not bit-identical; recorded in args.json. With --precision auto the "
                     "precision can change with the device")  # fmt: skip
    run.add_argument("--tensorboard", action="store_true", help="also write the metrics of each epoch for TensorBoard, "
                     "into OUT/tensorboard (needs the package tensorboard)")  # fmt: skip
    run.add_argument("--rehearse", type=int_in(1), help="smoke test: two epochs of N steps on a subset", metavar="N")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets and caches")
    data.add_argument("--data-seed", type=int_in(0), default=0, metavar="N", help="seed of generated data, splits and "
                      "labelled subsets; of other data it changes only splits and subsets")  # fmt: skip
    return data


def eval_parser(description: str | None, data: str = "folder of data sets and caches") -> Parser:
    """Return a parser with the arguments that the eval.py of all five papers share. `data` describes --data.

    A flag that is not given is None, which means the value used in training.
    """
    parser = Parser(description)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("--data", type=Path, help=f"{data}; default: as in training")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: as in training")
    parser.add_argument("--threads", type=int_in(1, MAX_THREADS), help="CPU threads; default: as in training")
    return parser


def parse(parser: Parser, defaults: Defaults, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`. Flags that are not given get their default from the column of --scale.

    --seed-offset is added to `seed`.
    """
    column = SCALES.index(parser.parse_known_args(argv)[0].scale)
    parser.set_defaults(**{name: row[column] for name, row in defaults.items()})
    args = parser.parse_args(argv)
    args.seed += args.seed_offset
    return args


def apply_lr_factor(args: argparse.Namespace) -> None:
    """Multiply --lr by --lr-factor, which is then removed. Exits with code 2 if the product is too large."""
    args.lr *= args.lr_factor
    if args.lr > MAX_NUMBER:
        fail(f"--lr-factor {args.lr_factor:g} is too large (--lr times it is {args.lr:g}): give a smaller factor")
    del args.lr_factor


def int_in(low: int, high: int = 2**31 - 1):
    """Return an argparse type for integers in [low, high]."""

    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is more than {high}")
        return value

    convert.__name__ = "integer"
    return convert


def float_in(low: float, high: float = MAX_NUMBER):
    """Return an argparse type: a number in [low, high]."""

    def convert(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    convert.__name__ = "number"
    return convert
