"""Tests of conmim/eval.py: labelled subset, fine-tuning, frozen features, similarities, runs, authors' checkpoints."""

import argparse
import json
import math
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FakeGPU
from torch import nn
from torch.nn.functional import normalize
from torchvision.transforms import v2

from common import checkpoints, devices, image_folder, images, probes, seeding
from conmim import eval as evaluate
from conmim import net, train
from conmim.net import Classifier, Shape, ViT

CPU = torch.device("cpu")
ARMS = {
    "base": [],
    "online": ["--keys", "online"],
    "no-stop-gradient": ["--keys", "online", "--no-stop-gradient", "--views", "basic"],
    "no-pretraining": ["--epochs", "0"],
}
RECIPE = {"bank": 60, "warm_up": 1, "batch": 8}
FLAGS = {"labels": 24, "finetune_epochs": 3, "mask_square": 2}  # defaults of train.py
SHAPE = Shape(4, 16, 2, 2)


@pytest.fixture(autouse=True)
def tiny_setting(monkeypatch):
    """Replace the demo network by a transformer of two blocks of width 16, and shorten the recipe."""
    monkeypatch.setitem(net.NETWORKS, "vit_demo", SHAPE)
    for table, values in ((evaluate.RECIPES, RECIPE), (train.SCALES, FLAGS)):
        for name, value in values.items():
            monkeypatch.setitem(table, name, (value, value, value))


def recipe(scale: int = 0, **changes) -> evaluate.Recipe:
    return {name: row[scale] for name, row in evaluate.RECIPES.items()} | changes


def parse_args(*flags: str) -> argparse.Namespace:
    return train.parse_args(["--hidden", "24", "--dim", "20", "--epochs", "1", "--batch", "16", *flags])


def random_images(count: int = 60, classes: int = 4, device: str = "cpu") -> images.Images:
    """Noise images in which the colour encodes the class. Training and test set are equal."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 120, (count, 3, 32, 32), generator=generator), torch.arange(count) % classes
    pixels[torch.arange(count), labels % 3] += 60 * (labels[:, None, None] + 1) // 2
    pixels, labels = pixels.byte().to(device), labels.to(device)
    mean = torch.full((3, 1, 1), 0.4, device=device)
    return images.Images(pixels, labels, pixels, labels, classes, mean, mean / 2, "d")


def vit_state() -> dict[str, torch.Tensor]:
    return train.build_model(parse_args(), CPU).ema.vit.state_dict()


def fine_tuned_accuracy(indices=None, seed=0, epochs=3, **changes) -> float:
    data = random_images()
    indices = torch.arange(data.examples) if indices is None else indices
    args, settings = parse_args("--data-set", "cifar10", "--seed", str(seed)), recipe(**changes)
    args.finetune_epochs = epochs
    model = evaluate.build_classifier(args, settings, vit_state(), data)
    state = evaluate.EvaluationState(Path("no such folder/eval_state.pt"), "", CPU)
    return evaluate.fine_tune(args, settings, model, data, evaluate.Subset(indices, data.train_labels), state)


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("count", "classes"), [(40, 4), (42, 4), (12, 12)])
def test_labelled_subset_is_class_balanced_and_fixed(count, classes):
    labels = torch.randint(classes, (500,), generator=torch.Generator().manual_seed(3))
    indices = images.balanced_subset(labels, count, classes, 0)
    per_class = torch.bincount(labels[indices], minlength=classes)
    assert len(indices) == len(set(indices.tolist())) == count
    assert per_class.max() - per_class.min() <= (count % classes > 0)
    assert torch.equal(indices, indices.sort().values)
    assert torch.equal(indices, images.balanced_subset(labels, count, classes, 0))
    assert not torch.equal(indices, torch.arange(count))


@pytest.mark.parametrize("count", [None, 500, 501])
def test_all_labels_are_used_in_order(count):
    assert torch.equal(images.balanced_subset(torch.zeros(500, dtype=torch.int64), count, 3, 0), torch.arange(500))


def test_held_out_images_are_not_trained_on():
    data = random_images(200)
    data = data._replace(train=torch.arange(200).view(200, 1, 1, 1).expand(200, 3, 32, 32))
    split = data.with_held_out_test()
    train_ids, test_ids = (set(part[:, 0, 0, 0].tolist()) for part in (split.train, split.test))
    assert len(split.test) == 20 and len(split.train) == 180 and not train_ids & test_ids
    assert torch.equal(split.test_labels, split.test[:, 0, 0, 0] % 4)


# ---------------------------------------------------------------------------------------------- fine-tuning


def test_layer_wise_learning_rates_equal_those_of_the_authors_code():
    scales = evaluate.lr_scales(12, 0.65)
    expected = {0: 0.0037, 1: 0.0057, 11: 0.4225, 12: 0.65, 13: 1.0}
    assert len(scales) == 14 and {layer: round(scales[layer], 4) for layer in expected} == expected


@pytest.mark.parametrize("positions", net.POSITIONS)
def test_every_parameter_has_the_learning_rate_and_weight_decay_of_its_layer(positions):
    model = Classifier(32, *Shape(4, 16, 3, 2), 0.1, positions, 5)
    optimizer = evaluate.build_optimizer(model, 0.5, 0.05)
    names = {id(weight): name for name, weight in model.named_parameters()}
    settings = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert names[id(weight)] not in settings
            settings[names[id(weight)]] = (group["lr_scale"], group["weight_decay"])
    assert set(settings) == set(names.values())
    layers_below_head = {"blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "fc_norm.": 0, "head.wei": 0, "head.bia": 0}
    for name, (scale, decay) in settings.items():
        assert scale == 0.5 ** layers_below_head.get(name[:8], 4), name
        matrix = name.endswith(("weight", "table")) and "norm" not in name
        assert decay == (0.05 if matrix else 0.0), name


def test_learning_rate_schedule_per_step_and_layer(monkeypatch):
    steps, step = [], torch.optim.AdamW.step

    def recording_step(optimizer, *rest):
        steps.append({group["lr_scale"]: group["lr"] for group in optimizer.param_groups})
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    # Three epochs of three steps; the first epoch is warm-up.
    fine_tuned_accuracy(indices=torch.arange(26), lr=0.01, final_lr=1e-4, layer_decay=0.5)
    expected = [0.0, 0.005, 0.01]
    expected += [1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert len(steps) == 9
    for rates, lr in zip(steps, expected, strict=True):
        assert rates == pytest.approx({0.5**layer: lr * 0.5**layer for layer in range(4)})


def test_fine_tuning_starts_from_pretrained_weights_and_a_small_head(monkeypatch):
    models = []
    monkeypatch.setattr(evaluate, "accuracy", lambda model, *_: models.append(model) or 0.0)
    fine_tuned_accuracy(epochs=0, head_scale=0.001)
    state, start = vit_state(), models[0].state_dict()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vit = ViT(32, *SHAPE, 1.0, "both").eval()
    vit.load_state_dict(state)
    tokens = []
    vit.norm.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    vit(x)
    pooled = F.layer_norm(tokens[0][:, 1:].mean(1), (16,), eps=1e-6)
    torch.testing.assert_close(models[0].eval()(x), pooled @ start["head.weight"].T)
    assert 0 < start["head.weight"].abs().max() <= 0.02 * 0.001
    shared_table = state["rel_pos_bias.relative_position_bias_table"]
    assert all(torch.equal(start[f"blocks.{i}.attn.relative_position_bias_table"], shared_table) for i in range(2))


def test_only_positions_are_transplanted():
    data, settings, state = random_images(), recipe(), vit_state()
    state = {name: tensor + 1 for name, tensor in state.items()}
    models = {
        name: evaluate.build_classifier(parse_args("--transplant", name), settings, state, data).state_dict()
        for name in ("all", "positions")
    }
    with seeding.seeded_fork_rng(0, "classifier"):
        fresh = Classifier(32, *SHAPE, 1.0, "both", data.classes, 0.0, settings["head_scale"]).state_dict()
    changed = {name for name in fresh if not torch.equal(models["positions"][name], fresh[name])}
    assert changed == {"pos_embed", *(f"blocks.{i}.attn.relative_position_bias_table" for i in range(2))}
    assert all(torch.equal(models["positions"][name], models["all"][name]) for name in changed)
    assert not torch.equal(models["positions"]["blocks.0.mlp.fc1.weight"], models["all"]["blocks.0.mlp.fc1.weight"])


def test_pixel_accuracy_is_that_of_the_nearest_labelled_image():
    data, indices = random_images(60), torch.arange(0, 60, 5)
    pixels = data.normalise(data.train).flatten(1).tolist()

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms

    hits = 0
    for image, label in zip(pixels, data.test_labels.tolist(), strict=True):
        nearest = max(indices.tolist(), key=lambda index: cosine(image, pixels[index]))
        hits += data.train_labels[nearest].item() == label
    assert evaluate.pixel_accuracy(data, indices) == pytest.approx(100 * hits / 60)


def test_a_long_warm_up_is_reported(finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "run")
    config = json.loads((tmp_path / "run/args.json").read_text())
    assert config["arguments"]["finetune_epochs"] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.RECIPES, "warm_up", (3, 3, 3))
        evaluate.main([str(tmp_path / "run")])
    assert "the warm-up of 3 epochs is as long as --finetune-epochs 3" in capsys.readouterr().err


def test_fine_tuning_learns_and_is_reproducible(monkeypatch):
    states, accuracy = [], evaluate.accuracy
    monkeypatch.setattr(
        evaluate, "accuracy", lambda model, *rest: states.append(model.state_dict()) or accuracy(model, *rest)
    )
    after_training = fine_tuned_accuracy(epochs=25, lr=0.01)
    assert after_training > 60 > fine_tuned_accuracy(epochs=0)
    for seed in (0, 0, 1):
        fine_tuned_accuracy(seed=seed)
    first, repeated, other_seed = (state["blocks.0.mlp.fc1.weight"] for state in states[2:])
    assert torch.equal(first, repeated) and not torch.equal(first, other_seed)


SETTINGS = ("rand_augment", "mixup", "cutmix", "random_erasing", "drop_path", "label_smoothing")


@pytest.mark.parametrize("name", [*SETTINGS, "crop"])
def test_every_setting_of_the_recipe_changes_the_result(name, monkeypatch):
    states = []
    monkeypatch.setattr(
        evaluate, "accuracy", lambda model, *_: states.append(model.head.weight.detach().clone()) or 0.0
    )
    plain = dict.fromkeys(SETTINGS, 0) | {"crop": (0.5, 1.0)}
    changed = {"rand_augment": 9, "crop": (0.2, 0.4)}.get(name, 0.8)
    fine_tuned_accuracy(epochs=2, **plain)
    fine_tuned_accuracy(epochs=2, **plain | {name: changed})
    assert not torch.equal(*states)


def test_two_operations_of_rand_augment_are_each_applied_with_probability_one_half(monkeypatch):
    applied = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda operation, x: applied.append(operation.num_ops) or x)
    with seeding.seeded_fork_rng(0, "RandAugment"):
        for operation in 400 * evaluate.build_rand_augment(27):
            operation(torch.zeros(1, 3, 4, 4))
    assert 340 < sum(applied) < 460


def test_mixup_labels_are_convex_combinations(monkeypatch):
    labels, cross_entropy = [], F.cross_entropy

    def recording_cross_entropy(logits, y, **options):
        labels.append(y)
        return cross_entropy(logits, y, **options)

    monkeypatch.setattr(F, "cross_entropy", recording_cross_entropy)
    fine_tuned_accuracy(epochs=1, mixup=0.8, cutmix=1.0)
    assert all(y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8)) for y in labels)
    assert any(((y > 0).sum(1) == 2).any() for y in labels)


def test_random_erasing_fills_boxes_with_noise():
    x = torch.full((400, 3, 32, 32), 5.0)
    result = evaluate.random_erasing(x, seeding.SampleRNG(0, "erase", 0, 400), 0.25)
    changed = result != x
    erased = changed.flatten(1).any(1)
    assert 0.18 < erased.float().mean() < 0.32 and torch.equal(changed[:, 0], changed[:, 1])
    for box in changed[erased][:, 0]:
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < box.float().mean() < 0.36
    noise = result[changed]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(evaluate.random_erasing(x, seeding.SampleRNG(0, "erase", 0, 400), 0.0), x)


def test_fine_tuning_batches_contain_the_labelled_images_once_per_epoch(monkeypatch):
    data = random_images(80)
    data = data._replace(train=torch.arange(80).view(80, 1, 1, 1).expand(80, 3, 32, 32).byte())
    indices = torch.arange(5, 70, 2)

    def indices_and_labels(epoch, rank=0, world=1):
        monkeypatch.setattr(devices, "rank_and_world", lambda: (rank, world))
        subset = evaluate.Subset(indices, data.train_labels)
        args, settings = parse_args("--data-set", "glyphs10-light"), recipe(crop=(1.0, 1.0))
        images_of_batches, labels = zip(*evaluate.fine_tuning_batches(args, settings, data, subset, epoch), strict=True)
        pixels = (torch.cat(images_of_batches) * data.std + data.mean) * 255  # the pixel value is the index
        return pixels.mean((1, 2, 3)).round().int(), torch.cat(labels)

    first, labels = indices_and_labels(0)
    assert len(first) == 32 == len(set(first.tolist())) and set(first.tolist()) < set(indices.tolist())
    assert torch.equal(labels, data.train_labels[first.long()])
    assert not torch.equal(first, indices_and_labels(1)[0]) and torch.equal(first, indices_and_labels(0)[0])
    halves = [indices_and_labels(0, rank, 2)[0].view(4, 4) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, 1).flatten(), first)


# ---------------------------------------------------------------------------------------------- frozen features


def test_features_are_the_mean_patch_token_and_mean_key():
    branch, x = train.build_model(parse_args(), CPU).online.eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        tokens = branch.vit(x)
        keys = normalize(branch.projector(tokens)[:, 1:], dim=2)
        features = evaluate.Features(branch.vit, branch.projector).eval()(x)
    expected = torch.stack([tokens[:, i] for i in range(1, 65)]).mean(0)
    torch.testing.assert_close(features[:, :16], expected)
    torch.testing.assert_close(features[:, 16:], torch.stack([keys[:, i] for i in range(64)]).mean(0))
    torch.testing.assert_close(evaluate.Features(branch.vit).eval()(x), expected)


class PositionCode(nn.Module):
    """A projector whose keys encode the position and ignore the image."""

    def forward(self, tokens):
        return torch.eye(65, 20).expand(len(tokens), -1, -1)


def test_key_probe_of_a_pure_position_code_is_at_chance():
    data, vit = random_images(200), train.build_model(parse_args(), CPU).online.vit
    features = evaluate.Features(vit, PositionCode())
    metrics = evaluate.frozen_accuracies(parse_args(), features, data, torch.arange(200))
    assert metrics["key_linear_accuracy"] == 25.0 < metrics["linear_accuracy"]


def test_similarity_arrays_belong_to_the_first_diagnostic_image():
    data, args = random_images(300), parse_args()
    model = train.build_model(args, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrays = evaluate.similarity_arrays(args, model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    x, mask = train.diagnostic_batch(args, data)
    q, k = (normalize(features.detach(), dim=2) for features in model(x, x, mask, "ema", 0.0))
    np.testing.assert_allclose(arrays["own"], (q[0] @ k[0].T).numpy(), atol=1e-5)
    np.testing.assert_allclose(arrays["other"], (q[0] @ k[1].T).numpy(), atol=1e-5)
    assert (arrays["mask"] == mask[0].numpy()).all() and arrays["mask"].sum() == 48
    assert arrays["picture"].dtype == np.uint8 and (arrays["picture"] == data.test[0].numpy()).all()


# ---------------------------------------------------------------------------------------------- runs


def run_flags(folder, pictures, *flags) -> list[str]:
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--batch", "16", "--hidden", "24"]
    return [*common, "--dim", "70", "--epochs", "1", "--device", "cpu", "--out", str(folder), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """Folder with one finished and evaluated run per arm."""
    root = tmp_path_factory.mktemp("conmim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(net.NETWORKS, "vit_demo", SHAPE)
        for table, values in ((evaluate.RECIPES, RECIPE), (train.SCALES, FLAGS)):
            for name, value in values.items():
                patch.setitem(table, name, (value, value, value))
        for arm, flags in ARMS.items():
            train.main(run_flags(root / arm, pictures, *flags))
            evaluate.main([str(root / arm)])
    return root


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_metrics_json_keys(finished):
    keys = "finetune_accuracy linear_accuracy knn_accuracy finetune_accuracy_online linear_accuracy_online "
    keys += "knn_accuracy_online own_top1 cross_top1 position_r2 key_effective_rank loss_minimum key_linear_accuracy "
    keys += "untrained_linear_accuracy train_seconds seconds peak_memory"
    training_keys = ["train_loss", "clipped_fraction", "examples_per_second"]
    for arm in ARMS:
        metrics = read_metrics(finished / arm)
        expected = keys.split() + (training_keys if arm != "no-pretraining" else [])
        assert all(isinstance(metrics[key], float | int) for key in expected), arm
        assert metrics["diverged"] is False and len(metrics["data"]) == 64
        assert metrics["loss_minimum"] == pytest.approx(math.log(1 + 63 * math.exp(-640 / 63)))
        assert not (finished / arm / "eval_state.pt").exists() and (finished / arm / "similarity.npz").exists()
    untrained = read_metrics(finished / "no-pretraining")
    assert all(untrained[name] is None for name in training_keys)
    assert all(untrained[name] == untrained[f"{name}_online"] for name in evaluate.ACCURACIES)
    for arm in ARMS:
        assert read_metrics(finished / arm)["untrained_linear_accuracy"] == untrained["linear_accuracy"]


@pytest.mark.parametrize("arm", ["base", "no-stop-gradient"])
def test_metrics_equal_a_naive_measurement(arm, finished, pictures):
    """Recompute the kNN accuracy of both networks from model.pt, and read the diagnostics from the last log line."""
    metrics, state = read_metrics(finished / arm), checkpoints.load(finished / arm / "model.pt")["model"]
    data = images.load("folder", pictures, 32, CPU)
    for suffix, prefix in (("", "ema.vit."), ("_online", "online.vit.")):
        vit = ViT(32, *SHAPE, 0.1, "both").eval()
        vit.load_state_dict({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
        with torch.no_grad():
            bank, queries = (vit(data.normalise(x))[:, 1:].mean(1) for x in (data.train, data.test))
        bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
        correct = 0
        for query, label in zip(queries, data.test_labels, strict=True):
            votes = [0.0, 0.0]
            for cosine, index in zip(*(bank @ query).topk(20), strict=True):
                votes[data.train_labels[index]] += math.exp(cosine / 0.07)
            correct += votes.index(max(votes)) == label
        assert metrics[f"knn_accuracy{suffix}"] == pytest.approx(100 * correct / len(queries))
    last = json.loads((finished / arm / "train.jsonl").read_text().splitlines()[-1])
    assert metrics["train_loss"] == last["loss"]
    assert all(metrics[name] == last[name] for name in evaluate.DIAGNOSTICS)


def test_untrained_network_is_the_initial_one_and_keys_are_probed_on_their_network(finished, monkeypatch):
    evaluated = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda args, settings, networks, *_: evaluated.update(networks) or {})
    for arm in ("base", "online"):
        saved = checkpoints.load(finished / arm / "model.pt")
        args = argparse.Namespace(**saved["arguments"])
        start = train.build_model(args, CPU).ema.vit.state_dict()
        evaluate.evaluate_run(args, recipe(), saved["model"], random_images(), finished, True)
        untrained = evaluated["_untrained"].vit.state_dict()
        assert all(torch.equal(tensor, start[name]) for name, tensor in untrained.items())
        assert not torch.equal(untrained["mask_token"], evaluated[""].vit.state_dict()["mask_token"])
        probed = [suffix for suffix, features in evaluated.items() if features.projector is not None]
        assert probed == ([""] if arm == "base" else ["_online"])


def test_knn_uses_k_20_and_temperature_0_07(monkeypatch):
    settings = []
    monkeypatch.setattr(probes, "knn_accuracy", lambda *arguments: settings.append(arguments[-2:]) or 0.0)
    features = evaluate.Features(train.build_model(parse_args(), CPU).online.vit)
    evaluate.frozen_accuracies(parse_args(), features, random_images(), torch.arange(60))
    assert settings == [(20, 0.07)]


def test_ema_and_online_weights_are_evaluated_separately(finished, monkeypatch):
    states = []
    monkeypatch.setattr(evaluate, "build_classifier", lambda args, settings, state, data: states.append(state))
    monkeypatch.setattr(evaluate, "fine_tune", lambda *_: float(len(states)))
    evaluate.main([str(finished / "online"), "--held-out"])
    saved = checkpoints.load(finished / "online/model.pt")["model"]
    for state, branch in zip(states, ("ema", "online"), strict=True):
        assert all(torch.equal(tensor, saved[f"{branch}.vit.{name}"]) for name, tensor in state.items())
    assert not torch.equal(states[0]["mask_token"], states[1]["mask_token"])
    metrics = json.loads((finished / "online/held_out.json").read_text())
    assert metrics["finetune_accuracy"] == 1 and metrics["finetune_accuracy_online"] == 2


@pytest.mark.parametrize("epoch", [2, 5])
def test_an_interrupted_evaluation_resumes_to_the_same_metrics(epoch, finished, tmp_path, monkeypatch, pictures):
    """The interruption is in the first or in the second fine-tuning, which take three epochs each."""
    shutil.copytree(finished / "base", tmp_path / "run")
    monkeypatch.setattr(evaluate, "SAVE_EVERY", -1.0)
    fine_tuning_batches, accuracy = evaluate.fine_tuning_batches, evaluate.accuracy
    epochs, final_weights = [], []

    def recording_accuracy(model, *rest):
        final_weights.append(model.blocks[1].mlp.fc1.weight.detach().clone())
        return accuracy(model, *rest)

    monkeypatch.setattr(evaluate, "accuracy", recording_accuracy)
    shutil.copytree(finished / "base", tmp_path / "straight")
    evaluate.main([str(tmp_path / "straight")])
    assert (
        read_metrics(tmp_path / "straight")["finetune_accuracy"] == read_metrics(finished / "base")["finetune_accuracy"]
    )

    def interrupted_batches(*arguments):
        epochs.append(arguments[-1])
        if len(epochs) == epoch:
            raise KeyboardInterrupt
        return fine_tuning_batches(*arguments)

    monkeypatch.setattr(evaluate, "fine_tuning_batches", interrupted_batches)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([str(tmp_path / "run")])
    assert (tmp_path / "run/eval_state.pt").exists()
    evaluate.main([str(tmp_path / "run")])
    assert len(final_weights) == 4 and all(map(torch.equal, final_weights[:2], final_weights[2:]))
    assert epochs == [*([0, 1, 2] * 2)[:epoch], *([0, 1, 2] * 2)[epoch - 1 :]]
    metrics, expected = read_metrics(tmp_path / "run"), read_metrics(finished / "base")
    for name in ("seconds", "peak_memory"):
        del metrics[name], expected[name]
    assert metrics == expected
    assert not (tmp_path / "run/eval_state.pt").exists()


def test_a_saved_state_of_other_weights_or_settings_is_ignored(tmp_path):
    checkpoints.save(tmp_path / "eval_state.pt", {"identity": "a", "finished": {"finetune_accuracy": 1.0}})
    assert evaluate.EvaluationState(tmp_path / "eval_state.pt", "b", CPU).finished == {}
    assert evaluate.EvaluationState(tmp_path / "eval_state.pt", "a", CPU).finished == {"finetune_accuracy": 1.0}
    networks = [evaluate.Features(train.build_model(parse_args("--seed", s), CPU).online.vit) for s in ("0", "1")]
    identities = {
        evaluate.evaluation_identity({"": network}, settings) for network in networks for settings in ([1], [2])
    }
    assert len(identities) == 4


def test_metrics_of_a_diverged_run_are_null(finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "run")
    saved = checkpoints.load(tmp_path / "run/model.pt")
    checkpoints.save(tmp_path / "run/model.pt", saved | {"diverged": True})
    evaluate.main([str(tmp_path / "run")])
    metrics = read_metrics(tmp_path / "run")
    assert metrics["diverged"] is True and all(metrics[name] is None for name in evaluate.METRICS_IF_FINITE)


@pytest.mark.parametrize(("size", "batch"), [(32, 500), (72, 256)])
def test_out_of_memory_names_the_batch_of_the_evaluation(size, batch, pictures, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_):
        raise MemoryError

    train.main(run_flags(tmp_path, pictures, "--size", str(size), "--epochs", "0"))
    monkeypatch.setattr(evaluate, "evaluate_run", out_of_memory)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert f"with batches of {batch} images, 8 in fine-tuning" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{\n{}\n", '{"loss": 1}\n'])
def test_a_damaged_log_is_reported_in_one_line(content, finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "run")
    (tmp_path / "run/train.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and f"move {tmp_path / 'run'} away and train" in printed and printed.count("\n") == 1


def test_a_folder_without_a_run_is_reported(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "nothing")])
    assert end.value.code == 2 and "conmim/train.py" in capsys.readouterr().err


SAVE_FINE_TUNED_WEIGHTS = """
import sys
import torch
from common import checkpoints, devices
from conmim import eval as evaluate, net, train
net.NETWORKS["vit_demo"] = net.Shape(*{shape})
evaluate.RECIPES |= {{name: (value, value, value) for name, value in {recipe}.items()}}
evaluate.RECIPES["crop"] = ((1.0, 1.0),) * 3
accuracy = evaluate.accuracy
def saving_accuracy(model, *rest):
    from pathlib import Path
    checkpoints.save(Path(sys.argv[1]) / f"{{devices.rank_and_world()[0]}}.pt", model.state_dict())
    return accuracy(model, *rest)
evaluate.accuracy = saving_accuracy
torch.set_num_threads(1)
evaluate.main(sys.argv[1:])
"""


# ---------------------------------------------------------------------------------------------- larger scales


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_recipes_of_larger_scales_run(scale, pictures, tmp_path, monkeypatch, capsys):
    """Real recipes with small networks and data: RandAugment, mixup, random erasing, worker transforms."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=generator).byte()
    monkeypatch.setattr(images, "cifar", lambda *_: (pixels, torch.arange(20) % 10))
    for name, value in {"bank": None, "batch": 1024}.items():
        monkeypatch.setitem(evaluate.RECIPES, name, (value, value, value))
    monkeypatch.setitem(net.NETWORKS, "vit_tiny_4", Shape(4, 48, 3, 3))
    monkeypatch.setitem(net.NETWORKS, "vit_base_16", Shape(16, 48, 2, 3))
    flags = ["--scale", scale, "--batch", "4", "--rehearse", "2", "--hidden", "64", "--device", "cpu", "--workers", "0"]
    data, size = (tmp_path, "32") if scale == "gpu" else (pictures, "96")
    flags += ["--data", str(data), "--size", size, "--out", str(tmp_path / "run")]
    train.main(flags)
    evaluate.main([str(tmp_path / "run")])
    assert 0 <= read_metrics(tmp_path / "run")["finetune_accuracy"] <= 100
    if scale == "paper":
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(tmp_path / "run"), "--held-out"])
        assert end.value.code == 2 and "--held-out requires images of at most 64 pixels" in capsys.readouterr().err


def test_streamed_test_images_are_resized_bicubically(pictures, tmp_path, monkeypatch):
    interpolations, batches = [], image_folder.StreamedImages.batches

    def recording_batches(data, *rest):
        interpolations.append(data.interpolation)
        return batches(data, *rest)

    monkeypatch.setattr(image_folder.StreamedImages, "batches", recording_batches)
    train.main(run_flags(tmp_path, pictures, "--size", "72", "--epochs", "0", "--rehearse", "1"))
    assert interpolations == ["bicubic"]
    evaluate.main([str(tmp_path)])
    assert len(interpolations) > 2 and set(interpolations) == {"bicubic"}


@pytest.mark.slow
def test_fine_tuning_on_two_ranks_equals_one(pictures, tmp_path):
    """The classifier has no batch norm, so two ranks with half a batch each compute the gradient of the whole batch."""
    out = tmp_path / "run"
    train.main(run_flags(out, pictures))
    script = tmp_path / "fine_tune.py"
    script.write_text(SAVE_FINE_TUNED_WEIGHTS.format(shape=tuple(SHAPE), recipe=RECIPE))
    done = forked.run(tmp_path, script, str(out), ranks=2)
    assert done.returncode == 0, done.stderr
    weights, metrics = checkpoints.load(out / "0.pt"), read_metrics(out)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoints.load(out / "1.pt").items())
    assert forked.run(tmp_path, script, str(out)).returncode == 0
    for name, expected in checkpoints.load(out / "0.pt").items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-5)
    expected_metrics = read_metrics(out)
    assert all(metrics[name] == pytest.approx(expected_metrics[name], abs=1e-3) for name in evaluate.ACCURACIES)


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_authors_checkpoints_are_evaluated(fine_tuned, pictures, tmp_path, monkeypatch, capsys):
    """The files have the authors' format, with pickled arguments. A missing parameter is reported."""
    monkeypatch.setitem(net.NETWORKS, "vit_small_16", Shape(16, 24, 2, 2))
    monkeypatch.setitem(train.SCALES, "size", (32, 32, 96))
    with seeding.seeded_fork_rng(0, "official"):
        if fine_tuned:
            model = Classifier(96, 16, 24, 2, 2, 0.1, "relative", 2)
            nn.init.normal_(model.head.weight)
        else:
            model = ViT(96, 16, 24, 2, 2, 0.1, "relative")
    state = model.state_dict() | {"blocks.0.attn.relative_position_index": torch.zeros(37, 37)}
    if not fine_tuned:
        state = {name: tensor for name, tensor in state.items() if "attn.relative" not in name}
        state |= {"rel_pos_bias.relative_position_index": torch.zeros(37, 37), "lm_head.weight": torch.zeros(8, 24)}
        state |= {"lm_head.bias": torch.zeros(8), "projectors.0.weight": torch.zeros(8, 24)}
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out"
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=1.0)}, path)
    flags = ["--weights", str(path), "--network", "vit_small_16", "--data", str(pictures), "--device", "cpu"]
    monkeypatch.setitem(train.SCALES, "workers", (0, 0, 0))
    evaluate.main([str(out), *flags])
    metrics = read_metrics(out)
    data = images.load_or_stream("folder", pictures, 96, CPU, 0, interpolation="bicubic")
    if fine_tuned:
        hits = [(model.eval()(x).argmax(1) == y).float() for x, y in data.batches("test")]
        assert metrics["finetune_accuracy"] == pytest.approx(100 * torch.cat(hits).mean().item())
        assert "linear_accuracy" not in metrics
    else:
        features = evaluate.Features(model)
        bank = probes.Labelled(*probes.extract_features([features], data, "train"))
        queries = probes.Labelled(*probes.extract_features([features], data, "test"))
        assert metrics["knn_accuracy"] == probes.knn_accuracy(bank, queries, 2, 20, 0.07)
        assert {"finetune_accuracy", "linear_accuracy"} <= set(metrics)
    del state["cls_token"]
    torch.save({"model": state}, path)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(out), *flags])
    assert end.value.code == 2 and "cls_token" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), (b"junk", "is neither a .safetensors")])
def test_unreadable_authors_checkpoints_are_reported(content, words, tmp_path, capsys):
    if content:
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        evaluate.read_authors_checkpoint(tmp_path / "x.pth")
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("scale", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluation_stays_on_the_gpu(scale, fake_gpu: FakeGPU, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluation_identity", lambda *_: "")
    monkeypatch.setattr(checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(images, "balanced_subset", lambda labels, *_: torch.arange(len(labels)))
    data = random_images(40, device="cuda")
    with torch.device("cuda"):
        model = train.build_model(parse_args(), torch.device("cuda"))
    networks = {"": evaluate.Features(model.ema.vit, model.ema.projector)}
    syncs = []
    for epochs in (1, 2):
        fake_gpu.syncs = 0
        settings = recipe(scale, rand_augment=0, mixup=0.0, cutmix=0.0)  # off: they synchronise
        args = parse_args("--data-set", "cifar10", "--finetune-epochs", str(epochs))
        evaluate.evaluate(args, settings, networks, data, tmp_path, False)
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0
