"""Lock of a run folder, and exit codes for signals, disk errors and dead data loader workers."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from common.cli import EXIT_DISK, EXIT_INTERRUPTED, Failure, fail
from common.files import FAILURE_FILE, PERMANENT_ERRORS

# Errors of a run that has started: of the disk, its permissions or a path, and too many open files.
STORAGE_ERRORS = PERMANENT_ERRORS | {
    errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
LOCK_TAKEN = (errno.EACCES, errno.EAGAIN)  # errors of lockf if another process holds the lock
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: a cluster's warning before the time limit


@contextmanager
def run_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Context manager: lock `folder` for this process.

    In the `with` block, signals, closed pipes, disk errors and dead loader workers become exit codes. The file lock
    `<folder>.lock` is released when this process ends, even if its workers survive. Temporary files of a killed process
    are removed. The reason of a failure is written to `folder`/failure.txt, for the table of the study. Exits with code
    2 if another process holds the lock.
    """
    folder = Path(folder).absolute()
    handlers = {number: signal.signal(number, exit_on_signal) for number in SIGNALS}
    with exit_codes(folder):
        file = acquire_lock(folder) if rank == 0 else None
    try:
        with exit_codes(folder):
            yield
    except BaseException as error:
        write_reason(folder / FAILURE_FILE, error)
        raise
    finally:
        if file:
            file.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_reason(path: Path, error: BaseException) -> None:
    """Write why a run failed to `path`: one line, then the traceback of an unexpected error. Not if interrupted."""
    if isinstance(error, SystemExit) and (error.code == EXIT_INTERRUPTED or not getattr(error, "record", True)):
        return
    unexpected = f"{error!r}\n\n{''.join(traceback.format_exception(error))}"
    text = error.message if isinstance(error, Failure) else unexpected
    # "x": with several ranks the first reason counts, the others fail because of it.
    with contextlib.suppress(OSError), open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{text}\n")


@contextmanager
def exit_codes(folder: Path) -> Iterator[None]:
    """Context manager: closed pipes, disk errors and dead loader workers of the run in `folder` become exit codes."""
    try:
        yield
    except BrokenPipeError:
        # The reader of a pipe has ended, as in `train.py | head`. Python would write to the pipe again at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            fail("standard output was closed; run the same command again to resume", EXIT_INTERRUPTED)
        except BrokenPipeError:  # standard error was the same pipe
            os.dup2(null, 2)
            raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if not folder.exists():
            fail(f"{folder} was removed while its run was in progress: run the same command to start again", EXIT_DISK)
        if error.errno not in STORAGE_ERRORS:
            raise
        path = error.filename2 or error.filename or folder
        fail(
            f"{path} cannot be read or written ({error.strerror}): free disk space or check this path and its "
            "permissions, then run the same command again",
            EXIT_DISK,
        )
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch raises it from a signal handler, at any statement
            raise
        reason = str(error).splitlines()[0]
        fail(
            f"a data loader worker died ({reason}): RAM or /dev/shm may be too small, run the same command again with "
            "fewer --workers to resume",
            EXIT_INTERRUPTED,
        )


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler: exit with code 75. The run resumes from the state of its last epoch."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # loader workers get the same signal: their death is not an error
    fail(f"interrupted by {signal.Signals(number).name}; run the same command again to resume", EXIT_INTERRUPTED)


def wait_for_lock(file: IO[str], what: str) -> None:
    """Lock `file`. If another process holds the lock, say that it writes `what`, and wait.

    Exits with code 2 if the disk has no file locks.
    """
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LOCK_TAKEN:
                raise
            print(f"{what} is being written by another process: waiting for it", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        fail(f"{file.name} cannot be locked ({error.strerror}): use a folder on a disk with file locks")


def acquire_lock(folder: Path) -> IO[str]:
    """Return the open and locked file `<folder>.lock`, which names its owner. Exits with code 2 if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f"{folder.name}.lock"), "a+", encoding="utf-8")  # noqa: SIM115 (kept open)
    except OSError as error:
        fail(f"{folder} cannot be written ({error.strerror}): use another output folder")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCK_TAKEN:
            fail(f"{folder} cannot be locked ({error.strerror}): use a folder on a disk with file locks")
        file.seek(0)
        fail(
            f"{folder} is in use by {file.read().strip() or 'another process'}: wait for its end or use another folder"
        )
    for temporary in folder.glob(".*.part"):
        temporary.unlink()
    with contextlib.suppress(OSError):
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file
