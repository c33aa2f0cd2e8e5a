"""Seq-VCR: regulariser, entropies, network, pre-trained GPT-2 weights, arms, and complete runs."""

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
from conftest import READ_BY_COMMON, ROOT, FakeGPU, FakeRun, assert_usage_error
from plan import design
from test_concepts import write_safetensors

from common import checkpoints, files
from common.study import results, tables
from seqvcr import eval as evaluate
from seqvcr import net, plot, tasks, train
from seqvcr.net import GPT
from seqvcr.train import ETA, SeqVCR, SumOfSquares, seqvcr_loss, variance_covariance

DESIGNS = {scale: design("seqvcr", scale) for scale in ("demo", "gpu", "paper")}
ALL_ARMS, STUDIES = DESIGNS["demo"]
ARMS = {arm: flags for arm, flags in ALL_ARMS.items() if "--steps" not in flags}
DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- loss


def direct(h: torch.Tensor, weight: torch.Tensor, rows: int, axis: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for (L_var, L_cov): equation 4 with a loop over positions and the full d x d covariance."""
    x = h @ weight.T
    variances, covariances = [], []
    for chunk in x.split(rows):
        groups = chunk.unbind(1) if axis == "batch" else [chunk.flatten(0, 1)]
        for group in groups:
            c = torch.cov(group.T)
            variances.append(F.relu(1 - (c.diagonal() + ETA).sqrt()).mean())
            covariances.append((c - c.diagonal().diag()).square().sum() / len(c))
    return torch.stack(variances).mean(), torch.stack(covariances).mean()


@pytest.mark.parametrize("axis", ["batch", "batch+length"])
@pytest.mark.parametrize(("rows", "width", "channels"), [(4, 9, 6), (12, 9, 6), (4, 5, 30), (2, 7, 3), (12, 40, 12)])
def test_variance_covariance_equals_the_direct_form_in_value_and_gradient(rows, width, channels, axis):
    h, weight = normal(12, 3, channels, scale=0.5), normal(width, channels, seed=1, scale=0.3)
    gradients, values = [], []
    for form in (variance_covariance, direct):
        a, b = h.clone().requires_grad_(), weight.clone().requires_grad_()
        terms = form(a, b, rows, axis)[:2]
        (terms[0] + 0.7 * terms[1]).backward()
        values.append(torch.stack(terms))
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_variance_covariance_in_float32_has_a_relative_error_below_2e_6():
    h, weight = normal(32, 5, 48, scale=0.4), normal(256, 48, seed=1, scale=0.2)
    for rows in (16, 32):
        values = torch.stack(variance_covariance(h.float(), weight.float(), rows)[:2])
        torch.testing.assert_close(values.double(), torch.stack(direct(h, weight, rows, "batch")), rtol=2e-6, atol=0)


def test_sum_of_squares_passes_gradcheck():
    h, weight = normal(3, 4, 5).requires_grad_(), normal(6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(SumOfSquares.apply, (h, weight))
    torch.testing.assert_close(SumOfSquares.apply(h, weight), (h @ weight.T).square().sum(1))


def terms(x: torch.Tensor, rows: int | None = None, axis: str = "batch") -> tuple[float, float]:
    """Return (L_var, L_cov) of features x (N, T, d), with the identity as projection."""
    variance, covariance, _ = variance_covariance(x, torch.eye(x.shape[2], dtype=x.dtype), rows or len(x), axis)
    return variance.item(), covariance.item()


def test_variance_covariance_of_small_examples():
    assert terms(torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]]])) == (0, pytest.approx(4.0))
    variance, covariance = terms(torch.tensor([[[0.5, 0.0]], [[-0.5, 0.0]]], dtype=DOUBLE))
    assert variance == pytest.approx(0.630282, abs=1e-6) and covariance == 0
    constant = torch.ones(6, 3, 4, dtype=DOUBLE, requires_grad=True)
    variance, covariance, std = variance_covariance(constant, normal(5, 4), 3)
    assert variance.item() == pytest.approx(0.968377, abs=1e-6) and covariance == 0 == std
    (variance + covariance).backward()
    assert (constant.grad == 0).all()
    x = normal(5, 4)
    white = torch.linalg.qr(x - x.mean(0)).Q * 2  # orthogonal columns of mean zero: C is the identity
    assert terms(white[:, None]) == (0, pytest.approx(0, abs=1e-12))


def test_invariances_of_variance_covariance():
    x = normal(8, 3, 5, scale=0.4)
    base = terms(x)
    for same in (x + normal(1, 3, 5, seed=3), x[torch.randperm(8)], torch.cat([x, x], 1)):
        assert terms(same) == pytest.approx(base, rel=1e-10)
    assert terms(3 * x)[1] == pytest.approx(81 * base[1])
    assert terms(x[:, :1], axis="batch+length") == pytest.approx(terms(x[:, :1]))
    assert terms(x, axis="batch+length") != pytest.approx(base, rel=1e-3)
    chunks = [terms(chunk) for chunk in x.split(4)]
    assert terms(x, rows=4) == pytest.approx(tuple(np.mean(chunks, axis=0)), rel=1e-10)


@pytest.mark.parametrize(("rows", "width", "lambdas"), [(32, 512, (1.0, 0.004)), (32, 4096, (1.0, 0.004)),
                                                        (32, 2048, (1.0, 0.004)), (128, 512, (0.1, 0.5))])  # fmt: skip
def test_minimising_over_free_h_and_w_reaches_the_predicted_minimum(rows, width, lambdas):
    """With h and W both free, the batch bounds the rank: rows - 1."""
    torch.manual_seed(0)
    h, weight = torch.randn(rows, 1, rows + 8) / 6, torch.randn(width, rows + 8) / 6
    h.requires_grad_(), weight.requires_grad_()
    optimizer = torch.optim.Adam([h, weight], 0.02)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 250)
        variance, covariance, std = variance_covariance(h, weight, rows)
        loss = lambdas[0] * variance + lambdas[1] * covariance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = evaluate.predict_minimum(torch.tensor([rows - 1]), width, *lambdas)
    assert std.item() == pytest.approx(expected[0].item(), rel=0.03)
    assert loss.item() == pytest.approx(expected[1].item(), rel=0.03)


def test_predict_minimum_equals_the_closed_form_without_eta():
    for rows, lambdas, stds, losses in (
        (32, (1.0, 0.004), (1.0, 1.0, 0.99, 0.78), (0.062, 0.128, 0.260, 0.414)),
        (128, (0.1, 0.5), (0.25, 0.19, 0.15, 0.12), (0.081, 0.086, 0.089, 0.091)),
    ):
        for width, expected_std, expected_loss in zip((512, 1024, 2048, 4096), stds, losses, strict=True):
            std, loss = evaluate.predict_minimum(torch.tensor([rows - 1]), width, *lambdas)
            assert std.item() == pytest.approx(expected_std, abs=0.006)
            assert loss.item() == pytest.approx(expected_loss, abs=0.0015)
    std, loss = evaluate.predict_minimum(torch.tensor([0, 600]), 512, 1.0, 0.004)
    assert std[0] == 0 and loss[0].item() == pytest.approx(0.968377, abs=1e-6)
    assert std[1].item() == pytest.approx(1, abs=1e-3) and loss[1] < 1e-9


def network(layers: int = 2, width: int = 16, dropout: float = 0.0, projection: int = 24) -> tuple[SeqVCR, tasks.Task]:
    task = tasks.build_task("multiplication", 2)
    return SeqVCR(GPT(len(task.symbols), 16, layers, 4, width, dropout, 0), projection, 0), task


def some_rows(count: int, pause: int = 2) -> torch.Tensor:
    task = tasks.build_task("multiplication", 2)
    return tasks.with_pauses(task, task.all_rows()[: 31 * count : 31], pause).long()


LOSS = {"n_targets": 4, "lambda1": 1.0, "lambda2": 0.004, "layer": 0, "axis": "batch", "covariance_batch": 4,
        "precision": "float32"}  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_seqvcr_loss_is_cross_entropy_of_the_answer_plus_both_terms_of_the_level(layer):
    model, rows = network()[0], some_rows(8)
    loss, log = seqvcr_loss(model, rows, **LOSS | {"layer": layer})
    model = model.double()
    gpt, x = model.gpt, model.gpt.wte.weight[rows[:, :-1]] + model.gpt.wpe.weight[:13]
    states = [x]
    for block in gpt.h:
        states.append(block(states[-1]))
    states[-1] = gpt.ln_f(states[-1])
    log_p = (states[-1] @ gpt.wte.weight.T).log_softmax(2)
    cross_entropy = -torch.stack([log_p[:, 9 + i, :].gather(1, rows[:, 10 + i, None]) for i in range(4)]).mean()
    variance, covariance = direct(states[layer], model.projection.weight, 4, "batch")
    total = cross_entropy + variance + 0.004 * covariance
    expected = torch.stack([total, cross_entropy, variance, covariance])
    torch.testing.assert_close(log[:4].double(), expected, rtol=1e-5, atol=1e-9)
    assert loss.item() == log[0].item()


def test_one_forward_pass_per_loss_and_gradients_reach_only_the_regularised_level_and_below():
    calls = []
    for lambdas in ((1.0, 0.004), (0.0, 0.0)):
        model, _ = network()
        model.gpt.register_forward_hook(lambda *_: calls.append(1))
        loss, log = seqvcr_loss(model, some_rows(8), **LOSS | dict(zip(("lambda1", "lambda2"), lambdas, strict=True)))
        loss.backward()
        assert (model.projection.weight.grad is None) == (not any(lambdas)) == (len(log) == 2)
    assert len(calls) == 2
    model, _ = network()
    variance, covariance, _ = variance_covariance(model.gpt(some_rows(8)[:, :-1], 4)[1][0], model.projection.weight, 4)
    (variance + covariance).backward()
    assert model.gpt.wte.weight.grad.norm() > 0 and model.gpt.h[0].mlp.c_fc.weight.grad is None


# ---------------------------------------------------------------------------------------------- entropy


def test_spectral_entropy_of_small_examples():
    entropy = evaluate.spectral_entropy
    assert entropy(torch.eye(7)).item() == pytest.approx(math.log(7))
    assert entropy(normal(6, 1) @ normal(1, 9)).item() == pytest.approx(0, abs=1e-9)
    assert entropy(torch.zeros(3, 4)).item() == 0 == entropy(torch.zeros(3, 4), 2.0).item()
    ratio = torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE).sqrt())
    assert entropy(ratio).item() == pytest.approx(0.562335, abs=1e-6)
    assert entropy(ratio, 2.0).item() == pytest.approx(0.470004, abs=1e-6)
    z = normal(6, 9)
    rotated = z @ torch.linalg.qr(normal(9, 9, seed=2)).Q
    for same in (5 * z, z.T, z[torch.randperm(6)], rotated):
        assert entropy(same).item() == pytest.approx(entropy(z).item())
    assert entropy(z, 0.999).item() == pytest.approx(entropy(z).item(), abs=1e-3)
    assert entropy(z, 2.0) < entropy(z)
    p = torch.linalg.eigvalsh(z @ z.T) / z.square().sum()
    assert entropy(z, 2.0).item() == pytest.approx(-math.log(p.square().sum().item()))
    repeated = torch.linalg.qr(normal(9, 9)).Q[:3].repeat(4, 1)
    assert entropy(repeated).item() == pytest.approx(math.log(3))
    assert evaluate.token_entropy(repeated[None]).item() == pytest.approx(math.log(3) / math.log(9))


@pytest.mark.parametrize("order", ["0", "0.4", "11", "400"])
def test_orders_of_the_entropy_beyond_the_range_of_float64_are_refused(order, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["x", "--alpha", order])
    assert f"--alpha: {order} is not between 0.5 and 10" in capsys.readouterr().err


@pytest.mark.parametrize("order", [0.5, 10.0])
def test_entropies_of_the_smallest_and_largest_order_are_exact(order):
    """Eigenvalues that are 0 except for rounding do not count, and the powers of small ones do not underflow."""
    rank_4 = torch.linalg.qr(normal(13, 13)).Q[:4].repeat(4, 1).float()
    assert evaluate.spectral_entropy(rank_4, order).item() == pytest.approx(math.log(4), abs=1e-5)
    full = torch.linalg.qr(normal(255, 255)).Q
    assert evaluate.spectral_entropy(full, order).item() == pytest.approx(math.log(255), abs=1e-9)


def test_batch_entropy_centres_each_position_and_is_at_most_one():
    h = torch.linalg.qr(normal(9, 9)).Q[:, None].repeat(1, 2, 1) + 100
    torch.testing.assert_close(evaluate.batch_entropy(h), torch.ones(2, dtype=DOUBLE))
    h[:, 1] = normal(9)
    assert evaluate.batch_entropy(h)[1].item() == pytest.approx(0, abs=1e-6)
    naive = []
    rows = normal(10, 2, 4)
    for position in range(2):
        p = torch.linalg.eigvalsh(torch.cov(rows[:, position].T))
        p = p / p.sum()
        naive.append(-(p * p.log()).sum() / math.log(4))
    torch.testing.assert_close(evaluate.batch_entropy(rows), torch.stack(naive))


def test_rank_bounds_count_distinct_inputs():
    rows = torch.tensor([[1, 5, 7], [1, 5, 8], [1, 6, 7], [1, 6, 8]])
    assert evaluate.rank_bounds(rows, 4, 64, 0).tolist() == [0, 1, 1]
    assert evaluate.rank_bounds(rows, 4, 64, 1).tolist() == [0, 1, 3]
    assert evaluate.rank_bounds(rows, 4, 2, 2).tolist() == [0, 1, 2]
    assert evaluate.rank_bounds(rows.repeat(2, 1), 2, 64, 1).tolist() == [0, 0, 1] * 4


# ---------------------------------------------------------------------------------------------- network


def test_the_network_is_causal_and_returns_logits_of_the_answer_only():
    model = network()[0].gpt.eval()
    rows = some_rows(3)
    other = rows.clone()
    other[:, 7] = 3
    logits, levels = model(rows[:, :-1], 4)
    assert logits.shape == (3, 4, 15) and len(levels) == 3
    for level, other_level in zip(levels, model(other[:, :-1], 4)[1], strict=True):
        assert torch.equal(level[:, :7], other_level[:, :7]) and not torch.equal(level[:, 7:], other_level[:, 7:])
    all_logits = model(rows[:, :-1], 13)[0]
    torch.testing.assert_close(logits, all_logits[:, -4:])


def gpt2_arrays(layers: int = 2, width: int = 32, tokens: int = 11, length: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "wte.weight": (tokens, width),
        "wpe.weight": (length, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for number in range(layers):
        block = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,)}
        for name, (a, b) in {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
                             "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}.items():  # fmt: skip
            block |= {f"{name}.weight": (a, b), f"{name}.bias": (b,)}
        shapes |= {f"h.{number}.{name}": shape for name, shape in block.items()}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def reference_logits(weights: dict[str, np.ndarray], tokens: list[int], heads: int) -> np.ndarray:
    """Return GPT-2's logits for one row, computed from the published arrays, where a layer is x @ W + b."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    def layer(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][tokens].astype(np.float64) + weights["wpe.weight"][: len(tokens)]
    for number in range(2):
        block = f"h.{number}"
        qkv = np.split(layer(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=1)
        attended = []
        for q, k, v in zip(*(np.split(array, heads, axis=1) for array in qkv), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[1]) + np.triu(np.full((len(x), len(x)), -1e30), 1)
            scores = np.exp(scores - scores.max(1, keepdims=True))
            attended.append(scores / scores.sum(1, keepdims=True) @ v)
        x = x + layer(np.concatenate(attended, 1), f"{block}.attn.c_proj")
        hidden = layer(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + layer(hidden, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_init_from_gpt2_gives_the_logits_of_the_reference(prefix, suffix, tmp_path):
    arrays, path = gpt2_arrays(), tmp_path / f"model{suffix}"
    written = {prefix + name: array for name, array in arrays.items()}
    written |= {
        f"{prefix}h.0.attn.bias": np.ones((1, 1, 40, 40), np.float32),
        f"{prefix}h.1.attn.masked_bias": np.ones(1, np.float32),
    }
    if prefix:
        written["lm_head.weight"] = arrays["wte.weight"]
    if suffix == ".bin":
        torch.save({name: torch.from_numpy(array) for name, array in written.items()}, path)
    else:
        write_safetensors(path, written)
    model = GPT(11 + 3, 20, 2, 4, 32, 0.0, 0).eval()
    initial = model.wte.weight.detach().clone()
    net.init_from_gpt2(model, path, 3)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    assert torch.equal(model.wte.weight[11:], initial[11:])  # pause tokens keep their initial embedding
    logits = model.double()(torch.tensor([tokens]), 8)[0][0, :, :11]  # float32 could not detect another GELU
    expected = reference_logits({name: array.astype(np.float64) for name, array in arrays.items()}, tokens, 4)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-7, atol=1e-8)


def damaged(arrays: dict[str, np.ndarray], damage: str) -> dict[str, np.ndarray]:
    if damage == "untied head":
        return arrays | {"lm_head.weight": arrays["wte.weight"] + 1}
    if damage == "transposed":
        return arrays | {"h.0.mlp.c_fc.weight": arrays["h.0.mlp.c_fc.weight"].T}
    if damage == "too many tokens":
        return arrays | {"wte.weight": np.zeros((12, 32), np.float32)}
    return {name: array for name, array in arrays.items() if name != damage.removeprefix("no ")}


@pytest.mark.parametrize(
    ("damage", "message"),
    [("untied head", "not tied"), ("no wte.weight", "no wte.weight): give Hugging Face"),
     ("transposed", "h.0.mlp.c_fc.weight"), ("too many tokens", "12 tokens instead of 11"),
     ("no wpe.weight", "1 of its 28 tensors are missing, first wpe.weight"), ("no h.1.ln_2.bias", "h.1.ln_2.bias")],
)  # fmt: skip
def test_a_file_with_other_tensors_than_gpt2_exits_with_code_2(damage, message, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    arrays = damaged(gpt2_arrays(), damage)
    write_safetensors(path, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with pytest.raises(SystemExit) as end:
        net.init_from_gpt2(GPT(14, 20, 2, 4, 32, 0.0, 0), path, 3)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.safetensors", "none.bin", "junk.safetensors", "junk.bin"])
def test_an_unreadable_weight_file_exits_with_its_name(name, tmp_path, capsys):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.bin").write_bytes(b"junk")
    with pytest.raises(SystemExit) as end:
        net.read_gpt2(tmp_path / name)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and name in printed and printed.count("\n") == 1


def test_symbols_map_to_gpt2_tokens_followed_by_the_pause_tokens():
    """In GPT-2's byte-pair vocabulary " 0" is 657, " *" is 1635 and end-of-text is 50256."""
    task = tasks.build_task("multiplication", 4)
    size, table = train.vocabulary(argparse.Namespace(init_from="model.safetensors"), task)
    assert size == 50260
    expected = {
        "0": 657,
        "1": 352,
        "2": 362,
        "9": 860,
        "*": 1635,
        "=": 50256,
        tasks.PAUSES[0]: 50257,
        tasks.PAUSES[2]: 50259,
    }
    assert {symbol: table[task.symbols.index(symbol)].item() for symbol in expected} == expected
    args = argparse.Namespace(pause=2, init_from="model.safetensors", chain_of_thought=False)
    rows = train.encode(args, task, task.draw(torch.Generator(), 3, "cpu", True))
    assert rows.dtype == torch.int32 and rows[:, 10:14].tolist() == [[50257, 50258, 50258, 50259]] * 3


def test_teacher_forced_equals_greedy_exact_match():
    """The network is trained for 60 steps on 40 rows, so that some of its answers are correct."""
    model, rows = network(width=32)[0].gpt, some_rows(40)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(rows[:, :-1], 4)[0].flatten(0, 1), rows[:, -4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    forced = train.token_correct(model, rows, 4)
    generated = rows[:, :-4]
    with torch.no_grad():
        for _ in range(4):
            generated = torch.cat([generated, model(generated, 1)[0].argmax(2)], 1)
    greedy = generated[:, -4:] == rows[:, -4:]
    assert torch.equal(forced.all(1), greedy.all(1)) and 0 < forced.all(1).float().mean() < 1
    assert forced.float().mean() >= greedy.float().mean()


def test_a_chain_of_thought_is_learnt_before_the_product(tmp_path, monkeypatch):
    """The targets are the chain and the product; only the product's positions are reported."""
    folder, flags = tmp_path / "run", ["--chain-of-thought", "--pause", "0", "--lambda1", "0", "--lambda2", "0"]
    train.main(tiny(folder, "--steps", "5", *flags))
    monkeypatch.setattr(evaluate, "N_PROBE", 256)
    evaluate.main([str(folder)])
    metrics = json.loads((folder / "metrics.json").read_text())
    args = train.parse_args(tiny(folder, *flags))
    task = tasks.build_task("multiplication", 2)
    length = train.answer_length(args, task)
    assert length == 4 + 9  # 3 digits, +, 0 and 3 digits, ####
    rows = train.encode(args, task, tasks.load(task, 600, None, "cpu").test)
    model = train.build_model(args, task, torch.device("cpu"))
    model.load_state_dict(checkpoints.load(folder / "model.pt")["model"])
    correct = train.token_correct(model.gpt, rows, length).float()
    assert metrics["exact_match"] == pytest.approx(100 * correct.prod(1).mean().item())
    for name in ("position_accuracy", "digit_accuracy", "test_cross_entropy"):  # easy after a given chain
        assert metrics[name] is None
    assert "accuracy_0" not in files.read_lines(folder / "train.jsonl")[-1]
    evaluate.main([str(folder), "--show", "2"])


def test_clipped_steps_are_counted(tmp_path, monkeypatch):
    for limit, share in ((1e-9, 1.0), (1e9, 0.0)):
        monkeypatch.setattr(train, "MAX_GRAD_NORM", limit)
        train.main(tiny(tmp_path / str(limit), "--steps", "5"))
        assert files.read_lines(tmp_path / str(limit) / "train.jsonl")[-1]["clipped_fraction"] == share


# ---------------------------------------------------------------------------------------------- arms


def resolved(scale: str, flags: list[str]) -> str:
    """Return the resolved arguments as JSON."""
    init = ["--init-from", "none"] if scale == "paper" else []
    return json.dumps(vars(train.parse_args(["--scale", scale, *init, *flags])), default=str)


@pytest.mark.parametrize("scale", ["demo", "gpu", "paper"])
def test_no_two_arms_resolve_to_equal_arguments(scale):
    """At paper scale only the first two studies: its default level is the last, so some arms of extras equal base."""
    arms, studies = DESIGNS[scale]
    if scale == "paper":
        contrasts = [contrast for study in list(studies)[:2] for contrast in studies[study]]
        arms = {arm: arms[arm] for contrast in contrasts for arm in contrast.split(":")}
    assert len({resolved(scale, flags) for flags in arms.values()}) == len(arms)


@pytest.mark.parametrize(("scale", "settings"), [("demo", ("2x2", "2x2-128")), ("gpu", ("4x4", "arithmetic")),
                                                 ("paper", ("5x5", "4x4"))])  # fmt: skip
def test_the_studies_have_six_coefficient_pairs_per_setting_and_four_projection_widths(scale, settings):
    arms, studies = DESIGNS[scale]
    pairs = {(0.5, 0.002), (1, 0.004), (2, 0.008), (0.05, 0.25), (0.1, 0.5), (0.2, 1)}
    compared = [contrast.split(":")[0] for contrast in studies["seqvcr-coefficients"]]
    for setting in settings:
        names = {arm for arm in compared if arm.endswith(f"@{setting}")}
        references = {contrast.split(":")[1] for contrast in studies["seqvcr-coefficients"][2:]}
        assert {reference.partition("@")[0] for reference in references} == {"off"}
        arguments = [json.loads(resolved(scale, arms[arm])) for arm in names]
        assert len(names) == 6 and {(args["lambda1"], args["lambda2"]) for args in arguments} == pairs
        batch = 128 if setting in ("2x2-128", "arithmetic") else 32
        assert {args["covariance_batch"] for args in arguments} == {batch}
    primary = [studies["seqvcr-coefficients"][number].replace(f"@{name}", "") for number, name in enumerate(settings)]
    second = {"demo": "base:0.1-0.5", "gpu": "1-0.004:base", "paper": "0.1-0.5:base"}[scale]
    assert primary == ["0.1-0.5:base", second]  # the other family against the paper's pair of the setting
    widths = {arm for contrast in studies["seqvcr-projection-width"] for arm in contrast.split(":")}
    widths -= {f"off@{settings[0]}"}
    assert {json.loads(resolved(scale, arms[arm]))["projection_width"] for arm in widths} == {512, 1024, 2048, 4096}
    assert studies["seqvcr-projection-width"][0] == f"width-4096@{settings[0]}:width-512@{settings[0]}"


def test_all_flags_are_used():
    source = (ROOT / "seqvcr/train.py").read_text()
    read = set(re.findall(r"args\.(\w+)", source[source.index("class SeqVCR") :]))  # parse_args is above it
    assert read | {"data", *READ_BY_COMMON} >= set(vars(train.parse_args([])))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "3"], "invalid --layer '3' with --layers 2: give 0 to 2, or last"),
        (["--layer", "first"], "invalid --layer 'first'"),
        (["--width", "65"], "multiple of --heads 4: give --heads 1"),
        (["--batch", "100"], "multiple of --covariance-batch 32: change --batch"),
        (["--batch", "1"], "less than 2"),
        (["--size", "1", "--data-seed", "5", "--batch", "32"], "give a larger --size"),
        (["--width", "1", "--heads", "1"], "1 is less than 2"),
        (["--batch", "2", "--covariance-batch", "2", "--rehearse", "1"], "has 2 rows for validation or test, too few"),
        (["--size", "10"], "invalid --size 10 for the task multiplication: give 1 to 9"),
        (["--task", "lis", "--size", "1"], "give 2 to 200"),
        (["--task", "arithmetic", "--data-file", "x"], "--data-file requires --task multiplication, not arithmetic"),
        (["--task", "lis", "--init-from", "x"], "--init-from requires --task multiplication, not lis"),
        (["--task", "lis", "--chain-of-thought"], "--chain-of-thought requires --task multiplication, not lis"),
        (["--init-from", "x", "--chain-of-thought"], "drop --init-from or --chain-of-thought"),
        (["--scale", "paper", "--chain-of-thought", "--init-from", "none", "--device", "cuda:9"], "--device cuda:9"),
        (["--data-file", "nowhere.txt"], "--data-file nowhere.txt does not exist: give"),
        (["--data-file", "x", "--train-size", "stream"], "drop --train-size stream"),
        (["--init-from", "nowhere.bin", "--heads", "1"], "--init-from nowhere.bin does not exist: give"),
        (["--scale", "paper", "--device", "cpu"], "--init-from model.safetensors"),
        (["--train-size", "some"], "--train-size"),
        (["--train-size", "64"], "--batch 128 is larger than the training set (64 examples): give at most 64"),
        (["--lambda1", "nan"], "nan is not between 0 and 1e+30"),
        (["--scale", "gpu"], "train at scale demo"),
    ],
)
def test_a_usage_error_exits_with_one_line(flags, message, tmp_path, capsys):
    assert_usage_error(train.main, flags, message, tmp_path, capsys)


# ---------------------------------------------------------------------------------------------- runs


def tiny(out, *flags) -> list[str]:
    small = ["--width", "16", "--steps", "20", "--batch", "128", "--train-size", "600", "--device", "cpu"]
    return [*small, "--out", str(out), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run all arms for five steps at a small width and evaluate them on few rows. Returns the folder of runs."""
    root = tmp_path_factory.mktemp("seqvcr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "N_PROBE", 256)
        for arm, flags in ARMS.items():
            train.main(tiny(root / arm / "0", "--steps", "5", *flags))
            evaluate.main([str(root / arm / "0")])
    return root


def test_all_arms_end_with_different_weights(finished):
    weights = {arm: checkpoints.load(finished / arm / "0/model.pt")["model"]["gpt.wte.weight"] for arm in ARMS}
    for arm, other in itertools.combinations(weights, 2):
        level_of_entropy = {arm, other} == {"off@2x2", "off-level-0@2x2"}  # without regulariser it is only evaluated
        assert torch.equal(weights[arm], weights[other]) is level_of_entropy, (arm, other)


def test_arms_with_equal_seeds_have_equal_initial_weights_and_batches(monkeypatch, tmp_path):
    by_arm = {}
    for arm in ("off@2x2", "base@2x2", "width-512@2x2", "0.1-0.5@2x2-128"):
        rows: list[torch.Tensor] = []

        def recorded(model, tokens, rows=rows, **rest):
            rows.append(tokens)
            return seqvcr_loss(model, tokens, **rest)

        monkeypatch.setattr(train, "seqvcr_loss", recorded)
        train.main(tiny(tmp_path / arm, "--steps", "4", *ARMS[arm]))
        args = train.parse_args(tiny(tmp_path, *ARMS[arm]))
        model = train.build_model(args, tasks.build_task("multiplication", 2), torch.device("cpu"))
        by_arm[arm] = (torch.stack(rows), model.gpt.h[1].mlp.c_fc.weight, model.gpt.wte.weight)
    for tensors in by_arm.values():
        assert all(torch.equal(*pair) for pair in zip(tensors, by_arm["off@2x2"], strict=True))


@pytest.mark.parametrize("width", [16, 30])
def test_networks_with_more_tokens_and_positions_have_equal_initial_weights_in_the_shared_part(width):
    small, large = (GPT(tokens, length, 2, 2, width, 0.0, 0).state_dict() for tokens, length in ((11, 16), (14, 20)))
    for name, weight in small.items():
        assert torch.equal(weight, large[name][: len(weight)]), name
    assert not torch.equal(large["wpe.weight"][0], large["wpe.weight"][1])
    assert large["wte.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_metrics_json_and_train_jsonl_have_all_keys(finished):
    keys = "exact_match steps_to_solve position_accuracy entropy entropy_mean entropy_min entropy_batch solved "
    keys += "variance_loss covariance_loss projected_std predicted_std chance_exact_match entropy_centred "
    keys += "seconds examples_per_second peak_memory cross_entropy train_loss digit_accuracy regulariser_loss"
    for arm in ARMS:
        metrics = json.loads((finished / arm / "0/metrics.json").read_text())
        assert set(keys.split()) <= set(metrics), arm
        assert len(metrics["position_accuracy"]) == 4 and len(metrics["entropy"]) == len(metrics["entropy_batch"]) == 3
        assert all(0 < value <= 1 for name in ("entropy", "entropy_batch") for value in metrics[name])
        assert metrics["solved"] is False and metrics["steps_to_solve"] is None
        off, length = arm.startswith(("off", "chain")), "length" in arm
        assert (metrics["projected_std"] is None) == off, arm
        assert (metrics["predicted_std"] is None) == (off or length), arm
        last = files.read_lines(finished / arm / "0/train.jsonl")[-1]
        assert ({"variance_loss", "covariance_loss", "projected_std"} & set(last) == set()) == off, arm
    log = files.read_lines(finished / "base@2x2/0/train.jsonl")
    assert [line["epoch"] for line in log] == list(range(6)) and log[-1]["step"] == 5
    assert {f"accuracy_{position}" for position in range(4)} <= set(log[-1])


def test_metrics_equal_a_naive_evaluation_of_model_pt(finished):
    """Exact match, position accuracy, chance level and terms of the regulariser on the test rows."""
    folder = finished / "width-512@2x2/0"
    metrics = json.loads((folder / "metrics.json").read_text())
    args = train.parse_args(tiny("x", *ARMS["width-512@2x2"]))
    task = tasks.build_task("multiplication", 2)
    data = tasks.load(task, 600, None, "cpu")
    model = train.build_model(args, task, torch.device("cpu")).eval()
    model.load_state_dict(checkpoints.load(folder / "model.pt")["model"])
    rows = tasks.with_pauses(task, data.test, 2).long()
    with torch.no_grad():
        predicted = torch.stack([model.gpt(row[None, :-1], 13)[0][0, -4:].argmax(1) for row in rows])
        states = model.gpt(rows[:, :-1], 4)[1][args.layer]
        correct = (predicted == rows[:, -4:]).float()
        variance, covariance = direct(states[:256].double(), model.projection.weight.double(), 32, "batch")
    assert metrics["exact_match"] == pytest.approx(100 * correct.prod(1).mean().item())
    assert metrics["position_accuracy"] == pytest.approx((100 * correct.mean(0)).tolist())
    assert metrics["variance_loss"] == pytest.approx(variance.item(), rel=1e-4)
    assert metrics["covariance_loss"] == pytest.approx(covariance.item(), rel=1e-3)
    answers = [tuple(row) for row in data.train[:, -4:].tolist()]
    most_frequent = max(set(answers), key=lambda answer: (answers.count(answer), [-x for x in answer]))
    chance = 100 * np.mean([tuple(row) == most_frequent for row in data.test[:, -4:].tolist()])
    assert metrics["chance_exact_match"] == pytest.approx(chance)
    with torch.no_grad():
        log_p = model.gpt(rows[:, :-1], 4)[0].log_softmax(2)
    losses = [-log_p[row, i, rows[row, 10 + i]].item() for row in range(len(rows)) for i in range(4)]
    assert metrics["test_cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--dropout", "0.2"], ["--train-size", "stream"]])
def test_a_resumed_run_is_bit_identical_and_another_seed_gives_other_weights(flags, tmp_path, monkeypatch):
    train.main(tiny(tmp_path / "uninterrupted", *flags))
    saved, save = [], train.Run.save

    def interrupted(run, epoch, metrics, state):
        save(run, epoch, metrics, state)
        saved.append(epoch)
        if epoch == 7 and saved.count(7) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny(tmp_path / "run", *flags))
    train.main(tiny(tmp_path / "run", *flags))
    expected = checkpoints.load(tmp_path / "uninterrupted/model.pt")["model"]
    resumed = checkpoints.load(tmp_path / "run/model.pt")["model"]
    assert saved[:8] == list(range(8)) and saved[8] == 8
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    train.main(tiny(tmp_path / "other", "--seed", "1", *flags))
    other = checkpoints.load(tmp_path / "other/model.pt")["model"]
    assert not torch.equal(other["gpt.wte.weight"], expected["gpt.wte.weight"])


def test_a_run_with_the_covariance_loss_only_is_evaluated(tmp_path):
    """The predicted standard deviation is 0 then. The share of clipped steps is that of the whole training."""
    out = tmp_path / "run"
    train.main(tiny(out, "--steps", "30", "--lambda1", "0", "--lambda2", "0.004", "--covariance-batch", "32"))
    lines = files.read_lines(out / "train.jsonl")
    for line in lines[1:]:
        line["clipped_fraction"] = float(line["step"] <= 5)  # epochs of different lengths
    files.write_text(out / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main([str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["predicted_std"] == 0 and metrics["std_to_predicted"] is None
    assert metrics["clipped_fraction"] == pytest.approx(max(x["step"] for x in lines[1:] if x["step"] <= 5) / 30)


def test_the_rank_at_the_last_level_is_below_the_width():
    args = train.parse_args(["--width", "8", "--covariance-batch", "32", "--projection-width", "64"])
    task = tasks.build_task("multiplication", 2)
    model = train.build_model(args, task, torch.device("cpu"))
    rows = train.encode(args, task, tasks.load(task, 64, None, "cpu").train)
    for layer, width in ((args.layers, 7), (1, 8)):
        metrics = evaluate.regulariser_metrics(
            model, rows, task.answer, argparse.Namespace(**vars(args) | {"layer": layer})
        )
        rank = evaluate.rank_bounds(rows[:, :-1], 32, width, layer)
        expected = evaluate.predict_minimum(rank, 64, args.lambda1, args.lambda2)[1].mean().item()
        assert metrics["predicted_loss"] == pytest.approx(expected) and metrics["regulariser_loss"] >= expected


@pytest.mark.slow
def test_streamed_rows_are_new_at_each_step(tmp_path, monkeypatch):
    batches = []

    def recorded(model, tokens, **rest):
        batches.append(tokens)
        return seqvcr_loss(model, tokens, **rest)

    monkeypatch.setattr(train, "seqvcr_loss", recorded)
    train.main(tiny(tmp_path / "run", "--train-size", "stream", "--steps", "3", "--task", "arithmetic", "--size", "4"))
    assert len(batches) == 3 and not any(torch.equal(*pair) for pair in itertools.combinations(batches, 2))


def test_the_most_frequent_answer_of_a_stream_is_that_of_training_rows(tmp_path, monkeypatch):
    """Not that of the rows on which it is scored, which --held-out takes from the validation split."""
    monkeypatch.setattr(tasks, "ROWS_PER_DRAW", 1 << 15)
    monkeypatch.setattr(evaluate, "N_PROBE", 32)
    flags = ["--train-size", "stream", "--task", "lis", "--size", "6", "--width", "8", "--heads", "1"]
    train.main([*flags, "--rehearse", "1", "--device", "cpu", "--out", str(tmp_path)])
    evaluate.main([str(tmp_path), "--held-out"])
    task = tasks.build_task("lis", 6)
    task.eval_rows = 128
    answers = tasks.load(task, 0, None, "cpu").validation[:, -1]
    most_frequent = tasks.stream(task, 0, 0, 10_000, "cpu")[:, -1].mode().values
    assert most_frequent != answers.mode().values
    expected = 100 * (answers == most_frequent).float().mean().item()
    assert json.loads((tmp_path / "held_out.json").read_text())["chance_exact_match"] == pytest.approx(expected)


def test_each_pass_over_the_data_yields_all_rows_once_in_a_new_order():
    args, task = argparse.Namespace(train_size=18, batch=4, seed=0), tasks.build_task("multiplication", 2)

    def batches(count: int, start: int, stop: int) -> torch.Tensor:
        rows = torch.arange(count, dtype=torch.uint8)[:, None]
        return torch.stack(list(train.batches(args, task, rows, range(start, stop))))

    two_passes = batches(16, 0, 8)
    passes = [one_pass.flatten().tolist() for one_pass in two_passes.split(4)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(16)) and passes[0] != passes[1]
    for start, stop in ((5, 8), (3, 6), (2, 3)):  # an epoch can begin in the middle of a pass
        assert torch.equal(batches(16, start, stop), two_passes[start:stop])
    assert two_passes.dtype == torch.int64
    # Of 18 rows, each pass drops the last incomplete batch of two.
    assert all(len(one_pass.unique()) == 16 for one_pass in batches(18, 0, 8).split(4))


def test_lr_schedule_warms_up_linearly_and_decays_to_zero():
    assert train.lr_schedule(0.0) == 0 and train.lr_schedule(0.025) == pytest.approx(0.5)
    assert train.lr_schedule(0.05) == pytest.approx(1)
    assert train.lr_schedule(0.525) == pytest.approx(0.5) and train.lr_schedule(1.0) == pytest.approx(0)


def test_the_projection_has_no_weight_decay():
    model, _ = network()
    groups = train.build_optimizer(argparse.Namespace(lr=1e-3), model).param_groups
    assert groups[1]["weight_decay"] == 0 and groups[1]["params"][0] is model.projection.weight
    assert groups[0]["weight_decay"] > 0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_run_with_nan_loss_finishes_as_diverged_with_null_metrics(tmp_path, monkeypatch):
    calls = []

    def nan_in_step_9(*arguments, **rest):
        calls.append(1)
        loss, log = seqvcr_loss(*arguments, **rest)
        return (loss * float("nan"), log * float("nan")) if len(calls) == 9 else (loss, log)

    monkeypatch.setattr(train, "seqvcr_loss", nan_in_step_9)
    train.main(tiny(tmp_path / "run"))
    evaluate.main([str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["diverged"] and metrics["exact_match"] is None and metrics["entropy"] is None
    assert checkpoints.load(tmp_path / "run/model.pt")["epoch"] == 8


@pytest.mark.slow
def test_all_arms_of_gpu_scale_train_two_steps_and_are_evaluated(no_checkpoints, tmp_path, monkeypatch):
    """At full width with two of the five blocks. Each combination of task, layer and projection is evaluated once."""
    monkeypatch.setattr(tasks, "ROWS_PER_DRAW", 4096)
    done, evaluated = set(), set()
    for arm, flags in DESIGNS["gpu"][0].items():
        small = ["--batch", "4", "--covariance-batch", "4", "--train-size", "40", "--layers", "2"]
        argv = ["--scale", "gpu", "--device", "cpu", "--rehearse", "1", *flags, *small, "--out", str(tmp_path / arm)]
        arguments = {name: value for name, value in vars(train.parse_args(argv)).items() if name != "out"}
        arguments_text = json.dumps(arguments, default=str)
        if arguments_text in done:  # an arm that differs only in --covariance-batch, which is overridden here
            continue
        done.add(arguments_text)
        train.main(argv)
        saved = checkpoints.load(tmp_path / arm / "model.pt")
        assert saved["epoch"] == 2 and saved["model"]["gpt.h.1.mlp.c_fc.weight"].shape == (2048, 512)
        shape = tuple(saved["arguments"][name] for name in ("task", "layer", "projection_width"))
        if shape not in evaluated:
            evaluated.add(shape)
            evaluate.main([str(tmp_path / arm)])
            assert json.loads((tmp_path / arm / "metrics.json").read_text())["exact_match"] is not None
        shutil.rmtree(tmp_path / arm)
    assert len(done) > 20


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return (file, weights): random weights with GPT-2's names, vocabulary and width, two blocks."""
    file = tmp_path_factory.mktemp("gpt2") / "model.safetensors"
    weights = {name: 0.1 * array for name, array in gpt2_arrays(2, 768, train.GPT2_VOCABULARY, 1024).items()}
    write_safetensors(file, weights)
    return file, weights


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["base@5x5", "off@5x5", "0.05-0.25@4x4", "width-4096@5x5"])
def test_paper_scale_fine_tunes_gpt2(arm, gpt2, no_checkpoints, tmp_path, monkeypatch):
    """With GPT-2's width, vocabulary and positions, and two of its twelve blocks."""
    monkeypatch.setattr(tasks, "ROWS_PER_DRAW", 4096)
    file, weights = gpt2
    argv = ["--scale", "paper", "--device", "cpu", "--rehearse", "1", *DESIGNS["paper"][0][arm], "--layers", "2"]
    argv += ["--batch", "4", "--covariance-batch", "4", "--train-size", "40"]
    train.main([*argv, "--init-from", str(file), "--out", str(tmp_path / "run")])
    saved = checkpoints.load(tmp_path / "run/model.pt")["model"]
    assert saved["gpt.wte.weight"].shape == (50260, 768)
    change = (saved["gpt.h.0.attn.c_proj.weight"] - torch.from_numpy(weights["h.0.attn.c_proj.weight"].T)).abs().mean()
    assert 0 < change < 0.01
    evaluate.main([str(tmp_path / "run"), "--show", "2"])


def test_training_from_a_data_file_and_evaluation_with_a_changed_file_exits_with_code_2(tmp_path, capsys):
    lines = [tasks.published_line(a, b, 2) for a in range(10, 60) for b in range(10, 50)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    flags = ["--data-file", str(tmp_path / "train.txt"), "--train-size", "2000"]
    train.main(tiny(tmp_path / "run", *flags))
    evaluate.main([str(tmp_path / "run"), "--show", "3"])
    printed = capsys.readouterr().out
    assert "2000 distinct rows" in printed and "belong to the validation or test split" in printed
    assert len(re.findall(r"^\d\d \* \d\d = \d{4} ", printed, flags=re.M)) == 3
    (tmp_path / "train.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run")])
    assert end.value.code == 2 and "differ from the training data" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{\n{}\n", '{"loss": 1}\n'])
def test_a_damaged_train_jsonl_exits_with_one_line(content, finished, tmp_path, capsys):
    shutil.copytree(finished / "base@2x2/0", tmp_path / "run")
    (tmp_path / "run/train.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "train.jsonl" in printed and f"move {tmp_path / 'run'} away and train" in printed


@pytest.mark.parametrize(
    "arm", ["off@2x2", "base@2x2", "0.1-0.5@2x2-128", "level-last-batch-length@2x2", "level-1@2x2"]
)
def test_training_and_evaluation_stay_on_a_fake_gpu(arm, fake_gpu: FakeGPU):
    device = torch.device("cuda")
    args = train.parse_args(["--width", "16", "--dropout", "0.1", *ARMS[arm]])
    task = tasks.build_task(args.task, args.size)
    model = train.build_model(args, task, device)
    rows = torch.zeros(512, 14, dtype=torch.uint8, device=device)
    data = tasks.Splits(rows, rows, rows)
    syncs = []
    for steps_per_epoch in (2, 4):
        fake_gpu.syncs, args.rehearse = 0, steps_per_epoch
        train.train(args, FakeRun(), model, task, data, torch.optim.AdamW(model.parameters(), 1e-3))
        syncs.append(fake_gpu.syncs)
    assert syncs[0] == syncs[1] > 0  # none per step


@pytest.mark.parametrize(("name", "size"), [("multiplication", 4), ("arithmetic", 3), ("lis", 8)])
def test_streamed_batches_stay_on_a_fake_gpu(name, size, fake_gpu: FakeGPU):
    task = tasks.build_task(name, size)
    init = "model.safetensors" if name == "multiplication" else None
    args = argparse.Namespace(
        pause=2, init_from=init, chain_of_thought=False, train_size=train.STREAM, batch=32, seed=0
    )
    rows = torch.zeros(0, task.question + task.answer, dtype=torch.uint8, device=torch.device("cuda"))
    for tokens in train.batches(args, task, rows, range(3, 5)):
        assert tokens.device.type == "cuda" and tokens.shape == (32, task.question + 4 + task.answer)
    assert not fake_gpu.syncs


def test_entropies_stay_on_a_fake_gpu(fake_gpu: FakeGPU):
    h = torch.zeros(8, 5, 16, device="cuda")
    for entropy in (evaluate.token_entropy(h), evaluate.centred_entropy(h), evaluate.batch_entropy(h)):
        assert entropy.device.type == "cuda" and entropy.dtype == DOUBLE


# ---------------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_plot_writes_figures_and_summary_of_each_study(finished, tmp_path, capsys):
    for study in ("seqvcr-coefficients", "seqvcr-projection-width", "seqvcr-level"):
        plot.main([study, "--runs", str(finished), "--seeds", "0", "1", "--results", str(tmp_path)])
        summary = json.loads((tmp_path / f"{study}.json").read_text())
        figures = {path.stem.removeprefix(f"{study}-") for path in tmp_path.glob(f"{study}-*.png")}
        expected = {"differences", "summary", "curves", "entropy", "metrics", "positions", "prediction", "solved"}
        if "width" in study:
            expected.add("width")
        assert figures == expected and all(row["remark"] == "0 of 1 solved" for row in summary["rows"])
        assert summary["baselines"] and all(baseline["arm_mean"] is not None for baseline in summary["baselines"])
        assert any("1 of 2 missing (seed 1)" in note for note in summary["notes"]) and not summary["not_run"]
    summary = json.loads((tmp_path / "seqvcr-coefficients.json").read_text())
    primary = [contrast["arm"] for contrast in summary["contrasts"] if contrast["primary"]]
    assert primary == ["0.1-0.5@2x2", "base@2x2-128"]
    assert "Second metric: batch entropy at the arm's own level of 0.1-0.5@2x2: " in summary["remark"]
    text = tables.as_markdown(summary)
    assert text.count("| off@2x2 |") == 2 and "**2x2-128**" in text
    svg = (tmp_path / "seqvcr-coefficients-entropy.svg").read_text()
    assert "λ 0.05, 0.25" in svg and "level" in svg
    assert "2048" in (tmp_path / "seqvcr-projection-width-width.svg").read_text()


def test_the_caption_lists_all_numbers_of_steps():
    arguments = {"task": "multiplication", "size": 2, "layers": 2, "width": 64, "batch": 128}
    runs = {
        str(steps): {0: results.RunFiles({}, {"arguments": arguments | {"steps": steps}}, [])} for steps in (5000, 2500)
    }
    assert plot.describe(runs) == "2x2 digits, 2 blocks of width 64, 2500 and 5000 steps, batch size 128"


def test_plot_lists_missing_runs_of_an_unfinished_study(finished, tmp_path, capsys):
    for arm in ("base@2x2", "off@2x2"):
        (tmp_path / arm / "0").mkdir(parents=True)
        shutil.copy(finished / arm / "0/args.json", tmp_path / arm / "0")
        first = (finished / arm / "0/train.jsonl").read_text().splitlines(keepends=True)[0]
        (tmp_path / arm / "0/train.jsonl").write_text(first)
    flags = ["--runs", str(tmp_path), "--seeds", "0", "--results", str(tmp_path / "r")]
    plot.main(["seqvcr-coefficients", *flags])
    summary = json.loads((tmp_path / "r/seqvcr-coefficients.json").read_text())
    assert "base@2x2: 1 of 1 missing (seed 0)." in summary["notes"]
    assert [contrast["arm"] for contrast in summary["contrasts"]] == ["0.1-0.5@2x2", "base@2x2-128", "base@2x2"]
    assert "0.5-0.002@2x2" in summary["not_run"]
    assert (tmp_path / "r/seqvcr-coefficients-solved.png").exists()


def test_plot_draws_nothing_without_runs_and_count_solved_counts_seeds(tmp_path, capsys):
    plot.main(["seqvcr-level", "--runs", str(tmp_path), "--results", str(tmp_path / "r")])
    assert "no finished runs" in capsys.readouterr().out and not (tmp_path / "r").exists()
    assert plot.count_solved([{"solved": True}, {"solved": False}, {"solved": True}]) == "2 of 3 solved"
