"""Run a command on the next free GPU of a list: `python -m common.study.slots "0 1 2 3" COMMAND ...` (make GPUS=...).

Each word of the list is a slot, a value of CUDA_VISIBLE_DEVICES ("0", or "0,1" for a command on two GPUs). The command
replaces this process (exec) and inherits the file lock of its slot, which is released when it ends. A GPU that is
listed several times runs several commands at once. The environment variable RUNS_ON_THIS_GPU gives their number.
"""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from common.cli import EXIT_INTERRUPTED, RUNS_ON_THIS_GPU, fail, prepare_streams
from common.lock import LOCK_TAKEN

FOLDER = Path("runs/.slots")


def acquire_slot(slots: list[str], folder: Path) -> str:
    """Lock the first slot that is free on this machine and return it. Waits until one is free."""
    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, slot in enumerate(slots):
            name = f"{socket.gethostname()}-{number}-{slot.replace('/', '-')}"
            files[number] = os.open(folder / name, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}): drop GPUS, or start in another folder")
    waited = False
    while True:
        for number, file in files.items():
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in LOCK_TAKEN:
                    fail(f"{folder} cannot be locked ({error.strerror}): drop GPUS, or work on a disk with file locks")
                continue
            os.set_inheritable(file, True)  # otherwise exec closes the file and releases the lock
            return slots[number]
        if not waited:
            print(f"waiting for a free GPU: GPUS='{' '.join(slots)}' are all in use", file=sys.stderr, flush=True)
        waited = True
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the command. Exits with code 2 if slots or command are missing or it cannot start."""
    prepare_streams()
    slots, *command = (sys.argv[1:] if argv is None else argv) or [""]
    if not slots.split() or not command:
        fail('missing list of GPUs or command: write python -m common.study.slots "0 1" COMMAND ...')
    try:
        slot = acquire_slot(slots.split(), FOLDER)
    except KeyboardInterrupt:
        fail("interrupted while waiting for a free GPU; run the same command again", EXIT_INTERRUPTED)
    os.environ["CUDA_VISIBLE_DEVICES"] = slot
    os.environ[RUNS_ON_THIS_GPU] = str(slots.split().count(slot))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        fail(f"cannot start {command[0]} ({error.strerror}): check LAUNCH and PYTHON")


if __name__ == "__main__":
    main()
