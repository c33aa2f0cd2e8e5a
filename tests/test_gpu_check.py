"""`make gpu-check` as a dry run on the CPU. Injected faults must appear in the report as failed."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import gpu_check
import gpu_parts
import pytest
import torch
from gpu_tools import TOLERANCE, CaseFailed, relative_distance, trace_statistics
from torch._subclasses import FakeTensorMode

from common import images
from common.run import Run
from simsiam import train

HALVES = list(gpu_check.PARTS)[:7], list(gpu_check.PARTS)[7:]


def check(folder: Path, *flags: str) -> tuple[int, dict, str]:
    """Run gpu_check. Returns (exit code, report.json, text of report.md)."""
    code = gpu_check.main(["--data", str(folder / "data"), "--report", str(folder / "report"), *flags])
    report = folder / "report"
    assert 0 < len(list(report.iterdir())) <= 8
    return code, json.loads((report / "report.json").read_text()), (report / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("parts", HALVES, ids=["first-half", "second-half"])
def test_a_dry_run_passes_in_all_parts_and_is_labelled_as_dry_run(parts, tmp_path, capsys):
    code, report, page = check(tmp_path, "--device", "cpu", "--parts", *parts)
    failed = [row for row in report["rows"] if row["outcome"] not in ("passed", "not applicable")]
    assert code == 0 and not failed
    assert {row["part"] for row in report["rows"]} == set(parts) == set(report["seconds"])
    assert gpu_check.DRY_RUN_NOTE in page and gpu_check.DRY_RUN_NOTE in capsys.readouterr().out
    assert report["machine"]["device"] == "cpu" and report["machine"]["torch"] == torch.__version__


@pytest.mark.cuda
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_this_gpu_passes(part, tmp_path):
    assert check(tmp_path, "--device", "cuda", "--parts", part)[0] == 0


def mixed_devices(loss: torch.Tensor) -> torch.Tensor:
    """A term of the loss is on another device."""
    with FakeTensorMode():
        return loss + torch.zeros((), device="cuda").expand(1)


def wrong_gradient(loss: torch.Tensor, calls: list = []) -> torch.Tensor:  # noqa: B006 (counts the calls)
    """The device's gradient is 1 % too large: that of the second and later losses, as the first is the CPU's."""
    calls.append(1)
    if len(calls) > 1:
        loss.register_hook(lambda gradient: 1.01 * gradient)
    return loss


def read_back(loss: torch.Tensor) -> torch.Tensor:
    """The loss is read in each step, as for logging."""
    loss.item()
    return loss


@pytest.mark.parametrize(
    ("fault", "part", "message"),
    [
        (mixed_devices, "agreement", "loss and gradients"),
        (wrong_gradient, "agreement", "full gradient: length differs by 0.01"),
        (read_back, "sync", "host-device synchronisation in a step: aten::_local_scalar_dense"),
    ],
)
def test_a_fault_in_a_step_is_reported(fault, part, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "simsiam_loss", lambda *args, real=train.simsiam_loss: fault(real(*args)))
    code, report, page = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", part, "scales")
    failed = [row for row in report["rows"] if row["outcome"] == "failed"]
    assert code == 1 and failed[0]["part"] == part and message in page
    assert "scales" in [row["part"] for row in report["rows"]]  # the failure did not stop the other part
    assert "Traceback" in (tmp_path / "report/log.txt").read_text()


def test_a_lost_optimiser_state_exceeds_the_tolerance_of_resume(tmp_path, monkeypatch):
    """Momentum is lost after one epoch of two steps."""
    real_state, distances = Run.load_state, []

    def state_without_momentum(run: Run, device: torch.device):
        state = real_state(run, device)
        if state is not None:
            state["optimizer"]["state"] = {}
        return state

    def recorded_distance(*args):
        distances.append(relative_distance(*args))
        return distances[-1]

    monkeypatch.setattr(Run, "load_state", state_without_momentum)
    monkeypatch.setattr("gpu_parts.relative_distance", recorded_distance)
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", "resume")
    assert code == 1 and "relative distance" in report["rows"][0]["found"] and distances[-1] > TOLERANCE


def test_the_error_message_of_a_script_is_reported(tmp_path, monkeypatch):
    def fail_with_message(*_) -> None:
        train.fail("invalid --batch 3")

    monkeypatch.setattr(train, "main", fail_with_message)
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", "exchange")
    assert code == 1 and report["rows"][0]["found"] == "error: invalid --batch 3"


def test_an_error_in_the_list_of_cases_and_the_time_limit_are_reported(tmp_path, monkeypatch):
    def broken_part(_):
        raise OSError("no make here")
        yield

    monkeypatch.setitem(gpu_check.PARTS, "arms", broken_part)
    flags = ["--device", "cpu", "--papers", "bsa", "--parts"]
    code, report, _ = check(tmp_path, *flags, "arms", "sync")
    assert code == 1 and [row["outcome"] for row in report["rows"]] == ["failed", "passed", "not applicable"]
    assert "no make here" in report["rows"][0]["found"]
    code, report, _ = check(tmp_path, *flags, "sync", "--minutes", "0")
    assert code == 1 and report["counts"] == {"not run": 2}


@pytest.mark.slow
def test_concurrent_jobs_are_merged_into_one_report(tmp_path, monkeypatch):
    """The process of the first part crashes without a report."""
    real_run = subprocess.run

    def run(command, **options):
        if "scales" in command:
            command = [sys.executable, "-c", "raise OSError('crashed')"]
        return real_run(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "bsa", "--parts", "scales", "sync", "--jobs", "2")
    outcomes = [(row["part"], row["outcome"]) for row in report["rows"]]
    assert code == 1 and outcomes == [("scales", "failed"), ("sync", "passed"), ("sync", "not applicable")]
    assert report["rows"][0]["found"] == "exit code 1: OSError: crashed"
    assert "=== sync: " in (tmp_path / "report/log.txt").read_text()


def test_a_concurrent_part_without_cases_is_no_failure(tmp_path):
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "bsa", "--parts", "ranks", "sync", "--jobs", "2")
    assert code == 0 and {row["part"] for row in report["rows"]} == {"sync"}


@pytest.mark.parametrize("code", [-9, 1, None], ids=["killed", "exception", "timeout"])
def test_a_job_that_ends_early_is_a_failure_and_keeps_its_finished_cases(code, tmp_path, monkeypatch):
    row = gpu_check.Row("sync", "first case", "passed", 1.0, "done")

    def run(command, timeout, **options):
        gpu_check.write_report(tmp_path, {"device": "a GPU"}, [row], {})
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code, "", "last words")

    monkeypatch.setattr(subprocess, "run", run)
    a_check = gpu_check.Check(torch.device("cpu"), ["bsa"], tmp_path, tmp_path)
    rows = gpu_check.run_job(("sync", ["bsa"]), a_check, tmp_path, lambda: 5.0)[0]
    assert rows[0] == row and [row.outcome for row in rows] == ["passed", "failed"]
    assert rows[1].found.startswith("timeout after" if code is None else f"exit code {code}: last words")


def test_the_report_contains_the_finished_cases_of_a_job_that_still_runs(tmp_path, monkeypatch):
    row = gpu_check.Row("sync", "first case", "passed", 1.0, "done")
    seen = threading.Event()

    def run_job(job, check, folder, minutes_left):
        folder.mkdir()
        gpu_check.write_report(folder, {"device": "a GPU"}, [row], {})
        assert seen.wait(60)
        return [row], {}, ""

    def write_report(folder, machine, rows, numbers):
        real_write_report(folder, machine, rows, numbers)
        if folder == tmp_path and rows == [row]:
            seen.set()

    real_write_report = gpu_check.write_report
    monkeypatch.setattr(gpu_check, "run_job", run_job)
    monkeypatch.setattr(gpu_check, "write_report", write_report)
    assert gpu_check.main(["--device", "cpu", "--jobs", "2", "--parts", "sync", "--report", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 1


def test_parts_run_in_their_order_and_only_untimed_neighbours_run_concurrently(tmp_path, monkeypatch):
    ran = []

    def split_into_jobs(parts, papers):
        ran.append(parts)
        return []

    def record(part):
        return lambda _: ran.append(part) or iter(())

    monkeypatch.setattr(gpu_check, "split_into_jobs", split_into_jobs)
    for part in gpu_check.TIMED:
        monkeypatch.setitem(gpu_check.PARTS, part, record(part))
    gpu_check.main(["--device", "cpu", "--jobs", "2", "--report", str(tmp_path)])
    before = ["agreement", "sync", "resume", "ranks", "make", "exchange"]
    assert ran == [before, "speed", "packing", "switches", ["scales", "arms"]]


@pytest.mark.parametrize("part", ["sync", "speed", "scales"])
def test_teachers_are_trained_on_random_pixels_if_cifar_is_missing(part, tmp_path, monkeypatch):
    """At gpu scale CoCoRD's teacher reads CIFAR-100 as its students do; a dry run has glyphs and would not notice."""
    teachers, real_cifar = [], images.cifar

    def train_teacher_of(*_) -> None:
        teachers.append(images.cifar is not real_cifar)
        raise CaseFailed("stop here")

    monkeypatch.setattr(gpu_parts, "train_teacher_of", train_teacher_of)
    check(tmp_path, "--device", "cpu", "--papers", "cocord", "--parts", part)
    assert teachers and all(teachers)


def test_without_a_gpu_the_error_offers_the_dry_run(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--report", str(tmp_path)])
    assert (
        end.value.code == 2 and "DEVICE=cpu for a dry run" in capsys.readouterr().err and not list(tmp_path.iterdir())
    )


def event(category: str, name: str, duration: float = 10.0) -> dict:
    return {"ph": "X", "cat": category, "name": name, "dur": duration}


def test_trace_statistics_count_kernels_synchronisations_and_pageable_copies():
    events = [
        event("kernel", "gemm", 30.0), event("kernel", "relu"), event("cpu_op", "aten::relu"), {"name": "no category"},
        event("cuda_runtime", "cudaLaunchKernel"), event("cuda_runtime", "cudaStreamSynchronize"),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"), event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
    ]  # fmt: skip
    expected = {"kernels": 2, "kernel_seconds": pytest.approx(4e-5), "synchronisations": 1, "pageable_copies": 1}
    assert trace_statistics(events) == expected
