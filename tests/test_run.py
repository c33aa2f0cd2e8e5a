"""A run's folder: files by content, moves, another environment, and the log."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from common import checkpoints, devices
from common.run import Run, load_finished, read_log

CPU = torch.device("cpu")
SCRIPT = "simsiam/train.py"


def arguments(**changes) -> dict:
    return {"seed": 0, "data": "data", "lr": 0.1, "device": "cpu", "resume_elsewhere": False, **changes}


def start(folder: Path, replace: bool = False, environment: dict | None = None, **changes) -> Run:
    """Open a run and write or check its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, arguments(**changes), SCRIPT, replace)
    if not run.finished:
        facts = devices.environment(CPU) | {"data": "digest"} | (environment or {})
        run.write_config("data, network", facts, run.arguments["resume_elsewhere"])
    return run


def train(run: Run, epochs: range) -> nn.Linear:
    """Take the epochs of `epochs` that the run has not finished."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = run.resume(model, optimizer)
    for epoch in epochs[0 if first is None else epochs.index(first) + 1 :]:
        run.end_epoch(epoch, epochs[-1], {"loss": float(epoch)})
    return model


def finish(run: Run, epochs: int) -> None:
    model = train(run, range(epochs + 1))
    run.save_model({"model": model.state_dict(), "epoch": epochs, "diverged": False})


def error_of(capsys, function, *given, **named) -> str:
    with pytest.raises(SystemExit) as end:
        function(*given, **named)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    return printed


# ---------------------------------------------------------------------------------------------- moves


@pytest.mark.parametrize("flag", ["data", "data_file", "init_from"])
def test_a_file_counts_by_its_content_and_not_by_its_place(flag, tmp_path, capsys):
    (tmp_path / "first.npy").write_bytes(b"content")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "first.npy", tmp_path / "elsewhere/second.npy")
    (tmp_path / "other.npy").write_bytes(b"CONTENT")
    out = tmp_path / "run"
    train(start(out, **{flag: str(tmp_path / "first.npy")}), range(2))
    moved = start(out, **{flag: str(tmp_path / "elsewhere/second.npy")})
    model = nn.Linear(1, 1)
    assert moved.resume(model, torch.optim.SGD(model.parameters(), 0.1)) == 1
    printed = error_of(capsys, start, out, **{flag: str(tmp_path / "other.npy")})
    assert f"--{flag.replace('_', '-')}" in printed and "other flags" in printed
    finish(moved, 1)
    (tmp_path / "first.npy").unlink()
    assert load_finished(out, SCRIPT)[2]["epoch"] == 1  # the place at the beginning is not looked at
    assert start(out, **{flag: str(tmp_path / "elsewhere/second.npy")}).finished


def test_a_file_that_is_gone_is_named_before_anything_else(tmp_path, capsys):
    assert "--data-file nowhere cannot be read (No such file" in error_of(
        capsys, start, tmp_path / "run", data_file="nowhere"
    )


def test_other_content_moves_a_finished_run_aside_with_replace(tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(b"content")
    out = tmp_path / "run"
    finish(start(out, data=str(tmp_path / "x.npy")), 1)
    (tmp_path / "x.npy").write_bytes(b"CONTENT")
    assert not start(out, replace=True, data=str(tmp_path / "x.npy")).finished
    assert (tmp_path / "run.replaced-1/model.pt").exists()


# ---------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("change", [{"torch": "3.0"}, {"device": "Another GPU"}, {"threads": 7}, {"world": 2}])
def test_another_environment_needs_one_flag_and_is_recorded(change, tmp_path, capsys):
    out = tmp_path / "run"
    train(start(out), range(2))
    (name, value), *_ = change.items()
    printed = error_of(capsys, start, out, environment=change)
    assert f"{name} " in printed and f"-> {value}" in printed and "--resume-elsewhere" in printed
    start(out, environment=change, resume_elsewhere=True)
    recorded = json.loads((out / "args.json").read_text())["provenance"]
    assert recorded[name] == devices.environment(CPU)[name] and recorded["resumed"][-1][name] == value
    start(out, environment=change)  # it resumes where it is now without the flag
    assert error_of(capsys, start, out)  # and not where it began
    assert len(json.loads((out / "args.json").read_text())["provenance"]["resumed"]) == 1


def test_other_data_are_refused_whatever_the_flag(tmp_path, capsys):
    train(start(tmp_path / "run"), range(2))
    assert "began with data digest" in error_of(
        capsys, start, tmp_path / "run", environment={"data": "other"}, resume_elsewhere=True
    )


# ---------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize("damage", ["gone", "empty", "first lines lost", "half a line", "no JSON"])
def test_a_resumed_run_restores_its_log(damage, tmp_path):
    out = tmp_path / "run"
    train(start(out), range(4))
    log = (out / "train.jsonl").read_text()
    damaged = {"empty": "", "first lines lost": log[log.index("\n") + 1 :], "half a line": log[:-9], "no JSON": "{\n"}
    (out / "train.jsonl").unlink() if damage == "gone" else (out / "train.jsonl").write_text(damaged[damage])
    finish(start(out), 5)
    assert (out / "train.jsonl").read_text().startswith(log)
    assert [line["loss"] for line in read_log(out, 5)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [0, 1], [0, 1, 1, 2], [2, 1, 0], []])
def test_a_log_with_gaps_is_not_evaluated(kept, tmp_path, capsys):
    finish(start(tmp_path / "run"), 2)
    lines = (tmp_path / "run/train.jsonl").read_text().splitlines()
    (tmp_path / "run/train.jsonl").write_text("".join(f"{lines[epoch]}\n" for epoch in kept))
    assert "train.jsonl is damaged (epochs are missing)" in error_of(capsys, read_log, tmp_path / "run", 2)


def test_a_state_of_an_older_version_is_named(tmp_path, capsys):
    out = tmp_path / "run"
    train(start(out), range(2))
    for path in out.glob("state*.pt"):
        state = checkpoints.load(path)
        del state["log"]
        checkpoints.save(path, state)
    with pytest.raises(SystemExit):
        train(start(out), range(3))
    printed = capsys.readouterr().err
    assert "older version" in printed and "no usable state" in printed
