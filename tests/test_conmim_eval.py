"""ConMIM's evaluation: labels, fine-tuning and its rates, frozen features, similarities, runs, official files."""

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

from common import checkpoints, devices, images, probes, seeding
from conmim import eval as evaluate
from conmim import net, train
from conmim.net import Classifier, Shape, ViT

CPU = torch.device("cpu")
ARMS = {
    "base": [], "online": ["--keys", "online"], "free": ["--keys", "online", "--no-stop-gradient", "--views", "basic"],
    "none": ["--epochs", "0"],
}  # fmt: skip
LITTLE = {"labels": 24, "bank": 60, "epochs": 3, "warm_up": 1, "batch": 8}
SHAPE = Shape(4, 16, 2, 2)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A transformer of two blocks, 16 wide, under the demo's name; few labels, few epochs."""
    monkeypatch.setitem(net.NETWORKS, "vit_demo", SHAPE)
    for name, value in LITTLE.items():
        monkeypatch.setitem(evaluate.RECIPES, name, (value, value, value))


def recipe(scale: int = 0, **changes) -> evaluate.Recipe:
    return {name: row[scale] for name, row in evaluate.RECIPES.items()} | changes


def parsed(*flags: str) -> argparse.Namespace:
    return train.parse_args(["--hidden", "24", "--dim", "20", "--epochs", "1", "--batch", "16", *flags])


def some_images(count: int = 60, classes: int = 4, device: str = "cpu") -> images.Images:
    """Pictures whose class is a colour on noise."""
    numbers = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 120, (count, 3, 32, 32), generator=numbers), torch.arange(count) % classes
    pixels[torch.arange(count), labels % 3] += 60 * (labels[:, None, None] + 1) // 2
    parts = [pixels.byte().to(device), labels.to(device)]
    channel = torch.full((3, 1, 1), 0.4, device=device)
    return images.Images(*parts, *parts, classes, channel, channel / 2, "d")


def vit_state() -> dict[str, torch.Tensor]:
    return train.build_model(parsed(), CPU).average.vit.state_dict()


def tuned(data=None, rows=None, seed=0, **changes) -> float:
    data = data or some_images()
    rows = torch.arange(data.examples) if rows is None else rows
    args, own = parsed("--data-set", "cifar10", "--seed", str(seed)), recipe(**changes)
    model = evaluate.build_classifier(args, own, vit_state(), data)
    progress = evaluate.Progress(Path("no such folder/eval_state.pt"), "", CPU)
    return evaluate.fine_tune(args, own, model, data, evaluate.Subset(rows, data.train_labels), progress)


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("count", "classes"), [(40, 4), (42, 4), (12, 12)])
def test_labels_are_balanced_and_no_runs_business(count, classes):
    labels = torch.randint(classes, (500,), generator=torch.Generator().manual_seed(3))
    rows = evaluate.labelled(labels, count, classes)
    each = torch.bincount(labels[rows], minlength=classes)
    assert len(rows) == len(set(rows.tolist())) == count and each.max() - each.min() <= (count % classes > 0)
    assert torch.equal(rows, rows.sort().values) and torch.equal(rows, evaluate.labelled(labels, count, classes))
    assert not torch.equal(rows, torch.arange(count))


@pytest.mark.parametrize("count", [None, 500, 501])
def test_all_labels_are_taken_in_order(count):
    assert torch.equal(evaluate.labelled(torch.zeros(500, dtype=torch.int64), count, 3), torch.arange(500))


def test_held_out_labels_are_never_trained_on():
    data = some_images(200)
    data = data._replace(train=torch.arange(200).view(200, 1, 1, 1).expand(200, 3, 32, 32))
    found = evaluate.tenth_as_test(data)
    seen = [set(part[:, 0, 0, 0].tolist()) for part in (found.train, found.test)]
    assert len(found.test) == 20 and len(found.train) == 180 and not seen[0] & seen[1]
    assert torch.equal(found.test_labels, found.test[:, 0, 0, 0] % 4)


# ---------------------------------------------------------------------------------------------- fine-tuning


def test_rates_fall_from_the_head_to_the_patches_as_the_authors():
    found = evaluate.layer_scales(12, 0.65)
    expected = {0: 0.0037, 1: 0.0057, 11: 0.4225, 12: 0.65, 13: 1.0}
    assert len(found) == 14 and {group: round(found[group], 4) for group in expected} == expected


@pytest.mark.parametrize("positions", net.POSITIONS)
def test_every_weight_has_its_groups_rate_and_decay(positions):
    model = Classifier(32, *Shape(4, 16, 3, 2), 0.1, positions, 5)
    optimizer = evaluate.build_optimizer(model, 0.5, 0.05)
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert names[id(weight)] not in found
            found[names[id(weight)]] = (group["scale"], group["weight_decay"])
    assert set(found) == set(names.values())
    for name, (scale, decay) in found.items():
        level = {"blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "fc_norm.": 0, "head.wei": 0, "head.bia": 0}.get(
            name[:8], 4
        )
        assert scale == 0.5**level, name
        matrix = name.endswith(("weight", "table")) and "norm" not in name
        assert decay == (0.05 if matrix else 0.0), name


def test_the_rate_moves_at_every_step_in_every_group(monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def watched(optimizer, *rest):
        seen.append({group["scale"]: group["lr"] for group in optimizer.param_groups})
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    tuned(rows=torch.arange(26), lr=0.01, last_lr=1e-4, layer_decay=0.5)  # three steps an epoch, one is warm-up
    expected = [0.0, 0.005, 0.01]
    expected += [1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert len(seen) == 9
    for found, rate in zip(seen, expected, strict=True):
        assert found == pytest.approx({0.5**level: rate * 0.5**level for level in range(4)})


def test_fine_tuning_starts_from_the_pretrained_weights_and_a_small_head(monkeypatch):
    kept = {}
    monkeypatch.setattr(evaluate, "accuracy", lambda model, *_: kept.update(model=model) or 0.0)
    tuned(epochs=0)
    state, start = vit_state(), kept["model"].state_dict()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vit = ViT(32, *SHAPE, 0.1, "both").eval()
    vit.load_state_dict(state)
    tokens = []
    vit.norm.register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    vit(x)
    pooled = F.layer_norm(tokens[0][:, 1:].mean(1), (16,), eps=1e-6)
    torch.testing.assert_close(kept["model"].eval()(x), pooled @ start["head.weight"].T)
    assert 0 < start["head.weight"].abs().max() <= 0.02 * 0.001
    assert all(torch.equal(start[f"blocks.{i}.attn.relative_position_bias_table"],
                           state["rel_pos_bias.relative_position_bias_table"]) for i in range(2))  # fmt: skip


def test_fine_tuning_learns_and_follows_from_the_seed(monkeypatch):
    states, accuracy = [], evaluate.accuracy
    monkeypatch.setattr(
        evaluate, "accuracy", lambda model, *rest: states.append(model.state_dict()) or accuracy(model, *rest)
    )
    learnt = tuned(epochs=25, lr=0.01, layer_decay=1.0)
    assert learnt > 60 > tuned(epochs=0)
    tuned(), tuned(), tuned(seed=1)
    same, again, other = (one["blocks.0.mlp.fc1.weight"] for one in states[2:])
    assert torch.equal(same, again) and not torch.equal(same, other)


@pytest.mark.parametrize("what", ["rand_augment", "mixup", "cutmix", "erase", "drop_path", "smoothing", "crop"])
def test_no_setting_of_the_recipe_is_dead(what, monkeypatch):
    states = []
    monkeypatch.setattr(
        evaluate, "accuracy", lambda model, *_: states.append(model.head.weight.detach().clone()) or 0.0
    )
    plain = {name: 0 for name in ("rand_augment", "mixup", "cutmix", "erase", "drop_path", "smoothing")}
    plain["crop"] = (0.5, 1.0)
    for changes in ({}, {what: {"rand_augment": 9, "crop": (0.2, 0.4)}.get(what, 0.8)}):
        tuned(epochs=2, **plain | changes)
    assert not torch.equal(*states)


def test_mixed_labels_are_shares_of_two(monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def watched(logits, y, **rest):
        seen.append(y)
        return cross_entropy(logits, y, **rest)

    monkeypatch.setattr(F, "cross_entropy", watched)
    tuned(epochs=1, mixup=0.8, cutmix=1.0)
    assert all(y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8)) for y in seen)
    assert any(((y > 0).sum(1) == 2).any() for y in seen)


def test_erased_boxes_hold_noise_and_nothing_else_moves():
    x = torch.full((400, 3, 32, 32), 5.0)
    found = evaluate.erased(x, seeding.SampleRNG(0, "erase", 0, 400), 0.25)
    changed = found != x
    hit = changed.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32 and torch.equal(changed[:, 0], changed[:, 1])
    for one in changed[hit][:, 0]:
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        assert one.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < one.float().mean() < 0.36
    noise = found[changed]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(evaluate.erased(x, seeding.SampleRNG(0, "erase", 0, 400), 0.0), x)


def test_batches_are_labelled_rows_of_their_epoch_alone(monkeypatch):
    data = some_images(80)
    data = data._replace(train=torch.arange(80).view(80, 1, 1, 1).expand(80, 3, 32, 32).byte())
    rows, own = torch.arange(5, 70, 2), recipe(crop=(1.0, 1.0))

    def seen(epoch, rank=0, world=1):
        monkeypatch.setattr(devices, "ranks", lambda: (rank, world))
        subset = evaluate.Subset(rows, data.train_labels)
        made = evaluate.labelled_batches(parsed("--data-set", "glyphs36"), own, data, subset, epoch)
        found = [((x * data.std + data.mean).mean((1, 2, 3)) * 255, y) for x, y in made]
        return torch.cat([x for x, _ in found]).round().int(), torch.cat([y for _, y in found])

    first, labels = seen(0)
    assert len(first) == 32 == len(set(first.tolist())) and set(first.tolist()) < set(rows.tolist())
    assert torch.equal(labels, data.train_labels[first.long()])
    assert not torch.equal(first, seen(1)[0]) and torch.equal(first, seen(0)[0])
    halves = [seen(0, rank, 2)[0].view(4, 4) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, 1).flatten(), first)


# ---------------------------------------------------------------------------------------------- frozen features


def test_features_are_the_mean_of_the_patches_without_the_class_token():
    branch, x = train.build_model(parsed(), CPU).online.eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        tokens = branch.vit(x)
        keys = normalize(branch.projector(tokens)[:, 1:], dim=2)
        found = evaluate.Features(branch.vit, branch.projector).eval()(x)
    expected = torch.stack([tokens[:, i] for i in range(1, 65)]).mean(0)
    torch.testing.assert_close(found[:, :16], expected)
    torch.testing.assert_close(found[:, 16:], torch.stack([keys[:, i] for i in range(64)]).mean(0))
    torch.testing.assert_close(evaluate.Features(branch.vit).eval()(x), expected)


class Code(nn.Module):
    """Keys that say where they are, whatever the image."""

    def forward(self, tokens):
        return torch.eye(65, 20).expand(len(tokens), -1, -1)


def test_a_pure_position_code_fails_the_keys_own_probe():
    data, vit = some_images(200), train.build_model(parsed(), CPU).online.vit
    features = evaluate.Features(vit, Code())
    found = evaluate.frozen(parsed(), features, data, torch.arange(200))
    assert found["key_linear_accuracy"] == 25.0 < found["linear_accuracy"]


def test_one_images_similarities_are_those_of_its_diagnostics():
    data, args = some_images(300), parsed()
    model = train.build_model(args, CPU)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = evaluate.similarity(args, model, data)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    x, mask = train.fixed_batch(data, 64, 0.75)
    q, k = (normalize(one.detach(), dim=2) for one in model(x, x, mask, "ema", 0.0))
    np.testing.assert_allclose(found["own"], (q[0] @ k[0].T).numpy(), atol=1e-5)
    np.testing.assert_allclose(found["other"], (q[0] @ k[1].T).numpy(), atol=1e-5)
    assert (found["mask"] == mask[0].numpy()).all() and found["mask"].sum() == 48
    assert found["picture"].dtype == np.uint8 and (found["picture"] == data.test[0].numpy()).all()


# ---------------------------------------------------------------------------------------------- runs


def tiny(folder, pictures, *flags) -> list[str]:
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--batch", "16", "--hidden", "24"]
    return [*common, "--dim", "70", "--epochs", "1", "--device", "cpu", "--out", str(folder), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A finished and evaluated run of every kind."""
    root = tmp_path_factory.mktemp("conmim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(net.NETWORKS, "vit_demo", SHAPE)
        for name, value in LITTLE.items():
            patch.setitem(evaluate.RECIPES, name, (value, value, value))
        for arm, flags in ARMS.items():
            train.main(tiny(root / arm, pictures, *flags))
            evaluate.main([str(root / arm)])
    return root


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_metrics_have_the_keys_that_were_asked_for(finished):
    keys = "finetune_accuracy linear_accuracy knn_accuracy finetune_accuracy_online linear_accuracy_online "
    keys += "knn_accuracy_online own_top1 cross_top1 position_r2 key_effective_rank loss_floor key_linear_accuracy "
    keys += "untrained_linear_accuracy train_seconds seconds examples_per_second peak_memory"
    trained = ["train_loss", "clipped_fraction"]
    for arm in ARMS:
        found = metrics_of(finished / arm)
        wanted = keys.split() + (trained if arm != "none" else [])
        assert all(isinstance(found[key], float | int) for key in wanted), arm
        assert found["diverged"] is False and len(found["data"]) == 64
        assert found["loss_floor"] == pytest.approx(math.log(1 + 63 * math.exp(-10)))
        assert not (finished / arm / "eval_state.pt").exists() and (finished / arm / "similarity.npz").exists()
    none = metrics_of(finished / "none")
    assert all(none[name] is None for name in trained)
    assert all(none[name] == none[f"{name}_online"] for name in evaluate.ACCURACIES)
    assert none["untrained_linear_accuracy"] == none["linear_accuracy"]
    assert {metrics_of(finished / arm)["untrained_linear_accuracy"] for arm in ARMS} == {none["linear_accuracy"]}


@pytest.mark.parametrize("arm", ["base", "free"])
def test_metrics_are_those_of_a_naive_measurement(arm, finished, pictures):
    """kNN accuracy of both networks from model.pt, and the diagnostics from the last line of the log."""
    found, state = metrics_of(finished / arm), checkpoints.load(finished / arm / "model.pt")["model"]
    data = images.load("folder", pictures, 32, CPU)
    for suffix, branch in (("", "average"), ("_online", "online")):
        vit = ViT(32, *SHAPE, 0.1, "both").eval()
        vit.load_state_dict({name[len(branch) + 5 :]: one for name, one in state.items() if f"{branch}.vit." in name})
        with torch.no_grad():
            known, asked = (vit(data.normalise(x))[:, 1:].mean(1) for x in (data.train, data.test))
        known, asked = normalize(known, dim=1), normalize(asked, dim=1)
        right = 0
        for row, label in zip(asked, data.test_labels, strict=True):
            near = (known @ row).topk(20)
            votes = [0.0, 0.0]
            for cosine, place in zip(*near, strict=True):
                votes[data.train_labels[place]] += math.exp(cosine / 0.07)
            right += votes.index(max(votes)) == label
        assert found[f"knn_accuracy{suffix}"] == pytest.approx(100 * right / len(asked))
    last = json.loads((finished / arm / "train.jsonl").read_text().splitlines()[-1])
    assert found["train_loss"] == last["loss"]
    assert all(found[name] == last[name] for name in evaluate.DIAGNOSTICS)


def test_the_untrained_network_is_the_runs_own_start_and_keys_are_probed_where_they_are_made(finished, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda args, own, networks, *_: seen.update(networks) or {})
    for arm in ("base", "online"):
        saved = checkpoints.load(finished / arm / "model.pt")
        args = argparse.Namespace(**saved["arguments"])
        start = train.build_model(args, CPU).average.vit.state_dict()
        evaluate.evaluate_run(args, recipe(), saved["model"], some_images(), finished, True)
        found = seen["_untrained"].vit.state_dict()
        assert all(torch.equal(one, start[name]) for name, one in found.items())
        assert not torch.equal(found["mask_token"], seen[""].vit.state_dict()["mask_token"])
        probed = [suffix for suffix, features in seen.items() if features.projector is not None]
        assert probed == ([""] if arm == "base" else ["_online"])


def test_neighbours_and_temperature_are_the_specifications(monkeypatch):
    given = []
    monkeypatch.setattr(probes, "knn_accuracy", lambda *rest: given.append(rest[-2:]) or 0.0)
    features = evaluate.Features(train.build_model(parsed(), CPU).online.vit)
    evaluate.frozen(parsed(), features, some_images(), torch.arange(60))
    assert given == [(20, 0.07)]


def test_averaged_and_online_weights_are_told_apart(finished, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "build_classifier", lambda args, own, state, data: seen.append(state))
    monkeypatch.setattr(evaluate, "fine_tune", lambda *_: float(len(seen)))
    evaluate.main([str(finished / "online"), "--held-out"])
    saved = checkpoints.load(finished / "online/model.pt")["model"]
    for state, branch in zip(seen, ("average", "online"), strict=True):
        assert all(torch.equal(one, saved[f"{branch}.vit.{name}"]) for name, one in state.items())
    assert not torch.equal(seen[0]["mask_token"], seen[1]["mask_token"])
    told = json.loads((finished / "online/held_out.json").read_text())
    assert told["finetune_accuracy"] == 1 and told["finetune_accuracy_online"] == 2


@pytest.mark.parametrize("epoch", [2, 5])
def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(epoch, finished, tmp_path, monkeypatch, pictures):
    """Interrupted in the first fine-tuning, and in the second (three epochs each)."""
    shutil.copytree(finished / "base", tmp_path / "run")
    monkeypatch.setattr(evaluate, "SAVED_EVERY", -1.0)
    made, began, ended, accuracy = evaluate.labelled_batches, [], [], evaluate.accuracy

    def watched(model, *rest):
        ended.append(model.blocks[1].mlp.fc1.weight.detach().clone())
        return accuracy(model, *rest)

    monkeypatch.setattr(evaluate, "accuracy", watched)
    shutil.copytree(finished / "base", tmp_path / "straight")
    evaluate.main([str(tmp_path / "straight")])
    assert metrics_of(tmp_path / "straight")["finetune_accuracy"] == metrics_of(finished / "base")["finetune_accuracy"]

    def interrupted(*given):
        began.append(given[-1])
        if len(began) == epoch:
            raise KeyboardInterrupt
        return made(*given)

    monkeypatch.setattr(evaluate, "labelled_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([str(tmp_path / "run")])
    assert (tmp_path / "run/eval_state.pt").exists()
    evaluate.main([str(tmp_path / "run")])
    assert len(ended) == 4 and all(torch.equal(one, other) for one, other in zip(ended[:2], ended[2:], strict=True))
    assert began == [*([0, 1, 2] * 2)[:epoch], *([0, 1, 2] * 2)[epoch - 1 :]]
    found, expected = metrics_of(tmp_path / "run"), metrics_of(finished / "base")
    timing = ("seconds", "peak_memory")
    assert {k: v for k, v in found.items() if k not in timing} == {k: v for k, v in expected.items() if k not in timing}
    assert not (tmp_path / "run/eval_state.pt").exists()


def test_a_state_of_other_weights_or_another_recipe_is_not_gone_on_with(tmp_path):
    checkpoints.save(tmp_path / "eval_state.pt", {"identity": "a", "done": {"finetune_accuracy": 1.0}})
    assert evaluate.Progress(tmp_path / "eval_state.pt", "b", CPU).done == {}
    assert evaluate.Progress(tmp_path / "eval_state.pt", "a", CPU).done == {"finetune_accuracy": 1.0}
    vit = evaluate.Features(train.build_model(parsed(), CPU).online.vit)
    other = evaluate.Features(train.build_model(parsed("--seed", "1"), CPU).online.vit)
    names = {evaluate.identity_of({"": one}, settings) for one in (vit, other) for settings in ([1], [2])}
    assert len(names) == 4


def test_a_diverged_run_has_no_claims(finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "run")
    saved = checkpoints.load(tmp_path / "run/model.pt")
    checkpoints.save(tmp_path / "run/model.pt", saved | {"diverged": True})
    evaluate.main([str(tmp_path / "run")])
    found = metrics_of(tmp_path / "run")
    assert found["diverged"] is True and all(found[name] is None for name in evaluate.METRICS_IF_FINITE)


@pytest.mark.parametrize("content", ["", "{\n{}\n", '{"loss": 1}\n'])
def test_a_damaged_log_ends_in_one_sentence(content, finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "run")
    (tmp_path / "run/train.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "train.jsonl is damaged" in printed and printed.count("\n") == 1


def test_a_folder_without_a_run_ends_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "nothing")])
    assert end.value.code == 2 and "conmim/train.py" in capsys.readouterr().err


WEIGHTS = """
import sys
import torch
from common import checkpoints, devices
from conmim import eval as evaluate, net
net.NETWORKS["vit_demo"] = net.Shape(*{shape})
evaluate.RECIPES |= {{name: (value, value, value) for name, value in {little}.items()}}
evaluate.RECIPES["crop"] = ((1.0, 1.0),) * 3
accuracy = evaluate.accuracy
def watched(model, *rest):
    from pathlib import Path
    checkpoints.save(Path(sys.argv[1]) / f"{{devices.rank_and_world()[0]}}.pt", model.state_dict())
    return accuracy(model, *rest)
evaluate.accuracy = watched
torch.set_num_threads(1)
evaluate.main(sys.argv[1:])
"""


# ---------------------------------------------------------------------------------------------- larger scales


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_the_recipes_of_larger_scales_run(scale, pictures, tmp_path, monkeypatch, capsys):
    """True recipes and small networks on stand-in data: RandAugment, mixing, erasing, the workers' code."""
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=numbers).byte()
    monkeypatch.setattr(images, "cifar", lambda *_: (pixels, torch.arange(20) % 10))
    for name, row in {"labels": None, "bank": None, "batch": 1024}.items():
        monkeypatch.setitem(evaluate.RECIPES, name, (row, row, row))
    monkeypatch.setitem(net.NETWORKS, "vit_tiny_4", Shape(4, 48, 3, 3))
    monkeypatch.setitem(net.NETWORKS, "vit_base_16", Shape(16, 48, 2, 3))
    flags = ["--scale", scale, "--batch", "4", "--rehearse", "2", "--hidden", "64", "--device", "cpu", "--workers", "0"]
    flags += ["--data", str(pictures), "--size", "32" if scale == "gpu" else "96", "--out", str(tmp_path / "run")]
    train.main(flags)
    evaluate.main([str(tmp_path / "run")])
    assert 0 <= metrics_of(tmp_path / "run")["finetune_accuracy"] <= 100
    if scale == "paper":
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(tmp_path / "run"), "--held-out"])
        assert end.value.code == 2 and "--held-out is for data that live on the device" in capsys.readouterr().err


def test_two_ranks_fine_tune_as_one(pictures, tmp_path):
    """The demo's own network; with batches of two ranks' halves the classifier's gradients are the whole batch's."""
    out = tmp_path / "run"
    train.main(tiny(out, pictures))
    script = tmp_path / "alone.py"
    script.write_text(WEIGHTS.format(shape=tuple(SHAPE), little=LITTLE))
    done = forked.run(tmp_path, script, str(out), ranks=2)
    assert done.returncode == 0, done.stderr
    two, found = checkpoints.load(out / "0.pt"), metrics_of(out)
    assert all(torch.equal(one, two[name]) for name, one in checkpoints.load(out / "1.pt").items())
    assert forked.run(tmp_path, script, str(out)).returncode == 0
    for name, one in checkpoints.load(out / "0.pt").items():
        torch.testing.assert_close(two[name], one, rtol=1e-3, atol=1e-5)
    alone = metrics_of(out)
    assert all(found[name] == pytest.approx(alone[name], abs=1e-3) for name in evaluate.ACCURACIES)


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_official_files_are_read_by_name(fine_tuned, pictures, tmp_path, monkeypatch, capsys):
    """Files as the authors write them, their flags pickled within; a name too few is told."""
    monkeypatch.setitem(net.NETWORKS, "vit_small_16", Shape(16, 24, 2, 2))
    monkeypatch.setitem(train.SCALES, "size", (32, 32, 96))
    with seeding.forked(0, "official"):
        if fine_tuned:
            model = Classifier(96, 16, 24, 2, 2, 0.1, "relative", 2)
            nn.init.normal_(model.head.weight)
        else:
            model = ViT(96, 16, 24, 2, 2, 0.1, "relative")
    state = model.state_dict() | {"blocks.0.attn.relative_position_index": torch.zeros(37, 37)}
    if not fine_tuned:
        state = {name: one for name, one in state.items() if "attn.relative" not in name}
        state |= {"rel_pos_bias.relative_position_index": torch.zeros(37, 37), "lm_head.weight": torch.zeros(8, 24)}
        state |= {"lm_head.bias": torch.zeros(8), "projectors.0.weight": torch.zeros(8, 24)}
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out"
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=1.0)}, path)
    flags = ["--weights", str(path), "--network", "vit_small_16", "--data", str(pictures), "--device", "cpu"]
    monkeypatch.setitem(train.SCALES, "workers", (0, 0, 0))
    evaluate.main([str(out), *flags])
    found = metrics_of(out)
    data = images.load_or_stream("folder", pictures, 96, CPU, 0)
    if fine_tuned:
        hits = [(model.eval()(x).argmax(1) == y).float() for x, y in data.batches("test")]
        assert found["finetune_accuracy"] == pytest.approx(100 * torch.cat(hits).mean().item())
        assert "linear_accuracy" not in found
    else:
        features = evaluate.Features(model)
        known, asked = (probes.extract_features([features], data, part) for part in ("train", "test"))
        assert found["knn_accuracy"] == probes.knn_accuracy(
            probes.Labelled(*known), probes.Labelled(*asked), 2, 20, 0.07
        )
        assert {"finetune_accuracy", "linear_accuracy"} <= set(found)
    del state["cls_token"]
    torch.save({"model": state}, path)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(out), *flags])
    assert end.value.code == 2 and "cls_token" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"junk", "cannot be read")])
def test_official_files_that_cannot_be_read_are_named(content, words, tmp_path, capsys):
    if content:
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        evaluate.official_weights(tmp_path / "x.pth")
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("scale", [0, 2])
def test_evaluation_stays_on_a_fake_gpu(scale, fake_gpu: FakeGPU, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "identity_of", lambda *_: "")
    monkeypatch.setattr(checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(evaluate, "labelled", lambda labels, *_: torch.arange(len(labels)))
    data = some_images(40, device="cuda")
    with torch.device("cuda"):
        model = train.build_model(parsed(), torch.device("cuda"))
    networks = {"": evaluate.Features(model.ema.vit, model.ema.projector)}
    asked = []
    for epochs in (1, 2):
        fake_gpu.asked = 0
        own = recipe(scale, epochs=epochs, rand_augment=0, mixup=0.0, cutmix=0.0)  # these read numbers on the CPU
        evaluate.evaluate(parsed("--data-set", "cifar10"), own, networks, data, tmp_path, False)
        asked.append(fake_gpu.asked)
    assert asked[0] == asked[1] > 0
