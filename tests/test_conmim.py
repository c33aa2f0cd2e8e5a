"""Tests of conmim/train.py and net.py: values of the authors' code, gradients, data, diagnostics, runs, ranks."""

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
from conftest import READ_BY_COMMON, ROOT, FakeRun, assert_usage_error
from PIL import Image
from plan import design
from test_ranks import ENVIRONMENT
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.v2 import functional as tv

from common import augment, checkpoints, images, seeding
from common.run import Run
from conmim import net, train
from conmim.eval import RECIPES
from conmim.train import ConMIM, denoising_contrast, loss_minimum

ALL_ARMS, STUDIES = design("conmim")
# These arms differ from base and no-pretraining in fine-tuning only.
FINE_TUNING_ARMS = ("positions-only", "no-pretraining-long")
ARMS = {name: flags for name, flags in ALL_ARMS.items() if "@" not in name and name not in FINE_TUNING_ARMS}
CELLS = [name for name in ARMS if name != "no-pretraining"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    """Replace the demo network by a transformer of two blocks of width 16, with patches of 4 pixels."""
    monkeypatch.setitem(net.NETWORKS, "vit_demo", net.Shape(4, 16, 2, 2))
    monkeypatch.setitem(train.SCALES, "mask_square", (2, 2, 2))


def parse_args(*flags: str) -> argparse.Namespace:
    return train.parse_args(["--hidden", "24", "--dim", "66", *flags])


def small_model(*flags: str) -> ConMIM:
    return train.build_model(parse_args(*flags), CPU)


def random_batch(rows: int = 6) -> train.Batch:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, rows, 3, 32, 32, generator=generator)
    return query, key, train.random_masks(seeding.SampleRNG(0, "mask", 0, rows), 64, 0.75, 2)


class RecordingRun(FakeRun):
    """A fake run that keeps the metrics of each epoch."""

    def __init__(self):
        self.metrics: list[dict] = []

    def end_epoch(self, epoch: int, final_epoch: int, metrics: dict) -> None:
        self.metrics.append(metrics)


def final_metrics(args: argparse.Namespace, model: ConMIM, data) -> dict:
    """Return the metrics of the final epoch of `train.train`, with constant learning rate and EMA momentum."""
    run = RecordingRun()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda *_: args.lr)
        patch.setattr(train, "ema_momentum", lambda *_: args.momentum)
        train.train(args, run, model, data, train.build_optimizer(args, model))
    assert len(run.metrics) == 1 + args.epochs
    return run.metrics[-1]


def train_one_step(
    model: ConMIM, batch: train.Batch, arm: str = "base", lr: float = 0.01, momentum: float = 0.9
) -> dict:
    """Train one step of an arm on a batch and return the metrics."""
    flags = ["--batch", str(len(batch[0])), "--epochs", "1", "--lr", str(lr), "--momentum", str(momentum)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batches", lambda *_: iter([batch]))
        return final_metrics(parse_args(*flags, *ARMS[arm]), model, random_images(len(batch[0])))


def loss_and_gradients(model: ConMIM, batch: train.Batch, keys: str, leak: float, precision: str = "float32"):
    """Return the loss and the unclipped gradients of the online network by parameter name."""
    with train.devices.autocast(precision, CPU):
        q, k = model(*batch, keys, leak)
    loss = denoising_contrast(q, k, batch[2], 0.1)
    names, weights = zip(*model.online.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss, dict(zip(names, gradients, strict=True))


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- golden values


def to_authors_names(state: dict) -> dict:
    """Rename the state of one network (vit.*, projector.*) to the names of the authors' pre-training checkpoints."""
    return {
        name.removeprefix("vit.") if name.startswith("vit.") else name.replace("projector.", "projectors.", 1): tensor
        for name, tensor in state.items()
    }


class GoldenBranch(nn.Module):
    """The small network of the golden values. Its weights are a function of the authors' parameter names."""

    def __init__(self, shift: float):
        super().__init__()
        self.vit, self.projector = net.ViT(32, 8, 32, 2, 4, 0.1, "relative"), net.Projector(32, 64, 16)
        for name, weight in self.named_parameters():
            phase = sum(map(ord, next(iter(to_authors_names({name: weight}))))) % 97 + shift
            values = 0.1 * np.sin(0.37 * np.arange(weight.numel()) + phase)
            weight.data = torch.from_numpy(values).float().view(weight.shape)

    forward = train.Branch.forward


def golden_model(keys: str) -> ConMIM:
    model = ConMIM.__new__(ConMIM)
    nn.Module.__init__(model)
    model.online, model.ema = GoldenBranch(0), GoldenBranch(0.5).requires_grad_(False)
    return model


def golden_batch() -> train.Batch:
    pixel = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    query, key = ((0.01 * pixel).cos(), (0.02 * pixel).sin())
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 1, 4, 5, 10, 11, 14, 15]] = True
    mask[1, [2, 3, 6, 7, 8, 9, 12, 13]] = True
    return query.float().view(2, 3, 32, 32), key.float().view(2, 3, 32, 32), mask


def gradient_norm(gradients: dict[str, torch.Tensor]) -> float:
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt().item()


def test_tokens_and_projections_equal_those_of_the_authors_code():
    model, (query, key, mask) = golden_model("ema"), golden_batch()
    tokens, full = model.online.vit(query, mask), model.ema.vit(key)
    assert tokens.sum().item() == pytest.approx(23.461480, rel=1e-4)
    assert tokens.square().sum().item() == pytest.approx(10.488291, rel=1e-4)
    expected = torch.tensor([0.156751, -0.007613, 0.122201, 0.121561])
    torch.testing.assert_close(tokens[1, 5, :4], expected, rtol=1e-4, atol=1e-5)
    assert full.sum().item() == pytest.approx(3.547185, rel=1e-4)
    assert full.square().sum().item() == pytest.approx(10.682264, rel=1e-4)
    q, k = model(query, key, mask, "ema", 0.0)
    expected = torch.tensor([[-0.319471, 0.672432, 0.479582, -0.554694], [0.395102, -1.692773, -0.801442, 1.499465]])
    torch.testing.assert_close(torch.stack([q[0, 0, :4], k[0, 0, :4]]), expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_equal_those_of_the_authors_code():
    loss, gradients = loss_and_gradients(golden_model("ema"), golden_batch(), "ema", 0.0)
    assert loss.item() == pytest.approx(9.088058, rel=1e-4)
    norms = {"vit.mask_token": 141.8247, "vit.patch_embed.proj.weight": 137.5800, "projector.6.weight": 17.2785}
    for name, expected in norms.items():
        assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-4)
    assert gradient_norm(gradients) == pytest.approx(298.592, rel=1e-4)
    assert gradients["vit.rel_pos_bias.relative_position_bias_table"].abs().max() > 0


@pytest.mark.parametrize(("leak", "expected"), [(0.0, 903.496), (1.0, 1190.969)])
def test_gradients_with_online_keys_equal_those_of_the_authors_code(leak, expected):
    loss, gradients = loss_and_gradients(golden_model("online"), golden_batch(), "online", leak)
    assert loss.item() == pytest.approx(9.319527, rel=1e-4)
    assert gradient_norm(gradients) == pytest.approx(expected, rel=1e-4)


def test_masks_equal_those_of_the_authors_code():
    np.random.seed(0)
    order = np.random.permutation(49)
    assert order[:5].tolist() == [29, 4, 26, 30, 32] and order[33:37].tolist() == [1, 12, 43, 24]
    masks = {ratio: train.masks_from_order(torch.from_numpy(order)[None], ratio, 2) for ratio in (0.75, 0.6, 0.5)}
    assert {ratio: int(mask.sum()) for ratio, mask in masks.items()} == {0.75: 148, 0.6: 120, 0.5: 100}
    rows = ["0110110", "1101111", "1111101", "0101111", "1111111", "1011011", "1100101"]
    cells = torch.tensor([[int(cell) for cell in row] for row in rows])
    assert torch.equal(masks[0.75].view(14, 14).long(), cells.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_schedules_equal_those_of_the_authors_code():
    steps, rates = (0, 1, 9, 10, 11, 30, 49), (0, 1.6667e-4, 1.5e-3, 1.5e-3, 1.4977e-3, 7.55e-4, 1.23e-5)
    assert [train.learning_rate(step, 10, 50, 1.5e-3) for step in steps] == pytest.approx(rates, rel=1e-3)
    momenta = [train.ema_momentum(step, 50, 0.996) for step in (0, 1, 25, 49)]
    assert momenta == pytest.approx([0.996, 0.99600395, 0.998, 0.99999605], abs=1e-8)


def test_parameter_counts():
    small16, base16, large16 = (net.NETWORKS[f"vit_{size}_16"] for size in ("small", "base", "large"))
    with torch.device("meta"):
        modules = {
            "small": net.ViT(224, *small16, 0.1, "relative"),
            "base": net.ViT(224, *base16, 0.1, "relative"),
            "large": net.ViT(224, *large16, 1e-5, "relative"),
            "projector": net.Projector(768, 4096, 256),
            "classifier": net.Classifier(224, *base16, 0.1, "relative", 1000),
        }
    counts = {name: sum(weight.numel() for weight in module.parameters()) for name, module in modules.items()}
    expected = {"small": 21_599_400, "base": 85_666_128, "large": 303_137_216}
    assert counts == expected | {"projector": 20_987_904, "classifier": 86_530_984}


# ---------------------------------------------------------------------------------------------- loss


def naive_loss(q, k, mask, tau):
    """Compute equation 3 patch by patch in plain Python, as one mean over all masked patches."""

    def normalised(vector):
        length = math.sqrt(sum(value * value for value in vector))
        return [value / length for value in vector]

    losses = []
    for queries, keys, image_mask in zip(q.tolist(), k.tolist(), mask.tolist(), strict=True):
        keys = [normalised(key) for key in keys]
        for j, (query, masked) in enumerate(zip(queries, image_mask, strict=True)):
            if masked:
                query = normalised(query)
                scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / tau) for key in keys]
                losses.append(-math.log(scores[j] / sum(scores)))
    return sum(losses) / len(losses)


def test_loss_equals_naive_loss_with_unequal_mask_counts():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 9, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=generator) < torch.tensor([[0.3], [0.6], [0.9]])
    assert len(set(mask.sum(1).tolist())) == 3
    assert denoising_contrast(q, k, mask, 0.2).item() == pytest.approx(naive_loss(q, k, mask, 0.2), rel=1e-5)


def test_loss_gradient_reaches_masked_queries_and_all_keys():
    q, k = torch.randn(2, 2, 8, 6).requires_grad_()
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, ::2] = True
    q_gradient, k_gradient = torch.autograd.grad(denoising_contrast(q, k, mask, 0.1), (q, k))
    assert torch.equal(q_gradient.abs().sum(2) > 0, mask) and (k_gradient.abs().sum(2) > 0).all()


@pytest.mark.parametrize(("count", "orthogonal", "chance"), [(196, 0.0088, 5.278), (64, 0.0029, 4.159)])
def test_loss_of_orthogonal_and_of_equal_keys(count, orthogonal, chance):
    mask, unit = torch.ones(1, count, dtype=torch.bool), torch.eye(count)[None]
    assert denoising_contrast(unit, unit, mask, 0.1).item() == pytest.approx(orthogonal, abs=1e-4)
    constant = torch.ones(1, count, 4)
    assert denoising_contrast(constant, constant, mask, 0.1).item() == pytest.approx(chance, abs=1e-3)


@pytest.mark.parametrize("trained_keys", [True, False])
def test_loss_minimum_is_reached_by_freely_optimised_unit_vectors(trained_keys):
    """With trained keys the minimum is a simplex. With fixed orthonormal keys it is the value in the docstring."""
    count, temperature, mask = 5, 0.2, torch.ones(1, 5, dtype=torch.bool)
    q, k = torch.randn(2, 1, count, 8, generator=torch.Generator().manual_seed(0))
    k = k if trained_keys else torch.eye(8)[None, :count]
    free = [vectors.requires_grad_() for vectors in ([q, k] if trained_keys else [q])]
    optimizer = torch.optim.LBFGS(free, max_iter=300, tolerance_change=0.0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = denoising_contrast(q, k, mask, temperature)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = loss_minimum(count, temperature)
    assert loss_minimum(1, temperature) == 0
    if not trained_keys:
        expected = math.log1p((count - 1) * math.exp(-math.sqrt(count / (count - 1)) / temperature))
    assert closure().item() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------------- gradients


@sdpa_kernel(SDPBackend.MATH)
def test_with_ema_keys_the_stop_gradient_has_no_effect_on_gradients():
    """The online gradients are the same even if gradients also flow into the EMA network.

    The attention kernel is fixed, because on a CPU torch uses another one when no gradient is needed.
    """
    model, batch = small_model(), random_batch()
    _, gradients = loss_and_gradients(model, batch, "ema", 0.0)
    model.ema.requires_grad_(True)
    q, k = model(*batch, "ema", 1.0)
    assert k.requires_grad
    denoising_contrast(q, k, batch[2], 0.1).backward()
    has_gradient = {name: weight.grad is not None for name, weight in model.ema.named_parameters()}
    assert has_gradient.pop("vit.mask_token") is False  # the key side is not masked
    assert all(has_gradient.values())
    assert states_equal(gradients, {name: weight.grad for name, weight in model.online.named_parameters()})


def test_gradient_leak_scales_the_key_gradient_and_not_the_loss():
    batch = random_batch()
    loss_0, gradients_0 = loss_and_gradients(small_model(), batch, "online", 0.0)
    loss_half, gradients_half = loss_and_gradients(small_model(), batch, "online", 0.5)
    loss_1, gradients_1 = loss_and_gradients(small_model(), batch, "online", 1.0)
    assert loss_0.item() == pytest.approx(loss_half.item(), rel=1e-5) == pytest.approx(loss_1.item(), rel=1e-5)
    assert not torch.allclose(gradients_0["projector.0.weight"], gradients_1["projector.0.weight"])
    for name, gradient in gradients_half.items():
        torch.testing.assert_close(gradient, (gradients_0[name] + gradients_1[name]) / 2, rtol=1e-3, atol=1e-5)


def test_stop_gradient_blocks_keys_but_not_queries():
    model, (query, key, mask) = small_model(), random_batch()
    query.requires_grad_()
    key.requires_grad_()
    for keys, leak, blocked in (("ema", 0.0, True), ("online", 0.0, True), ("online", 1.0, False)):
        q, k = model(query, key, mask, keys, leak)
        loss = denoising_contrast(q, k, mask, 0.1)
        query_gradient, key_gradient = torch.autograd.grad(loss, (query, key), allow_unused=True)
        assert query_gradient.abs().max() > 0 and (key_gradient is None) is blocked


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", CELLS)
def test_every_online_parameter_gets_a_gradient_in_every_arm(arm, precision):
    model, args = small_model("--positions", "both"), parse_args(*ARMS[arm])
    for block in model.online.vit.blocks:  # at zero, relative biases and mask token get no measurable gradient
        nn.init.normal_(block.attn.q_bias)
    _, gradients = loss_and_gradients(model, random_batch(), args.keys, args.gradient_leak, precision)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
    assert all(weight.grad is None and not weight.requires_grad for weight in model.ema.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_weight_cache_does_not_block_the_query_gradient(precision):
    """The gradients equal those with keys that were computed before, in a separate autocast context."""
    model, (query, key, mask) = small_model("--keys", "online"), random_batch()
    _, gradients = loss_and_gradients(model, (query, key, mask), "online", 0.0, precision)
    with torch.no_grad(), train.devices.autocast(precision, CPU):
        k = model.online(key, None)
    with train.devices.autocast(precision, CPU):
        q = model.online(query, mask)
    loss = denoising_contrast(q, k, mask, 0.1)
    weights = dict(model.online.named_parameters())
    expected = torch.autograd.grad(loss, list(weights.values()))
    assert states_equal(gradients, dict(zip(weights, expected, strict=True)))


def test_queries_and_keys_have_separate_batch_statistics():
    query, key, mask = random_batch()
    q = small_model()(query, key, mask, "online", 0.0)[0]
    assert torch.equal(q, small_model()(query, key + 1, mask, "online", 0.0)[0])
    network = small_model().online
    joint = network.projector(torch.cat([network.vit(query, mask), network.vit(key)]))[: len(query), 1:]
    assert not torch.allclose(q, joint, atol=1e-3)
    for keys, online_passes, ema_passes in (("ema", 1, 1), ("online", 2, 0)):
        model = small_model()
        model(query, key, mask, keys, 0.0)
        passes = [branch.projector[1].num_batches_tracked.item() for branch in (model.online, model.ema)]
        assert passes == [online_passes, ema_passes]


def test_network_is_deterministic():
    """There is no dropout and no stochastic depth."""
    model, (x, _, mask) = small_model(), random_batch()
    with torch.no_grad():
        q, k = model(x, x, torch.zeros_like(mask), "online", 0.0)
    assert torch.equal(q, k)
    assert all(not isinstance(module, nn.Dropout) for module in model.modules())


# ---------------------------------------------------------------------------------------------- EMA and optimiser


def test_ema_is_an_independent_copy_at_initialisation():
    model = small_model()
    assert states_equal(copy_state(model.online), copy_state(model.ema))
    pairs = zip(model.online.parameters(), model.ema.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize("arm", CELLS)
def test_ema_is_updated_after_the_optimizer_step_in_every_arm(arm):
    model = small_model()
    start = {name: weight.clone() for name, weight in model.ema.named_parameters()}
    train_one_step(model, random_batch(), arm, momentum=0.9)
    for name, weight in model.ema.named_parameters():
        torch.testing.assert_close(weight, 0.9 * start[name] + 0.1 * model.online.get_parameter(name))
    assert not torch.equal(model.online.vit.mask_token, start["vit.mask_token"])
    # Running statistics are not averaged: they change only in forward passes of the EMA network.
    buffers = dict(model.ema.projector.named_buffers())
    had_forward_pass = buffers["1.num_batches_tracked"].item() == 1
    assert had_forward_pass == (parse_args(*ARMS[arm]).keys == "ema")


def test_ema_copies_online_at_momentum_0_and_is_unchanged_at_1():
    for momentum in (1.0, 0.0):
        model = small_model()
        before = {name: weight.clone() for name, weight in model.ema.named_parameters()}
        train_one_step(model, random_batch(), momentum=momentum)
        expected = before if momentum == 1 else dict(model.online.named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in model.ema.named_parameters())


def test_gradient_is_clipped_and_clipped_steps_are_counted(monkeypatch):
    clipped = {}
    for limit in (1e-3, 1e6):
        monkeypatch.setitem(ARMS, "base", ["--clip", str(limit)])
        model = small_model()
        clipped[limit] = train_one_step(model, random_batch())["clipped_fraction"]
        assert gradient_norm({name: weight.grad for name, weight in model.online.named_parameters()}) <= limit * 1.001
    assert clipped == {1e-3: 1.0, 1e6: 0.0}


def test_weight_decay_groups():
    model = small_model("--positions", "both")
    decay, no_decay = train.build_optimizer(argparse.Namespace(lr=0.1), model).param_groups
    names = {id(weight): name for name, weight in model.online.named_parameters()}
    exempt = {names[id(weight)] for weight in no_decay["params"]}
    assert decay["weight_decay"] == 0.05 and no_decay["weight_decay"] == 0
    assert {names[id(weight)] for weight in decay["params"]} | exempt == set(names.values())
    assert {"vit.cls_token", "vit.pos_embed", "vit.blocks.0.gamma_1", "vit.blocks.1.attn.q_bias"} <= exempt
    assert not exempt & {"vit.mask_token", "vit.rel_pos_bias.relative_position_bias_table", "projector.0.weight"}


# ---------------------------------------------------------------------------------------------- networks and names


def test_relative_position_index_equals_naive_index():
    grid = 3
    rows = train.ViT(12, 4, 8, 1, 2, 0.1, "relative").rel_pos_bias.index.view(10, 10)
    for i, j in itertools.product(range(grid * grid), repeat=2):
        vertical, horizontal = i // grid - j // grid, i % grid - j % grid
        assert rows[1 + i, 1 + j] == (vertical + 2) * 5 + horizontal + 2
    assert set(rows[0, 1:].tolist()) == {25} and set(rows[1:, 0].tolist()) == {26} and rows[0, 0] == 27


def test_relative_bias_is_added_to_the_attention_logits():
    vit, x = net.ViT(16, 4, 8, 2, 2, 0.5, "relative"), torch.randn(2, 3, 16, 16)
    nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    attn, tokens = vit.blocks[0].attn, torch.randn(2, 17, 8)
    for bias in (attn.q_bias, attn.v_bias):
        nn.init.normal_(bias)
    table = vit.rel_pos_bias.relative_position_bias_table[vit.rel_pos_bias.index].view(17, 17, 2)
    q, k, v = ((tokens @ w.T).view(2, 17, 2, 4) for w in attn.qkv.weight.chunk(3))
    q, v = q + attn.q_bias.view(2, 4), v + attn.v_bias.view(2, 4)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2 + table.permute(2, 0, 1)
    expected = torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v).flatten(2) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(tokens, vit.rel_pos_bias()), expected)
    before = vit(x)
    nn.init.zeros_(vit.rel_pos_bias.relative_position_bias_table)
    assert not torch.allclose(before, vit(x))


def test_block_is_pre_norm_with_exact_gelu_and_layer_scale():
    block, x = net.Block(8, 2, 0.25).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    nn.init.normal_(block.mlp.fc1.weight)

    def layer_norm(tokens):
        return (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()

    middle = x + 0.25 * block.attn(layer_norm(x), None)
    inner = layer_norm(middle) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    active = inner * (1 + torch.special.erf(inner / math.sqrt(2))) / 2
    expected = middle + 0.25 * (active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, None), expected, rtol=1e-9, atol=1e-12)


def test_mask_token_replaces_masked_patches_before_positions_are_added():
    vit, x = net.ViT(16, 4, 8, 2, 2, 0.5, "relative"), torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :6] = True
    other = x.clone()
    other[:, :, :4] = 7  # the first four patches
    assert torch.equal(vit(x, mask), vit(other, mask)) and not torch.allclose(vit(x), vit(other))
    tokens = vit(x, mask)[:, 1:7]
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))  # equal, because the relative table is zero
    both = net.ViT(16, 4, 8, 2, 2, 0.5, "both")
    assert not torch.allclose(both(x, mask)[:, 1], both(x, mask)[:, 2])


def test_initial_weights_are_truncated_and_scaled_by_depth():
    vit = net.ViT(32, 4, 64, 3, 4, 0.1, "both")
    vit.requires_grad_(False)
    for weight in (vit.cls_token, vit.mask_token, vit.pos_embed, vit.patch_embed.proj.weight):
        assert 0.008 < weight.std() < 0.015 and weight.abs().max() <= 0.02
    share = (vit.blocks[0].mlp.fc1.weight.abs() < 0.01).float().mean().item()
    assert share == pytest.approx(math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2)), abs=0.02)
    for depth, block in enumerate(vit.blocks, 1):
        assert block.mlp.fc1.weight.abs().max() == pytest.approx(0.02, rel=0.01)
        for weight in (block.mlp.fc2.weight, block.attn.proj.weight):
            assert weight.abs().max() == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.01)
        assert (block.gamma_1 == 0.1).all() and (block.attn.qkv.bias is None)


def test_arms_share_initial_weights():
    base = copy_state(small_model())
    for flags in (["--positions", "relative"], ["--positions", "absolute"], ["--keys", "online"], ["--dim", "30"]):
        other = copy_state(small_model(*flags))
        shared = [name for name in base if name in other and base[name].shape == other[name].shape]
        assert len(shared) >= len(base) - 6 and all(torch.equal(base[name], other[name]) for name in shared)
    assert not torch.equal(base["online.vit.cls_token"], copy_state(small_model("--seed", "1"))["online.vit.cls_token"])


def test_authors_parameter_names_round_trip():
    branch = GoldenBranch(0)
    authors = to_authors_names(branch.state_dict())
    names = {"cls_token", "mask_token", "patch_embed.proj.weight", "rel_pos_bias.relative_position_bias_table",
             "blocks.1.gamma_2", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.attn.qkv.weight",
             "norm.bias", "blocks.1.mlp.fc2.bias", "projectors.3.weight", "projectors.7.running_var"}  # fmt: skip
    assert names <= set(authors) and "blocks.0.attn.qkv.bias" not in authors and "projectors.7.weight" not in authors
    assert authors["rel_pos_bias.relative_position_bias_table"].shape == (7 * 7 + 3, 4)
    unused = {
        "lm_head.weight": torch.zeros(9, 32),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17).long(),
    }
    other = GoldenBranch(3)
    other.load_state_dict(net.from_authors_names(authors | unused))
    assert states_equal(copy_state(other), copy_state(branch))


@pytest.mark.parametrize("positions", net.POSITIONS)
def test_classifier_is_initialised_from_a_pretrained_network(positions):
    vit = net.ViT(16, 4, 8, 3, 2, 0.5, positions)
    if vit.rel_pos_bias:
        nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    classifier, x = net.Classifier(16, 4, 8, 3, 2, 0.5, positions, 5, drop_path=0.5), torch.randn(4, 3, 16, 16)
    missing, extra = classifier.load_state_dict(net.to_classifier(vit.state_dict()), strict=False)
    assert not extra and set(missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    activations = {}
    vit.norm.register_forward_pre_hook(lambda module, inputs: activations.update(tokens=inputs[0]))
    classifier.fc_norm.register_forward_pre_hook(lambda module, inputs: activations.update(mean=inputs[0]))
    classifier.eval()
    vit(x)
    classifier(x)
    torch.testing.assert_close(activations["mean"], activations["tokens"][:, 1:].mean(1))
    tables = [name for name in classifier.state_dict() if name.endswith("position_bias_table")]
    assert len(tables) == (0 if positions == "absolute" else 3)
    pointers = {classifier.state_dict()[name].data_ptr() for name in tables}
    assert len(pointers) == len(tables)  # separate copies
    assert classifier.head.weight.abs().max() <= 2e-5 and classifier(x).shape == (4, 5)


def test_stochastic_depth_drops_branches_in_training_only():
    block = net.Block(8, 2, 1.0, 2, drop_path=0.5)
    block.attn.proj.bias.data.fill_(1.0)
    x = torch.zeros(4000, 5, 8)
    torch.manual_seed(0)
    kept = (block.stochastic_depth(torch.ones(4000, 1, 1)) > 0).float()
    assert 0.45 < kept.mean() < 0.55 and set(block.stochastic_depth(torch.ones(4000, 1, 1)).unique().tolist()) == {
        0.0,
        2.0,
    }
    block.eval()
    assert torch.equal(block(x, None), block(x, None))
    rates = [block.drop_path for block in net.Classifier(16, 4, 8, 3, 2, 0.1, "relative", 5, 0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


# ---------------------------------------------------------------------------------------------- masks and views


def random_images(count: int, device: str = "cpu") -> images.Images:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels, channels = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(3, 1, 1, device=device)
    return images.Images(pixels, labels, pixels, labels, 6, channels / 2, channels, "")


@pytest.mark.parametrize(("patches", "ratio", "masked"), [(196, 0.75, 148), (64, 0.75, 48), (64, 0.5, 32), (64, 1, 64)])
def test_masks_are_random_squares_with_a_fixed_count(patches, ratio, masked):
    masks = train.random_masks(seeding.SampleRNG(0, "mask", 0, 500), patches, ratio, 2)
    side = round(patches**0.5)
    assert masks.shape == (500, patches) and (masks.sum(1) == masked).all()
    squares = masks.view(500, side // 2, 2, side // 2, 2)
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))
    assert (masks.float().mean(0) - masked / patches).abs().max() < 0.1
    if ratio < 1:
        assert len(masks.unique(dim=0)) > 400


def epoch_batches(
    arm: str = "base", rows: slice = slice(0, 8), seed: int = 0, epoch: int = 1, data=None
) -> list[train.Batch]:
    torch.manual_seed(0)
    args = parse_args("--batch", "8", "--seed", str(seed), *ARMS[arm])
    return list(train.batches(args, data or random_images(40), epoch, rows))


def test_arms_share_queries_and_masks_and_basic_keys_equal_queries():
    data = random_images(40)
    base, basic = epoch_batches(data=data), epoch_batches("symmetric", data=data)
    assert len(base) == 5
    for a, b in zip(base, basic, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert torch.equal(b[0], b[1]) and not torch.equal(a[0], a[1])
    assert not torch.equal(epoch_batches(data=data, seed=1)[0][0], base[0][0])
    repeated, next_epoch = epoch_batches(data=data), epoch_batches(data=data, epoch=2)
    for first, second in zip(base, repeated, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(next_epoch[0][0], base[0][0]) and not torch.equal(next_epoch[0][2], base[0][2])


def test_each_part_and_step_of_a_batch_has_its_own_random_numbers(monkeypatch):
    calls, sample_rng = [], seeding.SampleRNG

    def recording_rng(seed, purpose, step, *rest):
        calls.append((purpose, step))
        return sample_rng(seed, purpose, step, *rest)

    monkeypatch.setattr(seeding, "SampleRNG", recording_rng)
    epoch_batches(epoch=2)
    assert sorted(calls) == sorted(itertools.product(("geometry", "colours", "mask"), range(10, 15)))
    calls.clear()
    epoch_batches("symmetric", epoch=2)
    assert sorted(calls) == sorted(itertools.product(("geometry", "mask"), range(10, 15)))


def test_ranks_split_the_batches():
    data = random_images(40)
    whole = epoch_batches(data=data)
    rank_0, rank_1 = (epoch_batches(rows=rows, data=data) for rows in (slice(0, 4), slice(4, 8)))
    for batch, part_0, part_1 in zip(whole, rank_0, rank_1, strict=True):
        assert all(torch.equal(x, torch.cat([y, z])) for x, y, z in zip(batch, part_0, part_1, strict=True))


def test_both_views_share_one_crop(monkeypatch):
    """Without colour augmentation the strong view equals the crop. Glyphs are never flipped."""
    for name in ("random_color_jitter", "random_grayscale"):
        monkeypatch.setattr(augment, name, lambda view, *_, **__: view)
    monkeypatch.setattr(train, "solarize", lambda view, _: view)
    assert all(torch.equal(query, key) for query, key, _ in epoch_batches())
    assert train.augmentation("glyphs10-light")["flip"] == 0 and train.augmentation("cifar100")["flip"] == 0.5
    assert train.augmentation("folder")["crop"] == (0.08, 1.0)


def test_solarize_equals_torchvision():
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    chosen = torch.tensor([True, False, True, False])
    for result, image, solarized in zip(train.solarize(pixels / 255, chosen), pixels, chosen, strict=True):
        expected = tv.solarize(image, 128) if solarized else image
        torch.testing.assert_close(result, expected / 255)


def test_strong_view_uses_the_parameters_of_the_authors_code(monkeypatch):
    parameters = {}

    def jitter(view, rng, *strengths, probability):
        parameters["jitter"] = (*strengths, probability)
        return view

    monkeypatch.setattr(augment, "random_color_jitter", jitter)
    for name in ("random_grayscale", "random_gaussian_blur"):
        monkeypatch.setattr(augment, name, lambda view, _, *rest, name=name: parameters.update({name: rest}) or view)
    view = train.strong_view(torch.full((4000, 3, 2, 2), 0.75), seeding.SampleRNG(0, "colours", 0, 4000), 0.1)
    assert parameters == {
        "jitter": (0.4, 0.4, 0.2, 0.1, 0.8),
        "random_grayscale": (0.2,),
        "random_gaussian_blur": ((0.1, 2.0), 0.1),
    }
    assert (view[:, 0, 0, 0] < 0.5).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_worker_views_share_one_crop():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8))
    aug = train.augmentation("folder")
    torch.manual_seed(0)
    with_strong = train.WorkerViews(32, True, **aug)(image)
    torch.manual_seed(0)
    without_strong = train.WorkerViews(32, False, **aug)(image)
    assert with_strong.shape == (2, 3, 32, 32) and without_strong.shape == (1, 3, 32, 32)
    assert with_strong.dtype == torch.uint8 and torch.equal(with_strong[0], without_strong[0])
    torch.manual_seed(0)
    changed = [not torch.equal(*train.WorkerViews(32, True, **aug)(image)) for _ in range(200)]
    assert 0.8 < np.mean(changed) < 0.95  # 1 - 0.2 * 0.8 * 0.9 * 0.8 = 0.88


# ---------------------------------------------------------------------------------------------- diagnostics


def test_position_r2_equals_naive_explained_variance():
    k = torch.randn(5, 4, 3, dtype=torch.float64)
    unit = F.normalize(k, dim=2)
    mean, explained, total = unit.mean((0, 1)), 0.0, 0.0
    for image, position in itertools.product(range(5), range(4)):
        explained += (unit[:, position].mean(0) - mean).square().sum().item()
        total += (unit[image, position] - mean).square().sum().item()
    assert train.position_r2(k) == pytest.approx(explained / total)


def test_diagnostics_separate_position_code_from_content():
    class ConstantModel(nn.Module):
        """Returns the same tensor as queries and keys."""

        def __init__(self, features):
            super().__init__()
            self.features = features

        def forward(self, *_):
            return self.features, self.features

    position_code, content = torch.eye(16).expand(40, 16, 16), torch.randn(40, 16, 16)
    mask, x = torch.ones(40, 16, dtype=torch.bool), torch.zeros(40, 3, 4, 4)
    of_code = train.diagnose(ConstantModel(position_code), "ema", x, mask)
    of_content = train.diagnose(ConstantModel(content), "ema", x, mask)
    assert of_code == pytest.approx({"own_top1": 1, "cross_top1": 1, "position_r2": 1, "key_effective_rank": 15})
    assert of_content["own_top1"] == 1 and of_content["cross_top1"] < 0.2 and of_content["position_r2"] < 0.1
    assert 15 < of_content["key_effective_rank"] < 16


@pytest.mark.parametrize("arm", CELLS)
def test_diagnostics_do_not_change_statistics_or_modes(arm):
    model, keys = small_model(), parse_args(*ARMS[arm]).keys
    before, (x, _, mask) = copy_state(model), random_batch()
    metrics = train.diagnose(model, keys, x, mask)
    assert states_equal(before, copy_state(model)) and all(module.training for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 6 and all(norm.track_running_stats for norm in norms)
    with torch.no_grad():
        q, k = copy.deepcopy(model)(x, x, mask, keys, 0.0)
    correct = (F.normalize(q, dim=2) @ F.normalize(k, dim=2).mT).argmax(2) == torch.arange(64)
    assert metrics["own_top1"] == pytest.approx(correct[mask].float().mean().item())


def test_diagnostic_images_are_evenly_spaced_in_the_test_set():
    data = random_images(1000)
    x, mask = train.diagnostic_batch(parse_args(), data)
    assert x.shape == (256, 3, 32, 32) and (mask.sum(1) == 48).all()
    assert torch.equal(x[255], data.normalise(data.test[3 * 255]))
    assert len(train.diagnostic_batch(parse_args(), random_images(20))[0]) == 20


@pytest.mark.slow
def test_online_keys_become_a_position_code_without_stop_gradient():
    """A few hundred small steps reach this optimum, which ignores the image. EMA keys keep encoding content."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 32, 32), generator=generator).byte()
    data = random_images(256)._replace(train=pixels, test=pixels[:64])
    metrics = {}
    flags = ["--positions", "both", "--dim", "64", "--hidden", "64", "--layer-scale", "1", "--batch", "16"]
    flags += ["--epochs", "8", "--lr", "5e-3", "--momentum", "0.98"]
    for arm in ("base", "online-no-stop-gradient"):
        args = parse_args(*ARMS[arm], *flags, "--views", "basic")
        metrics[arm] = final_metrics(args, train.build_model(args, CPU), data)
    no_stop_gradient = metrics["online-no-stop-gradient"]
    assert no_stop_gradient["loss"] < 0.05
    assert no_stop_gradient["position_r2"] > 0.95 and no_stop_gradient["cross_top1"] > 0.95
    assert metrics["base"]["position_r2"] < 0.9


def test_position_keys_are_orthonormal_and_ignore_the_image():
    model, (query, key, mask) = small_model("--keys", "position"), random_batch()
    q, k = model(query, key, mask, "position", 0.0)
    assert k.shape == q.shape == (6, 64, 66) and not k.requires_grad and q.requires_grad
    torch.testing.assert_close(k @ k.mT, torch.eye(64).expand(6, -1, -1))
    assert torch.equal(q, model(query, key, mask, "ema", 0.0)[0])
    # The loss is a cross-entropy over the positions, with the cosines to the codes as logits.
    logits = F.normalize(q, dim=2)[:, :, :64] / 0.1
    expected = F.cross_entropy(logits[mask], torch.arange(64).expand(6, -1)[mask])
    torch.testing.assert_close(denoising_contrast(q, k, mask, 0.1), expected)
    diagnostics = train.diagnose(model, "position", query, mask)
    assert diagnostics["position_r2"] == pytest.approx(1) and diagnostics["own_top1"] == diagnostics["cross_top1"]


# ---------------------------------------------------------------------------------------------- arms and flags


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_arms_have_distinct_arguments_and_studies_use_declared_arms(scale):
    arms, studies = design("conmim", scale)
    parsed = {json.dumps(vars(train.parse_args(["--scale", scale, *flags])), default=str) for flags in arms.values()}
    assert len(parsed) == len(arms) == (15 if scale == "demo" else 10)
    contrasts = [contrast for study in studies.values() for contrast in study]
    assert {arm for contrast in contrasts for arm in contrast.split(":")} == set(arms)
    assert studies["conmim-stop-gradient"][0] == "online-no-stop-gradient:online-keys"
    assert studies["conmim-asymmetry"][0] == "symmetric:base"


@pytest.mark.parametrize(("scale", "examples"), [("demo", 5000), ("gpu", 50_000), ("paper", 1_281_167)])
def test_longer_fine_tuning_adds_the_steps_of_pretraining(scale, examples):
    """To the nearest epoch of fine-tuning; mnist5k has 4,000 training images."""
    batch = {name: row[("demo", "gpu", "paper").index(scale)] for name, row in RECIPES.items()}["batch"]
    arms, _ = design("conmim", scale)
    settings = [("no-pretraining", "no-pretraining-long", examples)]
    if scale == "demo":
        settings.append(("no-pretraining@mnist5k", "no-pretraining-long@mnist5k", 4000))
    for short, long, count in settings:
        base = train.parse_args(["--scale", scale])
        args, longer = (train.parse_args(["--scale", scale, *arms[arm]]) for arm in (short, long))
        added = base.epochs * (count // base.batch)
        steps_per_epoch = (args.labels or count) // batch
        assert abs((longer.finetune_epochs - args.finetune_epochs) * steps_per_epoch - added) <= 0.5 * steps_per_epoch


def test_every_flag_is_used():
    source = (ROOT / "conmim/train.py").read_text()
    source = source[source.index("class Branch") :] + (ROOT / "conmim/eval.py").read_text()
    read = set(re.findall(r"\bargs\.(\w+)", source)) - {"folder", "held_out", "weights"}  # these are eval.py's
    flags = set(vars(train.parse_args([])))
    assert read == flags - READ_BY_COMMON


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-stop-gradient", "--gradient-leak", "0.5"], "--gradient-leak 0.5"),
        (["--gradient-leak", "2"], "not between 0 and 1"),
        (["--mask-ratio", "0"], "--mask-ratio 0"),
        (["--temperature", "0"], "is not between"),
        (["--momentum", "1.1"], "not between 0 and 1"),
        (["--size", "64"], "requires --data-set folder"),
        (["--data-set", "folder", "--size", "36"], "a multiple of 8"),
        (["--network", "vit_base_16", "--data-set", "folder", "--size", "48"], "a multiple of 32"),
        (["--keys", "both"], "invalid choice"),
        (["--keys", "position", "--dim", "63"], "--dim of at least 64"),
        (["--keys", "position", "--no-stop-gradient"], "--keys position encodes no image"),
        (["--keys", "position", "--views", "basic"], "--keys position encodes no image"),
        (["--labels", "0"], "less than 1"),
        (["--transplant", "some"], "invalid choice"),
        (["--mask", "0.5"], "unrecognized"),
        (["--epochs", "-1"], "less than 0"),
        (["--scale", "gpu"], "train at scale demo"),
        (["--data-set", "cifar100", "--data", "nowhere"], "common.images cifar100"),
        (["--batch", "6000"], "larger than the training set (5000 examples)"),
    ],
)
def test_usage_errors_are_one_line(flags, words, tmp_path, capsys):
    assert_usage_error(train.main, flags, words, tmp_path, capsys)


# ---------------------------------------------------------------------------------------------- a fake GPU


def train_on_a_fake_gpu(count: int, flags: list[str]) -> None:
    """Train two epochs with the augmentation of folders, which has all parts."""
    more = ["--data-set", "folder", "--batch", "16", "--epochs", "2", "--warm-up", "1", "--lr", "0.1"]
    args, data = parse_args(*flags, *more, "--momentum", "0.9"), random_images(count, "cuda")
    model = train.build_model(args, data.device)
    train.train(args, FakeRun(), model, data, train.build_optimizer(args, model))


@pytest.mark.parametrize("arm", CELLS)
@pytest.mark.parametrize("positions", ["relative", "both"])
def test_training_and_diagnostics_stay_on_the_gpu(arm, positions, fake_gpu):
    train_on_a_fake_gpu(40, [*ARMS[arm], "--positions", positions])
    assert fake_gpu.syncs > 0


def test_steps_do_not_synchronise_host_and_device(fake_gpu):
    """The number of synchronisations does not depend on the number of steps."""
    syncs = []
    for count in (40, 88):
        fake_gpu.syncs = 0
        train_on_a_fake_gpu(count, [])
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0


# ---------------------------------------------------------------------------------------------- runs

TINY = ["--hidden", "24", "--dim", "66", "--rehearse", "3", "--batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with one finished run per arm, of two epochs with three steps each."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(net.NETWORKS, "vit_demo", net.Shape(4, 16, 2, 2))
        patch.setitem(train.SCALES, "mask_square", (2, 2, 2))
        for name, flags in ARMS.items():
            train.main([*TINY, "--data", str(root / "data"), *flags, "--out", str(root / name / "0")])
    return root


def load_weights(run) -> dict[str, torch.Tensor]:
    return checkpoints.load(run / "model.pt")["model"]


def test_arms_end_with_different_weights(finished):
    weights = {arm: load_weights(finished / arm / "0")["online.vit.patch_embed.proj.weight"] for arm in ARMS}
    for a, b in itertools.combinations(ARMS, 2):
        assert not torch.equal(weights[a], weights[b]), (a, b)


@pytest.mark.parametrize("views", ["asymmetric", "basic"])
def test_a_run_with_ema_keys_is_bit_identical_without_stop_gradient(views, finished, tmp_path):
    flags = [*TINY, "--data", str(finished / "data"), "--views", views, "--no-stop-gradient"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    arm = "base" if views == "asymmetric" else "basic-views"
    assert states_equal(load_weights(tmp_path / "run"), load_weights(finished / arm / "0"))


def test_no_pretraining_keeps_the_initial_weights(finished):
    run = finished / "no-pretraining/0"
    saved = checkpoints.load(run / "model.pt")
    assert saved["epoch"] == 0 and saved["diverged"] is False
    arguments = json.loads((run / "args.json").read_text())["arguments"]
    assert states_equal(saved["model"], copy_state(train.build_model(argparse.Namespace(**arguments), CPU)))
    lines = (run / "train.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["epoch"] == 0


def test_train_log_keys(finished):
    keys = {"epoch", "own_top1", "cross_top1", "position_r2", "key_effective_rank"}
    keys |= {"seconds", "peak_memory"}
    for arm in CELLS:
        lines = [json.loads(line) for line in (finished / arm / "0/train.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [0, 1, 2] and set(lines[0]) == keys
        assert set(lines[2]) == keys | {"loss", "clipped_fraction", "momentum", "lr", "examples_per_second"}
        assert abs(lines[1]["loss"] - math.log(64)) < 2 and 0 <= lines[2]["clipped_fraction"] <= 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("arm", ["base", "online-no-stop-gradient"])
def test_a_killed_run_resumes_bit_identical(arm, finished, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(finished / "data"), *ARMS[arm], "--out", str(tmp_path / "cut")]
    save = Run.save

    def save_and_die(self, epoch, *rest):
        save(self, epoch, *rest)
        if epoch == 1:
            raise Killed

    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(Killed):
        train.main(flags)
    monkeypatch.setattr(Run, "save", save)
    train.main(flags)
    assert states_equal(load_weights(tmp_path / "cut"), load_weights(finished / arm / "0"))
    runs = (tmp_path / "cut", finished / arm / "0")
    lines = [json.loads((run / "train.jsonl").read_text().splitlines()[-1]) for run in runs]
    for name in ("seconds", "examples_per_second", "peak_memory"):
        del lines[0][name], lines[1][name]
    assert lines[0] == lines[1]


def test_a_diverged_run_keeps_the_last_finite_weights(finished, tmp_path):
    train.main([*TINY, "--data", str(finished / "data"), "--lr", "1e30", "--out", str(tmp_path / "run")])
    saved = checkpoints.load(tmp_path / "run/model.pt")
    assert saved["diverged"] is True and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_train_script_runs(tmp_path):
    command = [sys.executable, str(ROOT / "conmim/train.py"), *TINY, "--epochs", "0", "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--data", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run/model.pt").exists(), done.stderr


# ---------------------------------------------------------------------------------------------- larger scales


LARGER = [("gpu", "vit_tiny_4"), ("gpu", "vit_small_8"), ("paper", "vit_small_16"), ("paper", "vit_base_16")]


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "network"), LARGER)
def test_arms_take_two_steps_at_full_network_size(scale, network, pictures, tmp_path, monkeypatch):
    """Full widths on four small images. Images above 64 pixels are augmented by the code of the DataLoader workers.

    One network of each scale trains all arms, the others only the cheapest and the most expensive arm, or base.
    """
    size = {"vit_tiny_4": 32, "vit_small_8": 64}.get(network, 96)
    flags = ["--scale", scale, "--network", network, "--size", str(size)]
    flags += ["--data", str(tmp_path)] if network == "vit_tiny_4" else ["--data", str(pictures), "--data-set", "folder"]
    monkeypatch.setattr(images, "cifar", lambda *_: (torch.randint(0, 256, (40, 3, 32, 32)).byte(), torch.arange(40)))
    monkeypatch.setattr(train, "N_DIAGNOSTIC", 4)
    flags += ["--batch", "4", "--epochs", "1"]
    args = train.parse_args(flags)
    data = images.load_or_stream(args.data_set, args.data, size, CPU, 0).subset(2 * args.batch)
    model, arms = train.build_model(args, CPU), design("conmim", scale)[0]
    ema, online = (list(branch.parameters()) for branch in (model.ema, model.online))
    start = [weight.detach().clone() for weight in online]
    some = {"vit_small_8": ("base", "symmetric-no-stop-gradient"), "vit_base_16": ("base",)}
    for arm in some.get(network, CELLS):
        with torch.no_grad():
            torch._foreach_copy_(online, start)
            torch._foreach_copy_(ema, start)
        loss = final_metrics(train.parse_args([*flags, *arms[arm]]), model, data)["loss"]
        assert math.isfinite(loss) and abs(loss - math.log((size // net.NETWORKS[network].patch) ** 2)) < 4
        assert all(not torch.equal(a, b) for a, b in zip(online, start, strict=True))
        assert all(not torch.equal(a, b) for a, b in zip(ema, start, strict=True) if b.abs().max() > 0)


@pytest.mark.slow
def test_paper_scale_trains_on_two_ranks_with_workers(pictures, tmp_path):
    """The network has the full width and two of its twelve blocks."""
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
train.SCALES["mask_square"] = (2, 2, 2)
"""


def train_on_two_and_one(tmp_path, pictures, norms: str, *flags: str):
    """Train the same run on two ranks and on one.

    Returns the initial weights, the final weights on two ranks and on one, and the last log line of both.
    """
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}{norms}train.main(sys.argv[1:])")
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--hidden", "24", "--dim", "20"]
    common += ["--batch", "16", "--epochs", "2", "--warm-up", "0", "--device", "cpu", "--lr", "0.01", *flags]
    for name, ranks in (("two", 2), ("one", 1)):
        done = forked.run(tmp_path, script, *common, "--out", str(tmp_path / name), ranks=ranks)
        assert done.returncode == 0, done.stderr
    two, one = (checkpoints.load(tmp_path / name / "model.pt") for name in ("two", "one"))
    logs = [json.loads((tmp_path / n / "train.jsonl").read_text().splitlines()[-1]) for n in ("two", "one")]
    return copy_state(train.build_model(argparse.Namespace(**one["arguments"]), CPU)), two["model"], one["model"], logs


@pytest.mark.parametrize("arm", ["base", "online-no-stop-gradient"])
def test_two_ranks_equal_one_with_batch_norms_in_eval_mode(arm, pictures, tmp_path):
    start, two, one, logs = train_on_two_and_one(tmp_path, pictures, forked.NORMS_IN_EVAL_MODE, *ARMS[arm])
    for name, expected in one.items():
        change = (expected.double() - start[name].double()).norm()
        difference = (two[name].double() - expected.double()).norm()
        assert difference <= 1e-3 * change + 2e-7 * expected.double().norm(), name
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["own_top1"] == pytest.approx(logs[1]["own_top1"], abs=0.01)


def test_each_rank_has_its_own_batch_statistics(pictures, tmp_path):
    _, two, one, logs = train_on_two_and_one(tmp_path, pictures, "")
    assert logs[0]["loss"] != pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.1)
    assert not torch.allclose(two["online.projector.1.running_mean"], one["online.projector.1.running_mean"], rtol=1e-4)
