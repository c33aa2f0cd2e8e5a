"""Explicit make rules for what was asked, in one file that make includes and that one can open.

    python -m common.study.rules PAPERS="simsiam bsa" SCALE=demo SEEDS="0 1" EXTRA="--epochs 3"
    python -m common.study.rules help SCALE=demo

The words are make's variables. Prints the file's path, RUNS/rules-<digest of the words>.mk, or with `help` the papers,
studies and arms. A wrong word or a wrong design: one sentence, exit code 2. Standard library alone.

Two rules for each run (model.pt by train.py, metrics.json by eval.py) and one for each study, which draws it.
STUDY@SEED, STUDY-primary@SEED and STUDY@report are goals of the inner makes; STUDY, PAPER, all, primary,
robustness, curves and report call them seed by seed.
"""

import contextlib
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.cli import EXIT_USER, fail
from common.files import write_text
from common.study.design import Arm, Design, DesignError, Study
from common.study.request import Request, read


def target(path: Path | str) -> str:
    """A path as a target or a prerequisite."""
    return re.sub(r"([ #:%])", r"\\\1", str(path)).replace("$", "$$")


def shell(words: Iterable[object]) -> str:
    """A command as a line of a recipe."""
    return shlex.join(map(str, words)).replace("$", "$$")


def write_line(text: str, path: str) -> str:
    """A recipe line that writes one line of text."""
    return f"@printf '%s\\n' {shell([text])} >{path}"


def run_rules(request: Request, design: Design, arm: Arm, seed: int) -> str:
    """The two rules of a run. Other flags than those it was trained with force a new training."""
    folder, paper = request.folder(design, arm.name, seed), design.paper
    text = request.flags_text(design, arm)
    old = read(folder / "flags")
    forced = (folder / "model.pt").exists() and old != text
    needed = request.folder(design, arm.needs, 0) / "model.pt" if arm.needs else None
    script = f"{paper}/{'teacher' if arm.name in design.teacher_names() else 'train'}.py"
    before = " ".join(
        ["$(venv)"] + ([f"$(data)/{design.data}"] if design.data else []) + ([target(needed)] if needed else [])
    )
    train = [script, "--scale", request.scale, "--out", folder, "--seed", folder.name, "--device", request.device,
             "--data", request.data, "--replace", *(["--weights", needed] if needed else []),
             *request.flags(design, arm)]  # fmt: skip
    model, metrics = target(folder / "model.pt"), target(folder / "metrics.json")
    lines = [f"# trained with other flags: {(old or 'not known').splitlines()[0]} ."] if forced else []
    lines += [
        f"{model}: {'FORCE ' if forced else ''}| {before}",
        f"\t$(run) {shell(train)}",
        f"\t{write_line(text, shell([folder / 'flags']))}",
        f"{metrics}: {model}",
        f"\t$(run) {shell([f'{paper}/eval.py', folder, '--device', request.device, '--data', request.data])}",
        f".PRECIOUS: {model} {metrics}",  # they are written whole or not at all: an interrupted make keeps them
    ]
    return "\n".join(lines)


def study_rules(request: Request, design: Design, study: Study) -> str:
    """The rules that draw a study: after each seed, with holes for the seeds to come, and whenever it is asked.

    One file, .drawn/STUDY, says what the report shows. It is out of date when a run of the inner make's seed is newer,
    and when it was drawn from other contrasts, seeds or runs.
    """
    seeds = request.seeds_of(study)
    plot = shell([
        f"{design.paper}/plot.py", study.name, "--scale", request.scale, "--runs", request.runs / design.paper,
        "--seeds", *map(str, seeds), "--results", request.results, "--reproduce", request.command(study.name),
        *(word for key in ("PAIRS", "TASKS") if request.given.get(key, "").strip()
          for word in (f"--{key.lower()}", *request.given[key].split())),
    ])  # fmt: skip
    drawn = " ".join([*map(str, study.contrasts), "seeds", *map(str, seeds), "runs", str(request.runs)])
    stamp = request.results / ".drawn" / study.name
    there = (request.results / f"{study.name}.json").exists() and read(stamp) == drawn
    draw = [f"\t$(python) {plot}", f"\t@mkdir -p {shell([stamp.parent])}", f"\t{write_line(drawn, shell([stamp]))}"]
    needs = f"{design.paper}/plot.py {design.paper}/studies.py{'' if there else ' FORCE'}"
    lines = [f"# {' '.join(study.question.split())}", f"{target(stamp)}: {needs}", *draw]
    for goal, arms in ((study.name, study.arms), (f"{study.name}-primary", study.primary_only.arms)):
        for seed in seeds:
            metrics = [target(request.folder(design, arm, seed) / "metrics.json") for arm in arms]
            lines += [
                f".PHONY: {goal}@{seed}",
                f"{goal}@{seed}: {target(stamp)}",
                f"ifneq ($(filter {goal}@{seed},$(MAKECMDGOALS)),)",
                f"{target(stamp)}: {' '.join(metrics)}",
                "endif",
            ]
    return "\n".join([*lines, f".PHONY: {study.name}@report", f"{study.name}@report: | $(venv)", *draw])


def rounds(request: Request, studies: Sequence[tuple[Design, Study]], suffix: str = "", by_paper: bool = False) -> str:
    """The inner goals of studies, a word for each seed (and paper, if `by_paper`), joined by +."""
    seeds = dict.fromkeys(seed for _, study in studies for seed in request.seeds_of(study))
    papers = dict.fromkeys(design.paper for design, _ in studies)
    groups = [[paper] for paper in papers] if by_paper else [list(papers)]
    words = []
    for seed in seeds:
        for group in groups:
            goals = [f"{study.name}{suffix}@{seed}" for design, study in studies
                     if design.paper in group and seed in request.seeds_of(study)]  # fmt: skip
            words += ["+".join(goals)] if goals else []
    return " ".join(words)


def goal_rules(request: Request) -> str:
    """The goals that a user names: an inner make for each seed, then the page."""
    plan = [one for one in request.studies if one[1].group == "all"]
    goals = {study.name: [(design, study)] for design, study in request.studies}
    goals |= {paper: [one for one in plan if one[0].paper == paper] for paper in request.designs}
    goals |= {"all": plan}
    goals |= {group: [one for one in request.studies if one[1].group == group] for group in ("robustness", "curves")}
    others = ["primary", *(f"{paper}-teachers" for paper, design in request.designs.items() if design.teachers)]
    lines = [f"goals := {' '.join([*goals, *others])} report draw-page up-to-date-page"]
    for goal, studies in goals.items():
        names = " ".join(study.name for _, study in studies)
        lines += [f".PHONY: {goal}", f"{goal}: ; $(call seed-by-seed,{rounds(request, studies)},{names})"]
    # The primary contrasts paper by paper, so that the first study is drawn early.
    inner, names = rounds(request, plan, "-primary", by_paper=True), " ".join(study.name for _, study in plan)
    lines += [".PHONY: primary", f"primary: ; $(call seed-by-seed,{inner},{names})"]
    for paper, design in request.designs.items():
        if design.teachers:
            models = [target(request.folder(design, one.name, 0) / "model.pt") for one in design.teachers]
            lines += [
                f".PHONY: {paper}-teachers {paper}-teachers@all",
                f"{paper}-teachers: ; @+$(MAKE) --no-print-directory {paper}-teachers@all",
                f"{paper}-teachers@all: {' '.join(models)}",
            ]
    return "\n".join(lines)


def page_rules(request: Request) -> str:
    """The page, drawn when a study was; and `report`, which draws all that has been run."""
    plan = [(design, study) for design, study in request.studies if not study.extra]
    shared = {(design.paper, arm) for design, study in plan for arm in study.arms}
    names = " ".join(
        study.name
        for design, study in request.studies
        if not study.extra  # of the extras those that have a run of their own
        or any((request.runs / design.paper / a).is_dir() for a in study.arms if (design.paper, a) not in shared)
    )
    page = request.results / "index.html"
    drawn = [Path("common/study/page.py"), *request.results.glob("*.json")]
    current = page.exists() and all(file.stat().st_mtime <= page.stat().st_mtime for file in drawn)
    extras = [study.name for _, study in request.studies if study.extra]
    draw = ["-m", "common.study.page", "--results", request.results, "--scale", request.scale, "--command",
            request.command("{}"), "--studies", *(study.name for _, study in plan),
            *(["--extras", *extras] if extras else [])]  # fmt: skip
    return "\n".join([
        ".PHONY: report draw-page up-to-date-page",
        f"report: ; $(call in-any-case,{names},0)",
        f"up-to-date-page: {'' if current else 'draw-page'}".rstrip(),
        "draw-page: | $(venv)",
        f"\t$(python) {shell(draw)}",
    ])  # fmt: skip


def text(request: Request) -> str:
    """The whole file."""
    given = " ".join(f"{key}={shlex.quote(value)}" for key, value in request.given.items())
    parts = [
        f"# What make does for {given}\n# Written anew by each make, from <paper>/studies.py: edit that, not this."
    ]
    parts += [goal_rules(request), page_rules(request), ".PHONY: FORCE\nFORCE: ;"]
    for design in request.designs.values():
        parts += [run_rules(request, design, teacher, 0) for teacher in design.teachers]
        seeds: dict[str, dict[int, None]] = {}
        for study in design.studies:
            for arm in study.arms:
                seeds.setdefault(arm, {}).update(dict.fromkeys(request.seeds_of(study)))
        parts += [run_rules(request, design, design.arm(arm), seed) for arm, own in seeds.items() for seed in own]
        parts += [study_rules(request, design, study) for study in design.studies]
    return "\n\n".join(parts) + "\n"


def write(request: Request) -> Path:
    """Write the file atomically and remove those of an earlier day. Raises DesignError where RUNS cannot be written."""
    digest = hashlib.sha256(repr(sorted(request.given.items())).encode()).hexdigest()[:10]
    path = request.runs / f"rules-{digest}.mk"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text(request))
    except OSError as error:
        raise DesignError(f"RUNS: {request.runs} cannot be written ({error.strerror}): give another folder") from None
    for old in path.parent.glob("rules-*.mk"):
        if time.time() - os.stat(old).st_mtime > 86400:
            old.unlink(missing_ok=True)
    return path


def listing(request: Request) -> str:
    """Papers, studies and arms with their flags; a star marks the primary contrasts."""
    lines = []
    for design in request.designs.values():
        lines += ["", f"{design.title}, scale {request.scale}"]
        for study in design.studies:
            lines += [f"  {study.name}{' (extra)' if study.extra else ''}: {study.question}"]
            for place, (arm, reference) in enumerate(study.pairs):
                star = "*" if place < study.primary else " "
                lines += [f"   {star} {f'{arm}:{reference}':36} {design.arm(arm).flags}".rstrip()]
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Command line; see the module's docstring."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # make reads the path; a table may print
            request = Request.parse(words[1:] if words[:1] == ["help"] else words)
        if words[:1] == ["help"]:
            print(listing(request))
        else:
            print(str(write(request)).replace(" ", "\\ "))  # as make's include reads it
    except DesignError as error:
        if words[:1] == ["help"]:
            fail(str(error))
        print(error)  # make says it
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main(sys.argv[1:])
