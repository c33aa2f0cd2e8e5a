"""What the README shows works: its example of an ablation of one's own, applied to a copy of the project and run."""

import json
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT

STUDY = "simsiam-predictor"


def test_an_ablation_in_three_edits_runs_end_to_end(tmp_path):
    shown = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(shown) == 1
    for name in ("Makefile", "common", "simsiam", "bsa", "seqvcr", "cocord", "conmim"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=shown[0], text=True, check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ["SCALE=demo", "SEEDS=0", "DEVICE=cpu", "EXTRA=--rehearse 2", f"PYTHON={sys.executable}"]
    listed = subprocess.run(["make", *words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert re.search(rf"{STUDY}:.* linear-predictor:base", listed.stdout)
    only = f"{STUDY}=linear-predictor:base"  # the study's other arms have run in other tests
    made = subprocess.run(["make", STUDY, only, *words], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    results = tmp_path / "runs/demo/report"
    arms = {row["arm"] for row in json.loads((results / f"{STUDY}.json").read_text())["rows"]}
    assert arms == {"linear-predictor", "base"} and (results / f"{STUDY}-curves.svg").exists()
    run = json.loads((tmp_path / "runs/demo/simsiam/linear-predictor/0/args.json").read_text())
    assert run["arguments"]["predictor"] == "linear"
