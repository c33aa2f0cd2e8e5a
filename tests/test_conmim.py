"""ConMIM: the authors' golden values, loss and gradients, masks and views, diagnostics, the arms, runs, two ranks."""

import argparse
import copy
import itertools
import json
import math
import re
import subprocess
import sys

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Unwritten, refused
from PIL import Image
from plan import design
from test_ranks import ENVIRONMENT
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.v2 import functional as tv

from common import augment, checkpoints, images, seeding
from common.run import Run
from conmim import net, train
from conmim.train import ConMIM, denoising_contrast, loss_floor

ARMS, STUDIES = design("conmim")
CELLS = [name for name in ARMS if name != "no-pretraining"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A transformer of two blocks, 16 wide, under the demo's name."""
    monkeypatch.setitem(net.NETWORKS, "vit_demo", net.Shape(4, 16, 2, 2))


def arguments(*flags: str) -> argparse.Namespace:
    return train.parse_args(["--hidden", "24", "--dim", "20", *flags])


def small(*flags: str) -> ConMIM:
    return train.build_model(arguments(*flags), CPU)


def batch(rows: int = 6) -> train.Batch:
    numbers = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, rows, 3, 32, 32, generator=numbers)
    return query, key, train.random_masks(seeding.SampleRNG(0, "mask", 0, rows), 64, 0.75)


class Recorded(Unwritten):
    """A run of which only the records are kept."""

    def __init__(self):
        self.records: list[dict] = []

    def end_epoch(self, epoch: int, last: int, record: dict) -> None:
        self.records.append(record)


def trained(args: argparse.Namespace, model: ConMIM, data) -> dict:
    """The last record of `train` itself, with rate and momentum as they are in `args` at every step."""
    run = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda *_: args.lr)
        patch.setattr(train, "momentum_at", lambda *_: args.momentum)
        train.train(args, run, model, data, train.build_optimizer(args, model))
    assert len(run.records) == 1 + args.epochs
    return run.records[-1]


def step(model: ConMIM, made: train.Batch, arm: str = "base", lr: float = 0.01, momentum: float = 0.9) -> dict:
    """The record of one step of an arm on this batch."""
    flags = ["--batch", str(len(made[0])), "--epochs", "1", "--lr", str(lr), "--momentum", str(momentum)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batches", lambda *_: iter([made]))
        return trained(arguments(*flags, *ARMS[arm]), model, tensors(len(made[0])))


def gradients(model: ConMIM, made: train.Batch, keys: str, leak: float, precision: str = "float32"):
    """Loss and gradients of the online network by name, before any clipping."""
    with train.devices.autocast(precision, CPU):
        q, k = model(*made, keys, leak)
    loss = denoising_contrast(q, k, made[2], 0.1)
    names, weights = zip(*model.online.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss, dict(zip(names, found, strict=True))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- golden values


def to_official(state: dict) -> dict:
    """The state of one network (vit.*, projector.*) under the names of the authors' pre-training files."""
    return {
        name.removeprefix("vit.") if name.startswith("vit.") else name.replace("projector.", "projectors.", 1): tensor
        for name, tensor in state.items()
    }


class Official(nn.Module):
    """The tiny network of the golden case, filled by the official names."""

    def __init__(self, shift: float):
        super().__init__()
        self.vit, self.projector = net.ViT(32, 8, 32, 2, 4, 0.1, "relative"), net.Projector(32, 64, 16)
        for name, weight in self.named_parameters():
            phase = sum(map(ord, next(iter(to_official({name: weight}))))) % 97 + shift
            numbers = 0.1 * np.sin(0.37 * np.arange(weight.numel()) + phase)
            weight.data = torch.from_numpy(numbers).float().view(weight.shape)

    forward = train.Branch.forward


def golden(keys: str) -> ConMIM:
    model = ConMIM.__new__(ConMIM)
    nn.Module.__init__(model)
    model.online, model.ema = Official(0), Official(0.5).requires_grad_(False)
    return model


def golden_batch() -> train.Batch:
    pixel = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    query, key = ((0.01 * pixel).cos(), (0.02 * pixel).sin())
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 1, 4, 5, 10, 11, 14, 15]] = True
    mask[1, [2, 3, 6, 7, 8, 9, 12, 13]] = True
    return query.float().view(2, 3, 32, 32), key.float().view(2, 3, 32, 32), mask


def norm(found: dict[str, torch.Tensor]) -> float:
    return torch.stack([slope.square().sum() for slope in found.values()]).sum().sqrt().item()


def test_the_network_gives_the_official_tokens_and_projections():
    model, (query, key, mask) = golden("ema"), golden_batch()
    tokens, full = model.online.vit(query, mask), model.ema.vit(key)
    assert tokens.sum().item() == pytest.approx(23.461480, rel=1e-4)
    assert tokens.square().sum().item() == pytest.approx(10.488291, rel=1e-4)
    torch.testing.assert_close(tokens[1, 5, :4], torch.tensor([0.156751, -0.007613, 0.122201, 0.121561]), rtol=1e-4,
                               atol=1e-5)  # fmt: skip
    assert full.sum().item() == pytest.approx(3.547185, rel=1e-4)
    assert full.square().sum().item() == pytest.approx(10.682264, rel=1e-4)
    q, k = model(query, key, mask, "ema", 0.0)
    expected = torch.tensor([[-0.319471, 0.672432, 0.479582, -0.554694], [0.395102, -1.692773, -0.801442, 1.499465]])
    torch.testing.assert_close(torch.stack([q[0, 0, :4], k[0, 0, :4]]), expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_are_the_official_ones():
    loss, found = gradients(golden("ema"), golden_batch(), "ema", 0.0)
    assert loss.item() == pytest.approx(9.088058, rel=1e-4)
    named = {"vit.mask_token": 141.8247, "vit.patch_embed.proj.weight": 137.5800, "projector.6.weight": 17.2785}
    for name, expected in named.items():
        assert found[name].norm().item() == pytest.approx(expected, rel=1e-4)
    assert norm(found) == pytest.approx(298.592, rel=1e-4)
    assert found["vit.rel_pos_bias.relative_position_bias_table"].abs().max() > 0


@pytest.mark.parametrize(("leak", "whole"), [(0.0, 903.496), (1.0, 1190.969)])
def test_one_network_for_both_gives_the_official_gradients(leak, whole):
    loss, found = gradients(golden("online"), golden_batch(), "online", leak)
    assert loss.item() == pytest.approx(9.319527, rel=1e-4) and norm(found) == pytest.approx(whole, rel=1e-4)


def test_masks_are_the_official_ones():
    np.random.seed(0)
    order = np.random.permutation(49)
    assert order[:5].tolist() == [29, 4, 26, 30, 32] and order[33:37].tolist() == [1, 12, 43, 24]
    masks = {ratio: train.spread_cells(torch.from_numpy(order)[None], ratio) for ratio in (0.75, 0.6, 0.5)}
    assert {ratio: int(mask.sum()) for ratio, mask in masks.items()} == {0.75: 148, 0.6: 120, 0.5: 100}
    rows = ["0110110", "1101111", "1111101", "0101111", "1111111", "1011011", "1100101"]
    cells = torch.tensor([[int(cell) for cell in row] for row in rows])
    assert torch.equal(masks[0.75].view(14, 14).long(), cells.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_schedules_are_the_official_ones():
    places, rates = (0, 1, 9, 10, 11, 30, 49), (0, 1.6667e-4, 1.5e-3, 1.5e-3, 1.4977e-3, 7.55e-4, 1.23e-5)
    assert [train.learning_rate(place, 10, 50, 1.5e-3) for place in places] == pytest.approx(rates, rel=1e-3)
    found = [train.momentum_at(place, 50, 0.996) for place in (0, 1, 25, 49)]
    assert found == pytest.approx([0.996, 0.99600395, 0.998, 0.99999605], abs=1e-8)


def test_parameter_counts_of_the_specification():
    small16, base16 = net.NETWORKS["vit_small_16"], net.NETWORKS["vit_base_16"]
    with torch.device("meta"):
        count = {
            "small": net.ViT(224, *small16, 0.1, "relative"), "base": net.ViT(224, *base16, 0.1, "relative"),
            "projector": net.Projector(768, 4096, 256), "tuned": net.Classifier(224, *base16, 0.1, "relative", 1000),
        }  # fmt: skip
    found = {name: sum(weight.numel() for weight in one.parameters()) for name, one in count.items()}
    assert found == {"small": 21_599_400, "base": 85_666_128, "projector": 20_987_904, "tuned": 86_530_984}


# ---------------------------------------------------------------------------------------------- loss


def naive_loss(q, k, mask, tau):
    """Patch by patch: -log of the own key's share among the keys of the image; a flat mean over masked patches."""
    unit = lambda x: [value / math.sqrt(sum(y * y for y in x)) for value in x]  # noqa: E731
    rows = []
    for queries, keys, masked in zip(q.tolist(), k.tolist(), mask.tolist(), strict=True):
        keys = [unit(key) for key in keys]
        for j, (query, wanted) in enumerate(zip(queries, masked, strict=True)):
            if wanted:
                scores = [math.exp(sum(a * b for a, b in zip(unit(query), key, strict=True)) / tau) for key in keys]
                rows.append(-math.log(scores[j] / sum(scores)))
    return sum(rows) / len(rows)


def test_loss_equals_a_naive_one_also_where_images_mask_unequal_numbers():
    numbers = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 9, 5, generator=numbers, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=numbers) < torch.tensor([[0.3], [0.6], [0.9]])
    assert len(set(mask.sum(1).tolist())) == 3
    assert denoising_contrast(q, k, mask, 0.2).item() == pytest.approx(naive_loss(q, k, mask, 0.2), rel=1e-5)


def test_the_loss_sees_masked_queries_and_all_keys():
    q, k = torch.randn(2, 2, 8, 6).requires_grad_()
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, ::2] = True
    for_queries, for_keys = torch.autograd.grad(denoising_contrast(q, k, mask, 0.1), (q, k))
    assert torch.equal(for_queries.abs().sum(2) > 0, mask) and (for_keys.abs().sum(2) > 0).all()


@pytest.mark.parametrize(("count", "floor", "chance"), [(196, 0.0088, 5.278), (64, 0.0029, 4.159)])
def test_the_loss_lies_between_its_floor_and_chance(count, floor, chance):
    mask, apart = torch.ones(1, count, dtype=torch.bool), torch.eye(count)[None]
    assert denoising_contrast(apart, apart, mask, 0.1).item() == pytest.approx(loss_floor(count, 0.1), rel=1e-3)
    assert loss_floor(count, 0.1) == pytest.approx(floor, abs=1e-4)
    alike = torch.ones(1, count, 4)
    assert denoising_contrast(alike, alike, mask, 0.1).item() == pytest.approx(chance, abs=1e-3)


# ---------------------------------------------------------------------------------------------- gradients, the cells


@sdpa_kernel(SDPBackend.MATH)
def test_with_the_averages_keys_the_stop_gradient_changes_no_bit():
    """Even where the average takes part in autograd: gradients reach it, and the online ones stay as they are.

    (Attention by one kernel: on a CPU it has another where no gradient is wanted.)
    """
    model, made = small(), batch()
    with_stop = gradients(model, made, "ema", 0.0)
    model.ema.requires_grad_(True)
    q, k = model(*made, "ema", 1.0)
    assert k.requires_grad
    denoising_contrast(q, k, made[2], 0.1).backward()
    reached = {name: weight.grad is not None for name, weight in model.ema.named_parameters()}
    assert reached.pop("vit.mask_token") is False and all(reached.values())  # keys are of full pictures
    assert equal(with_stop[1], {name: weight.grad for name, weight in model.online.named_parameters()})


def test_with_online_keys_the_leak_scales_their_gradient_and_leaves_the_loss():
    made = batch()
    (loss, none), (half_loss, half), (full_loss, full) = (
        gradients(small(), made, "online", leak) for leak in (0.0, 0.5, 1.0)
    )
    assert loss.item() == pytest.approx(half_loss.item(), rel=1e-5) == pytest.approx(full_loss.item(), rel=1e-5)
    assert not torch.allclose(none["projector.0.weight"], full["projector.0.weight"])
    for name in none:
        torch.testing.assert_close(half[name], (none[name] + full[name]) / 2, rtol=1e-3, atol=1e-5)


def test_the_stop_gradient_cuts_keys_and_not_queries():
    model, (query, key, mask) = small(), batch()
    query.requires_grad_(), key.requires_grad_()
    for keys, leak, cut in (("ema", 0.0, True), ("online", 0.0, True), ("online", 1.0, False)):
        q, k = model(query, key, mask, keys, leak)
        found = torch.autograd.grad(denoising_contrast(q, k, mask, 0.1), (query, key), allow_unused=True)
        assert found[0].abs().max() > 0 and (found[1] is None) is cut


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", CELLS)
def test_every_online_parameter_has_a_gradient_in_every_cell(arm, precision):
    model, args = small("--positions", "both"), arguments(*ARMS[arm])
    for block in model.online.vit.blocks:  # at 0 relative biases and masks have none that can be seen
        nn.init.normal_(block.attn.q_bias)
    _, found = gradients(model, batch(), args.keys, args.gradient_leak, precision)
    for name, slope in found.items():
        assert slope is not None and slope.abs().max() > 0, name
    assert all(weight.grad is None and not weight.requires_grad for weight in model.ema.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keys_of_the_same_network_under_autocast_do_not_cut_the_queries_gradient(precision):
    """Against keys that were encoded before, in an autocast region of their own."""
    model, made = small("--keys", "online"), batch()
    _, found = gradients(model, made, "online", 0.0, precision)
    with torch.no_grad(), train.devices.autocast(precision, CPU):
        k = model.online(made[1], None)
    with train.devices.autocast(precision, CPU):
        q = model.online(made[0], made[2])
    loss = denoising_contrast(q, k, made[2], 0.1)
    names = dict(model.online.named_parameters())
    assert equal(found, dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True)))


def test_queries_and_keys_have_batch_statistics_of_their_own():
    query, key, mask = batch()
    q = small()(query, key, mask, "online", 0.0)[0]
    assert torch.equal(q, small()(query, key + 1, mask, "online", 0.0)[0])
    together = small().online
    both = together.projector(torch.cat([together.vit(query, mask), together.vit(key)]))[: len(query), 1:]
    assert not torch.allclose(q, both, atol=1e-3)
    for keys, online, average in (("ema", 1, 1), ("online", 2, 0)):
        model = small()
        model(query, key, mask, keys, 0.0)
        tracked = [branch.projector[1].num_batches_tracked.item() for branch in (model.online, model.ema)]
        assert tracked == [online, average]


def test_nothing_random_is_in_the_network():
    model, made = small(), batch()
    with torch.no_grad():
        q, k = model(made[0], made[0], torch.zeros_like(made[2]), "online", 0.0)
    assert torch.equal(q, k)  # the same function for queries and keys: no dropout, no stochastic depth
    assert all(not isinstance(module, nn.Dropout) for module in model.modules())


# ---------------------------------------------------------------------------------------------- the average


def test_the_average_starts_as_the_equal_and_no_alias():
    model = small()
    assert equal(state(model.online), state(model.ema))
    pairs = zip(model.online.parameters(), model.ema.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize("arm", CELLS)
def test_the_average_follows_after_the_step_in_every_cell(arm):
    model = small()
    start = {name: one.clone() for name, one in model.ema.named_parameters()}
    step(model, batch(), arm, momentum=0.9)
    for name, one in model.ema.named_parameters():
        now = model.online.get_parameter(name)
        torch.testing.assert_close(one, 0.9 * start[name] + 0.1 * now)
    assert not torch.equal(model.online.vit.mask_token, start["vit.mask_token"])
    buffers = dict(model.ema.projector.named_buffers())
    moved = buffers["1.num_batches_tracked"].item() == 1
    assert moved == (arguments(*ARMS[arm]).keys == "ema")  # its own batches, never an average of statistics


def test_momentum_is_exact_at_its_ends():
    for momentum, whose in ((1.0, "average"), (0.0, "online")):
        model = small()
        before = {name: one.clone() for name, one in model.ema.named_parameters()}
        step(model, batch(), momentum=momentum)
        expected = before if whose == "average" else dict(model.online.named_parameters())
        assert all(torch.equal(one, expected[name]) for name, one in model.ema.named_parameters())


def test_the_gradient_is_clipped_and_counted(monkeypatch):
    found = {}
    for limit in (1e-3, 1e6):
        monkeypatch.setattr(train, "CLIP", limit)
        model = small()
        found[limit] = step(model, batch())["clipped_fraction"]
        size = norm({name: weight.grad for name, weight in model.online.named_parameters()})
        assert size <= limit * 1.001
    assert found == {1e-3: 1.0, 1e6: 0.0}


def test_what_is_decayed():
    model = small("--positions", "both")
    decayed, free = train.build_optimizer(argparse.Namespace(lr=0.1), model).param_groups
    names = {id(weight): name for name, weight in model.online.named_parameters()}
    exempt = {names[id(weight)] for weight in free["params"]}
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert {names[id(weight)] for weight in decayed["params"]} | exempt == set(names.values())
    assert {"vit.cls_token", "vit.pos_embed", "vit.blocks.0.gamma_1", "vit.blocks.1.attn.q_bias"} <= exempt
    assert not exempt & {"vit.mask_token", "vit.rel_pos_bias.relative_position_bias_table", "projector.0.weight"}


# ---------------------------------------------------------------------------------------------- networks and names


def test_relative_places_equal_a_naive_table():
    grid = 3
    rows = train.ViT(12, 4, 8, 1, 2, 0.1, "relative").rel_pos_bias.places.view(10, 10)
    for i, j in itertools.product(range(grid * grid), repeat=2):
        down, across = i // grid - j // grid, i % grid - j % grid
        assert rows[1 + i, 1 + j] == (down + 2) * 5 + across + 2
    assert set(rows[0, 1:].tolist()) == {25} and set(rows[1:, 0].tolist()) == {26} and rows[0, 0] == 27


def test_the_table_is_added_to_the_logits_of_every_block():
    vit, x = net.ViT(16, 4, 8, 2, 2, 0.5, "relative"), torch.randn(2, 3, 16, 16)
    nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    attn, tokens = vit.blocks[0].attn, torch.randn(2, 17, 8)
    for bias in (attn.q_bias, attn.v_bias):
        nn.init.normal_(bias)
    table = vit.rel_pos_bias.relative_position_bias_table[vit.rel_pos_bias.places].view(17, 17, 2)
    q, k, v = ((tokens @ w.T).view(2, 17, 2, 4) for w in attn.qkv.weight.chunk(3))
    q, v = q + attn.q_bias.view(2, 4), v + attn.v_bias.view(2, 4)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2 + table.permute(2, 0, 1)
    expected = torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v).flatten(2) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(tokens, vit.rel_pos_bias()), expected)
    before = vit(x)
    nn.init.zeros_(vit.rel_pos_bias.relative_position_bias_table)
    assert not torch.allclose(before, vit(x))


def test_a_block_is_pre_norm_with_exact_gelu_and_scaled_branches():
    block, x = net.Block(8, 2, 0.25).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    nn.init.normal_(block.mlp.fc1.weight)

    def normed(tokens):
        return (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()

    middle = x + 0.25 * block.attn(normed(x), None)
    inner = normed(middle) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    active = inner * (1 + torch.special.erf(inner / math.sqrt(2))) / 2
    expected = middle + 0.25 * (active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, None), expected, rtol=1e-9, atol=1e-12)


def test_masked_patches_are_replaced_by_one_token_before_any_position():
    vit, x = net.ViT(16, 4, 8, 2, 2, 0.5, "relative"), torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :6] = True
    other = x.clone()
    other[:, :, :4] = 7  # the first four patches
    assert torch.equal(vit(x, mask), vit(other, mask)) and not torch.allclose(vit(x), vit(other))
    tokens = vit(x, mask)[:, 1:7]
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))  # alike while the table is zero
    both = net.ViT(16, 4, 8, 2, 2, 0.5, "both")
    assert not torch.allclose(both(x, mask)[:, 1], both(x, mask)[:, 2])


def test_initial_weights_are_cut_and_deeper_blocks_are_smaller():
    vit = net.ViT(32, 4, 64, 3, 4, 0.1, "both")
    vit.requires_grad_(False)
    for weight in (vit.cls_token, vit.mask_token, vit.pos_embed, vit.patch_embed.proj.weight):
        assert 0.008 < weight.std() < 0.015 and weight.abs().max() <= 0.02
    share = (vit.blocks[0].mlp.fc1.weight.abs() < 0.01).float().mean().item()
    assert share == pytest.approx(math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2)), abs=0.02)
    for number, block in enumerate(vit.blocks, 1):
        assert block.mlp.fc1.weight.abs().max() == pytest.approx(0.02, rel=0.01)
        for weight in (block.mlp.fc2.weight, block.attn.proj.weight):
            assert weight.abs().max() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.01)
        assert (block.gamma_1 == 0.1).all() and (block.attn.qkv.bias is None)


def test_arms_start_equal_in_what_they_share():
    base = state(small())
    for flags in (["--positions", "relative"], ["--positions", "absolute"], ["--keys", "online"], ["--dim", "30"]):
        other = state(small(*flags))
        shared = [name for name in base if name in other and base[name].shape == other[name].shape]
        assert len(shared) >= len(base) - 6 and all(torch.equal(base[name], other[name]) for name in shared)
    assert not torch.equal(base["online.vit.cls_token"], state(small("--seed", "1"))["online.vit.cls_token"])


def test_official_files_load_by_name_and_ours_have_their_names():
    branch = Official(0)
    official = to_official(branch.state_dict())
    names = {"cls_token", "mask_token", "patch_embed.proj.weight", "rel_pos_bias.relative_position_bias_table",
             "blocks.1.gamma_2", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.attn.qkv.weight",
             "norm.bias", "blocks.1.mlp.fc2.bias", "projectors.3.weight", "projectors.7.running_var"}  # fmt: skip
    assert names <= set(official) and "blocks.0.attn.qkv.bias" not in official and "projectors.7.weight" not in official
    assert official["rel_pos_bias.relative_position_bias_table"].shape == (7 * 7 + 3, 4)
    file = official | {
        "lm_head.weight": torch.zeros(9, 32), "rel_pos_bias.relative_position_index": torch.zeros(17, 17).long()
    }  # fmt: skip
    other = Official(3)
    other.load_state_dict(net.from_official(file))
    assert equal(state(other), state(branch))


@pytest.mark.parametrize("positions", net.POSITIONS)
def test_the_classifier_takes_over_a_pretrained_network(positions):
    vit = net.ViT(16, 4, 8, 3, 2, 0.5, positions)
    if vit.rel_pos_bias:
        nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    classifier, x = net.Classifier(16, 4, 8, 3, 2, 0.5, positions, 5, drop_path=0.5), torch.randn(4, 3, 16, 16)
    missing, extra = classifier.load_state_dict(net.to_classifier(vit.state_dict()), strict=False)
    assert not extra and set(missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    inside = {}
    vit.norm.register_forward_pre_hook(lambda module, given: inside.update(tokens=given[0]))
    classifier.fc_norm.register_forward_pre_hook(lambda module, given: inside.update(mean=given[0]))
    classifier.eval()
    vit(x), classifier(x)
    torch.testing.assert_close(inside["mean"], inside["tokens"][:, 1:].mean(1))
    tables = [name for name in classifier.state_dict() if name.endswith("position_bias_table")]
    assert len(tables) == (0 if positions == "absolute" else 3)
    pointers = {classifier.state_dict()[name].data_ptr() for name in tables}
    assert len(pointers) == len(tables)  # trained separately
    assert classifier.head.weight.abs().max() <= 2e-5 and classifier(x).shape == (4, 5)


def test_stochastic_depth_leaves_branches_out_in_training_alone():
    block = net.Block(8, 2, 1.0, 2, drop_path=0.5)
    block.attn.proj.bias.data.fill_(1.0)
    x = torch.zeros(4000, 5, 8)
    torch.manual_seed(0)
    kept = (block.drop(torch.ones(4000, 1, 1)) > 0).float()
    assert 0.45 < kept.mean() < 0.55 and set(block.drop(torch.ones(4000, 1, 1)).unique().tolist()) == {0.0, 2.0}
    block.eval()
    assert torch.equal(block(x, None), block(x, None))
    rates = [one.drop_path for one in net.Classifier(16, 4, 8, 3, 2, 0.1, "relative", 5, 0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


# ---------------------------------------------------------------------------------------------- masks and views


def tensors(count: int, device: str = "cpu") -> images.Images:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels, channels = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(3, 1, 1, device=device)
    return images.Images(pixels, labels, pixels, labels, 6, channels / 2, channels, "")


@pytest.mark.parametrize(("patches", "ratio", "masked"), [(196, 0.75, 148), (64, 0.75, 48), (64, 0.5, 32), (64, 1, 64)])
def test_every_image_has_squares_of_its_own_and_the_same_number(patches, ratio, masked):
    found = train.random_masks(seeding.SampleRNG(0, "mask", 0, 500), patches, ratio)
    side = round(patches**0.5)
    assert found.shape == (500, patches) and (found.sum(1) == masked).all()
    squares = found.view(500, side // 2, 2, side // 2, 2)
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))
    assert (found.float().mean(0) - masked / patches).abs().max() < 0.1
    if ratio < 1:
        assert len(found.unique(dim=0)) > 400


def made(arm: str = "base", rows: slice = slice(0, 8), seed: int = 0, epoch: int = 1, data=None) -> list[train.Batch]:
    torch.manual_seed(0)
    args = arguments("--batch", "8", "--seed", str(seed), *ARMS[arm])
    return list(train.batches(args, data or tensors(40), epoch, rows))


def test_arms_see_equal_queries_and_masks_and_basic_keys_are_the_queries():
    data = tensors(40)
    base, basic = made(data=data), made("symmetric", data=data)
    assert len(base) == 5
    for a, b in zip(base, basic, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert torch.equal(b[0], b[1]) and not torch.equal(a[0], a[1])
    assert not torch.equal(made(data=data, seed=1)[0][0], base[0][0])
    again, other = made(data=data), made(data=data, epoch=2)
    assert all(torch.equal(a, b) for one, two in zip(base, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(other[0][0], base[0][0]) and not torch.equal(other[0][2], base[0][2])


def test_every_kind_of_draw_has_a_purpose_and_every_step_its_own(monkeypatch):
    asked, real = [], seeding.SampleRNG

    def recorded(seed, purpose, step, *rest):
        asked.append((purpose, step))
        return real(seed, purpose, step, *rest)

    monkeypatch.setattr(seeding, "SampleRNG", recorded)
    made(epoch=2)
    assert sorted(asked) == sorted(itertools.product(("geometry", "colours", "mask"), range(10, 15)))
    asked.clear()
    made("symmetric", epoch=2)
    assert sorted(asked) == sorted(itertools.product(("geometry", "mask"), range(10, 15)))


def test_ranks_share_the_batches():
    data = tensors(40)
    whole, halves = made(data=data), [made(rows=rows, data=data) for rows in (slice(0, 4), slice(4, 8))]
    for one, a, b in zip(whole, *halves, strict=True):
        assert all(torch.equal(x, torch.cat([y, z])) for x, y, z in zip(one, a, b, strict=True))


def test_both_views_are_of_one_crop(monkeypatch):
    """Without colours the strong view is the crop itself; glyphs are never mirrored."""
    for name in ("random_color_jitter", "random_grayscale"):
        monkeypatch.setattr(augment, name, lambda view, *_, **__: view)
    monkeypatch.setattr(train, "solarize", lambda view, _: view)
    assert all(torch.equal(query, key) for query, key, _ in made())
    assert train.augmentation("glyphs36")["flip"] == 0 and train.augmentation("cifar100")["flip"] == 0.5
    assert train.augmentation("folder")["crop"] == (0.08, 1.0)


def test_solarize_equals_torchvisions():
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    chosen = torch.tensor([True, False, True, False])
    found = train.solarize(pixels / 255, chosen)
    for one, before, turned in zip(found, pixels, chosen, strict=True):
        expected = tv.solarize(before, 128) if turned else before
        torch.testing.assert_close(one, expected / 255)


def test_the_strong_view_uses_the_papers_shares(monkeypatch):
    seen = {}

    def jitter(view, numbers, *strengths, probability):
        seen["jitter"] = (*strengths, probability)
        return view

    monkeypatch.setattr(augment, "random_color_jitter", jitter)
    for name in ("random_grayscale", "random_gaussian_blur"):
        monkeypatch.setattr(augment, name, lambda view, _, *rest, name=name: seen.update({name: rest}) or view)
    view = train.strong_view(torch.full((4000, 3, 2, 2), 0.75), seeding.SampleRNG(0, "colours", 0, 4000), 0.1)
    assert seen == {"jitter": (0.4, 0.4, 0.2, 0.1, 0.8), "random_grayscale": (0.2,),
                    "random_gaussian_blur": ((0.1, 2.0), 0.1)}  # fmt: skip
    assert (view[:, 0, 0, 0] < 0.5).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_workers_make_two_views_of_one_crop():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8))
    kind, found = train.augmentation("folder"), {}
    for coloured in (True, False):
        torch.manual_seed(0)
        found[coloured] = train.WorkerViews(32, coloured, **kind)(picture)
    assert found[True].shape == (2, 3, 32, 32) and found[False].shape == (1, 3, 32, 32)
    assert found[True].dtype == torch.uint8 and torch.equal(found[True][0], found[False][0])
    torch.manual_seed(0)
    changed = [not torch.equal(*train.WorkerViews(32, True, **kind)(picture)) for _ in range(200)]
    assert 0.8 < np.mean(changed) < 0.95  # 1 - 0.2 * 0.8 * 0.9 * 0.8 = 0.88


# ---------------------------------------------------------------------------------------------- diagnostics


def test_position_r2_equals_a_naive_share():
    k = torch.randn(5, 4, 3, dtype=torch.float64)
    unit = F.normalize(k, dim=2)
    centre, explained, whole = unit.mean((0, 1)), 0.0, 0.0
    for image, place in itertools.product(range(5), range(4)):
        explained += (unit[:, place].mean(0) - centre).square().sum().item()
        whole += (unit[image, place] - centre).square().sum().item()
    assert train.position_r2(k) == pytest.approx(explained / whole)


def test_diagnostics_tell_a_position_code_from_content():
    class Fixed(nn.Module):
        def __init__(self, q, k):
            super().__init__()
            self.found = q, k

        def forward(self, *_):
            return self.found

    code = torch.eye(16).expand(40, 16, 16)
    content = torch.randn(40, 16, 16)
    mask, x = torch.ones(40, 16, dtype=torch.bool), torch.zeros(40, 3, 4, 4)
    places = train.diagnose(Fixed(code, code), "ema", x, mask)
    pictures = train.diagnose(Fixed(content, content), "ema", x, mask)
    assert places == pytest.approx({"own_top1": 1, "cross_top1": 1, "position_r2": 1, "key_effective_rank": 15})
    assert pictures["own_top1"] == 1 and pictures["cross_top1"] < 0.2 and pictures["position_r2"] < 0.1
    assert 15 < pictures["key_effective_rank"] < 16


@pytest.mark.parametrize("arm", CELLS)
def test_diagnostics_leave_statistics_and_modes_as_they_were(arm):
    model, keys = small(), arguments(*ARMS[arm]).keys
    before, (x, _, mask) = state(model), batch()
    found = train.diagnose(model, keys, x, mask)
    assert equal(before, state(model)) and all(module.training for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 6 and all(one.track_running_stats for one in norms)
    with torch.no_grad():
        q, k = copy.deepcopy(model)(x, x, mask, keys, 0.0)
    places = (F.normalize(q, dim=2) @ F.normalize(k, dim=2).mT).argmax(2) == torch.arange(64)
    assert found["own_top1"] == pytest.approx(places[mask].float().mean().item())


def test_diagnosed_pictures_are_the_same_for_all_and_spread_over_the_test_set():
    data = tensors(1000)
    x, mask = train.fixed_batch(data, 64, 0.75)
    assert x.shape == (256, 3, 32, 32) and (mask.sum(1) == 48).all()
    assert torch.equal(x[255], data.normalise(data.test[3 * 255]))
    assert len(train.fixed_batch(tensors(20), 64, 0.75)[0]) == 20


def test_without_stop_gradient_online_keys_become_a_position_code():
    """The zero-information optimum, reached in a few hundred small steps; the average's keys keep their content."""
    numbers = torch.Generator().manual_seed(0)
    data = tensors(256)._replace(train=torch.randint(0, 256, (256, 3, 32, 32), generator=numbers).byte())
    data, found = data._replace(test=data.train[:64]), {}
    flags = ["--positions", "both", "--dim", "64", "--hidden", "64", "--layer-scale", "1", "--batch", "16"]
    flags += ["--epochs", "8", "--lr", "5e-3", "--momentum", "0.98"]
    for arm in ("base", "online-no-stop-gradient"):
        args = arguments(*ARMS[arm], *flags, "--views", "basic")
        found[arm] = trained(args, train.build_model(args, CPU), data)
    print(found)
    code, base = found["online-no-stop-gradient"], found["base"]
    assert code["loss"] < 0.05 and code["position_r2"] > 0.95 and code["cross_top1"] > 0.95
    assert base["position_r2"] < 0.9


# ---------------------------------------------------------------------------------------------- arms and flags


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_no_two_arms_resolve_to_equal_arguments_and_studies_name_arms(scale):
    arms, studies = design("conmim", scale)
    resolved = {json.dumps(vars(train.parse_args(["--scale", scale, *flags])), default=str) for flags in arms.values()}
    assert len(resolved) == len(arms) == 7
    assert {name for contrasts in studies.values() for one in contrasts for name in one.split(":")} == set(arms)
    assert studies["conmim-stop-gradient"][0] == "online-no-stop-gradient:online-keys"
    assert studies["conmim-asymmetry"][0] == "symmetric:base"


def test_every_flag_is_read():
    source = (ROOT / "conmim/train.py").read_text()
    read = set(re.findall(r"\bargs\.(\w+)", source[source.index("class Branch") :]))
    assert read == set(vars(train.parse_args([])))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-stop-gradient", "--gradient-leak", "0.5"], "--gradient-leak 0.5"),
        (["--gradient-leak", "2"], "not between 0 and 1"),
        (["--mask-ratio", "0"], "--mask-ratio 0"),
        (["--temperature", "0"], "not between"),
        (["--momentum", "1.1"], "not between 0 and 1"),
        (["--size", "64"], "for --data-set folder alone"),
        (["--data-set", "folder", "--size", "36"], "a multiple of 8"),
        (["--network", "vit_base_16", "--data-set", "folder", "--size", "48"], "a multiple of 32"),
        (["--keys", "both"], "invalid choice"),
        (["--mask", "0.5"], "unrecognized"),
        (["--epochs", "-1"], "less than 0"),
        (["--scale", "gpu"], "--scale demo"),
        (["--data-set", "cifar100", "--data", "nowhere"], "common.images cifar100"),
        (["--batch", "6000"], "5000 training images"),
    ],
)
def test_a_users_mistake_ends_in_one_sentence(flags, words, tmp_path, capsys):
    refused(train.main, flags, words, tmp_path, capsys)


# ---------------------------------------------------------------------------------------------- a fake GPU


def train_on_a_fake_gpu(count: int, flags: list[str]) -> None:
    """Two epochs, with the augmentation of folders (it has all parts)."""
    more = ["--data-set", "folder", "--batch", "16", "--epochs", "2", "--warm-up", "1", "--lr", "0.1"]
    args, data = arguments(*flags, *more, "--momentum", "0.9"), tensors(count, "cuda")
    model = train.build_model(args, data.device)
    train.train(args, Unwritten(), model, data, train.build_optimizer(args, model))


@pytest.mark.parametrize("arm", CELLS)
@pytest.mark.parametrize("positions", ["relative", "both"])
def test_training_and_its_measures_stay_on_a_fake_gpu(arm, positions, fake_gpu):
    train_on_a_fake_gpu(40, [*ARMS[arm], "--positions", positions])
    assert fake_gpu.asked > 0


def test_steps_ask_the_device_nothing(fake_gpu):
    asked = []
    for count in (40, 88):
        fake_gpu.asked = 0
        train_on_a_fake_gpu(count, [])
        asked.append(fake_gpu.asked)
    assert asked[0] == asked[1] > 0


# ---------------------------------------------------------------------------------------------- runs

TINY = ["--hidden", "24", "--dim", "20", "--rehearse", "3", "--batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run per arm, of two epochs of three steps."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(net.NETWORKS, "vit_demo", net.Shape(4, 16, 2, 2))
        for name, own in ARMS.items():
            train.main([*TINY, "--data", str(root / "data"), *own, "--out", str(root / name / "0")])
    return root


def weights(run) -> dict[str, torch.Tensor]:
    return checkpoints.load(run / "model.pt")["model"]


def test_every_arm_trains_to_other_weights(finished):
    firsts = {arm: weights(finished / arm / "0")["online.vit.patch_embed.proj.weight"] for arm in ARMS}
    for a, b in itertools.combinations(ARMS, 2):
        assert not torch.equal(firsts[a], firsts[b]), (a, b)


@pytest.mark.parametrize("views", ["asymmetric", "basic"])
def test_a_whole_run_with_the_averages_keys_is_the_same_without_stop_gradient(views, finished, tmp_path):
    flags = [*TINY, "--data", str(finished / "data"), "--views", views, "--no-stop-gradient"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    arm = "base" if views == "asymmetric" else "basic-views"
    assert equal(weights(tmp_path / "run"), weights(finished / arm / "0"))


def test_no_pretraining_keeps_the_initial_weights(finished):
    run = finished / "no-pretraining/0"
    saved = checkpoints.load(run / "model.pt")
    assert saved["epoch"] == 0 and saved["diverged"] is False
    with_args = json.loads((run / "args.json").read_text())["arguments"]
    assert equal(saved["model"], state(train.build_model(argparse.Namespace(**with_args), CPU)))
    lines = (run / "train.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["epoch"] == 0


def test_the_log_has_the_agreed_keys(finished):
    diagnosed = {"epoch", "own_top1", "cross_top1", "position_r2", "key_effective_rank", "examples_per_second",
                 "seconds", "peak_memory"}  # fmt: skip
    for arm in CELLS:
        lines = [json.loads(line) for line in (finished / arm / "0/train.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [0, 1, 2] and set(lines[0]) == diagnosed
        assert set(lines[2]) == diagnosed | {"loss", "clipped_fraction", "momentum", "lr"}
        assert abs(lines[1]["loss"] - math.log(64)) < 2 and 0 <= lines[2]["clipped_fraction"] <= 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("arm", ["base", "online-no-stop-gradient"])
def test_a_killed_run_ends_bit_identical(arm, finished, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(finished / "data"), *ARMS[arm], "--out", str(tmp_path / "cut")]
    save = Run.save

    def killed(self, epoch, record, state):
        save(self, epoch, record, state)
        if epoch == 1:
            raise Killed

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(Killed):
        train.main(flags)
    monkeypatch.setattr(Run, "save", save)
    train.main(flags)
    assert equal(weights(tmp_path / "cut"), weights(finished / arm / "0"))
    runs = (tmp_path / "cut", finished / arm / "0")
    lines = [json.loads((run / "train.jsonl").read_text().splitlines()[-1]) for run in runs]
    for name in ("seconds", "examples_per_second", "peak_memory"):
        del lines[0][name], lines[1][name]
    assert lines[0] == lines[1]


def test_again_is_finished_or_refused(finished, capsys):
    flags = [*TINY, "--data", str(finished / "data"), "--out", str(finished / "base/0")]
    train.main(flags)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--keys", "online"])
    assert end.value.code == 2 and "--keys ema -> online" in capsys.readouterr().err


def test_a_diverged_run_keeps_the_last_finite_weights(finished, tmp_path):
    train.main([*TINY, "--data", str(finished / "data"), "--lr", "1e30", "--out", str(tmp_path / "run")])
    saved = checkpoints.load(tmp_path / "run/model.pt")
    assert saved["diverged"] is True and all(one.isfinite().all() for one in saved["model"].values())


def test_the_script_itself_runs(tmp_path):
    command = [sys.executable, str(ROOT / "conmim/train.py"), *TINY, "--epochs", "0", "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--data", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run/model.pt").exists(), done.stderr


# ---------------------------------------------------------------------------------------------- larger scales


LARGER = [("gpu", "vit_tiny_4"), ("gpu", "vit_small_8"), ("paper", "vit_small_16"), ("paper", "vit_base_16")]


@pytest.mark.parametrize(("scale", "network"), LARGER)
def test_every_cell_of_a_scale_takes_two_real_steps(scale, network, pictures, monkeypatch):
    """True widths on four small pictures; above 64 pixels those that a worker's code crops and colours.

    All cells with one network of each scale, with the other the cheapest and the dearest.
    """
    size = {"vit_tiny_4": 32, "vit_small_8": 64}.get(network, 96)
    flags = ["--scale", scale, "--network", network, "--data", str(pictures), "--size", str(size)]
    flags += [] if network == "vit_tiny_4" else ["--data-set", "folder"]
    monkeypatch.setattr(images, "cifar", lambda *_: (torch.randint(0, 256, (40, 3, 32, 32)).byte(), torch.arange(40)))
    monkeypatch.setattr(train, "MEASURED", 4)
    flags += ["--batch", "4", "--epochs", "1"]
    args = train.parse_args(flags)
    data = images.load_or_stream(args.data_set, args.data, size, CPU, 0).subset(2 * args.batch)
    model, arms = train.build_model(args, CPU), design("conmim", scale)[0]
    slow, fast = (list(branch.parameters()) for branch in (model.ema, model.online))
    start = [one.detach().clone() for one in fast]
    for arm in CELLS if network in ("vit_tiny_4", "vit_small_16") else ("base", "symmetric-no-stop-gradient"):
        with torch.no_grad():
            torch._foreach_copy_(fast, start)
            torch._foreach_copy_(slow, start)
        loss = trained(train.parse_args([*flags, *arms[arm]]), model, data)["loss"]
        assert math.isfinite(loss) and abs(loss - math.log((size // net.NETWORKS[network].patch) ** 2)) < 4
        assert all(not torch.equal(a, b) for a, b in zip(fast, start, strict=True))
        assert all(not torch.equal(a, b) for a, b in zip(slow, start, strict=True) if b.abs().max() > 0)


def test_the_papers_scale_trains_on_two_ranks_with_workers(pictures, tmp_path):
    """At the true width, two of twelve blocks."""
    script = tmp_path / "shallow.py"
    shallow = 'from conmim import net, train\nnet.NETWORKS["vit_small_16"] = net.Shape(16, 384, 2, 6)\n'
    script.write_text(f"import sys\n{shallow}if __name__ == '__main__':\n    train.main(sys.argv[1:])")
    flags = ["--scale", "paper", "--network", "vit_small_16", "--hidden", "64", "--size", "96", "--data", str(pictures)]
    flags += ["--batch", "4", "--rehearse", "1", "--device", "cpu", "--workers", "1", "--out", str(tmp_path / "run")]
    done = forked.run(tmp_path, script, *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    saved = checkpoints.load(tmp_path / "run/model.pt")
    assert saved["epoch"] == 2 and saved["model"]["online.vit.norm.weight"].shape == (384,)


# ---------------------------------------------------------------------------------------------- two ranks

SCRIPT = """
import sys
from conmim import net, train
net.NETWORKS["vit_demo"] = net.Shape(4, 16, 2, 2)
"""


def on_two(tmp_path, pictures, norms: str, *flags: str):
    """The same run on two ranks and on one: the start, and what each came to."""
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}{norms}train.main(sys.argv[1:])")
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--hidden", "24", "--dim", "20"]
    common += ["--batch", "16", "--epochs", "2", "--warm-up", "0", "--device", "cpu", "--lr", "0.01", *flags]
    for name, ranks in (("two", 2), ("one", 1)):
        done = forked.run(tmp_path, script, *common, "--out", str(tmp_path / name), ranks=ranks)
        assert done.returncode == 0, done.stderr
    two, one = (checkpoints.load(tmp_path / name / "model.pt") for name in ("two", "one"))
    logs = [json.loads((tmp_path / n / "train.jsonl").read_text().splitlines()[-1]) for n in ("two", "one")]
    return state(train.build_model(argparse.Namespace(**one["arguments"]), CPU)), two["model"], one["model"], logs


@pytest.mark.parametrize("arm", ["base", "online-no-stop-gradient"])
def test_two_ranks_equal_one_with_batch_norms_in_eval_mode(arm, pictures, tmp_path):
    start, two, one, logs = on_two(tmp_path, pictures, forked.NORMS_IN_EVAL_MODE, *ARMS[arm])
    for name, expected in one.items():
        moved = (expected.double() - start[name].double()).norm()
        apart = (two[name].double() - expected.double()).norm()
        assert apart <= 1e-3 * moved + 2e-7 * expected.double().norm(), name
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["own_top1"] == pytest.approx(logs[1]["own_top1"], abs=0.01)


def test_on_several_ranks_every_rank_has_batch_statistics_of_its_own(pictures, tmp_path):
    _, two, one, logs = on_two(tmp_path, pictures, "")
    assert logs[0]["loss"] != pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.1)
    assert not torch.allclose(two["online.projector.1.running_mean"], one["online.projector.1.running_mean"], rtol=1e-4)
