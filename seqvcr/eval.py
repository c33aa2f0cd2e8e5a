"""What a Seq-VCR run can do and how its representations look, written to metrics.json.

    python seqvcr/eval.py runs/scratch                # a finished run of train.py
    python seqvcr/eval.py runs/scratch --show 10      # test questions and the network's answers, for people

Everything is measured on test rows with dropout off and without the projection, except what the regulariser itself
sees (`variance_loss`, `covariance_loss`, `projected_std`). Answers are teacher-forced: for whole answers that is what
greedy decoding gives (`exact_match`), for single positions it is more (`position_accuracy`).

entropy        of a sequence's hidden states Z (T, D): p_i = eigenvalues of Z Z^T over their sum, -sum p_i log p_i
               (equation 2), divided by log(min(T, D)); mean over sequences, one number a level
entropy_batch  the same over the batch, at each position, of centred rows: the axis on which the loss acts
predicted_std  what deviation of W h the loss is lowest at, given how many directions there are (`predict`)
"""

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, files
from common.cli import fail
from common.lock import run_lock
from common.run import load_finished
from seqvcr import tasks
from seqvcr.net import GPT
from seqvcr.train import ETA, SeqVCR, build_model, encode, token_correct, variance_covariance, vocabulary

SOLVED = 90.0  # percent of exact match
TOGETHER = 256  # sequences that entropy_batch is taken over
PROBED = 1024  # test rows that entropies and the regulariser are measured on
METRICS_IF_FINITE = (  # of a diverged run they are null
    *(
        "exact_match",
        "solved",
        "steps_to_solve",
        "position_accuracy",
        "digit_accuracy",
        "entropy",
        "entropy_mean",
        "entropy_min",
    ),
    *("entropy_centred", "entropy_batch", "entropy_batch_level", "variance_loss", "covariance_loss", "projected_std"),
    *("regulariser_loss", "predicted_std", "predicted_loss", "train_loss", "cross_entropy"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("--data", type=Path, help="taken and ignored: tasks are generated")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: as in training")
    parser.add_argument("--threads", type=cli.int_min(1), help="default: as in training")
    parser.add_argument("--held-out", action="store_true", help="measure on validation rows: for tuning")
    parser.add_argument("--alpha", type=cli.float_in(0), default=1.0, help="order of the entropies; paper: 1")
    parser.add_argument("--show", type=cli.int_min(1), metavar="COUNT", help="print so many answers; writes nothing")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- entropy


def spectral_entropy(z: Tensor, alpha: float = 1.0) -> Tensor:
    """Entropy in nats of order `alpha` of the eigenvalues of z z^T, scaled to sum 1, for z (..., n, m): (...), float64.

    S_1 = -sum p log p, else log(sum p^alpha) / (1 - alpha). A zero matrix has 0.
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
    """Of each sequence of hidden states (B, T, D), over its tokens: (B,), 1 at most."""
    return spectral_entropy(h, alpha) / math.log(min(h.shape[1:]))


def centred_entropy(h: Tensor, alpha: float = 1.0) -> Tensor:
    """The same of rows centred over the tokens and scaled to length 1: (B,)."""
    centred = h.double() - h.double().mean(1, keepdim=True)
    return token_entropy(torch.nn.functional.normalize(centred, dim=2), alpha)


def batch_entropy(h: Tensor, alpha: float = 1.0) -> Tensor:
    """Of each position of hidden states (B, T, D), over the batch, rows centred: (T,), 1 at most."""
    rows = h.double().transpose(0, 1)
    most = min(h.shape[0] - 1, h.shape[2])
    return spectral_entropy(rows - rows.mean(1, keepdim=True), alpha) / math.log(most)


@torch.no_grad()
def level_entropies(gpt: GPT, rows: Tensor, answer: int, alpha: float) -> dict[str, list[float]]:
    """The three entropies of every level 0..L: means over rows (n, length), entropy_batch over groups and positions."""
    size = min(TOGETHER, len(rows))
    measured: dict[str, Any] = {
        "entropy": token_entropy, "entropy_centred": centred_entropy, "entropy_batch": batch_entropy,
    }  # fmt: skip
    found: dict[str, list[Tensor]] = {name: [] for name in measured}
    for block in rows[: len(rows) // size * size].split(size):
        levels = gpt(block[:, :-1].long(), answer)[1]
        for name, entropy in measured.items():
            found[name].append(torch.stack([entropy(level.float(), alpha).mean() for level in levels]))
    return {name: torch.stack(parts).mean(0).tolist() for name, parts in found.items()}


# ------------------------------------------------------------------------------------------------- regulariser


def predict(rank: Tensor, width: int, lambda1: float, lambda2: float) -> tuple[Tensor, Tensor]:
    """Where lambda1 L_var + lambda2 L_cov of d = `width` features is lowest if their covariance has rank r at most:
    (deviation, loss), (n,) float64 each, from `rank` (n,).

    With equal variances v, spread evenly over r directions, L_cov = k v^2, k = d/r - 1, and the loss
    lambda1 (1 - sqrt(v + eta)) + lambda2 k v^2 is lowest where v sqrt(v + eta) = lambda1 / (4 lambda2 k), at 1 - eta
    if not before. At rank 0 there is no variance. Derived here; the paper has no such equation.
    """
    rank = rank.double()
    excess = (width / rank.clamp_min(1) - 1).clamp_min(0)
    low, high = torch.zeros_like(rank), torch.full_like(rank, 1 - ETA)
    for _ in range(60):
        middle = (low + high) / 2
        rising = 4 * lambda2 * excess * middle * (middle + ETA).sqrt() < lambda1
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    variance = torch.where(rank > 0, low, 0)
    loss = lambda1 * (1 - (variance + ETA).sqrt()).clamp_min(0) + lambda2 * excess * variance.square()
    return variance.sqrt(), loss


def ranks(tokens: Tensor, rows: int, width: int, layer: int) -> Tensor:
    """How many directions the hidden states can vary in at each position, over `rows` sequences: (groups * T,).

    At most rows - 1, `width`, and one less than the different inputs: tokens at level 0, above it beginnings of a row.
    """
    groups = tokens[: len(tokens) // rows * rows].unflatten(0, (-1, rows)).cpu()
    found = []
    for group in groups:
        for place in range(group.shape[1]):
            seen = group[:, place : place + 1] if layer == 0 else group[:, : place + 1]
            found.append(len(seen.unique(dim=0)) - 1)
    return torch.tensor(found).clamp(max=min(rows - 1, width))


@torch.no_grad()
def regulariser(model: SeqVCR, rows: Tensor, answer: int, arguments: dict[str, Any]) -> dict[str, float | None]:
    """The terms of the loss on rows (n, length), and what `predict` says of them; nothing for a run without them.

    There is no prediction for covariances over the length, nor above level 0 where dropout makes equal inputs differ.
    """
    names = ("variance_loss", "covariance_loss", "projected_std", "regulariser_loss", "predicted_std", "predicted_loss")
    lambda1, lambda2, together = (arguments[name] for name in ("lambda1", "lambda2", "covariance_batch"))
    layer, axis, weight = arguments["layer"], arguments["covariance_axis"], model.projection.weight
    if not (lambda1 or lambda2) or len(rows) < together:
        return dict.fromkeys(names)
    inputs = rows[: len(rows) // together * together, :-1]
    parts = []
    for block in inputs.split(together):
        h = model.gpt(block.long(), answer)[1][layer].float()
        parts.append(torch.stack(variance_covariance(h, weight, together, axis)))
    variance, covariance, deviation = torch.stack(parts).mean(0).tolist()
    found = dict(zip(names, (variance, covariance, deviation, lambda1 * variance + lambda2 * covariance), strict=False))
    predicted: tuple[float | None, ...] = (None, None)
    if axis == "batch" and (layer == 0 or not arguments["dropout"]):
        rank = ranks(inputs, together, weight.shape[1], layer)
        predicted = tuple(one.mean().item() for one in predict(rank, len(weight), lambda1, lambda2))
    return found | dict(zip(names[4:], predicted, strict=True))


# ------------------------------------------------------------------------------------------------- use


def best_constant(known: Tensor, asked: Tensor) -> float:
    """Percent of the answers `asked` (n, A) that equal the most frequent of the answers `known` (m, A)."""
    answers, counts = known.unique(dim=0, return_counts=True)
    return 100 * (asked == answers[counts.argmax()]).all(1).float().mean().item()


@torch.no_grad()
def show(gpt: GPT, task: tasks.Task, raw: Tensor, rows: Tensor, gpt2: bool) -> None:
    """Print raw rows (n, question + answer) of a task with the answers to them, teacher-forced."""
    back = {token: number for number, token in enumerate(vocabulary(task, gpt2)[1].tolist())}
    guesses = gpt(rows[:, :-1].long(), task.answer)[0].argmax(2).tolist()
    for row, guess in zip(raw, guesses, strict=True):
        answered = torch.tensor([back.get(token, len(task.symbols) - 1) for token in guess])
        said = tasks.readable(task, torch.cat([row[: task.question].cpu().long(), answered]))
        wanted = tasks.readable(task, row)
        print(f"{wanted}   right" if said == wanted else f"{wanted}   said {said.partition('= ')[2]}")


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    arguments, facts, saved = load_finished(args.folder, "seqvcr/train.py")
    try:
        epochs = [line for line in files.read_lines(args.folder / "train.jsonl") if line["epoch"]]
        if not epochs and not saved["diverged"]:
            raise files.DamagedFile("it is empty")
    except (files.DamagedFile, KeyError) as error:
        fail(f"{args.folder / 'train.jsonl'} is damaged ({error}): move {args.folder} away and train this run again")
    torch.set_num_threads(args.threads or arguments["threads"])
    device = devices.select_device(args.device or arguments["device"], arguments["scale"])
    started = time.perf_counter()
    elsewhere = "A --device with more memory, or --device cpu, gives the same metrics"
    with run_lock(args.folder), devices.memory_for(device, f"{PROBED} sequences at every level", elsewhere):
        task, count = tasks.choose(arguments["task"], arguments["size"]), arguments["train_size"]
        if arguments["rehearse"]:
            count, task.measured = min(count, 100 * arguments["batch"]), arguments["batch"]
        file = Path(arguments["data_file"]) if arguments["data_file"] else None
        data = tasks.load(task, count, file, device)
        if checkpoints.sha256(*(part.cpu() for part in data)) != facts["data"]:
            fail(f"{args.folder} was trained on other rows than are made now: evaluate it with the code, and with the "
                 "--data-file, of its training")  # fmt: skip
        trained = argparse.Namespace(**arguments)
        model = build_model(trained, task, device).eval()
        checkpoints.fit(model, saved["model"], args.folder / "model.pt")
        raw = data.validation if args.held_out else data.test
        rows = encode(trained, task, raw)
        if args.show:
            show(model.gpt, task, raw[: args.show], rows[: args.show], bool(arguments["init_from"]))
            return
        metrics: dict[str, Any] = {**facts, "diverged": saved["diverged"], "position_order": "as in the row: least "
                                   "significant digit first in multiplication"}  # fmt: skip
        known = data.train if len(data.train) else data.validation
        metrics["chance_exact_match"] = best_constant(known[:, task.question :], raw[:, task.question :])
        if saved["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            hits = token_correct(model.gpt, rows, task.answer).float()
            metrics["exact_match"] = 100 * hits.prod(1).mean().item()
            metrics["position_accuracy"] = [100 * share for share in hits.mean(0).tolist()]
            metrics["digit_accuracy"] = mean(metrics["position_accuracy"])
            metrics["solved"] = metrics["exact_match"] >= SOLVED
            solved = [line["step"] for line in epochs if line["exact_match"] >= SOLVED]
            metrics["steps_to_solve"] = min(solved, default=None)
            metrics |= level_entropies(model.gpt, rows[:PROBED], task.answer, args.alpha)
            metrics["entropy_mean"] = mean(metrics["entropy"])
            metrics["entropy_min"] = min(metrics["entropy"][1:-1] or metrics["entropy"])
            metrics["entropy_batch_level"] = metrics["entropy_batch"][arguments["layer"]]
            metrics |= regulariser(model, rows[:PROBED], task.answer, arguments)
            metrics |= {"train_loss": epochs[-1]["loss"], "cross_entropy": epochs[-1]["cross_entropy"]}
        metrics |= {
            "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
            "peak_memory": epochs[-1]["peak_memory"] if epochs else None,
            "seconds": sum(line["seconds"] for line in epochs) + time.perf_counter() - started,
        }
        files.write_json(args.folder / ("held_out.json" if args.held_out else "metrics.json"), metrics)
        shown = (f"{name} {metrics[name]:.4g}" for name in METRICS_IF_FINITE if isinstance(metrics.get(name), float))
        print(f"{args.folder}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
