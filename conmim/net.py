"""The networks of ConMIM: its vision transformer, its projector, the fine-tuned classifier, and the official names.

Names of parameters are those of the authors' files (a BEiT), in both layouts: pre-training, where one relative position
table serves every block, and fine-tuning, where every block has its own.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = ("relative", "absolute", "both")  # both: the relative table and learned absolute positions


class Shape(NamedTuple):
    """Of a vision transformer: patch side in pixels, width, blocks, heads."""

    patch: int
    width: int
    depth: int
    heads: int


NETWORKS = {
    "vit_demo": Shape(4, 64, 2, 4),
    "vit_tiny_4": Shape(4, 192, 12, 3),
    "vit_small_8": Shape(8, 384, 12, 6),
    "vit_small_16": Shape(16, 384, 12, 6),
    "vit_base_16": Shape(16, 768, 12, 12),
}


@torch.no_grad()
def initialise(weight: Tensor) -> None:
    """Normal with deviation 0.02, cut at +-0.02 (one deviation, as BEiT's authors mean it), by its inverse."""
    within = math.erf(1 / math.sqrt(2))
    weight.uniform_(-within, within).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-0.02, 0.02)


def relative_places(grid: int) -> Tensor:
    """Row of the relative table for every (query, key) pair, ((1 + N) * (1 + N),) int64 for N = grid * grid patches.

    The row of a pair of patches follows from their distance down and across, (2 grid - 1)^2 rows; the last three rows
    stand for class to patch, patch to class and class to class.
    """
    span = 2 * grid - 1
    place = torch.arange(grid * grid)
    down, across = (axis[:, None] - axis[None] + grid - 1 for axis in (place // grid, place % grid))
    rows = torch.empty(1 + grid * grid, 1 + grid * grid, dtype=torch.int64)
    rows[1:, 1:] = down * span + across
    rows[0, :], rows[:, 0], rows[0, 0] = span * span, span * span + 1, span * span + 2
    return rows.flatten()


def relative_bias(table: Tensor, places: Tensor) -> Tensor:
    """What is added to the attention's logits, (1, heads, 1 + N, 1 + N): the table's rows at `places`."""
    side = round(len(places) ** 0.5)
    return table.index_select(0, places).view(1, side, side, -1).permute(0, 3, 1, 2).contiguous()


class RelativePositions(nn.Module):
    """The table of relative position biases, ((2 grid - 1)^2 + 3, heads), which starts at zero."""

    places: Tensor

    def __init__(self, grid: int, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        self.register_buffer("places", relative_places(grid), persistent=False)

    def forward(self) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.places)


class Attention(nn.Module):
    """Self-attention with biases for queries and values, none for keys; with a `grid`, a relative table of its own."""

    k_bias: Tensor
    places: Tensor

    def __init__(self, width: int, heads: int, grid: int | None = None):
        super().__init__()
        self.heads, self.has_table = heads, grid is not None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)
        if grid is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
            self.register_buffer("places", relative_places(grid), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, width) -> (B, T, width); `bias` (1, heads, T, T) is added to the logits."""
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.has_table:
            bias = relative_bias(self.relative_position_bias_table, self.places).to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """width -> 4 width -> width with an exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are scaled by gamma_1 and gamma_2 (LayerScale).

    With `drop_path` and in training mode an image's branch is left out with that probability (stochastic depth).
    """

    def __init__(self, width: int, heads: int, layer_scale: float, grid: int | None = None, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, grid)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.drop(self.gamma_1 * self.attn(self.norm1(x), bias))
        return x + self.drop(self.gamma_2 * self.mlp(self.norm2(x)))

    def drop(self, branch: Tensor) -> Tensor:
        """Leave the branch out for some images and enlarge it for the others, so that its mean stays."""
        if not self.drop_path or not self.training:
            return branch
        kept = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1, device=branch.device) < kept) / kept


class PatchEmbed(nn.Module):
    """Squares of `patch` pixels, each through one linear map: (B, 3, S, S) -> (B, N, width)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """What pre-training and fine-tuning share: patch embedding, class token, blocks; initialised as the authors do."""

    def __init__(self, size: int, patch: int, width: int, absolute: bool, blocks: list[Block]):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(blocks)
        initialise(self.cls_token)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                initialise(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(blocks, 1):
                block.attn.proj.weight.div_((2 * number) ** 0.5)
                block.mlp.fc2.weight.div_((2 * number) ** 0.5)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width)) if absolute else None

    def embed(self, patches: Tensor) -> Tensor:
        """(B, N, width) -> (B, 1 + N, width): the class token before the patches, and absolute positions."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return x if self.pos_embed is None else x + self.pos_embed


class ViT(Transformer):
    """The network that is pre-trained: masked patches are replaced by a learned token, all tokens go through."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, layer_scale: float, positions: str
    ):  # fmt: skip
        blocks = [Block(width, heads, layer_scale) for _ in range(depth)]
        super().__init__(size, patch, width, positions != "relative", blocks)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.rel_pos_bias = None if positions == "absolute" else RelativePositions(size // patch, heads)
        initialise(self.mask_token)
        if self.pos_embed is not None:
            initialise(self.pos_embed)  # last: networks without it start equal in all the rest

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) -> tokens after the final norm, (B, 1 + N, width), the class token first.

        mask (B, N) bool: the patches that the mask token replaces.
        """
        patches = self.patch_embed(x)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias().to(patches.dtype)
        if mask is not None:
            patches = torch.where(mask[:, :, None], self.mask_token.to(patches.dtype), patches)
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class Projector(nn.Sequential):
    """width -> hidden -> hidden -> dim with batch norms, the last one affine-free; official numbering 0 to 7.

    (B, T, width) -> (B, T, dim): its batch is all tokens of all images.
    """

    def __init__(self, width: int, hidden: int, dim: int):
        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias=False)
            initialise(layer.weight)
            return layer

        parts: list[nn.Module] = []
        for inputs in (width, hidden):
            parts += [linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        super().__init__(*parts, linear(hidden, dim), nn.BatchNorm1d(dim, affine=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


class Classifier(Transformer):
    """The network that is fine-tuned: a relative table in every block, and a linear head on the mean of the patches.

    `drop_path` is the last block's; it grows linearly from zero at the first one.
    """

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, layer_scale: float, positions: str,
        classes: int, drop_path: float = 0.0,
    ):  # fmt: skip
        grid = None if positions == "absolute" else size // patch
        rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]
        blocks = [Block(width, heads, layer_scale, grid, rate) for rate in rates]
        super().__init__(size, patch, width, positions != "relative", blocks)
        self.fc_norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        initialise(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.001)
        if self.pos_embed is not None:
            initialise(self.pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, classes)."""
        x = self.embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


# ------------------------------------------------------------------------------------------------- official names


def to_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Classifier takes from a pre-trained ViT's state: all but the mask token and the final norm.

    The shared table goes into every block, to be trained there separately; `fc_norm` and `head` start afresh.
    """
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("mask_token", "norm.", "rel_pos_bias.", "lm_head."))
    }
    if (table := state.get("rel_pos_bias.relative_position_bias_table")) is not None:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        kept |= {f"blocks.{i}.attn.relative_position_bias_table": table.clone() for i in range(depth)}
    return kept


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pre-training file's `model` under our names, vit.* and projector.*; its index and its unused head are left."""
    named = {}
    for name, tensor in state.items():
        if name.startswith("projectors."):
            named[name.replace("projectors.", "projector.", 1)] = tensor
        elif not name.startswith("lm_head.") and not name.endswith("relative_position_index"):
            named[f"vit.{name}"] = tensor
    return named
