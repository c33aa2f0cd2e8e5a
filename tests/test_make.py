"""What make does, on fake runs that take milliseconds: order, nothing twice, changed arms, failures."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FAKE = f"""#!{sys.executable} -IS
# Stands in for python: notes each call in calls.txt and leaves the files that the real script would leave.
import os, pathlib, sys
words = sys.argv[1:]
after = lambda flag: pathlib.Path(words[words.index(flag) + 1])
with open("calls.txt", "a") as calls:
    print(*words, file=calls)
if words[0].endswith("train.py"):
    out = after("--out")
    if str(out) in os.environ.get("BREAK", ""):
        sys.exit(1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.pt").write_text(" ".join(words))
elif words[0].endswith("eval.py"):
    (pathlib.Path(words[1]) / "metrics.json").write_text("{{}}")
else:
    results = after("--results")
    results.mkdir(parents=True, exist_ok=True)
    (results / ("index.html" if words[0] == "-m" else words[1] + ".json")).write_text(" ".join(words))
"""


class House:
    """A copy of the Makefile in a folder of its own, with the fake python."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("simsiam/plot.py", "common/report.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        fake = folder / "fake-python"
        fake.write_text(FAKE)
        fake.chmod(0o755)

    def make(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        """Exit code, the calls it made, and what it printed."""
        (self.folder / "calls.txt").write_text("")
        command = ["make", "PYTHON=./fake-python", "SCALE=demo", *words]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, cwd=self.folder, env=clean | environment, capture_output=True, text=True)
        return done.returncode, (self.folder / "calls.txt").read_text().splitlines(), done.stdout + done.stderr

    def edit(self, old: str, new: str) -> None:
        text = (self.folder / "Makefile").read_text()
        assert old in text
        (self.folder / "Makefile").write_text(text.replace(old, new))


@pytest.fixture
def house(tmp_path):
    folder = tmp_path / "a house with späces"
    folder.mkdir()
    return House(folder)


def runs(calls: list[str], script: str = "train") -> list[str]:
    """arm/seed of the calls of a script, in order."""
    words = [call.split() for call in calls if call.startswith(f"simsiam/{script}.py")]
    return ["/".join(Path(one[one.index("--out") + 1] if script == "train" else one[1]).parts[-2:]) for one in words]


def test_seed_by_seed_then_nothing(house):
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1")
    arms = ["base", "frozen-predictor", "no-predictor"]
    assert code == 0 and runs(calls) == runs(calls, "eval") == [f"{arm}/{seed}" for seed in (0, 1) for arm in arms]
    drawn = [number for number, call in enumerate(calls) if "plot.py" in call]
    assert len(drawn) == 2 and calls[-1].startswith("-m common.report")
    assert drawn[0] < next(number for number, call in enumerate(calls) if "base/1" in call)
    assert house.make("simsiam-predictor", "SEEDS=0 1")[:2] == (0, [])
    assert runs(house.make("simsiam-predictor", "SEEDS=0 1 2")[1]) == [f"{arm}/2" for arm in arms]


def test_other_seeds_are_drawn_again_from_the_same_runs(house):
    house.make("simsiam-predictor", "SEEDS=0 1 2")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and "--seeds 0 1 --results" in calls[-2]
    house.edit("no-predictor:base frozen-predictor:base", "no-predictor:base")
    assert "frozen" not in house.make("simsiam-predictor", "SEEDS=0 1")[1][0]


def test_two_studies_asked_at_once_share_their_runs(house):
    code, calls, _ = house.make("simsiam-predictor", "simsiam-stop-gradient", "SEEDS=0", "-j2")
    assert code == 0 and sorted(runs(calls)) == sorted(set(runs(calls))) and len(runs(calls)) == 4


def test_parallel_makes_the_same(house):
    code, calls, _ = house.make("simsiam", "SEEDS=0 1", "-j4")
    assert code == 0 and len(runs(calls)) == len(set(runs(calls))) == 18
    second = next(number for number, call in enumerate(calls) if "--seed 1" in call)
    assert (
        sum("eval.py" in call for call in calls[:second]) == 9
        and sum("plot.py" in call for call in calls[:second]) == 4
    )
    assert house.make("simsiam", "SEEDS=0 1", "-j4")[:2] == (0, [])


def test_a_changed_arm_reruns_its_own_runs_and_extra_all(house):
    house.make("simsiam-predictor", "SEEDS=0")
    house.edit("--predictor frozen", "--predictor frozen --lr 1")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["frozen-predictor/0"]
    assert "--predictor frozen --lr 1" in calls[0] and "--replace" in calls[0]
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    assert len(runs(house.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")[1])) == 3
    assert house.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")[:2] == (0, [])


def test_a_deleted_metrics_file_is_evaluated_again_and_nothing_else(house):
    house.make("simsiam-predictor", "SEEDS=0")
    (house.folder / "runs/demo/simsiam/base/0/metrics.json").unlink()
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == [] and runs(calls, "eval") == ["base/0"]


def test_a_failed_run_is_loud_the_page_is_drawn_and_k_goes_on(house):
    broken = {"BREAK": "runs/demo/simsiam/base/0"}
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0", **broken)
    assert code != 0 and runs(calls) == ["base/0"] and calls[-1].startswith("-m common.report")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0", "-k", **broken)
    assert code != 0 and runs(calls) == ["base/0", "frozen-predictor/0", "no-predictor/0"]
    assert not (house.folder / "runs/demo/simsiam/base/0/flags").exists()
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == ["base/0"]


def test_a_dry_run_is_honest(house):
    code, calls, printed = house.make("simsiam-predictor", "SEEDS=0", "-n")
    assert code == 0 and calls == [] and printed.count("simsiam/train.py") == 3
    house.make("simsiam-predictor", "SEEDS=0")
    _, calls, printed = house.make("simsiam-predictor", "SEEDS=0", "-n")
    assert calls == [] and "train.py" not in printed and "eval.py" not in printed
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


def test_only_the_committed_seeds_without_extra_reach_the_committed_results(house):
    _, calls, _ = house.make("simsiam-predictor")
    assert all("--results results/demo" in call for call in calls if "plot.py" in call or "-m" in call)
    for words in (["SEEDS=0 1 2 3"], ["EXTRA=--epochs 1"]):
        _, calls, _ = house.make("simsiam-predictor", *words)
        assert all("--results runs/demo/report" in call for call in calls if "plot.py" in call or "-m common" in call)


def test_launch_is_a_prefix_and_no_part_of_the_flags(house):
    (house.folder / "launcher").write_text('#!/bin/sh\necho "launched $1 $2" >> launched.txt\nexec "$@"\n')
    (house.folder / "launcher").chmod(0o755)
    house.make("simsiam-predictor", "SEEDS=0", "LAUNCH=./launcher")
    assert (house.folder / "launched.txt").read_text().count("simsiam/") == 6
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


def test_demo_is_every_study_with_one_seed_on_the_cpu(house):
    code, calls, printed = house.make("demo")
    assert code == 0 and len(runs(calls)) == 9 and all("--device cpu" in call for call in calls if "train" in call)
    assert "runs/demo/report/index.html" in printed and {run.split("/")[1] for run in runs(calls)} == {"0"}


def test_help_names_papers_studies_and_arms(house):
    _, calls, printed = house.make()
    assert calls == [] and "simsiam-stop-gradient" in printed and "--no-stop-gradient" in printed
