"""The experimental design for tests: arms with their flags, studies with their contrasts.

By default without robustness studies and curves: they repeat the arms of other studies with other numbers.
"""

import shlex
from pathlib import Path

from common.study.design import load

ROOT = Path(__file__).parent.parent
Plan = tuple[dict[str, list[str]], dict[str, list[str]]]  # arms with their flags, studies with their contrasts


def design(paper: str, scale: str = "demo", groups: tuple[str, ...] = ("all", "")) -> Plan:
    """Return (arms, studies) of a paper, for the studies of `groups` ("all": no extras; "": other extras)."""
    table = load(paper, scale)
    studies = [study for study in table.studies if study.group in groups]
    arms = {arm: shlex.split(table.arm(arm).flags) for study in studies for arm in study.arms}
    return arms, {study.name: list(map(str, study.contrasts)) for study in studies}


def plan(paper: str, scale: str) -> Plan:
    """Return (arms, studies) that `make PAPER` runs, without extras."""
    return design(paper, scale, ("all",))
