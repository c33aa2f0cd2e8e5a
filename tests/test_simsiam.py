"""SimSiam: loss and gradients, network, metrics, arms and flags, and train -> eval -> plot on a tiny image folder."""

import argparse
import itertools
import json
import math
import re
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import READ_BY_COMMON, ROOT, FakeRun, assert_usage_error, tiny
from plan import design
from torch import nn

from common import checkpoints, files, image_folder, images, probes
from simsiam import eval as evaluate
from simsiam import net, plot, train
from simsiam.train import PAIRS, SimSiam, build_predictor, build_projector, simsiam_loss

ARMS, STUDIES = design("simsiam")
ARMS = {arm: flags for arm, flags in ARMS.items() if "@mnist5k" not in arm}  # these are the same arms on other data


def small_model(**changes) -> SimSiam:
    """Return a demo-sized SimSiam with some arguments changed."""
    settings = {"network": "resnet8", "size": 32, "projector": "mlp", "projector_layers": 2, "dim": 64}
    return SimSiam(**settings | {"predictor": "mlp", "seed": 0} | changes)


def random_views(count: int, rows: int = 8) -> list[torch.Tensor]:
    """Return `count` fixed random views (rows, 3, 32, 32)."""
    return list(torch.rand(count, rows, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def gradients(model: SimSiam, views: list[torch.Tensor], loss: str, leak: float) -> list[torch.Tensor]:
    """Return the gradient of the loss for every trainable parameter."""
    p, z = model(views, PAIRS[loss], leak)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad(simsiam_loss(p, z, PAIRS[loss], leak), weights))


# ---------------------------------------------------------------------------------------------- loss


def naive_distance(p, z):
    """Equation 1 in plain Python, row by row."""
    total = 0.0
    for a, b in zip(p.tolist(), z.tolist(), strict=True):
        norms = sum(x * x for x in a) ** 0.5 * sum(x * x for x in b) ** 0.5
        total -= sum(x * y for x, y in zip(a, b, strict=True)) / norms
    return total / len(p)


@pytest.mark.parametrize("loss", PAIRS)
def test_loss_equals_a_naive_implementation_for_every_leak(loss):
    p, z = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    expected = {
        "symmetric": (naive_distance(p[0], z[1]) + naive_distance(p[1], z[0])) / 2,
        "asymmetric": naive_distance(p[0], z[1]),
        "asymmetric-2x": (naive_distance(p[0], z[1]) + naive_distance(p[2], z[3])) / 2,
    }[loss]
    for leak in (0.0, 0.3, 1.0):
        assert simsiam_loss(dict(enumerate(p)), list(z), PAIRS[loss], leak).item() == pytest.approx(expected, abs=1e-6)


def test_leak_scales_the_gradient_of_the_target():
    p, z = torch.randn(2, 6, 5), torch.randn(2, 6, 5, requires_grad=True)
    z_gradients = []
    for leak in (0.0, 0.25, 1.0):
        simsiam_loss({0: p[0], 1: p[1]}, list(z), PAIRS["symmetric"], leak).backward()
        z_gradients.append(z.grad.clone())
        z.grad = None
    assert z_gradients[0].abs().max() == 0 and z_gradients[2].abs().max() > 0
    torch.testing.assert_close(z_gradients[1], 0.25 * z_gradients[2])


def test_stop_gradient_changes_the_gradient_of_the_encoder():
    with_stop_gradient = gradients(small_model(), random_views(2), "symmetric", 0.0)
    without = gradients(small_model(), random_views(2), "symmetric", 1.0)
    assert not torch.allclose(with_stop_gradient[0], without[0])


def test_without_predictor_the_stop_gradient_halves_the_gradient():
    """Section 4.2: with h = identity, the stop-gradient halves the gradient of the symmetric loss."""
    model, views = small_model(predictor="none").double(), [x.double() for x in random_views(2)]
    with_stop_gradient = gradients(model, views, "symmetric", 0.0)
    without = gradients(model, views, "symmetric", 1.0)
    for half, full in zip(with_stop_gradient, without, strict=True):
        torch.testing.assert_close(2 * half, full, rtol=1e-9, atol=1e-12)


def test_target_of_asymmetric_loss_gets_no_gradient_but_updates_running_statistics():
    model, views = small_model(), random_views(2)
    views[1].requires_grad_()
    grad_enabled = []
    model.backbone[0].register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    p, z = model(views, PAIRS["asymmetric"], 0.0)
    simsiam_loss(p, z, PAIRS["asymmetric"], 0.0).backward()
    assert views[1].grad is None and grad_enabled == [True, False] and list(p) == [0]
    assert model.backbone[1].num_batches_tracked == 2
    assert model.predictor[1].num_batches_tracked == 1


def test_each_view_has_its_own_batch_statistics():
    model, (a, b) = small_model(), random_views(2)
    z = model([a, b], PAIRS["symmetric"], 0.0)[1]
    torch.testing.assert_close(z[0], small_model()([a, a], PAIRS["symmetric"], 0.0)[1][0])
    z_of_both_views = small_model().projector(small_model().backbone(torch.cat([a, b])))
    assert not torch.allclose(z[0], z_of_both_views[: len(a)], atol=1e-3)


# ---------------------------------------------------------------------------------------------- model


def parameter_count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_parameter_counts():
    assert parameter_count(net.build_backbone("resnet50", 224)) == 23_508_032
    projector = build_projector("mlp", 3, 2048, 2048, 2048)
    assert parameter_count(projector) == 12_593_152 and projector[6].bias.requires_grad is False
    assert parameter_count(build_predictor("mlp", 2048)) == 2_100_224
    assert parameter_count(net.build_backbone("resnet18", 32)) == 11_168_832
    assert parameter_count(build_projector("mlp", 2, 512, 2048, 2048)) == 5_246_976


def test_variants_of_projector_and_predictor():
    assert isinstance(build_projector("none", 2, 64, 256, 64), nn.Identity)
    batch_norm = build_projector("bn", 2, 64, 256, 64)
    assert isinstance(batch_norm, nn.BatchNorm1d) and not batch_norm.affine
    assert build_projector("mlp", 2, 64, 256, 64)[-1].affine is False
    assert not any(weight.requires_grad for weight in build_predictor("frozen", 64).parameters())
    frozen, mlp = small_model(predictor="frozen").predictor, small_model().predictor
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), mlp.parameters(), strict=True))


@pytest.mark.parametrize(("head_bn", "batch_norms"), [("default", 3), ("hidden", 2), ("none", 0)])
def test_batch_norms_of_the_heads(head_bn, batch_norms):
    """Table 3: both hidden layers and the projector's output, or only the hidden layers, or none."""
    model = small_model(head_bn=head_bn)
    heads = [*model.projector.modules(), *model.predictor.modules()]
    assert sum(isinstance(module, nn.BatchNorm1d) for module in heads) == batch_norms
    linear = [module for module in heads if isinstance(module, nn.Linear)]
    without_hidden, without_output = head_bn == "none", head_bn != "default"  # a bias replaces the batch norm
    biases = [layer.bias is not None for layer in linear]
    assert biases == [without_hidden, without_output, without_hidden, True]
    assert torch.equal(linear[0].weight, next(small_model().projector.parameters()))


def test_residual_blocks_are_zero_initialised_and_small_images_get_the_cifar_stem():
    backbone = net.build_backbone("resnet18", 32)
    assert backbone.conv1.stride == (1, 1) and isinstance(backbone.maxpool, nn.Identity)
    assert net.build_backbone("resnet18", 224).conv1.stride == (2, 2)
    assert backbone.layer1[0].bn2.weight.abs().max() == 0


def test_arms_share_the_initial_weights_of_common_parts():
    base = small_model().state_dict()
    for changes in ({"predictor": "none"}, {"projector": "none"}, {"dim": 128}, {"projector": "bn"}):
        other = small_model(**changes).state_dict()
        assert all(torch.equal(base[name], other[name]) for name in base if name.startswith("backbone."))
    assert torch.equal(base["projector.0.weight"], small_model(dim=128).state_dict()["projector.0.weight"])
    assert not torch.equal(base["backbone.0.weight"], small_model(seed=1).state_dict()["backbone.0.weight"])


def test_cosine_learning_rate():
    rates = [0.1 * train.schedules.cosine(epoch / 100) for epoch in (0, 50, 99)]
    assert rates == pytest.approx([0.1, 0.05, 2.467e-5], rel=1e-3)


# ---------------------------------------------------------------------------------------------- collapse metrics


def test_collapse_metrics_of_known_distributions():
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert probes.std_ratio(rows) == pytest.approx(1.0, abs=0.01)
    assert probes.effective_rank(rows) == pytest.approx(64, rel=0.01)
    constant = torch.ones(50, 8) + 1e-6 * rows[:50, :8]
    assert probes.std_ratio(constant) < 1e-4 and probes.mean_cosine(constant) == pytest.approx(1.0, abs=1e-6)
    antipodal = torch.cat([torch.ones(25, 8), -torch.ones(25, 8)])  # collapse to two points, not visible in the std
    assert probes.std_ratio(antipodal) == pytest.approx(1.0, abs=0.02)
    assert probes.effective_rank(antipodal) == pytest.approx(1.0, abs=1e-3)
    assert math.isnan(probes.effective_rank(torch.full((4, 3), math.inf)))
    sample, unit = rows[:20], F.normalize(rows[:20], dim=1)
    singular = torch.linalg.svdvals(unit.double() - unit.double().mean(0))
    share = singular[singular > 1e-9] / singular.sum()
    assert probes.effective_rank(sample) == pytest.approx((-(share * share.log()).sum()).exp().item())
    cosines = [float(unit[i] @ unit[j]) for i in range(20) for j in range(20) if i != j]
    assert probes.mean_cosine(sample) == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_std_ratio_of_a_collapsed_batch_after_affine_free_batch_norm():
    """With one outlier in a batch of B it is 2 sqrt((1/B)(1 - 1/B)), the reference line of the figure."""
    rows = torch.zeros(64, 256)
    rows[0] = 1.0
    z = nn.BatchNorm1d(256, affine=False)(rows * 1e3)
    assert probes.std_ratio(z) == pytest.approx(2 * (1 / 64 * (1 - 1 / 64)) ** 0.5, rel=0.01)


def test_collapse_rule_requires_the_affine_free_batch_norm_and_every_seed():
    """At batch 64 the threshold is the geometric mean of 1 and 0.248, which is 0.498."""
    arguments = argparse.Namespace(batch=64, projector="mlp", head_bn="default")
    at_collapse = evaluate.std_ratio_at_collapse(arguments)
    assert at_collapse == pytest.approx(0.248, abs=0.001)
    for other in ({"projector": "none"}, {"head_bn": "hidden"}):
        assert evaluate.std_ratio_at_collapse(argparse.Namespace(**vars(arguments) | other)) is None

    def run(ratio, at_collapse=at_collapse):
        return {"std_ratio_train_mode": ratio, "std_ratio_at_collapse": at_collapse, "effective_rank": 3.0}

    assert plot.collapsed([run(0.49), run(0.3)]) == "collapsed in every seed (effective rank 3.0)"
    assert not plot.collapsed([run(0.49), run(0.51)]) and not plot.collapsed([run(0.3, None)])


def test_the_sign_of_linear_accuracy_is_compared_in_the_primary_contrasts():
    contrasts = [{"arm": arm, "metric": "knn_accuracy", "mean": -1.0, "primary": arm != "c"} for arm in "abc"]
    linear = [
        {"arm": arm, "metric": "linear_accuracy", "mean": mean} for arm, mean in zip("abc", (-2, 3, -1), strict=True)
    ]
    assert "in 1 of 2 primary" in plot.same_sign({"contrasts": contrasts, "all_contrasts": [*contrasts, *linear]})


# ---------------------------------------------------------------------------------------------- arms and flags


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_arms_resolve_to_different_arguments(scale):
    arms = design("simsiam", scale)[0]
    resolved = {json.dumps(vars(train.parse_args(["--scale", scale, *flags])), default=str) for flags in arms.values()}
    assert len(resolved) == len(arms)
    assert ("narrow" in arms) == (scale != "paper")  # at paper scale it would equal base


def test_every_flag_is_used():
    """The arguments read after parse_args are exactly the flags."""
    source = (ROOT / "simsiam/train.py").read_text()
    used = set(re.findall(r"\bargs\.(\w+)", source[source.index("def build_projector") :]))
    assert used == set(vars(train.parse_args([]))) - READ_BY_COMMON


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-stop-gradient", "--gradient-leak", "0.5"], "--gradient-leak 0.5"),
        (["--gradient-leak", "2"], "not between 0 and 1"),
        (["--projector", "none", "--dim", "128"], "drop --dim"),
        (["--projector", "none", "--head-bn", "hidden"], "--projector none contradicts --head-bn hidden"),
        (["--predictor", "none", "--predictor-schedule", "cosine"], "no effect with --predictor none"),
        (["--dim", "many"], "multiple of 4"),
        (["--size", "64"], "requires --data-set folder"),
        (["--predictor", "big"], "invalid choice"),
        (["--pred", "none"], "unrecognized"),
        (["--epochs", "0"], "less than 1"),
        (["--scale", "gpu"], "train at scale demo"),
        (["--device", "cuda"], "no such CUDA GPU"),
        (["--device", "gpu"], "invalid --device 'gpu'"),
        (["--data-set", "cifar10", "--data", "nowhere"], "common.images cifar10"),
        (["--data-set", "folder", "--data", "nowhere"], "has no class folders"),
        (["--batch", "6000"], "larger than the training set (5000 examples)"),
    ],
)
def test_usage_errors_are_one_line(flags, message, tmp_path, capsys):
    assert_usage_error(train.main, flags, message, tmp_path, capsys)


# ---------------------------------------------------------------------------------------------- views and devices


def test_arms_and_ranks_get_the_same_batches_and_views():
    data = images.Images(
        torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.zeros(40), *[torch.zeros(1)] * 2, 2,
        torch.zeros(3, 1, 1), torch.ones(3, 1, 1), "",
    )  # fmt: skip

    def load_batches(n_views, rows, seed=0, epoch=1):
        loss = {2: "symmetric", 4: "asymmetric-2x"}[n_views]
        args = train.parse_args(["--batch", "8", "--seed", str(seed), "--loss", loss])
        return list(train.batches(args, data, epoch, rows))

    two_views, four_views = load_batches(2, slice(0, 8)), load_batches(4, slice(0, 8))
    assert len(two_views) == 5
    for a, b in zip(two_views, four_views, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b[:2], strict=True))
        assert not torch.equal(a[0], a[1])
    rank0, rank1 = load_batches(2, slice(0, 4)), load_batches(2, slice(4, 8))
    assert torch.equal(torch.cat([rank0[3][1], rank1[3][1]]), two_views[3][1])
    assert not torch.equal(load_batches(2, slice(0, 8), seed=1)[0][0], two_views[0][0])
    assert not torch.equal(load_batches(2, slice(0, 8), epoch=2)[0][0], two_views[0][0])


def test_metrics_are_computed_in_float32_after_bfloat16_training(pictures, tmp_path):
    """The last logged metrics and the evaluation agree with the same weights in float64."""
    train.main(tiny(tmp_path / "run", pictures, "--precision", "bfloat16"))
    evaluate.main([str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    saved = checkpoints.load(tmp_path / "run/model.pt")
    model = train.build_model(argparse.Namespace(**saved["arguments"]), torch.device("cpu")).double().eval()
    model.load_state_dict(saved["model"])
    x = torch.cat([x for x, _ in images.load("folder", pictures, 32, torch.device("cpu")).batches("test")])
    with torch.no_grad():
        expected = probes.std_ratio(model.projector(model.backbone(x.double())))
    logged = files.read_lines(tmp_path / "run/train.jsonl")[-1]
    assert metrics["std_ratio"] == logged["std_ratio"] == pytest.approx(expected, rel=1e-4)


def test_fake_gpu_detects_mixed_devices_and_synchronisation(fake_gpu):
    rows = torch.zeros(4, 3, device="cuda")
    for operation in (lambda: rows + torch.zeros(4, 3), lambda: rows[rows[:, 0] > 0], lambda: rows.nonzero()):
        with pytest.raises(RuntimeError):
            operation()
    rows.sum().item()
    assert fake_gpu.syncs == 1


class FakeStreamedImages:
    """Replaces StreamedImages: yields zeros on the fake GPU."""

    examples, classes, size, device, digest = 16, 2, 32, torch.device("cuda"), ""
    train = type("Folder", (), {"targets": [0] * 16})
    normalise = staticmethod(lambda images: images / 255)

    def views(self, transform, n_views, order, seed, epoch):
        for rows in order:
            yield [torch.zeros(len(rows), 3, 32, 32, dtype=torch.uint8, device="cuda") for _ in range(n_views)]

    def batches(self, split, start=0, step=1):
        yield torch.zeros(8, 3, 32, 32, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")


def fake_images(count: int) -> images.Images:
    pixels = torch.zeros(count, 3, 32, 32, dtype=torch.uint8, device="cuda")
    labels, channels = torch.zeros(count, dtype=torch.int64, device="cuda"), torch.ones(3, 1, 1, device="cuda")
    return images.Images(pixels, labels, pixels, labels, 2, channels, channels, "")


def train_on_a_fake_gpu(data: images.Images, arm: list[str], monitor_every: int = 1) -> None:
    """Train an arm for two epochs, with the augmentation of image folders (the only one with blur)."""
    flags = ["--batch", "32", "--epochs", "2", "--monitor-every", str(monitor_every), "--neighbours", "5"]
    args = train.parse_args([*arm, *flags, "--data-set", "folder"])
    model = train.build_model(args, data.device)
    train.train(args, FakeRun(), model, data, train.build_optimizer(args, model))


@pytest.mark.parametrize("arm", ARMS)
def test_training_runs_on_a_fake_gpu(arm, fake_gpu):
    train_on_a_fake_gpu(fake_images(64), ARMS[arm])
    assert fake_gpu.syncs > 0


def test_steps_make_no_host_device_synchronisation(fake_gpu):
    """The number of synchronisations does not depend on the number of steps."""
    syncs = []
    for count in (64, 128):
        fake_gpu.syncs = 0
        train_on_a_fake_gpu(fake_images(count), [])
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0


@pytest.mark.parametrize("held_out", [False, True])
def test_evaluation_runs_on_a_fake_gpu(held_out, fake_gpu):
    args = train.parse_args(["--neighbours", "5"])
    metrics = evaluate.evaluate(args, small_model().to("cuda"), fake_images(64), held_out, None)
    assert metrics["linear_accuracy"] == metrics["untrained_linear_accuracy"] == 100.0 * 0.5


def test_lars_scales_gradients_by_weight_norm():
    """g becomes g * trust * |w| / |g|; a zero tensor (the initial bias) keeps its gradient."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.zeros(1))
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([7.0])
    evaluate.scale_gradients_lars([weight, bias], trust=0.001)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.001 * 5.0]]))
    assert bias.grad.item() == 7.0


def test_lars_linear_probe_runs_on_a_fake_gpu(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "digest", lambda module: "")
    monkeypatch.setattr(checkpoints, "save", lambda *_: None)
    model, probe = small_model().to("cuda"), {"epochs": 2, "batch": 4096, "lr": 0.1}
    assert evaluate.linear_probe_lars(model, FakeStreamedImages(), tmp_path, 0, probe) == 50.0


def test_lars_linear_probe_encodes_its_batch_in_parts(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "digest", lambda module: "")
    monkeypatch.setattr(checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(image_folder, "BLOCK", 6)
    model, encoded = small_model().to("cuda"), []
    model.backbone.register_forward_hook(lambda module, inputs, _: encoded.append(len(inputs[0])))
    evaluate.linear_probe_lars(model, FakeStreamedImages(), tmp_path, 0, {"epochs": 1, "batch": 4096, "lr": 0.1})
    assert encoded == [6, 6, 4, 8]  # the last are the test images


def test_features_are_freed_before_the_lars_linear_probe(monkeypatch, tmp_path):
    alive = []

    def features(*_):
        splits = [train.Features(*torch.ones(3, 4, 4)) for _ in range(2)]
        alive.extend(weakref.ref(split.backbone) for split in splits)
        return splits

    monkeypatch.setattr(evaluate, "features_of_splits", features)
    monkeypatch.setattr(evaluate, "representation_metrics", lambda *_: {})
    monkeypatch.setattr(evaluate, "linear_probe_lars", lambda *_: float(sum(ref() is not None for ref in alive)))
    data = object.__new__(image_folder.StreamedImages)
    data.classes = 2
    metrics = evaluate.evaluate(train.parse_args([]), small_model(), data, False, tmp_path)
    assert len(alive) == 2 and metrics == {"linear_accuracy": 0.0}


@pytest.mark.parametrize(("size", "batch"), [(32, 500), (72, 256)])
def test_out_of_memory_names_the_batch_of_the_evaluation(size, batch, pictures, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_):
        raise MemoryError

    train.main(tiny(tmp_path, pictures, "--size", str(size), "--epochs", "1", "--rehearse", "1"))
    monkeypatch.setattr(evaluate, "evaluate", out_of_memory)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert f"with batches of {batch} images" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """Folder with one trained and evaluated run of two epochs per arm."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in ARMS.items():
        train.main(tiny(root / name / "0", pictures, *flags))
        evaluate.main([str(root / name / "0")])
    return root


def test_arms_train_to_different_weights(finished):
    weights = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["backbone.0.weight"] for arm in ARMS}
    for arm, other in itertools.combinations(ARMS, 2):
        assert not torch.equal(weights[arm], weights[other]), (arm, other)


def test_metrics_json_has_all_keys(finished):
    for arm in ARMS:
        metrics = json.loads((finished / arm / "0/metrics.json").read_text())
        keys = "linear_accuracy knn_accuracy knn_accuracy_z train_loss std_ratio std_ratio_train_mode mean_cosine "
        keys += "effective_rank untrained_knn_accuracy untrained_std_ratio seconds examples_per_second peak_memory"
        assert all(isinstance(metrics[key], float | int) for key in keys.split()), arm
        assert metrics["diverged"] is False and len(metrics["data"]) == 64
    epochs = [json.loads(line)["epoch"] for line in (finished / "base/0/train.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2]


def test_plot_writes_figures_and_tables(finished, tmp_path, capsys):
    for study in ("simsiam-projector", "simsiam-symmetric-loss"):
        plot.main([study, "--runs", str(finished), "--seeds", "0", "1", "--results", str(tmp_path)])
        for name in ("-curves.svg", "-curves.png", "-metrics.svg", ".csv", ".json"):
            assert (tmp_path / f"{study}{name}").stat().st_size > 500
        summary = files.read_json(tmp_path / f"{study}.json")
        contrasts = [f"{contrast['arm']}:{contrast['reference']}" for contrast in summary["contrasts"]]
        assert contrasts == STUDIES[study]
        assert "base: 1 of 2 missing (seed 1)." in summary["notes"] and not summary["not_run"]
    assert "no-projector minus base" in capsys.readouterr().out


def test_arm_with_only_diverged_seeds_is_plotted_and_reported(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs")
    path = tmp_path / "runs/no-projector/0/metrics.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text())) | {"diverged": True}))
    flags = ["--runs", str(tmp_path / "runs"), "--seeds", "0", "--results", str(tmp_path / "r")]
    plot.main(["simsiam-projector", *flags])
    summary = files.read_json(tmp_path / "r/simsiam-projector.json")
    assert summary["verdict"] == "no-projector: 1 of 1 diverged"
    assert "no-projector: 1 of 1 diverged, not averaged (seed 0)." in summary["notes"]
    assert (tmp_path / "r/simsiam-projector-curves.png").exists()


def test_arms_without_runs_are_listed_and_left_out(finished, tmp_path, capsys):
    """The runs are those of `make primary`. The primary contrast is kept although its arm has no run."""
    for arm in ("base", "projector-bn"):
        shutil.copytree(finished / arm, tmp_path / "runs" / arm)
    plot.main(["simsiam-projector", "--runs", str(tmp_path / "runs"), "--seeds", "0", "--results", str(tmp_path)])
    summary = files.read_json(tmp_path / "simsiam-projector.json")
    assert summary["not_run"] == ["narrow"] and summary["notes"][0] == "Not run: narrow."
    assert [contrast["arm"] for contrast in summary["contrasts"]] == ["no-projector", "projector-bn"]
    assert summary["contrasts"][0]["verdict"] == "not run"
    assert "no-projector: 1 of 1 missing (seed 0)." in summary["notes"]
    with pytest.raises(SystemExit) as end:
        plot.main(["simsiam-width", "--runs", str(finished), "--results", str(tmp_path / "r")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "no study 'simsiam-width'" in printed and printed.count("\n") == 1


def test_existing_run_is_kept_refused_or_replaced(finished, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(tiny(out, pictures, "--epochs", "1"))
    before = (out / "model.pt").read_bytes()
    train.main(tiny(out, pictures, "--epochs", "1"))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train.main(tiny(out, pictures, "--epochs", "1", "--loss", "asymmetric"))
    assert end.value.code == 2 and "--loss symmetric -> asymmetric" in capsys.readouterr().err
    train.main(tiny(out, pictures, "--epochs", "1", "--loss", "asymmetric", "--replace"))
    assert (tmp_path / "run.replaced-1/model.pt").read_bytes() == before
    assert (out / "model.pt").read_bytes() != before


def test_predictor_has_its_own_learning_rate_schedule(finished, pictures, tmp_path):
    train.main(tiny(tmp_path / "run", pictures, "--predictor-schedule", "cosine"))
    cosine, constant = (checkpoints.load(run / "model.pt")["model"] for run in (tmp_path / "run", finished / "base/0"))
    assert not torch.equal(cosine["predictor.0.weight"], constant["predictor.0.weight"])
    groups = train.build_optimizer(train.parse_args([]), small_model()).param_groups
    assert [group["schedule"] for group in groups] == ["cosine", "constant"]
    assert [weight.shape for weight in groups[1]["params"]] == [w.shape for w in small_model().predictor.parameters()]


# ---------------------------------------------------------------------------------------------- larger scales


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_every_arm_trains_at_larger_scales(scale, pictures, no_checkpoints, tmp_path, monkeypatch):
    """Two steps per arm at full network width, batch size 4, on random CIFAR pixels or on images of 72 pixels.

    At paper scale three arms: the others change the same loss and the same head as at gpu scale.
    """

    def cifar(name, data, part):
        pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(int(part)))
        return pixels.byte(), torch.arange(20) % 10

    monkeypatch.setattr(images, "cifar", cifar)
    evaluated = ("base", "no-projector", "narrow")
    arms = {arm: flags for arm, flags in design("simsiam", scale)[0].items() if scale == "gpu" or arm in evaluated}
    flags = ["--scale", scale, "--batch", "4", "--rehearse", "1", "--device", "cpu", "--workers", "0"]
    data, size = (tmp_path, "32") if scale == "gpu" else (pictures, "72")
    flags += ["--data", str(data), "--size", size]
    for arm, arm_flags in arms.items():
        train.main([*flags, *arm_flags, "--out", str(tmp_path / arm / "0")])
        if arm in evaluated:
            evaluate.main([str(tmp_path / arm / "0")])
            assert files.read_json(tmp_path / arm / "0/metrics.json")["linear_accuracy"] is not None
        saved = checkpoints.load(tmp_path / arm / "0/model.pt")
        width = saved["model"]["backbone.layer4.1.conv2.weight"].shape[0]
        assert width == 512 and saved["arguments"]["network"] == ("resnet18" if scale == "gpu" else "resnet50")
        n_views = 4 if arm == "asymmetric-2x" else 2
        assert saved["model"]["backbone.bn1.num_batches_tracked"] == 2 * n_views and saved["epoch"] == 2
        (tmp_path / arm / "0/model.pt").unlink()


@pytest.mark.slow
def test_lars_probe_learns_and_authors_checkpoint_is_read(pictures, no_checkpoints, tmp_path, monkeypatch, capsys):
    """Two epochs of the LARS probe on red versus blue images; then a checkpoint with the authors' parameter names."""
    out = tmp_path / "run"
    flags = ["--scale", "paper", "--data", str(pictures), "--size", "96", "--batch", "24", "--epochs", "1"]
    train.main([*flags, "--workers", "0", "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr(evaluate, "PROBE", {"epochs": 2, "batch": 24, "lr": 0.1})
    before = checkpoints.load(out / "model.pt")["model"]
    evaluate.main([str(out), "--device", "cpu"])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["linear_accuracy"] >= 50
    assert not (out / "eval_state.pt").exists()
    authors = {"epoch": 100, "arch": "resnet50", "state_dict": {}}
    for name, tensor in before.items():
        part, parameter = name.split(".", 1)
        prefix = {"backbone": "encoder.", "projector": "encoder.fc.", "predictor": "predictor."}[part]
        authors["state_dict"][f"module.{prefix}{parameter}"] = tensor
    torch.save(authors, tmp_path / "authors.pth.tar")
    states = evaluate.read_authors_checkpoint(tmp_path / "authors.pth.tar")
    names = {f"{part}.{name}" for part, state in states.items() for name in state}
    assert names == {name for name in before if not name.startswith("predictor.")}
    del authors["state_dict"]["module.encoder.layer1.0.conv1.weight"]
    torch.save(authors, tmp_path / "authors.pth.tar")
    state = evaluate.read_authors_checkpoint(tmp_path / "authors.pth.tar")["backbone"]
    with pytest.raises(SystemExit):
        checkpoints.load_weights(net.build_backbone("resnet50", 224), state, tmp_path)
    assert "layer1.0.conv1.weight" in capsys.readouterr().err
