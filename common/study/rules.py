"""Generate the explicit make rules of one make command, as a readable file that the Makefile includes.

    python -m common.study.rules PAPERS="simsiam bsa" SCALE=demo SEEDS="0 1" EXTRA="--epochs 3"
    python -m common.study.rules help SCALE=demo

The arguments are make's variables. Prints the path of the file, RUNS/rules-<digest of the arguments>.mk, or with `help`
the papers, studies and arms. Exits with code 2 if a variable or a design is invalid. Needs only the standard library.

Each run has two rules: train.py writes model.pt, and eval.py writes metrics.json. Each study has a rule that draws it.
The targets STUDY, PAPER, all, primary, calibration, robustness, curves and report start sub-makes, one seed after the
other. The targets of the sub-makes are STUDY@SEED, STUDY-primary@SEED and STUDY@report.
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

from common.cli import EXIT_USER, fail, prepare_streams
from common.files import write_text
from common.study.design import Arm, Design, DesignError, Study
from common.study.request import Request, read_text


def target(path: Path | str) -> str:
    """Escape a path for use as a target or prerequisite."""
    return re.sub(r"([ #:%])", r"\\\1", str(path)).replace("$", "$$")


def shell(words: Iterable[object]) -> str:
    """Quote a command for a recipe line."""
    return shlex.join(map(str, words)).replace("$", "$$")


def write_line(text: str, path: str) -> str:
    """Return a recipe line that writes one line of text to a file."""
    return f"@printf '%s\\n' {shell([text])} >{path}"


def run_rules(request: Request, design: Design, arm: Arm, seed: int) -> str:
    """Return the rules of a run: training and, except for teachers, evaluation. Changed flags train a run again."""
    folder, paper = request.folder(design, arm.name, seed), design.paper
    new_flags = request.flags_text(design, arm)
    old_flags = read_text(folder / "flags")
    retrain = (folder / "model.pt").exists() and old_flags != new_flags
    is_teacher = arm.name in design.teacher_names()
    script = f"{paper}/{'teacher' if is_teacher else 'train'}.py"
    train: list[object] = [script, "--scale", request.scale, "--out", folder, "--seed", folder.name]
    train += ["--data-seed", request.data_seed(seed)]
    train += ["--device", request.device, "--data", request.data, "--replace"]
    if request.resume_elsewhere:
        train.append("--resume-elsewhere")
    evaluate = [f"{paper}/eval.py", folder, "--device", request.device, "--data", request.data]
    prerequisites = ["$(venv)"]
    if data := arm.data or design.data:
        prerequisites.append(f"$(data)/{data}")
    if arm.needs:
        teacher = request.folder(design, arm.needs, seed) / "model.pt"
        train += ["--weights", teacher]
        prerequisites.append(target(teacher))
    train += request.flags(design, arm)
    model, metrics = target(folder / "model.pt"), target(folder / "metrics.json")
    if flag := request.overridden_extra[paper]:
        sentence = f"error: invalid EXTRA: every arm of {paper} sets its own {flag}: remove it"
        return f"{model} {metrics}: FORCE\n\t@echo {shell([sentence])} >&2; exit 2"
    lines = [f"# trained with other flags: {(old_flags or 'unknown').splitlines()[0]} ."] if retrain else []
    lines += [
        f"{model}: {'FORCE ' if retrain else ''}| {' '.join(prerequisites)}",
        f"\t$(run) {shell(train)} || sh common/study/killed.sh $$? {shell([folder])}",
        f"\t{write_line(new_flags, shell([folder / 'flags']))}",
        f".PRECIOUS: {model} {metrics}",  # both are written atomically, so an interrupted make must not delete them
    ]
    if not is_teacher:  # teacher.py measures its accuracy itself
        lines += [f"{metrics}: {model}", f"\t$(run) {shell(evaluate)}"]
    return "\n".join(lines)


def plot_command(request: Request, design: Design, study: Study) -> list[object]:
    """Return the command that draws a study from the runs that exist."""
    command: list[object] = [f"{design.paper}/plot.py", study.name, "--scale", request.scale]
    command += ["--runs", request.runs / design.paper, "--results", request.results]
    if request.seeds or request.first_seed_only:
        command += ["--seeds", *request.seeds_of(study)]
    command += ["--reproduce", request.command(study.name)]
    for name in ("PAIRS", "TASKS"):
        if request.variables.get(name, "").strip():
            command += [f"--{name.lower()}", *request.variables[name].split()]
    return command


def study_rules(request: Request, design: Design, study: Study) -> str:
    """Return the rules that draw a study: after each seed, with the runs that exist, and for `make report`.

        REPORT/.drawn/STUDY:                           # plot.py; the file says what the report shows
        STUDY@10: REPORT/.drawn/STUDY                  # the goal of the sub-make of seed 10, and only there:
        REPORT/.drawn/STUDY: ARM/10/metrics.json ...   # the runs of seed 10 come first
        STUDY@report:                                  # plot.py again

    So a report is drawn again if a run of the sub-make's seed or the code of the analysis is newer, or if it was drawn
    from other contrasts, seeds or runs.
    """
    seeds = request.seeds_of(study)
    drawn = " ".join([*map(str, study.contrasts), "seeds", *map(str, seeds), "runs", str(request.runs)])
    stamp = request.results / ".drawn" / study.name
    current = (request.results / f"{study.name}.json").exists() and read_text(stamp) == drawn
    recipe = [
        f"\t$(python) {shell(plot_command(request, design, study))}",
        f"\t@mkdir -p {shell([stamp.parent])}",
        f"\t{write_line(drawn, shell([stamp]))}",
    ]
    sources = f"{design.paper}/plot.py {design.paper}/studies.py $(wildcard common/study/*.py)"
    prerequisites = f"{sources}{'' if current else ' FORCE'}"
    lines = [f"# {' '.join(study.question.split())}", f"{target(stamp)}: {prerequisites}", *recipe]
    for goal, arms in ((study.name, study.arms), (f"{study.name}-primary", study.primary_only.arms)):
        for seed in seeds:
            in_seed = [arm for arm in arms if seed in request.seeds_of(study, arm)]
            metrics = [target(request.folder(design, arm, seed) / "metrics.json") for arm in in_seed]
            lines += [
                f".PHONY: {goal}@{seed}",
                f"{goal}@{seed}: {target(stamp)}",
                f"ifneq ($(filter {goal}@{seed},$(MAKECMDGOALS)),)",
                f"{target(stamp)}: {' '.join(metrics)}",
                "endif",
            ]
    return "\n".join([*lines, f".PHONY: {study.name}@report", f"{study.name}@report: | $(venv)", *recipe])


def sub_make_goals(request: Request, groups: Sequence[Sequence[tuple[Design, Study]]], suffix: str = "") -> str:
    """Return one word per sub-make: the goals of one group of studies and one seed, joined by +."""
    seeds = dict.fromkeys(seed for group in groups for _, study in group for seed in request.seeds_of(study))
    words = []
    for seed in seeds:
        for group in groups:
            goals = [f"{study.name}{suffix}@{seed}" for _, study in group if seed in request.seeds_of(study)]
            if goals:
                words.append("+".join(goals))
    return " ".join(words)


def teacher_seeds(request: Request, design: Design) -> list[int]:
    """Return the data seeds for which the teachers of a paper are trained."""
    seeds = [seed for study in design.studies for seed in request.seeds_of(study)]
    return sorted({request.data_seed(seed) for seed in seeds})


def goal_rules(request: Request) -> str:
    """Return the rules of the targets that a user names: one sub-make per seed, then the page."""
    by_group: dict[str, list[tuple[Design, Study]]] = {
        name: [] for name in ("all", "calibration", "robustness", "curves", "")
    }
    for design, study in request.studies:
        by_group[study.group].append((design, study))
    main_studies = by_group["all"]
    goals = {study.name: [(design, study)] for design, study in request.studies}
    goals |= {paper: [pair for pair in main_studies if pair[0].paper == paper] for paper in request.designs}
    goals |= {group: by_group[group] for group in by_group if group}
    others = ["primary", *(f"{paper}-teachers" for paper, design in request.designs.items() if design.teachers)]
    lines = [f"goals := {' '.join([*goals, *others])} report draw-page up-to-date-page"]
    for goal, studies in goals.items():
        names = " ".join(study.name for _, study in studies)
        lines += [f".PHONY: {goal}", f"{goal}: ; $(call seed-by-seed,{sub_make_goals(request, [studies])},{names})"]
    # Primary contrasts run paper by paper, and the first study alone, so that the first figure appears early.
    groups = [main_studies[:1]]
    groups += [[pair for pair in main_studies[1:] if pair[0].paper == paper] for paper in request.designs]
    primary_goals = sub_make_goals(request, groups, "-primary")
    names = " ".join(study.name for _, study in main_studies)
    lines += [".PHONY: primary", f"primary: ; $(call seed-by-seed,{primary_goals},{names})"]
    for paper, design in request.designs.items():
        if design.teachers:
            models = [
                target(request.folder(design, teacher.name, seed) / "model.pt")
                for teacher in design.teachers
                for seed in teacher_seeds(request, design)
            ]
            lines += [
                f".PHONY: {paper}-teachers {paper}-teachers@all",
                f"{paper}-teachers: ; @+$(MAKE) --no-print-directory {paper}-teachers@all",
                f"{paper}-teachers@all: {' '.join(models)}",
            ]
    return "\n".join(lines)


def page_rules(request: Request) -> str:
    """Return the rules of the HTML page and of `report`, which draws all studies from the runs that exist.

    `report` includes an extra study only if it was drawn before or if a run exists that no main study shares.
    """
    main_studies = [(design, study) for design, study in request.studies if not study.extra]
    shared = {(design.paper, arm) for design, study in main_studies for arm in study.arms}
    reported = []
    for design, study in request.studies:
        unshared = [arm for arm in study.arms if (design.paper, arm) not in shared]
        drawn = (request.results / f"{study.name}.json").exists()
        if not study.extra or drawn or any((request.runs / design.paper / arm).is_dir() for arm in unshared):
            reported.append(study.name)
    page = request.results / "index.html"
    sources = [*Path("common/study").glob("*.py"), *request.results.glob("*.json")]
    current = page.exists() and all(file.stat().st_mtime <= page.stat().st_mtime for file in sources)
    extras = [study.name for _, study in request.studies if study.extra]
    draw: list[object] = ["-m", "common.study.page", "--results", request.results, "--scale", request.scale]
    draw += ["--command", request.command("{}"), "--studies", *(study.name for _, study in main_studies)]
    if extras:
        draw += ["--extras", *extras]
    lines = [
        ".PHONY: report draw-page up-to-date-page",
        f"report: ; $(call draw-report,{' '.join(reported)},0)",
        "up-to-date-page:" if current else "up-to-date-page: draw-page",
        "draw-page: | $(venv)",
        f"\t$(python) {shell(draw)}",
    ]
    return "\n".join(lines)


def rules_text(request: Request) -> str:
    """Return the content of the rules file."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in request.variables.items())
    parts = [f"# Rules for make {variables}\n# Generated by every make from <paper>/studies.py. Do not edit."]
    parts += [goal_rules(request), page_rules(request), ".PHONY: FORCE\nFORCE: ;"]
    for design in request.designs.values():
        for teacher in design.teachers:
            parts += [run_rules(request, design, teacher, seed) for seed in teacher_seeds(request, design)]
        seeds: dict[str, dict[int, None]] = {}
        for study in design.studies:
            for arm in study.arms:
                seeds.setdefault(arm, {}).update(dict.fromkeys(request.seeds_of(study, arm)))
        for arm, arm_seeds in seeds.items():
            parts += [run_rules(request, design, design.arm(arm), seed) for seed in arm_seeds]
        parts += [study_rules(request, design, study) for study in design.studies]
    return "\n\n".join(parts) + "\n"


def write_rules(request: Request) -> Path:
    """Write the rules file atomically, delete rules files older than one day, and return the path.

    Raises DesignError if RUNS cannot be written.
    """
    digest = hashlib.sha256(repr(sorted(request.variables.items())).encode()).hexdigest()[:10]
    path = request.runs / f"rules-{digest}.mk"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, rules_text(request))
    except OSError as error:
        raise DesignError(f"cannot write to RUNS={request.runs} ({error.strerror}): give another folder") from None
    for old in path.parent.glob("rules-*.mk"):
        if time.time() - os.stat(old).st_mtime > 86400:
            old.unlink(missing_ok=True)
    return path


def listing(request: Request) -> str:
    """Return the papers, studies and arms with their flags as text. A star marks the primary contrasts."""
    lines = []
    for design in request.designs.values():
        lines += ["", f"{design.title}, scale {request.scale}"]
        for study in design.studies:
            lines += [f"  {study.name}{' (extra)' if study.extra else ''}: {study.question}"]
            for index, (arm, reference) in enumerate(study.pairs):
                star = "*" if index < study.primary else " "
                lines += [f"   {star} {f'{arm}:{reference}':36} {design.arm(arm).flags}".rstrip()]
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Command line: see the module docstring."""
    prepare_streams()
    show_help = words[:1] == ["help"]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for make; code in studies.py may print
            request = Request.parse(words[1:] if show_help else words)
        if show_help:
            with contextlib.suppress(BrokenPipeError):  # as in `make | head`; the rest goes to /dev/null
                print(listing(request), flush=True)
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        else:
            path = str(write_rules(request)).replace(" ", "\\ ")  # make's include needs escaped spaces
            sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    except DesignError as error:
        if show_help:
            fail(str(error))
        print(error)  # the Makefile shows it by $(error)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main(sys.argv[1:])
