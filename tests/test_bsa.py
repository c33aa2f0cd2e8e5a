"""BSA: closed-form losses, the rounding, codes, data and its refusals, arms, and train -> eval on planted concepts."""

import argparse
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, FakeGPU, Unwritten, refused
from plan import design

from bsa import eval as evaluate
from bsa import train
from bsa.planted import plant
from bsa.train import BSA, alignment_loss, encode, reconstruction_loss, rounded, topk_code
from common import checkpoints, files

ARMS, STUDIES = design("bsa")
DOUBLE = torch.float64


def logits(rows: int = 7, latent: int = 40, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, latent, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- loss


def dense_alignment(h: torch.Tensor, active: int, kind: str, target: str, reduction: str) -> torch.Tensor:
    """The alignment loss with its N-wide target written out."""
    s = h.sigmoid()
    code = s + (s.round() - s).detach() if target == "rounded" else s
    mask = topk_code(h, active)
    wanted = s * mask if target == "value" else mask
    if kind == "cosine":
        return 1 - F.cosine_similarity(code, wanted.detach(), dim=1)
    error = (code - wanted.detach()).square()
    return error.mean(1) if reduction == "mean" else error.sum(1)


@pytest.mark.parametrize("target", ["binary", "value", "rounded"])
@pytest.mark.parametrize(("kind", "reduction"), [("cosine", "mean"), ("mse", "mean"), ("mse", "sum")])
@pytest.mark.parametrize("active", [1, 5, 39])
def test_closed_forms_equal_the_dense_losses_in_value_and_gradient(target, kind, reduction, active):
    found, expected = logits().requires_grad_(), logits().requires_grad_()
    value = alignment_loss(found.sigmoid(), found, active, kind, target, reduction)
    dense = dense_alignment(expected, active, kind, target, reduction)
    torch.testing.assert_close(value, dense, rtol=1e-10, atol=1e-12)
    value.sum().backward()
    dense.sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_stopping_the_gradient_at_the_value_target_changes_nothing(kind):
    """The masked copy is the projection of s: the gradient through it is zero (specification 1.4)."""
    slopes = []
    for stop in (True, False):
        h = logits().requires_grad_()
        s = h.sigmoid()
        wanted = s * topk_code(h.detach(), 5)
        wanted = wanted.detach() if stop else wanted
        loss = 1 - F.cosine_similarity(s, wanted, dim=1) if kind == "cosine" else (s - wanted).square().mean(1)
        loss.sum().backward()
        slopes.append(h.grad)
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-15)


def test_cosine_alignment_ignores_the_scale_of_s_and_mse_does_not():
    h = logits()
    whole, half = (alignment_loss(scale * h.sigmoid(), h, 5, "cosine") for scale in (1.0, 0.5))
    torch.testing.assert_close(whole, half, rtol=1e-12, atol=0)
    assert not torch.allclose(*(alignment_loss(scale * h.sigmoid(), h, 5, "mse") for scale in (1.0, 0.5)))
    torch.testing.assert_close(alignment_loss(h.sigmoid(), h, 5, "l1"), h.sigmoid().sum(1))


def test_reconstruction_by_hand_and_safe_where_nothing_is_rebuilt():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    rebuilt = torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    torch.testing.assert_close(reconstruction_loss(rebuilt, x, "cosine"), torch.tensor([1 - 24 / 25, 2.0]))
    torch.testing.assert_close(reconstruction_loss(rebuilt, x, "mse"), torch.tensor([1.0, 4.5]))
    torch.testing.assert_close(reconstruction_loss(rebuilt, x, "mse", "sum"), torch.tensor([2.0, 9.0]))
    empty = torch.zeros(1, 3, requires_grad=True)
    loss = reconstruction_loss(empty, torch.tensor([[1.0, 2.0, 3.0]]), "cosine")
    loss.backward()
    assert loss.item() == 1.0 and empty.grad.norm() < 1e4  # torch's own has 2e7 here
    for target in ("binary", "value", "rounded"):
        h = torch.full((2, 8), -300.0, requires_grad=True)
        s, _ = encode(h, 3, "round")
        alignment_loss(s, h, 3, "cosine", target).sum().backward()
        assert h.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- codes


def test_rounding_is_torchs_and_its_gradient_passes():
    s = torch.tensor([0.0, 0.3, 0.5, 0.500001, 1.0], requires_grad=True)
    z = rounded(s)
    assert torch.equal(z, s.round()) and z[2] == 0
    (z * torch.arange(5.0)).sum().backward()
    assert torch.equal(s.grad, torch.arange(5.0))


def test_the_fixed_code_has_exactly_k_features_under_ties_too():
    h = torch.cat([logits(4, 30).float(), torch.zeros(2, 30), torch.full((1, 30), 50.0)])
    for active in (1, 7, 29):
        assert topk_code(h, active).sum(1).tolist() == [active] * 7


def test_codes_of_the_baselines():
    h = logits().float().requires_grad_()
    s, z = encode(h, 5, "topk")
    assert torch.equal(z, topk_code(h, 5))
    z.sum().backward()
    torch.testing.assert_close(h.grad, s * (1 - s))  # passed through to all features
    h.grad = None
    _, z = encode(h, 5, "topk-values")
    assert (z.count_nonzero(1) == 5).all() and torch.equal(z[z > 0], h[z > 0])
    z.sum().backward()
    assert torch.equal(h.grad, (z > 0).float())


def test_the_sparse_start_has_about_k_features_on_and_the_stock_start_half():
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for init, expected in (("sparse", 32), ("torch", 512)):
        model = BSA(128, 1024, 32, init, 0)
        on = encode(model.encoder(model.normalise(x)), 32, "round")[1].sum(1).mean().item()
        assert on == pytest.approx(expected, rel=0.1)
    sparse, stock = BSA(16, 64, 4, "sparse", 3), BSA(16, 64, 4, "torch", 3)
    torch.testing.assert_close(sparse.encoder.weight, 3 * stock.encoder.weight)
    assert torch.equal(sparse.decoder.weight, stock.decoder.weight)


def test_rows_are_centred_and_scaled():
    model = BSA(6, 8, 2, "torch", 0)
    model.mean.copy_(torch.arange(6.0))
    rows = model.normalise(torch.randn(5, 6) + torch.arange(6.0))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((5,), math.sqrt(6)))


# ---------------------------------------------------------------------------------------------- measures


def test_jaccard_packing_and_storage_by_hand():
    a, b = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(evaluate.jaccard(a, b), torch.tensor([[1 / 3, 0.0], [0.0, 0.0]]))
    bits = evaluate.packed(torch.eye(11))
    assert bits.shape == (11, 2) and np.array_equal(np.unpackbits(bits, axis=1, count=11), np.eye(11))
    share = torch.tensor([0.5, 0.0, 0.25])
    expected = 1 + 0.25 * 2 + 0.75 * math.log2(4 / 3)
    stored = evaluate.storage(3.0, 1024, share, False)
    assert stored["bits_per_row"] == 30 and stored["entropy_bits_per_row"] == pytest.approx(expected)
    assert evaluate.storage(500.0, 1024, share, False)["bits_per_row"] == 1024
    assert evaluate.storage(3.0, 1024, share, True)["bits_per_row"] == 3 * 26


def test_knn_overlap_against_a_naive_loop():
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    z = (torch.randn(60, 30, generator=torch.Generator().manual_seed(1)) > 0.8).float()
    shares = []
    for i in range(60):
        others = [j for j in range(60) if j != i]
        dense = sorted(others, key=lambda j: -float(F.cosine_similarity(x[i], x[j], dim=0)))[:10]

        def index(j, i=i):
            either = float(z[i].maximum(z[j]).sum())
            return float((z[i] * z[j]).sum()) / either if either else 0.0

        shares.append(len(set(dense) & set(sorted(others, key=lambda j: (-index(j), j))[:10])) / 10)
    assert evaluate.knn_overlap(x, z, 60) == pytest.approx(sum(shares) / 60, abs=1e-6)
    assert evaluate.knn_overlap(x, torch.zeros(60, 4), 60) < 0.5 < 0.99 < evaluate.knn_overlap(z + 0.0, z, 1000) + 0.6


def test_rank_correlation_and_best_match_by_hand():
    a, b = torch.tensor([1.0, 2, 2, 4]), torch.tensor([10.0, 20, 30, 40])
    assert evaluate.spearman(a, b) == pytest.approx(float(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]))
    assert evaluate.spearman(a, -b) == -evaluate.spearman(a, b) and evaluate.spearman(a, torch.ones(4)) == 0
    atoms = torch.zeros(40, 3, dtype=torch.bool)
    atoms[:20, 0], atoms[10:30, 1], atoms[:5, 2] = True, True, True  # the last one is too rare to count
    z = torch.zeros(40, 4)
    z[:20, 1], z[10:20, 2] = 1, 1
    assert evaluate.best_match_f1(z, atoms) == pytest.approx((1 + max(2 * 10 / 30, 2 * 10 / 40)) / 2)


def test_movement_says_what_the_last_fifth_did_and_from_where_on_nothing_moved():
    def log(values):
        lines = [{"epoch": n, "step": 10 * n, "loss": v, "reconstruction_loss": v, "active_mean": 5.0}
                 for n, v in enumerate(values, 1)]  # fmt: skip
        return [{"epoch": 0}, *lines]

    assert evaluate.movement(log([2.0] * 8 + [1.0, 1.0]))["loss_moved"] == pytest.approx(100)
    still = evaluate.movement(log([2.0] * 4 + [1.0] * 16))
    assert still["loss_moved"] == 0 and still["settled_step"] == 60  # at 5, 6: a fifth before lies within the fours
    assert evaluate.movement(log([2.0**-n for n in range(20)]))["settled_step"] is None


# ---------------------------------------------------------------------------------------------- data


def test_planted_concepts_have_the_shape_of_the_specification():
    planted = plant()
    assert planted.rows.shape == (20_000, 128) and planted.rows.dtype == np.float32
    atoms = planted.atoms.sum(1)
    assert 5.5 < atoms.mean() < 6.2 and 1.5 < atoms.std() < 1.8 and atoms.min() == 2 and atoms.max() == 10
    assert set(planted.depth) == {1, 2, 3, 4, 5} and (planted.atoms[:, :192].sum(1) == planted.depth).all()
    again = plant(30, seed=1)
    assert np.array_equal(again.rows, plant(30, seed=1).rows) and not np.array_equal(again.rows, plant(30).rows)
    residual = planted.rows - planted.atoms @ np.linalg.lstsq(planted.atoms.astype(float), planted.rows, rcond=None)[0]
    assert residual.std() == pytest.approx(0.05, rel=0.02)


def matrix(rows: int = 60, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


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
def test_a_users_matrix_in_every_format_split_without_overlap(suffix, tmp_path, capsys):
    values = matrix()
    values[7] = values[3]
    rows = train.load_rows("file", save(tmp_path / f"mine{suffix}", values), torch.device("cpu"))
    assert "1 rows that stand twice" in capsys.readouterr().out
    assert [len(part) for part in rows[:3]] == [49, 5, 5]
    numbers = torch.cat(rows.numbers).tolist()
    assert len(set(numbers)) == 59 and set(numbers) == set(range(60)) - {7}
    assert torch.equal(rows.test, torch.from_numpy(values)[rows.numbers[2]]) and len(rows.digest) == 64
    assert all((part.diff() > 0).all() for part in rows.numbers)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda m: m.__setitem__((17, 3), np.nan), "1 of 60 rows are not finite (rows 17)"),
        (lambda m: m.__setitem__((slice(4, 6), 0), np.inf), "2 of 60 rows are not finite (rows 4, 5)"),
        (lambda m: m.__setitem__(9, 0), "1 of 60 rows have norm 0 (rows 9)"),
        (lambda m: m.__setitem__(slice(None), 1), "1 different rows"),
    ],
)
def test_bad_rows_are_named_by_number(harm, words, tmp_path, capsys):
    values = matrix()
    harm(values)
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(save(tmp_path / "mine.npy", values)), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and words in printed and not (tmp_path / "run/args.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--active", "512"], "--active 512 must be less than --latent 512"),
        (["--active", "0"], "less than 1"),
        (["--alpha", "matched"], "for --alignment mse"),
        (["--alpha", "much"], "neither `matched` nor a number"),
        (["--alpha", "-1"], "neither `matched` nor a number"),
        (["--code", "topk"], "--alpha 0"),
        (["--batch", "17000"], "2000 training rows"),
        (["--data-set", "file"], "wants a matrix"),
        (["--scale", "paper", "--device", "cpu"], "wants a matrix"),
        (["--data", "nowhere.npy"], "no such file"),
        (["--data-set", "mesh", "--data", "nowhere"], "python -m bsa.concepts --data nowhere"),
        (["--scale", "gpu"], "--scale demo"),
    ],
)
def test_a_users_mistake_ends_in_one_sentence(flags, words, tmp_path, capsys):
    refused(train.main, flags, words, tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY junk", b"not a matrix"])
def test_a_damaged_matrix_is_named(content, tmp_path, capsys):
    for suffix in train.FORMATS:
        (tmp_path / f"bad{suffix}").write_bytes(content)
        with pytest.raises(SystemExit) as end:
            train.read_matrix(tmp_path / f"bad{suffix}")
        assert end.value.code == 2 and f"bad{suffix} cannot be read" in capsys.readouterr().err
    np.savez(tmp_path / "two.npz", a=matrix(), b=matrix())
    with pytest.raises(SystemExit):
        train.read_matrix(tmp_path / "two.npz")
    assert "it holds 2" in capsys.readouterr().err
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=not False)
    with pytest.raises(SystemExit):
        train.read_matrix(tmp_path / "objects.npy")


# ---------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_no_two_arms_resolve_to_equal_arguments(scale):
    data = ["--data", "x.npy"] if scale == "paper" else []
    resolved = [json.dumps(vars(train.parse_args(["--scale", scale, *data, *f])), default=str) for f in ARMS.values()]
    assert len(set(resolved)) == len(ARMS) == 25


def test_matched_weights_follow_from_the_sizes():
    flags = ["--alignment", "mse", "--latent", "1024", "--active", "32"]
    assert train.parse_args([*flags, "--alpha", "matched"]).alpha == 16
    assert train.parse_args([*flags, "--alpha", "0.25matched"]).alpha == 4
    assert train.parse_args([*flags, "--alpha", "matched", "--mse-reduction", "sum"]).alpha == 1 / 64


def test_every_flag_is_read():
    source = (ROOT / "bsa/train.py").read_text()
    read = set(re.findall(r"args\.(\w+)", source[source.index("- model\n") :]))  # below parse_args
    assert read == set(vars(train.parse_args([])))


# ---------------------------------------------------------------------------------------------- runs


def tiny(out, *flags) -> list[str]:
    return ["--latent", "64", "--active", "4", "--steps", "40", "--out", str(out), "--device", "cpu", *flags]


@pytest.fixture(scope="module", autouse=True)
def few_concepts():
    """Runs of this module plant 2,500 concepts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate):
            patch.setattr(module, "plant", lambda: plant(2500))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every arm for forty steps at a small width, evaluated."""
    root = tmp_path_factory.mktemp("bsa")
    for arm, flags in ARMS.items():
        train.main(tiny(root / arm / "0", *flags))
        evaluate.main([str(root / arm / "0")])
    return root


def test_every_arm_ends_with_weights_of_its_own(finished):
    weights = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["decoder.weight"] for arm in ARMS}
    for one, other in itertools.combinations(weights, 2):
        assert not torch.equal(weights[one], weights[other]), (one, other)


def test_metrics_have_the_keys_that_were_asked_for(finished):
    keys = "reconstruction_loss fixed_topk_reconstruction_loss reconstruction_mse fixed_topk_reconstruction_mse "
    keys += "active_mean active_std dead_fraction always_on_fraction rare_fraction knn_overlap bits_per_row "
    keys += "entropy_bits_per_row distinct_codes atom_recovery_f1 depth_correlation seconds examples_per_second "
    keys += "peak_memory untrained_fixed_topk_reconstruction_loss sign_reconstruction_loss"
    for arm in ARMS:
        found = json.loads((finished / arm / "0/metrics.json").read_text())
        assert all(isinstance(found[key], float | int) for key in keys.split()), arm
        shares = json.loads((finished / arm / "0/activations.json").read_text())
        assert len(shares["feature_shares"]) == 64 and sum(shares["rows_by_active_count"]) == 250
        counts = np.array(shares["rows_by_active_count"])
        assert counts @ np.arange(len(counts)) / 250 == pytest.approx(found["active_mean"], rel=1e-5)
    log = files.read_lines(finished / "base/0/train.jsonl")
    assert [line["epoch"] for line in log] == list(range(21)) and log[-1]["step"] == 40


def test_training_never_looks_for_the_largest_without_alignment(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "alignment_loss", lambda *_: calls.append(1))
    train.main(tiny(tmp_path / "run", "--alpha", "0"))
    assert not calls


def test_a_run_is_a_function_of_its_seed_and_goes_on_after_a_kill(finished, tmp_path, monkeypatch):
    saved, save = [], train.Run.save

    def interrupted(run, epoch, record, state):
        save(run, epoch, record, state)
        saved.append(epoch)
        if epoch == 7 and saved.count(7) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny(tmp_path / "run"))
    train.main(tiny(tmp_path / "run"))
    expected, found = (checkpoints.load(run / "model.pt")["model"] for run in (finished / "base/0", tmp_path / "run"))
    assert saved[:8] == list(range(8)) and saved[8] == 8
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    train.main(tiny(tmp_path / "other", "--seed", "1"))
    assert not torch.equal(checkpoints.load(tmp_path / "other/model.pt")["model"]["encoder.weight"],
                           expected["encoder.weight"])  # fmt: skip


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, monkeypatch):
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return reconstruction_loss(*arguments) * (float("nan") if len(calls) == 9 else 1)

    monkeypatch.setattr(train, "reconstruction_loss", poisoned)
    train.main(tiny(tmp_path / "run"))
    monkeypatch.undo()
    evaluate.main([str(tmp_path / "run")])
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["diverged"] and found["reconstruction_loss"] is None
    assert checkpoints.load(tmp_path / "run/model.pt")["epoch"] == 4


@pytest.mark.parametrize(("scale", "latent"), [("gpu", 1024), ("paper", 16384)])
def test_every_arm_takes_two_steps_and_is_evaluated(scale, latent, tmp_path):
    """At the scale's own N and K, on rows of the user's."""
    path = save(tmp_path / "rows.npy", matrix(60, 48))
    for arm, own in ARMS.items():
        flags = ["--scale", scale, "--data", str(path), "--batch", "4", "--rehearse", "1", "--device", "cpu"]
        train.main([*flags, *own, "--out", str(tmp_path / arm)])
        evaluate.main([str(tmp_path / arm)])
        saved = checkpoints.load(tmp_path / arm / "model.pt")
        assert saved["model"]["decoder.weight"].shape == (48, latent) and saved["epoch"] == 2
        assert files.read_lines(tmp_path / arm / "train.jsonl")[-1]["step"] == 2
        assert 0 < json.loads((tmp_path / arm / "metrics.json").read_text())["reconstruction_loss"] < 2


def test_the_untrained_codes_decoder_is_the_same_over_features_and_over_rows():
    model = BSA(16, 40, 4, "sparse", 0)
    values = torch.from_numpy(matrix(300, 16))
    found = []
    for count in (200, 30):
        data = train.Rows(values[:count], values[:0], values[250:], (), "")
        found.append(evaluate.references(model, data, "test", 4)["untrained_fixed_topk_reconstruction_loss"])
        x, asked = model.normalise(values[:count]), model.normalise(values[250:])
        code, other = (
            torch.cat([topk_code(model.encoder(y), 4), torch.ones(len(y), 1)], 1).double() for y in (x, asked)
        )
        ridge = torch.linalg.lstsq(torch.cat([code, torch.eye(41, dtype=DOUBLE)]),
                                   torch.cat([x.double(), torch.zeros(41, 16, dtype=DOUBLE)])).solution  # fmt: skip
        expected = 1 - F.cosine_similarity(other @ ridge, asked.double(), dim=1)
        assert found[-1] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert found[0] < found[1]


def test_another_matrix_is_another_run(tmp_path, capsys):
    """A place of data is not part of a run, but a matrix of one's own is: a finished run on it is not taken for it."""
    flags = ["--batch", "8", *tiny(tmp_path / "run")]
    for name in ("a", "b"):
        save(tmp_path / f"{name}.npy", matrix(60, 16))
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


def test_codes_can_be_used(finished, tmp_path, capsys):
    values = matrix()
    path = save(tmp_path / "mine.npy", values)
    (tmp_path / "mine.txt").write_text("\n".join(f"concept {n}" for n in range(60)) + "\n")
    train.main(["--data", str(path), "--batch", "8", *tiny(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--export", str(tmp_path / "codes.npz")])
    exported = np.load(tmp_path / "codes.npz")
    bits = np.unpackbits(exported["codes"], axis=1, count=int(exported["latent"]))
    assert bits.shape == (60, 64) and exported["names"][3] == "concept 3"
    saved = checkpoints.load(tmp_path / "run/model.pt")
    model = train.build_model(argparse.Namespace(**saved["arguments"]), 16, torch.device("cpu"))
    model.load_state_dict(saved["model"])
    z = evaluate.codes_of(model, model.normalise(torch.from_numpy(values)), 4, "round").z
    assert np.array_equal(bits, z.numpy())
    evaluate.main([str(tmp_path / "run"), "--neighbours", "concept 3", "--features", "2"])
    printed = capsys.readouterr().out
    assert "by code (Jaccard)" in printed and "by embedding (cosine)" in printed and printed.count("feature ") == 2
    assert "concept 3 " not in printed.split("by embedding (cosine):")[1].splitlines()[0]
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run"), "--neighbours", "concept 333"])
    assert end.value.code == 2 and "no name of a row" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("one\n")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "run"), "--names", str(tmp_path / "short.txt"), "--features", "1"])
    assert "1 lines for 60 rows" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("arm", ["base", "no-alignment", "mse", "l1-0.01", "topk", "topk-values"])
def test_training_and_evaluation_stay_on_a_fake_gpu(arm, fake_gpu: FakeGPU):
    device = torch.device("cuda")
    args = train.parse_args(["--latent", "64", "--active", "4", "--batch", "8", *ARMS[arm]])
    rows = torch.zeros(64, 16, device=device)
    model = train.build_model(args, 16, device)
    asked = []
    for steps_per_epoch in (2, 4):
        args.rehearse = steps_per_epoch  # two epochs each time, so more steps must not ask more often
        fake_gpu.asked = 0
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train.train(args, Unwritten(), model, model.normalise(rows), optimizer)
        asked.append(fake_gpu.asked)
    assert asked[0] == asked[1] > 0
    s, z, fixed = evaluate.codes_of(model, rows, 4, args.code)
    for found in (
        s,
        z,
        fixed,
        evaluate.rebuilding(model, rows, z),
        evaluate.jaccard(z, z),
        evaluate.entropy_bits(s[0]),
    ):
        assert found.device.type == "cuda"


def test_the_specifications_bands_on_planted_concepts(tmp_path, monkeypatch):
    """Section 9: after 800 steps at a rate of 0.001; seen here in the seeds 0, 1 and 2."""
    monkeypatch.setattr(train, "plant", plant)
    monkeypatch.setattr(evaluate, "plant", plant)
    found = {}
    for arm in ("base", "no-alignment"):
        train.main(["--steps", "800", "--lr", "0.001", *ARMS[arm], "--out", str(tmp_path / arm), "--device", "cpu"])
        evaluate.main([str(tmp_path / arm)])
        found[arm] = json.loads((tmp_path / arm / "metrics.json").read_text())
    assert 5 < found["base"]["active_mean"] < 9 and found["no-alignment"]["active_mean"] > 40
    names = ("reconstruction_loss", "fixed_topk_reconstruction_loss", "untrained_fixed_topk_reconstruction_loss")
    whole, fixed, untrained = (found["base"][name] for name in names)
    assert whole < found["no-alignment"]["reconstruction_loss"] and fixed < untrained
    assert fixed < found["no-alignment"]["fixed_topk_reconstruction_loss"]


def test_every_pass_takes_all_rows_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    rows, seen = torch.arange(16.0).unsqueeze(1).repeat(1, 3), []

    def loss(model, x, **_):
        seen.append(x[:, 0].long().tolist())
        return model.encoder(x).mean(), torch.zeros(5)

    monkeypatch.setattr(train, "bsa_loss", loss)
    args = train.parse_args(["--steps", "44", "--batch", "4"])  # epochs of three steps, passes of four
    assert [len(steps) for steps in train.schedule(args)] == [3] * 14 + [2]
    model = BSA(3, 8, 2, "torch", 0)
    run = train.Run(tmp_path, {}, train.__file__)
    train.train(args, run, model, rows, torch.optim.Adam(model.parameters(), 1e-3))
    passes = [list(itertools.chain(*seen[first : first + 4])) for first in range(0, 44, 4)]
    assert len(seen) == 44 and all(sorted(one) == list(range(16)) for one in passes)
    assert len({tuple(one) for one in passes}) == 11


@pytest.mark.parametrize("content", ["", "{\n{}\n", '{"loss": 1}\n'])
def test_a_damaged_log_ends_in_one_sentence(content, finished, tmp_path, capsys):
    shutil.copytree(finished / "base/0", tmp_path / "run")
    (tmp_path / "run/train.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run")])
    assert end.value.code == 2 and "train.jsonl is damaged" in capsys.readouterr().err
