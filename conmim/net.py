"""The networks of ConMIM: vision transformer, projector and fine-tuned classifier.

Parameter names are those of the authors' checkpoints (a BEiT). In pre-training all blocks share one relative position
table; in fine-tuning each block has its own.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = ("relative", "absolute", "both")  # both: the relative table and learned absolute positions
POSITION_PARAMETERS = ("pos_embed", "relative_position_bias_table")  # ends of the parameters' names


class Shape(NamedTuple):
    """Shape of a vision transformer: patch side in pixels, width, number of blocks, number of heads."""

    patch: int
    width: int
    depth: int
    heads: int


NETWORKS = {
    "vit_demo": Shape(8, 64, 2, 4),
    "vit_tiny_4": Shape(4, 192, 12, 3),
    "vit_small_8": Shape(8, 384, 12, 6),
    "vit_small_16": Shape(16, 384, 12, 6),
    "vit_base_16": Shape(16, 768, 12, 12),
    "vit_large_16": Shape(16, 1024, 24, 16),
}


@torch.no_grad()
def init_weight(weight: Tensor) -> None:
    """Fill with a normal distribution of std 0.02, truncated at +-0.02 (one std, as BEiT's authors intend)."""
    bound = math.erf(1 / math.sqrt(2))  # erfinv maps uniform numbers in [-bound, bound] to the truncated normal
    weight.uniform_(-bound, bound).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-0.02, 0.02)


def relative_position_index(grid: int) -> Tensor:
    """Return the row of the relative position table for each (query, key) pair of tokens.

    The result is ((1 + N) * (1 + N),) int64 for N = grid * grid patches. A pair of patches is looked up by its vertical
    and horizontal distance, in (2 grid - 1)^2 rows. The last three rows are class to patch, patch to class, and class
    to class.
    """
    span = 2 * grid - 1
    position = torch.arange(grid * grid)
    vertical, horizontal = (axis[:, None] - axis[None] + grid - 1 for axis in (position // grid, position % grid))
    rows = torch.empty(1 + grid * grid, 1 + grid * grid, dtype=torch.int64)
    rows[1:, 1:] = vertical * span + horizontal
    rows[0, :] = span * span
    rows[:, 0] = span * span + 1
    rows[0, 0] = span * span + 2
    return rows.flatten()


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """Return the bias of the attention logits, (1, heads, 1 + N, 1 + N): the rows of the table at `index`."""
    tokens = round(len(index) ** 0.5)
    return table.index_select(0, index).view(1, tokens, tokens, -1).permute(0, 3, 1, 2).contiguous()


class RelativePositionBias(nn.Module):
    """The table of relative position biases, ((2 grid - 1)^2 + 3, heads), initialised to zero."""

    index: Tensor

    def __init__(self, grid: int, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        self.register_buffer("index", relative_position_index(grid), persistent=False)

    def forward(self) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.index)


class Attention(nn.Module):
    """Self-attention with biases for queries and values, none for keys. With a `grid` it has its own relative table."""

    k_bias: Tensor
    index: Tensor

    def __init__(self, width: int, heads: int, grid: int | None = None):
        super().__init__()
        self.heads, self.has_table = heads, grid is not None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)
        if grid is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
            self.register_buffer("index", relative_position_index(grid), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (B, T, width) to (B, T, width); `bias` (1, heads, T, T) is added to the logits."""
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.has_table:
            bias = relative_bias(self.relative_position_bias_table, self.index).to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """MLP of a block: width -> 4 width -> width with an exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. Its two residual branches are scaled by gamma_1 and gamma_2 (LayerScale).

    In training mode a branch is dropped per image with probability `drop_path` (stochastic depth).
    """

    def __init__(self, width: int, heads: int, layer_scale: float, grid: int | None = None, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, grid)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.stochastic_depth(self.gamma_1 * self.attn(self.norm1(x), bias))
        return x + self.stochastic_depth(self.gamma_2 * self.mlp(self.norm2(x)))

    def stochastic_depth(self, branch: Tensor) -> Tensor:
        """Drop the branch (B, T, width) for some images and scale it for the others, so that its mean is unchanged."""
        if not self.drop_path or not self.training:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1, device=branch.device) < keep) / keep


class PatchEmbed(nn.Module):
    """Linear embedding of patches of `patch` x `patch` pixels: (B, 3, S, S) -> (B, N, width)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """Base class for pre-training and fine-tuning: patch embedding, class token and blocks, with the authors'
    initialisation. A subclass may call `add_positions`.
    """

    pos_embed: nn.Parameter | None

    def __init__(self, patch: int, width: int, blocks: list[Block]):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_parameter("pos_embed", None)
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(blocks)
        init_weight(self.cls_token)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init_weight(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for depth, block in enumerate(blocks, 1):
                block.attn.proj.weight.div_((2 * depth) ** 0.5)
                block.mlp.fc2.weight.div_((2 * depth) ** 0.5)

    def add_positions(self, patches: int) -> None:
        """Add absolute positions. Call last: then the other initial weights do not depend on the positions."""
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, self.cls_token.shape[2]))
        init_weight(self.pos_embed)

    def embed(self, patches: Tensor) -> Tensor:
        """Prepend the class token and add absolute positions, if any: (B, N, width) -> (B, 1 + N, width)."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return x if self.pos_embed is None else x + self.pos_embed


class ViT(Transformer):
    """The pre-trained network. A learned token replaces masked patches, and the blocks process all tokens."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, layer_scale: float, positions: str):
        blocks = [Block(width, heads, layer_scale) for _ in range(depth)]
        super().__init__(patch, width, blocks)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.rel_pos_bias = None if positions == "absolute" else RelativePositionBias(size // patch, heads)
        init_weight(self.mask_token)
        if positions != "relative":
            self.add_positions((size // patch) ** 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens after the final norm, (B, 1 + N, width), class token first, for images (B, 3, S, S).

        mask (B, N) bool: patches to replace by the mask token.
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
    """MLP width -> hidden -> hidden -> dim with batch norms, the last one without affine parameters.

    Maps (B, T, width) to (B, T, dim). Batch statistics are over all tokens of all images. The layers are numbered 0 to
    7, as in the authors' code.
    """

    def __init__(self, width: int, hidden: int, dim: int):
        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias=False)
            init_weight(layer.weight)
            return layer

        layers: list[nn.Module] = []
        for inputs in (width, hidden):
            layers += [linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        super().__init__(*layers, linear(hidden, dim), nn.BatchNorm1d(dim, affine=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


class Classifier(Transformer):
    """The fine-tuned network: a relative table in each block, and a linear head on the mean of the patch tokens.

    The stochastic depth rate grows linearly from 0 in the first block to `drop_path` in the last. The head's initial
    weights are multiplied by `head_scale`.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        layer_scale: float,
        positions: str,
        classes: int,
        drop_path: float = 0.0,
        head_scale: float = 0.001,
    ):
        grid = None if positions == "absolute" else size // patch
        rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]
        blocks = [Block(width, heads, layer_scale, grid, rate) for rate in rates]
        super().__init__(patch, width, blocks)
        self.fc_norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        init_weight(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(head_scale)
        if positions != "relative":
            self.add_positions((size // patch) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, 3, S, S)."""
        x = self.embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


# ------------------------------------------------------------------------------------------------- authors' names


def to_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a pre-trained ViT's state that initialises a Classifier.

    The mask token and the final norm are left out. The shared relative table is copied into each block, where it is
    trained separately. `fc_norm` and `head` keep their own initialisation.
    """
    unused = ("mask_token", "norm.", "rel_pos_bias.", "lm_head.")
    result = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    table = state.get("rel_pos_bias.relative_position_bias_table")
    if table is not None:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        result |= {f"blocks.{i}.attn.relative_position_bias_table": table.clone() for i in range(depth)}
    return result


def from_authors_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the authors' pre-trained model with its parameters renamed to vit.* and projector.*.

    The relative position index and the unused head are left out.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("projectors."):
            renamed[name.replace("projectors.", "projector.", 1)] = tensor
        elif not name.startswith("lm_head.") and not name.endswith("relative_position_index"):
            renamed[f"vit.{name}"] = tensor
    return renamed
