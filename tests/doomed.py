"""SimSiam in processes that are made to die, for test_faults."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from forked import SERVER

from common import files, image_folder
from simsiam import plot, train


def child(work: Callable[..., None], *arguments, printed: Path | None = None) -> BaseProcess:
    """`work(*arguments)`, started; what it prints goes to the file `printed`."""
    process = SERVER.Process(target=directed, args=(printed or Path(os.devnull), work, arguments))
    process.start()
    return process


def outcome(process: BaseProcess) -> int:
    """Its exit code when it ends, or minus the signal that killed it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def directed(printed: Path, work: Callable[..., None], arguments: tuple) -> None:
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    work(*arguments)
    sys.stdout.flush()


def kill_at_write(number: int) -> None:
    """SIGKILL this process at its `number`-th fsync: in a line of the log, in a state, between a file and its name."""
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    files.os.fsync = fsync


def training(argv: list[str], kill_at: int = 0, largest_file: int = 0) -> None:
    """train.py, killed at a write, or refused files of more than `largest_file` bytes by the system."""
    if kill_at:
        kill_at_write(kill_at)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    train.main(argv)


def die(worker: int) -> None:
    """In a moment, whatever worker and parent are doing then."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def training_with_dying_workers(argv: list[str]) -> None:
    image_folder.leave_interrupts_to_the_parent = die
    train.main(argv)


def drawing(argv: list[str], kill_at: int) -> None:
    """plot.py, killed at a write."""
    kill_at_write(kill_at)
    plot.main(argv)
