"""GPT-2 in the form that the regulariser needs: every level's hidden states, logits of the answer alone.

Pre-LayerNorm blocks, tanh-approximated GELU, biases everywhere, learned positions, head tied to the token embedding,
weights started as GPT-2's (deviation 0.02, projections into the residual stream divided by sqrt(2 layers)).
Names are those of the published checkpoints; their matrices are stored the other way round (`load_gpt2`).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints, seeding
from common.cli import fail
from common.files import DamagedFile

GPT2_TOKENS = {  # of its byte-pair vocabulary, each with the blank before it; "=" is the end of the question: eos
    **{str(digit): token for digit, token in enumerate((657, 352, 362, 513, 604, 642, 718, 767, 807, 860))},
    "*": 1635,
    "=": 50256,
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # in published files, but no parameters; c_attn.bias is one
DEVIATION = 0.02


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to the same."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp, self.drop = Attention(width, heads, dropout), MLP(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A causal transformer over `vocabulary` tokens and at most `length` positions; each part under its own seed."""

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int, dropout: float, seed: int):
        super().__init__()
        with seeding.forked(seed, "tokens"):
            self.wte = nn.Embedding(vocabulary, width)
            nn.init.normal_(self.wte.weight, std=DEVIATION)
        with seeding.forked(seed, "positions"):
            self.wpe = nn.Embedding(length, width)
            nn.init.normal_(self.wpe.weight, std=DEVIATION)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList()
        for number in range(layers):
            with seeding.forked(seed, f"block {number}"):
                self.h.append(started(Block(width, heads, dropout), layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, answer: int) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, T) int64 to (logits of the last `answer` positions (B, answer, vocabulary), levels).

        Levels, (B, T, D) each: 0 the sum of embeddings before dropout (f_0), l the output of block l, the last one
        after the final LayerNorm.
        """
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        levels = [x]
        x = self.drop(x)
        for block in self.h:
            x = block(x)
            levels.append(x)
        levels[-1] = self.ln_f(x)
        return F.linear(levels[-1][:, -answer:], self.wte.weight), levels


def started(block: Block, layers: int) -> Block:
    """GPT-2's initial weights."""
    for name, parameter in block.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=DEVIATION / math.sqrt(2 * layers))
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            nn.init.normal_(parameter, std=DEVIATION)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return block


def load_gpt2(path: Path) -> dict[str, Tensor]:
    """The weights of a published GPT-2 file, .safetensors or .bin, under our names and in our layout, float32.

    Takes files of the bare network and of the language model (`transformer.` before every name), with or without the
    causal masks. Stops (exit 2) where the file cannot be read or its head is not the token embedding.
    """
    try:
        if path.suffix == ".safetensors":
            found = {name: torch.from_numpy(array) for name, array in checkpoints.read_safetensors(path).items()}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        head = weights.pop("lm_head.weight", weights["wte.weight"])
    except FileNotFoundError:
        fail(f"--init-from {path}: no such file")
    except KeyError:
        fail(f"--init-from {path} holds no wte.weight: it is no GPT-2")
    except DamagedFile as error:
        fail(f"--init-from {error}")
    except Exception as error:  # torch raises many kinds for a cut or hostile file
        fail(f"--init-from {path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")
    if not torch.equal(head, weights["wte.weight"]):
        fail(f"--init-from {path}: its lm_head.weight is not its wte.weight, but GPT-2's head is tied")
    kept = {name: tensor.float() for name, tensor in weights.items() if not name.endswith(MASKS)}
    return {name: tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor for name, tensor in kept.items()}


def fill_gpt2(model: GPT, path: Path) -> None:
    """Give `model` the weights of a GPT-2 file: its positions are cut to the model's, and the tokens that the file does
    not know, the pause tokens, keep their start. Stops (exit 2) where shapes or names differ."""
    weights = load_gpt2(path)
    own = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name in ("wte.weight", "wpe.weight")}
    known = len(weights["wte.weight"])
    if known > len(own["wte.weight"]):
        fail(f"--init-from {path} has {known} tokens, more than the {len(own['wte.weight'])} of GPT-2 and pauses")
    weights["wte.weight"] = torch.cat([weights["wte.weight"], own["wte.weight"][known:]])
    weights["wpe.weight"] = weights.get("wpe.weight", own["wpe.weight"])[: len(own["wpe.weight"])]
    checkpoints.fit(model, weights, f"--init-from {path}")
