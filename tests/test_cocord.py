"""CoCoRD: loss and gradients, what follows what, the queue, networks, weights, the arms, and train -> eval -> plot."""

import argparse
import copy
import functools
import json
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bench_cocord import OneEpoch
from conftest import ROOT, Unwritten, refused
from plan import design
from torch import nn
from torchvision.transforms.v2 import functional as tv

from cocord import eval as evaluate
from cocord import net, plot, teacher, train
from cocord.train import CoCoRD, contrastive_loss, distillation_loss, ema_update, prediction_loss
from common import checkpoints, images
from common.run import Run

ARMS, STUDIES = design("cocord")
TERMS = {
    "forward_weight": 4.0, "swapped_weight": 4.0, "lambda_contrast": 1.0, "lambda_class": 1.0, "lambda_kd": 0.5,
    "temperature": 0.1, "student_momentum": 0.9, "teacher_momentum": 0.999, "precision": "float32",
}  # fmt: skip
CPU = torch.device("cpu")


def small(**changes) -> CoCoRD:
    settings = {"student": "vgg_s", "classes": 6, "teacher_width": 32, "hidden": 24, "dim": 16, "bottleneck": 8}
    return CoCoRD(**settings | {"queue": 20, "teacher_head": "full", "seed": 0} | changes)


def taught(name: str = "vgg_s32") -> nn.Module:
    torch.manual_seed(5)
    network = net.build(name, 6).eval().requires_grad_(False)
    for module in network.modules():  # as if trained: running statistics of their own
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network


def batch(rows: int = 8) -> tuple[list[torch.Tensor], torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return list(torch.randn(3, rows, 3, 32, 32, generator=numbers)), torch.arange(rows) % 6


def step(model: CoCoRD, network: nn.Module, made=None, **flags) -> torch.Tensor:
    """One step of the loop of train.py; the parts of its loss."""
    args = argparse.Namespace(**vars(train.parse_args([])) | TERMS | {"lr": 0.1} | flags)
    optimizer = train.build_optimizer(args, [model.student, model.head, model.predictor])
    run, (views, labels) = OneEpoch(), made or batch()
    with mock.patch.object(train, "batches", lambda *_: iter([(views, labels)])):
        train.train(args, run, model, tensors(8), optimizer, train.Teacher(network))
    return run.totals / len(labels)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *parts: str) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(parts) or not parts)


# ---------------------------------------------------------------------------------------------- loss


def naive_contrast(z, keys, queue, tau):
    """Image by image: -log(exp(q k / tau) / (exp(q k / tau) + sum over the queue))."""
    total = 0.0
    for row, key in zip(z.tolist(), keys.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in row))
        own = math.exp(sum(x * y for x, y in zip(row, key, strict=True)) / length / tau)
        others = [sum(x * y for x, y in zip(row, other, strict=True)) / length / tau for other in queue.tolist()]
        total -= math.log(own / (own + sum(map(math.exp, others))))
    return total / len(z)


def naive_prediction(p, u):
    """Mean squared distance of the unit vectors."""
    unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (p, u)]
    return (unit[0] - unit[1]).square().sum(1).mean().item()


def naive_distillation(logits, target, t=4.0):
    total = 0.0
    for a, b in zip(logits.tolist(), target.tolist(), strict=True):
        s, q = ([math.exp(x / t) / sum(math.exp(y / t) for y in row) for x in row] for row in (a, b))
        total += sum(y * math.log(y / x) for x, y in zip(s, q, strict=True))
    return t * t * total / len(logits)


def test_losses_equal_naive_ones():
    numbers = torch.Generator().manual_seed(0)
    z, k, u, logits, soft = (torch.randn(5, 7, generator=numbers) for _ in range(5))
    keys, queue = F.normalize(k, dim=1), F.normalize(torch.randn(9, 7, generator=numbers), dim=1)
    loss, seen = contrastive_loss(z, keys, queue, 0.1)
    assert loss.item() == pytest.approx(naive_contrast(z, keys, queue, 0.1), rel=1e-5)
    cosines = F.normalize(z, dim=1) @ torch.cat([keys, queue]).T
    own, others = cosines.diag(), cosines[:, 5:]
    expected = [(own > others.max(1).values).float().mean(), own.mean(), others.mean()]
    torch.testing.assert_close(seen, torch.stack(expected))
    assert prediction_loss(z, u).item() == pytest.approx(naive_prediction(z, u), rel=1e-5)
    assert distillation_loss(logits, soft).item() == pytest.approx(naive_distillation(logits, soft), rel=1e-5)


def test_prediction_loss_ignores_lengths_and_lies_between_0_and_4():
    p, u = torch.randn(2, 6, 5)
    torch.testing.assert_close(prediction_loss(3 * p, 0.1 * u), prediction_loss(p, u))
    assert prediction_loss(p, 2 * p).item() == pytest.approx(0, abs=1e-6)
    assert prediction_loss(p, -p).item() == pytest.approx(4, abs=1e-6)


def test_a_steps_loss_equals_a_naive_one_in_double_precision():
    """Everything again by hand: separate forwards, moves before the targets, the queue as it was before the step."""
    model, network, ((x, swapped_x, teacher_x), labels) = small(), taught(), batch()
    for _ in range(2):  # so that slow and fast differ
        step(model, network)
    a, t = copy.deepcopy(model).double(), copy.deepcopy(network).double()
    x, swapped_x, teacher_x = (v.double() for v in (x, swapped_x, teacher_x))
    parts = step(model, network)
    with torch.no_grad():
        feature, logits = a.student(x)
        z, swapped_z = a.head(feature), a.head(a.student(swapped_x)[0])
        p, swapped_p = a.predictor(z), a.predictor(swapped_z)
        for slow, fast, m in (
            (a.slow_student, a.student, 0.9), (a.slow_head, a.head, 0.9), (a.teacher_head, a.head, 0.999)
        ):  # fmt: skip
            for one, other in zip(slow.parameters(), fast.parameters(), strict=True):
                one.copy_(m * one + (1 - m) * other)
        keys = F.normalize(a.teacher_head(t(teacher_x)[0]), dim=1)
        u, swapped_u = a.slow_head(a.slow_student(swapped_x)[0]), a.slow_head(a.slow_student(x)[0])
        expected = [
            naive_contrast(z, keys, a.queue, 0.1), F.cross_entropy(logits, labels).item(), naive_prediction(p, u),
            naive_prediction(swapped_p, swapped_u), naive_distillation(logits, t(x)[1]),
        ]  # fmt: skip
    torch.testing.assert_close(parts[1:6], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    whole = expected[0] + expected[1] + 4 * (expected[2] + expected[3]) + 0.5 * expected[4]
    assert parts[0].item() == pytest.approx(whole, rel=1e-5)


def test_with_equal_views_and_frozen_statistics_both_directions_are_alike():
    model, network, (views, labels) = small(), taught(), batch()
    model.eval()
    parts = step(model, network, ([views[0]] * 3, labels))
    torch.testing.assert_close(parts[3], parts[4])


@pytest.mark.parametrize(
    ("terms", "student", "slow", "teacher_head"),
    [({}, 2, 2, 1), ({"swapped_weight": 0.0}, 1, 1, 1), ({"forward_weight": 0.0}, 2, 1, 1),
     ({"forward_weight": 0.0, "swapped_weight": 0.0}, 1, 0, 1), ({"lambda_contrast": 0.0}, 2, 2, 0)],
)  # fmt: skip
def test_views_are_seen_separately_and_only_where_they_are_used(terms, student, slow, teacher_head):
    model = small()
    step(model, taught(), **terms)
    assert model.student.block0[1].num_batches_tracked == student
    assert model.slow_student.block0[1].num_batches_tracked == slow  # hence in train mode
    assert model.teacher_head[1].num_batches_tracked == teacher_head


def test_two_views_have_batch_statistics_of_their_own():
    made = batch()
    other = ([made[0][0], made[0][1] + 1, made[0][2]], made[1])
    a, b = small(), small()
    one, two = step(a, taught(), made), step(b, taught(), other)
    names = ("contrastive_loss", "class_loss", "forward_loss")
    places = [train.PARTS.index(name) for name in names[:2]]
    assert torch.equal(one[places], two[places])  # x alone decides on these
    assert one[train.PARTS.index("swapped_loss")] != two[train.PARTS.index("swapped_loss")]


# ---------------------------------------------------------------------------------------------- what follows what


def test_momentum_is_exact_at_its_ends_and_what_it_says_between():
    slow, fast = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4) * 1e3, torch.randn(5)]
    before = [one.clone() for one in slow]
    ema_update(slow, fast, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(slow, before, strict=True))
    ema_update(slow, fast, 0.9)
    for a, b, c in zip(slow, before, fast, strict=True):
        torch.testing.assert_close(a, 0.9 * b + 0.1 * c)
    ema_update(slow, fast, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


def test_at_momentum_0_what_follows_equals_the_student_at_the_start_of_the_step():
    model = small()
    step(model, taught())
    before = state(model)
    step(model, taught(), student_momentum=0.0, teacher_momentum=0.0)
    after, weights = state(model), {name for name, _ in model.named_parameters()}
    for follower, followed in (("slow_student.", "student."), ("slow_head.", "head."), ("teacher_head.", "head.")):
        names = [name for name in weights if name.startswith(followed)]
        assert names and all(torch.equal(after[follower + n[len(followed) :]], before[n]) for n in names)
        assert not all(torch.equal(after[name], before[name]) for name in names)


def test_the_first_move_is_none_and_at_1_nothing_ever_moves():
    model, network = small(), taught()
    start = dict(model.teacher_head.named_parameters())
    start = {name: one.clone() for name, one in start.items()}
    step(model, network, student_momentum=0.0, teacher_momentum=0.5)
    assert all(torch.equal(start[n], one) for n, one in model.teacher_head.named_parameters())  # a copy at the start
    for _ in range(3):
        step(model, network, teacher_momentum=1.0)
    assert all(torch.equal(start[n], one) for n, one in model.teacher_head.named_parameters())


@pytest.mark.parametrize(("head", "moving"), [("frozen", []), ("partial", [0, 1, 2, 3]), ("adapter", [0, 1, 2, 3])])
def test_what_moves_of_a_teachers_head_of_other_width(head, moving):
    model, network = small(teacher_width=64, teacher_head=head), taught("vgg_s64")
    before = state(model)
    for _ in range(2):
        step(model, network, lr=1.0, teacher_momentum=0.5)
    after, names = state(model), [name for name, _ in model.teacher_head.named_parameters()]
    moved = {name for name in names if not torch.equal(before[f"teacher_head.{name}"], after[f"teacher_head.{name}"])}
    expected = set(names) if moving else set()
    if head == "partial":
        expected -= {"0.weight"}  # hidden x 64 there, hidden x 32 here
    assert moved == expected
    if head == "adapter":
        assert torch.equal(before["adapter.weight"], after["adapter.weight"])
        assert equal({n: before[f"teacher_head.{n}"] for n in names}, {n: before[f"head.{n}"] for n in names})
    else:
        assert not torch.equal(before["teacher_head.3.weight"], before["head.3.weight"])


def test_gradients_reach_the_student_its_head_and_the_predictor_alone():
    model, network = small(), taught()
    before, told = state(model), state(network)
    step(model, network)
    for name, weight in model.named_parameters():
        trained = name.startswith(("student.", "head.", "predictor."))
        assert weight.requires_grad is trained and (weight.grad is not None) is trained, name
    assert all(weight.grad is None for weight in network.parameters())
    assert equal(told, state(network)) and not network.training  # its running statistics, too
    assert all(part.training for name, part in model.named_modules() if name)
    assert not equal(before, state(model), "student.")
    optimizer = train.build_optimizer(
        argparse.Namespace(lr=0.1, weight_decay=5e-4), [model.student, model.head, model.predictor]
    )
    held = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    assert held == sum(w.numel() for p in (model.student, model.head, model.predictor) for w in p.parameters())


def test_evaluation_leaves_modes_and_statistics_as_they_were():
    model, data = small(), tensors(40)
    before = state(model)
    train.accuracy(model.student, data)
    assert model.student.training and equal(before, state(model))
    frozen = taught()
    train.accuracy(frozen, data)
    assert not frozen.training


# ---------------------------------------------------------------------------------------------- queue


def test_the_queue_keeps_the_newest_keys_in_order_round_its_end():
    model = small(queue=10, dim=3)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))
    keys = F.normalize(torch.randn(12, 3), dim=1)
    for part in keys.split(4):
        model.enqueue(part)
    assert model.pointer == 2 and model.pointer.dtype == torch.int64
    assert torch.equal(torch.cat([model.queue[2:], model.queue[:2]]), keys[2:])  # oldest to newest
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))


def test_a_steps_own_keys_are_never_among_its_negatives():
    """The loss is that of the queue before the step; afterwards the keys are in it."""
    model, network, (views, _) = small(queue=8), taught(), batch()
    before = model.queue.clone()
    twin = copy.deepcopy(model)
    parts = step(model, network)
    keys = train.make_keys(twin, network, views[2])
    z = twin.head(twin.student(views[0])[0])
    torch.testing.assert_close(parts[1], contrastive_loss(z, keys, before, 0.1)[0])
    torch.testing.assert_close(model.queue, keys)
    assert not torch.isclose(parts[1], contrastive_loss(z, keys, keys, 0.1)[0])


# ---------------------------------------------------------------------------------------------- networks

TABLE = {  # name: (parameters, entries of the state)
    "resnet20": (278_324, 128), "resnet32": (472_756, 200), "resnet56": (861_620, 344), "resnet110": (1_736_564, 668),
    "resnet8x4": (1_233_540, 62), "resnet32x4": (7_433_860, 206), "wrn_16_2": (703_284, 83),
    "wrn_40_1": (569_780, 226), "wrn_40_2": (2_255_156, 227), "vgg8": (3_965_028, 37), "vgg13": (9_462_180, 72),
    "MobileNetV2": (812_836, 320), "ShuffleV1": (949_258, 296), "ShuffleV2": (1_355_528, 338),
    "ResNet50": (23_705_252, 320), "resnet8": (83_892, 56), "resnet14": (181_108, 92), "resnet44": (667_188, 272),
    "wrn_16_1": (180_916, 82), "ResNet18": (11_220_132, 122),
}  # fmt: skip
PAIRS = (
    *("wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "resnet56-resnet20", "resnet110-resnet20", "resnet110-resnet32"),
    *("resnet32x4-resnet8x4", "vgg13-vgg8", "vgg13-MobileNetV2", "ResNet50-MobileNetV2", "ResNet50-vgg8"),
    *("resnet32x4-ShuffleV1", "resnet32x4-ShuffleV2", "wrn_40_2-ShuffleV1"),
)


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_networks_of_the_specifications_table(name):
    """Sizes, widths, both input sizes; folding the batch norms changes nothing but rounding and their number."""
    network = net.build(name, 100)
    assert (count(network), len(network.state_dict())) == TABLE[name]
    network.double().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    feature, logits = network(x)
    assert feature.shape == (2, net.width(name)) and logits.shape == (2, 100)
    assert network(x[:, :, ::2, ::2])[1].shape == (2, 100)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    folded = net.fold(network)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == {"wrn_40_1": 19, "wrn_40_2": 19, "wrn_16_1": 7, "wrn_16_2": 7}.get(name, 0) < norms
    for a, b in zip(folded(x), (feature, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vgg_s32", "resnet_s64", "wrn_16_1"])
def test_weights_kept_in_bfloat16_are_what_autocast_makes_of_them(name):
    network = net.fold(net.build(name, 6).eval().requires_grad_(False).to(memory_format=torch.channels_last))
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(x)
        net.round_weights(network)
        after = network(x)
    assert all(map(torch.equal, before, after)) and network(x.bfloat16())[0].dtype == torch.bfloat16


def test_a_shuffle_interleaves_the_groups_and_stays_channels_last():
    x = torch.randn(2, 12, 5, 5)
    expected = torch.stack([x[:, channel % 3 * 4 + channel // 3] for channel in range(12)], 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        shuffled = net.shuffle(x.contiguous(memory_format=layout), 3)
        assert torch.equal(shuffled, expected) and shuffled.is_contiguous(memory_format=torch.channels_last)


def test_heads_have_the_specifications_sizes():
    sizes = {64: 4_333_568, 128: 4_464_640, 256: 4_726_784, 512: 5_251_072, 1280: 6_823_936, 2048: 8_396_800}
    assert all(count(train.build_head(width, 2048, 2048)) == size for width, size in sizes.items())
    assert count(train.build_head(2048, 512, 2048)) == 2_100_736


def test_published_names_of_last_layers():
    last = {"resnet56": "fc.weight", "wrn_40_2": "block1.layer.0.convShortcut.weight", "vgg13": "classifier.weight",
            "MobileNetV2": "classifier.0.weight", "ShuffleV2": "linear.weight",
            "resnet32x4": "layer1.0.downsample.1.bias", "ResNet50": "layer1.0.shortcut.0.weight"}  # fmt: skip
    assert all(name in net.build(network, 100).state_dict() for network, name in last.items())


def test_wide_resnets_shortcut_sees_the_activated_input():
    block = net.PreActivated(4, 8, 1).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    active = F.relu(block.bn1(x))
    inner = block.conv2(F.relu(block.bn2(block.conv1(active))))
    torch.testing.assert_close(block(x), inner + block.convShortcut(active))
    same = net.PreActivated(4, 4, 1).double().eval()
    inner = same.conv2(F.relu(same.bn2(same.conv1(F.relu(same.bn1(x))))))
    torch.testing.assert_close(same(x), inner + x)


# ---------------------------------------------------------------------------------------------- weights


def test_weights_are_read_from_every_known_wrapping(tmp_path):
    state = net.build("MobileNetV2", 10).state_dict()
    old = {name: one for name, one in state.items() if not name.endswith("num_batches_tracked")}
    plain = {name.replace("classifier.0.", "classifier."): one for name, one in state.items()}
    shapes = {
        "released": {"epoch": 240, "model": state, "accuracy": torch.tensor(64.6), "optimizer": {}},
        "bare": state, "old": {"model": old}, "parallel": {"module." + name: one for name, one in state.items()},
        "whole": {"s_model_dict": {"module.student." + name: one for name, one in state.items()}},
        "renamed": {"model": plain},
    }  # fmt: skip
    for name, shape in shapes.items():
        for new in (True, False):
            torch.save(shape, tmp_path / name, _use_new_zipfile_serialization=new)
            network, told = net.load("MobileNetV2", 10, tmp_path / name)
            assert equal(state, network.state_dict()), name
            assert told == (pytest.approx(64.6) if name == "released" else None)


def test_weights_that_are_none_end_in_one_sentence(tmp_path, capsys):
    state = net.build("resnet8", 10).state_dict()
    cases = {
        "namespace": ({"model": state, "opt": argparse.Namespace()}, "more than tensors"),
        "empty": ({"epoch": 3}, "holds no weights"),
        "other": ({"model": net.build("resnet14", 10).state_dict()}, "does not fit"),
        "diverged": ({"model": state, "diverged": True}, "diverged"),
    }
    for name, (content, words) in cases.items():
        for new in (True, False):
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
            with pytest.raises(SystemExit) as end:
                net.load("resnet8", 10, tmp_path / name)
            assert end.value.code == 2 and words in capsys.readouterr().err, name
    (tmp_path / "cut").write_bytes((tmp_path / "other").read_bytes()[:999])
    for name, words in {"cut": "cut", "absent": "cocord-teachers"}.items():
        with pytest.raises(SystemExit) as end:
            net.load("resnet8", 10, tmp_path / name)
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_teacher_is_measured_and_a_poor_one_refused(tmp_path, capsys):
    data = tensors(40)
    torch.save({"model": taught().state_dict(), "accuracy": 90.0}, tmp_path / "poor")
    with pytest.raises(SystemExit) as end:
        train.load_teacher("vgg_s32", tmp_path / "poor", data, "float32", False)
    said = capsys.readouterr()
    assert end.value.code == 2 and "90.00 % were expected" in said.err and "of the test pictures" in said.out
    network, digest, measured = train.load_teacher("vgg_s32", tmp_path / "poor", data, "float32", True)
    assert len(digest) == 64 and 0 <= measured < 45 and not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    with pytest.raises(SystemExit):  # a bare file on CIFAR-100: the published table says what to expect
        torch.save(net.build("resnet20", 100).state_dict(), tmp_path / "bare")
        train.load_teacher("resnet20", tmp_path / "bare", data._replace(classes=100), "float32", False)
    assert "69.06 % were expected" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- data


def tensors(count: int, device: str = "cpu") -> images.Images:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels, channels = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(3, 1, 1, device=device)
    return images.Images(pixels, labels, pixels, labels, 6, channels / 2, channels, "")


def test_crops_equal_torchvisions():
    data, pad = tensors(5), 4
    pixels = F.pad(data.train, (pad,) * 4).permute(0, 2, 3, 1).contiguous()
    rows, offsets = torch.tensor([3, 0, 3, 4]), torch.tensor([[0, 0], [8, 3], [4, 8], [1, 2]])
    flip = torch.tensor([False, True, True, False])
    made = train.crops(pixels, rows, offsets, flip, 32)
    for one, row, (top, left), mirrored in zip(made, rows, offsets.tolist(), flip, strict=True):
        expected = tv.crop(tv.pad(data.train[row], [pad]), top, left, 32, 32)
        assert torch.equal(one, tv.horizontal_flip(expected) if mirrored else expected)


def loader(data: images.Images, epoch: int = 0, views: int = 3, batch: int = 8, seed: int = 0):
    args = train.parse_args(["--data-set", "cifar100", "--batch", str(batch), "--seed", str(seed), "--queue", "800"])
    return train.batches(args, data, epoch, views)


def test_batches_are_whole_epochs_of_three_views_that_follow_from_seed_and_epoch():
    data = tensors(22)._replace(train_labels=torch.arange(22))
    made = list(loader(data, 1))
    assert [len(labels) for _, labels in made] == [8, 8, 6]
    assert sorted(torch.cat([labels for _, labels in made]).tolist()) == list(range(22))
    again, other = list(loader(data, 1)), list(loader(data, 2))
    assert torch.equal(made[2][0][1], again[2][0][1]) and not torch.equal(made[2][0][1], other[2][0][1])
    assert not torch.equal(next(loader(data, 1, seed=1))[0][0], made[0][0][0])
    views = made[0][0]
    assert len(views) == 3 and not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    single = next(loader(data, 1, views=1))[0]
    assert len(single) == 1 and torch.equal(single[0], views[0])
    assert [len(labels) for _, labels in loader(tensors(17))] == [8, 8]  # no batch of one


def test_offsets_and_mirrors_cover_their_range_evenly():
    data = tensors(2)._replace(train=torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    wide = functools.reduce(lambda a, b: a._replace(train=torch.cat([a.train, b.train])), [data] * 400)
    wide = wide._replace(train_labels=torch.zeros(800, dtype=torch.int64))
    views, _ = next(loader(wide, batch=800))
    light = (views[0][:, 0] > 0).float()  # black padding shows where the window lies
    tops = light.amax(2).argmax(1)
    assert tops.max() == 4 and 0.05 < (tops == 4).float().mean() < 0.18  # 1 in 9


def test_a_tenth_is_held_out(tmp_path):
    data = train.load_data("glyphs10", tmp_path, False, CPU)
    part = train.load_data("glyphs10", tmp_path, True, CPU)
    assert len(part.train) == 4500 and len(part.test) == 500 and torch.equal(part.mean, data.mean)
    known = {one.numpy().tobytes() for one in part.train}
    assert not any(one.numpy().tobytes() in known for one in part.test)


def test_the_rate_falls_after_epochs_150_180_and_210():
    last = 781 / 782  # of an epoch's steps
    places = (0, 149 + last, 150, 179 + last, 180, 209 + last, 210, 239 + last)
    rates = [0.05 * train.rate_factor(place / 240) for place in places]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])


# ---------------------------------------------------------------------------------------------- arms and flags


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_no_two_arms_resolve_to_equal_arguments(scale):
    arms = design("cocord", scale)[0]
    resolved = {json.dumps(vars(train.parse_args(["--scale", scale, *flags])), default=str) for flags in arms.values()}
    both = {f"base@{pair}" for pair in PAIRS if scale == "paper"}  # base, written as moving, where the widths are equal
    same = {arm for arm in arms if arm.startswith("moving@") and arm.replace("moving", "base") in both}
    assert len(resolved) >= len(arms) - len(same)


def test_every_published_pair_is_an_arm_of_paper_scale():
    arms = design("cocord", "paper")[0]
    assert {f"base@{pair}" for pair in PAIRS} <= set(arms) and len(PAIRS) == 13


def test_every_flag_is_read():
    """After the parsing; and none is read that does not exist."""
    for module, path in ((train, "cocord/train.py"), (teacher, "cocord/teacher.py")):
        source = (ROOT / path).read_text()
        source = source[source.index("\ndef ", source.index("def parse_args")) :]
        read = set(re.findall(r"\bargs\.(\w+)", source))
        assert read == set(vars(module.parse_args([]))), path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher-head", "full", "--teacher", "vgg_s64"], "64 wide, those of vgg_s 32"),
        (["--teacher", "none"], "--lambda-contrast 0"),
        (["--queue", "16"], "less than --batch 32"),
        (["--teacher-momentum", "1.5"], "not between 0 and 1"),
        (["--temperature", "0"], "not between"),
        (["--teacher", "alexnet"], "invalid choice"),
        (["--weights", "nowhere"], "no such weights"),
        (["--epoch", "3"], "unrecognized"),
        (["--scale", "gpu"], "--scale demo"),
        (["--data-set", "cifar100", "--data", "nowhere"], "common.images cifar100"),
    ],
)
def test_a_users_mistake_ends_in_one_sentence(flags, words, tmp_path, capsys):
    refused(train.main, ["--device", "auto" if "gpu" in flags else "cpu", *flags], words, tmp_path, capsys)


def test_rates_and_heads_that_are_not_given_follow_from_the_pair():
    rates = [train.parse_args(["--student", name]).lr for name in ("ShuffleV1", "MobileNetV2", "resnet20")]
    assert rates == [0.01, 0.01, 0.05]
    heads = [train.parse_args(["--teacher", name]).teacher_head for name in ("resnet_s32", "resnet_s64")]
    assert heads == ["full", "frozen"]


# ---------------------------------------------------------------------------------------------- a fake GPU


class Unsaved(Unwritten):
    def end_epoch(self, epoch, last, record, probe) -> None:
        pass


def train_on_a_fake_gpu(count: int, flags: list[str]) -> None:
    args = train.parse_args([*flags, "--batch", "16", "--epochs", "2", "--data-set", "cifar100"])
    data, device = tensors(count, "cuda"), torch.device("cuda")
    network = nn.Identity()
    if args.teacher != "none":
        network = net.fold(net.build(args.teacher, 6).eval().requires_grad_(False))
        for weight in network.parameters():
            weight.requires_grad_(False)
        network.to(device)
    model = train.build_model(args, 6, device)
    optimizer = train.build_optimizer(
        argparse.Namespace(lr=0.1, weight_decay=5e-4), [model.student, model.head, model.predictor]
    )
    train.train(args, Unsaved(), model, data, optimizer, train.Teacher(network))


@pytest.mark.parametrize("arm", ARMS)
def test_training_stays_on_a_fake_gpu(arm, fake_gpu):
    train_on_a_fake_gpu(40, ARMS[arm])
    assert fake_gpu.asked > 0


def test_steps_ask_the_device_nothing(fake_gpu):
    asked = []
    for count in (40, 88):
        fake_gpu.asked = 0
        train_on_a_fake_gpu(count, [])
        asked.append(fake_gpu.asked)
    assert asked[0] == asked[1] > 0


# ---------------------------------------------------------------------------------------------- runs

TINY = ["--rehearse", "2", "--batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The teachers of the demo and one finished and evaluated run per arm, of two epochs of two steps."""
    root = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--data", str(root / "data")]
    for name in {words[words.index("--teacher") + 1] for words in ARMS.values()} - {"none"}:
        teacher.main([*flags, "--network", name, "--out", str(root / f"teacher@{name}" / "0")])
    for name, own in ARMS.items():
        train.main([*flags, *own, "--out", str(root / name / "0")])
        evaluate.main([str(root / name / "0")])
    return root


def test_every_arm_trains_to_other_weights(finished):
    firsts = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["student.block0.0.weight"] for arm in ARMS}
    for i, arm in enumerate(ARMS):
        for other in list(ARMS)[:i]:
            assert not torch.equal(firsts[arm], firsts[other]), (arm, other)


def test_metrics_have_the_plans_keys(finished):
    every = "accuracy accuracy_best_epoch train_loss train_accuracy seconds examples_per_second peak_memory"
    taught = "teacher_accuracy contrastive_accuracy positive_cosine negative_cosine key_consistency teacher_head_shift"
    for arm in ARMS:
        found = json.loads((finished / arm / "0/metrics.json").read_text())
        assert all(isinstance(found[key], float | int) for key in every.split()), arm
        contrasted = not arm.startswith(("cross-entropy", "distillation"))
        assert all((found[key] is not None) is contrasted for key in taught.split()[1:]), arm
        assert (found["teacher_accuracy"] is None) is arm.startswith("cross-entropy")
        slow = contrasted and not arm.startswith("none")
        assert (found["accuracy_slow_student"] is not None) is slow and found["diverged"] is False
        if "frozen" in arm:
            assert found["teacher_head_shift"] == 0 and found["key_consistency"] == pytest.approx(1, abs=1e-5)
    moved = json.loads((finished / "moving-fast@resnet_s64-vgg_s/0/metrics.json").read_text())
    assert moved["teacher_head_shift"] > 0 and moved["key_consistency"] < 1


def test_a_teachers_run_measures_itself(finished, capsys):
    folder = finished / "teacher@vgg_s64/0"
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = checkpoints.load(folder / "model.pt")
    assert metrics["accuracy"] == saved["accuracy"] and metrics["diverged"] is False
    before = (folder / "model.pt").read_bytes()
    teacher.main([*TINY, "--data", str(finished / "data"), "--network", "vgg_s64", "--out", str(folder)])
    assert "is finished" in capsys.readouterr().out and (folder / "model.pt").read_bytes() == before


@pytest.mark.parametrize("study", STUDIES)
def test_studies_are_drawn_and_told(study, finished, tmp_path):
    plot.main([study, "--runs", str(finished), "--seeds", "0", "1", "--results", str(tmp_path)])
    found = json.loads((tmp_path / f"{study}.json").read_text())
    assert [f"{one['arm']}:{one['reference']}" for one in found["contrasts"]] == STUDIES[study] and not found["not_run"]
    assert found["notes"][0].startswith("2 seeds an arm resolve differences above about 0.77 points")
    assert all(control["arm_mean"] is not None for control in found["controls"])
    assert any("1 of 2 missing (seed 1)" in note for note in found["notes"])
    names = {path.name.removeprefix(f"{study}-") for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")}
    assert names == {"curves.png", "curves.svg", "metrics.png", "metrics.svg"}
    word = "keys, cosine epoch to epoch" if study == "cocord-teacher-momentum" else "contrastive top-1"
    assert word in (tmp_path / f"{study}-curves.svg").read_text()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("script", [train, teacher])
def test_a_killed_run_ends_bit_identical(script, finished, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(finished / "data")]
    if script is train:
        flags += ["--weights", str(finished / "teacher@vgg_s32/0")]
    script.main([*flags, "--out", str(tmp_path / "whole")])
    save = Run.save

    def killed(self, epoch, record, state):
        save(self, epoch, record, state)
        if epoch == 1:
            raise Killed

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(Killed):
        script.main([*flags, "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(Run, "save", save)
    script.main([*flags, "--out", str(tmp_path / "cut")])
    whole, cut = (checkpoints.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "cut"))
    assert equal(whole, cut)
    lines = [json.loads((tmp_path / n / "train.jsonl").read_text().splitlines()[-1]) for n in ("whole", "cut")]
    timing = {"seconds", "examples_per_second", "peak_memory"}
    assert {k: v for k, v in lines[0].items() if k not in timing} == {
        k: v for k, v in lines[1].items() if k not in timing
    }


def test_another_teacher_is_refused_in_a_begun_run(finished, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", str(finished / "data"), "--out", str(tmp_path / "run")]
    save = Run.save

    def killed(self, epoch, record, state):
        save(self, epoch, record, state)
        raise Killed

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(Killed):
        train.main([*flags, "--weights", str(finished / "teacher@vgg_s32/0")])
    monkeypatch.setattr(Run, "save", save)
    teacher.main([*TINY, "--data", str(finished / "data"), "--seed", "1", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--weights", str(tmp_path / "other")])
    assert end.value.code == 2 and "teacher_weights" in capsys.readouterr().err


def test_a_diverged_run_is_a_result(finished, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--data", str(finished / "data"), "--weights", str(finished / "teacher@vgg_s32/0")]
    train.main([*flags, "--lr", "1e30", "--out", str(out)])
    evaluate.main([str(out)])
    found = json.loads((out / "metrics.json").read_text())
    assert found["diverged"] is True and found["accuracy"] is None


# ---------------------------------------------------------------------------------------------- larger scales


@pytest.fixture
def random_cifar(monkeypatch):
    def cifar(name, data, part):
        pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(int(part)))
        return pixels.byte(), torch.arange(16) % 100

    monkeypatch.setattr(images, "cifar", cifar)


def two_steps(arm: str, flags: list[str], folder, scale: str) -> None:
    """Two epochs of one step of four images each, at the scale's true widths, with an untrained teacher."""
    name = flags[flags.index("--teacher") + 1]
    weights = folder / f"{name}.pt"
    if name != "none" and not weights.exists():
        torch.save(net.build(name, 100).state_dict(), weights)
    out = folder / arm / "0"
    common = ["--scale", scale, "--batch", "4", "--rehearse", "1", "--device", "cpu", "--weights", str(weights)]
    train.main([*common, *flags, "--out", str(out)])
    evaluate.main([str(out)])
    assert json.loads((out / "metrics.json").read_text())["accuracy"] is not None


@pytest.mark.parametrize("pair", PAIRS)
def test_every_published_pair_constructs_trains_and_evaluates(pair, random_cifar, unsaved, tmp_path):
    arms = design("cocord", "paper")[0]
    two_steps("base", arms[f"base@{pair}"], tmp_path, "paper")
    saved = checkpoints.load(tmp_path / "base/0/model.pt")
    assert saved["arguments"]["dim"] == 2048 and saved["epoch"] == 2


def test_every_arm_of_gpu_scale_takes_two_steps(random_cifar, unsaved, tmp_path):
    """Of the momentum study's pairs one of each kind."""
    arms = design("cocord", "gpu")[0]
    some = ("resnet56-resnet20", "vgg13-MobileNetV2", "resnet110-wrn_40_1")
    chosen = {arm: flags for arm, flags in arms.items() if arm.endswith(tuple("@" + one for one in some)) or
              arm == "cross-entropy@resnet20"}  # fmt: skip
    assert {arm.split("@")[0] for arm in chosen} == {arm.split("@")[0] for arm in arms}
    for arm, flags in chosen.items():
        two_steps(arm, flags, tmp_path, "gpu")
