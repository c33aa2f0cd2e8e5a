"""Fault tolerance of a SimSiam run: kills, full disk, damaged files, out of memory, NaN and infinity.

Faults that end a process happen in a child process (doomed.py), so that the files it leaves are real.
"""

import errno
import importlib
import json
import os
import random
import shlex
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
from doomed import SMALL_GLYPHS, exit_code, run_plot, run_train, run_train_with_dying_workers, start_process
from torch import nn

import cocord.teacher
from common import checkpoints, devices, files, images
from common.cli import fail
from common.lock import run_lock
from simsiam import eval as evaluate
from simsiam import plot, train
from simsiam.train import simsiam_loss

EPOCHS = 8


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the final weights of a run."""
    return checkpoints.load(run / "model.pt")["model"]


def bit_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> dict:
    """Evaluate a run. Returns metrics.json without timings and git state, which differ between equal runs."""
    evaluate.main([str(run)])
    values = json.loads((run / "metrics.json").read_text())
    for name in ("seconds", "examples_per_second", "peak_memory", "train_seconds", "commit", "dirty"):
        values.pop(name)
    return values


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted") / "0"
    train.main(tiny(out, pictures, "--epochs", str(EPOCHS)))
    return out


@pytest.fixture
def killed(uninterrupted, pictures, tmp_path) -> Path:
    """A run that was killed in its third epoch."""
    out = tmp_path / "run"
    argv = tiny(out, pictures, "--epochs", str(EPOCHS))
    assert exit_code(start_process(run_train, argv, 11)) == -signal.SIGKILL and (out / "state.pt").exists()
    return out


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_run_killed_during_writes_resumes_bit_identically(uninterrupted, pictures, tmp_path):
    out, rng, deaths = tmp_path / "a folder with späces" / "0", random.Random(0), 0
    while deaths < 50:
        code = exit_code(start_process(run_train, tiny(out, pictures, "--epochs", str(EPOCHS)), rng.randint(1, 11)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths >= 4
    assert bit_identical(weights(out), weights(uninterrupted)) and metrics(out) == metrics(uninterrupted)
    assert not list(out.glob(".*")) and not list(out.glob("state*"))
    epochs = [line["epoch"] for line in files.read_lines(out / "train.jsonl")]
    assert epochs == list(range(EPOCHS + 1))


def test_run_killed_at_random_times_resumes_bit_identically(uninterrupted, pictures, tmp_path):
    out, rng, outcomes = tmp_path / "0", random.Random(1), []
    for _ in range(12):
        process = start_process(run_train, tiny(out, pictures, "--epochs", str(EPOCHS)))
        time.sleep(rng.uniform(0.02, 0.4))
        process.kill()
        outcomes.append(exit_code(process))
        if outcomes[-1] == 0:
            break
        if (log := out / "train.jsonl").exists() and log.stat().st_size:
            log.write_bytes(log.read_bytes() + b'{"epoch": 7, "lo')  # as if killed while writing the line
    train.main(tiny(out, pictures, "--epochs", str(EPOCHS)))
    assert -signal.SIGKILL in outcomes
    assert bit_identical(weights(out), weights(uninterrupted)) and metrics(out) == metrics(uninterrupted)


@pytest.mark.parametrize("module", ["conmim.train", "cocord.train", "cocord.teacher", "bsa.train", "seqvcr.train"])
def test_other_papers_killed_during_writes_resume_bit_identically(module, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GLYPH_COUNTS", SMALL_GLYPHS)
    paper = module.partition(".")[0]
    argv = ["--rehearse", "2", "--device", "cpu", "--data", str(tmp_path / "data")]
    argv += {"bsa": ["--latent", "64", "--active", "4"], "seqvcr": ["--train-size", "300"]}.get(paper, [])
    if module == "cocord.train":
        cocord.teacher.main([*argv, "--out", str(tmp_path / "teacher")])
        argv += ["--weights", str(tmp_path / "teacher")]
    importlib.import_module(module).main([*argv, "--out", str(tmp_path / "uninterrupted")])
    argv += ["--out", str(tmp_path / "killed")]
    for number in (4, 6, 8):  # before the first state, in a line of the log, in a state
        code = exit_code(start_process(run_train, argv, number, 0, module, printed=tmp_path / "printed"))
        assert code == -signal.SIGKILL, (tmp_path / "printed").read_text()
    assert exit_code(start_process(run_train, argv, 0, 0, module)) == 0
    assert "resuming after epoch" in (tmp_path / "printed").read_text()
    folders = (tmp_path / "uninterrupted", tmp_path / "killed")
    assert bit_identical(*(checkpoints.load(folder / "model.pt")["model"] for folder in folders))
    logs = [files.read_lines(folder / "train.jsonl") for folder in folders]
    for line in (*logs[0], *logs[1]):
        for timing in ("seconds", "examples_per_second", "peak_memory"):
            line.pop(timing, None)
    assert logs[0] == logs[1] and len(logs[0]) == 3


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGUSR1))],
)
def test_signal_exits_with_code_75(number, pictures, tmp_path):
    command = [sys.executable, str(ROOT / "simsiam/train.py"), *tiny(tmp_path / "run", pictures, "--epochs", "500")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    deadline = time.monotonic() + 100
    while not (tmp_path / "run/state.previous.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate()[1]
    assert process.returncode == 75 and "run the same command again" in printed and "Traceback" not in printed


def test_a_failed_run_leaves_its_reason_and_an_interrupted_one_does_not(tmp_path):
    reason, child_handler = tmp_path / "failure.txt", signal.getsignal(signal.SIGCHLD)
    for error, first_line in ((ValueError("odd"), "ValueError('odd')"), (None, "too large: give less")):
        with pytest.raises((ValueError, SystemExit)), run_lock(tmp_path):
            if error:
                raise error
            fail("too large: give less")
        assert reason.read_text().splitlines()[0] == first_line
        assert ("Traceback" in reason.read_text()) == (error is not None)
    with pytest.raises(SystemExit), run_lock(tmp_path):
        assert not reason.exists()  # the new attempt has not failed yet
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    signal.signal(signal.SIGCHLD, child_handler)
    assert not reason.exists()
    with pytest.raises(SystemExit), run_lock(tmp_path):
        fail("contains another run", record=False)
    assert not reason.exists()


def test_closed_standard_streams_lose_only_the_messages(tmp_path):
    """Otherwise a file that is opened later gets descriptor 2 and the messages."""
    command = f"{shlex.quote(sys.executable)} bsa/train.py --rehearse 2 --out {shlex.quote(str(tmp_path / 'run'))}"
    assert subprocess.run(["bash", "-c", f"{command} <&- >&- 2>&-"], cwd=ROOT).returncode == 0
    assert (tmp_path / "run/model.pt").exists() and "epoch" not in (tmp_path / "run.lock").read_text()


# ---------------------------------------------------------------------------------------------- disk errors


def test_full_disk_keeps_saved_state(killed, uninterrupted, pictures, tmp_path):
    """A limit on the file size simulates a full disk: the system fails in the middle of a write."""
    before = {path.name: path.read_bytes() for path in killed.glob("state*")}
    argv = tiny(killed, pictures, "--epochs", str(EPOCHS))
    assert exit_code(start_process(run_train, argv, 0, 100_000, printed=tmp_path / "printed")) == 4
    errors = [line for line in (tmp_path / "printed").read_text().splitlines() if "error" in line or "Trace" in line]
    assert len(errors) == 1 and "File too large" in errors[0] and "run the same command again" in errors[0]
    after = {path.read_bytes() for path in killed.glob("state*")}
    assert max(before.values(), key=len) in after and not list(killed.glob(".*"))
    train.main(tiny(killed, pictures, "--epochs", str(EPOCHS)))
    assert bit_identical(weights(killed), weights(uninterrupted))


def test_temporary_write_error_is_retried(uninterrupted, pictures, tmp_path, monkeypatch, capsys):
    failures, real = [None], os.replace

    def replace(source, target):
        if Path(target).name == "state.previous.pt":
            real(source, target)
        elif Path(target).name == "state.pt" and failures:
            failures.pop()
            raise OSError(errno.EIO, "Input/output error", str(target))
        else:
            real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    train.main(tiny(tmp_path / "0", pictures, "--epochs", str(EPOCHS)))
    assert not failures and "retrying once" in capsys.readouterr().err
    assert bit_identical(weights(tmp_path / "0"), weights(uninterrupted))


def test_locked_or_unwritable_output_folder_is_an_error(killed, pictures, tmp_path, capsys):
    with run_lock(killed):
        argv = tiny(killed, pictures, "--epochs", str(EPOCHS))
        assert exit_code(start_process(run_train, argv, printed=tmp_path / "printed")) == 2
    assert f"is in use by pid {os.getpid()}" in (tmp_path / "printed").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(tmp_path / "file" / "run", pictures))
    assert end.value.code == 2 and "use another output folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- damaged files


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Truncate a file to half of its length."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
def test_damaged_state_falls_back_to_previous_state(damage, killed, uninterrupted, pictures, capsys):
    damage(killed / "state.pt")
    train.main(tiny(killed, pictures, "--epochs", str(EPOCHS)))
    assert "warning" in (printed := capsys.readouterr()).err and "state.pt" in printed.err
    assert "resuming after epoch 0" in printed.out and bit_identical(weights(killed), weights(uninterrupted))


@pytest.mark.parametrize("lines", [1, 3])
def test_two_damaged_states_are_an_error_not_a_restart(lines, killed, pictures, capsys):
    for name in ("state.pt", "state.previous.pt"):
        flip(killed / name)
    log = (killed / "train.jsonl").read_bytes()
    (killed / "train.jsonl").write_bytes(b"".join(log.splitlines(keepends=True)[:lines]))
    with pytest.raises(SystemExit) as end:
        train.main(tiny(killed, pictures, "--epochs", str(EPOCHS)))
    assert end.value.code == 2 and "train this run again" in capsys.readouterr().err
    assert (killed / "train.jsonl").read_bytes() and not (killed / "model.pt").exists()


def test_state_of_another_run_is_ignored(killed, uninterrupted, pictures, tmp_path, capsys):
    other = tmp_path / "other"
    exit_code(start_process(run_train, tiny(other, pictures, "--epochs", str(EPOCHS), "--dim", "64"), 11))
    shutil.copy(other / "state.pt", killed / "state.pt")
    train.main(tiny(killed, pictures, "--epochs", str(EPOCHS)))
    assert "belongs to another run" in capsys.readouterr().err
    assert bit_identical(weights(killed), weights(uninterrupted))


def test_evaluation_reports_damaged_foreign_or_missing_files(uninterrupted, tmp_path, capsys):
    def error_after(damage: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(uninterrupted, tmp_path / "run")
        damage(tmp_path / "run")
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

    assert "checksum" in error_after(lambda run: flip(run / "model.pt"))
    assert "model.pt cannot be read" in error_after(lambda run: cut(run / "model.pt"))
    assert "args.json is not valid JSON" in error_after(lambda run: cut(run / "args.json"))
    assert "args.json is damaged (missing key 'arguments')" in error_after(edited("args.json", '"arguments"', '"x"'))
    assert "train.jsonl, line 1: not a JSON" in error_after(lambda run: (run / "train.jsonl").write_text("{\n{}\n"))
    assert "train.jsonl is damaged" in error_after(lambda run: (run / "train.jsonl").write_text(""))
    assert "no finished run" in error_after(lambda run: (run / "model.pt").unlink())
    assert "not of simsiam/train.py" in error_after(edited("args.json", "simsiam/train.py", "bsa/train.py"))
    assert "does not belong to args.json" in error_after(edited("args.json", '"dim": 256', '"dim": 64'))
    assert "does not fit this network" in error_after(swap)


def test_training_reports_damaged_arguments(killed, pictures, capsys):
    (killed / "args.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(killed, pictures, "--epochs", str(EPOCHS)))
    assert end.value.code == 2 and "args.json is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- data loader workers


@pytest.mark.slow
def test_dead_loader_worker_is_a_one_line_error(pictures, tmp_path):
    argv = [*tiny(tmp_path / "run", pictures, "--epochs", "30"), "--size", "96", "--workers", "1"]
    assert exit_code(start_process(run_train_with_dying_workers, argv, printed=tmp_path / "printed")) == 75
    printed = (tmp_path / "printed").read_text()
    assert "a data loader worker died" in printed and "Traceback" not in printed


# ---------------------------------------------------------------------------------------------- NaN, out of memory


@pytest.mark.parametrize("fault", ["loss", "gradient", "statistics"])
def test_nan_or_infinity_finishes_the_run_as_diverged(fault, pictures, tmp_path, monkeypatch, capsys):
    """The fault is in the last step of the second epoch, and the newest state is damaged."""
    calls, models, out = [], [], tmp_path / "run"
    real_build_model = train.build_model

    def build_model(*arguments):
        models.append(real_build_model(*arguments))
        return models[-1]

    def faulty_loss(p, z, pairs, leak):
        calls.append(1)
        if len(calls) == 6:
            flip(out / "state.pt")
            if fault == "statistics":
                norm = next(module for module in models[-1].modules() if isinstance(module, nn.BatchNorm2d))
                norm.running_var.data.fill_(float("inf"))
            elif fault == "gradient":
                p[0].register_hook(lambda gradient: gradient * float("inf"))
            else:
                return simsiam_loss(p, z, pairs, leak) + float("inf")  # its gradient is finite
        return simsiam_loss(p, z, pairs, leak)

    monkeypatch.setattr(train, "build_model", build_model)
    monkeypatch.setattr(train, "simsiam_loss", faulty_loss)
    train.main(tiny(out, pictures))
    saved = checkpoints.load(out / "model.pt")
    assert saved["diverged"] and saved["epoch"] == 0 and "diverged in epoch 2" in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    evaluate.main([str(out)])
    values = json.loads((out / "metrics.json").read_text())
    assert values["diverged"] and values["knn_accuracy"] is None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
     RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")],
)  # fmt: skip
def test_out_of_memory_reports_peak_batch_size_and_remedy(error, pictures, tmp_path, monkeypatch, capsys):
    def loss(*_):
        raise error

    monkeypatch.setattr(train, "simsiam_loss", loss)
    monkeypatch.setenv("RUNS_ON_THIS_GPU", "4")
    with pytest.raises(SystemExit) as end:
        train.main(tiny(tmp_path / "run", pictures))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    for text in ("peak ", "GiB, and up to 3 other runs share", "--batch 16", "--batch 8", "--precision bfloat16"):
        assert text in printed


@pytest.mark.parametrize(
    ("precision", "device", "advised"),
    [("auto", "cpu", True), ("float32", "cuda", True), ("auto", "cuda", False), ("bfloat16", "cpu", False)],
)
def test_out_of_memory_advises_bfloat16_only_to_a_run_without_it(precision, device, advised, monkeypatch, capsys):
    monkeypatch.setattr(devices, "peak_memory", lambda device: 0.0)
    with pytest.raises(SystemExit), devices.report_oom(torch.device(device), "x", "use less", precision):
        raise torch.OutOfMemoryError
    assert ("--precision bfloat16" in capsys.readouterr().err) == advised


def test_other_runtime_errors_are_not_reported_as_out_of_memory(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "simsiam_loss", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        train.main(tiny(tmp_path / "run", pictures))


# ---------------------------------------------------------------------------------------------- plots, environment


@pytest.mark.slow
def test_killed_plotting_leaves_only_complete_files(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.undo()  # the processes below draw in full resolution
    runs, results = tmp_path / "runs", tmp_path / "results"
    for arm in ("base", "no-stop-gradient"):
        shutil.copytree(uninterrupted, runs / arm / "0")
        evaluate.main([str(runs / arm / "0")])
    argv = ["simsiam-stop-gradient", "--runs", str(runs), "--seeds", "0", "--results"]
    plot.main([*argv, str(tmp_path / "complete")])
    complete = {path.name: path.read_bytes() for path in (tmp_path / "complete").iterdir()}

    for number in (1, 4, 7, 10):  # each file takes two fsyncs: the file and its folder
        assert exit_code(start_process(run_plot, [*argv, str(results)], number)) == -signal.SIGKILL
        for path in results.glob("[!.]*"):
            assert path.read_bytes() == complete[path.name], path
    plot.main([*argv, str(results)])
    assert {path.name: path.read_bytes() for path in results.glob("[!.]*")} == complete


@pytest.mark.slow
def test_runs_without_home_network_or_data_folder(tmp_path):
    """Train, evaluate and plot with spaces and umlauts in paths, few open files, no network and no data folder."""
    code = """
import socket, sys
from common import images
from simsiam import eval, plot, train
def refuse(*_): raise OSError("no network")
socket.socket.connect = refuse
images.GLYPH_COUNTS = {"train": 64, "test": 20}
train.main(["--data", "/proc/none", "--rehearse", "1", "--neighbours", "5", "--out", "ä run/base/0"])
eval.main(["ä run/base/0"])
plot.main(["simsiam-predictor", "--runs", "ä run", "--seeds", "0", "1", "--results", "ü"])
"""
    folder = tmp_path / "späces and ümlauts"
    folder.mkdir()
    command = ["/bin/sh", "-c", 'ulimit -n 64; exec "$0" "$@"', sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "HOME": "/nowhere"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "ü/simsiam-predictor-curves.png").stat().st_size > 1000 and "Traceback" not in done.stderr
