"""The only way into results/, which git tracks: `make publish [STUDY ...]`; and the page of what is there: `make page`.

    python -m common.study.publish PAPERS="simsiam bsa" SCALE=demo simsiam-predictor
    python -m common.study.publish page PAPERS="simsiam bsa" SCALE=demo

SampleRNG studies anew from their runs, as studies.py declares them, and puts JSON, CSV and PNG into results/SCALE, with
README.md and extras.md. It refuses a study with holes, with other flags or data than declared, of several versions of
the code or of a changed tree, and then nothing is changed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.cli import fail
from common.files import read_json, write_text
from common.run import script_provenance
from common.study import page
from common.study.design import Design, DesignError, Study
from common.study.request import Request, read

FREE = ("SEEDS", "EXTRA", "PAIRS", "TASKS")  # variables that make other runs than studies.py declares


def problems(request: Request, design: Design, study: Study) -> list[str]:
    """Why the runs of a study cannot be published; a sentence each."""
    arms = dict.fromkeys(name for arm in study.arms for name in (design.arm(arm).needs, arm) if name)
    folders = {request.folder(design, arm, seed): arm for arm in arms for seed in study.seeds}
    facts = {folder: _provenance(folder, arm in design.teacher_names()) for folder, arm in folders.items()}
    there = {folder: known for folder, known in facts.items() if known}
    found = []
    if holes := [folder for folder in facts if folder not in there]:
        found += [f"not run, or not whole: {_listed(holes)}"]
    if other := [one for one in there if read(one / "flags") != _flags(request, design, folders[one])]:
        found += [f"other flags than declared: {_listed(other)}"]
    if dirty := [one for one, known in there.items() if known.get("dirty") is not False]:
        found += [f"made from a tree with uncommitted changes, or outside a clone: {_listed(dirty)}"]
    sources: dict[str, set[Any]] = {}
    for known in there.values():
        sources.setdefault(known.get("script", ""), set()).add(known.get("source"))
    if mixed := [script for script, versions in sources.items() if len(versions) > 1]:
        found += [f"its runs are of several versions of {_listed(mixed)} and what it imports"]
    data: dict[str, set[Any]] = {}
    for folder, known in there.items():
        data.setdefault(folders[folder].partition("@")[2], set()).add(known.get("data"))
    if any(len(digests) > 1 for digests in data.values()):
        found += ["its runs mix data"]
    return [f"{study.name}: {one}" for one in found]


def _provenance(folder: Path, teacher: bool) -> dict[str, Any]:
    """Provenance of a finished run, {} where there is none. A teacher is not evaluated."""
    if not (folder / "model.pt").exists() or not (teacher or (folder / "metrics.json").exists()):
        return {}
    try:
        return dict(read_json(folder / "args.json")["provenance"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _flags(request: Request, design: Design, arm: str) -> str:
    return request.flags_text(design, design.arm(arm))


def _listed(values: Iterable[Any]) -> str:
    words = [str(value) for value in values]
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def publish(request: Request, names: Sequence[str], folder: Path) -> None:
    """Check the studies, draw them, put them into `folder`. Stops (exit 2) with a sentence for each problem."""
    for name in FREE:
        if request.given.get(name, "").strip():
            fail(f"{name} is set: only what studies.py declares can be published")
    if request.own_matrix:
        fail(f"DATA={request.data}: only results on the data that studies.py declares can be published")
    known = {study.name: (design, study) for design, study in request.studies}
    if unknown := [name for name in names if name not in known]:
        fail(f"there is no study '{unknown[0]}'")
    chosen = list(names) or [name for name in known if (request.results / f"{name}.json").exists()]
    if not chosen:
        fail(f"{request.results} holds no study: make STUDY SCALE={request.scale}")
    found = [sentence for name in chosen for sentence in problems(request, *known[name])]
    if script_provenance(Path(next(iter(request.designs)), "train.py"))["dirty"] is not False:
        found.insert(0, "the tree has uncommitted changes, or is not a clone: commit first")
    if found:
        print("\n".join(f"error: {sentence}" for sentence in found), file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as drawn:
        for name in chosen:
            paper = known[name][0].paper
            where = ["--scale", request.scale, "--runs", str(request.runs / paper), "--results", drawn]
            if subprocess.run([sys.executable, f"{paper}/plot.py", name, *where]).returncode:
                fail(f"{name} cannot be drawn: nothing is published")
        folder.mkdir(parents=True, exist_ok=True)
        there = page.pictures(folder, chosen)
        for old in (figure for name in chosen for figure in there[name]):
            old.unlink()
        for file in Path(drawn).iterdir():
            if file.suffix in (".json", ".csv", ".png"):
                shutil.copyfile(file, folder / file.name)
    write_readmes(request, folder)
    print(f"published in {folder}: {', '.join(chosen)}")


def write_readmes(request: Request, folder: Path) -> None:
    """Write README.md (the plan) and, where there are extras, extras.md."""
    plan, extras = _plan_and_extras(request, folder)
    command = f"make {{}} SCALE={request.scale}"
    write_text(folder / "README.md", page.readme(folder, "index", request.scale, plan, command))
    if extras:
        write_text(folder / "extras.md", page.readme(folder, "extras", request.scale, extras, command))


def _plan_and_extras(request: Request, folder: Path) -> tuple[list[str], list[str]]:
    """The plan's studies, and the extras that are there."""
    plan = [study.name for _, study in request.studies if not study.extra]
    extras = [study.name for _, study in request.studies if study.extra]
    return plan, [name for name in extras if (folder / f"{name}.json").exists()]


def main(words: Sequence[str]) -> None:
    """Command line; see the module's docstring."""
    names = [word for word in words if "=" not in word]
    try:
        request = Request.parse(word for word in words if "=" in word)
    except DesignError as error:
        fail(str(error))
    folder = Path("results", request.scale)
    if names[:1] != ["page"]:
        publish(request, names, folder)
        return
    if not folder.is_dir():
        fail(f"{folder} is not there: make publish SCALE={request.scale} fills it")
    plan, extras = _plan_and_extras(request, folder)
    print("\n".join(page.write_pages(folder, request.scale, plan, extras, f"make {{}} SCALE={request.scale}")))
    print(f"the page: {folder / 'index.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
