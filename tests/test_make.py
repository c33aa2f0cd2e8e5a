"""What make does, on fake runs that take milliseconds: order, nothing twice, changed arms, failures."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

FAKE = f"""#!{sys.executable} -IS
# Stands in for python: notes each call in calls.txt and leaves the files that the real script would leave.
import os, pathlib, sys, time
words = sys.argv[1:]
after = lambda flag: pathlib.Path(words[words.index(flag) + 1])
if words[:2] == ["-m", "common.slots"]:
    os.execv(sys.executable, [sys.executable, *words])
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
with open("calls.txt", "a") as calls:
    print(*words, *([f"gpu={{gpu}} shared={{os.environ['RUNS_ON_THIS_GPU']}}"] if gpu else []), file=calls)
if words[0].endswith(("train.py", "teacher.py")):
    out = after("--out")
    if str(out) in os.environ.get("BREAK", ""):
        sys.exit(1)
    out.mkdir(parents=True, exist_ok=True)
    if str(out) == os.environ.get("HANG"):
        (out / "state.pt").write_text("half-way")
        time.sleep(60)
    if os.environ.get("RANK", "0") == "0":
        (out / "model.pt").write_text(" ".join(words))
    if gpu:  # more runs on a GPU than it has slots would meet here
        for number in range(int(os.environ["RUNS_ON_THIS_GPU"])):
            try:
                os.mkdir(f"busy-{{gpu}}-{{number}}")
                break
            except FileExistsError:
                continue
        else:
            sys.exit("too many runs on this GPU")
        time.sleep(0.2)
        os.rmdir(f"busy-{{gpu}}-{{number}}")
elif words[0].endswith("eval.py"):
    (pathlib.Path(words[1]) / "metrics.json").write_text("{{}}")
elif words[:2] == ["-m", "common.cost"]:
    print(os.environ.get("FITTING", "a table") if "--fitting" in words else "a table")
elif words[1] == os.environ.get("BREAK_PLOT"):
    sys.exit(1)
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
        for name in ("simsiam/plot.py", "bsa/plot.py", "seqvcr/plot.py", "cocord/plot.py", "conmim/plot.py",
                     "common/report.py"):  # fmt: skip
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        for name in ("__init__", "slots", "exits", "provenance"):
            shutil.copy(ROOT / "common" / f"{name}.py", folder / "common")
        fake = folder / "fake-python"
        fake.write_text(FAKE)
        fake.chmod(0o755)

    def make(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        """Exit code, the calls it made, and what it printed."""
        process = self.start(*words, **environment)
        printed = process.communicate()[0]
        return process.returncode, self.calls(), printed

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        """The make, in a session of its own as in a terminal."""
        (self.folder / "calls.txt").write_text("")
        command = ["make", "PYTHON=./fake-python", "SCALE=demo", *words]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

        def heed_interrupts() -> None:  # a shell's background jobs ignore them
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, cwd=self.folder, env=clean | environment, start_new_session=True, preexec_fn=heed_interrupts,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return (self.folder / "calls.txt").read_text().splitlines()

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


def launcher(house: House, name: str, script: str) -> None:
    (house.folder / name).write_text(f'#!/bin/sh\necho "$@" >> launched.txt\n{script}\n')
    (house.folder / name).chmod(0o755)


def test_launch_is_a_prefix_and_no_part_of_the_flags(house):
    """Stand-ins for srun, and for torchrun, which would start `python` itself if it were not told otherwise."""
    launcher(house, "srun", 'shift; exec "$@"')
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0", "LAUNCH=./srun --gres=gpu:1")
    launched = (house.folder / "launched.txt").read_text().splitlines()
    assert code == 0 and len(runs(calls)) == 3 and len(launched) == 6
    assert all(line.startswith("--gres=gpu:1 ./fake-python simsiam/") for line in launched)
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    launcher(house, "torchrun", '[ "$1" = --no-python ] && shift 3 && RANK=0 "$@" && RANK=1 exec "$@"')
    launch = "LAUNCH=./torchrun --no-python --standalone --nproc-per-node=2"
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=1", launch)
    assert code == 0 and len(runs(calls)) == len(runs(calls, "eval")) == 6
    assert house.make("simsiam-predictor", "SEEDS=1")[:2] == (0, [])


def test_each_run_takes_a_free_gpu(house):
    code, calls, printed = house.make("simsiam", "SEEDS=0", "-j4", "GPUS=3 5")
    trained = [call for call in calls if "train.py" in call]
    assert code == 0 and len(trained) == 9, printed
    assert {call.split("gpu=")[1] for call in trained} == {"3 shared=1", "5 shared=1"}
    assert all("gpu=" in call for call in calls if "eval.py" in call)
    assert not any("gpu=" in call for call in calls if "plot.py" in call)


def test_a_gpu_listed_twice_serves_two_runs_which_are_told(house):
    code, calls, printed = house.make("simsiam-predictor", "SEEDS=0 1", "-j4", "GPUS=0 0", "LAUNCH=env")
    trained = [call for call in calls if "train.py" in call]
    assert code == 0 and len(trained) == 6 and all("gpu=0 shared=2" in call for call in trained), printed


def test_interrupted_and_started_again_in_parallel_nothing_is_done_twice(house):
    hung = "runs/demo/simsiam/frozen-predictor/0"
    process = house.start("simsiam-predictor", "SEEDS=0 1", HANG=hung)
    limit = time.monotonic() + 30
    while not (house.folder / hung / "state.pt").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches make and its children
    process.communicate()
    assert process.returncode != 0 and runs(house.calls()) == ["base/0", "frozen-predictor/0"]
    assert not (house.folder / hung / "model.pt").exists() and not (house.folder / hung / "flags").exists()
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1", "-j4")
    rest = ["base/1", "frozen-predictor/0", "frozen-predictor/1", "no-predictor/0", "no-predictor/1"]
    assert code == 0 and sorted(runs(calls)) == sorted(runs(calls, "eval")) == rest
    assert (house.folder / hung / "state.pt").read_text() == "half-way"  # the run's own to go on from
    assert house.make("simsiam-predictor", "SEEDS=0 1", "-j4")[:2] == (0, [])


def test_report_draws_a_half_finished_grid_and_runs_nothing(house):
    house.make("simsiam-predictor", "SEEDS=0")
    code, calls, _ = house.make("report", "SEEDS=0 1 2")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and calls[-1].startswith("-m common.report")
    drawn = [call.split()[1] for call in calls[:-1] if "plot.py" in call and "--seeds 0 1 2" in call]
    assert len(set(drawn)) == len(calls) - 1 and drawn == calls[-1].split()[-len(drawn) :] and len(drawn) >= 8
    calls = house.make("report")[1]  # the committed seeds, but who knows what runs: not where the results are
    assert all("--results runs/demo/report " in call for call in calls) and not (house.folder / "results").exists()
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


def test_a_study_that_cannot_be_drawn_leaves_the_others_and_the_page(house):
    code, calls, _ = house.make("report", BREAK_PLOT="simsiam-predictor")
    drawn = [call.split()[1] for call in calls if "plot.py" in call]
    assert code != 0 and len(drawn) == 12 and calls[-1].startswith("-m common.report")


@pytest.mark.parametrize("word", ["TASKS=9x9", "PAPERS=simclr", "SCALE=small", "SEEDS="])
def test_a_name_that_is_none_ends_before_anything_runs(house, word):
    code, calls, printed = house.make("seqvcr", word)
    assert code == 2 and calls == [] and printed.count("***") == 1 and word.split("=")[0] in printed


@pytest.mark.parametrize("contrast", ["no-preditor:base", "no-predictor:bse", "no-predictor@thrid:base"])
def test_an_arm_that_is_not_defined_ends_before_anything_runs(contrast, house):
    """Its flags would be empty: `base` would be trained under its name, and no difference found."""
    code, calls, printed = house.make("simsiam-predictor", f"simsiam-predictor={contrast}", "SEEDS=0")
    assert code == 2 and not calls and "simsiam has no arm" in printed


def test_a_changed_arm_moves_its_old_run_aside_and_no_other(house):
    """With the real `--replace`, which is the script's: here that make asks for it, and for the changed arm alone."""
    house.make("simsiam-predictor", "SEEDS=0 1")
    before = {path: path.stat().st_mtime_ns for path in house.folder.glob("runs/demo/simsiam/*/*/model.pt")}
    house.edit("--predictor none", "--predictor none --dim 64")
    assert runs(house.make("simsiam-predictor", "SEEDS=0 1", "-j2")[1]) == ["no-predictor/0", "no-predictor/1"]
    changed = {path.parts[-3] for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"no-predictor"}


def test_a_rehearsal_takes_every_arm_in_a_folder_of_its_own(house):
    code, calls, printed = house.make("rehearsal", "PAPERS=simsiam bsa", "EXTRA=--batch 8", "-j2")
    assert code == 0 and len(runs(calls)) == len(runs(calls, "eval")) == 9
    assert all("--rehearse 20 --batch 8" in call for call in calls if "train.py" in call)
    assert not (house.folder / "runs/demo").exists() and not (house.folder / "results").exists()
    assert (house.folder / "runs/rehearsal/demo/report/index.html").exists() and "a table" in printed
    assert len(runs(house.make("rehearsal", "PAPERS=simsiam bsa")[1])) == 9  # a rehearsal is never "already done"
    code, calls, _ = house.make("rehearsal", "PAPERS=simsiam bsa", "-k", BREAK="runs/rehearsal/demo/simsiam/base/0")
    assert code != 0 and len(runs(calls)) == 9 and calls[-1].startswith("-m common.cost")


def test_cost_rehearses_only_what_was_never_run(house):
    house.make("simsiam-predictor", "SEEDS=0")
    code, calls, _ = house.make("cost")
    assert code == 0 and len(runs(calls)) == 6 and "base/0" not in runs(calls)
    assert "simsiam-predictor=no-predictor:base,frozen-predictor:base" in calls[-1] and "--runs runs/demo" in calls[-1]
    assert [call.split()[1] for call in house.make("cost")[1]] == ["common.cost"]
    assert house.make("cost", "EXTRA=--epochs 2", BREAK="runs/rehearsal/demo/simsiam/base/0")[0] != 0
    code, calls, _ = house.make("cost", "EXTRA=--epochs 3")  # what was run had other flags
    assert code == 0 and len(runs(calls)) == 9 and "--runs" not in calls[-1]


def test_an_evening_runs_the_first_contrasts_that_fit(house):
    fitting = "simsiam-predictor=no-predictor:base simsiam-stop-gradient=no-stop-gradient:base"
    code, calls, printed = house.make("evening", "HOURS=2", FITTING=fitting)
    real = [call for call in calls if "train.py" in call and "--rehearse" not in call]
    assert code == 0 and "--fitting 2" in printed + " ".join(calls) and len(real) == 9
    assert {Path(one.split("--out ")[1].split()[0]).parts[3] for one in real} == {
        "base", "no-predictor", "no-stop-gradient",
    }  # fmt: skip
    assert not (house.folder / "results").exists() and (house.folder / "runs/demo/report/index.html").exists()
    assert not [call for call in house.make("evening", FITTING=fitting)[1] if "train.py" in call]
    asked = next(call for call in calls if "--fitting" in call).split()
    assert {"simsiam-predictor=no-predictor:base", "conmim-asymmetry=symmetric:base,base:no-pretraining"} < {*asked}
    pair = "@resnet_s64-vgg_s"  # the control is another run, and comes with the contrast that it guards
    assert f"cocord-teacher-momentum=moving{pair}:frozen{pair},frozen{pair}:cross-entropy@vgg_s" in asked
    assert "seqvcr-projection-width=width-4096@2x2:width-512@2x2,base@2x2:off@2x2" in asked
    calls = house.make("evening", FITTING="conmim-asymmetry=symmetric:base,base:no-pretraining")[1]
    assert {call.split("--out ")[1].split("/")[3] for call in calls if "conmim/train.py" in call} == {
        "base", "symmetric", "no-pretraining",
    }  # fmt: skip


def test_an_evening_takes_the_control_of_the_first_pair_alone(house):
    calls = house.make("evening", "PAIRS=vgg13-MobileNetV2 wrn_40_2-ShuffleV1")[1]
    asked = next(call for call in calls if "--fitting" in call).split()
    pair = "@vgg13-MobileNetV2"
    assert f"cocord-teacher-momentum=moving{pair}:frozen{pair},frozen{pair}:cross-entropy@MobileNetV2" in asked


def test_another_matrix_is_another_run_and_what_was_chosen_is_drawn_elsewhere(house):
    study = ("bsa-alignment-loss", "no-alignment:base")
    only = f"{study[0]}={study[1]}"
    trained = []
    for data in ("a.npy", "a.npy", "b.npy"):
        code, calls, _ = house.make(study[0], only, f"DATA={data}")
        assert code == 0 and not (house.folder / "results").exists()
        trained.append(sum(f"--data {data} --replace" in call for call in calls))
        assert all(f"DATA={data}" in call.split("--reproduce")[1] for call in calls if "plot.py" in call)
    assert trained == [10, 0, 10]
    for words in (("cocord-prediction-loss", "PAIRS=vgg13-vgg8"), ("seqvcr-coefficients", "TASKS=2x2")):
        calls = house.make(*words)[1]
        drawn = [call for call in calls if "plot.py" in call]
        name, _, value = words[1].partition("=")
        assert drawn and all(f'{name}="{value}"' in call and "--results runs/demo/report " in call for call in drawn)
    calls = house.make(study[0], only, "DATA=elsewhere")[1]  # a place, not another study: but the matrix's runs go
    assert sum("--data elsewhere" in call and "train.py" in call for call in calls) == 10
    assert (house.folder / "results/demo").exists()


def test_demo_is_every_study_with_one_seed_on_the_cpu(house):
    code, calls, printed = house.make("demo")
    assert code == 0 and len(runs(calls)) == 9 and all("--device cpu" in call for call in calls if "train.py" in call)
    assert "runs/demo/report/index.html" in printed and {run.split("/")[1] for run in runs(calls)} == {"0"}
    drawn = [call.split()[1] for call in calls if call.split()[0].endswith("plot.py")]
    assert len(drawn) == len(set(drawn)) == 12
    first = next(place for place, call in enumerate(calls) if "plot.py" in call)
    assert drawn[0] == "simsiam-stop-gradient"  # once its own runs are there; the next study's begin beside it
    assert sum("train.py" in call and "/base/" not in call and "no-stop" not in call for call in calls[:first]) < 4


def test_robustness_and_curves_are_extras_of_three_seeds_with_a_page_of_their_own(house):
    code, calls, printed = house.make("robustness", "PAPERS=bsa cocord", "-j2")
    assert code == 0, printed
    tripled = [call for call in calls if "train.py" in call and "--lr-factor 3" in call]
    assert len(tripled) == 3 * (3 + 6) and all("@triple/" in call for call in tripled)
    assert {call.split("--seed ")[1].split()[0] for call in tripled} == {"0", "1", "2"}
    drawn = [call for call in calls if "plot.py" in call]
    assert {call.split()[1] for call in drawn} == {"bsa-robustness", "cocord-robustness"}
    assert all("--results results/demo/extras " in call for call in drawn)
    assert (house.folder / "results/demo/extras/index.html").exists()
    assert not (house.folder / "results/demo/index.html").exists()
    for place, call in enumerate(calls):  # at another rate the teacher is the same, and there first
        if "cocord/train.py" in call and "@third" in call and "--weights" in call:
            weights = Path(call.split("--weights ")[1].split()[0])
            assert any(f"--out {weights.parent} " in one for one in calls[:place])
    assert house.make("robustness", "PAPERS=bsa cocord")[:2] == (0, [])
    code, calls, _ = house.make("curves", "PAPERS=bsa", "SEEDS=0")
    assert code == 0 and len([call for call in calls if "train.py" in call]) == 4  # base and no-alignment are there
    assert "--results runs/demo/report/extras " in next(call for call in calls if "plot.py" in call)
    assert not (house.folder / "results/demo/extras/bsa-alignment-weight.json").exists()


def test_help_names_papers_studies_and_arms(house):
    _, calls, printed = house.make()
    assert calls == [] and "simsiam-stop-gradient" in printed and "--no-stop-gradient" in printed


def test_teachers_are_trained_first_once_and_take_no_extra(house):
    code, calls, printed = house.make("cocord-teacher-momentum", "SEEDS=0 1", "EXTRA=--queue 64", "-j2")
    taught = [call for call in calls if "teacher.py" in call]
    assert code == 0 and len(taught) == len(set(taught)) == 3, printed
    assert not any("--queue" in call for call in taught) and all("--seed 0" in call for call in taught)
    for place, call in enumerate(calls):
        if "cocord/train.py" in call and "--weights" in call:
            weights = Path(call.split("--weights ")[1].split()[0])
            assert weights.parts[3] == f"teacher@{call.split('--teacher ')[1].split()[0]}"
            assert any(f"--out {weights.parent} " in one for one in calls[:place])
    assert sum("--teacher none" in call for call in calls if "train.py" in call) == 2
    assert house.make("cocord-teacher-momentum", "SEEDS=0 1", "EXTRA=--queue 64")[:2] == (0, [])


def test_teachers_by_themselves_other_pairs_and_a_rehearsal(house):
    calls = house.make("cocord-teachers")[1]
    assert len(calls) == 4 and all(call.startswith("cocord/teacher.py") for call in calls)
    calls = house.make("cocord-prediction-loss", "SEEDS=0", "PAIRS=vgg13-vgg8")[1]
    assert sum("--network vgg13" in call for call in calls) == 1
    assert {call.split("--student ")[1].split()[0] for call in calls if "cocord/train.py" in call} == {"vgg8"}
    rehearsal = ["EXTRA=--batch 8 --rehearse 3", "RUNS=runs/rehearsal/demo"]
    calls = house.make("cocord-prediction-loss", "SEEDS=0", *rehearsal)[1]
    teacher = next(call for call in calls if "teacher.py" in call)
    assert "--rehearse=3" in teacher and "--batch" not in teacher
