"""The README's example of a new ablation works: its diff is applied to a copy of the project and run."""

import json
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT

STUDY = "simsiam-predictor"


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
