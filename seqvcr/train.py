"""Seq-VCR: variance and covariance regularisation of a transformer's hidden states, and pause tokens, on arithmetic.

"Seq-VCR: Preventing Collapse in Intermediate Transformer Representations for Enhanced Reasoning", Arefin et al.,
ICLR 2025 (arXiv 2411.02344v2). The authors' code could not be had; README.md lists what is therefore not known.

A small GPT reads question, pause tokens and answer, and learns the answer (cross entropy, teacher-forced). Beside it,
a linear projection of one level's hidden states is pushed, position by position over the batch, towards features of
deviation 1 that do not covary (VICReg's terms). The projection learns from these terms alone and is thrown away then.

    x_i = W h_i      C_i = covariance of x_i over N sequences               (i = 1..T positions)
    L_var = 1/(T d)  sum_i sum_k  max(0, 1 - sqrt(C_i[k,k] + 0.001))        (equation 4)
    L_cov = 1/(T d)  sum_i sum_{k != m}  C_i[k,m]^2                         (equation 4)
    L     = L_next + lambda1 L_var + lambda2 L_cov                          (equation 5)

    h  hidden states of a level   (B, T, D)      N  --covariance-batch       lambda1, lambda2  --lambda1, --lambda2
    W  projection                 (d, D)         d  --projection-width

    python seqvcr/train.py                                              # demo: 2x2 digits, about 20 s of one core
    python seqvcr/train.py --lambda1 0 --lambda2 0 --out runs/scratch2  # an ablation: pause tokens alone
    python seqvcr/train.py --layer last --covariance-axis batch+length --out runs/scratch3
    python seqvcr/train.py --scale gpu --task arithmetic                # 5 operators modulo 11
    python seqvcr/train.py --scale paper --init-from gpt2/model.safetensors

Differs from the paper, or open in it:
 1. From scratch the paper's own setting (last level, covariance over the batch) fails in the paper (exact match of 5x5
    digits 0.03, table 7), so `demo` and `gpu` regularise level 0 (0.97 there). `paper` has the last level.
 2. Cross entropy is the mean over the answer's tokens; question and pauses carry none. The covariance takes all
    positions of the input. Level 0 is the sum of embeddings before dropout, the last one is after the final LayerNorm.
 3. A warm-up of a twentieth of the steps, then half a cosine to zero; AdamW with weight decay 0.01 (none on W),
    gradients clipped to norm 1. The paper names AdamW and the rate.
 4. The small network is GPT-2's (learned positions, tied head), not Feng et al.'s (sinusoidal, untied).
 5. A question ends with "=" (eos in GPT-2's vocabulary), an answer has no end token: its length is fixed.
 6. Neither the covariances nor the projected features are kept (`variance_covariance`): equal, in less time and memory.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, schedules, seeding
from common.cli import fail
from common.devices import upload
from common.lock import run_lock
from common.run import Run
from seqvcr import tasks
from seqvcr.net import GPT, GPT2_TOKENS, fill_gpt2

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #                 demo              gpu               paper
    "task":             ("multiplication", "multiplication", "multiplication"),
    "layers":           (2,                 5,                12),
    "heads":            (4,                 8,                12),
    "width":            (64,                512,              768),
    "dropout":          (0.0,               0.1,              0.1),
    "layer":            ("0",               "0",              "last"),
    "steps":            (220,               60_000,           1_010_000),
    "batch":            (128,               512,              32),
    "lr":               (6e-3,              5e-4,             5e-4),
}  # fmt: skip
TASKS = {  #            multiplication  arithmetic  lis
    "lambda1":          (1.0,           0.1,        0.1),
    "lambda2":          (0.004,         0.5,        0.5),
    "covariance_batch": (32,            128,        128),
    "train_size":       (808_000,       1_000_000,  1_000_000),
    "size":             (4,             5,          50),
    "size at demo":     (2,             3,          12),
}  # fmt: skip
NAMES = ("multiplication", "arithmetic", "lis")
STREAM = 0  # as --train-size
ETA = 0.001  # section 3.4
EPOCHS = 20  # a run is logged, measured on validation rows and saved so often
WARM_UP = 0.05  # of the steps
CLIP = 1.0  # norm of the gradient
WEIGHT_DECAY = 0.01
GPT2_VOCABULARY = 50257


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: contradictions stop (exit 2); `layer` is a number."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--task", choices=NAMES)
    data.add_argument("--size", type=cli.int_min(1), help="digits of a factor (4; demo 2), operators (5), or numbers "
                      "whose longest increasing subsequence is asked for (50)")  # fmt: skip
    data.add_argument("--train-size", type=examples, help="distinct training rows at most (paper: 808,000, other tasks "
                      "1,000,000), or `stream`: fresh ones at every step")  # fmt: skip
    data.add_argument("--data-file", type=Path, help="training rows from a file of the published multiplication data")
    network = parser.add_argument_group("network")
    network.add_argument("--layers", type=cli.int_min(1), help="blocks")
    network.add_argument("--heads", type=cli.int_min(1))
    network.add_argument("--width", type=cli.int_min(1), help="D")
    network.add_argument("--dropout", type=cli.float_in(0, 0.99), help="paper: 0.1 in its small networks")
    network.add_argument("--init-from", type=Path, help="weights of GPT-2, model.safetensors or pytorch_model.bin, "
                         "for multiplication; `none` at paper scale: from scratch (table 7)")  # fmt: skip
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=cli.int_min(1), help=f"in {EPOCHS} epochs of equal length; paper: 40 "
                              "passes over 808,000 rows at batch 32")  # fmt: skip
    optimisation.add_argument("--batch", type=cli.int_min(2), help="sequences a step; paper: 32, other tasks 128")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="at its peak; paper: 5e-4, small networks 1e-4")
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="times --lr (robustness)")
    precisions = ("auto", "float32", "bfloat16")
    optimisation.add_argument("--precision", choices=precisions, default="auto", help="of the network; the regulariser "
                              "is float32")  # fmt: skip
    optimisation.add_argument("--compile", action="store_true", help="torch.compile; for long runs on a GPU")
    method = parser.add_argument_group("method")
    method.add_argument("--lambda1", type=cli.float_in(0), help="of the variance; paper: 1 in multiplication, else "
                        "0.1 (appendix A)")  # fmt: skip
    method.add_argument("--lambda2", type=cli.float_in(0), help="of the covariance; paper: 0.004 in multiplication, "
                        "else 0.5 (appendix A)")  # fmt: skip
    method.add_argument("--projection-width", type=cli.int_min(1), default=2048, help="d; paper: 2048 (section 3.4)")
    method.add_argument("--layer", help="level that is regularised: 0 (embeddings), 1, ... or last; paper: last")
    axes = ("batch", "batch+length")
    method.add_argument("--covariance-axis", choices=axes, default="batch", help="a covariance for each position, or "
                        "one over all (appendix F)")  # fmt: skip
    method.add_argument("--covariance-batch", type=cli.int_min(2), help="N, sequences a covariance is taken over; "
                        "paper: its batch, 32 in multiplication, else 128")  # fmt: skip
    method.add_argument("--pause", type=cli.int_min(0), default=2, help="pause tokens between their two markers, 0: "
                        "no markers either; paper: 2 (section 3.5)")  # fmt: skip
    args = cli.parse(parser, SCALES, argv)

    args.lr *= args.lr_factor
    del args.lr_factor
    for name in ("lambda1", "lambda2", "covariance_batch", "train_size", "size"):
        row = TASKS["size at demo" if name == "size" and args.scale == "demo" else name]
        if getattr(args, name) is None:
            setattr(args, name, row[NAMES.index(args.task)])
    if args.layer not in ("last", *map(str, range(args.layers + 1))):
        fail(f"--layer {args.layer} is no level of {args.layers} blocks: give 0 to {args.layers}, or last")
    args.layer = args.layers if args.layer == "last" else int(args.layer)
    if args.width % args.heads:
        fail(f"--width {args.width} must be a multiple of --heads {args.heads}")
    if args.batch % args.covariance_batch:
        fail(f"--batch {args.batch} must be a multiple of --covariance-batch {args.covariance_batch}")
    if (args.data_file or args.init_from) and args.task != "multiplication":
        fail(f"--data-file and --init-from are for --task multiplication, not for {args.task}")
    if args.data_file and args.train_size == STREAM:
        fail("--data-file has a number of rows: --train-size stream has none")
    if args.scale == "paper" and args.task == "multiplication" and not args.init_from:
        fail("--scale paper goes on from GPT-2: give --init-from model.safetensors, or --init-from none for its shape "
             "from scratch")  # fmt: skip
    if str(args.init_from) == "none":
        args.init_from = None
    return args


def examples(text: str) -> int:
    """A type for add_argument: a number of rows, or STREAM for `stream`."""
    return STREAM if text == "stream" else cli.int_min(1)(text)


# ------------------------------------------------------------------------------------------------- model


class SeqVCR(nn.Module):
    """A GPT and the projection that only the regulariser sees."""

    def __init__(self, gpt: GPT, projection_width: int, seed: int):
        super().__init__()
        self.gpt = gpt
        with seeding.forked(seed, "projection"):
            self.projection = nn.Linear(gpt.wte.embedding_dim, projection_width, bias=False)
            nn.init.xavier_uniform_(self.projection.weight)


def vocabulary(task: tasks.Task, gpt2: bool) -> tuple[int, Tensor]:
    """(size, the network's token for each of the task's): the task's own, or GPT-2's with the pauses behind it."""
    if not gpt2:
        return len(task.symbols), torch.arange(len(task.symbols))
    pauses = {symbol: GPT2_VOCABULARY + number for number, symbol in enumerate(tasks.PAUSES)}
    known = GPT2_TOKENS | pauses
    return GPT2_VOCABULARY + len(pauses), torch.tensor([known[symbol] for symbol in task.symbols])


def build_model(args: argparse.Namespace, task: tasks.Task, device: torch.device) -> SeqVCR:
    """The network that a run's arguments describe, at its start, on `device`."""
    size, _ = vocabulary(task, bool(args.init_from))
    block = args.pause + 2 if args.pause else 0
    length = task.question + block + task.answer - 1
    gpt = GPT(size, length, args.layers, args.heads, args.width, args.dropout, args.seed)
    return SeqVCR(gpt, args.projection_width, args.seed).to(device)


# ------------------------------------------------------------------------------------------------- loss


class Energy(torch.autograd.Function):
    """Sums of squares over the rows of x = h W^T, (G, d) from h (G, n, D) and W (d, D), without keeping x (G, n, d)."""

    @staticmethod
    def forward(context: Any, h: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(h, weight)
        return (h @ weight.T).square_().sum(1)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = context.saved_tensors
        x = (h @ weight.T).mul_(2 * slope[:, None])
        return x @ weight, x.flatten(0, 1).T @ h.flatten(0, 1)


def variance_covariance(h: Tensor, weight: Tensor, rows: int, axis: str = "batch") -> tuple[Tensor, Tensor, Tensor]:
    """(L_var, L_cov, mean deviation) of x = W h for hidden states h (B, T, D) and W (d, D), float32 (equation 4).

    A covariance is taken over `rows` sequences (B is a multiple of it) at each position, or with axis `batch+length`
    over all positions of `rows` sequences; the terms are means over the covariances. With h centred in its group of n,
    M = W^T W and S = h^T h / (n - 1), C = W S W^T is never formed:

        sum of C^2  =  sum of (h M h^T)^2 / (n - 1)^2     (n x n)      or, for n > D,     tr (S M)^2     (D x D)
    """
    groups = h.unflatten(0, (-1, rows))  # (B / rows, rows, T, D)
    groups = groups.transpose(1, 2).flatten(0, 1) if axis == "batch" else groups.flatten(1, 2)
    centred = groups - groups.mean(1, keepdim=True)  # (G, n, D)
    others, (width, channels) = centred.shape[1] - 1, weight.shape
    variances = Energy.apply(centred, weight) / others  # (G, d), the diagonals of C
    product = weight.T @ weight
    small = (centred @ product @ centred.mT if others < channels else centred.mT @ centred @ product) / others
    squares = (small * small.mT).sum((1, 2))
    variance = F.relu(1 - (variances + ETA).sqrt()).mean()
    covariance = (squares - variances.square().sum(1)).mean() / width
    return variance, covariance, variances.detach().sqrt().mean()


def seqvcr_loss(
    model: SeqVCR, tokens: Tensor, *, answer: int, lambda1: float, lambda2: float, layer: int, axis: str,
    covariance_batch: int, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of rows of tokens (B, length) that end with `answer` tokens of answer; and (5,) for the log: loss, cross
    entropy, L_var, L_cov, deviation of x. One forward pass (equation 5).

    ABLATION (coefficients): `lambda1`, `lambda2`; at 0 and 0 (`off`) nothing is projected.
    ABLATION (projection width): the shape of `model.projection`.
    """
    with devices.autocast(precision, tokens.device):
        logits, levels = model.gpt(tokens[:, :-1], answer)
    predicting = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -answer:].flatten())
    loss, terms = predicting, torch.zeros(3, device=tokens.device)
    if lambda1 or lambda2:
        h, weight = levels[layer].float(), model.projection.weight
        variance, covariance, deviation = variance_covariance(h, weight, covariance_batch, axis)
        loss = predicting + lambda1 * variance + lambda2 * covariance
        terms = torch.stack([variance, covariance, deviation])
    return loss, torch.cat([torch.stack([loss, predicting]), terms]).detach()


# ------------------------------------------------------------------------------------------------- data


def encode(args: argparse.Namespace, task: tasks.Task, rows: Tensor) -> Tensor:
    """Insert the pauses into a task's rows, and translate to GPT-2's tokens for its network: uint8, or int32."""
    rows = tasks.with_pauses(task, rows, args.pause)
    if not args.init_from:
        return rows
    table = vocabulary(task, True)[1].to(torch.int32)
    return upload(table, rows.device)[rows.long()]


def batches(args: argparse.Namespace, task: tasks.Task, rows: Tensor, steps: range) -> Iterator[Tensor]:
    """The batches (B, length) int64 of consecutive `steps`: passes over `rows`, each in an order of its own, or with
    --train-size stream fresh rows. They follow from (seed, step) alone; a pass drops its last incomplete batch.
    """
    if args.train_size == STREAM:
        for step in steps:
            yield encode(args, task, tasks.stream(task, args.seed, step, args.batch, rows.device)).long()
        return
    steps_per_pass = len(rows) // args.batch
    for step in steps:
        number, place = divmod(step, steps_per_pass)
        if place == 0 or step == steps.start:
            order = seeding.permutation(args.seed, "order", number, len(rows), rows.device)
        yield rows[order[place * args.batch : (place + 1) * args.batch]].long()


@torch.no_grad()
def token_correct(model: GPT, rows: Tensor, answer: int) -> Tensor:
    """Whether each token of the answer is the likeliest one, teacher-forced: (n, answer) bool for rows (n, length).

    A row is right as a whole if and only if greedy decoding would give its answer: the first wrong token is the same.
    """
    was_training = model.training
    model.eval()
    found = [
        model(block[:, :-1], answer)[0].argmax(2) == block[:, -answer:] for block in map(Tensor.long, rows.split(1024))
    ]
    model.train(was_training)
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------- train


def rate_factor(progress: float) -> float:
    """The learning rate's factor at a progress from 0 to 1: a linear warm-up, then half a cosine to zero."""
    return min(1.0, progress / WARM_UP) * schedules.cosine(max(0.0, progress - WARM_UP) / (1 - WARM_UP))


def build_optimizer(args: argparse.Namespace, model: SeqVCR) -> torch.optim.AdamW:
    """AdamW; the projection is not decayed."""
    groups = [{"params": list(model.gpt.parameters()), "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": list(model.projection.parameters()), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, fused=True)


def train(
    args: argparse.Namespace, run: Run, model: SeqVCR, task: tasks.Task, data: tasks.Examples,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Train on encoded rows. Measures on validation rows and saves after each epoch, and goes on from there."""
    device = data.validation.device
    steps, steps_per_epoch = args.steps, -(-args.steps // EPOCHS)
    if args.rehearse:
        steps, steps_per_epoch = 2 * args.rehearse, args.rehearse
    last = -(-steps // steps_per_epoch)
    first = run.resume(model, optimizer)
    if first is None:
        run.end_epoch(0, last, {})
        first = 0
    loss_fn = torch.compile(seqvcr_loss) if args.compile else seqvcr_loss

    for epoch in tqdm(range(first, last), run.name, last, initial=first, disable=None, leave=False):
        started, totals = time.perf_counter(), torch.zeros(5, device=device)
        epoch_steps = range(epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, steps))
        model.train()
        for step, tokens in zip(epoch_steps, batches(args, task, data.train, epoch_steps), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate_factor((step + 0.5) / steps)
            # A resumed run must draw the same dropout masks.
            if args.dropout:
                seeding.reseed(args.seed, "dropout", step)
            loss, parts = loss_fn(
                model, tokens, answer=task.answer, lambda1=args.lambda1, lambda2=args.lambda2, layer=args.layer,
                axis=args.covariance_axis, covariance_batch=args.covariance_batch, precision=args.precision,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
            optimizer.step()
            totals += parts
        means = (totals / len(epoch_steps)).tolist()  # the first host-device synchronisation of the epoch
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, totals):
            return
        correct = token_correct(model.gpt, data.validation, task.answer).float()
        names = ("loss", "cross_entropy", "variance_loss", "covariance_loss", "projected_std")
        record = dict(zip(names, means, strict=True)) | {
            "exact_match": 100 * correct.prod(1).mean().item(),
            "step": epoch_steps.stop,
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": len(epoch_steps) * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(device),
        }
        positions = {f"accuracy_{place}": 100 * share for place, share in enumerate(correct.mean(0).tolist())}
        run.end_epoch(epoch + 1, last, record, details=positions)
    run.save_model({"model": model.state_dict(), "epoch": last, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    smaller = f"--batch {args.batch // 2} or a smaller --width needs less, but is another run"
    with run_lock(args.out), devices.memory_for(device, f"--width {args.width} --batch {args.batch}", smaller):
        run = Run(args.out, vars(args), __file__, args.replace)
        if run.finished:
            return
        task, count = tasks.choose(args.task, args.size), args.train_size
        if args.rehearse:
            count, task.measured = min(count, 100 * args.batch), args.batch
        model = build_model(args, task, device)
        if args.init_from:
            fill_gpt2(model.gpt, args.init_from)
        data = tasks.load(task, count, args.data_file, device)
        if args.train_size != STREAM and args.batch > len(data.train):
            fail(f"--batch {args.batch} is more than the {len(data.train)} training rows")
        setting = f"{args.task} of size {args.size}, GPT of {args.layers} blocks of width {args.width}"
        run.write_config(
            setting,
            devices.environment(device) | {"data": checkpoints.sha256(*(x.cpu() for x in data)), "steps": args.steps},
        )
        data = tasks.Examples(*(encode(args, task, rows) for rows in data))
        train(args, run, model, task, data, build_optimizer(args, model))


if __name__ == "__main__":
    main()
