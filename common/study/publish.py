"""Copy studies into results/, which git tracks: `make publish [STUDY ...]`. Write its HTML page: `make page`.

    python -m common.study.publish PAPERS="simsiam bsa" SCALE=demo simsiam-predictor
    python -m common.study.publish page PAPERS="simsiam bsa" SCALE=demo

Redraws the studies from their runs, as studies.py declares them, and writes JSON, CSV, PNG, README.md and extras.md to
results/SCALE, and at demo scale the table of results in the project's README.md. A study is refused if runs are
missing, if their flags or data differ from the declared ones, if the runs come from several versions of the code, or if
the working tree has uncommitted changes. Then nothing is written.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.cli import fail, prepare_streams
from common.files import read_json, write_text
from common.run import script_provenance
from common.study import page
from common.study.design import Design, DesignError, Study
from common.study.names import setting_of
from common.study.request import Request, read_text

README_SCALE = "demo"  # the scale whose results are in the project's README, between these two lines
BLOCK = ("<!-- results: written by make publish SCALE=demo -->", "<!-- end of results -->")
FIXED_VARIABLES = ("SEEDS", "EXTRA", "PAIRS", "TASKS")  # must be unset: they change the declared runs


def problems(request: Request, design: Design, study: Study) -> list[str]:
    """Return one sentence per reason why the runs of a study cannot be published."""
    folders: dict[Path, str] = {}
    for arm in study.arms:
        for name in filter(None, (design.arm(arm).needs, arm)):
            folders |= {request.folder(design, name, seed): name for seed in study.seeds_of(arm)}
    finished: dict[Path, dict[str, Any]] = {}
    missing, other_flags, dirty = [], [], []
    for folder, arm in folders.items():
        provenance = _provenance(folder, arm in design.teacher_names())
        if not provenance:
            missing.append(folder)
            continue
        finished[folder] = provenance
        if read_text(folder / "flags") != request.flags_text(design, design.arm(arm)):
            other_flags.append(folder)
        if provenance.get("dirty") is not False:
            dirty.append(folder)
    sources: dict[str, set[Any]] = {}
    data: dict[tuple[str, int], set[Any]] = {}
    teachers: dict[tuple[str, int], set[Any]] = {}
    for folder, provenance in finished.items():
        script = provenance.get("script", "")
        sources.setdefault(script, set()).add(provenance.get("source"))
        if folders[folder] not in design.teacher_names():
            sources.setdefault(f"{design.paper}/eval.py", set()).add(provenance["eval_source"])
        setting, block = setting_of(folders[folder]), request.data_seed(int(folder.name))
        data.setdefault((setting, block), set()).add(provenance.get("data"))
        if teacher := design.arm(folders[folder]).needs:
            teachers.setdefault((teacher, block), set()).add(provenance.get("teacher_weights"))
    mixed = [script for script, versions in sources.items() if len(versions) > 1]
    remedy = f"run make {study.name} SCALE={request.scale}"
    reasons = []
    if missing:
        reasons.append(f"missing or incomplete runs: {_shortened(missing)}; {remedy}")
    if other_flags:
        reasons.append(f"flags differ from the declared ones: {_shortened(other_flags)}; {remedy}")
    if dirty:
        reasons.append(
            f"run with uncommitted changes or outside a git clone: {_shortened(dirty)}; move them away and {remedy}"
        )
    if mixed:
        reasons.append(
            f"runs come from several versions of {_shortened(mixed)} or its imports; move old runs away and {remedy}"
        )
    if any(len(digests) > 1 for digests in data.values()):
        reasons.append(f"runs used different data; move those with other data away and {remedy}")
    retrained = [f"{teacher}, seed {block}" for (teacher, block), digests in teachers.items() if len(digests) > 1]
    if retrained:
        weights = f"weights of the teacher ({_shortened(retrained)})"
        reasons.append(f"runs used different {weights}; move them away and {remedy}")
    return [f"{study.name}: {reason}" for reason in reasons]


def _provenance(folder: Path, teacher: bool) -> dict[str, Any]:
    """Return the provenance of a finished run, {} if it is not finished. A teacher needs no evaluation."""
    if not (folder / "model.pt").exists() or not (teacher or (folder / "metrics.json").exists()):
        return {}
    try:
        metrics = {} if teacher else read_json(folder / "metrics.json")
        return read_json(folder / "args.json")["provenance"] | {"eval_source": metrics.get("eval_source")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _shortened(values: Iterable[Any]) -> str:
    """Join values by commas; at most five are listed."""
    words = [str(value) for value in values]
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def publish(request: Request, names: Sequence[str], folder: Path) -> None:
    """Check the studies, redraw them and copy them into `folder`.

    Exits with code 2 and one line per problem if a study cannot be published.
    """
    for name in FIXED_VARIABLES:
        if request.variables.get(name, "").strip():
            fail(f"{name} is set: unset it, because only the declared runs can be published")
    if request.data_is_matrix:
        fail(f"DATA is set to {request.data}: unset it, because only runs on the declared data can be published")
    studies = {study.name: (design, study) for design, study in request.studies}
    for name in names:
        if name not in studies:
            fail(f"unknown study '{name}': run make for a list")
    chosen = list(names) or [name for name in studies if (request.results / f"{name}.json").exists()]
    if not chosen:
        fail(f"no study in {request.results}: run make STUDY SCALE={request.scale} first")
    errors = [sentence for name in chosen for sentence in problems(request, *studies[name])]
    if script_provenance(Path(next(iter(request.designs)), "train.py"))["dirty"] is not False:
        errors.insert(0, "the working tree has uncommitted changes, or is not a git clone: commit first")
    if errors:
        print("\n".join(f"error: {sentence}" for sentence in errors), file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            paper = studies[name][0].paper
            options = ["--scale", request.scale, "--runs", str(request.runs / paper), "--results", temporary]
            if subprocess.run([sys.executable, f"{paper}/plot.py", name, *options]).returncode:
                fail(f"drawing {name} failed: nothing was published, see the message above")
        folder.mkdir(parents=True, exist_ok=True)
        old_figures = page.find_figures(folder, chosen)
        for name in chosen:
            for path in old_figures[name]:
                path.unlink()
        for file in Path(temporary).iterdir():
            if file.suffix in (".json", ".csv", ".png"):
                shutil.copyfile(file, folder / file.name)
    write_readmes(request, folder)
    if request.scale == README_SCALE:
        update_readme(folder, _main_studies_and_extras(request, folder)[0])
    print(f"published to {folder}: {', '.join(chosen)}")


def write_readmes(request: Request, folder: Path) -> None:
    """Write README.md with the main studies and, if any extra is published, extras.md."""
    main_studies, extras = _main_studies_and_extras(request, folder)
    command = f"make {{}} SCALE={request.scale}"
    counts = page.calibration_sentence(folder, extras)
    write_text(folder / "README.md", page.readme(folder, "index", request.scale, main_studies, command, counts))
    if extras:
        write_text(folder / "extras.md", page.readme(folder, "extras", request.scale, extras, command, counts))


def results_block(folder: Path, studies: Sequence[str]) -> str:
    """Return the part of the project's README that reports the main studies in `folder`, with its two markers."""
    return f"{BLOCK[0]}\n{page.results_table(folder, studies, f'{folder.as_posix()}/README.md')}\n{BLOCK[1]}"


def update_readme(folder: Path, studies: Sequence[str], path: Path = Path("README.md")) -> None:
    """Replace the results in the project's README. A README without the two lines of BLOCK stays as it is."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    (before, start, rest), end = old.partition(BLOCK[0]), BLOCK[1]
    if start and end in rest:
        write_text(path, before + results_block(folder, studies) + rest.partition(end)[2])


def _main_studies_and_extras(request: Request, folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of all main studies, and of the extras whose JSON is in `folder`."""
    main_studies = [study.name for _, study in request.studies if not study.extra]
    extras = [study.name for _, study in request.studies if study.extra]
    return main_studies, [name for name in extras if (folder / f"{name}.json").exists()]


def main(words: Sequence[str]) -> None:
    """Command line: see the module docstring. Exits with code 2 if nothing can be published."""
    prepare_streams()
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
        fail(f"{folder} does not exist: run make publish SCALE={request.scale} first")
    main_studies, extras = _main_studies_and_extras(request, folder)
    print("\n".join(page.write_pages(folder, request.scale, main_studies, extras, f"make {{}} SCALE={request.scale}")))
    print(f"page: {folder / 'index.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
