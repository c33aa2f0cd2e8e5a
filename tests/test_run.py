"""Run folders: input files are compared by content, runs resume in another environment, and the log is restored."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from common import checkpoints, devices
from common.run import Run, load_finished, read_log

CPU = torch.device("cpu")
SCRIPT = "simsiam/train.py"
EVAL_SCRIPT = str(ROOT / "simsiam/eval.py")


def arguments(**changes) -> dict:
    default = {"seed": 0, "data_seed": 0, "data": "data", "lr": 0.1, "device": "cpu", "precision": "auto"}
    return default | {"replace": False, "tensorboard": False, "resume_elsewhere": False} | changes


def start(folder: Path, environment: dict | None = None, **changes) -> Run:
    """Open a run. Writes args.json, or checks the environment of a run that resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(arguments(out=str(folder), **changes), SCRIPT)
    if not run.finished:
        recorded = devices.environment(CPU) | {"data": "digest"} | (environment or {})
        run.write_config("data, network", recorded)
    return run


def train(run: Run, epochs: range) -> nn.Linear:
    """Train the `epochs` that the run has not finished. Returns the model."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    finished = run.resume(model, optimizer)
    for epoch in epochs[0 if finished is None else epochs.index(finished) + 1 :]:
        run.end_epoch(epoch, epochs[-1], {"loss": float(epoch)})
    return model


def finish(run: Run, epochs: int) -> None:
    model = train(run, range(epochs + 1))
    run.save_model({"model": model.state_dict(), "epoch": epochs, "diverged": False})


def error_line(capsys, function, *arguments, **keywords) -> str:
    """Return the error message of a call that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        function(*arguments, **keywords)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    return printed


def test_a_folder_in_place_of_a_file_is_an_error_before_training(tmp_path, capsys):
    for name in ("args.json", "model.pt", "metrics.json"):
        (tmp_path / name).mkdir()
        assert f"{tmp_path / name} is a folder" in error_line(capsys, start, tmp_path)
        (tmp_path / name).rmdir()


def test_tensorboard_gets_the_numbers_of_each_epoch(tmp_path, monkeypatch, capsys):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "0/tensorboard") and purge_step == 0
            written.clear()

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # import fails, as without the package
    assert "-m pip install tensorboard" in error_line(capsys, start, tmp_path / "0", tensorboard=True)
    package = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    train(start(tmp_path / "0"), range(2))
    assert written == []
    finish(start(tmp_path / "0", tensorboard=True), 2)  # the flag is no difference; earlier epochs are written too
    assert written == [("loss", float(epoch), epoch) for epoch in range(3)]


# ---------------------------------------------------------------------------------------------- input files


@pytest.mark.parametrize("flag", ["data", "data_file", "init_from"])
def test_an_input_file_may_move_but_not_change(flag, tmp_path, capsys):
    (tmp_path / "first.npy").write_bytes(b"content")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "first.npy", tmp_path / "elsewhere/second.npy")
    (tmp_path / "other.npy").write_bytes(b"CONTENT")
    out = tmp_path / "run"
    train(start(out, **{flag: str(tmp_path / "first.npy")}), range(2))
    moved = start(out, **{flag: str(tmp_path / "elsewhere/second.npy")})
    model = nn.Linear(1, 1)
    assert moved.resume(model, torch.optim.SGD(model.parameters(), 0.1)) == 1
    printed = error_line(capsys, start, out, **{flag: str(tmp_path / "other.npy")})
    assert f"--{flag.replace('_', '-')}" in printed and "other flags" in printed
    finish(moved, 1)
    (tmp_path / "first.npy").unlink()
    assert load_finished(out, EVAL_SCRIPT)[2]["epoch"] == 1  # the original path is not read again
    assert start(out, **{flag: str(tmp_path / "elsewhere/second.npy")}).finished


def test_a_missing_input_file_is_an_error(tmp_path, capsys):
    printed = error_line(capsys, start, tmp_path / "run", data_file="nowhere")
    assert "--data-file nowhere does not exist" in printed


def test_replace_renames_a_finished_run_on_other_data(tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(b"content")
    out = tmp_path / "run"
    finish(start(out, data=str(tmp_path / "x.npy")), 1)
    (tmp_path / "x.npy").write_bytes(b"CONTENT")
    assert not start(out, replace=True, data=str(tmp_path / "x.npy")).finished
    assert "moved the old run (other flags: --data " in capsys.readouterr().out
    assert (tmp_path / "run.replaced-1/model.pt").exists()


# ---------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("change", [{"torch": "3.0"}, {"device": "Another GPU"}, {"threads": 7}, {"world": 2}])
def test_resuming_in_another_environment_requires_a_flag_and_is_recorded(change, tmp_path, capsys):
    out = tmp_path / "run"
    train(start(out), range(2))
    (name, value), *_ = change.items()
    printed = error_line(capsys, start, out, environment=change)
    assert f"{name} " in printed and f"-> {value}" in printed and "--resume-elsewhere" in printed
    start(out, environment=change, resume_elsewhere=True)
    recorded = json.loads((out / "args.json").read_text())["provenance"]
    assert recorded[name] == devices.environment(CPU)[name] and recorded["resumed"][-1][name] == value
    start(out, environment=change)  # in the new environment it resumes without the flag
    assert error_line(capsys, start, out)  # but no longer in the original environment
    assert len(json.loads((out / "args.json").read_text())["provenance"]["resumed"]) == 1


def test_another_precision_is_a_change_of_the_environment_that_is_recorded(tmp_path, capsys):
    gpu = {"device": "Another GPU"}
    for precision, on_gpu in (("auto", "bfloat16"), ("float32", "float32")):
        out = tmp_path / precision
        train(start(out, precision=precision), range(2))
        printed = error_line(capsys, start, out, environment=gpu, precision=precision)
        assert ("precision float32 -> bfloat16" in printed) == (precision == "auto")
        start(out, environment=gpu, resume_elsewhere=True, precision=precision)
        recorded = json.loads((out / "args.json").read_text())["provenance"]
        assert recorded["precision"] == "float32" and recorded["resumed"][-1]["precision"] == on_gpu


def test_a_run_of_an_earlier_version_without_recorded_precision_resumes(tmp_path):
    train(start(tmp_path), range(2))
    config = json.loads((tmp_path / "args.json").read_text())
    del config["provenance"]["precision"]
    (tmp_path / "args.json").write_text(json.dumps(config))
    finish(start(tmp_path), 3)
    assert load_finished(tmp_path, EVAL_SCRIPT)[2]["epoch"] == 3


def test_resume_elsewhere_does_not_allow_other_data(tmp_path, capsys):
    train(start(tmp_path / "run"), range(2))
    assert "data was digest, now other" in error_line(
        capsys, start, tmp_path / "run", environment={"data": "other"}, resume_elsewhere=True
    )


# ---------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize("damage", ["missing", "empty", "first line missing", "half a line", "not JSON"])
def test_a_damaged_log_is_restored_on_resume(damage, tmp_path):
    out = tmp_path / "run"
    train(start(out), range(4))
    log = (out / "train.jsonl").read_text()
    damaged = {
        "empty": "",
        "first line missing": log[log.index("\n") + 1 :],
        "half a line": log[:-9],
        "not JSON": "{\n",
    }
    (out / "train.jsonl").unlink() if damage == "missing" else (out / "train.jsonl").write_text(damaged[damage])
    finish(start(out), 5)
    assert (out / "train.jsonl").read_text().startswith(log)
    assert [line["loss"] for line in read_log(out, 5)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [0, 1], [0, 1, 1, 2], [2, 1, 0], []])
def test_a_log_with_missing_epochs_is_an_error(kept, tmp_path, capsys):
    finish(start(tmp_path / "run"), 2)
    lines = (tmp_path / "run/train.jsonl").read_text().splitlines()
    (tmp_path / "run/train.jsonl").write_text("".join(f"{lines[epoch]}\n" for epoch in kept))
    assert "train.jsonl is damaged (epochs are missing)" in error_line(capsys, read_log, tmp_path / "run", 2)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_a_state_of_another_code_version_is_an_error(number, tmp_path, capsys):
    out = tmp_path / "run"
    train(start(out), range(2))
    for path in out.glob("state*.pt"):
        state = checkpoints.load(path) | {"format": number}
        checkpoints.save(path, state)
    with pytest.raises(SystemExit):
        train(start(out), range(3))
    printed = capsys.readouterr().err
    assert "another version" in printed and "no usable state" in printed
