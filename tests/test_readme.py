"""The READMEs are true: results, links, length, the loss snippet, and the example of a new ablation."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.study import publish
from common.study.design import load

STUDY = "simsiam-predictor"
PAPERS = ("simsiam", "conmim", "cocord", "bsa", "seqvcr")
READMES = ("README.md", *(f"{paper}/README.md" for paper in PAPERS))


def test_results_are_those_of_the_results_folder():
    studies = [study.name for paper in PAPERS for study in load(paper, "demo").studies if not study.extra]
    assert len(studies) == 12
    block = publish.results_block(Path("results/demo"), studies)
    assert block in (ROOT / "README.md").read_text(), "README.md is outdated: run make publish SCALE=demo"


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_headings_that_exist(name):
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        file = folder / path if path else ROOT / name
        assert file.exists(), link
        if heading:
            assert heading in [anchor(line.lstrip("# ")) for line in file.read_text().splitlines() if line[:1] == "#"]


def test_a_reader_finishes_the_readme():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```|^    .*?$|\]\([^)]*\)|<!--.*?-->", " ", text, flags=re.DOTALL | re.MULTILINE)
    assert text.count("\n") <= 220
    assert len(re.findall(r"[\w'’.+-]*[A-Za-z0-9][\w'’.+-]*", prose)) <= 1300


def test_the_loss_snippet_runs_and_gives_gradients():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["z"].grad.norm() > 0 and names["p"].grad.norm() > 0


def test_places_of_the_ablations_exist():
    rows = re.findall(r"^\| (\w+)-[a-z-]+ \| (`--.*?) \| (`.*?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 12
    for paper, flags, places in rows:
        source = (ROOT / paper / "train.py").read_text()
        for name in re.findall(r"[\w.-]+", places.replace(" in ", " ")):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), name
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source, flag


@pytest.mark.slow
def test_new_ablation_of_the_readme_runs_end_to_end(tmp_path):
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(diffs) == 1
    for name in ("Makefile", "common", "simsiam", "bsa", "seqvcr", "cocord", "conmim"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diffs[0], text=True, check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    assert any(line.startswith("+ ") and "Arm(" in line for line in diffs[0].splitlines())  # edits studies.py
    variables = ["SCALE=demo", "SEEDS=0", "DEVICE=cpu", "EXTRA=--rehearse 2", f"PYTHON={sys.executable}"]

    def make(*goals: str) -> str:
        done = subprocess.run(["make", *goals, *variables], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert re.search(r"linear-predictor:base +--predictor linear", make())
    make(*(f"runs/demo/simsiam/{arm}/0/metrics.json" for arm in ("base", "linear-predictor")))
    assert f"simsiam/plot.py {STUDY} " in make(f"{STUDY}@report")
    results = tmp_path / "runs/demo/report"
    summary = json.loads((results / f"{STUDY}.json").read_text())
    assert {row["arm"] for row in summary["rows"] if not row["missing"]} == {"linear-predictor", "base"}
    assert summary["not_run"] == ["frozen-predictor"] and (results / f"{STUDY}-curves.svg").exists()
    run = json.loads((tmp_path / "runs/demo/simsiam/linear-predictor/0/args.json").read_text())
    assert run["arguments"]["predictor"] == "linear"
