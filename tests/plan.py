"""The experimental design as the tests use it: a paper's arms with their flags, and its studies with their contrasts.

Without robustness and curves: their arms are the other studies' at other numbers, and no test trains them all.
"""

import shlex
from pathlib import Path

from common.study.design import load

ROOT = Path(__file__).parent.parent
Plan = tuple[dict[str, list[str]], dict[str, list[str]]]  # arms with their flags, studies with their contrasts


def design(paper: str, scale: str = "demo", groups: tuple[str, ...] = ("all", "")) -> Plan:
    """A paper's plan and its other extras."""
    found = load(paper, scale)
    studies = [study for study in found.studies if study.group in groups]
    arms = {arm: shlex.split(found.arm(arm).flags) for study in studies for arm in study.arms}
    return arms, {study.name: list(map(str, study.contrasts)) for study in studies}


def plan(paper: str, scale: str) -> Plan:
    """Without extras: what `make PAPER` runs and draws."""
    return design(paper, scale, ("all",))
