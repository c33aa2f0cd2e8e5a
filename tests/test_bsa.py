"""BSA: closed-form losses, rounding, codes, metrics, data errors, arms, and training and evaluation end to end."""

import argparse
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import READ_BY_COMMON, ROOT, FakeGPU, FakeRun, assert_usage_error
from plan import design

from bsa import eval as evaluate
from bsa import train
from bsa.planted import planted_concepts
from bsa.train import BSA, alignment_loss, encode, reconstruction_loss, round_ste, topk_code
from common import checkpoints, files

ARMS, STUDIES = design("bsa")
DOUBLE = torch.float64


def logits(rows: int = 7, latent: int = 40, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, latent, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- loss


def dense_alignment(h: torch.Tensor, active: int, distance: str, target: str, reduction: str) -> torch.Tensor:
    """Alignment loss computed with the explicit target t (B, N)."""
    s = h.sigmoid()
    code = s + (s.round() - s).detach() if target == "rounded" else s
    zk = topk_code(h, active)
    t = (s * zk if target == "value" else zk).detach()
    if distance == "cosine":
        return 1 - F.cosine_similarity(code, t, dim=1)
    error = (code - t).square()
    return error.mean(1) if reduction == "mean" else error.sum(1)


@pytest.mark.parametrize("target", ["binary", "value", "rounded"])
@pytest.mark.parametrize(("distance", "reduction"), [("cosine", "mean"), ("mse", "mean"), ("mse", "sum")])
@pytest.mark.parametrize("active", [1, 5, 39])
def test_closed_form_alignment_equals_the_dense_form_in_value_and_gradient(target, distance, reduction, active):
    h, h_dense = logits().requires_grad_(), logits().requires_grad_()
    closed = alignment_loss(h.sigmoid(), h, active, distance, target, reduction)
    dense = dense_alignment(h_dense, active, distance, target, reduction)
    torch.testing.assert_close(closed, dense, rtol=1e-10, atol=1e-12)
    closed.sum().backward()
    dense.sum().backward()
    torch.testing.assert_close(h.grad, h_dense.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_detaching_the_value_target_does_not_change_the_gradient(distance):
    """The masked s is a projection of s, so the gradient through it is zero."""
    gradients = []
    for detach in (True, False):
        h = logits().requires_grad_()
        s = h.sigmoid()
        t = s * topk_code(h.detach(), 5)
        t = t.detach() if detach else t
        loss = 1 - F.cosine_similarity(s, t, dim=1) if distance == "cosine" else (s - t).square().mean(1)
        loss.sum().backward()
        gradients.append(h.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


def test_cosine_alignment_does_not_depend_on_the_scale_of_s_but_mse_does():
    h = logits()
    whole, half = (alignment_loss(scale * h.sigmoid(), h, 5, "cosine") for scale in (1.0, 0.5))
    torch.testing.assert_close(whole, half, rtol=1e-12, atol=0)
    assert not torch.allclose(*(alignment_loss(scale * h.sigmoid(), h, 5, "mse") for scale in (1.0, 0.5)))
    torch.testing.assert_close(alignment_loss(h.sigmoid(), h, 5, "l1"), h.sigmoid().sum(1))


def test_reconstruction_loss_by_hand_and_bounded_gradient_at_zero():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    x_hat = torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    torch.testing.assert_close(reconstruction_loss(x_hat, x, "cosine"), torch.tensor([1 - 24 / 25, 2.0]))
    torch.testing.assert_close(reconstruction_loss(x_hat, x, "mse"), torch.tensor([1.0, 4.5]))
    torch.testing.assert_close(reconstruction_loss(x_hat, x, "mse", "sum"), torch.tensor([2.0, 9.0]))
    empty = torch.zeros(1, 3, requires_grad=True)
    loss = reconstruction_loss(empty, torch.tensor([[1.0, 2.0, 3.0]]), "cosine")
    loss.backward()
    assert loss.item() == 1.0 and empty.grad.norm() < 1e4  # F.cosine_similarity: 2e7
    for target in ("binary", "value", "rounded"):
        h = torch.full((2, 8), -300.0, requires_grad=True)
        s, _ = encode(h, 3, "round")
        alignment_loss(s, h, 3, "cosine", target).sum().backward()
        assert h.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- codes


def test_rounding_equals_torch_round_with_a_straight_through_gradient():
    s = torch.tensor([0.0, 0.3, 0.5, 0.500001, 1.0], requires_grad=True)
    z = round_ste(s)
    assert torch.equal(z, s.round()) and z[2] == 0
    (z * torch.arange(5.0)).sum().backward()
    assert torch.equal(s.grad, torch.arange(5.0))


def test_topk_code_has_exactly_k_active_features_even_with_ties():
    h = torch.cat([logits(4, 30).float(), torch.zeros(2, 30), torch.full((1, 30), 50.0)])
    for active in (1, 7, 29):
        assert topk_code(h, active).sum(1).tolist() == [active] * 7


def test_topk_baselines_have_k_features_and_the_right_gradient():
    h = logits().float().requires_grad_()
    s, z = encode(h, 5, "topk")
    assert torch.equal(z, topk_code(h, 5))
    z.sum().backward()
    torch.testing.assert_close(h.grad, s * (1 - s))  # straight-through to all features
    h.grad = None
    _, z = encode(h, 5, "topk-values")
    assert (z.count_nonzero(1) == 5).all() and torch.equal(z[z > 0], h[z > 0])
    z.sum().backward()
    assert torch.equal(h.grad, (z > 0).float())


def test_sparse_init_starts_with_about_k_active_features_and_torch_init_with_half():
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for init, expected in (("sparse", 32), ("torch", 512)):
        model = BSA(128, 1024, 32, init, 0)
        active_mean = encode(model.encoder(model.normalise(x)), 32, "round")[1].sum(1).mean().item()
        assert active_mean == pytest.approx(expected, rel=0.1)
    sparse, default = BSA(16, 64, 4, "sparse", 3), BSA(16, 64, 4, "torch", 3)
    torch.testing.assert_close(sparse.encoder.weight, 3 * default.encoder.weight)
    assert torch.equal(sparse.decoder.weight, default.decoder.weight)


def test_normalise_centres_rows_and_scales_them_to_norm_sqrt_d():
    model = BSA(6, 8, 2, "torch", 0)
    for scale in (1.0, 1e-13, 1e13):  # from the smallest to the largest values that are accepted
        model.mean.copy_(scale * torch.arange(6.0))
        rows = model.normalise(scale * (torch.randn(5, 6) + torch.arange(6.0)))
        torch.testing.assert_close(rows.norm(dim=1), torch.full((5,), math.sqrt(6)))


# ---------------------------------------------------------------------------------------------- metrics


def test_jaccard_index_bit_packing_and_storage_by_hand():
    a, b = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(evaluate.jaccard(a, b), torch.tensor([[1 / 3, 0.0], [0.0, 0.0]]))
    bits = evaluate.pack_bits(torch.eye(11))
    assert bits.shape == (11, 2) and np.array_equal(np.unpackbits(bits, axis=1, count=11), np.eye(11))
    frequency = torch.tensor([0.5, 0.0, 0.25])
    expected = 1 + 0.25 * 2 + 0.75 * math.log2(4 / 3)
    sizes = evaluate.storage(3.0, 1024, frequency, False)
    assert sizes["bits_per_row"] == 30 and sizes["entropy_bits_per_row"] == pytest.approx(expected)
    assert evaluate.storage(500.0, 1024, frequency, False)["bits_per_row"] == 1024
    assert evaluate.storage(3.0, 1024, frequency, True)["bits_per_row"] == 3 * 26


def test_knn_overlap_equals_a_naive_loop():
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    z = (torch.randn(60, 30, generator=torch.Generator().manual_seed(1)) > 0.8).float()
    shares = []
    for i in range(60):
        others = [j for j in range(60) if j != i]
        dense = sorted(others, key=lambda j: -float(F.cosine_similarity(x[i], x[j], dim=0)))[:10]

        def jaccard(j, i=i):
            union = float(z[i].maximum(z[j]).sum())
            return float((z[i] * z[j]).sum()) / union if union else 0.0

        sparse = sorted(others, key=lambda j: (-jaccard(j), j))[:10]
        shares.append(len(set(dense) & set(sparse)) / 10)
    assert evaluate.knn_overlap(x, z, 60) == pytest.approx(sum(shares) / 60, abs=1e-6)
    assert evaluate.knn_overlap(x, torch.zeros(60, 4), 60) < 0.5 < 0.99 < evaluate.knn_overlap(z + 0.0, z, 1000) + 0.6


def test_spearman_and_best_match_f1_by_hand():
    a, b = torch.tensor([1.0, 2, 2, 4]), torch.tensor([10.0, 20, 30, 40])
    assert evaluate.spearman(a, b) == pytest.approx(float(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]))
    assert evaluate.spearman(a, -b) == -evaluate.spearman(a, b) and evaluate.spearman(a, torch.ones(4)) == 0
    atoms = torch.zeros(40, 3, dtype=torch.bool)
    atoms[:20, 0], atoms[10:30, 1], atoms[:5, 2] = True, True, True  # the last atom is in fewer than ten rows
    z = torch.zeros(40, 4)
    z[:20, 1], z[10:20, 2] = 1, 1
    assert evaluate.best_match_f1(z, atoms) == pytest.approx((1 + max(2 * 10 / 30, 2 * 10 / 40)) / 2)


def test_convergence_reports_the_change_over_the_last_20_percent_and_the_step_of_convergence():
    def log(values):
        lines = [{"epoch": n, "step": 10 * n, "loss": v, "reconstruction_loss": v, "active_mean": 5.0}
                 for n, v in enumerate(values, 1)]  # fmt: skip
        return [{"epoch": 0}, *lines]

    assert evaluate.convergence(log([2.0] * 8 + [1.0, 1.0]))["loss_moved"] == pytest.approx(100)
    converged = evaluate.convergence(log([2.0] * 4 + [1.0] * 16))
    # Epoch 5 is compared with epoch 4, where the loss was 2; epoch 6 with epoch 5.
    assert converged["loss_moved"] == 0 and converged["settled_step"] == 60
    assert evaluate.convergence(log([2.0**-n for n in range(20)]))["settled_step"] is None


# ---------------------------------------------------------------------------------------------- data


def test_planted_concepts_have_the_specified_atoms_depths_and_noise():
    planted = planted_concepts()
    assert planted.rows.shape == (20_000, 128) and planted.rows.dtype == np.float32
    atoms = planted.atoms.sum(1)
    assert 5.5 < atoms.mean() < 6.2 and 1.5 < atoms.std() < 1.8 and atoms.min() == 2 and atoms.max() == 10
    assert set(planted.depth) == {1, 2, 3, 4, 5} and (planted.atoms[:, :192].sum(1) == planted.depth).all()
    rows = planted_concepts(30, seed=1).rows
    assert np.array_equal(rows, planted_concepts(30, seed=1).rows)
    assert not np.array_equal(rows, planted_concepts(30).rows)
    residual = planted.rows - planted.atoms @ np.linalg.lstsq(planted.atoms.astype(float), planted.rows, rcond=None)[0]
    assert residual.std() == pytest.approx(0.05, rel=0.02)


def matrix(rows: int = 60, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)


def save(path, values):
    if path.suffix == ".npz":
        np.savez(path, vectors=values, number=np.array(3))
    elif path.suffix == ".npy":
        np.save(path, values)
    else:
        header = {"rows": {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, values.nbytes]}}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    return path


@pytest.mark.parametrize("suffix", train.FORMATS)
def test_a_matrix_in_each_format_is_deduplicated_and_split_without_overlap(suffix, tmp_path, capsys):
    values = matrix()
    values[7] = values[3]
    data = train.load_splits("file", save(tmp_path / f"mine{suffix}", values), torch.device("cpu"), 0)
    assert "1 duplicate rows dropped" in capsys.readouterr().out
    assert [len(data.train), len(data.held_out), len(data.test)] == [49, 5, 5]
    indices = torch.cat(data.indices).tolist()
    assert len(set(indices)) == 59 and set(indices) == set(range(60)) - {7}
    assert torch.equal(data.test, torch.from_numpy(values)[data.indices[2]]) and len(data.digest) == 64
    assert all((split.diff() > 0).all() for split in data.indices)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda m: m.__setitem__((17, 3), np.nan),
            "1 of 60 rows contain NaN or infinity (first row indices, from 0: 17): remove",
        ),
        (
            lambda m: m.__setitem__((slice(4, 6), 0), np.inf),
            "2 of 60 rows contain NaN or infinity (first row indices, from 0: 4, 5): remove",
        ),
        (lambda m: m.__setitem__(9, 0), "rows contain no absolute value above 1e-15 (first row indices, from 0: 9)"),
        (lambda m: m.__setitem__(slice(None), 1), "1 distinct rows"),
    ],
)
def test_the_error_message_gives_the_indices_of_invalid_rows(damage, message, tmp_path, capsys):
    values = matrix()
    damage(values)
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(save(tmp_path / "mine.npy", values)), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and not (tmp_path / "run/args.json").exists()


def test_a_row_that_equals_the_mean_of_the_training_rows_is_refused(tmp_path, capsys):
    """Centred it is zero, which has no direction. The split depends on the number of rows only."""
    values = matrix()
    splits = train.load_splits("file", save(tmp_path / "mine.npy", values), torch.device("cpu"), 0)
    row = int(splits.indices[2][1])
    values[row] = splits.train.mean(0)
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(save(tmp_path / "mine.npy", values)), "--out", str(tmp_path / "run"), "--batch", "8"])
    message = f"1 of 60 rows equal the mean of the training rows (first row indices, from 0: {row}): remove these rows"
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "run/args.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--active", "512"], "--active 512 must be less than --latent 512: give --active 511 or less"),
        (["--active", "0"], "less than 1"),
        (["--alpha", "matched"], "--alpha matched requires --alignment mse, not cosine"),
        (["--alignment", "l1", "--target", "rounded"], "--target rounded has no effect with --alignment l1"),
        (["--alignment", "mse", "--alpha", "0"], "--alpha 0 removes the alignment loss"),
        *(
            (["--alignment", "mse", "--alpha", alpha], f"invalid --alpha '{alpha}': give a number >= 0, matched or")
            for alpha in ("matched4", "matchedx", "4matched2")
        ),
        (["--mse-reduction", "sum"], "--mse-reduction sum has no effect without mse"),
        (["--data-set", "mesh", "--data", "my.npy"], "--data-set mesh does not read --data my.npy: drop --data-set"),
        (["--alpha", "much"], "invalid --alpha 'much': give a number >= 0"),
        (["--alpha", "-1"], "invalid --alpha '-1': give a number >= 0"),
        (["--code", "topk"], "give --alpha 0"),
        (["--batch", "17000"], "--batch 17000 is larger than the training set (2000 examples): give at most 2000"),
        (["--data-set", "file"], "give a matrix file (.npy"),
        (["--scale", "paper", "--device", "cpu"], "give a matrix file (.npy"),
        (["--data", "nowhere.npy"], "--data nowhere.npy does not exist: give"),
        (["--data-set", "mesh", "--data", "nowhere"], "python -m bsa.concepts --data nowhere"),
        (["--scale", "gpu"], "train at scale demo"),
    ],
)
def test_invalid_flags_exit_with_a_one_line_message(flags, message, tmp_path, capsys):
    assert_usage_error(train.main, flags, message, tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY junk", b"not a matrix"])
def test_the_error_for_an_unreadable_matrix_contains_the_path(content, tmp_path, capsys):
    for suffix in train.FORMATS:
        (tmp_path / f"bad{suffix}").write_bytes(content)
        with pytest.raises(SystemExit) as end:
            train.read_matrix(tmp_path / f"bad{suffix}")
        printed = capsys.readouterr().err
        assert end.value.code == 2 and f"bad{suffix} " in printed and "give a file with one numeric matrix" in printed
    np.savez(tmp_path / "two.npz", a=matrix(), b=matrix())
    with pytest.raises(SystemExit):
        train.read_matrix(tmp_path / "two.npz")
    assert "two.npz contains 2 numeric matrices" in capsys.readouterr().err
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SystemExit):
        train.read_matrix(tmp_path / "objects.npy")
    assert "pickle" not in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_float16_matrix_is_read_without_warning(tmp_path):
    np.save(tmp_path / "half.npy", matrix().astype(np.float16))
    assert np.array_equal(train.read_matrix(tmp_path / "half.npy"), matrix().astype(np.float16).astype(np.float32))


# ---------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_all_arms_resolve_to_different_arguments(scale):
    data = ["--data", "x.npy"] if scale == "paper" else []
    resolved = [json.dumps(vars(train.parse_args(["--scale", scale, *data, *f])), default=str) for f in ARMS.values()]
    assert len(set(resolved)) == len(ARMS) == 25


def test_matched_alpha_is_computed_from_latent_and_active():
    flags = ["--alignment", "mse", "--latent", "1024", "--active", "32"]
    assert train.parse_args([*flags, "--alpha", "matched"]).alpha == 16
    assert train.parse_args([*flags, "--alpha", "0.25matched"]).alpha == 4
    assert train.parse_args([*flags, "--alpha", "matched", "--mse-reduction", "sum"]).alpha == 1 / 64


def test_every_argument_is_used_outside_parse_args():
    source = (ROOT / "bsa/train.py").read_text()
    used = set(re.findall(r"args\.(\w+)", source[source.index("- model\n") :]))  # below parse_args
    assert used == set(vars(train.parse_args([]))) - READ_BY_COMMON


# ---------------------------------------------------------------------------------------------- runs


def tiny(out, *flags) -> list[str]:
    return ["--latent", "64", "--active", "4", "--steps", "40", "--out", str(out), "--device", "cpu", *flags]


@pytest.fixture(scope="module", autouse=True)
def few_concepts():
    """Use 2,500 planted concepts in all runs of this module."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate):
            patch.setattr(module, "planted_concepts", lambda seed: planted_concepts(2500, seed))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with a run of each arm: 40 steps with 64 features, evaluated."""
    root = tmp_path_factory.mktemp("bsa")
    for arm, flags in ARMS.items():
        train.main(tiny(root / arm / "0", *flags))
        evaluate.main([str(root / arm / "0")])
    return root


def test_an_evaluation_for_tuning_leaves_metrics_and_activations_of_the_test_split(finished):
    folder = finished / "base/0"
    kept = {name: (folder / name).read_bytes() for name in ("metrics.json", "activations.json")}
    evaluate.main([str(folder), "--held-out"])
    assert (folder / "held_out.json").exists()
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_no_two_arms_end_with_equal_weights(finished):
    weights = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["decoder.weight"] for arm in ARMS}
    for first, second in itertools.combinations(weights, 2):
        assert not torch.equal(weights[first], weights[second]), (first, second)


def test_metrics_activations_and_log_have_the_expected_content(finished):
    keys = "reconstruction_loss fixed_topk_reconstruction_loss reconstruction_mse fixed_topk_reconstruction_mse "
    keys += "active_mean active_std dead_fraction always_on_fraction rare_fraction knn_overlap bits_per_row "
    keys += "entropy_bits_per_row distinct_codes atom_recovery_f1 depth_correlation seconds examples_per_second "
    keys += "peak_memory untrained_fixed_topk_reconstruction_loss sign_reconstruction_loss"
    for arm in ARMS:
        metrics = json.loads((finished / arm / "0/metrics.json").read_text())
        assert all(isinstance(metrics[key], float | int) for key in keys.split()), arm
        activations = json.loads((finished / arm / "0/activations.json").read_text())
        assert len(activations["feature_shares"]) == 64 and sum(activations["rows_by_active_count"]) == 250
        counts = np.array(activations["rows_by_active_count"])
        assert counts @ np.arange(len(counts)) / 250 == pytest.approx(metrics["active_mean"], rel=1e-5)
    log = files.read_lines(finished / "base/0/train.jsonl")
    assert [line["epoch"] for line in log] == list(range(21)) and log[-1]["step"] == 40


def test_the_alignment_loss_is_not_computed_at_alpha_zero(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "alignment_loss", lambda *_: calls.append(1))
    train.main(tiny(tmp_path / "run", "--alpha", "0"))
    assert not calls


def test_another_seed_gives_other_weights(finished, tmp_path):
    train.main(tiny(tmp_path / "other", "--seed", "1"))
    folders = (tmp_path / "other", finished / "base/0")
    first, second = (checkpoints.load(folder / "model.pt")["model"]["encoder.weight"] for folder in folders)
    assert not torch.equal(first, second)


def test_a_run_with_a_nan_loss_is_finished_and_evaluated_as_diverged(tmp_path, monkeypatch):
    calls = []

    def nan_in_call_9(*arguments):
        calls.append(1)
        return reconstruction_loss(*arguments) * (float("nan") if len(calls) == 9 else 1)

    monkeypatch.setattr(train, "reconstruction_loss", nan_in_call_9)
    train.main(tiny(tmp_path / "run"))
    monkeypatch.undo()
    evaluate.main([str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["diverged"] and metrics["reconstruction_loss"] is None
    assert checkpoints.load(tmp_path / "run/model.pt")["epoch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "latent"), [("gpu", 1024), ("paper", 16384)])
def test_every_arm_trains_two_steps_and_is_evaluated_at_full_size(scale, latent, tmp_path):
    """With N and K of the scale, on a user's matrix."""
    path = save(tmp_path / "rows.npy", matrix(60, 48))
    for arm, arm_flags in ARMS.items():
        flags = ["--scale", scale, "--data", str(path), "--batch", "4", "--rehearse", "1", "--device", "cpu"]
        train.main([*flags, *arm_flags, "--out", str(tmp_path / arm)])
        evaluate.main([str(tmp_path / arm)])
        saved = checkpoints.load(tmp_path / arm / "model.pt")
        assert saved["model"]["decoder.weight"].shape == (48, latent) and saved["epoch"] == 2
        assert files.read_lines(tmp_path / arm / "train.jsonl")[-1]["step"] == 2
        assert 0 < json.loads((tmp_path / arm / "metrics.json").read_text())["reconstruction_loss"] < 2


def test_the_decoder_of_the_untrained_code_is_ridge_regression_in_primal_and_dual_form():
    """200 training rows are more than the 41 features with the bias (primal form), 30 are fewer (dual form)."""
    model = BSA(16, 40, 4, "sparse", 0)
    values = torch.from_numpy(matrix(300, 16))
    losses = []
    for count in (200, 30):
        data = train.Splits(values[:count], values[:0], values[250:], (), 300, "")
        losses.append(evaluate.baselines(model, data, "test", 4)["untrained_fixed_topk_reconstruction_loss"])
        x_train, x = model.normalise(values[:count]), model.normalise(values[250:])
        train_codes, codes = (
            torch.cat([topk_code(model.encoder(rows), 4), torch.ones(len(rows), 1)], 1).double()
            for rows in (x_train, x)
        )
        penalised = torch.cat([train_codes, torch.eye(41, dtype=DOUBLE)])
        targets = torch.cat([x_train.double(), torch.zeros(41, 16, dtype=DOUBLE)])
        decoder = torch.linalg.lstsq(penalised, targets).solution
        expected = 1 - F.cosine_similarity(codes @ decoder, x.double(), dim=1)
        assert losses[-1] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert losses[0] < losses[1]


def test_a_run_on_one_matrix_is_not_accepted_for_another_matrix(tmp_path, capsys):
    """The data folder is not a method argument, but the content of a user's matrix is."""
    flags = ["--batch", "8", *tiny(tmp_path / "run")]
    for name, factor in (("a", 1), ("b", 2)):
        save(tmp_path / f"{name}.npy", factor * matrix(60, 16))
    train.main(["--data", str(tmp_path / "a.npy"), *flags])
    evaluate.main([str(tmp_path / "run")])
    capsys.readouterr()
    train.main(["--data", str(tmp_path / "a.npy"), *flags])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(tmp_path / "b.npy"), *flags])
    assert end.value.code == 2 and "other flags (--data" in capsys.readouterr().err
    train.main(["--data", str(tmp_path / "b.npy"), *flags, "--replace"])
    assert "b.npy" in files.read_json(tmp_path / "run/args.json")["arguments"]["data"]
    assert (tmp_path / "run.replaced-1/metrics.json").exists()


def test_codes_are_exported_and_neighbours_and_features_are_printed(finished, tmp_path, capsys):
    values = matrix()
    path = save(tmp_path / "mine.npy", np.concatenate([values, values[3:4]]))  # the last row is a duplicate
    (tmp_path / "mine.txt").write_text("\n".join(f"concept {n}" for n in range(61)) + "\n")
    train.main(["--data", str(path), "--batch", "8", *tiny(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--export", str(tmp_path / "codes.npz")])
    assert "numpy.unpackbits(codes, axis=1, count=latent)" in capsys.readouterr().out
    exported = np.load(tmp_path / "codes.npz")
    bits = np.unpackbits(exported["codes"], axis=1, count=int(exported["latent"]))
    assert bits.shape == (60, 64) and exported["names"][3] == "concept 3"
    saved = checkpoints.load(tmp_path / "run/model.pt")
    model = train.build_model(argparse.Namespace(**saved["arguments"]), 16, torch.device("cpu"))
    model.load_state_dict(saved["model"])
    z = evaluate.compute_codes(model, model.normalise(torch.from_numpy(values)), 4, "round").z
    assert np.array_equal(bits, z.numpy())
    evaluate.main([str(tmp_path / "run"), "--neighbours", "concept 3", "--features", "2"])
    printed = capsys.readouterr().out
    assert "by code (Jaccard)" in printed and "by embedding (cosine)" in printed and printed.count("feature ") == 2
    assert "concept 3 " not in printed.split("by embedding (cosine):")[1].splitlines()[0]
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run"), "--neighbours", "concept 333"])
    assert end.value.code == 2 and "'concept 333' is not a row name" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("one\n")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "run"), "--names", str(tmp_path / "short.txt"), "--features", "1"])
    assert "1 lines for 61 rows" in capsys.readouterr().err
    (tmp_path / "short.txt").write_bytes("Ärger\n".encode("latin-1"))
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run"), "--names", str(tmp_path / "short.txt"), "--features", "1"])
    assert end.value.code == 2 and "short.txt is not a UTF-8 text" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("arm", ["base", "no-alignment", "mse", "l1-0.01", "topk", "topk-values"])
def test_training_and_evaluation_stay_on_the_gpu_without_synchronisation_per_step(arm, fake_gpu: FakeGPU):
    device = torch.device("cuda")
    args = train.parse_args(["--latent", "64", "--active", "4", "--batch", "8", *ARMS[arm]])
    rows = torch.zeros(64, 16, device=device)
    model = train.build_model(args, 16, device)
    syncs = []
    for steps_per_epoch in (2, 4):
        args.rehearse = steps_per_epoch  # two epochs each time, so more steps must not synchronise more often
        fake_gpu.syncs = 0
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train.train(args, FakeRun(), model, model.normalise(rows), optimizer)
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0
    codes = evaluate.compute_codes(model, rows, 4, args.code)
    losses = evaluate.reconstruction_losses(model, rows, codes.z)
    for tensor in (*codes, losses, evaluate.jaccard(codes.z, codes.z), evaluate.entropy_bits(codes.s[0])):
        assert tensor.device.type == "cuda"


@pytest.mark.slow
def test_planted_concepts_give_the_expected_ranges_of_metrics(tmp_path, monkeypatch):
    """All 20,000 concepts, 800 steps, learning rate 0.001. Seeds 0, 1 and 2 are within these ranges."""
    for module in (train, evaluate):
        monkeypatch.setattr(module, "planted_concepts", planted_concepts)
    metrics = {}
    for arm in ("base", "no-alignment"):
        train.main(["--steps", "800", "--lr", "0.001", *ARMS[arm], "--out", str(tmp_path / arm), "--device", "cpu"])
        evaluate.main([str(tmp_path / arm)])
        metrics[arm] = json.loads((tmp_path / arm / "metrics.json").read_text())
    base, no_alignment = metrics["base"], metrics["no-alignment"]
    assert 5 < base["active_mean"] < 9 and no_alignment["active_mean"] > 40
    assert base["reconstruction_loss"] < no_alignment["reconstruction_loss"]
    fixed_topk = base["fixed_topk_reconstruction_loss"]
    assert fixed_topk < base["untrained_fixed_topk_reconstruction_loss"]
    assert fixed_topk < no_alignment["fixed_topk_reconstruction_loss"]


def test_each_pass_over_the_data_has_all_rows_once_in_a_new_order(tmp_path, monkeypatch):
    rows, seen = torch.arange(16.0).unsqueeze(1).repeat(1, 3), []

    def loss(model, x, **_):
        seen.append(x[:, 0].long().tolist())
        return model.encoder(x).mean(), torch.zeros(5)

    monkeypatch.setattr(train, "bsa_loss", loss)
    args = train.parse_args(["--steps", "44", "--batch", "4"])  # epochs of three steps, passes of four
    assert [len(steps) for steps in train.epoch_steps(args)] == [3] * 14 + [2]
    model = BSA(3, 8, 2, "torch", 0)
    run = train.Run({"out": tmp_path, "replace": False, "tensorboard": False}, train.__file__)
    train.train(args, run, model, rows, torch.optim.Adam(model.parameters(), 1e-3))
    passes = [list(itertools.chain(*seen[first : first + 4])) for first in range(0, 44, 4)]
    assert len(seen) == 44 and all(sorted(order) == list(range(16)) for order in passes)
    assert len({tuple(order) for order in passes}) == 11
