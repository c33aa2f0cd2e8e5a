"""One process alone on a folder, and how it is interrupted: the lock, the signals, the full disk."""

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from common.cli import EXIT_DISK, EXIT_INTERRUPTED, fail
from common.files import FULL

# What a disk or its owner can do to a run that has begun, too many open files included.
STORAGE_ERRORS = FULL | {errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


@contextmanager
def run_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold `folder` alone; turn signals, the disk's errors and the death of a worker into exit codes meanwhile.

    The lock is a file beside the folder and dies with its process, whatever becomes of that process's workers.
    What a killed process left half-written is removed. Stops (exit 2) where another process has the lock.
    """
    folder = Path(folder).absolute()
    handlers = {number: signal.signal(number, interrupted) for number in (signal.SIGTERM, signal.SIGINT)}
    file = lock_folder(folder) if rank == 0 else None
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        named = error.filename or folder
        fail(f"{named}: {error.strerror}; mend that and run the same command again, it resumes", EXIT_DISK)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch raises it from a signal handler, wherever we are
            raise
        reason = str(error).splitlines()[0]
        fail(
            f"a data loader worker died ({reason}): too little memory or /dev/shm? Use fewer --workers and run the "
            "same command again, it resumes",
            EXIT_INTERRUPTED,
        )
    finally:
        if file:
            file.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def interrupted(number: int, frame: FrameType | None) -> None:
    """Signal handler: end at once; the last epoch's state stands. That workers die of the same signal is no error."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fail(f"interrupted by {signal.Signals(number).name}; the same command goes on", EXIT_INTERRUPTED)


def lock_folder(folder: Path) -> IO[str]:
    """The open, locked file `<folder>.lock`, with its owner's name in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f"{folder.name}.lock"), "a+", encoding="utf-8")  # noqa: SIM115 (kept open)
    except OSError as error:
        fail(f"--out {folder} cannot be written ({error.strerror}): choose another folder")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        file.seek(0)
        fail(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it or choose another folder")
    for part in folder.glob(".*.part"):
        part.unlink()
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file
