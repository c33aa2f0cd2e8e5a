"""The experimental design as `make` lists it: the studies of the plan, and a paper's arms with their flags."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make(*words: str) -> str:
    """What `make` prints. Raises CalledProcessError."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout


def design(paper: str, scale: str = "demo") -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(arms with their flags, studies with their contrasts) of a paper, extras included."""
    lines = make(f"SCALE={scale}").split("\n\n")
    mine = next(block for block in lines if block.startswith(f"{paper}\n")).splitlines()
    words = {line.split()[0].rstrip(":"): line.split()[1:] for line in mine[1:]}
    studies = {name: rest for name, rest in words.items() if name.startswith(f"{paper}-")}
    return {name: rest for name, rest in words.items() if name not in studies}, studies


def plan(paper: str, scale: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The same without extras: what `make PAPER` runs and draws."""
    arms, studies = design(paper, scale)
    names = make("--silent", f"SCALE={scale}", f"--eval=names: ; @echo $({paper})", "names").split()
    kept = {name: studies[name] for name in names}
    needed = {arm for contrasts in kept.values() for contrast in contrasts for arm in contrast.split(":")}
    return {arm: flags for arm, flags in arms.items() if arm in needed}, kept
