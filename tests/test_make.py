"""Behaviour of make with a fake python whose runs take milliseconds: order, up-to-date checks, changes, failures."""

import ast
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from common.study import rules
from common.study.design import load
from common.study.request import Request

PAPERS = ("simsiam", "conmim", "cocord", "bsa", "seqvcr")
FAKE = f"""#!{sys.executable} -IS
# Replaces python: appends each call to calls.txt and writes the files that the real script would write.
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
    if str(out) == os.environ.get("KILL"):
        os.kill(os.getpid(), 9)
    if str(out) == os.environ.get("HANG"):
        (out / "state.pt").write_text("half-way")
        time.sleep(60)
    if os.environ.get("RANK", "0") == "0":
        (out / "model.pt").write_text(repr(words))
    if gpu:  # fails if more runs share a GPU than it has slots
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


class RepoCopy:
    """A copy of the Makefile, common/ and the papers' designs in a temporary folder, with the fake python."""

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
        """Run make. Return its exit code, the calls of the fake python, and the output."""
        process = self.start(*words, **environment)
        printed = process.communicate()[0]
        return process.returncode, self.calls(), printed

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        """Start make in a new session, so that a signal can be sent to all its processes."""
        (self.folder / "calls.txt").write_text("")
        command = ["make", "PYTHON=./fake-python", "SCALE=demo", *words]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

        def enable_interrupts() -> None:  # background jobs of a shell ignore SIGINT
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, cwd=self.folder, env=clean | environment, start_new_session=True, preexec_fn=enable_interrupts,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return (self.folder / "calls.txt").read_text().splitlines()

    def edit(self, old: str, new: str, paper: str = "simsiam") -> None:
        """Replace text in studies.py. Deletes __pycache__, which misses edits of equal length within a second."""
        path = self.folder / paper / "studies.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "a copy with späces"
    folder.mkdir()
    return RepoCopy(folder)


def runs(calls: list[str], script: str = "train") -> list[str]:
    """Return arm/seed of every call of a SimSiam script, in order."""
    names = []
    for call in calls:
        if call.startswith(f"simsiam/{script}.py"):
            words = call.split()
            folder = Path(words[words.index("--out") + 1] if script == "train" else words[1])
            names.append("/".join(folder.parts[-2:]))
    return names


def test_a_study_runs_seed_by_seed_and_then_is_up_to_date(repo):
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0 1")
    arms = ["base", "no-predictor", "frozen-predictor"]
    assert code == 0 and runs(calls) == runs(calls, "eval") == [f"{arm}/{seed}" for seed in (0, 1) for arm in arms]
    drawn = [index for index, call in enumerate(calls) if "plot.py" in call]
    assert len(drawn) == 2 and calls[-1].startswith("-m common.study.page")
    assert drawn[0] < next(index for index, call in enumerate(calls) if "base/1" in call)
    assert repo.make("simsiam-predictor", "SEEDS=0 1")[:2] == (0, [])
    (repo.folder / "common/study/statistics.py").touch()  # the analysis has changed, the runs have not
    assert [call.split()[0] for call in repo.make("simsiam-predictor", "SEEDS=0 1")[1]] == ["simsiam/plot.py", "-m"]
    assert runs(repo.make("simsiam-predictor", "SEEDS=0 1 2")[1]) == [f"{arm}/2" for arm in arms]


@pytest.mark.slow
def test_other_seeds_redraw_the_study_without_new_runs(repo):
    repo.make("simsiam-predictor", "SEEDS=0 1 2")
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0 1")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and "--seeds 0 1 --reproduce" in calls[-2]
    repo.edit(" " * 16 + '"frozen-predictor:base",\n', "")
    _, calls, _ = repo.make("simsiam-predictor", "SEEDS=0 1")
    assert runs(calls) == runs(calls, "eval") == [] and calls[0].startswith("simsiam/plot.py simsiam-predictor ")


def test_two_studies_in_one_command_share_their_runs(repo):
    code, calls, _ = repo.make("simsiam-predictor", "simsiam-stop-gradient", "SEEDS=0", "-j2")
    assert code == 0 and sorted(runs(calls)) == sorted(set(runs(calls))) and len(runs(calls)) == 4


def test_the_flags_of_an_arm_win_over_extra():
    """Otherwise EXTRA would turn an arm into another one, for example "no pre-training" into base."""
    request = Request.parse(["PAPERS=conmim", "SCALE=demo", "EXTRA=--epochs 3"])
    design = request.designs["conmim"]
    flags = {name: request.flags(design, design.arm(name)) for name in ("base", "no-pretraining")}
    assert flags == {"base": ["--epochs", "3"], "no-pretraining": ["--epochs", "3", "--epochs", "0"]}


def test_extra_that_every_arm_overrides_is_refused(repo):
    """Only in the paper that sets it: SimSiam has a --size, too."""
    code, calls, printed = repo.make("seqvcr-projection-width", "SEEDS=0", "EXTRA=--size 3")
    assert code == 2 and "error: invalid EXTRA: every arm of seqvcr sets its own --size: remove it" in printed
    assert not any("train.py" in call for call in calls)
    repo.make("seqvcr-projection-width", "SEEDS=0")
    assert repo.make("seqvcr-projection-width", "SEEDS=0", "EXTRA=--size 3")[0] == 2  # also if the runs are finished
    calls = repo.make("simsiam-predictor", "SEEDS=0", "EXTRA=--size 24")[1]
    assert runs(calls) == ["base/0", "no-predictor/0", "frozen-predictor/0"]


@pytest.mark.slow
def test_making_one_study_does_not_touch_the_others(repo):
    """This also holds if another study has changed flags, a deleted run or other seeds, or if DATA differs."""
    repo.make("simsiam", "SEEDS=0 1")
    shutil.rmtree(repo.folder / "runs/demo/simsiam/narrow")
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["base/0", "no-predictor/0", "frozen-predictor/0"]
    assert [call.split()[1] for call in calls[6:]] == ["simsiam-predictor", "common.study.page"]
    repo.edit('"--loss asymmetric-2x"', '"--loss asymmetric-2x --lr 1"')
    (repo.folder / "a.npy").write_text("a matrix")
    code, calls, _ = repo.make("bsa-distance", "SEEDS=0", "DATA=a.npy", "-j2")
    assert code == 0 and not runs(calls) and sum("train.py" in call for call in calls) == 5
    assert [call.split()[1] for call in calls[-2:]] == ["bsa-distance", "common.study.page"]


@pytest.mark.parametrize("data", ["vec.csv", "vec.txt", "vec", "missing.parquet", "missing.npy"])
def test_data_that_would_be_ignored_are_refused_before_any_run(data, repo):
    if "missing" not in data:
        (repo.folder / data).write_text("1,2")
    code, calls, printed = repo.make("bsa-distance", "SEEDS=0", f"DATA={data}")
    assert code == 2 and not calls and f"invalid DATA={data}" in printed


def test_resuming_elsewhere_is_a_variable_and_not_part_of_the_flags(repo):
    goal = ["simsiam-predictor", "SEEDS=0"]
    code, calls, _ = repo.make(*goal, "RESUME=elsewhere")
    assert code == 0 and all("--replace --resume-elsewhere" in call for call in calls if "train.py" in call)
    assert not runs(repo.make(*goal)[1])  # the runs are those of the plain command
    assert "invalid RESUME=here" in repo.make(*goal, "RESUME=here")[2]
    assert "set RESUME=elsewhere instead" in repo.make(*goal, "EXTRA=--resume-elsewhere")[2]


@pytest.mark.slow
def test_the_report_shows_the_seeds_of_the_last_command(repo):
    """A figure is redrawn if it shows other seeds, not only if a run is newer."""
    for seeds in ("0", "1", "0"):
        drawn = [call for call in repo.make("simsiam-predictor", f"SEEDS={seeds}")[1] if "plot.py" in call]
        assert len(drawn) == 1 and f"--seeds {seeds} --" in drawn[0]
    (repo.folder / "runs/demo/report/simsiam-predictor.json").unlink()
    assert len(repo.make("simsiam-predictor", "SEEDS=0")[1]) == 2  # redraws the study and the page
    assert repo.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    repo.make("primary", "PAPERS=simsiam", "SEEDS=0")
    assert repo.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


def test_studies_py_may_print_and_warn(repo):
    repo.edit("LEAKS = ", 'print("a note")\nimport warnings; warnings.warn("careful")\nLEAKS = ')
    code, calls, printed = repo.make("simsiam-stop-gradient", "SEEDS=0")
    assert code == 0 and len(runs(calls)) == 2 and "a note" in printed


def test_a_rehearsal_with_invalid_variables_deletes_nothing(repo):
    (repo.folder / "runs/rehearsal/demo").mkdir(parents=True)
    (repo.folder / "runs/gpu").mkdir()
    for words in (["SCALE=../gpu"], ["SCALE="], ["PAPERS=simclr"]):
        assert repo.make("rehearsal", *words)[0] == 2
    assert (repo.folder / "runs/rehearsal/demo").exists() and (repo.folder / "runs/gpu").exists()


@pytest.mark.slow
def test_teachers_are_trained_in_parallel(repo):
    code, calls, printed = repo.make("cocord-teachers", "-j4", "GPUS=0 1 2 3")
    assert code == 0 and len({call.split("gpu=")[1] for call in calls}) > 1, printed


def test_a_parallel_make_runs_everything_once_and_seed_by_seed(repo):
    code, calls, _ = repo.make("simsiam", "SEEDS=0 1", "-j4")
    assert code == 0 and len(runs(calls)) == len(set(runs(calls))) == 18
    second = next(index for index, call in enumerate(calls) if "--seed 1" in call)
    assert (
        sum("eval.py" in call for call in calls[:second]) == 9
        and sum("plot.py" in call for call in calls[:second]) == 4
    )
    assert repo.make("simsiam", "SEEDS=0 1", "-j4")[:2] == (0, [])


def test_a_changed_arm_is_rerun_and_changed_extra_reruns_all_arms(repo):
    repo.make("simsiam-predictor", "SEEDS=0")
    repo.edit('"--predictor frozen"', '"--predictor frozen --lr 1"')
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["frozen-predictor/0"]
    assert "--predictor frozen --lr 1" in calls[0] and "--replace" in calls[0]
    assert repo.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    assert len(runs(repo.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")[1])) == 3
    assert repo.make("simsiam-predictor", "SEEDS=0", "EXTRA=--epochs 3")[:2] == (0, [])


def test_a_run_without_metrics_is_evaluated_again_and_nothing_else_runs(repo):
    repo.make("simsiam-predictor", "SEEDS=0")
    (repo.folder / "runs/demo/simsiam/base/0/metrics.json").unlink()
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == [] and runs(calls, "eval") == ["base/0"]


def test_after_a_failed_run_make_exits_nonzero_and_still_draws_the_page_and_k_continues(repo):
    broken = {"BREAK": "runs/demo/simsiam/base/0"}
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0", **broken)
    assert code != 0 and runs(calls) == ["base/0"] and calls[-1].startswith("-m common.study.page")
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0", "-k", **broken)
    assert code != 0 and runs(calls) == ["base/0", "no-predictor/0", "frozen-predictor/0"]
    assert not (repo.folder / "runs/demo/simsiam/base/0/flags").exists()
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0")
    assert code == 0 and runs(calls) == ["base/0"]


def test_a_killed_run_leaves_a_reason(repo):
    folder = repo.folder / "runs/demo/simsiam/base/0"
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0", KILL="runs/demo/simsiam/base/0")
    assert code != 0 and runs(calls) == ["base/0"]
    assert (folder / "failure.txt").read_text() == "killed by signal 9 (9: often too little memory)\n"
    repo.make("simsiam-predictor", "SEEDS=1", BREAK="runs/demo/simsiam/base/1")  # it printed its own reason
    assert not (repo.folder / "runs/demo/simsiam/base/1/failure.txt").exists()


def test_a_dry_run_lists_exactly_what_would_run(repo):
    code, calls, printed = repo.make("simsiam-predictor", "SEEDS=0", "-n")
    assert code == 0 and calls == [] and printed.count("simsiam/train.py") == 3
    repo.make("simsiam-predictor", "SEEDS=0")
    _, calls, printed = repo.make("simsiam-predictor", "SEEDS=0", "-n")
    assert calls == [] and "train.py" not in printed and "eval.py" not in printed
    assert repo.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])


@pytest.mark.slow
def test_only_publish_writes_to_results(repo):
    for words in (["simsiam-predictor", "SEEDS=0"], ["report"], ["primary", "PAPERS=bsa"], ["rehearsal", "PAPERS=bsa"]):
        _, calls, _ = repo.make(*words)
        drawn = [call for call in calls if "plot.py" in call or "study.page" in call]
        assert drawn and all("--results runs/" in call for call in drawn)
    assert not (repo.folder / "results").exists()
    calls = repo.make("publish", "simsiam-predictor", "bsa-distance")[1]  # here study names are not goals
    assert len(calls) == 1 and calls[0].startswith("-m common.study.publish PAPERS=")
    assert calls[0].endswith(" simsiam-predictor bsa-distance")


def commands(*words: str) -> dict[str, list[str]]:
    """Return run ("paper/arm/seed") -> words of its training command, from the generated rules."""
    text = rules.rules_text(Request.parse(["RUNS=no-runs", *words]))
    lines = re.findall(r"^no-runs/(\S+)/model\.pt: .*\n\t\$\(run\) (.*) \|\| sh .*$", text, re.MULTILINE)
    return {run: shlex.split(command) for run, command in lines}


def test_students_are_evaluated_and_teachers_are_not():
    text = rules.rules_text(Request.parse(["RUNS=no-runs", "PAPERS=cocord", "SCALE=demo"]))
    evaluated = set(re.findall(r"^no-runs/cocord/(\S+)/\d+/metrics\.json: ", text, re.MULTILINE))
    assert "base@vgg_s64-vgg_s" in evaluated and not any(arm.startswith("teacher@") for arm in evaluated)


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1
    return command[command.index(flag) + 1]


def seeds_by_arm(*words: str) -> dict[str, list[int]]:
    """Return arm -> seeds for which the generated rules have a run of SimSiam."""
    result: dict[str, list[int]] = {}
    for run in commands("PAPERS=simsiam", *words):
        _, arm, seed = run.split("/")
        result.setdefault(arm, []).append(int(seed))
    return result


def test_primary_arms_have_ten_seeds_and_others_five_at_demo_scale():
    demo, gpu, paper = (seeds_by_arm(f"SCALE={scale}") for scale in ("demo", "gpu", "paper"))
    for arm in ("base", "no-predictor", "no-stop-gradient", "base-again"):
        assert sorted(demo[arm]) == list(range(10, 20))
    for arm in ("narrow", "projector-bn", "no-predictor@third"):
        assert sorted(demo[arm]) == list(range(10, 15))
    assert all(sorted(seeds) == list(range(5)) for seeds in [*gpu.values(), *paper.values()])
    assert {tuple(seeds) for seeds in seeds_by_arm("SCALE=demo", "SEEDS=3 4").values()} == {(3, 4)}
    for scale, first in (("demo", 10), ("gpu", 0)):
        assert {tuple(seeds) for seeds in seeds_by_arm(f"SCALE={scale}", "SEEDS=first").values()} == {(first,)}


def test_the_targets_of_a_seed_need_only_the_arms_that_run_it():
    text = rules.rules_text(Request.parse(["RUNS=no-runs", "PAPERS=simsiam", "SCALE=demo"]))

    def needed(goal: str) -> set[str]:
        pattern = rf"^ifneq \(\$\(filter {goal},\$\(MAKECMDGOALS\)\),\)\n\S+: (.*)$"
        (metrics,) = re.findall(pattern, text, re.MULTILINE)
        return {"/".join(Path(path).parts[2:4]) for path in metrics.split()}

    assert needed("simsiam-projector@14") == {f"{a}/14" for a in ("base", "no-projector", "projector-bn", "narrow")}
    assert needed("simsiam-projector@15") == needed("simsiam-projector-primary@15") == {"base/15", "no-projector/15"}
    plots = [line for line in text.splitlines() if "simsiam/plot.py simsiam-projector " in line]
    assert plots and not any("--seeds" in line for line in plots)  # plot.py takes the declared seeds of every arm
    given = rules.rules_text(Request.parse(["RUNS=no-runs", "PAPERS=simsiam", "SCALE=demo", "SEEDS=3 4"]))
    assert "--seeds 3 4 --reproduce" in given


def test_at_demo_scale_a_seed_draws_the_data_too(tmp_path):
    """At other scales, and if EXTRA or DATA selects the data, all seeds have data seed 0."""
    demo = commands("PAPERS=simsiam bsa", "SCALE=demo")
    assert len(demo) > 100
    for run, command in demo.items():
        assert value(command, "--seed") == value(command, "--data-seed") == run.split("/")[-1]
    (tmp_path / "m.npy").write_text("a matrix")
    given = [["SCALE=gpu"], ["SCALE=paper"]]
    given += [["SCALE=demo", f"EXTRA={extra}"] for extra in ("--data-set cifar10", "--epochs 3 --data-set=folder")]
    for words in [*given, ["SCALE=demo", f"DATA={tmp_path / 'm.npy'}"]]:
        for run, command in commands("PAPERS=bsa", *words).items():
            assert (value(command, "--seed"), value(command, "--data-seed")) == (run.split("/")[-1], "0")
    other = commands("PAPERS=bsa", "SCALE=demo", "EXTRA=--epochs 3", "DATA=a-folder", "SEEDS=7")
    assert {value(command, "--data-seed") for command in other.values()} == {"7"}


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        (["SCALE=demo"], list(range(10, 20))),
        (["SCALE=demo", "SEEDS=3 4"], [3, 4]),
        (["SCALE=demo", "SEEDS=first"], [10]),
        (["SCALE=demo", "EXTRA=--data-set cifar100"], [0]),
        (["SCALE=gpu"], [0]),
        (["SCALE=gpu", "SEEDS=3 4"], [0]),
    ],
)
def test_a_teacher_is_trained_once_per_block_and_the_students_of_the_block_load_it(words, blocks):
    runs = commands("PAPERS=cocord", *words)
    teachers: dict[str, list[int]] = {}
    for run, command in runs.items():
        _, arm, seed = run.split("/")
        if arm.startswith("teacher@"):
            assert command[0] == "cocord/teacher.py" and value(command, "--seed") == value(command, "--data-seed")
            teachers.setdefault(arm, []).append(int(seed))
    assert len(teachers) >= 3 and all(sorted(seeds) == blocks for seeds in teachers.values())
    students = {run: command for run, command in runs.items() if "--weights" in command}
    assert len(students) > 10
    for run, command in students.items():
        block = run.split("/")[-1] if blocks != [0] else "0"
        assert value(command, "--data-seed") == block
        setting = "@few" if "@few/" in run else ""  # these students and their teachers see other images
        teacher = f"no-runs/cocord/teacher@{value(command, '--teacher')}{setting}/{block}/model.pt"
        assert value(command, "--weights") == teacher and teacher.removesuffix("/model.pt")[8:] in runs


@pytest.mark.parametrize("paper", PAPERS)
def test_the_scripts_accept_the_generated_commands(paper):
    """The arm base-again has the data of its block, and other initial weights and order."""
    runs = commands(f"PAPERS={paper}", "SCALE=demo")
    base = load(paper, "demo").base
    again = load(paper, "demo").study(f"{paper}-base-again").pairs[0][0]
    names = [f"{paper}/{arm}/12" for arm in (base, again)] + [run for run in runs if "teacher@" in run][:1]
    for name in names:
        script, *flags = runs[name]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = module.parse_args(flags)
        seed = int(name.split("/")[-1])
        assert args.data_seed == seed and args.seed == (seed + 1000 if again in name else seed)


def test_calibration_runs_equal_arms_and_draws_them(repo):
    code, calls, printed = repo.make("calibration", "PAPERS=bsa cocord", "SEEDS=12")
    assert code == 0, printed
    trained = [call for call in calls if "/train.py" in call]
    # base and base-again of each paper; CoCoRD's distillation, and its baseline without a teacher
    assert len(trained) == 6
    offset = [call for call in trained if "--seed 12 --data-seed 12 " in call and call.endswith("--seed-offset 1000")]
    assert len(offset) == 2
    drawn = {call.split()[1] for call in calls if "plot.py" in call}
    assert drawn == {"bsa-base-again", "cocord-base-again", "cocord-calibration"}
    assert repo.make("calibration", "PAPERS=bsa cocord", "SEEDS=12")[:2] == (0, [])


def test_the_generated_rules_are_a_readable_file(repo):
    """The file has two rules per run and one per study and seed, with the exact commands. make -n prints its path."""
    _, _, printed = repo.make("simsiam-predictor", "SEEDS=0", "-n")
    path = next(line.removeprefix("rules: ") for line in printed.splitlines() if line.startswith("rules: "))
    assert path.startswith("runs/demo/rules-") and path.endswith(".mk")
    text = (repo.folder / path).read_text()
    run = "runs/demo/simsiam/frozen-predictor/0"
    assert f"{run}/model.pt: | $(venv)\n\t$(run) simsiam/train.py --scale demo --out {run} --seed 0 " in text
    assert f"{run}/metrics.json: {run}/model.pt\n\t$(run) simsiam/eval.py {run} " in text
    assert "\nruns/demo/report/.drawn/simsiam-predictor: " in text and "simsiam-predictor@1" not in text
    assert repo.make("simsiam-predictor", "SEEDS=0", "-n")[2].count("rules: ") == 1  # sub-makes do not print it again
    assert "rules: " not in repo.make("simsiam-predictor", "SEEDS=0")[2]
    assert len(list(repo.folder.glob("runs/demo/rules-*.mk"))) == 1  # shared by all makes with these variables


def test_a_single_file_can_be_a_goal(repo):
    code, calls, _ = repo.make("runs/demo/simsiam/no-predictor/13/metrics.json")
    assert code == 0 and runs(calls) == runs(calls, "eval") == ["no-predictor/13"]
    (repo.folder / "runs/demo/simsiam/no-predictor/13/metrics.json").unlink()
    code, calls, _ = repo.make("runs/demo/simsiam/no-predictor/13/metrics.json")
    assert runs(calls) == [] and runs(calls, "eval") == ["no-predictor/13"]
    code, calls, printed = repo.make("runs/demo/simsiam/narrow/15/metrics.json")  # a secondary arm: seeds 10 to 14
    assert code == 2 and not calls and "No rule to make target" in printed


def test_folder_names_may_contain_spaces_and_special_characters(repo):
    folders = ["RUNS=my runs/a#1", "RESULTS=my $results", "DATA=my data"]
    words = ["simsiam-stop-gradient", "SEEDS=0", *folders, "SCALE=gpu", "DEVICE=cpu"]
    code, calls, printed = repo.make(*words)
    assert code == 0, printed
    assert calls[1] == "-m common.images cifar10 --data my data" and calls[2].endswith("--data my data --replace")
    assert (repo.folder / "my runs/a#1/simsiam/base/0/metrics.json").exists()
    assert (repo.folder / "my $results/index.html").exists()
    assert repo.make(*words)[:2] == (0, [])


@pytest.mark.parametrize("extra", ['--note "it\'s $HOME #1"', "--note 'a $(shell echo b) % c'", "--note a\\ b"])
def test_extra_reaches_the_script_as_a_shell_would_pass_it(extra, repo):
    """Quotes, $ and # survive both makes. The file flags of a run is compared without changes."""
    words = ["runs/demo/simsiam/base/10/model.pt", f"EXTRA={extra}"]
    code, calls, printed = repo.make("simsiam-stop-gradient", "SEEDS=10", words[1])
    assert code == 0 and len(runs(calls)) == 2, printed
    saved = ast.literal_eval((repo.folder / "runs/demo/simsiam/base/10/model.pt").read_text())
    assert saved[-2:] == shlex.split(extra)
    assert repo.make("simsiam-stop-gradient", "SEEDS=10", words[1])[:2] == (0, [])
    assert runs(repo.make(words[0])[1]) == ["base/10"]
    code, calls, _ = repo.make("cost", "PAPERS=simsiam", words[1])  # rehearses in a third make
    saved = ast.literal_eval((repo.folder / "runs/rehearsal/demo/simsiam/base/10/model.pt").read_text())
    assert code == 0 and saved[-4:] == ["--rehearse", "20", *shlex.split(extra)]


def launcher(repo: RepoCopy, name: str, script: str) -> None:
    (repo.folder / name).write_text(f'#!/bin/sh\necho "$@" >> launched.txt\n{script}\n')
    (repo.folder / name).chmod(0o755)


def test_launch_is_a_prefix_and_not_part_of_the_flags(repo):
    """Uses fake srun and torchrun scripts. torchrun needs --no-python, otherwise it starts python itself."""
    launcher(repo, "srun", 'shift; exec "$@"')
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0", "LAUNCH=./srun --gres=gpu:1")
    launched = (repo.folder / "launched.txt").read_text().splitlines()
    assert code == 0 and len(runs(calls)) == 3 and len(launched) == 6
    assert all(line.startswith("--gres=gpu:1 ./fake-python simsiam/") for line in launched)
    assert repo.make("simsiam-predictor", "SEEDS=0")[:2] == (0, [])
    launcher(repo, "torchrun", '[ "$1" = --no-python ] && shift 3 && RANK=0 "$@" && RANK=1 exec "$@"')
    launch = "LAUNCH=./torchrun --no-python --standalone --nproc-per-node=2"
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=1", launch)
    assert code == 0 and len(runs(calls)) == len(runs(calls, "eval")) == 6
    assert repo.make("simsiam-predictor", "SEEDS=1")[:2] == (0, [])


def test_each_run_takes_a_free_gpu(repo):
    code, calls, printed = repo.make("simsiam", "SEEDS=0", "-j4", "GPUS=3 5")
    trained = [call for call in calls if "train.py" in call]
    assert code == 0 and len(trained) == 9, printed
    assert {call.split("gpu=")[1] for call in trained} == {"3 shared=1", "5 shared=1"}
    assert all("gpu=" in call for call in calls if "eval.py" in call)
    assert not any("gpu=" in call for call in calls if "plot.py" in call)


def test_a_gpu_listed_twice_runs_two_runs_that_know_they_share_it(repo):
    code, calls, printed = repo.make("simsiam-predictor", "SEEDS=0 1", "-j4", "GPUS=0 0", "LAUNCH=env")
    trained = [call for call in calls if "train.py" in call]
    assert code == 0 and len(trained) == 6 and all("gpu=0 shared=2" in call for call in trained), printed


def test_after_an_interrupt_a_parallel_make_repeats_nothing(repo):
    hung = "runs/demo/simsiam/frozen-predictor/0"
    process = repo.start("simsiam-predictor", "SEEDS=0 1", HANG=hung)
    limit = time.monotonic() + 30
    while not (repo.folder / hung / "state.pt").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches make and its children
    process.communicate()
    assert process.returncode != 0 and runs(repo.calls()) == ["base/0", "no-predictor/0", "frozen-predictor/0"]
    assert not (repo.folder / hung / "model.pt").exists() and not (repo.folder / hung / "flags").exists()
    code, calls, _ = repo.make("simsiam-predictor", "SEEDS=0 1", "-j4")
    rest = ["base/1", "frozen-predictor/0", "frozen-predictor/1", "no-predictor/1"]
    assert code == 0 and sorted(runs(calls)) == rest
    assert set(rest) <= set(runs(calls, "eval")) <= {*rest, "base/0", "no-predictor/0"}
    assert (repo.folder / hung / "state.pt").read_text() == "half-way"  # needed to resume the run
    assert repo.make("simsiam-predictor", "SEEDS=0 1", "-j4")[:2] == (0, [])


@pytest.mark.slow
def test_report_draws_unfinished_studies_and_runs_nothing(repo):
    repo.make("simsiam-predictor", "SEEDS=0")
    code, calls, _ = repo.make("report", "SEEDS=0 1 2")
    assert code == 0 and runs(calls) == runs(calls, "eval") == [] and calls[-1].startswith("-m common.study.page")
    drawn = [call.split()[1] for call in calls[:-1] if "plot.py" in call and "--seeds 0 1 2" in call]
    assert len(set(drawn)) == len(drawn) == len(calls) - 1 == 12
    calls = repo.make("simsiam-predictor", "SEEDS=0")[1]  # the report shows other seeds, so it is redrawn
    assert [call.split()[0] for call in calls] == ["simsiam/plot.py", "-m"] and "--seeds 0 --" in calls[0]
    repo.make("runs/demo/simsiam/leak-0.1/10/model.pt")  # an extra is drawn if it has a run that no main study shares
    assert [call.split()[1] for call in repo.make("report")[1]][12:] == ["simsiam-gradient-leak", "common.study.page"]
    (repo.folder / "runs/demo/report/conmim-calibration.json").write_text("{}")  # its arms are shared
    assert "conmim-calibration" in [call.split()[1] for call in repo.make("report")[1]]


def test_if_drawing_a_study_fails_the_others_and_the_page_are_drawn(repo):
    code, calls, _ = repo.make("report", BREAK_PLOT="simsiam-predictor")
    drawn = [call.split()[1] for call in calls if "plot.py" in call]
    assert code != 0 and len(drawn) == 12 and calls[-1].startswith("-m common.study.page")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seqvcr TASKS=9x9", "*** invalid TASKS='9x9': give 2x2,"),
        ("cocord PAIRS=vgg13", "invalid PAIRS='vgg13': give TEACHER-STUDENT"),
        ("simsiam PAPERS=simclr", "invalid PAPERS: no paper 'simclr'"),
        ("simsiam SCALE=small", "invalid SCALE=small: give demo, gpu or paper"),
        ("simsiam SEEDS=", "SEEDS is empty"),
        ("simsiam SEEDS=1,2", "invalid SEEDS=1,2: give integers"),
        ("simsiam EXTRA='", "No closing quotation"),
        ("demo SCALE=gpu", "make demo has SCALE=demo"),
        ("simsiam SEED=1", "unknown variable SEED:"),
        ("simsiam simsiam-predictor=no-predictor:base", "unknown variable simsiam-predictor:"),
        ("simsiam-preditor", "unknown target simsiam-preditor"),
        ("simsiam-predictor simsiam-preditor", "unknown target simsiam-preditor"),
        ("simsiam-predictor publish", "write publish first"),
        ("publish PAPERS=bsa", "make publish takes no PAPERS"),
        ("page RUNS=x", "make page shows results/demo: remove PAPERS"),
        ("simsiam SEEDS=0\\ 00", "give each seed once"),
        ("simsiam EXTRA=--seed=7", "set SEEDS instead of --seed"),
        ("simsiam EXTRA=--data-seed=3", "set SEEDS instead of --data-seed"),
        ("simsiam EXTRA=--data-seed\\ 3", "set SEEDS instead of --data-seed"),
        ("simsiam RUNS=a=b", "give a path without ="),
        ("simsiam-predictor@9", "No rule to make target 'simsiam-predictor@9'"),
    ],
)
def test_an_invalid_goal_or_variable_fails_before_anything_runs(repo, words, message):
    code, calls, printed = repo.make(*shlex.split(words) if "\\" in words else words.split())
    assert code == 2 and calls == [] and message in printed
    assert printed.count("***") == 1 and "Traceback" not in printed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arms=[*arms, *", 'arms=[Arm("base"), *arms, *', "arm 'base' is declared twice"),
        ('"no-stop-gradient:base"', '"no-stop-gradeint:base"', "arm 'no-stop-gradeint' is not declared"),
        ('"no-stop-gradient:base"', '"no-stop-gradient:bse"', "arm 'bse' is not declared"),
        ('"frozen-predictor:base"],', '"frozen-predictor:"],', "invalid contrast 'frozen-predictor:'"),
        ('"--predictor frozen"', '"--predictor none"', "'no-predictor' and 'frozen-predictor' have the same flags"),
        ('metric="knn_accuracy"', 'metric="kNN"', "metric 'kNN' is not declared"),
        ('"untrained", "knn_accuracy"', '"untrained", "knn"', "metric 'knn' is not declared"),
        ('beats_untrained("base")', 'beats_untrained("basis")', "arm 'basis' is not declared"),
        ('"%", 1, "higher")', '"%", 1, "hihger")', "metric 'linear_accuracy': set better to"),
        ('"kNN accuracy", "%", 1, "higher"', '"kNN accuracy", "%"', "metric 'knn_accuracy' must declare better="),
        ('"gradient_leak"', '"gradient_leek"', "no arm has --gradient-leek: add it to the flags"),
        ('["knn_accuracy", "std_ratio"]', '["knn_accuracy", "std"]', "metric 'std' is not declared"),
        ('"simsiam-projector"', '"simsiam-predictor"', "study 'simsiam-predictor' is declared twice"),
        ('"simsiam-projector"', '"projector"', "invalid study name 'projector': start with 'simsiam-'"),
        ('"SimSiam",', '"SimSiam"', "SyntaxError: "),
        (
            '="untrained_knn_accuracy")',
            '="untrained_knn_acuracy")',
            "baseline metric 'untrained_knn_acuracy' is not declared",
        ),
        (
            'must_beat=[beats_untrained("base")]',
            "must_beat=[]",
            "contrast no-stop-gradient:base has no baseline: add MustBeat(",
        ),
        ("n_other=10,", "seeds=(1, 1),", "seeds are distinct non-negative integers"),
        ('"projector-bn": ', '"projector=bn": ', "invalid arm name 'projector=bn'"),
        ('expected={"no-bn"', 'expected={"no-bm"', "expected must name the arms of the primary contrasts"),
        ('"hidden-bn": "no difference"', '"hidden-bn": "equal"', "invalid expected 'equal': give one of no difference"),
        ('["knn_accuracy", "linear_accuracy",', '["linear_accuracy",', "add its primary metric 'knn_accuracy' to"),
        ("LEAKS)", "LEAK)", "NameError: name 'LEAK' is not defined"),
    ],
)
def test_an_invalid_design_fails_with_one_sentence_before_anything_runs(old, new, message, repo):
    """Unchecked, a misspelt arm could silently run `base` again, and the study would find no difference."""
    repo.edit(old, new)
    for goal in ("simsiam-predictor", "bsa", "help", "demo", "rehearsal", "cost"):
        code, calls, printed = repo.make(goal, "SEEDS=0")
        assert code == 2 and message in printed and "Traceback" not in printed and "simsiam/studies.py" in printed
        assert not [call for call in calls if "common.study.cost" not in call]
    code, calls, _ = repo.make("doctor")
    assert code == 0 and calls == ["-m common.doctor --data data"]
    assert repo.make("test")[1] == ["-m pytest -m not slow"]
    assert repo.make("test-all")[1] == ["-m pytest"]


def test_an_old_python_is_reported_in_one_sentence_and_doctor_still_works(repo):
    """common/study/__init__.py must parse on old versions, since the other modules do not compile before 3.11."""
    old = 'import sys\nsys.hexversion, sys.version = 0x03080AF0, "3.8.10 (default)"\n'
    path = repo.folder / "common/study/__init__.py"
    path.write_text(path.read_text().replace("import sys\n", old))
    code, calls, printed = repo.make("simsiam")
    assert code == 2 and not calls and printed.count("***") == 1 and "Python 3.8.10 is older than 3.11" in printed
    assert repo.make("doctor")[0] == 0
    ast.parse(path.read_text(), feature_version=(3, 4))


def test_data_are_downloaded_only_if_needed_and_after_the_device_check(repo):
    """The fake machine has no GPU, so nothing is downloaded unless DEVICE=cpu or LAUNCH is given."""
    words = ["simsiam-stop-gradient", "SCALE=gpu", "SEEDS=0"]
    code, calls, _ = repo.make(*words)
    assert code != 0 and [call for call in calls if "plot.py" not in call and "study.page" not in call] == [
        "-m common.devices --device auto --scale gpu"
    ]
    code, calls, _ = repo.make(*words, "LAUNCH=env")
    assert code == 0 and not any("common.devices" in call for call in calls)
    assert calls[0] == "-m common.images cifar10 --data data" and len(runs(calls)) == 2
    shutil.rmtree(repo.folder / "data")
    shutil.rmtree(repo.folder / "runs")
    calls = repo.make(*words, "DEVICE=cpu")[1]
    assert calls[:2] == ["-m common.devices --device cpu --scale gpu", "-m common.images cifar10 --data data"]
    shutil.rmtree(repo.folder / "runs")
    assert not any("common.images" in call for call in repo.make(*words, "DEVICE=cpu")[1])
    calls = repo.make(*words, "DATA=pictures", "EXTRA=--data-set folder")[1]
    assert len(runs(calls)) == 2 and not any("common.images" in call or "common.devices" in call for call in calls)


def test_only_a_changed_arm_is_trained_with_replace(repo):
    """train.py --replace moves the old run aside. Here make calls it, and only for the changed arm."""
    repo.make("simsiam-predictor", "SEEDS=0 1")
    before = {path: path.stat().st_mtime_ns for path in repo.folder.glob("runs/demo/simsiam/*/*/model.pt")}
    repo.edit('"--predictor none"', '"--predictor none --dim 64"')
    assert runs(repo.make("simsiam-predictor", "SEEDS=0 1", "-j2")[1]) == ["no-predictor/0", "no-predictor/1"]
    changed = {path.parts[-3] for path, mtime in before.items() if path.stat().st_mtime_ns != mtime}
    assert changed == {"no-predictor"}


@pytest.mark.slow
def test_a_rehearsal_runs_every_arm_in_a_separate_folder(repo):
    code, calls, printed = repo.make("rehearsal", "PAPERS=simsiam bsa", "EXTRA=--batch 8", "-j2")
    assert code == 0 and len(runs(calls)) == len(runs(calls, "eval")) == 9
    assert all("--rehearse 20 --batch 8" in call for call in calls if "train.py" in call)
    assert not (repo.folder / "runs/demo").exists() and not (repo.folder / "results").exists()
    assert (
        repo.folder / "runs/rehearsal/demo/report/index.html"
    ).exists() and "all, shared arms counted once" in printed
    assert len(runs(repo.make("rehearsal", "PAPERS=simsiam bsa")[1])) == 9  # a rehearsal always runs again
    code, calls, _ = repo.make("rehearsal", "PAPERS=simsiam bsa", "-k", BREAK="runs/rehearsal/demo/simsiam/base/10")
    assert code != 0 and len(runs(calls)) == 9 and calls[-1].startswith("-m common.study.cost")


def test_cost_rehearses_only_arms_without_finished_runs(repo):
    repo.make("simsiam-predictor", "SEEDS=0")
    code, calls, printed = repo.make("cost", "PAPERS=simsiam")
    assert code == 0 and len(runs(calls)) == 6 and "base/0" not in runs(calls)
    assert "simsiam/base" in printed and "1 finished" in printed
    assert all(call.startswith("-m common.study.cost ") for call in repo.make("cost", "PAPERS=simsiam")[1])
    broken = "runs/rehearsal/demo/simsiam/base/10"
    assert repo.make("cost", "PAPERS=simsiam", "EXTRA=--epochs 2", BREAK=broken)[0] != 0
    code, calls, printed = repo.make("cost", "PAPERS=simsiam", "EXTRA=--epochs 3")  # the finished runs have other flags
    assert code == 0 and len(runs(calls)) == 9 and "1 finished" not in printed


def test_primary_runs_the_primary_contrasts_and_their_baselines(repo):
    code, calls, printed = repo.make("primary", "SEEDS=0", "-j2")
    assert code == 0, printed
    trained = {"/".join(Path(call.split("--out ")[1].split()[0]).parts[2:4]) for call in calls if "train.py" in call}
    pair, other = "vgg_s64-vgg_s", "resnet_s64-vgg_s"
    assert trained == {
        *(f"simsiam/{arm}" for arm in ("base", "no-stop-gradient", "no-predictor", "no-projector", "asymmetric")),
        "simsiam/asymmetric-2x",
        *(f"conmim/{arm}" for arm in ("online-no-stop-gradient", "online-keys", "symmetric", "base")),
        "conmim/no-pretraining", "conmim/no-pretraining-long",
        *(f"cocord/{arm}@{pair}" for arm in ("forward-only", "swapped-only", "base")),
        *(f"cocord/{arm}@{other}" for arm in ("moving", "frozen")), "cocord/cross-entropy@vgg_s",
        *(f"bsa/{arm}" for arm in ("base", "no-alignment", "mse", "mse-matched")),
        *(f"seqvcr/{arm}@2x2" for arm in ("base", "off", "0.1-0.5", "width-4096", "width-512")),
        "seqvcr/0.1-0.5@2x2-128", "seqvcr/base@2x2-128",
    }  # fmt: skip
    drawn = [call.split()[1] for call in calls if "plot.py" in call]
    assert len(drawn) == len(set(drawn)) == 12 and repo.make("primary", "SEEDS=0")[:2] == (0, [])
    calls = repo.make("simsiam-predictor", "SEEDS=0")[1]  # the secondary contrasts
    assert runs(calls) == ["frozen-predictor/0"] and calls[-2].startswith("simsiam/plot.py simsiam-predictor ")


@pytest.mark.slow
def test_another_data_matrix_retrains_the_runs(repo):
    """A matrix file is identified by its content: a moved file keeps the runs, a changed file does not."""
    study, count = "bsa-alignment-loss", 4
    trained = []
    for data, content in (("a.npy", "1"), ("a.npy", "1"), ("moved.NPY", "1"), ("moved.NPY", "2"), ("b.npy", "1")):
        (repo.folder / data).write_text(content)
        code, calls, _ = repo.make(study, "SEEDS=0", f"DATA={data}")
        trained.append(sum(f"--data {data} --replace" in call for call in calls))
        assert code == 0 and all(f"DATA={data}" in call.split("--reproduce")[1] for call in calls if "plot.py" in call)
    assert trained == [count, 0, 0, count, count]
    calls = repo.make(study, "SEEDS=0", "DATA=elsewhere")[1]  # a folder is not part of the flags
    assert sum("--data elsewhere" in call and "train.py" in call for call in calls) == count
    for name, value, paper in (("PAIRS", "vgg13-vgg8", "cocord"), ("TASKS", "2x2", "seqvcr")):
        drawn = [call for call in repo.make(paper, "SEEDS=0", f"{name}={value}")[1] if "plot.py" in call]
        assert drawn and all(f"{name}={value}" in call and f"--{name.lower()} {value}" in call for call in drawn)


@pytest.mark.slow
def test_demo_runs_in_parallel_also_if_a_variable_contains_j(repo):
    for words, parallel in (("RUNS=my-jobs", True), ("-j1", False)):
        printed = repo.make("-n", "demo", words)[2]
        assert bool(re.search(r"DEVICE=cpu \\\n\t-j\d+$", printed, re.MULTILINE)) == parallel


def test_demo_runs_the_primary_contrasts_with_one_seed_on_the_cpu(repo):
    code, calls, _ = repo.make("demo")
    assert code == 0 and len(runs(calls)) == 6 and all("--device cpu" in call for call in calls if "train.py" in call)
    assert {run.split("/")[1] for run in runs(calls)} == {"10"}
    assert all("--seed 10 --data-seed 10 " in call for call in calls if "train.py" in call or "teacher.py" in call)
    drawn = [call.split()[1] for call in calls if call.split()[0].endswith("plot.py")]
    assert len(drawn) == len(set(drawn)) == 12 and "--results runs/demo/report " in calls[-1]
    first = next(index for index, call in enumerate(calls) if "plot.py" in call)
    assert sorted(runs(calls[:first])) == ["base/10", "no-stop-gradient/10"]  # the first figure appears early
    seventh = next(index for index, call in enumerate(calls) if "train.py" in call and "conmim" in call)
    assert sum("plot.py" in call for call in calls[:seventh]) == 4  # and those of a paper before the next paper's runs


def test_demo_accepts_other_seeds_and_another_device(repo):
    calls = repo.make("demo", "PAPERS=bsa", "SEEDS=3 4", "DEVICE=cuda:1")[1]
    trained = [call for call in calls if "train.py" in call]
    assert len(trained) == 2 * 4 and all("--device cuda:1" in call for call in trained)
    assert {call.split("--seed ")[1].split()[0] for call in trained} == {"3", "4"}


@pytest.mark.slow
def test_robustness_and_curves_run_five_seeds(repo):
    code, calls, printed = repo.make("robustness", "PAPERS=bsa cocord", "-j2")
    assert code == 0, printed
    tripled = [call for call in calls if "train.py" in call and "--lr-factor 3" in call]
    assert len(tripled) == 5 * (4 + 6) and all("@triple/" in call for call in tripled)
    assert {call.split("--seed ")[1].split()[0] for call in tripled} == {"10", "11", "12", "13", "14"}
    drawn = [call for call in calls if "plot.py" in call]
    assert {call.split()[1] for call in drawn} == {"bsa-robustness", "cocord-robustness"}
    page = next(call for call in calls if "study.page" in call)
    expected = ["bsa-base-again", "cocord-calibration", "cocord-base-again", "bsa-robustness", "cocord-robustness"]
    assert page.split(" --extras ")[1].split()[:5] == expected
    for index, call in enumerate(calls):  # all rates share the teacher of their block, which is trained first
        if "cocord/train.py" in call and "@third" in call and "--weights" in call:
            weights = Path(call.split("--weights ")[1].split()[0])
            assert any(f"--out {weights.parent} " in earlier for earlier in calls[:index])
    assert repo.make("robustness", "PAPERS=bsa cocord")[:2] == (0, [])
    code, calls, _ = repo.make("curves", "PAPERS=bsa", "SEEDS=10")
    trained = [call.split("--out runs/demo/bsa/")[1].split("/")[0] for call in calls if "train.py" in call]
    assert code == 0 and len(trained) == len(set(trained)) == 4 + 3 + 2
    assert not {"base", "no-alignment"} & set(trained)  # these runs exist already


NEW_STUDY = """        study(
            "simsiam-head",
            "Is a projector without a predictor worth anything?",
            ["no-predictor:no-projector"],
            must_beat=[beats_untrained("no-projector")],
        ),
"""


def test_a_study_is_added_by_one_edit(repo):
    next_study = '        study("simsiam-projector", "What'
    repo.edit(next_study, NEW_STUDY + next_study)
    code, calls, _ = repo.make("simsiam-head", "SEEDS=0")
    assert code == 0 and runs(calls) == ["no-projector/0", "no-predictor/0"]
    assert "simsiam/plot.py simsiam-head " in " ".join(calls) and " simsiam-head " in calls[-1]
    code, calls, _ = repo.make("all", "PAPERS=simsiam", "SEEDS=0")
    assert code == 0 and len(runs(calls)) == 7
    assert "simsiam-head: Is a projector without a predictor worth anything?" in repo.make()[2]


def test_help_names_papers_studies_and_arms(repo):
    _, calls, printed = repo.make()
    assert calls == [] and "simsiam-stop-gradient" in printed and "--no-stop-gradient" in printed


def test_teachers_are_trained_first_and_once_per_block_and_ignore_extra(repo):
    code, calls, printed = repo.make("cocord-teacher-momentum", "SEEDS=0 1", "EXTRA=--queue 64", "-j2")
    teachers = [call for call in calls if "teacher.py" in call]
    assert code == 0 and len(teachers) == len(set(teachers)) == 2 * 3, printed
    assert not any("--queue" in call for call in teachers)
    for seed in (0, 1):
        assert sum(f"/{seed} --seed {seed} --data-seed {seed} " in call for call in teachers) == 3
    for index, call in enumerate(calls):
        if "cocord/train.py" in call and "--weights" in call:
            weights = Path(call.split("--weights ")[1].split()[0])
            assert weights.parts[3] == f"teacher@{call.split('--teacher ')[1].split()[0]}"
            assert weights.parts[4] == call.split("--seed ")[1].split()[0]  # the teacher of the student's block
            assert any(f"--out {weights.parent} " in earlier for earlier in calls[:index])
    assert sum("--teacher none" in call for call in calls if "train.py" in call) == 2
    assert repo.make("cocord-teacher-momentum", "SEEDS=0 1", "EXTRA=--queue 64")[:2] == (0, [])


@pytest.mark.slow
def test_teacher_target_other_pairs_and_rehearsed_teachers(repo):
    calls = repo.make("cocord-teachers")[1]
    assert len(calls) == 4 * 10 and all(call.startswith("cocord/teacher.py") for call in calls)
    calls = repo.make("cocord-prediction-loss", "SEEDS=0", "PAIRS=vgg13-vgg8")[1]
    assert sum("--network vgg13" in call for call in calls) == 1
    assert {call.split("--student ")[1].split()[0] for call in calls if "cocord/train.py" in call} == {"vgg8"}
    rehearsal = ["EXTRA=--batch 8 --rehearse 3 --data-set glyphs36 --held-out", "RUNS=runs/rehearsal/demo"]
    calls = repo.make("cocord-prediction-loss", "SEEDS=0", *rehearsal)[1]
    teacher = next(call for call in calls if "teacher.py" in call)
    assert " --rehearse=3 --data-set=glyphs36 --held-out --network " in teacher and "--batch" not in teacher
