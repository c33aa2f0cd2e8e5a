"""Where a run's numbers come from: the script and its hash, the commit, the machine."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

SHARED = "RUNS_ON_THIS_GPU"  # set by common.slots where several runs were packed on one GPU: their timings are marked


def script_facts(source: Path) -> dict[str, Any]:
    """The script's name and sha256, the git commit, whether the tree differed from it (None outside a clone), and
    how many runs shared the GPU.

    results/ does not count: make draws there after each seed, while the next one's runs begin.
    """

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        answer = subprocess.run(["git", "-C", str(source.parent), *words], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
    return {
        "script": f"{source.absolute().parent.name}/{source.name}",
        "source": hashlib.sha256(source.read_bytes()).hexdigest(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "runs_on_this_gpu": int(os.environ.get(SHARED, "1")),
    }
