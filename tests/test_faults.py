"""Nothing is lost: a SimSiam run under kills, full disks, damaged files, lack of memory and non-finite numbers.

What has to die is a process of its own (doomed.py); what it leaves behind is real.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny
from doomed import child, drawing, outcome, training, training_with_dying_workers
from torch import nn

from common import checkpoints, files
from common.lock import run_lock
from simsiam import eval as evaluate
from simsiam import plot, train
from simsiam.train import simsiam_loss

EPOCHS = 8


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(run / "model.pt")["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> dict:
    """metrics.json without what differs between two equal runs."""
    evaluate.main([str(run)])
    found = json.loads((run / "metrics.json").read_text())
    for name in ("seconds", "examples_per_second", "peak_memory", "train_seconds", "commit", "dirty"):
        found.pop(name)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory, pictures) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight") / "0"
    train.main(tiny(out, pictures, "--epochs", str(EPOCHS)))
    return out


@pytest.fixture
def half(straight, pictures, tmp_path) -> Path:
    """A run that was killed in its third epoch."""
    out = tmp_path / "run"

    argv = tiny(out, pictures, "--epochs", str(EPOCHS))
    assert outcome(child(training, argv, 11)) == -signal.SIGKILL and (out / "state.pt").exists()
    return out


# ---------------------------------------------------------------------------------------------- kills


def test_killed_inside_any_write_a_run_ends_with_the_same_bits(straight, pictures, tmp_path):
    out, chance, deaths = tmp_path / "a folder with späces" / "0", random.Random(0), 0
    while deaths < 50:
        code = outcome(child(training, tiny(out, pictures, "--epochs", str(EPOCHS)), chance.randint(1, 11)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths >= 4 and same(weights(out), weights(straight)) and metrics(out) == metrics(straight)
    assert not list(out.glob(".*")) and not list(out.glob("state*"))
    epochs = [line["epoch"] for line in files.read_lines(out / "train.jsonl")]
    assert epochs == list(range(EPOCHS + 1))


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(straight, pictures, tmp_path):
    out, chance, outcomes = tmp_path / "0", random.Random(1), []
    for _ in range(12):
        process = child(training, tiny(out, pictures, "--epochs", str(EPOCHS)))
        time.sleep(chance.uniform(0.02, 0.4))
        process.kill()
        outcomes.append(outcome(process))
        if outcomes[-1] == 0:
            break
        if (log := out / "train.jsonl").exists() and log.stat().st_size:
            log.write_bytes(log.read_bytes() + b'{"epoch": 7, "lo')  # as if killed in the line
    train.main(tiny(out, pictures, "--epochs", str(EPOCHS)))
    assert -signal.SIGKILL in outcomes
    assert same(weights(out), weights(straight)) and metrics(out) == metrics(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_script_with_the_code_for_go_on(number, pictures, tmp_path):
    command = [sys.executable, str(ROOT / "simsiam/train.py"), *tiny(tmp_path / "run", pictures, "--epochs", "500")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    limit = time.monotonic() + 100
    while not (tmp_path / "run/state.previous.pt").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate()[1]
    assert process.returncode == 75 and "the same command goes on" in printed and "Traceback" not in printed


# ---------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_keeps_what_was_saved(half, straight, pictures, tmp_path):
    """The limit of a file's size stands in for the disk's: the system refuses the write in its middle."""
    before = {path.name: path.read_bytes() for path in half.glob("state*")}
    argv = tiny(half, pictures, "--epochs", str(EPOCHS))
    assert outcome(child(training, argv, 0, 100_000, printed=tmp_path / "printed")) == 4
    told = [line for line in (tmp_path / "printed").read_text().splitlines() if "error" in line or "Trace" in line]
    assert len(told) == 1 and "File too large" in told[0] and "the same command goes on" in told[0]
    after = {path.read_bytes() for path in half.glob("state*")}
    assert max(before.values(), key=len) in after and not list(half.glob(".*"))
    train.main(tiny(half, pictures, "--epochs", str(EPOCHS)))
    assert same(weights(half), weights(straight))


def test_a_write_error_that_passes_costs_nothing(straight, pictures, tmp_path, monkeypatch, capsys):
    left, real = [None], os.replace

    def replace(source, target):
        if Path(target).name == "state.previous.pt":
            real(source, target)
        elif Path(target).name == "state.pt" and left:
            left.pop()
            raise OSError(errno.EIO, "Input/output error", str(target))
        else:
            real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    train.main(tiny(tmp_path / "0", pictures, "--epochs", str(EPOCHS)))
    assert not left and "trying once more" in capsys.readouterr().err
    assert same(weights(tmp_path / "0"), weights(straight))


def test_a_folder_in_use_and_one_that_cannot_be_written(half, pictures, tmp_path, capsys):
    with run_lock(half):
        argv = tiny(half, pictures, "--epochs", str(EPOCHS))
        assert outcome(child(training, argv, printed=tmp_path / "printed")) == 2
    assert f"is in use by pid {os.getpid()}" in (tmp_path / "printed").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(tmp_path / "file" / "run", pictures))
    assert end.value.code == 2 and "choose another folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- damaged files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.write_bytes(b"")])
def test_a_damaged_state_falls_back_to_the_one_before(harm, half, straight, pictures, capsys):
    harm(half / "state.pt")
    train.main(tiny(half, pictures, "--epochs", str(EPOCHS)))
    assert "warning" in (printed := capsys.readouterr()).err and "state.pt" in printed.err
    assert "going on after epoch 0" in printed.out and same(weights(half), weights(straight))


@pytest.mark.parametrize("lines", [1, 3])
def test_two_damaged_states_never_begin_again_in_silence(lines, half, pictures, capsys):
    for name in ("state.pt", "state.previous.pt"):
        flip(half / name)
    log = (half / "train.jsonl").read_bytes()
    (half / "train.jsonl").write_bytes(b"".join(log.splitlines(keepends=True)[:lines]))
    with pytest.raises(SystemExit) as end:
        train.main(tiny(half, pictures, "--epochs", str(EPOCHS)))
    assert end.value.code == 2 and "move the folder away" in capsys.readouterr().err
    assert (half / "train.jsonl").read_bytes() and not (half / "model.pt").exists()


def test_a_state_of_another_run_is_not_this_ones(half, straight, pictures, tmp_path, capsys):
    other = tmp_path / "other"
    outcome(child(training, tiny(other, pictures, "--epochs", str(EPOCHS), "--dim", "64"), 11))
    shutil.copy(other / "state.pt", half / "state.pt")
    train.main(tiny(half, pictures, "--epochs", str(EPOCHS)))
    assert "is not of this run" in capsys.readouterr().err and same(weights(half), weights(straight))


def test_a_damaged_foreign_or_missing_model_is_named(straight, tmp_path, capsys):
    def stopped(harm: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(straight, tmp_path / "run")
        harm(tmp_path / "run")
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(tmp_path / "run")])
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.count("\n") == 1
        return printed

    def edited(name: str, old: str, new: str) -> Callable[[Path], object]:
        return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))

    def swap(run: Path) -> None:
        saved = checkpoints.load(run / "model.pt")
        checkpoints.save(run / "model.pt", saved | {"model": {"backbone.0.weight": torch.zeros(3)}})

    assert "checksum" in stopped(lambda run: flip(run / "model.pt"))
    assert "model.pt cannot be read" in stopped(lambda run: cut(run / "model.pt"))
    assert "args.json is damaged" in stopped(lambda run: cut(run / "args.json"))
    assert "args.json is damaged" in stopped(lambda run: (run / "args.json").write_text("{}"))
    assert "train.jsonl is damaged" in stopped(lambda run: (run / "train.jsonl").write_text("{\n{}\n"))
    assert "train.jsonl is damaged" in stopped(lambda run: (run / "train.jsonl").write_text(""))
    assert "no finished run" in stopped(lambda run: (run / "model.pt").unlink())
    assert "not of simsiam/train.py" in stopped(edited("args.json", "simsiam/train.py", "bsa/train.py"))
    assert "not of the run in args.json" in stopped(edited("args.json", '"dim": 256', '"dim": 64'))
    assert "does not fit this network" in stopped(swap)


def test_damaged_arguments_stop_training_too(half, pictures, capsys):
    (half / "args.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(half, pictures, "--epochs", str(EPOCHS)))
    assert end.value.code == 2 and "args.json is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- data


def test_a_worker_that_is_killed_ends_in_one_sentence(pictures, tmp_path):
    argv = [*tiny(tmp_path / "run", pictures, "--epochs", "30"), "--size", "96", "--workers", "1"]
    assert outcome(child(training_with_dying_workers, argv, printed=tmp_path / "printed")) == 75
    printed = (tmp_path / "printed").read_text()
    assert "a process that decodes pictures died" in printed and "Traceback" not in printed


# ---------------------------------------------------------------------------------------------- numbers and memory


@pytest.mark.parametrize("what", ["loss", "gradient", "statistics"])
def test_a_number_that_is_not_finite_is_a_result(what, pictures, tmp_path, monkeypatch, capsys):
    """In the last step of the second epoch; the newest state is damaged besides."""
    calls, made, out = [], [], tmp_path / "run"
    monkeypatch.setattr(train, "build_model", lambda *all, old=train.build_model: made.append(old(*all)) or made[-1])

    def poisoned(p, z, pairs, leak):
        calls.append(1)
        if len(calls) == 6:
            flip(out / "state.pt")
            if what == "statistics":
                next(x for x in made[-1].modules() if isinstance(x, nn.BatchNorm2d)).running_var.data.fill_(
                    float("inf")
                )
            elif what == "gradient":
                p[0].register_hook(lambda gradient: gradient * float("inf"))
            else:
                return simsiam_loss(p, z, pairs, leak) + float("inf")  # its gradient is finite
        return simsiam_loss(p, z, pairs, leak)

    monkeypatch.setattr(train, "simsiam_loss", poisoned)
    train.main(tiny(out, pictures))
    saved = checkpoints.load(out / "model.pt")
    assert saved["diverged"] and saved["epoch"] == 0 and "diverged in epoch 2" in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    evaluate.main([str(out)])
    found = json.loads((out / "metrics.json").read_text())
    assert found["diverged"] and found["knn_accuracy"] is None


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_names_the_peak_the_batch_and_what_would_fit(error, pictures, tmp_path, monkeypatch, capsys):
    def greedy(*_):
        raise error

    monkeypatch.setattr(train, "simsiam_loss", greedy)
    monkeypatch.setenv("RUNS_ON_THIS_GPU", "4")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(tmp_path / "run", pictures))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    for words in ("GiB held", "--batch 16", "--batch 8", "--precision bfloat16", "3 other runs share"):
        assert words in printed


def test_another_error_is_not_taken_for_a_lack_of_memory(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "simsiam_loss", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        train.main(tiny(tmp_path / "run", pictures))


# ---------------------------------------------------------------------------------------------- drawing, surroundings


def test_drawing_that_is_killed_leaves_whole_files(straight, tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for arm in ("base", "no-stop-gradient"):
        shutil.copytree(straight, runs / arm / "0")
        evaluate.main([str(runs / arm / "0")])
    words = ["simsiam-stop-gradient", "--runs", str(runs), "--seeds", "0", "--results"]
    plot.main([*words, str(tmp_path / "whole")])
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    for number in (1, 4, 7, 10):  # an fsync for a file and one for its folder
        assert outcome(child(drawing, [*words, str(results)], number)) == -signal.SIGKILL
        for path in results.glob("[!.]*"):
            assert path.read_bytes() == whole[path.name], path
    plot.main([*words, str(results)])
    assert {path.name: path.read_bytes() for path in results.glob("[!.]*")} == whole


def test_without_home_network_or_a_folder_for_data(tmp_path):
    """Training, evaluation and drawing under spaces and umlauts, with few open files and no folder for data."""
    code = """
import socket, sys
from common import images
from simsiam import eval, plot, train
def refuse(*_): raise OSError("no network")
socket.socket.connect = refuse
images.GLYPHS = {"train": 64, "test": 20}
train.main(["--data", "/proc/none", "--rehearse", "1", "--neighbours", "5", "--out", "ä run/base/0"])
eval.main(["ä run/base/0"])
plot.main(["simsiam-predictor", "--runs", "ä run", "--seeds", "0", "1", "--results", "ü"])
"""
    here = tmp_path / "späces and ümlauts"
    here.mkdir()
    limit = ["/bin/sh", "-c", 'ulimit -n 64; exec "$0" "$@"', sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "HOME": "/nowhere"}
    done = subprocess.run(limit, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (here / "ü/simsiam-predictor-curves.png").stat().st_size > 1000 and "Traceback" not in done.stderr
