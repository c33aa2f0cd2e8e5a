"""`make gpu-check` as a dry run on the CPU, and faults planted in it: each must stand in its table as failed."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_tools import TOLERANCE, distance, trace_facts
from torch._subclasses import FakeTensorMode

from common.run import Run
from simsiam import train

HALVES = list(gpu_check.PARTS)[:7], list(gpu_check.PARTS)[7:]


def check(folder: Path, *flags: str) -> tuple[int, dict, str]:
    """(exit code, report.json, what was printed into report.md)."""
    code = gpu_check.main(["--data", str(folder / "data"), "--report", str(folder / "report"), *flags])
    report = folder / "report"
    assert 0 < len(list(report.iterdir())) <= 8
    return code, json.loads((report / "report.json").read_text()), (report / "report.md").read_text()


@pytest.mark.parametrize("parts", HALVES, ids=["agrees-and-runs", "in-use-and-fast"])
def test_a_dry_run_passes_in_all_parts_and_says_what_it_is(parts, tmp_path, capsys):
    code, report, page = check(tmp_path, "--device", "cpu", "--parts", *parts)
    failed = [row for row in report["rows"] if row["outcome"] not in ("passed", "not applicable")]
    assert code == 0 and not failed
    assert {row["part"] for row in report["rows"]} == set(parts) == set(report["seconds"])
    assert gpu_check.DRY in page and gpu_check.DRY in capsys.readouterr().out
    assert report["machine"]["device"] == "cpu" and report["machine"]["torch"] == torch.__version__


@pytest.mark.cuda
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_this_gpu_passes(part, tmp_path):
    assert check(tmp_path, "--device", "cuda", "--parts", part)[0] == 0


def mixed_devices(loss: torch.Tensor) -> torch.Tensor:
    """As if a term of the loss had been made on another device."""
    with FakeTensorMode():
        return loss + torch.zeros((), device="cuda").expand(1)


def wrong_gradient(loss: torch.Tensor, losses: list = []) -> torch.Tensor:  # noqa: B006 (counts the calls)
    """From the second loss on, which is the device's, a hundredth too large."""
    losses.append(1)
    if len(losses) > 1:
        loss.register_hook(lambda slope: 1.01 * slope)
    return loss


def read_back(loss: torch.Tensor) -> torch.Tensor:
    """As a meter that is read at every step does."""
    loss.item()
    return loss


@pytest.mark.parametrize(
    ("fault", "part", "words"),
    [
        (mixed_devices, "agreement", "loss and gradients"),
        (wrong_gradient, "agreement", "whole gradient 0.01 longer or shorter"),
        (read_back, "sync", "a step waits for the device: aten::_local_scalar_dense"),
    ],
)
def test_a_fault_in_a_step_stands_in_the_table(fault, part, words, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "simsiam_loss", lambda *all, real=train.simsiam_loss: fault(real(*all)))
    code, report, page = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", part, "scales")
    failed = [row for row in report["rows"] if row["outcome"] == "failed"]
    assert code == 1 and failed[0]["part"] == part and words in page
    assert "scales" in [row["part"] for row in report["rows"]]  # the other part was run
    assert "Traceback" in (tmp_path / "report/log.txt").read_text()


def test_a_lost_optimiser_is_further_away_than_a_gpus_noise_may_be(tmp_path, monkeypatch):
    """The tolerance of `resume`: momentum that is forgotten after one epoch of two steps shows."""
    real, found = Run.state, []

    def forgetful(run: Run, device: torch.device):
        if (state := real(run, device)) is not None:
            state["optimizer"]["state"] = {}
        return state

    monkeypatch.setattr(Run, "state", forgetful)
    monkeypatch.setattr("gpu_parts.distance", lambda *all: found.append(distance(*all)) or found[-1])
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", "resume")
    assert code == 1 and "of the way apart" in report["rows"][0]["found"] and found[-1] > TOLERANCE


def test_a_script_that_stops_is_told_by_its_own_sentence(tmp_path, monkeypatch):
    def stopping(*_) -> None:
        train.stop("--batch 3 is no batch")

    monkeypatch.setattr(train, "main", stopping)
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "simsiam", "--parts", "exchange")
    assert code == 1 and report["rows"][0]["found"] == "error: --batch 3 is no batch"


def test_cases_that_cannot_be_listed_and_cases_without_time(tmp_path, monkeypatch):
    def unlisted(_):
        raise OSError("no make here")
        yield

    monkeypatch.setitem(gpu_check.PARTS, "arms", unlisted)
    flags = ["--device", "cpu", "--papers", "bsa", "--parts"]
    code, report, _ = check(tmp_path, *flags, "arms", "sync")
    assert code == 1 and [row["outcome"] for row in report["rows"]] == ["failed", "passed", "not applicable"]
    assert "no make here" in report["rows"][0]["found"]
    code, report, _ = check(tmp_path, *flags, "sync", "--minutes", "0")
    assert code == 1 and report["counts"] == {"not run": 2}


def test_parts_side_by_side_come_back_in_one_report(tmp_path, monkeypatch):
    """As on a GPU: a process for each part, here the first one's ends without a report."""
    real = subprocess.run

    def run(words, **keywords):
        crashes = "scales" in words
        return real([sys.executable, "-c", "raise OSError('crashed')"] if crashes else words, **keywords)

    monkeypatch.setattr(subprocess, "run", run)
    code, report, _ = check(tmp_path, "--device", "cpu", "--papers", "bsa", "--parts", "scales", "sync", "--jobs", "2")
    outcomes = [(row["part"], row["outcome"]) for row in report["rows"]]
    assert code == 1 and outcomes == [("scales", "failed"), ("sync", "passed"), ("sync", "not applicable")]
    assert report["rows"][0]["found"] == "ended with 1: OSError: crashed"
    assert "=== sync: " in (tmp_path / "report/log.txt").read_text()


def test_without_a_gpu_only_the_dry_run_is_offered(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--report", str(tmp_path)])
    assert end.value.code == 2 and "DEVICE=cpu is a dry run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def event(cat: str, name: str, dur: float = 10.0) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "dur": dur}


def test_a_trace_tells_kernels_synchronisations_and_pageable_copies():
    events = [
        event("kernel", "gemm", 30.0), event("kernel", "relu"), event("cpu_op", "aten::relu"), {"name": "no category"},
        event("cuda_runtime", "cudaLaunchKernel"), event("cuda_runtime", "cudaStreamSynchronize"),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"), event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
    ]  # fmt: skip
    found = trace_facts(events)
    assert found == {"kernels": 2, "kernel_seconds": pytest.approx(4e-5), "synchronisations": 1, "pageable_copies": 1}
