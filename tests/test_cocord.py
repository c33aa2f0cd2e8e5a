"""CoCoRD: losses and gradients, EMA updates, queue, networks, checkpoints, arms, and train -> eval -> plot."""

import argparse
import copy
import inspect
import itertools
import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bench_cocord import OneEpoch
from conftest import READ_BY_COMMON, ROOT, FakeRun, assert_usage_error
from plan import design
from torch import nn
from torchvision.transforms.v2 import functional as tv

from cocord import eval as evaluate
from cocord import net, plot, teacher, train
from cocord.train import CoCoRD, contrastive_loss, distillation_loss, ema_update, prediction_loss
from common import checkpoints, images
from common.run import Run

ALL_ARMS, ALL_STUDIES = design("cocord")
ARMS = {name: flags for name, flags in ALL_ARMS.items() if not name.endswith("@few")}  # those need another teacher
STUDIES = {name: contrasts for name, contrasts in ALL_STUDIES.items() if name != "cocord-few-labels"}
TERMS = {
    "forward_weight": 4.0, "swapped_weight": 4.0, "lambda_contrast": 1.0, "lambda_class": 1.0, "lambda_kd": 0.5,
    "temperature": 0.1, "student_momentum": 0.9, "teacher_momentum": 0.999, "precision": "float32",
}  # fmt: skip
CPU = torch.device("cpu")


def small_model(**changes) -> CoCoRD:
    settings = {"student": "vgg_s", "classes": 6, "teacher_width": 32, "hidden": 24, "dim": 16, "bottleneck": 8}
    return CoCoRD(**settings | {"queue_size": 20, "teacher_head": "full", "seed": 0} | changes)


def frozen_teacher(name: str = "vgg_s32") -> nn.Module:
    """Return a teacher in eval mode whose running statistics differ from their initial values, as after training."""
    torch.manual_seed(5)
    network = net.build(name, 6).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network


def random_batch(size: int = 8) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return three views and the labels."""
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(3, size, 3, 32, 32, generator=rng)), torch.arange(size) % 6


def step(model: CoCoRD, teacher: nn.Module, batch=None, **flags) -> torch.Tensor:
    """Run one step of the training loop of train.py; return its TRAIN_METRICS."""
    args = argparse.Namespace(**vars(train.parse_args([])) | TERMS | {"lr": 0.1} | flags)
    optimizer = train.build_optimizer(args, [model.student, model.head, model.predictor])
    run = OneEpoch()
    views, labels = batch or random_batch()
    with mock.patch.object(train, "batches", lambda *_: iter([(views, labels)])):
        train.train(args, run, model, random_images(8), optimizer, train.Teacher(teacher))
    return (run.totals / len(labels))[: len(train.TRAIN_METRICS)]


def copy_of_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *prefixes: str) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefixes) or not prefixes)


# ---------------------------------------------------------------------------------------------- loss


def naive_contrast(z, keys, queue, tau):
    """Mean over images of -log(exp(q k / tau) / (exp(q k / tau) + sum over the queue)), with a loop over images."""
    total = 0.0
    for row, key in zip(z.tolist(), keys.tolist(), strict=True):
        norm = math.sqrt(sum(x * x for x in row))
        positive = math.exp(sum(x * y for x, y in zip(row, key, strict=True)) / norm / tau)
        negatives = [sum(x * y for x, y in zip(row, other, strict=True)) / norm / tau for other in queue.tolist()]
        total -= math.log(positive / (positive + sum(map(math.exp, negatives))))
    return total / len(z)


def naive_prediction(p, u):
    """Mean squared distance of the unit vectors."""
    p = p / p.square().sum(1, keepdim=True).sqrt()
    u = u / u.square().sum(1, keepdim=True).sqrt()
    return (p - u).square().sum(1).mean().item()


def naive_softmax(row, t):
    total = sum(math.exp(x / t) for x in row)
    return [math.exp(x / t) / total for x in row]


def naive_distillation(student, teacher, t=4.0):
    total = 0.0
    for a, b in zip(student.tolist(), teacher.tolist(), strict=True):
        total += sum(y * math.log(y / x) for x, y in zip(naive_softmax(a, t), naive_softmax(b, t), strict=True))
    return t * t * total / len(student)


def test_losses_equal_naive_implementations():
    rng = torch.Generator().manual_seed(0)
    z, k, u, student, teacher = (torch.randn(5, 7, generator=rng) for _ in range(5))
    keys, queue = F.normalize(k, dim=1), F.normalize(torch.randn(9, 7, generator=rng), dim=1)
    loss, metrics = contrastive_loss(z, keys, queue, 0.1)
    assert loss.item() == pytest.approx(naive_contrast(z, keys, queue, 0.1), rel=1e-5)
    cosines = F.normalize(z, dim=1) @ torch.cat([keys, queue]).T
    positive, negative = cosines.diag(), cosines[:, 5:]
    expected = [(positive > negative.max(1).values).float().mean(), positive.mean(), negative.mean()]
    torch.testing.assert_close(metrics, torch.stack(expected))
    assert prediction_loss(z, u).item() == pytest.approx(naive_prediction(z, u), rel=1e-5)
    assert distillation_loss(student, teacher).item() == pytest.approx(naive_distillation(student, teacher), rel=1e-5)


@pytest.mark.parametrize("unlabelled", [[], [1, 4], [0, 1, 2, 3, 4]])
def test_class_loss_is_the_mean_over_labelled_rows(unlabelled):
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 7, generator=rng), torch.tensor([3, 0, 6, 3, 1])
    losses = [
        -math.log(naive_softmax(row, 1)[label]) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    kept = [row for row in range(5) if row not in unlabelled]
    accuracy = [float(logits[row].argmax() == labels[row]) for row in kept]
    labels[unlabelled] = train.UNLABELLED
    weights = dict.fromkeys(("forward_weight", "swapped_weight", "lambda_contrast", "lambda_kd"), 0.0)
    unused = dict.fromkeys(("z", "keys", "queue", "p", "u", "swapped_p", "swapped_u", "teacher_logits"), torch.empty(0))
    loss, metrics = train.cocord_loss(
        logits=logits,
        labels=labels,
        **unused,
        **weights,
        lambda_class=1.0,
        temperature=0.1,
    )
    assert loss.item() == pytest.approx(sum(losses[row] for row in kept) / max(1, len(kept)), rel=1e-5)
    named = dict(zip((*train.TRAIN_METRICS, "labelled"), metrics.tolist(), strict=True))
    assert named["train_accuracy"] == pytest.approx(sum(accuracy) / 5) and named["labelled"] == pytest.approx(
        len(kept) / 5
    )
    if not unlabelled:
        assert torch.equal(loss, F.cross_entropy(logits, labels))


def test_labels_are_kept_for_a_balanced_subset():
    data = random_images(60)._replace(train_labels=torch.arange(60) % 6)
    labels = train.keep_labels(data, 12).train_labels
    kept = labels != train.UNLABELLED
    assert torch.equal(labels[kept].bincount(), torch.full((6,), 2)) and torch.equal(
        labels[kept], data.train_labels[kept]
    )
    assert torch.equal(train.keep_labels(data, None).train_labels, data.train_labels)


def test_prediction_loss_is_scale_invariant_and_between_0_and_4():
    p, u = torch.randn(2, 6, 5)
    torch.testing.assert_close(prediction_loss(3 * p, 0.1 * u), prediction_loss(p, u))
    assert prediction_loss(p, 2 * p).item() == pytest.approx(0, abs=1e-6)
    assert prediction_loss(p, -p).item() == pytest.approx(4, abs=1e-6)


def test_metrics_of_a_step_equal_a_naive_implementation_in_double_precision():
    """Separate forward passes, EMA updates before the targets, and the queue as it was before the step."""
    model, teacher = small_model(), frozen_teacher()
    views, labels = random_batch()
    for _ in range(2):  # until the EMAs differ from the student
        step(model, teacher)
    a, t = copy.deepcopy(model).double(), copy.deepcopy(teacher).double()
    x, swapped_x, teacher_x = (view.double() for view in views)
    metrics = step(model, teacher)
    with torch.no_grad():
        feature, logits = a.student(x)
        z, swapped_z = a.head(feature), a.head(a.student(swapped_x)[0])
        p, swapped_p = a.predictor(z), a.predictor(swapped_z)
        for slow, fast, m in (
            (a.slow_student, a.student, 0.9), (a.slow_head, a.head, 0.9), (a.teacher_head, a.head, 0.999)
        ):  # fmt: skip
            for ema, online in zip(slow.parameters(), fast.parameters(), strict=True):
                ema.copy_(m * ema + (1 - m) * online)
        keys = F.normalize(a.teacher_head(t(teacher_x)[0]), dim=1)
        u, swapped_u = a.slow_head(a.slow_student(swapped_x)[0]), a.slow_head(a.slow_student(x)[0])
        expected = [
            naive_contrast(z, keys, a.queue, 0.1), F.cross_entropy(logits, labels).item(), naive_prediction(p, u),
            naive_prediction(swapped_p, swapped_u), naive_distillation(logits, t(x)[1]),
        ]  # fmt: skip
    torch.testing.assert_close(metrics[1:6], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    loss = expected[0] + expected[1] + 4 * (expected[2] + expected[3]) + 0.5 * expected[4]
    assert metrics[0].item() == pytest.approx(loss, rel=1e-5)


def test_both_prediction_losses_are_equal_for_equal_views_in_eval_mode():
    model, teacher = small_model(), frozen_teacher()
    views, labels = random_batch()
    model.eval()
    metrics = step(model, teacher, ([views[0]] * 3, labels))
    torch.testing.assert_close(metrics[3], metrics[4])


@pytest.mark.parametrize(
    ("terms", "student", "slow", "teacher_head"),
    [({}, 2, 2, 1), ({"swapped_weight": 0.0}, 1, 1, 1), ({"forward_weight": 0.0}, 2, 1, 1),
     ({"forward_weight": 0.0, "swapped_weight": 0.0}, 1, 0, 1), ({"lambda_contrast": 0.0}, 2, 2, 0)],
)  # fmt: skip
def test_each_view_has_its_own_forward_pass_and_unused_passes_are_skipped(terms, student, slow, teacher_head):
    model = small_model()
    step(model, frozen_teacher(), **terms)
    # The counters only increase in train mode.
    assert model.student.block0[1].num_batches_tracked == student
    assert model.slow_student.block0[1].num_batches_tracked == slow
    assert model.teacher_head[1].num_batches_tracked == teacher_head


def test_losses_of_the_first_view_do_not_depend_on_the_second_view():
    (x, swapped_x, teacher_x), labels = random_batch()
    a = step(small_model(), frozen_teacher(), ([x, swapped_x, teacher_x], labels))
    b = step(small_model(), frozen_teacher(), ([x, swapped_x + 1, teacher_x], labels))
    indices = [train.TRAIN_METRICS.index(name) for name in ("contrastive_loss", "class_loss")]
    assert torch.equal(a[indices], b[indices])
    assert a[train.TRAIN_METRICS.index("swapped_loss")] != b[train.TRAIN_METRICS.index("swapped_loss")]


# ---------------------------------------------------------------------------------------------- EMA updates


def test_ema_update_is_exact_at_momentum_0_and_1():
    ema, online = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4) * 1e3, torch.randn(5)]
    before = [tensor.clone() for tensor in ema]
    ema_update(ema, online, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ema, before, strict=True))
    ema_update(ema, online, 0.9)
    for a, b, c in zip(ema, before, online, strict=True):
        torch.testing.assert_close(a, 0.9 * b + 0.1 * c)
    ema_update(ema, online, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema, online, strict=True))


def test_at_momentum_0_each_ema_equals_the_student_before_the_optimiser_step():
    model = small_model()
    step(model, frozen_teacher())
    before = copy_of_state(model)
    step(model, frozen_teacher(), student_momentum=0.0, teacher_momentum=0.0)
    after, parameters = copy_of_state(model), {name for name, _ in model.named_parameters()}
    for ema, online in (("slow_student.", "student."), ("slow_head.", "head."), ("teacher_head.", "head.")):
        names = [name for name in parameters if name.startswith(online)]
        assert names and all(torch.equal(after[ema + name.removeprefix(online)], before[name]) for name in names)
        assert not all(torch.equal(after[name], before[name]) for name in names)


def test_teacher_head_is_constant_in_the_first_step_and_at_momentum_1():
    model, teacher = small_model(), frozen_teacher()
    initial = {name: value.clone() for name, value in model.teacher_head.named_parameters()}
    # The teacher's head starts as a copy of the student's, so the first update changes nothing.
    step(model, teacher, student_momentum=0.0, teacher_momentum=0.5)
    assert all(torch.equal(initial[name], value) for name, value in model.teacher_head.named_parameters())
    for _ in range(3):
        step(model, teacher, teacher_momentum=1.0)
    assert all(torch.equal(initial[name], value) for name, value in model.teacher_head.named_parameters())


@pytest.mark.parametrize("teacher_head", ["frozen", "partial", "adapter"])
def test_teacher_head_of_unequal_width_updates_the_expected_tensors(teacher_head):
    model, teacher = small_model(teacher_width=64, teacher_head=teacher_head), frozen_teacher("vgg_s64")
    before = copy_of_state(model)
    for _ in range(2):
        step(model, teacher, lr=1.0, teacher_momentum=0.5)
    after, names = copy_of_state(model), [name for name, _ in model.teacher_head.named_parameters()]
    updated = {name for name in names if not torch.equal(before[f"teacher_head.{name}"], after[f"teacher_head.{name}"])}
    expected = set() if teacher_head == "frozen" else set(names)
    if teacher_head == "partial":
        expected -= {"0.weight"}  # hidden x 64 in the teacher's head, hidden x 32 in the student's
    assert updated == expected
    if teacher_head == "adapter":
        assert torch.equal(before["adapter.weight"], after["adapter.weight"])
        assert equal_states({n: before[f"teacher_head.{n}"] for n in names}, {n: before[f"head.{n}"] for n in names})
    else:
        assert not torch.equal(before["teacher_head.3.weight"], before["head.3.weight"])


def test_only_student_head_and_predictor_get_gradients():
    model, teacher = small_model(), frozen_teacher()
    before, teacher_before = copy_of_state(model), copy_of_state(teacher)
    step(model, teacher)
    for name, weight in model.named_parameters():
        trained = name.startswith(("student.", "head.", "predictor."))
        assert weight.requires_grad is trained and (weight.grad is not None) is trained, name
    assert all(weight.grad is None for weight in teacher.parameters())
    assert equal_states(teacher_before, copy_of_state(teacher)) and not teacher.training  # includes running statistics
    assert all(module.training for name, module in model.named_modules() if name)
    assert not equal_states(before, copy_of_state(model), "student.")
    optimizer = train.build_optimizer(
        argparse.Namespace(lr=0.1, weight_decay=5e-4), [model.student, model.head, model.predictor]
    )
    optimised = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    assert optimised == sum(count_parameters(module) for module in (model.student, model.head, model.predictor))


def test_evaluation_restores_the_mode_and_changes_no_statistics():
    model, data = small_model(), random_images(40)
    before = copy_of_state(model)
    train.accuracy(model.student, data)
    assert model.student.training and equal_states(before, copy_of_state(model))
    teacher = frozen_teacher()
    train.accuracy(teacher, data)
    assert not teacher.training


# ---------------------------------------------------------------------------------------------- queue


def test_queue_is_a_ring_buffer_of_the_newest_keys():
    model = small_model(queue_size=10, dim=3)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))
    keys = F.normalize(torch.randn(12, 3), dim=1)
    for batch in keys.split(4):
        model.enqueue(batch)
    assert model.pointer == 2 and model.pointer.dtype == torch.int64
    assert torch.equal(torch.cat([model.queue[2:], model.queue[:2]]), keys[2:])  # oldest to newest
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))


def test_keys_of_a_batch_are_not_among_its_negatives():
    """The loss uses the queue from before the step. After the step the keys are in the queue."""
    model, teacher = small_model(queue_size=8), frozen_teacher()
    views, _ = random_batch()
    queue_before = model.queue.clone()
    model_before = copy.deepcopy(model)
    metrics = step(model, teacher)
    keys = train.make_keys(model_before, teacher, views[2])
    z = model_before.head(model_before.student(views[0])[0])
    torch.testing.assert_close(metrics[1], contrastive_loss(z, keys, queue_before, 0.1)[0])
    torch.testing.assert_close(model.queue, keys)
    assert not torch.isclose(metrics[1], contrastive_loss(z, keys, keys, 0.1)[0])


# ---------------------------------------------------------------------------------------------- networks

SIZES = {  # name: (number of parameters, entries of the state dict)
    "resnet20": (278_324, 128), "resnet32": (472_756, 200), "resnet56": (861_620, 344), "resnet110": (1_736_564, 668),
    "resnet8x4": (1_233_540, 62), "resnet32x4": (7_433_860, 206), "wrn_16_2": (703_284, 83),
    "wrn_40_1": (569_780, 226), "wrn_40_2": (2_255_156, 227), "vgg8": (3_965_028, 37), "vgg13": (9_462_180, 72),
    "MobileNetV2": (812_836, 320), "ShuffleV1": (949_258, 296), "ShuffleV2": (1_355_528, 338),
    "ResNet50": (23_705_252, 320), "resnet8": (83_892, 56), "resnet14": (181_108, 92), "resnet44": (667_188, 272),
    "wrn_16_1": (180_916, 82), "ResNet18": (11_220_132, 122),
}  # fmt: skip
PAIRS = (  # the authors' 13 pairs
    "wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "resnet56-resnet20", "resnet110-resnet20", "resnet110-resnet32",
    "resnet32x4-resnet8x4", "vgg13-vgg8", "vgg13-MobileNetV2", "ResNet50-MobileNetV2", "ResNet50-vgg8",
    "resnet32x4-ShuffleV1", "resnet32x4-ShuffleV2", "wrn_40_2-ShuffleV1",
)  # fmt: skip


def count_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_network_sizes_and_folded_batch_norms(name):
    """Sizes as published, 32 and 16 pixels; folding the batch norms changes the outputs only by rounding."""
    network = net.build(name, 100)
    assert (count_parameters(network), len(network.state_dict())) == SIZES[name]
    network.double().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    feature, logits = network(x)
    assert feature.shape == (2, net.feature_width(name)) and logits.shape == (2, 100)
    assert network(x[:, :, ::2, ::2])[1].shape == (2, 100)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    folded = net.fold_batch_norms(network)
    remaining = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert remaining == {"wrn_40_1": 19, "wrn_40_2": 19, "wrn_16_1": 7, "wrn_16_2": 7}.get(name, 0) < norms
    for a, b in zip(folded(x), (feature, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vgg_s32", "resnet_s64", "wrn_16_1"])
def test_bfloat16_weights_give_the_outputs_of_autocast(name):
    network = net.build(name, 6).eval().requires_grad_(False)
    network = net.fold_batch_norms(network.to(memory_format=torch.channels_last))
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(x)
        net.weights_to_bfloat16(network)
        after = network(x)
    assert all(map(torch.equal, before, after)) and network(x.bfloat16())[0].dtype == torch.bfloat16


def test_channel_shuffle_interleaves_the_groups_and_returns_channels_last():
    x = torch.randn(2, 12, 5, 5)
    expected = torch.stack([x[:, channel % 3 * 4 + channel // 3] for channel in range(12)], 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        shuffled = net.channel_shuffle(x.contiguous(memory_format=layout), 3)
        assert torch.equal(shuffled, expected) and shuffled.is_contiguous(memory_format=torch.channels_last)


def test_heads_have_the_published_sizes():
    sizes = {64: 4_333_568, 128: 4_464_640, 256: 4_726_784, 512: 5_251_072, 1280: 6_823_936, 2048: 8_396_800}
    assert all(count_parameters(train.build_head(width, 2048, 2048)) == size for width, size in sizes.items())
    assert count_parameters(train.build_head(2048, 512, 2048)) == 2_100_736


def test_parameter_names_are_those_of_repdistiller_checkpoints():
    names = {"resnet56": "fc.weight", "wrn_40_2": "block1.layer.0.convShortcut.weight", "vgg13": "classifier.weight",
             "MobileNetV2": "classifier.0.weight", "ShuffleV2": "linear.weight",
             "resnet32x4": "layer1.0.downsample.1.bias", "ResNet50": "layer1.0.shortcut.0.weight"}  # fmt: skip
    assert all(name in net.build(network, 100).state_dict() for network, name in names.items())


def test_wide_resnet_shortcut_gets_the_activated_input():
    block = net.PreActBlock(4, 8, 1).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    activated = F.relu(block.bn1(x))
    residual = block.conv2(F.relu(block.bn2(block.conv1(activated))))
    torch.testing.assert_close(block(x), residual + block.convShortcut(activated))
    block = net.PreActBlock(4, 4, 1).double().eval()
    residual = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    torch.testing.assert_close(block(x), residual + x)


# ---------------------------------------------------------------------------------------------- checkpoints


def test_weights_load_from_repdistiller_and_authors_checkpoints_in_all_layouts(tmp_path):
    state = net.build("MobileNetV2", 10).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    renamed = {name.replace("classifier.0.", "classifier."): value for name, value in state.items()}
    layouts = {
        "released": {"epoch": 240, "model": state, "accuracy": torch.tensor(64.6), "optimizer": {}},
        "bare": state,
        "old": {"model": old},
        "parallel": {"module." + name: value for name, value in state.items()},
        "authors": {"s_model_dict": {"module.student." + name: value for name, value in state.items()}},
        "renamed": {"model": renamed},
    }
    for name, content in layouts.items():
        for zip_format in (True, False):
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zip_format)
            network, accuracy = net.load("MobileNetV2", 10, tmp_path / name)
            assert equal_states(state, network.state_dict()), name
            assert accuracy == (pytest.approx(64.6) if name == "released" else None)


def test_invalid_checkpoints_exit_with_code_2(tmp_path, capsys):
    state = net.build("resnet8", 10).state_dict()
    cases = {
        "namespace": ({"model": state, "opt": argparse.Namespace()}, "argparse.Namespace"),
        "empty": ({"epoch": 3}, "contains no tensors"),
        "other": ({"model": net.build("resnet14", 10).state_dict()}, "does not fit"),
        "diverged": ({"model": state, "diverged": True}, "diverged"),
    }
    for name, (content, words) in cases.items():
        for zip_format in (True, False):
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zip_format)
            with pytest.raises(SystemExit) as end:
                net.load("resnet8", 10, tmp_path / name)
            assert end.value.code == 2 and words in capsys.readouterr().err, name
    (tmp_path / "cut").write_bytes((tmp_path / "other").read_bytes()[:999])
    for name, words in {"cut": "cut is cut off, damaged", "absent": "cocord-teachers"}.items():
        with pytest.raises(SystemExit) as end:
            net.load("resnet8", 10, tmp_path / name)
        assert end.value.code == 2 and words in capsys.readouterr().err


def teacher_args(name: str, path: Path, **changes) -> argparse.Namespace:
    settings = {"data_set": "glyphs36-hard", "precision": "float32", "rehearse": None, "held_out": False, **changes}
    return argparse.Namespace(teacher=name, weights=path, **settings)


def test_teacher_accuracy_is_measured_and_a_low_accuracy_exits_with_code_2(tmp_path, capsys):
    data = random_images(40)
    torch.save({"model": frozen_teacher().state_dict(), "accuracy": 90.0}, tmp_path / "poor")
    with pytest.raises(SystemExit) as end:
        train.load_teacher(teacher_args("vgg_s32", tmp_path / "poor"), data)
    printed = capsys.readouterr()
    assert end.value.code == 2 and "expected 90.00 %: give" in printed.err and "test accuracy" in printed.out
    network, digest, accuracy = train.load_teacher(teacher_args("vgg_s32", tmp_path / "poor", rehearse=1), data)
    assert len(digest) == 64 and 0 <= accuracy < 45 and not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    with pytest.raises(SystemExit):  # without an accuracy in the file, RepDistiller's for CIFAR-100 is expected
        torch.save(net.build("resnet20", 100).state_dict(), tmp_path / "bare")
        train.load_teacher(teacher_args("resnet20", tmp_path / "bare", data_set="cifar100"), data._replace(classes=100))
    assert "expected 69.06 %: give" in capsys.readouterr().err


def test_a_teacher_of_unknown_data_gives_a_warning_with_held_out(tmp_path, capsys):
    """Such a teacher may have been trained on the held-out images. Teachers of teacher.py are refused if they were."""
    data = random_images(40)
    for name, content in {"external": {}, "ours": {"arguments": {}, "data": data.digest}}.items():
        torch.save({"model": frozen_teacher().state_dict(), **content}, tmp_path / name)
        for held_out in (False, True):
            train.load_teacher(teacher_args("vgg_s32", tmp_path / name, held_out=held_out), data)
            expected = int(name == "external" and held_out)
            assert capsys.readouterr().err.count("may have been trained on the held-out images") == expected


# ---------------------------------------------------------------------------------------------- data


def random_images(count: int, device: str = "cpu") -> images.Images:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels, channels = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(3, 1, 1, device=device)
    return images.Images(pixels, labels, pixels, labels, 6, channels / 2, channels, "")


def test_crop_and_flip_equals_torchvision():
    data, pad = random_images(5), 4
    padded = F.pad(data.train, (pad,) * 4).permute(0, 2, 3, 1).contiguous()
    rows, offsets = torch.tensor([3, 0, 3, 4]), torch.tensor([[0, 0], [8, 3], [4, 8], [1, 2]])
    flip = torch.tensor([False, True, True, False])
    windows = train.crop_and_flip(padded, rows, offsets, flip, 32)
    for window, row, (top, left), flipped in zip(windows, rows, offsets.tolist(), flip, strict=True):
        expected = tv.crop(tv.pad(data.train[row], [pad]), top, left, 32, 32)
        assert torch.equal(window, tv.horizontal_flip(expected) if flipped else expected)


def epoch_batches(data: images.Images, epoch: int = 0, n_views: int = 3, batch: int = 8, seed: int = 0):
    args = train.parse_args(["--data-set", "cifar100", "--batch", str(batch), "--seed", str(seed), "--queue", "800"])
    return train.batches(args, data, epoch, n_views)


def test_batches_cover_the_epoch_and_depend_only_on_seed_and_epoch():
    data = random_images(22)._replace(train_labels=torch.arange(22))
    batches = list(epoch_batches(data, 1))
    assert [len(labels) for _, labels in batches] == [8, 8, 6]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(22))
    again, other_epoch = list(epoch_batches(data, 1)), list(epoch_batches(data, 2))
    assert torch.equal(batches[2][0][1], again[2][0][1])
    assert not torch.equal(batches[2][0][1], other_epoch[2][0][1])
    assert not torch.equal(next(epoch_batches(data, 1, seed=1))[0][0], batches[0][0][0])
    views = batches[0][0]
    assert len(views) == 3 and not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    single = next(epoch_batches(data, 1, n_views=1))[0]
    assert len(single) == 1 and torch.equal(single[0], views[0])
    assert [len(labels) for _, labels in epoch_batches(random_images(17))] == [8, 8]  # drops a batch of one image


def test_crop_offsets_are_uniform():
    white = torch.full((800, 3, 32, 32), 255, dtype=torch.uint8)
    data = random_images(1)._replace(train=white, train_labels=torch.zeros(800, dtype=torch.int64))
    views, _ = next(epoch_batches(data, batch=800))
    is_white = (views[0][:, 0] > 0).float()  # the padding is black
    tops = is_white.amax(2).argmax(1)
    assert tops.max() == 4 and 0.05 < (tops == 4).float().mean() < 0.18  # expected: 1 in 9


def test_held_out_split_has_a_tenth_of_the_training_images(tmp_path):
    data = train.load_data("glyphs10", tmp_path, False, CPU, 0)
    split = train.load_data("glyphs10", tmp_path, True, CPU, 0)
    assert len(split.train) == 4500 and len(split.test) == 500 and torch.equal(split.mean, data.mean)
    train_images = {image.numpy().tobytes() for image in split.train}
    assert not any(image.numpy().tobytes() in train_images for image in split.test)


def test_learning_rate_falls_after_epochs_150_180_and_210():
    last = 781 / 782  # last step of an epoch
    epochs = (0, 149 + last, 150, 179 + last, 180, 209 + last, 210, 239 + last)
    rates = [0.05 * train.lr_multiplier(epoch / 240) for epoch in epochs]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])


# ---------------------------------------------------------------------------------------------- arms and flags


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_arms_have_distinct_arguments(scale):
    arms = design("cocord", scale)[0]
    resolved = {json.dumps(vars(train.parse_args(["--scale", scale, *flags])), default=str) for flags in arms.values()}
    # `moving` equals `base` if the feature widths are equal, and in the demo `frozen` does if they are not.
    may_be_equal = {arm for arm in arms if arm.startswith("moving@") and scale == "paper"}
    may_be_equal |= {"frozen@vgg_s64-vgg_s"} if scale == "demo" else set()
    assert len(resolved) >= len(arms) - len(may_be_equal)


def test_all_published_pairs_are_arms_at_paper_scale():
    arms = design("cocord", "paper")[0]
    assert {f"base@{pair}" for pair in PAIRS} <= set(arms) and len(PAIRS) == 13


def test_all_flags_are_used_and_all_used_flags_exist():
    shared = inspect.getsource(train.batches) + inspect.getsource(train.build_optimizer)  # teacher.py imports them
    for module, path in ((train, "cocord/train.py"), (teacher, "cocord/teacher.py")):
        source = (ROOT / path).read_text()
        source = source[source.index("\ndef ", source.index("def parse_args")) :]  # after parse_args
        used = set(re.findall(r"\bargs\.(\w+)", source + shared))
        assert used == set(vars(module.parse_args([]))) - READ_BY_COMMON, path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher-head", "full", "--teacher", "vgg_s64"], "vgg_s64 has 64 and vgg_s has 32"),
        (["--teacher", "none"], "--lambda-contrast 0"),
        (["--queue", "16"], "less than --batch 32"),
        (["--teacher-momentum", "1.5"], "not between 0 and 1"),
        (["--teacher-momentum", "0.5"], "has no effect, because the teacher's head is frozen"),
        (["--teacher", "none", "--lambda-contrast", "0", "--teacher-head", "partial"], "--teacher none has no head"),
        (["--temperature", "0"], "is not between"),
        (["--teacher", "alexnet"], "invalid choice"),
        (["--weights", "nowhere"], "--weights nowhere does not exist"),
        (["--epoch", "3"], "unrecognized"),
        (["--scale", "gpu"], "train at scale demo"),
        (["--data-set", "cifar100", "--data", "nowhere"], "common.images cifar100"),
    ],
)
def test_usage_errors_print_one_line(flags, words, tmp_path, capsys):
    assert_usage_error(train.main, ["--device", "auto" if "gpu" in flags else "cpu", *flags], words, tmp_path, capsys)


def test_default_learning_rate_and_teacher_head_depend_on_the_pair():
    rates = [train.parse_args(["--student", name]).lr for name in ("ShuffleV1", "MobileNetV2", "resnet20")]
    assert rates == [0.01, 0.01, 0.05]
    heads = [train.parse_args(["--teacher", name]).teacher_head for name in ("resnet_s32", "resnet_s64")]
    assert heads == ["full", "frozen"]


# ---------------------------------------------------------------------------------------------- a fake GPU


class UnsavedRun(FakeRun):
    def end_epoch(self, epoch, final_epoch, metrics, probe) -> None:
        pass


def train_on_a_fake_gpu(count: int, flags: list[str]) -> None:
    args = train.parse_args([*flags, "--batch", "16", "--epochs", "2", "--data-set", "cifar100"])
    data, device = random_images(count, "cuda"), torch.device("cuda")
    network = nn.Identity()
    if args.teacher != "none":
        network = net.fold_batch_norms(net.build(args.teacher, 6).eval().requires_grad_(False))
        for weight in network.parameters():
            weight.requires_grad_(False)
        network.to(device)
    model = train.build_model(args, 6, device)
    optimizer = train.build_optimizer(
        argparse.Namespace(lr=0.1, weight_decay=5e-4), [model.student, model.head, model.predictor]
    )
    train.train(args, UnsavedRun(), model, data, optimizer, train.Teacher(network))


@pytest.mark.parametrize("arm", ARMS)
def test_training_stays_on_a_fake_gpu(arm, fake_gpu):
    train_on_a_fake_gpu(40, ARMS[arm])
    assert fake_gpu.syncs > 0


def test_number_of_host_device_synchronisations_does_not_depend_on_the_number_of_steps(fake_gpu):
    syncs = []
    for count in (40, 88):
        fake_gpu.syncs = 0
        train_on_a_fake_gpu(count, [])
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0


# ---------------------------------------------------------------------------------------------- runs

TINY = ["--rehearse", "2", "--batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with the demo's teachers and one evaluated run per arm, each with two epochs of two steps."""
    root = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--data", str(root / "data")]
    for name in {words[words.index("--teacher") + 1] for words in ARMS.values()} - {"none"}:
        teacher.main([*flags, "--network", name, "--out", str(root / f"teacher@{name}" / "0")])
    for name, arm_flags in ARMS.items():
        train.main([*flags, *arm_flags, "--out", str(root / name / "0")])
        evaluate.main([str(root / name / "0")])
    return root


def test_arms_end_with_different_weights(finished):
    weights = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["student.block0.0.weight"] for arm in ARMS}
    for arm, other in itertools.combinations(ARMS, 2):
        # With unequal feature widths the teacher's head of base is frozen, too.
        is_same = {arm, other} == {"base@vgg_s64-vgg_s", "frozen@vgg_s64-vgg_s"}
        assert torch.equal(weights[arm], weights[other]) is is_same, (arm, other)


def test_metrics_json_has_the_expected_keys(finished):
    always = "accuracy accuracy_best_epoch train_loss train_accuracy seconds examples_per_second peak_memory"
    with_keys = "contrastive_accuracy positive_cosine negative_cosine key_consistency key_cosine teacher_head_shift"
    for arm in ARMS:
        metrics = json.loads((finished / arm / "0/metrics.json").read_text())
        assert all(isinstance(metrics[key], float | int) for key in always.split()), arm
        has_contrast = not arm.startswith(("cross-entropy", "distillation"))
        assert all((metrics[key] is not None) is has_contrast for key in with_keys.split()), arm
        assert (metrics["teacher_accuracy"] is None) is arm.startswith("cross-entropy")
        has_slow_student = has_contrast and not arm.startswith("none")
        assert (metrics["accuracy_slow_student"] is not None) is has_slow_student and metrics["diverged"] is False
        if "frozen" in arm:
            assert metrics["teacher_head_shift"] == 0 and metrics["key_consistency"] == pytest.approx(1, abs=1e-5)
    moved = json.loads((finished / "moving-fast@resnet_s64-vgg_s/0/metrics.json").read_text())
    assert moved["teacher_head_shift"] > 0 and moved["key_consistency"] < 1


def test_the_log_contains_only_what_was_measured(finished):
    terms = {
        "forward_loss": "forward_weight", "swapped_loss": "swapped_weight", "distillation_loss": "lambda_kd",
        **dict.fromkeys(("contrastive_loss", *evaluate.KEY_METRICS), "lambda_contrast"),
    }  # fmt: skip
    for arm in ARMS:
        arguments = json.loads((finished / arm / "0/args.json").read_text())["arguments"]
        last = json.loads((finished / arm / "0/train.jsonl").read_text().splitlines()[-1])
        assert {name: name in last for name in terms} == {name: arguments[term] > 0 for name, term in terms.items()}
        assert {"loss", "class_loss", "train_accuracy", "test_accuracy"} < set(last)


def test_relative_change_by_hand():
    initial = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0], [4.0]])]  # norm 5
    moved = [initial[0] + torch.tensor([[0.0, 1.0]]), initial[1] * 1.5]  # changes of norm 1 and 2
    assert train.relative_change(moved, initial) == pytest.approx(5**0.5 / 5)
    assert train.relative_change([], []) == 0


def test_teacher_run_writes_its_metrics_and_is_not_repeated(finished, capsys):
    folder = finished / "teacher@vgg_s64/0"
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = checkpoints.load(folder / "model.pt")
    assert metrics["accuracy"] == saved["accuracy"] and metrics["diverged"] is False
    before = (folder / "model.pt").read_bytes()
    teacher.main([*TINY, "--data", str(finished / "data"), "--network", "vgg_s64", "--out", str(folder)])
    assert "is finished" in capsys.readouterr().out and (folder / "model.pt").read_bytes() == before


@pytest.mark.parametrize("study", STUDIES)
def test_plot_writes_figures_and_findings(study, finished, tmp_path):
    plot.main([study, "--runs", str(finished), "--seeds", "0", "1", "--results", str(tmp_path)])
    summary = json.loads((tmp_path / f"{study}.json").read_text())
    contrasts = [f"{contrast['arm']}:{contrast['reference']}" for contrast in summary["contrasts"]]
    assert contrasts == STUDIES[study] and not summary["not_run"]
    assert all(baseline["arm_mean"] is not None for baseline in summary["baselines"])
    assert any("1 of 2 missing (seed 1)" in note for note in summary["notes"])
    names = {path.name.removeprefix(f"{study}-") for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")}
    figures = ("differences", "summary", "curves", "metrics")
    assert names == {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "svg")}
    assert "contrastive top-1" in (tmp_path / f"{study}-curves.svg").read_text()


class Killed(BaseException):
    pass


def test_resuming_with_another_teacher_exits_with_code_2(finished, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", str(finished / "data"), "--out", str(tmp_path / "run")]
    save = Run.save

    def save_and_interrupt(self, epoch, metrics, state):
        save(self, epoch, metrics, state)
        raise Killed

    monkeypatch.setattr(Run, "save", save_and_interrupt)
    with pytest.raises(Killed):
        train.main([*flags, "--weights", str(finished / "teacher@vgg_s64/0")])
    monkeypatch.setattr(Run, "save", save)
    teacher.main([*TINY, "--data", str(finished / "data"), "--seed", "1", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--weights", str(tmp_path / "other")])
    assert end.value.code == 2 and "teacher_weights" in capsys.readouterr().err


def test_a_finished_run_accepts_its_teacher_or_none_but_not_another(finished, tmp_path, capsys):
    out, data = finished / "base@vgg_s64-vgg_s/0", str(finished / "data")
    teacher.main([*TINY, "--data", data, "--seed", "1", "--out", str(tmp_path / "other")])
    for weights, code in (("other", 2), ("deleted", None), (finished / "teacher@vgg_s64/0", None)):
        flags = [*TINY, *ARMS["base@vgg_s64-vgg_s"], "--out", str(out), "--weights", str(tmp_path / weights)]
        if code is None:
            train.main(flags)
            assert "is finished" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as end:
            train.main(flags)
        printed = capsys.readouterr().err
        assert end.value.code == code and "was trained with another teacher" in printed and printed.count("\n") == 1
        assert not (out / "failure.txt").exists()


def test_a_run_with_few_labels_differs_only_in_the_class_loss(finished, tmp_path):
    flags = [*TINY, "--data", str(finished / "data"), "--weights", str(finished / "teacher@vgg_s64/0")]
    for labels in ("4", "32"):
        train.main([*flags, "--labels", labels, "--out", str(tmp_path / labels)])
    train.main([*flags, "--out", str(tmp_path / "all")])
    few, half, full = (checkpoints.load(tmp_path / name / "model.pt")["model"] for name in ("4", "32", "all"))
    assert equal_states(half, full) and not equal_states(few, full)
    logs = [json.loads((tmp_path / name / "train.jsonl").read_text().splitlines()[1]) for name in ("4", "all")]
    assert logs[0]["class_loss"] != logs[1]["class_loss"]
    assert logs[0]["class_loss"] == pytest.approx(math.log(36), abs=0.5)  # a mean over labelled images only


def test_more_labels_than_images_and_labels_without_class_loss_are_errors(tmp_path, capsys):
    flags = ["--teacher", "none", "--lambda-contrast", "0", "--device", "cpu", "--data", str(tmp_path / "data")]
    for more, words in (
        (["--labels", "6000"], "give at most 5000"),
        (["--labels", "9", "--lambda-class", "0"], "no effect"),
    ):
        with pytest.raises(SystemExit) as end:
            train.main([*flags, *more, "--out", str(tmp_path / "run")])
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_diverged_run_is_evaluated(finished, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--data", str(finished / "data"), "--weights", str(finished / "teacher@vgg_s64/0")]
    train.main([*flags, "--lr", "1e30", "--out", str(out)])
    evaluate.main([str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["diverged"] is True and metrics["accuracy"] is None


# ---------------------------------------------------------------------------------------------- larger scales


@pytest.fixture
def random_cifar(monkeypatch):
    def cifar(name, data, train):
        pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(int(train)))
        return pixels.byte(), torch.arange(16) % 100

    monkeypatch.setattr(images, "cifar", cifar)


def train_two_steps(arm: str, flags: list[str], folder, scale: str) -> None:
    """Train two epochs of one step with four images, at the widths of `scale` and with an untrained teacher."""
    name = flags[flags.index("--teacher") + 1]
    common_flags = ["--scale", scale, "--batch", "4", "--rehearse", "1", "--device", "cpu"]
    if name != "none":
        weights = folder / f"{name}.pt"
        if not weights.exists():
            torch.save(net.build(name, 100).state_dict(), weights)
        common_flags += ["--weights", str(weights)]
    out = folder / arm / "0"
    train.main([*common_flags, *flags, "--out", str(out)])
    evaluate.main([str(out)])
    assert json.loads((out / "metrics.json").read_text())["accuracy"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_all_published_pairs_train_and_evaluate(pair, random_cifar, no_checkpoints, tmp_path):
    arms = design("cocord", "paper")[0]
    train_two_steps("base", arms[f"base@{pair}"], tmp_path, "paper")
    saved = checkpoints.load(tmp_path / "base/0/model.pt")
    assert saved["arguments"]["dim"] == 2048 and saved["epoch"] == 2


@pytest.mark.slow
def test_all_arms_of_gpu_scale_train_and_evaluate(random_cifar, no_checkpoints, tmp_path):
    """Each arm runs on one pair of the prediction study, one of the momentum study, or one control pair."""
    arms = design("cocord", "gpu")[0]
    settings = ("@resnet56-resnet20", "@vgg13-MobileNetV2", "@resnet110-wrn_40_1", "cross-entropy@resnet20")
    chosen = {arm: flags for arm, flags in arms.items() if arm.endswith(settings)}
    assert {arm.split("@")[0] for arm in chosen} == {arm.split("@")[0] for arm in arms}
    for arm, flags in chosen.items():
        train_two_steps(arm, flags, tmp_path, "gpu")
