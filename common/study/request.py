"""What was asked of make: its variables, checked, and the designs that they choose. Standard library alone."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.study.design import Arm, Design, DesignError, Settings, Study, load

VARIABLES = ("PAPERS", "SCALE", "SEEDS", "DEVICE", "DATA", "EXTRA", "RUNS", "RESULTS", "PAIRS", "TASKS")
OWN_FLAGS = {"--scale": "SCALE", "--seed": "SEEDS", "--device": "DEVICE", "--data": "DATA", "--out": "RUNS"}
MATRICES = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True)
class Request:
    """What was asked of make. `seeds` is None where every study takes its own; `extra` are flags for every train.py."""

    given: dict[str, str]  # the variables as they were given
    scale: str
    seeds: tuple[int, ...] | None
    first: bool  # only the first of a study's own seeds
    device: str
    data: str
    extra: tuple[str, ...]
    runs: Path
    results: Path
    designs: dict[str, Design]

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Request":
        """From words NAME=VALUE. Raises DesignError."""
        given = dict(word.partition("=")[::2] for word in words)
        if unknown := given.keys() - set(VARIABLES):
            raise DesignError(f"{sorted(unknown)[0]} is not one of the variables {', '.join(VARIABLES)}")
        if broken := [name for name, value in given.items() if "\n" in value]:
            raise DesignError(f"{broken[0]} holds a line break")
        for name in ("RUNS", "RESULTS"):
            if odd := re.sub(r"[\w ./+@#$,-]", "", given.get(name, "")):
                raise DesignError(
                    f"{name}={given[name]}: a folder without {odd[0]} is needed, as make reads it as a sign"
                )
        scale = given.get("SCALE", "gpu").strip()
        data = given.get("DATA", "data").strip()
        try:
            extra = tuple(shlex.split(given.get("EXTRA", "")))
        except ValueError as error:
            raise DesignError(f"EXTRA={given['EXTRA']}: {error}") from None
        for word in extra:
            if (flag := word.split("=")[0]) in OWN_FLAGS:
                raise DesignError(f"EXTRA={given['EXTRA']}: make sets {flag} itself, from {OWN_FLAGS[flag]}")
        seeds = given.get("SEEDS", "own").split()
        if not seeds:
            raise DesignError("SEEDS is empty: name at least one")
        if seeds not in (["own"], ["first"]) and not all(re.fullmatch(r"\d+", seed) for seed in seeds):
            raise DesignError(f"SEEDS={given['SEEDS']}: whole numbers are needed, or the word first")
        if len({seed.lstrip("0") for seed in seeds}) < len(seeds):
            raise DesignError(f"SEEDS={given['SEEDS']}: a seed is named twice")
        own_data = data.endswith(MATRICES) or any(word.split("=")[0] == "--data-set" for word in extra)
        settings = Settings(tuple(given.get("PAIRS", "").split()), tuple(given.get("TASKS", "").split()), own_data)
        papers = given.get("PAPERS", "").split()
        if not papers:
            raise DesignError("PAPERS is empty: name at least one")
        runs = Path(given.get("RUNS") or f"runs/{scale}")
        return cls(
            given,
            scale,
            None if seeds in (["own"], ["first"]) else tuple(map(int, seeds)),
            seeds == ["first"],
            given.get("DEVICE", "auto"),
            data,
            extra,
            runs,
            Path(given.get("RESULTS") or runs / "report"),
            {paper: load(paper, scale, settings) for paper in dict.fromkeys(papers)},
        )

    @property
    def own_matrix(self) -> bool:
        """Whether DATA is a matrix of the user's own, so that runs on it are other runs. A folder is but a place."""
        return self.data.endswith(MATRICES)

    def seeds_of(self, study: Study) -> tuple[int, ...]:
        """The seeds that a study is run over."""
        return self.seeds or (study.seeds[:1] if self.first else study.seeds)

    def flags(self, design: Design, arm: Arm) -> list[str]:
        """The flags of an arm's runs. A teacher takes of EXTRA only that this is a rehearsal."""
        extra = list(self.extra)
        if arm.name in design.teacher_names():
            joined = re.findall(r"--rehearse[ =](\d+)", " ".join(extra))
            extra = [f"--rehearse={steps}" for steps in joined[-1:]]
        return [*shlex.split(arm.flags), *extra]

    def flags_text(self, design: Design, arm: Arm) -> str:
        """What the file `flags` of an up-to-date run holds."""
        matrix = ["--data", self.data] if self.own_matrix else []
        return " ".join(["flags:", shlex.join([*self.flags(design, arm), *matrix])]).strip()

    def folder(self, design: Design, arm: str, seed: int) -> Path:
        """The folder of a run."""
        return self.runs / design.paper / arm / str(0 if arm in design.teacher_names() else seed)

    def command(self, goal: str) -> str:
        """The make command that reproduces `goal`."""
        words = [f"{name}={shlex.quote(value)}" for name in ("SCALE", "SEEDS", "EXTRA", "PAIRS", "TASKS")
                 if (value := self.given.get(name, "").strip())]  # fmt: skip
        matrix = [f"DATA={shlex.quote(self.data)}"] if self.own_matrix else []
        return " ".join(["make", goal, *words, *matrix])

    @property
    def studies(self) -> list[tuple[Design, Study]]:
        """Every study of the papers: the plan's, then robustness, curves and the other extras."""
        every = [(design, study) for design in self.designs.values() for study in design.studies]
        order = ("all", "robustness", "curves", "")
        return sorted(every, key=lambda one: order.index(one[1].group))


def read(path: Path) -> str | None:
    """A one-line file, None where it is missing."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
