"""Reading weight files of other programs: formats, nested state dicts, prefixes, damage; no code is executed."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from common import weights
from common.weights import Weights, read_weights, recorded_accuracy

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(1)}


class Unknown:
    """A class that is not allowed in a weight file."""


def read(path: Path, **settings) -> Weights:
    return read_weights(path, "--weights", "a ResNet-50", **settings)


def error_line(path: Path, capsys, **settings) -> str:
    """Return the error message of a file that cannot be read."""
    with pytest.raises(SystemExit) as end:
        read(path, **settings)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: --weights") and str(path) in printed
    assert printed.count("\n") == 1 and "\x1b" not in printed and "Traceback" not in printed
    return printed


def write_safetensors(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b.weight":{"dtype":"F32","shape":[1],'
    header += b'"data_offsets":[24,28]}}'
    numbers = b"".join(tensor.numpy().tobytes() for tensor in TENSORS.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + numbers)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "encoder.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "student"])
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_keys_and_prefixes_in_both_formats_of_torch(key, prefix, legacy, tmp_path):
    state = {prefix + name: tensor for name, tensor in TENSORS.items()}
    content = {"epoch": 3, key: state} if key else state
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    tensors, other = read(tmp_path / "x.bin", state_dict_keys=("student",), prefixes=("encoder.",))
    assert list(tensors) == list(TENSORS) and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert other == ({"epoch": 3} if key else {})


def test_safetensors_files_are_detected_by_content_not_by_suffix(tmp_path):
    write_safetensors(tmp_path / "x.bin")
    tensors, _ = read(tmp_path / "x.bin")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.bin").read_bytes()[:-1])
    with pytest.raises(SystemExit):
        read(tmp_path / "cut.safetensors")


def test_a_prefix_of_only_some_names_is_not_removed(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert list(read(tmp_path / "x.pt").tensors) == ["module.a", "b"]


def test_a_flipped_bit_is_detected_by_the_checksum(tmp_path, capsys):
    torch.save(TENSORS, tmp_path / "x.bin")
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[content.index(TENSORS["a"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "x.bin").write_bytes(content)
    assert "checksum" in error_line(tmp_path / "x.bin", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_error_names_the_tensor_with_nan_inf_or_huge_values(value, tmp_path, capsys):
    torch.save({**TENSORS, "c": torch.tensor([0.0, value])}, tmp_path / "x.bin")
    assert ": c contains NaN" in error_line(tmp_path / "x.bin", capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains a list"),
        (torch.ones(2), "contains a Tensor"),
        ({"epoch": 3}, "contains no tensors"),
        ({"model": TENSORS, "args": Unknown()}, "(test_weights.Unknown)"),
    ],
)
def test_error_states_what_an_invalid_file_contains(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "x.bin")
    assert words in error_line(tmp_path / "x.bin", capsys)


@pytest.mark.parametrize(
    "content", [b"", b"hello, world", b"\x80\x02junk", pickle.dumps(print), b"PK\x03\x04" + bytes(9)]
)
def test_files_of_other_formats_exit_with_code_2(content, tmp_path, capsys):
    (tmp_path / "x.bin").write_bytes(content)
    error_line(tmp_path / "x.bin", capsys)


def test_truncated_file_folder_and_missing_file_exit_with_code_2(tmp_path, capsys):
    torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-5])
    assert "cut off" in error_line(tmp_path / "x.bin", capsys)
    assert "is a folder" in error_line(tmp_path, capsys)
    assert "does not exist" in error_line(tmp_path / "nothing.bin", capsys)


def test_only_classes_in_safe_are_unpickled(tmp_path, capsys):
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "x.bin")
    assert "argparse.Namespace" in error_line(tmp_path / "x.bin", capsys)
    assert read(tmp_path / "x.bin", safe=(argparse.Namespace,)).other["args"].lr == 1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(("value", "percent"), [(71, 71.0), (71.5, 71.5), (0.71, 71.0), (None, None)])
def test_a_recorded_accuracy_of_at_most_1_counts_as_a_fraction(value, percent, tmp_path):
    assert recorded_accuracy(Weights(TENSORS, {"accuracy": value}), "--weights", tmp_path) == pytest.approx(percent)


def test_an_accuracy_of_our_own_run_is_always_percent():
    assert recorded_accuracy(Weights({}, {"accuracy": 0.71, "arguments": {}}), "--weights", Path("x")) == 0.71
    assert recorded_accuracy(Weights({}, {}), "--weights", Path("x")) is None


@pytest.mark.parametrize("value", [{"top1": 71}, [71], "71", float("nan"), 171, -1, True])
def test_an_accuracy_outside_0_to_100_is_an_error(value, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        recorded_accuracy(Weights({}, {"accuracy": value}), "--weights", tmp_path / "x.pt")
    assert end.value.code == 2 and "accuracy" in capsys.readouterr().err


def test_every_prefix_ends_with_a_dot():
    assert all(prefix.endswith(".") for prefix in weights.PREFIXES)
