"""Validate make's variables and load the designs that they select. Needs only the standard library."""

import hashlib
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.study.design import Arm, Design, DesignError, Settings, Study, load

VARIABLES = ("PAPERS", "SCALE", "SEEDS", "DEVICE", "DATA", "EXTRA", "RUNS", "RESULTS", "PAIRS", "TASKS", "RESUME")
VARIABLE_OF_FLAG = {  # flags that EXTRA must not contain -> the variable that sets them
    "--scale": "SCALE",
    "--seed": "SEEDS",
    "--data-seed": "SEEDS",
    "--device": "DEVICE",
    "--data": "DATA",
    "--out": "RUNS",
    "--resume-elsewhere": "RESUME=elsewhere",
}
MATRIX_SUFFIXES = (".npy", ".npz", ".safetensors")


def is_matrix(data: str) -> bool:
    """Return whether DATA names a matrix file (for BSA) and not a folder."""
    return data.lower().endswith(MATRIX_SUFFIXES) and not Path(data).is_dir()


def _flags(words: Iterable[str]) -> set[str]:
    """Return the names of the flags among the words of a command line."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@dataclass(frozen=True)
class Request:
    """The validated variables of one make command, and the designs of its papers."""

    variables: dict[str, str]  # as given
    scale: str
    seeds: tuple[int, ...] | None  # None: the seeds that each study declares
    first_seed_only: bool  # only the first seed that each study declares
    device: str
    data: str
    resume_elsewhere: bool
    extra: tuple[str, ...]  # flags for every train.py
    runs: Path
    results: Path
    designs: dict[str, Design]
    own_data: bool = False  # EXTRA or DATA selects another data set

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Request":
        """Parse words NAME=VALUE. Raises DesignError if a variable or a design is invalid."""
        variables = dict(word.partition("=")[::2] for word in words)
        for name, value in sorted(variables.items()):
            if name not in VARIABLES:
                raise DesignError(f"unknown variable {name}: give one of {', '.join(VARIABLES)}")
            if "\n" in value:
                raise DesignError(f"invalid {name}: remove the line break")
        for name in ("RUNS", "RESULTS"):
            if special := re.sub(r"[\w ./+@#$,-]", "", variables.get(name, "")):
                raise DesignError(f"invalid {name}={variables[name]}: give a path without {special[0]}")
        scale = variables.get("SCALE", "gpu").strip()
        data = variables.get("DATA", "data").strip()
        try:
            extra = tuple(shlex.split(variables.get("EXTRA", "")))
        except ValueError as error:
            raise DesignError(f"invalid EXTRA={variables['EXTRA']}: {error}") from None
        for flag in sorted(_flags(extra) & VARIABLE_OF_FLAG.keys()):
            raise DesignError(f"invalid EXTRA={variables['EXTRA']}: set {VARIABLE_OF_FLAG[flag]} instead of {flag}")
        if (Path(data).is_file() and not is_matrix(data)) or (Path(data).suffix and not Path(data).exists()):
            formats = ", ".join(MATRIX_SUFFIXES)
            raise DesignError(f"invalid DATA={data}: give a folder, or for BSA an existing matrix ending in {formats}")
        if variables.get("RESUME", "").strip() not in ("", "elsewhere"):
            raise DesignError(f"invalid RESUME={variables['RESUME']}: give elsewhere, or leave RESUME unset")
        seeds = variables.get("SEEDS", "own").split()
        declared_seeds = seeds in (["own"], ["first"])
        if not seeds:
            raise DesignError("SEEDS is empty: give at least one seed")
        if not declared_seeds and not all(re.fullmatch(r"\d+", seed) for seed in seeds):
            raise DesignError(
                f"invalid SEEDS={variables['SEEDS']}: give integers separated by spaces, "
                '"first" (the study\'s first seed) or leave SEEDS unset (all its seeds)'
            )
        if len({seed.lstrip("0") for seed in seeds}) < len(seeds):
            raise DesignError(f"invalid SEEDS={variables['SEEDS']}: give each seed once")
        papers = variables.get("PAPERS", "").split()
        if not papers:
            raise DesignError("PAPERS is empty: give at least one paper")
        settings = Settings(
            pairs=tuple(variables.get("PAIRS", "").split()),
            tasks=tuple(variables.get("TASKS", "").split()),
            own_data=is_matrix(data) or "--data-set" in _flags(extra),
        )
        runs = Path(variables.get("RUNS") or f"runs/{scale}")
        return cls(
            variables=variables,
            scale=scale,
            seeds=None if declared_seeds else tuple(map(int, seeds)),
            first_seed_only=seeds == ["first"],
            device=variables.get("DEVICE", "auto"),
            data=data,
            resume_elsewhere=variables.get("RESUME", "").strip() == "elsewhere",
            extra=extra,
            runs=runs,
            results=Path(variables.get("RESULTS") or runs / "report"),
            designs={paper: load(paper, scale, settings) for paper in dict.fromkeys(papers)},
            own_data=settings.own_data,
        )

    @property
    def data_is_matrix(self) -> bool:
        """True if DATA is the user's matrix file, which is then part of a run's flags. A folder is only a location."""
        return is_matrix(self.data)

    @cached_property
    def matrix_digest(self) -> str:
        """sha256 of the matrix file. It is part of a run's flags: the content identifies the data, not the path."""
        with open(self.data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def seeds_of(self, study: Study, arm: str = "") -> tuple[int, ...]:
        """Return the seeds of a study's runs, or those of one arm."""
        if self.seeds:
            return self.seeds
        seeds = study.seeds_of(arm) if arm else study.seeds
        return seeds[:1] if self.first_seed_only else seeds

    @property
    def seed_draws_data(self) -> bool:
        """True at demo scale: a seed also draws data, splits and teacher, unless EXTRA or DATA selects the data."""
        return self.scale == "demo" and not self.own_data

    def data_seed(self, seed: int) -> int:
        """Return --data-seed of the runs with this seed."""
        return seed if self.seed_draws_data else 0

    def flags(self, design: Design, arm: Arm) -> list[str]:
        """Return EXTRA and the flags of an arm, which win. From EXTRA a teacher gets only what selects its data."""
        extra = list(self.extra)
        if arm.name in design.teacher_names():
            text = " ".join(extra)
            given = {name: re.findall(rf"--{name}[ =](\S+)", text) for name in ("rehearse", "data-set")}
            held_out = ["--held-out"] if "--held-out" in extra else []
            extra = [f"--{name}={found[-1]}" for name, found in given.items() if found] + held_out
        return [*extra, *shlex.split(arm.flags)]

    @cached_property
    def overridden_extra(self) -> dict[str, str]:
        """Return paper -> a flag of EXTRA that each of its arms sets itself, so that it has no effect; "" if none."""
        result = {}
        for paper, design in self.designs.items():
            arms = [arm for name, arm in design.by_name.items() if name not in design.teacher_names()]
            of_every_arm = set.intersection(*(_flags(shlex.split(arm.flags)) for arm in arms))
            result[paper] = min(_flags(self.extra) & of_every_arm, default="")
        return result

    def flags_text(self, design: Design, arm: Arm) -> str:
        """Return the content that the file `flags` of an up-to-date run has."""
        matrix = ["--data", f"sha256:{self.matrix_digest[:12]}"] if self.data_is_matrix else []
        return " ".join(["flags:", shlex.join([*self.flags(design, arm), *matrix])]).strip()

    def folder(self, design: Design, arm: str, seed: int) -> Path:
        """Return the folder of a run. A teacher is trained once for the seeds that share its data."""
        return self.runs / design.paper / arm / str(self.data_seed(seed) if arm in design.teacher_names() else seed)

    def command(self, goal: str) -> str:
        """Return the make command that reproduces `goal`."""
        words = ["make", goal]
        for name in ("SCALE", "SEEDS", "EXTRA", "PAIRS", "TASKS"):
            value = self.variables.get(name, "").strip()
            if value:
                words.append(f"{name}={shlex.quote(value)}")
        if self.data_is_matrix:
            words.append(f"DATA={shlex.quote(self.data)}")
        return " ".join(words)

    @property
    def studies(self) -> list[tuple[Design, Study]]:
        """All studies of the papers: main studies, calibration, robustness, curves, other extras."""
        pairs = [(design, study) for design in self.designs.values() for study in design.studies]
        order = ("all", "calibration", "robustness", "curves", "")
        return sorted(pairs, key=lambda pair: order.index(pair[1].group))


def read_text(path: Path) -> str | None:
    """Return the stripped content of a text file, None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
