"""Seq-VCR: variance and covariance regularisation of a transformer's hidden states, and pause tokens, on arithmetic.

"Seq-VCR: Preventing Collapse in Intermediate Transformer Representations for Enhanced Reasoning", Arefin et al.,
ICLR 2025 (arXiv 2411.02344v2). The authors' code is not available; README.md lists what is therefore not known.

A small GPT reads question, pause tokens and answer, and learns the answer (cross entropy, teacher-forced). A
regulariser acts on a linear projection of the hidden states of one level. At each position, over the batch, it pushes
the projected features towards standard deviation 1 and covariance 0 (the terms of VICReg). The projection is trained by
the regulariser only and is not used at inference.

    x_i = W h_i      C_i = covariance of x_i over N sequences               (i = 1..T positions)
    L_var = 1/(T d)  sum_i sum_k  max(0, 1 - sqrt(C_i[k,k] + 0.001))        (equation 4)
    L_cov = 1/(T d)  sum_i sum_{k != m}  C_i[k,m]^2                         (equation 4)
    L     = L_next + lambda1 L_var + lambda2 L_cov                          (equation 5)

    h  hidden states of a level   (B, T, D)      N  --covariance-batch       lambda1, lambda2  --lambda1, --lambda2
    W  projection                 (d, D)         d  --projection-width

Level 0 is the embeddings; level l < --layers is the output of block l; the last level (= --layers) is after the final
LayerNorm. --layer selects the regularised level. An epoch here is about 1/20 of --steps (log and checkpoint interval),
not a pass over the data.

    python seqvcr/train.py                                              # demo: 2x2 digits, 4 min of one core
    python seqvcr/train.py --lambda1 0 --lambda2 0 --out runs/scratch2  # an ablation: only pause tokens
    python seqvcr/train.py --layer last --covariance-axis batch+length --out runs/scratch3
    python seqvcr/train.py --scale gpu --task arithmetic                # 5 operators modulo 11
    python seqvcr/train.py --scale paper --init-from gpt2/model.safetensors

Differs from the paper, or is not specified there:
 1. The paper's default (last level, covariance over the batch) fails from scratch in the paper itself (exact match 0.03
    on 5x5 digits, table 7; level 0: 0.97). So `gpu`, which trains from scratch, regularises level 0, in arithmetic too.
    `demo` and `paper` have the default.
 2. Cross entropy is the mean over the answer tokens; question and pause tokens have no loss. The covariance uses all
    input positions. Level 0 is the sum of embeddings before dropout.
 3. Linear warm-up over 5 % of the steps, then cosine decay to zero; AdamW with weight decay 0.01 (0 on W); gradients
    clipped to norm 1, jointly for network and W. The paper specifies AdamW and the learning rate only.
 4. The small network has GPT-2's architecture and initialisation (learned positions, tied head, embeddings with std
    0.02), not those of Feng et al. (sinusoidal positions, untied head, LayerNorm on the sum of embeddings), so level 0
    starts with small features. At `gpu` scale it also has other sizes and a shorter training than the paper's small
    networks (table 2 of the paper: 4 heads, batch 128, learning rate 1e-4, 100 epochs): see SCALES.
 5. A question ends with "=" (eos in GPT-2's vocabulary). An answer has a fixed length and no end token.
 6. W has Xavier's initialisation, so a wider projection starts with smaller features. Entropies include the constant
    positions (pause tokens, "="), so they depend on --pause. In arithmetic the padding before "=" is input like any
    other token: attention does not mask it, and it enters the covariance and the entropies.
 7. The demo's batch of 128 gives four covariances of 32 sequences; the paper's batch is one of 32.
 8. `variance_covariance` stores neither covariances nor projected features: same values, less time and memory.
 9. On CUDA the training forward, including the logits, runs under bfloat16 autocast; loss, validation and evaluation
    are float32.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, schedules, seeding
from common.cli import fail
from common.devices import upload
from common.lock import run_lock
from common.run import Run
from seqvcr import tasks
from seqvcr.net import GPT, GPT2_TOKENS, init_from_gpt2

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #                 demo              gpu               paper
    "task":             ("multiplication", "multiplication", "multiplication"),
    "layers":           (2,                 5,                12),
    "heads":            (4,                 8,                12),
    "width":            (64,                512,              768),
    "dropout":          (0.0,               0.1,              0.1),
    "layer":            ("last",            "0",              "last"),
    "steps":            (2500,              60_000,           1_010_000),
    "batch":            (128,               512,              32),
    "lr":               (6e-3,              5e-4,             5e-4),
}  # fmt: skip
TASK_DEFAULTS = {  #    multiplication  arithmetic  lis
    "lambda1":          (1.0,           0.1,        0.1),
    "lambda2":          (0.004,         0.5,        0.5),
    "covariance_batch": (32,            128,        128),
    "train_size":       (808_000,       1_000_000,  1_000_000),
    "size":             (4,             5,          50),
}  # fmt: skip
DEMO_SIZES =            (2,             3,          12)  # fmt: skip
TASK_NAMES = ("multiplication", "arithmetic", "lis")
STREAM = 0  # value of --train-size stream
ETA = 0.001  # section 3.4
EPOCHS = 20  # an epoch is about 1/20 of the steps: log, validation and checkpoint after each
WARM_UP = 0.05  # fraction of the steps
MAX_GRAD_NORM = 1.0
CHUNKS = 16  # SumOfSquares splits the groups into at most this many chunks
WEIGHT_DECAY = 0.01
GPT2_VOCABULARY = 50257
GPT2_HEAD_WIDTH = 64  # in all sizes of GPT-2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and resolve all flags; `layer` becomes an integer. Exits with code 2 if flags contradict each other."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--task", choices=TASK_NAMES, help="task; --size sets its difficulty")
    data.add_argument("--size", type=cli.int_in(1), help="multiplication: digits per factor (default 4, demo 2); "
                      "arithmetic: operators (5, demo 3); lis: numbers (50, demo 12)")  # fmt: skip
    data.add_argument("--train-size", type=train_size, help="maximum number of distinct training rows (paper: 808,000; "
                      "other tasks: 1,000,000), or `stream`: new rows at each step")  # fmt: skip
    data.add_argument("--chain-of-thought", action="store_true", help="the network learns the partial products before "
                      "the product, as in table 1 (multiplication only)")  # fmt: skip
    data.add_argument("--data-file", type=Path, help="file with training rows in the format of Deng et al. 2023 "
                      "(multiplication only)")  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--layers", type=cli.int_in(1, cli.MAX_LAYERS), help="transformer blocks")
    network.add_argument("--heads", type=cli.int_in(1, cli.MAX_WIDTH), help="attention heads")
    network.add_argument("--width", type=cli.int_in(2, cli.MAX_WIDTH), help="hidden width D")
    network.add_argument("--dropout", type=cli.float_in(0, 0.99), help="paper: 0.1 in its small networks")
    network.add_argument("--init-from", type=Path, help="pre-trained GPT-2 (model.safetensors or pytorch_model.bin), "
                         "multiplication only; `none` at paper scale: from scratch (table 7)")  # fmt: skip
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=cli.int_in(1), help=f"optimiser steps, split into {EPOCHS} epochs; "
                              "paper: 40 passes over 808,000 rows at batch 32")  # fmt: skip
    optimisation.add_argument("--batch", type=cli.int_in(2), help="sequences per step; paper: 32; other tasks: 128")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="peak learning rate; paper: 5e-4, small networks 1e-4")
    lr_factor = "multiplies --lr; used by the studies"
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help=lr_factor)
    optimisation.add_argument("--compile", action="store_true", help="apply torch.compile to forward pass and loss")
    method = parser.add_argument_group("method")
    method.add_argument("--lambda1", type=cli.float_in(0), help="coefficient of the variance loss; paper: 1 in "
                        "multiplication, else 0.1 (appendix A)")  # fmt: skip
    method.add_argument("--lambda2", type=cli.float_in(0), help="coefficient of the covariance loss; paper: 0.004 in "
                        "multiplication, else 0.5 (appendix A)")  # fmt: skip
    projection = "width d of the projection; paper: 2048 (section 3.4)"
    method.add_argument("--projection-width", type=cli.int_in(1, cli.MAX_WIDTH), default=2048, help=projection)
    method.add_argument("--layer", help="regularised level. 0: embeddings; l < --layers: output of block "
                        "l; last (= --layers): after the final LayerNorm; paper: last")  # fmt: skip
    axes = ("batch", "batch+length")
    method.add_argument("--covariance-axis", choices=axes, default="batch", help="batch: one covariance per position; "
                        "batch+length: one covariance over all positions (appendix F)")  # fmt: skip
    method.add_argument("--covariance-batch", type=cli.int_in(2), help="N, number of sequences per covariance; "
                        "paper: the whole batch, 32 in multiplication, else 128")  # fmt: skip
    method.add_argument("--pause", type=cli.int_in(0, cli.MAX_LAYERS), default=2, help="number of pause tokens between "
                        "start and end marker; 0: no pause tokens and no markers; paper: 2 (section 3.5)")  # fmt: skip
    args = cli.parse(parser, SCALES, argv)

    cli.apply_lr_factor(args)
    defaults = TASK_DEFAULTS | {"size": DEMO_SIZES} if args.scale == "demo" else TASK_DEFAULTS
    for name, row in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, row[TASK_NAMES.index(args.task)])
    if args.layer not in ("last", *map(str, range(args.layers + 1))):
        fail(f"invalid --layer '{args.layer}' with --layers {args.layers}: give 0 to {args.layers}, or last")
    args.layer = args.layers if args.layer == "last" else int(args.layer)
    if args.width % args.heads:
        heads = math.gcd(args.width, args.heads)
        fail(f"--width {args.width} must be a multiple of --heads {args.heads}: give --heads {heads}")
    if args.batch % args.covariance_batch:
        fail(f"--batch {args.batch} must be a multiple of --covariance-batch {args.covariance_batch}: "
             "change --batch or --covariance-batch")  # fmt: skip
    for name in ("data_file", "init_from", "chain_of_thought"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value and args.task != "multiplication":
            fail(f"{flag} requires --task multiplication, not {args.task}: drop it")
    if args.data_file and args.train_size == STREAM:
        fail("--data-file has a fixed number of rows: drop it, or drop --train-size stream")
    if args.scale == "paper" and args.task == "multiplication" and not args.init_from:
        fail("--scale paper fine-tunes GPT-2: give --init-from model.safetensors, or --init-from none to train from "
             "scratch")  # fmt: skip
    if str(args.init_from) == "none":
        args.init_from = None
    if args.chain_of_thought and args.init_from:
        fail("--chain-of-thought does not work with --init-from (its tokens are not mapped to GPT-2's): drop "
             "--init-from or --chain-of-thought")  # fmt: skip
    if args.init_from and args.width != GPT2_HEAD_WIDTH * args.heads:
        heads = max(1, args.width // GPT2_HEAD_WIDTH)
        fail(f"--init-from requires heads of width {GPT2_HEAD_WIDTH}, not --width {args.width} with --heads "
             f"{args.heads}: give --width {GPT2_HEAD_WIDTH * heads} --heads {heads}")  # fmt: skip
    if args.data.is_file():
        fail(f"--data {args.data} is a file, but the rows are generated: give a file with training rows as --data-file")
    return args


def train_size(text: str) -> int:
    """Return STREAM for `stream`, else the number of rows (argparse type)."""
    return STREAM if text == "stream" else cli.int_in(1)(text)


# ------------------------------------------------------------------------------------------------- model


class SeqVCR(nn.Module):
    """A GPT and the projection W, which only the regulariser uses.

    ABLATION (projection width): `projection_width`.
    """

    def __init__(self, gpt: GPT, projection_width: int, seed: int):
        super().__init__()
        self.gpt = gpt
        with seeding.seeded_fork_rng(seed, "projection"):
            self.projection = nn.Linear(gpt.wte.embedding_dim, projection_width, bias=False)
            nn.init.xavier_uniform_(self.projection.weight)


def vocabulary(args: argparse.Namespace, task: tasks.Task) -> tuple[int, Tensor]:
    """Return (vocabulary size of the network, int64 table from task tokens to network tokens).

    With --init-from the vocabulary is GPT-2's followed by the pause tokens, else it is the task's, with
    --chain-of-thought followed by tasks.CHAIN.
    """
    if not args.init_from:
        return len(task.symbols) + len(tasks.CHAIN) * args.chain_of_thought, torch.arange(len(task.symbols))
    pauses = {symbol: GPT2_VOCABULARY + number for number, symbol in enumerate(tasks.PAUSES)}
    token_of = GPT2_TOKENS | pauses
    return GPT2_VOCABULARY + len(pauses), torch.tensor([token_of[symbol] for symbol in task.symbols])


def answer_length(args: argparse.Namespace, task: tasks.Task) -> int:
    """Return the number of target tokens: the answer, with --chain-of-thought after the chain."""
    return task.answer + (tasks.chain_length(task.size) if args.chain_of_thought else 0)


def build_model(args: argparse.Namespace, task: tasks.Task, device: torch.device) -> SeqVCR:
    """Return the network on `device` with its initial weights."""
    vocabulary_size, _ = vocabulary(args, task)
    pause_block = args.pause + 2 if args.pause else 0
    length = task.question + pause_block + answer_length(args, task) - 1
    gpt = GPT(vocabulary_size, length, args.layers, args.heads, args.width, args.dropout, args.seed)
    return SeqVCR(gpt, args.projection_width, args.seed).to(device)


# ------------------------------------------------------------------------------------------------- loss


class SumOfSquares(torch.autograd.Function):
    """Sum over the rows of (h W^T)^2, (G, d), for h (G, n, D) and W (d, D). Backward recomputes h W^T (G, n, d).

    h W^T is computed one chunk of the groups at a time, so that it fits into a CPU's cache. A single group (axis
    batch+length with --batch equal to --covariance-batch) is one chunk.
    """

    @staticmethod
    def forward(context: Any, h: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(h, weight)
        return torch.cat([(chunk @ weight.T).square_().sum(1) for chunk in h.chunk(CHUNKS)])

    @staticmethod
    def backward(context: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = context.saved_tensors
        grad_h, grad_weight = [], torch.zeros_like(weight)
        for chunk, grad_chunk in zip(h.chunk(CHUNKS), (2 * grad_output[:, None]).chunk(CHUNKS), strict=True):
            x = (chunk @ weight.T).mul_(grad_chunk)
            grad_h.append(x @ weight)
            grad_weight.addmm_(x.flatten(0, 1).T, chunk.flatten(0, 1))
        return torch.cat(grad_h), grad_weight


def variance_covariance(
    h: Tensor, weight: Tensor, covariance_batch: int, axis: str = "batch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (L_var, L_cov, mean standard deviation) of x = W h for h (B, T, D) and W (d, D), float32 (equation 4).

    There is one covariance C (d x d) per position over N = `covariance_batch` sequences, or with axis `batch+length`
    one over all positions of N sequences. B must be a multiple of N. The terms are means over all covariances. C is
    never computed: with h centred over the n rows of its group, M = W^T W and S = h^T h / (n - 1), C = W S W^T and

        sum of C^2  =  sum of (h M h^T)^2 / (n - 1)^2     (n x n)      or, for n > D,     tr (S M)^2     (D x D)
    """
    groups = h.unflatten(0, (-1, covariance_batch))  # (B / N, N, T, D)
    groups = groups.transpose(1, 2).flatten(0, 1) if axis == "batch" else groups.flatten(1, 2)
    centred = groups - groups.mean(1, keepdim=True)  # (G, n, D)
    n_minus_1 = centred.shape[1] - 1
    projection_width, hidden_width = weight.shape
    variances = SumOfSquares.apply(centred, weight) / n_minus_1  # (G, d), the diagonals of C
    m = weight.T @ weight
    # The smaller of (G, n, n) and (G, D, D).
    product = centred @ m @ centred.mT if n_minus_1 < hidden_width else centred.mT @ centred @ m
    product = product / n_minus_1
    squares = (product * product.mT).sum((1, 2))
    variance_loss = F.relu(1 - (variances + ETA).sqrt()).mean()
    covariance_loss = (squares - variances.square().sum(1)).mean() / projection_width
    return variance_loss, covariance_loss, variances.detach().sqrt().mean()


def seqvcr_loss(
    model: SeqVCR, tokens: Tensor, *, n_targets: int, lambda1: float, lambda2: float, layer: int, axis: str,
    covariance_batch: int, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (loss (equation 5), metrics (5,)) of `tokens` (B, length), of which the last `n_targets` are targets.

    The metrics, detached, are loss, cross entropy, L_var, L_cov and mean standard deviation of x. `layer` is the
    regularised level. There is one forward pass.

    ABLATION (coefficients): `lambda1`, `lambda2`; if both are 0 (arm `off`) the projection is not used, and the metrics
    are only the first two.
    """
    with devices.autocast(precision, tokens.device):
        logits, levels = model.gpt(tokens[:, :-1], n_targets)
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -n_targets:].flatten())
    loss, metrics = cross_entropy, [cross_entropy]
    if lambda1 or lambda2:
        h, weight = levels[layer].float(), model.projection.weight
        variance, covariance, std = variance_covariance(h, weight, covariance_batch, axis)
        loss = cross_entropy + lambda1 * variance + lambda2 * covariance
        metrics += [variance, covariance, std]
    return loss, torch.stack([loss, *metrics]).detach()


# ------------------------------------------------------------------------------------------------- data


def encode(args: argparse.Namespace, task: tasks.Task, rows: Tensor) -> Tensor:
    """Return rows of a task with the pause block and the chain of thought inserted, if any, uint8.

    With --init-from they are GPT-2's tokens, int32.
    """
    if args.chain_of_thought:
        rows = tasks.with_chain(task, rows)
    rows = tasks.with_pauses(task, rows, args.pause)
    if not args.init_from:
        return rows
    table = vocabulary(args, task)[1].to(torch.int32)
    return upload(table, rows.device)[rows.long()]


def batches(args: argparse.Namespace, task: tasks.Task, rows: Tensor, steps: range) -> Iterator[Tensor]:
    """Yield a batch (B, length), int64, for each of the consecutive `steps`. It depends only on (seed, step).

    Each pass over `rows` has a new random order and drops the last incomplete batch. With --train-size stream the rows
    of each batch are new.
    """
    if args.train_size == STREAM:
        for step in steps:
            yield encode(args, task, tasks.stream(task, args.seed, step, args.batch, rows.device)).long()
        return
    steps_per_pass = len(rows) // args.batch
    for step in steps:
        pass_number, batch_number = divmod(step, steps_per_pass)
        if batch_number == 0 or step == steps.start:
            order = seeding.permutation(args.seed, "order", pass_number, len(rows), rows.device)
        yield rows[order[batch_number * args.batch : (batch_number + 1) * args.batch]].long()


@torch.no_grad()
def token_correct(model: GPT, rows: Tensor, n_targets: int) -> Tensor:
    """Return whether the teacher-forced argmax of each target is correct: (n, n_targets) bool for rows (n, length).

    All tokens of a row are correct if and only if greedy decoding gives its answer: the first wrong token is the same.
    """
    was_training = model.training
    model.eval()
    correct = []
    for block in rows.split(1024):
        tokens = block.long()
        correct.append(model(tokens[:, :-1], n_targets)[0].argmax(2) == tokens[:, -n_targets:])
    model.train(was_training)
    return torch.cat(correct)


# ------------------------------------------------------------------------------------------------- train


def lr_schedule(progress: float) -> float:
    """Return the factor of the peak learning rate at progress 0 to 1: linear warm-up, then cosine decay to zero."""
    return min(1.0, progress / WARM_UP) * schedules.cosine(max(0.0, progress - WARM_UP) / (1 - WARM_UP))


def build_optimizer(args: argparse.Namespace, model: SeqVCR) -> torch.optim.AdamW:
    """Return AdamW without weight decay on the projection."""
    groups = [{"params": list(model.gpt.parameters()), "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": list(model.projection.parameters()), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, fused=True)


def train(
    args: argparse.Namespace, run: Run, model: SeqVCR, task: tasks.Task, data: tasks.Splits,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Train on encoded rows. Validates and saves a checkpoint after each epoch; resumes from the last checkpoint."""
    device = data.validation.device
    n_targets, steps, steps_per_epoch = answer_length(args, task), args.steps, -(-args.steps // EPOCHS)
    if args.rehearse:
        steps, steps_per_epoch = 2 * args.rehearse, args.rehearse
    final_epoch = -(-steps // steps_per_epoch)
    start_epoch = run.resume(model, optimizer)
    if start_epoch is None:
        run.end_epoch(0, final_epoch, {})
        start_epoch = 0
    loss_fn = torch.compile(seqvcr_loss) if args.compile else seqvcr_loss
    regulariser = ("variance_loss", "covariance_loss", "projected_std") if args.lambda1 or args.lambda2 else ()
    names = ("loss", "cross_entropy", *regulariser, "clipped_fraction")

    for epoch in tqdm(range(start_epoch, final_epoch), run.name, final_epoch, initial=start_epoch, disable=None,
                      leave=False):  # fmt: skip
        start_time, totals = time.perf_counter(), torch.zeros(len(names), device=device)
        epoch_steps = range(epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, steps))
        model.train()
        for step, tokens in zip(epoch_steps, batches(args, task, data.train, epoch_steps), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_schedule((step + 0.5) / steps)
            # A resumed run must draw the same dropout masks.
            if args.dropout:
                seeding.reseed(args.seed, "dropout", step)
            loss, batch_metrics = loss_fn(
                model, tokens, n_targets=n_targets, lambda1=args.lambda1, lambda2=args.lambda2, layer=args.layer,
                axis=args.covariance_axis, covariance_batch=args.covariance_batch, precision=args.precision,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, foreach=True)  # before clipping
            optimizer.step()
            totals += torch.cat([batch_metrics, (norm > MAX_GRAD_NORM).float()[None]])
        means = (totals / len(epoch_steps)).tolist()  # the first host-device synchronisation of the epoch
        seconds = time.perf_counter() - start_time
        if run.finish_if_diverged(epoch + 1, totals):
            return
        correct = token_correct(model.gpt, data.validation, n_targets).float()
        metrics = dict(zip(names, means, strict=True)) | {
            "exact_match": 100 * correct.prod(1).mean().item(),
            "step": epoch_steps.stop,
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": len(epoch_steps) * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(device),
        }
        # Teacher forcing supplies the correct chain of thought, so per-token accuracy is not comparable with other
        # arms.
        shares = [] if args.chain_of_thought else correct.mean(0).tolist()
        by_position = {f"accuracy_{position}": 100 * share for position, share in enumerate(shares)}
        run.end_epoch(epoch + 1, final_epoch, metrics, details=by_position)
    run.save_model({"model": model.state_dict(), "epoch": final_epoch, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    batch = f"--batch {args.batch // 2}"
    if args.batch // 2 % args.covariance_batch:
        batch += f" --covariance-batch {args.batch // 2}"
    remedy = f"use {batch} (about half the memory, different results)"
    usage = f"--width {args.width} --batch {args.batch}"
    with run_lock(args.out), devices.report_oom(device, usage, remedy, args.precision):
        run = Run(vars(args), __file__)
        if run.finished:
            return
        task, row_count = tasks.build_task(args.task, args.size, args.data_seed), args.train_size
        if args.rehearse:
            row_count, task.eval_rows = min(row_count, 100 * args.batch), args.batch
        model = build_model(args, task, device)
        if args.init_from:
            init_from_gpt2(model.gpt, args.init_from, len(tasks.PAUSES))
        data = tasks.load(task, row_count, args.data_file, device)
        if args.train_size != STREAM and args.batch > len(data.train):
            fail(f"--batch {args.batch} is larger than the training set ({len(data.train)} examples): "
                 f"give at most {len(data.train)}")  # fmt: skip
        rows = min(len(data.validation), len(data.test))
        if rows < 3:  # entropy_batch is divided by log(rows - 1)
            fail(f"--task {args.task} has {rows} rows for validation or test, too few for entropies: give a larger "
                 "--size or, with --rehearse, --batch 3 or more")  # fmt: skip
        summary = f"{args.task} of size {args.size}, GPT of {args.layers} blocks of width {args.width}"
        digest = checkpoints.sha256(*(rows.cpu() for rows in data))
        provenance = devices.environment(device) | {"data": digest, "steps": args.steps}
        run.write_config(summary, provenance)
        data = tasks.Splits(*(encode(args, task, rows) for rows in data))
        train(args, run, model, task, data, build_optimizer(args, model))


if __name__ == "__main__":
    main()
