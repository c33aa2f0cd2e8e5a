"""Run scripts in child processes that are killed or hit a resource limit, for test_faults."""

import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from forked import SERVER

from common import files, image_folder, images
from simsiam import plot, train

SMALL_GLYPHS = {"train": 250, "test": 60}


def start_process(work: Callable[..., None], *arguments, printed: Path | None = None) -> BaseProcess:
    """Start `work(*arguments)` in a child process. Its output is appended to the file `printed`."""
    process = SERVER.Process(target=run_with_output, args=(printed or Path(os.devnull), work, arguments))
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    """Wait for the process. Returns its exit code, or minus the number of the signal that killed it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_with_output(printed: Path, work: Callable[..., None], arguments: tuple) -> None:
    """Run `work(*arguments)` with stdout and stderr in the file `printed`. Called in the child process."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    work(*arguments)
    sys.stdout.flush()


def kill_at_fsync(number: int) -> None:
    """SIGKILL this process at its `number`-th fsync: within a log line or state, or between writing and renaming."""
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    files.os.fsync = fsync


def run_train(argv: list[str], kill_at: int = 0, largest_file: int = 0, module: str = "simsiam.train") -> None:
    """Run a train.py; kill it at its `kill_at`-th fsync, or limit the file size to `largest_file` bytes (0: neither).

    Glyph data sets are as small as `SMALL_GLYPHS`.
    """
    images.GLYPH_COUNTS = SMALL_GLYPHS
    if kill_at:
        kill_at_fsync(kill_at)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    importlib.import_module(module).main(argv)


def kill_soon(worker: int) -> None:
    """Kill this DataLoader worker by SIGALRM after 50 ms. A worker_init_fn."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def run_train_with_dying_workers(argv: list[str]) -> None:
    """Run train.py with DataLoader workers that die soon after their start."""
    image_folder.ignore_sigint = kill_soon
    train.main(argv)


def run_plot(argv: list[str], kill_at: int) -> None:
    """Run plot.py; kill it at its `kill_at`-th fsync."""
    kill_at_fsync(kill_at)
    plot.main(argv)
