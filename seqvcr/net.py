"""GPT-2 that returns the hidden states of all levels and the logits of the answer only.

Pre-LayerNorm blocks, tanh-approximated GELU, biases everywhere, learned positions, head tied to the token embedding,
GPT-2's initialisation (std 0.02, divided by sqrt(2 layers) for projections into the residual stream).
Parameter names are those of Hugging Face's checkpoints, whose weight matrices are transposed (`read_gpt2`).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints, seeding
from common.cli import fail
from common.weights import read_weights

# Byte-pair tokens of GPT-2, each with a leading space. "=" ends the question, so it is mapped to eos.
GPT2_TOKENS = {
    **{str(digit): token for digit, token in enumerate((657, 352, 362, 513, 604, 642, 718, 767, 807, 860))},
    "*": 1635,
    "=": 50256,
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in Hugging Face's checkpoints, not parameters
GPT2_FILES = "Hugging Face's model.safetensors or pytorch_model.bin"
INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in self.c_attn(x).chunk(3, dim=2))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward layer with tanh-GELU, (B, T, width) to (B, T, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-LayerNorm transformer block, (B, T, width) to (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp, self.drop = Attention(width, heads, dropout), MLP(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Causal transformer with `vocabulary` tokens and at most `length` positions.

    Embeddings and blocks are initialised from separate seeds. Networks that differ in `vocabulary` or `length` have
    equal initial embeddings of the tokens and positions that both have.
    """

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int, dropout: float, seed: int):
        super().__init__()
        self.wte = init_embedding(vocabulary, width, seed, "tokens")
        self.wpe = init_embedding(length, width, seed, "positions")
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList()
        for number in range(layers):
            with seeding.seeded_fork_rng(seed, f"block {number}"):
                self.h.append(init_weights(Block(width, heads, dropout), layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, n_targets: int) -> tuple[Tensor, list[Tensor]]:
        """Return (logits of the last `n_targets` positions (B, n_targets, vocabulary), levels) for int64 tokens (B, T).

        Levels are (B, T, D) each. Level 0 is the sum of embeddings before dropout (f_0); level l is the output of block
        l, except the last one, which is after the final LayerNorm.
        """
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        levels = [x]
        x = self.drop(x)
        for block in self.h:
            x = block(x)
            levels.append(x)
        levels[-1] = self.ln_f(x)
        return F.linear(levels[-1][:, -n_targets:], self.wte.weight), levels


def init_embedding(rows: int, width: int, seed: int, name: str) -> nn.Embedding:
    """Return an embedding with GPT-2's initialisation. Row i is the same for any number of rows."""
    weight = torch.empty(rows, width)
    with seeding.seeded_fork_rng(seed, name):
        for row in weight:  # one draw for all rows would depend on their number
            nn.init.normal_(row, std=INIT_STD)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def init_weights(block: Block, layers: int) -> Block:
    """Initialise a block of a network of `layers` blocks like GPT-2, in place."""
    for name, parameter in block.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * layers))
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            nn.init.normal_(parameter, std=INIT_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return block


def read_gpt2(path: Path) -> dict[str, Tensor]:
    """Return the weights of a GPT-2 checkpoint (.safetensors or .bin) as a state dict of `GPT`, float32.

    Accepts checkpoints of the network without head and of the language model (prefix `transformer.`), with or without
    causal masks.
    Exits with code 2 if the file cannot be read, or if its head is not tied to the token embedding.
    """
    tensors = read_weights(path, "--init-from", GPT2_FILES).tensors
    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if "wte.weight" not in weights:
        fail(f"--init-from {path} is not a GPT-2 checkpoint (no wte.weight): give {GPT2_FILES}")
    if not torch.equal(weights.pop("lm_head.weight", weights["wte.weight"]), weights["wte.weight"]):
        fail(
            f"--init-from {path} is not a GPT-2 checkpoint (lm_head.weight is not tied to wte.weight): "
            f"give {GPT2_FILES}"
        )
    parameters = {name: tensor.float() for name, tensor in weights.items() if not name.endswith(MASK_BUFFERS)}
    return {name: tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor for name, tensor in parameters.items()}


def init_from_gpt2(model: GPT, path: Path, new_tokens: int) -> None:
    """Load the weights of a GPT-2 checkpoint into `model`. Exits with code 2 if shapes or names differ.

    Positions beyond the model's length are dropped. The last `new_tokens` tokens of the model (the pause tokens) are
    not in the checkpoint and keep their initial embedding.
    """
    weights = read_gpt2(path)
    wte, length = model.wte.weight.detach().cpu(), len(model.wpe.weight)
    tokens, expected = len(weights["wte.weight"]), len(wte) - new_tokens
    if tokens != expected:
        fail(f"--init-from {path} has {tokens} tokens instead of {expected}: give GPT-2 with its original vocabulary")
    weights["wte.weight"] = torch.cat([weights["wte.weight"], wte[tokens:]])
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:length]
    checkpoints.load_weights(model, weights, f"--init-from {path}", "GPT-2 with the --layers and --width of this run")
