"""What make does, on fake runs that take milliseconds: order, nothing twice, changed arms, failures."""

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

PAPERS = ("simsiam", "conmim", "cocord", "bsa", "seqvcr")
FAKE = f"""#!{sys.executable} -IS
# Stands in for python: notes each call in calls.txt and leaves the files that the real script would leave.
import os, pathlib, sys, time
words = sys.argv[1:]
after = lambda flag: pathlib.Path(words[words.index(flag) + 1])
if words[:2] in (["-m", "common.study.slots"], ["-m", "common.study.rules"]):
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
        (out / "model.pt").write_text(repr(words))
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
    (pathlib.Path(words[1]) / "metrics.json").write_text('{{"seconds": 1, "examples_per_second": 1, "peak_memory": 1}}')
elif words[:2] == ["-m", "common.study.cost"]:
    os.execv(sys.executable, [sys.executable, *words])
elif words[:2] == ["-m", "common.devices"]:
    sys.exit("--device cpu" not in " ".join(words) and 2)
elif words[:2] == ["-m", "common.images"]:
    (after("--data") / "cifar-10-batches-py").mkdir(parents=True)
elif words[:2] in (["-m", "common.doctor"], ["-m", "pytest"]):
    pass
elif words[1] == os.environ.get("BREAK_PLOT"):
    sys.exit(1)
else:
    results = after("--results")
    results.mkdir(parents=True, exist_ok=True)
    (results / ("index.html" if words[0] == "-m" else words[1] + ".json")).write_text(" ".join(words))
"""


class House:
    """A copy of the Makefile and of the designs in a folder of its own, with the fake python."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
        for paper in PAPERS:
            (folder / paper).mkdir()
            for name in ("__init__", "studies"):
                shutil.copy(ROOT / paper / f"{name}.py", folder / paper)
            (folder / paper / "plot.py").touch()
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

    def edit(self, old: str, new: str, paper: str = "simsiam") -> None:
        """Change a paper's design. (Python's cache of compiled files goes by size and whole seconds, so it goes.)"""
        path = self.folder / paper / "studies.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


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
    arms = ["base", "no-predictor", "frozen-predictor"]
    assert code == 0 and runs(calls) == runs(calls, "eval") == [f"{arm}/{seed}" for seed in (0, 1) for arm in arms]
    drawn = [number for number, call in enumerate(calls) if "plot.py" in call]
    assert len(drawn) == 2 and calls[-1].startswith("-m common.study.page")
    assert drawn[0] < next(number for number, call in enumerate(calls) if "base/1" in call)
    assert house.make("simsiam-predictor", "SEEDS=0 1")[:2] == (0, [])
    assert runs(house.make("simsiam-predictor", "SEEDS=0 1 2")[1]) == [f"{arm}/2" for arm in arms]


def test_other_seeds_are_drawn_again_from_the_same_runs(house):
    house.make("simsiam-predictor", "SEEDS=0 1 2")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and "--seeds 0 1 --results" in calls[-2]
    house.edit('Arm("frozen-predictor", "--predictor frozen", against="base"),', "")
    _, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1")
    assert runs(calls) == runs(calls, "eval") == [] and calls[0].startswith("simsiam/plot.py simsiam-predictor ")


def test_two_studies_asked_at_once_share_their_runs(house):
    code, calls, _ = house.make("simsiam-predictor", "simsiam-stop-gradient", "SEEDS=0", "-j2")
    assert code == 0 and sorted(runs(calls)) == sorted(set(runs(calls))) and len(runs(calls)) == 4


def test_one_study_leaves_the_others_alone(house):
    """Whatever has become of them: other flags, a lost run, other seeds in the report, another scale of data."""
    house.make("simsiam", "SEEDS=0 1")
    shutil.rmtree(house.folder / "runs/demo/simsiam/narrow")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["base/0", "no-predictor/0", "frozen-predictor/0"]
    assert [call.split()[1] for call in calls[6:]] == ["simsiam-predictor", "common.study.page"]
    house.edit('"--loss asymmetric-2x"', '"--loss asymmetric-2x --lr 1"')
    code, calls, _ = house.make("bsa-distance", "SEEDS=0", "DATA=a.npy", "-j2")
    assert code == 0 and not runs(calls) and sum("train.py" in call for call in calls) == 5
    assert [call.split()[1] for call in calls[-2:]] == ["bsa-distance", "common.study.page"]


def test_the_report_shows_what_was_asked_last(house):
    """All makes of a study write the same figures: what they show is compared, not only what is newer."""
    for seeds in ("0", "1", "0"):
        drawn = [call for call in house.make("simsiam-predictor", f"SEEDS={seeds}")[1] if "plot.py" in call]
        assert len(drawn) == 1 and f"--seeds {seeds} --" in drawn[0]
    (house.folder / "runs/demo/report/simsiam-predictor.json").unlink()
    assert len(house.make("simsiam-predictor", "SEEDS=0")[1]) == 2  # drawn again, and the page
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    house.make("primary", "PAPERS=simsiam", "SEEDS=0")
    assert house.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


def test_a_table_may_print_and_warn(house):
    house.edit("LEAKS = ", 'print("a note")\nimport warnings; warnings.warn("careful")\nLEAKS = ')
    code, calls, printed = house.make("simsiam-stop-gradient", "SEEDS=0")
    assert code == 0 and len(runs(calls)) == 2 and "a note" in printed


def test_a_rehearsal_that_cannot_begin_removes_nothing(house):
    (house.folder / "runs/rehearsal/demo").mkdir(parents=True)
    (house.folder / "runs/gpu").mkdir()
    for words in (["SCALE=../gpu"], ["SCALE="], ["PAPERS=simclr"]):
        assert house.make("rehearsal", *words)[0] == 2
    assert (house.folder / "runs/rehearsal/demo").exists() and (house.folder / "runs/gpu").exists()


def test_teachers_are_trained_side_by_side(house):
    code, calls, printed = house.make("cocord-teachers", "-j4", "GPUS=0 1 2 3")
    assert code == 0 and len({call.split("gpu=")[1] for call in calls}) > 1, printed


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
    house.edit('"--predictor frozen"', '"--predictor frozen --lr 1"')
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
    assert code != 0 and runs(calls) == ["base/0"] and calls[-1].startswith("-m common.study.page")
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0", "-k", **broken)
    assert code != 0 and runs(calls) == ["base/0", "no-predictor/0", "frozen-predictor/0"]
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


def test_no_target_but_publish_writes_into_results(house):
    for words in (["simsiam-predictor", "SEEDS=0"], ["report"], ["primary", "PAPERS=bsa"], ["rehearsal", "PAPERS=bsa"]):
        _, calls, _ = house.make(*words)
        drawn = [call for call in calls if "plot.py" in call or "study.page" in call]
        assert drawn and all("--results runs/" in call for call in drawn)
    assert not (house.folder / "results").exists()
    calls = house.make("publish", "simsiam-predictor", "bsa-distance")[1]  # the names are no goals here
    assert len(calls) == 1 and calls[0].startswith("-m common.study.publish PAPERS=")
    assert calls[0].endswith(" simsiam-predictor bsa-distance")


def test_the_rules_are_a_file_that_one_can_open(house):
    """Two rules a run and one a study and seed, with the command as it is run; -n prints the path."""
    _, _, printed = house.make("simsiam-predictor", "SEEDS=0", "-n")
    path = next(line.removeprefix("rules: ") for line in printed.splitlines() if line.startswith("rules: "))
    assert path.startswith("runs/demo/rules-") and path.endswith(".mk")
    text = (house.folder / path).read_text()
    run = "runs/demo/simsiam/frozen-predictor/0"
    assert f"{run}/model.pt: | $(venv)\n\t$(run) simsiam/train.py --scale demo --out {run} --seed 0 " in text
    assert f"{run}/metrics.json: {run}/model.pt\n\t$(run) simsiam/eval.py {run} " in text
    assert "\nruns/demo/report/.drawn/simsiam-predictor: " in text and "simsiam-predictor@1" not in text
    assert house.make("simsiam-predictor", "SEEDS=0", "-n")[2].count("rules: ") == 1  # not once more by inner makes
    assert "rules: " not in house.make("simsiam-predictor", "SEEDS=0")[2]
    assert len(list(house.folder.glob("runs/demo/rules-*.mk"))) == 1  # for all the makes of this request


def test_a_single_file_can_be_the_goal(house):
    code, calls, _ = house.make("runs/demo/simsiam/no-predictor/3/metrics.json")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["no-predictor/3"]
    (house.folder / "runs/demo/simsiam/no-predictor/3/metrics.json").unlink()
    code, calls, _ = house.make("runs/demo/simsiam/no-predictor/3/metrics.json")
    assert runs(calls) == [] and runs(calls, "eval") == ["no-predictor/3"]


def test_folders_may_have_spaces_and_signs(house):
    words = ["simsiam-stop-gradient", "SEEDS=0", "RUNS=my runs/a#1", "RESULTS=my $results", "DATA=my data", "SCALE=gpu",
             "DEVICE=cpu"]  # fmt: skip
    code, calls, printed = house.make(*words)
    assert code == 0, printed
    assert calls[1] == "-m common.images cifar10 --data my data" and calls[2].endswith("--data my data --replace")
    assert (house.folder / "my runs/a#1/simsiam/base/0/metrics.json").exists()
    assert (house.folder / "my $results/index.html").exists()
    assert house.make(*words)[:2] == (0, [])


@pytest.mark.parametrize("extra", ['--note "it\'s $HOME #1"', "--note 'a $(shell echo b) % c'", "--note a\\ b"])
def test_extra_reaches_the_script_as_a_shell_would_pass_it(extra, house):
    """Quotes, $ and # survive both makes; the flags that a run was made with are compared as they are."""
    words = ["runs/demo/simsiam/base/0/model.pt", f"EXTRA={extra}"]
    code, calls, printed = house.make("simsiam-stop-gradient", "SEEDS=0", words[1])
    assert code == 0 and len(runs(calls)) == 2, printed
    saved = ast.literal_eval((house.folder / "runs/demo/simsiam/base/0/model.pt").read_text())
    assert saved[-2:] == shlex.split(extra)
    assert house.make("simsiam-stop-gradient", "SEEDS=0", words[1])[:2] == (0, [])
    assert runs(house.make(words[0])[1]) == ["base/0"]
    code, calls, _ = house.make("cost", "PAPERS=simsiam", words[1])  # and a third make, which rehearses
    saved = ast.literal_eval((house.folder / "runs/rehearsal/demo/simsiam/base/0/model.pt").read_text())
    assert code == 0 and saved[-4:] == ["--rehearse", "20", *shlex.split(extra)]


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
    assert process.returncode != 0 and runs(house.calls()) == ["base/0", "no-predictor/0", "frozen-predictor/0"]
    assert not (house.folder / hung / "model.pt").exists() and not (house.folder / hung / "flags").exists()
    code, calls, _ = house.make("simsiam-predictor", "SEEDS=0 1", "-j4")
    rest = ["base/1", "frozen-predictor/0", "frozen-predictor/1", "no-predictor/1"]
    assert code == 0 and sorted(runs(calls)) == rest
    assert set(rest) <= set(runs(calls, "eval")) <= {*rest, "base/0", "no-predictor/0"}
    assert (house.folder / hung / "state.pt").read_text() == "half-way"  # the run's own to go on from
    assert house.make("simsiam-predictor", "SEEDS=0 1", "-j4")[:2] == (0, [])


def test_report_draws_a_half_finished_grid_and_runs_nothing(house):
    house.make("simsiam-predictor", "SEEDS=0")
    code, calls, _ = house.make("report", "SEEDS=0 1 2")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and calls[-1].startswith("-m common.study.page")
    drawn = [call.split()[1] for call in calls[:-1] if "plot.py" in call and "--seeds 0 1 2" in call]
    assert len(set(drawn)) == len(drawn) == len(calls) - 1 == 12
    calls = house.make("simsiam-predictor", "SEEDS=0")[1]  # the report shows other seeds now
    assert [call.split()[0] for call in calls] == ["simsiam/plot.py", "-m"] and "--seeds 0 --" in calls[0]
    house.make("runs/demo/simsiam/leak-0.1/0/model.pt")  # an extra with a run of its own is drawn as well
    assert [call.split()[1] for call in house.make("report")[1]][12:] == ["simsiam-gradient-leak", "common.study.page"]


def test_a_study_that_cannot_be_drawn_leaves_the_others_and_the_page(house):
    code, calls, _ = house.make("report", BREAK_PLOT="simsiam-predictor")
    drawn = [call.split()[1] for call in calls if "plot.py" in call]
    assert code != 0 and len(drawn) == 12 and calls[-1].startswith("-m common.study.page")


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("seqvcr TASKS=9x9", "*** TASKS: there is no '9x9'"),
        ("cocord PAIRS=vgg13", "PAIRS: 'vgg13' is not a pair"),
        ("simsiam PAPERS=simclr", "PAPERS: there is no paper 'simclr'"),
        ("simsiam SCALE=small", "SCALE: there is no 'small'"),
        ("simsiam SEEDS=", "SEEDS is empty"),
        ("simsiam SEEDS=1,2", "SEEDS=1,2: whole numbers"),
        ("simsiam EXTRA='", "No closing quotation"),
        ("demo SCALE=gpu", "make demo is make primary SCALE=demo"),
        ("simsiam SEED=1", "there is no variable SEED"),
        ("simsiam simsiam-predictor=no-predictor:base", "there is no variable simsiam-predictor"),
        ("simsiam-preditor", "there is no goal simsiam-preditor"),
        ("simsiam-predictor simsiam-preditor", "there is no goal simsiam-preditor"),
        ("simsiam-predictor publish", "publish comes first"),
        ("publish PAPERS=bsa", "name studies, not PAPERS"),
        ("page RUNS=x", "make page is of results/demo as it is"),
        ("simsiam SEEDS=0\\ 00", "a seed is named twice"),
        ("simsiam EXTRA=--seed=7", "make sets --seed itself, from SEEDS"),
        ("simsiam RUNS=a=b", "a folder without = is needed"),
        ("simsiam-predictor@9", "No rule to make target 'simsiam-predictor@9'"),
    ],
)
def test_a_wrong_name_ends_before_anything_runs(house, words, printed):
    code, calls, told = house.make(*shlex.split(words) if "\\" in words else words.split())
    assert code == 2 and calls == [] and told.count("***") == 1 and printed in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("old", "new", "printed"),
    [
        ('"no-predictor", "--predictor none"', '"base", "--predictor none"', "arm 'base' is declared twice"),
        ('"no-stop-gradient:base"', '"no-stop-gradeint:base"', "names the arm 'no-stop-gradeint', which is not"),
        ('"no-stop-gradient:base"', '"no-stop-gradient:bse"', "names the arm 'bse', which is not declared"),
        ('"--predictor frozen", against="base"', '"--predictor frozen"', "'frozen-predictor:' needs an arm and a ref"),
        ('"--predictor frozen"', '"--predictor none"', "'no-predictor' and 'frozen-predictor' have the same flags"),
        ('metric="knn_accuracy"', 'metric="kNN"', "names the metric 'kNN', which is not declared"),
        ('"untrained", "knn_accuracy"', '"untrained", "knn"', "names the metric 'knn', which is not declared"),
        ('beats_untrained("base")', 'beats_untrained("basis")', "names the arm 'basis', which is not declared"),
        ('"%", 1, "higher")', '"%", 1, "hihger")', "metric 'linear_accuracy': better is 'higher', 'lower' or nothing"),
        ('"kNN accuracy", "%", 1, "higher"', '"kNN accuracy", "%"', "'knn_accuracy' does not say which way is better"),
        ('"gradient_leak"', '"gradient_leek"', "sweeps 'gradient_leek', which no flag of its arms sets"),
        ('["knn_accuracy", "std_ratio"]', '["knn_accuracy", "std"]', "names the metric 'std', which is not declared"),
        ('"simsiam-projector"', '"simsiam-predictor"', "study 'simsiam-predictor' is declared twice"),
        ('"simsiam-projector"', '"projector"', "study 'projector': its name is 'simsiam-'"),
        ('arms=[Arm("base")],', 'arms=[Arm("base")]', "SyntaxError: "),
        (
            '="untrained_knn_accuracy")',
            '="untrained_knn_acuracy")',
            "the baseline 'untrained_knn_acuracy', which is not",
        ),
        ('must_beat=[beats_untrained("base")]', "must_beat=[]", "nothing is declared that base must beat"),
        ("seeds=(0, 1, 2)", "seeds=()", "seeds are different whole numbers"),
        ('"no-predictor", "--p', '"predictor=none", "--p', "arm 'predictor=none': letters, digits"),
        ('["knn_accuracy", "linear_accuracy",', '["linear_accuracy",', "its sweep does not show 'knn_accuracy'"),
        ("LEAKS)", "LEAK)", "NameError: name 'LEAK' is not defined"),
    ],
)
def test_a_wrong_design_is_one_sentence_before_anything_runs(old, new, printed, house):
    """With undefined names a misspelt arm would be `base` under another name, and no difference would be found."""
    house.edit(old, new)
    for goal in ("simsiam-predictor", "bsa", "help", "demo", "rehearsal", "cost"):
        code, calls, told = house.make(goal, "SEEDS=0")
        assert code == 2 and printed in told and "Traceback" not in told and "simsiam/studies.py" in told
        assert not [call for call in calls if "common.study.cost" not in call]
    code, calls, _ = house.make("doctor")
    assert code == 0 and calls == ["-m common.doctor --data data"]
    assert house.make("test")[1] == ["-m pytest"]


def test_an_old_python_is_one_sentence_and_doctor_still_works(house):
    """The package is compiled by no Python older than 3.11: its first file says so in words that all understand."""
    old = 'import sys\nsys.hexversion, sys.version = 0x03080AF0, "3.8.10 (default)"\n'
    path = house.folder / "common/study/__init__.py"
    path.write_text(path.read_text().replace("import sys\n", old))
    code, calls, told = house.make("simsiam")
    assert code == 2 and not calls and told.count("***") == 1 and "Python 3.8.10 is older than 3.11" in told
    assert house.make("doctor")[0] == 0
    ast.parse(path.read_text(), feature_version=(3, 4))


def test_data_are_asked_for_after_the_device_and_only_where_needed(house):
    """The fake machine has no GPU: nothing is downloaded, unless the CPU is meant, or LAUNCH finds a device."""
    asked = ["simsiam-stop-gradient", "SCALE=gpu", "SEEDS=0"]
    code, calls, _ = house.make(*asked)
    assert code != 0 and [call for call in calls if "plot.py" not in call and "study.page" not in call] == [
        "-m common.devices --device auto --scale gpu"
    ]
    code, calls, _ = house.make(*asked, "LAUNCH=env")
    assert code == 0 and not any("common.devices" in call for call in calls)
    assert calls[0] == "-m common.images cifar10 --data data" and len(runs(calls)) == 2
    shutil.rmtree(house.folder / "data")
    shutil.rmtree(house.folder / "runs")
    calls = house.make(*asked, "DEVICE=cpu")[1]
    assert calls[:2] == ["-m common.devices --device cpu --scale gpu", "-m common.images cifar10 --data data"]
    shutil.rmtree(house.folder / "runs")
    assert not any("common.images" in call for call in house.make(*asked, "DEVICE=cpu")[1])
    calls = house.make(*asked, "DATA=pictures", "EXTRA=--data-set folder")[1]
    assert len(runs(calls)) == 2 and not any("common.images" in call or "common.devices" in call for call in calls)


def test_a_changed_arm_moves_its_old_run_aside_and_no_other(house):
    """That the old run is moved is the script's `--replace`; here: make asks for it, and for the changed arm alone."""
    house.make("simsiam-predictor", "SEEDS=0 1")
    before = {path: path.stat().st_mtime_ns for path in house.folder.glob("runs/demo/simsiam/*/*/model.pt")}
    house.edit('"--predictor none"', '"--predictor none --dim 64"')
    assert runs(house.make("simsiam-predictor", "SEEDS=0 1", "-j2")[1]) == ["no-predictor/0", "no-predictor/1"]
    changed = {path.parts[-3] for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"no-predictor"}


def test_a_rehearsal_takes_every_arm_in_a_folder_of_its_own(house):
    code, calls, printed = house.make("rehearsal", "PAPERS=simsiam bsa", "EXTRA=--batch 8", "-j2")
    assert code == 0 and len(runs(calls)) == len(runs(calls, "eval")) == 9
    assert all("--rehearse 20 --batch 8" in call for call in calls if "train.py" in call)
    assert not (house.folder / "runs/demo").exists() and not (house.folder / "results").exists()
    assert (house.folder / "runs/rehearsal/demo/report/index.html").exists() and "together, shared arms once" in printed
    assert len(runs(house.make("rehearsal", "PAPERS=simsiam bsa")[1])) == 9  # a rehearsal is never "already done"
    code, calls, _ = house.make("rehearsal", "PAPERS=simsiam bsa", "-k", BREAK="runs/rehearsal/demo/simsiam/base/0")
    assert code != 0 and len(runs(calls)) == 9 and calls[-1].startswith("-m common.study.cost")


def test_cost_rehearses_only_what_was_never_run(house):
    house.make("simsiam-predictor", "SEEDS=0")
    code, calls, printed = house.make("cost", "PAPERS=simsiam")
    assert code == 0 and len(runs(calls)) == 6 and "base/0" not in runs(calls)
    assert "simsiam/base" in printed and "1 finished" in printed
    assert all(call.startswith("-m common.study.cost ") for call in house.make("cost", "PAPERS=simsiam")[1])
    broken = "runs/rehearsal/demo/simsiam/base/0"
    assert house.make("cost", "PAPERS=simsiam", "EXTRA=--epochs 2", BREAK=broken)[0] != 0
    code, calls, printed = house.make("cost", "PAPERS=simsiam", "EXTRA=--epochs 3")  # what was run had other flags
    assert code == 0 and len(runs(calls)) == 9 and "1 finished" not in printed


def test_primary_runs_the_primary_contrasts_and_their_baselines(house):
    code, calls, printed = house.make("primary", "SEEDS=0", "-j2")
    assert code == 0, printed
    trained = {"/".join(Path(call.split("--out ")[1].split()[0]).parts[2:4]) for call in calls if "train.py" in call}
    pair, other = "vgg_s32-vgg_s", "resnet_s64-vgg_s"
    assert trained == {
        *(f"simsiam/{arm}" for arm in ("base", "no-stop-gradient", "no-predictor", "no-projector", "asymmetric")),
        *(f"conmim/{arm}" for arm in ("online-no-stop-gradient", "online-keys", "symmetric", "base", "no-pretraining")),
        *(f"cocord/{arm}@{pair}" for arm in ("forward-only", "swapped-only", "base")),
        *(f"cocord/{arm}@{other}" for arm in ("moving", "frozen")), "cocord/cross-entropy@vgg_s",
        *(f"bsa/{arm}" for arm in ("base", "no-alignment", "mse")),
        *(f"seqvcr/{arm}@2x2" for arm in ("base", "off", "width-4096", "width-512")), "seqvcr/0.1-0.5@2x2-128",
    }  # fmt: skip
    drawn = [call.split()[1] for call in calls if "plot.py" in call]
    assert len(drawn) == len(set(drawn)) == 12 and house.make("primary", "SEEDS=0")[:2] == (0, [])
    calls = house.make("simsiam-predictor", "SEEDS=0")[1]  # the rest of a study
    assert runs(calls) == ["frozen-predictor/0"] and calls[-2].startswith("simsiam/plot.py simsiam-predictor ")


def test_another_matrix_is_another_run(house):
    study, count = "bsa-alignment-loss", 4
    trained = []
    for data in ("a.npy", "a.npy", "b.npy"):
        code, calls, _ = house.make(study, "SEEDS=0", f"DATA={data}")
        trained.append(sum(f"--data {data} --replace" in call for call in calls))
        assert code == 0 and all(f"DATA={data}" in call.split("--reproduce")[1] for call in calls if "plot.py" in call)
    assert trained == [count, 0, count]
    calls = house.make(study, "SEEDS=0", "DATA=elsewhere")[1]  # a place, not another study: but the matrix's runs go
    assert sum("--data elsewhere" in call and "train.py" in call for call in calls) == count
    for name, value, paper in (("PAIRS", "vgg13-vgg8", "cocord"), ("TASKS", "2x2", "seqvcr")):
        drawn = [call for call in house.make(paper, "SEEDS=0", f"{name}={value}")[1] if "plot.py" in call]
        assert drawn and all(f"{name}={value}" in call and f"--{name.lower()} {value}" in call for call in drawn)


def test_demo_is_primary_with_one_seed_on_the_cpu(house):
    code, calls, _ = house.make("demo")
    assert code == 0 and len(runs(calls)) == 5 and all("--device cpu" in call for call in calls if "train.py" in call)
    assert {run.split("/")[1] for run in runs(calls)} == {"0"}
    drawn = [call.split()[1] for call in calls if call.split()[0].endswith("plot.py")]
    assert len(drawn) == len(set(drawn)) == 12 and "--results runs/demo/report " in calls[-1]
    first = next(place for place, call in enumerate(calls) if "plot.py" in call)
    assert not any("train.py" in call and not call.startswith("simsiam/") for call in calls[:first])


def test_a_demo_of_other_seeds_or_on_another_device(house):
    calls = house.make("demo", "PAPERS=bsa", "SEEDS=3 4", "DEVICE=cuda:1")[1]
    trained = [call for call in calls if "train.py" in call]
    assert len(trained) == 6 and all("--device cuda:1" in call for call in trained)
    assert {call.split("--seed ")[1].split()[0] for call in trained} == {"3", "4"}


def test_robustness_and_curves_are_extras_of_three_seeds(house):
    code, calls, printed = house.make("robustness", "PAPERS=bsa cocord", "-j2")
    assert code == 0, printed
    tripled = [call for call in calls if "train.py" in call and "--lr-factor 3" in call]
    assert len(tripled) == 3 * (3 + 6) and all("@triple/" in call for call in tripled)
    assert {call.split("--seed ")[1].split()[0] for call in tripled} == {"0", "1", "2"}
    drawn = [call for call in calls if "plot.py" in call]
    assert {call.split()[1] for call in drawn} == {"bsa-robustness", "cocord-robustness"}
    page = next(call for call in calls if "study.page" in call)
    assert page.split(" --extras ")[1].split()[:2] == ["bsa-robustness", "cocord-robustness"]
    for place, call in enumerate(calls):  # at another rate the teacher is the same, and there first
        if "cocord/train.py" in call and "@third" in call and "--weights" in call:
            weights = Path(call.split("--weights ")[1].split()[0])
            assert any(f"--out {weights.parent} " in one for one in calls[:place])
    assert house.make("robustness", "PAPERS=bsa cocord")[:2] == (0, [])
    code, calls, _ = house.make("curves", "PAPERS=bsa", "SEEDS=0")
    assert code == 0 and len([call for call in calls if "train.py" in call]) == 4  # base and no-alignment are there


ONE_EDIT = """            study(
                "simsiam-head",
                "Is a projector without a predictor worth anything?",
                ["no-predictor:no-projector"],
                must_beat=[beats_untrained("no-projector")],
            ),
"""


def test_a_study_is_one_edit(house):
    place = '            study("simsiam-projector"'
    house.edit(place, ONE_EDIT + place)
    code, calls, _ = house.make("simsiam-head", "SEEDS=0")
    assert code == 0 and runs(calls) == ["no-projector/0", "no-predictor/0"]
    assert "simsiam/plot.py simsiam-head " in " ".join(calls) and " simsiam-head " in calls[-1]
    code, calls, _ = house.make("all", "PAPERS=simsiam", "SEEDS=0")
    assert code == 0 and len(runs(calls)) == 7
    assert "simsiam-head: Is a projector without a predictor worth anything?" in house.make()[2]


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
