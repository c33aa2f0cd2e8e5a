"""The only way into results/, which git tracks: `make publish [STUDY ...]`; and the page of what is there: `make page`.

    python -m common.study.publish PAPERS="simsiam bsa" SCALE=demo simsiam-predictor
    python -m common.study.publish page PAPERS="simsiam bsa" SCALE=demo

Copies JSON, CSV and PNG of a report to results/SCALE and writes README.md and extras.md there. It refuses a study with
holes, with other flags, seeds or data than studies.py declares, of several versions of train.py or of a changed tree,
and then copies nothing.
"""

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import stop
from common.files import read_json, write_text
from common.run import script_facts
from common.study import page
from common.study.design import Design, DesignError, Study
from common.study.request import Request, read

FREE = ("SEEDS", "EXTRA", "PAIRS", "TASKS")  # variables that make other runs than studies.py declares


def problems(request: Request, design: Design, study: Study) -> list[str]:
    """Why a study cannot be published; a sentence each."""
    path = request.results / f"{study.name}.json"
    try:
        summary: dict[str, Any] = dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return [f"{study.name}: {path} is missing or damaged: make {study.name} SCALE={request.scale}"]
    found = []
    if summary["seeds"] != list(study.seeds):
        found += [f"it was drawn over the seeds {_listed(summary['seeds'])}, declared are {_listed(study.seeds)}"]
    holes = [f"{row['arm']} (seed {_listed(row['missing'])})" for row in summary["rows"] if row["missing"]]
    if holes := [*summary["not_run"], *holes]:
        found += [f"not run: {_listed(holes)}"]
    drawn = {f"{one['arm']}:{one['reference']}" for one in summary["contrasts"]}
    if not summary["not_run"] and drawn != set(map(str, study.contrasts)):
        found += ["it was drawn with other contrasts than are declared"]
    arms = dict.fromkeys(name for arm in study.arms for name in (arm, design.arm(arm).needs) if name)
    runs = {(arm, seed): request.folder(design, arm, seed) for arm in arms for seed in study.seeds}
    expected = {arm: request.flags_text(design, design.arm(arm)) for arm in arms}
    other = {f"{arm}/{folder.name}": None for (arm, _), folder in runs.items()
             if (folder / "args.json").exists() and read(folder / "flags") != expected[arm]}  # fmt: skip
    if other:
        found += [f"other flags than declared: {_listed(other)}"]
    newer = [f"{arm}/{folder.name}" for (arm, _), folder in runs.items()
             if (file := folder / "metrics.json").exists() and file.stat().st_mtime > path.stat().st_mtime]  # fmt: skip
    if newer:
        found += [f"these runs are newer than the report: {_listed(newer)}"]
    facts = summary["provenance"]
    for key, what in (("source", "versions of train.py"), ("data", "data")):
        if isinstance(facts[key], list):
            found += [f"its runs mix {what}"]
    source = hashlib.sha256(Path(design.paper, "train.py").read_bytes()).hexdigest()
    if isinstance(facts["source"], str) and facts["source"] != source:
        found += [f"its runs are of another version of {design.paper}/train.py"]
    if facts["dirty"] is not False:
        found += ["its runs were made from a tree with uncommitted changes, or outside a clone"]
    return [f"{study.name}: {one}" for one in found]


def _listed(values: Any) -> str:
    words = [str(value) for value in values]
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def publish(request: Request, names: Sequence[str], folder: Path) -> None:
    """Check the studies, then copy them to `folder`. Stops (exit 2) with a sentence for each problem."""
    for name in FREE:
        if request.given.get(name, "").strip():
            stop(f"{name} is set: only what studies.py declares can be published")
    if request.own_matrix:
        stop(f"DATA={request.data}: only results on the data that studies.py declares can be published")
    known = {study.name: (design, study) for design, study in request.studies}
    if unknown := [name for name in names if name not in known]:
        stop(f"there is no study '{unknown[0]}'")
    chosen = list(names) or [name for name in known if (request.results / f"{name}.json").exists()]
    if not chosen:
        stop(f"{request.results} holds no study: make STUDY SCALE={request.scale}")
    found = [sentence for name in chosen for sentence in problems(request, *known[name])]
    if script_facts(Path(next(iter(request.designs)), "train.py"))["dirty"] is not False:
        found.insert(0, "the tree has uncommitted changes, or is not a clone: commit first")
    if found:
        print("\n".join(f"error: {sentence}" for sentence in found), file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    figures = page.pictures(request.results, chosen)
    for name in chosen:
        for old in page.pictures(folder, chosen)[name]:
            old.unlink()
        files = [request.results / f"{name}{kind}" for kind in (".json", ".csv")]
        for file in [*files, *(figure.with_suffix(".png") for figure in figures[name])]:
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
        stop(str(error))
    folder = Path("results", request.scale)
    if names[:1] != ["page"]:
        publish(request, names, folder)
        return
    if not folder.is_dir():
        stop(f"{folder} is not there: make publish SCALE={request.scale} fills it")
    plan, extras = _plan_and_extras(request, folder)
    print("\n".join(page.write_pages(folder, request.scale, plan, extras, f"make {{}} SCALE={request.scale}")))
    print(f"the page: {folder / 'index.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
