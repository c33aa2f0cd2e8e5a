"""A command on the next free GPU of a list: `python -m common.study.slots "0 1 2 3" COMMAND ...`, which make uses.

Each word of the list is a slot, a value of CUDA_VISIBLE_DEVICES ("0", or "0,1" for a command that takes two). The
command replaces this process and keeps the slot's lock, which dies with it. A GPU that is listed several times serves
several commands at once, and each is told how many, so that its timings are marked.
"""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from common.cli import EXIT_INTERRUPTED, SHARED, fail

FOLDER = Path("runs/.slots")


def take(slots: list[str], folder: Path) -> str:
    """The first slot that no process on this machine holds, waiting for one; the lock stays with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        number: os.open(folder / f"{socket.gethostname()}-{number}-{slot}", os.O_RDWR | os.O_CREAT)
        for number, slot in enumerate(slots)
    }
    while True:
        for number, file in files.items():
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            os.set_inheritable(file, True)  # else it would be closed, and so unlocked, by exec
            return slots[number]
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> None:
    """Run the command; does not return. Stops (exit 2) where there is no slot, no command, or no such program."""
    slots, *command = (sys.argv[1:] if argv is None else argv) or [""]
    if not slots.split() or not command:
        fail('a list of GPUs and a command are needed: python -m common.study.slots "0 1" COMMAND ...')
    try:
        slot = take(slots.split(), FOLDER)
    except KeyboardInterrupt:
        fail("interrupted while waiting for a free GPU", EXIT_INTERRUPTED)
    os.environ["CUDA_VISIBLE_DEVICES"] = slot
    os.environ[SHARED] = str(slots.split().count(slot))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        fail(f"{command[0]} cannot be started ({error.strerror})")


if __name__ == "__main__":
    main()
