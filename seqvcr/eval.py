"""Evaluate a Seq-VCR run (accuracy, entropies, terms of the regulariser) and write metrics.json.

    python seqvcr/eval.py runs/scratch                # a finished run of train.py
    python seqvcr/eval.py runs/scratch --show 10      # print test questions and the network's answers

Metrics are measured on test rows without dropout, except `cross_entropy` and `train_loss` (training, last epoch),
`clipped_fraction` (all training steps) and `steps_to_solve` (validation rows). Level 0 is the embeddings; level l <
--layers is the output of block l; the last level (= --layers) is after the final LayerNorm. Only `variance_loss`,
`covariance_loss`, `projected_std` and `regulariser_loss` use the projection. Answers and chains of thought are
teacher-forced.

exact_match           % of rows whose answer tokens are all correct, with --chain-of-thought the whole chain, too.
                      Greedy decoding gives the same number.
position_accuracy     accuracy (%) of each answer token, usually above that of greedy decoding; digit_accuracy is the
                      mean. null with --chain-of-thought.
test_cross_entropy    cross entropy (nats) of the answer tokens. null with --chain-of-thought.
chance_exact_match    exact match of always giving the most frequent training answer, with --train-size stream that of
                      a sample
entropy               entropy of the hidden states Z (T, D) of a sequence: -sum p_i log p_i, p_i = eigenvalues of Z Z^T
                      divided by their sum (equation 2), divided by log(min(T, D)); mean over sequences; one per level
entropy_mean, _min    its mean over all levels; its minimum over the levels between the first and the last
entropy_centred       the same with hidden states centred over the tokens and scaled to norm 1
entropy_batch         the same over the batch at each position, with centred rows: the axis on which the loss acts
entropy_batch_level   entropy_batch at the regularised level
predicted_std         standard deviation of W h at the minimum of the regulariser, given the rank (`predict_minimum`)
std_to_predicted      projected_std / predicted_std
"""

import argparse
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices
from common.cli import fail
from common.lock import run_lock
from common.run import load_finished, read_log, write_metrics
from seqvcr import tasks
from seqvcr.net import GPT
from seqvcr.train import (
    ETA,
    STREAM,
    SeqVCR,
    answer_length,
    build_model,
    encode,
    token_correct,
    variance_covariance,
    vocabulary,
)

SOLVED = 90.0  # exact match (%) from which a run counts as solved
ENTROPY_BATCH = 256  # sequences per entropy_batch
N_PROBE = 1024  # test rows for entropies and regulariser
STREAM_SAMPLE = 10_000  # training rows for chance_exact_match with --train-size stream
METRICS_IF_FINITE = (  # null in a diverged run
    "exact_match", "solved", "steps_to_solve", "position_accuracy", "digit_accuracy",
    "entropy", "entropy_mean", "entropy_min", "entropy_centred", "entropy_batch", "entropy_batch_level",
    "variance_loss", "covariance_loss", "projected_std", "regulariser_loss", "predicted_std", "predicted_loss",
    "std_to_predicted", "train_loss", "cross_entropy", "test_cross_entropy", "clipped_fraction",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.eval_parser(__doc__, "not needed, because the tasks are generated")
    parser.add_argument("--data-file", type=Path, help="new path of the training rows; default: as in training")
    parser.add_argument("--held-out", action="store_true", help="evaluate on the validation split, for tuning")
    parser.add_argument("--alpha", type=cli.float_in(0.5, 10), default=1.0, help="order of the entropies, 0.5 to 10 "
                        "(float64 is too coarse for others); paper: 1. Other orders are written to "
                        "metrics-alpha-ALPHA.json")  # fmt: skip
    parser.add_argument("--show", type=cli.int_in(1), metavar="N", help="print N answers and write nothing")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- entropy


def spectral_entropy(z: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the Renyi entropy (nats) of the eigenvalues of z z^T, scaled to sum 1: (...) float64 for z (..., n, m).

    For order `alpha` = 1 it is -sum p log p, else log(sum p^alpha) / (1 - alpha). It is 0 for a zero matrix.
    """
    z = z.double()
    gram = z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    p = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    if alpha == 1:
        return torch.special.entr(p).sum(-1)
    powers = torch.where(p > 0, p.clamp_min(torch.finfo(z.dtype).tiny) ** alpha, 0).sum(-1)
    return torch.where(powers > 0, powers.log() / (1 - alpha), 0)


def token_entropy(h: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the normalised entropy over the tokens of each sequence (equation 2), (B,) in [0, 1], for h (B, T, D)."""
    return spectral_entropy(h, alpha) / math.log(min(h.shape[1:]))


def centred_entropy(h: Tensor, alpha: float = 1.0) -> Tensor:
    """Return `token_entropy` with rows centred over the tokens and scaled to norm 1, (B,), for h (B, T, D)."""
    centred = h.double() - h.double().mean(1, keepdim=True)
    return token_entropy(F.normalize(centred, dim=2), alpha)


def batch_entropy(h: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the normalised entropy over the batch at each position, rows centred, (T,) in [0, 1], for h (B, T, D)."""
    states = h.double().transpose(0, 1)
    max_rank = min(h.shape[0] - 1, h.shape[2])
    return spectral_entropy(states - states.mean(1, keepdim=True), alpha) / math.log(max_rank)


@torch.no_grad()
def level_entropies(gpt: GPT, rows: Tensor, n_targets: int, alpha: float) -> dict[str, list[float]]:
    """Return {'entropy', 'entropy_centred', 'entropy_batch'} for rows (n, length): L + 1 values each, one per level.

    A last batch below ENTROPY_BATCH rows is dropped.
    """
    size = min(ENTROPY_BATCH, len(rows))
    entropies = {"entropy": token_entropy, "entropy_centred": centred_entropy, "entropy_batch": batch_entropy}
    by_batch: dict[str, list[Tensor]] = {name: [] for name in entropies}
    for batch in rows[: len(rows) // size * size].split(size):
        levels = gpt(batch[:, :-1].long(), n_targets)[1]
        for name, entropy in entropies.items():
            by_batch[name].append(torch.stack([entropy(level.float(), alpha).mean() for level in levels]))
    return {name: torch.stack(values).mean(0).tolist() for name, values in by_batch.items()}


# ------------------------------------------------------------------------------------------------- regulariser


def predict_minimum(rank: Tensor, projection_width: int, lambda1: float, lambda2: float) -> tuple[Tensor, Tensor]:
    """Return (standard deviation, loss) at the minimum of lambda1 L_var + lambda2 L_cov, (n,) float64 each.

    There are d = `projection_width` features, whose covariance has rank at most r, `rank` (n,). With equal variances v,
    spread evenly over r directions, L_cov = k v^2 with k = d/r - 1. The minimum of lambda1 (1 - sqrt(v + eta)) +
    lambda2 k v^2 is at v sqrt(v + eta) = lambda1 / (4 lambda2 k), but not above v = 1 - eta. At rank 0 the variance is
    0. Unequal variances can have a lower loss if lambda1 is below about 8 lambda2 and r/d is not small. Derived here;
    the paper has no such equation.
    """
    rank = rank.double()
    k = (projection_width / rank.clamp_min(1) - 1).clamp_min(0)
    low, high = torch.zeros_like(rank), torch.full_like(rank, 1 - ETA)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = 4 * lambda2 * k * middle * (middle + ETA).sqrt() < lambda1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    variance = torch.where(rank > 0, low, 0)
    loss = lambda1 * (1 - (variance + ETA).sqrt()).clamp_min(0) + lambda2 * k * variance.square()
    return variance.sqrt(), loss


def rank_bounds(tokens: Tensor, covariance_batch: int, hidden_width: int, layer: int) -> Tensor:
    """Return an upper bound of the covariance's rank for each group and position, (groups * T,), from tokens (n, T).

    The bound is the minimum of `covariance_batch` - 1 (sequences per covariance), `hidden_width` and the number of
    distinct inputs - 1. `layer` is the level. At level 0 the input is the token alone; at higher levels it is the
    prefix of the sequence up to this position.
    """
    groups = tokens[: len(tokens) // covariance_batch * covariance_batch].unflatten(0, (-1, covariance_batch)).cpu()
    bounds = []
    for group in groups:
        for position in range(group.shape[1]):
            inputs = group[:, position : position + 1] if layer == 0 else group[:, : position + 1]
            bounds.append(len(inputs.unique(dim=0)) - 1)
    return torch.tensor(bounds).clamp(max=min(covariance_batch - 1, hidden_width))


@torch.no_grad()
def regulariser_metrics(
    model: SeqVCR, rows: Tensor, n_targets: int, run_args: argparse.Namespace
) -> dict[str, float | None]:
    """Return the terms of the regulariser on rows (n, length) and their prediction by `predict_minimum`.

    All values are None if both coefficients are 0 or there are fewer rows than --covariance-batch. Predictions are None
    with --covariance-axis batch+length, and above level 0 with dropout, which makes the states of equal inputs differ.
    """
    names = ("variance_loss", "covariance_loss", "projected_std", "regulariser_loss", "predicted_std", "predicted_loss",
             "std_to_predicted")  # fmt: skip
    metrics: dict[str, float | None] = dict.fromkeys(names)
    lambda1, lambda2, covariance_batch = run_args.lambda1, run_args.lambda2, run_args.covariance_batch
    layer, axis, weight = run_args.layer, run_args.covariance_axis, model.projection.weight
    if not (lambda1 or lambda2) or len(rows) < covariance_batch:
        return metrics
    inputs = rows[: len(rows) // covariance_batch * covariance_batch, :-1]
    terms = []
    for batch in inputs.split(covariance_batch):
        h = model.gpt(batch.long(), n_targets)[1][layer].float()
        terms.append(torch.stack(variance_covariance(h, weight, covariance_batch, axis)))
    variance, covariance, std = torch.stack(terms).mean(0).tolist()
    metrics |= {"variance_loss": variance, "covariance_loss": covariance, "projected_std": std}
    metrics["regulariser_loss"] = lambda1 * variance + lambda2 * covariance
    if axis == "batch" and (layer == 0 or not run_args.dropout):
        projection_width, hidden_width = weight.shape
        if layer == run_args.layers:  # the output of the final LayerNorm has one dimension less
            hidden_width -= 1
        rank = rank_bounds(inputs, covariance_batch, hidden_width, layer)
        predicted_std, predicted_loss = predict_minimum(rank, projection_width, lambda1, lambda2)
        metrics |= {"predicted_std": predicted_std.mean().item(), "predicted_loss": predicted_loss.mean().item()}
        if lambda1:  # without the variance loss the predicted standard deviation is 0
            metrics["std_to_predicted"] = std / predicted_std.mean().item()
    return metrics


# ------------------------------------------------------------------------------------------------- answers


def majority_accuracy(train_answers: Tensor, answers: Tensor) -> float:
    """Return the percentage of `answers` (n, A) that equal the most frequent one of `train_answers` (m, A)."""
    distinct, counts = train_answers.unique(dim=0, return_counts=True)
    return 100 * (answers == distinct[counts.argmax()]).all(1).float().mean().item()


@torch.no_grad()
def cross_entropy(gpt: GPT, rows: Tensor, n_targets: int) -> float:
    """Return the mean cross entropy (nats) of the last `n_targets` tokens of rows (n, length)."""
    total = 0.0
    for block in rows.split(1024):
        tokens = block.long()
        logits = gpt(tokens[:, :-1], n_targets)[0].float().flatten(0, 1)
        total += F.cross_entropy(logits, tokens[:, -n_targets:].flatten(), reduction="sum").item()
    return total / (len(rows) * n_targets)


@torch.no_grad()
def print_answers(args: argparse.Namespace, gpt: GPT, task: tasks.Task, raw: Tensor, rows: Tensor) -> None:
    """Print rows of a task and the network's teacher-forced answers.

    An answer counts as correct only if its chain of thought is correct, too.

    `raw` (n, question + answer) contains task tokens. `rows` are the same rows as network tokens (`encode`).
    """
    task_tokens = {token: number for number, token in enumerate(vocabulary(args, task)[1].tolist())}
    n_targets = answer_length(args, task)
    predictions = gpt(rows[:, :-1].long(), n_targets)[0].argmax(2)
    is_correct = (predictions == rows[:, -n_targets:]).all(1).tolist()
    for row, prediction, correct_tokens in zip(raw, predictions[:, -task.answer :].tolist(), is_correct, strict=True):
        answer = torch.tensor([task_tokens.get(token, len(task.symbols) - 1) for token in prediction])
        predicted = tasks.to_text(task, torch.cat([row[: task.question].cpu().long(), answer]))
        correct = tasks.to_text(task, row)
        result = "correct" if correct_tokens else f"wrong: {predicted.partition('= ')[2]}"
        print(f"{correct}   {result}")


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    arguments, provenance, saved = load_finished(args.folder, __file__)
    run_args = argparse.Namespace(**arguments)
    if args.data_file and not run_args.data_file:
        fail(f"--data-file {args.data_file}: the rows of {args.folder} were generated: drop this flag")
    epochs = read_log(args.folder, saved["epoch"])[1:]
    torch.set_num_threads(args.threads or run_args.threads)
    device = devices.select_device(args.device or run_args.device, run_args.scale)
    start_time = time.perf_counter()
    remedy = "use a --device with more memory, or --device cpu (same metrics)"
    with run_lock(args.folder), devices.report_oom(device, f"{N_PROBE} sequences at all levels", remedy):
        task = tasks.build_task(run_args.task, run_args.size, run_args.data_seed)
        row_count = run_args.train_size
        if run_args.rehearse:
            row_count, task.eval_rows = min(row_count, 100 * run_args.batch), run_args.batch
        data_file = Path(args.data_file or run_args.data_file) if run_args.data_file else None
        data = tasks.load(task, row_count, data_file, device)
        digest = checkpoints.sha256(*(rows.cpu() for rows in data))
        if digest != provenance["data"]:
            file = f"{data_file} and " if data_file else ""
            fail(f"the task rows (digest {digest[:12]}) differ from the training data of {args.folder}: restore {file}"
                 "the code version of the run")  # fmt: skip
        model = build_model(run_args, task, device).eval()
        checkpoints.load_weights(model, saved["model"], args.folder / "model.pt")
        raw = data.validation if args.held_out else data.test
        rows = encode(run_args, task, raw)
        if args.show:
            print_answers(run_args, model.gpt, task, raw[: args.show], rows[: args.show])
            return
        metrics: dict[str, Any] = {**provenance, "diverged": saved["diverged"]}
        metrics["position_order"] = "as in the row: least significant digit first in multiplication"
        reference = data.train
        if run_args.train_size == STREAM:
            reference = tasks.stream(task, run_args.seed, 0, STREAM_SAMPLE, device)
        metrics["chance_exact_match"] = majority_accuracy(reference[:, task.question :], raw[:, task.question :])
        if saved["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            n_targets = answer_length(run_args, task)
            correct = token_correct(model.gpt, rows, n_targets).float()
            metrics["exact_match"] = 100 * correct.prod(1).mean().item()
            # Teacher forcing supplies the correct chain of thought, so per-token accuracy is not comparable with other
            # arms.
            metrics |= dict.fromkeys(("position_accuracy", "digit_accuracy", "test_cross_entropy"))
            if not run_args.chain_of_thought:
                metrics["position_accuracy"] = [100 * share for share in correct.mean(0).tolist()]
                metrics["digit_accuracy"] = mean(metrics["position_accuracy"])
                metrics["test_cross_entropy"] = cross_entropy(model.gpt, rows, n_targets)
            metrics["solved"] = metrics["exact_match"] >= SOLVED
            solved_steps = [line["step"] for line in epochs if line["exact_match"] >= SOLVED]
            metrics["steps_to_solve"] = min(solved_steps, default=None)
            metrics |= level_entropies(model.gpt, rows[:N_PROBE], n_targets, args.alpha)
            metrics["entropy_mean"] = mean(metrics["entropy"])
            metrics["entropy_min"] = min(metrics["entropy"][1:-1] or metrics["entropy"])
            metrics["entropy_batch_level"] = metrics["entropy_batch"][run_args.layer]
            metrics |= regulariser_metrics(model, rows[:N_PROBE], n_targets, run_args)
            metrics["cross_entropy"], metrics["train_loss"] = epochs[-1]["cross_entropy"], epochs[-1]["loss"]
            lengths = [line["step"] - before["step"] for before, line in pairwise([{"step": 0}, *epochs])]
            clipped = [line["clipped_fraction"] * steps for line, steps in zip(epochs, lengths, strict=True)]
            metrics["clipped_fraction"] = sum(clipped) / sum(lengths)
        metrics |= {
            "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
            "peak_memory": epochs[-1]["peak_memory"] if epochs else None,
            "seconds": sum(line["seconds"] for line in epochs) + time.perf_counter() - start_time,
        }
        name = "held_out" if args.held_out else "metrics"
        if args.alpha != 1:  # do not overwrite metrics.json, which the studies read
            name += f"-alpha-{args.alpha:g}"
        write_metrics(args.folder / f"{name}.json", metrics, METRICS_IF_FINITE)


if __name__ == "__main__":
    main()
