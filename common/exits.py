"""How a script ends: its exit codes, and the one sentence that a user reads when it stops early."""

import sys
from typing import NoReturn

USER = 2  # a wrong flag, missing or broken data: nothing was started
DISK = 4  # no space, or the disk failed: what was finished stands
INTERRUPTED = 75  # SIGTERM or SIGINT: the same command goes on


def stop(sentence: str, code: int = USER) -> NoReturn:
    """Print one sentence (what, where, what to do) to stderr and end with `code`. Raises SystemExit."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)
