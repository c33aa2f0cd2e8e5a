"""BSA: sparse binary codes with about K active features for given embeddings; a linear autoencoder with a rounded code.

"Sparsity beyond TopK: A Novel Cosine Loss for Sparse Binary Representations", ICLR 2025 submission UbLvSPMvMA,
withdrawn. Re-implemented from secondary sources: the abstract, three reviews and five ablation plans. The paper's text
and code are not available; README.md lists what is unknown for this reason.

A linear encoder and a sigmoid give each feature a value between 0 and 1. Rounding these values gives the code, and the
gradient passes through the rounding unchanged (straight-through estimator). The alignment loss pulls the values towards
the code in which exactly the K largest features are on:

    s  = sigmoid(W_enc x + b_enc)     z  = round(s), dz/ds := 1     x^ = W_dec z + b_dec
    zK = one on the K largest entries of s, zero elsewhere
    L  = 1 - cos(x^, x)  +  alpha (1 - cos(s, zK))                  means over the batch

    x  embedding, centred, |x|^2 = d   (B, d)      s  pre-rounding code   (B, N)      N, K  --latent, --active
    z  code                            (B, N)      x^ reconstruction      (B, d)      alpha --alpha, 1 in the paper

    python bsa/train.py                                     # demo: planted concepts, about 15 s on one core
    python bsa/train.py --alpha 0 --out runs/scratch2       # an ablation
    python bsa/train.py --scale gpu --device cpu            # 30,532 MeSH terms, about 80 s on one core
    python bsa/train.py --data my.npy --latent 4096 --active 64 --out runs/mine

An epoch here is about 1/20 of --steps (log and checkpoint interval), not a pass over the data.

Our choices, not the paper's:
 1. All training settings: Adam with a constant learning rate, the batch size, the number of steps, the split, N and K.
 2. Rows are centred by the training mean and scaled to norm sqrt(d).
 3. The sparse initialisation (--init sparse): encoder weights three times as large, and a bias with which about K
    features are active at the first step. It does part of the alignment loss's work, so the study of that loss is run
    from both initialisations.
 4. The alignment target is zK itself (--target binary). The sources allow two other readings, which are flags.
"""

import argparse
import math
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.planted import planted_concepts
from common import checkpoints, cli, devices, files, seeding
from common.cli import fail
from common.lock import run_lock
from common.run import Run

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #          demo         gpu      paper
    "data_set": ("planted",    "mesh",  "file"),
    "latent":   (512,          1024,    16384),
    "active":   (6,            32,      128),
    "steps":    (4000,         5000,    20000),
    "batch":    (256,          256,     4096),
    "lr":       (0.01,         0.01,    0.001),
}  # fmt: skip
FORMATS = (".npy", ".npz", ".safetensors")
CACHE_NAMES = r"mesh-minilm\.npy|(train|val)-\d+-[0-9a-f]{12}\.npy"  # files that this project puts into --data
MIN_ABS_VALUE, MAX_ABS_VALUE = 1e-15, 1e15  # of input embeddings: their squares neither underflow nor overflow
EPOCHS = 20  # metrics are logged and the state is saved once per epoch


def choose_data_set(data_set: str, data: Path) -> str:
    """Return "file" if `data` is a matrix file. Exits with code 2 if `data` would be ignored."""
    if not data.is_dir() and data.suffix.lower() in FORMATS:
        return "file"
    if data_set == "file" or data.is_file() or (data.suffix and not data.exists()):
        fail(f"invalid --data {data}: give a matrix file ({', '.join(FORMATS)}) or an existing folder")
    for path in sorted(data.glob("*.*")):
        if path.suffix.lower() in FORMATS and not re.fullmatch(CACHE_NAMES, path.name):
            fail(f"--data {data}: --data-set {data_set} does not read {path}: give --data {path} or another folder")
    return data_set


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse all flags and resolve `alpha` to a number. Exits with code 2 if flags contradict each other."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=("planted", "mesh", "file"), help="planted: synthetic "
                      "concepts; mesh: MeSH terms; file: --data is a matrix file")  # fmt: skip
    optimisation = parser.add_argument_group("optimisation (unknown in the paper)")
    optimisation.add_argument("--steps", type=cli.int_in(1), help=f"optimiser steps, in about {EPOCHS} epochs")
    optimisation.add_argument("--batch", type=cli.int_in(2), help="rows per step")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="learning rate of Adam, constant")
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="multiplies --lr; "
                              "used by the robustness study")  # fmt: skip
    optimisation.add_argument("--compile", action="store_true", help="apply torch.compile to forward pass and loss")
    method = parser.add_argument_group("method")
    method.add_argument("--latent", type=cli.int_in(2, cli.MAX_WIDTH), help="N, number of features of the code")
    method.add_argument("--active", type=cli.int_in(1, cli.MAX_WIDTH), help="K, target number of active features")
    method.add_argument("--alpha", default="1", help="weight of the alignment loss; paper: 1. matched: N/(2K) for "
                        "mse (1/(2K) with --mse-reduction sum), so that the alignment losses of mse and cosine agree "
                        "near the optimum; 4matched: 4 times that")  # fmt: skip
    distances = ("cosine", "mse")
    method.add_argument("--reconstruction", choices=distances, default="cosine", help="distance between x^ and x")
    method.add_argument("--alignment", choices=(*distances, "l1"), default="cosine", help="alignment loss between s "
                        "and zK (cosine, mse); l1: sum of the sigmoid outputs s, no target")  # fmt: skip
    targets = ("binary", "value", "rounded")
    method.add_argument("--target", choices=targets, default="binary", help="binary: s vs top-K mask zK; value: s vs "
                        "its own top-K values; rounded: round(s) vs zK")  # fmt: skip
    method.add_argument("--mse-reduction", choices=("mean", "sum"), default="mean", help="reduction of mse over the "
                        "last dimension")  # fmt: skip
    method.add_argument("--init", choices=("sparse", "torch"), default="sparse", help="sparse: about K active "
                        "features at the first step; torch: nn.Linear's default")  # fmt: skip
    codes = ("round", "topk", "topk-values")
    method.add_argument("--code", choices=codes, default="round", help="round: the method. Baselines (need --alpha 0): "
                        "topk: K largest features set to 1, gradient to all; topk-values: K largest keep their values "
                        "if positive (similar to a TopK autoencoder)")  # fmt: skip
    given_data_set = parser.parse_known_args(argv)[0].data_set  # before the defaults of --scale are set
    args = cli.parse(parser, SCALES, argv)

    cli.apply_lr_factor(args)
    args.data_set = choose_data_set(args.data_set, args.data)
    if given_data_set not in (None, args.data_set):
        fail(f"--data-set {given_data_set} does not read --data {args.data}: drop --data-set, or give a folder")
    if args.active >= args.latent:
        fail(
            f"--active {args.active} must be less than --latent {args.latent}: give --active {args.latent - 1} or less"
        )
    matched, factor = args.alpha.endswith("matched"), args.alpha.removesuffix("matched")
    if matched and args.alignment != "mse":
        fail(f"--alpha {args.alpha} requires --alignment mse, not {args.alignment}: give a number")
    try:
        args.alpha = 1.0 if matched and not factor else cli.float_in(0)(factor)
    except (ValueError, argparse.ArgumentTypeError):
        fail(f"invalid --alpha {args.alpha!r}: give a number >= 0, matched or, for example, 4matched")
    if matched:
        args.alpha *= (args.latent if args.mse_reduction == "mean" else 1) / (2 * args.active)
    if args.mse_reduction == "sum" and "mse" not in (args.reconstruction, args.alignment):
        fail("--mse-reduction sum has no effect without mse: drop it, or give --reconstruction mse or --alignment mse")
    if args.target != "binary" and args.alignment == "l1":
        fail(f"--target {args.target} has no effect with --alignment l1: drop one of them")
    if not args.alpha and (args.alignment, args.target) != ("cosine", "binary"):
        fail("--alpha 0 removes the alignment loss: drop --alignment and --target, or give another --alpha")
    if args.code != "round" and args.alpha:
        fail(f"--code {args.code} cannot be used with an alignment loss: give --alpha 0")
    return args


# ------------------------------------------------------------------------------------------------- model


class StraightThrough(torch.autograd.Function):
    """Return `code` in the forward pass; pass its gradient to `s` unchanged in the backward pass."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, code: Tensor) -> Tensor:
        return code

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def round_ste(s: Tensor) -> Tensor:
    """Return round(s) for s in (0, 1) with a straight-through gradient. 0.5 is rounded to 0, as by torch.round."""
    return StraightThrough.apply(s, (s.detach() > 0.5).to(s.dtype))


def topk_code(h: Tensor, active: int) -> Tensor:
    """Return zK: one on the `active` largest entries of each row of h (B, N), zero elsewhere.

    Each row has exactly `active` ones, also if entries are equal.
    """
    return torch.zeros_like(h).scatter_(1, h.topk(active, dim=1).indices, 1.0)


class BSA(nn.Module):
    """Linear encoder and linear decoder, both with bias, weights not tied. `mean` (d,) is the training mean."""

    mean: Tensor

    def __init__(self, dim: int, latent: int, active: int, init: str, seed: int):
        super().__init__()
        with seeding.seeded_fork_rng(seed, "encoder"):
            self.encoder = nn.Linear(dim, latent)
        with seeding.seeded_fork_rng(seed, "decoder"):
            self.decoder = nn.Linear(latent, dim)
        self.register_buffer("mean", torch.zeros(dim))
        # Rows with |x|^2 = d give logits of std sqrt(3), so this bias leaves about K of them positive.
        if init == "sparse":
            with torch.no_grad():
                self.encoder.weight.mul_(3)
                self.encoder.bias.fill_(-NormalDist().inv_cdf(1 - active / latent) * math.sqrt(3))

    def normalise(self, rows: Tensor) -> Tensor:
        """Centre rows (n, d) by `mean` and scale each to norm sqrt(d)."""
        centred = rows - self.mean
        return centred * (rows.shape[1] ** 0.5 / centred.norm(dim=1, keepdim=True).clamp_min(MIN_ABS_VALUE))


def encode(h: Tensor, active: int, code: str) -> tuple[Tensor, Tensor]:
    """Return (s, z) for logits h (B, N): the pre-rounding code and the code, both (B, N) float32.

    `topk` passes the gradient of z to all features (straight-through). `topk-values` keeps the positive ones of the K
    largest logits, at most K values. It shares the cosine loss and the initialisation with the method and has no
    pre-bias and no auxiliary loss, so it is not the TopK autoencoder of the literature in every detail.
    """
    s = h.float().sigmoid()
    if code == "round":
        return s, round_ste(s)
    zk = topk_code(h.detach().float(), active)
    if code == "topk":
        return s, StraightThrough.apply(s, zk)
    return s, h.float().relu() * zk


def build_model(args: argparse.Namespace, dim: int, device: torch.device) -> BSA:
    """Return the network of a run for rows of `dim` channels, on `device`. Its `mean` is still zero."""
    return BSA(dim, args.latent, args.active, args.init, args.seed).to(device)


# ------------------------------------------------------------------------------------------------- loss


def reconstruction_loss(x_hat: Tensor, x: Tensor, distance: str, reduction: str = "mean") -> Tensor:
    """ABLATION (distance): 1 - cos(x^, x) of each row, or its squared error: (B,) float32 from (B, d).

    `reduction` (mean or sum) of the squared error is over the channels. The norm of x^ is clamped to at least
    1e-4 |x|, because the gradient of the cosine is unbounded at x^ = 0 (an empty code without a decoder bias).
    """
    x_hat = x_hat.float()
    if distance == "mse":
        error = (x_hat - x).square()
        return error.mean(1) if reduction == "mean" else error.sum(1)
    norm = x.norm(dim=1)
    return 1 - (x_hat * x).sum(1) / (norm * x_hat.norm(dim=1).clamp_min(1e-4 * norm))


def alignment_loss(
    s: Tensor, h: Tensor, active: int, distance: str, target: str = "binary", reduction: str = "mean"
) -> Tensor:
    """ABLATION (distance): distance of each row's code from the code of exactly its K largest features: (B,).

    s (B, N) is compared with a target t: zK (`binary`), or s where zK is one (`value`). `rounded` compares round(s)
    with zK. The closed forms do not compute t. With S2 = sum s^2, and V1 = sum v, V2 = sum v^2 over the K largest
    values v of s:

        cosine  1 - V1 / sqrt(K S2)    or, for `value`,  1 - sqrt(V2 / S2)
        mse     (S2 - 2 V1 + K) / N                      (S2 - V2) / N

    `l1` is the sum of s. The K largest are selected by the logits h (B, N), because s has ties where it saturates.
    """
    if distance == "l1":
        return s.sum(1)
    code = round_ste(s) if target == "rounded" else s
    v = code.gather(1, h.topk(active, dim=1).indices)
    s2, v1 = code.square().sum(1), v.sum(1)
    if distance == "cosine":
        if target == "value":
            return 1 - ((v.square().sum(1) + 1e-12) / (s2 + 1e-12)).sqrt()
        return 1 - v1 / (active * s2.clamp_min(1e-4)).sqrt()
    error = s2 - v.square().sum(1) if target == "value" else s2 - 2 * v1 + active
    return error / s.shape[1] if reduction == "mean" else error


def bsa_loss(
    model: BSA, x: Tensor, *, active: int, alpha: float, reconstruction: str, alignment: str, target: str,
    reduction: str, code: str, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss of normalised rows x (B, d) and a tensor (5,) of metrics for the log.

    The metrics are the loss, the reconstruction loss, the alignment loss, the mean number of active features and the
    share of rows without an active feature. `reconstruction`, `alignment`, `target`, `reduction`, `code`: values of the
    flags --reconstruction, --alignment, --target, --mse-reduction, --code.
    ABLATION (alignment loss): `alpha`. At 0 the top-K selection is skipped.
    """
    with devices.autocast(precision, x.device):
        h = model.encoder(x)
    s, z = encode(h, active, code)
    with devices.autocast(precision, x.device):
        x_hat = model.decoder(z)
    rec_loss = reconstruction_loss(x_hat, x, reconstruction, reduction).mean()
    loss, align_loss = rec_loss, torch.zeros_like(rec_loss)
    if alpha:
        align_loss = alignment_loss(s, h.float(), active, alignment, target, reduction).mean()
        loss = loss + alpha * align_loss
    counts = z.detach().count_nonzero(1).float()
    return loss, torch.stack([loss, rec_loss, align_loss, counts.mean(), (counts == 0).float().mean()]).detach()


# ------------------------------------------------------------------------------------------------- data


class Splits(NamedTuple):
    """The distinct embeddings, not normalised, float32 on the device, in three splits. Each keeps the source's order.

    `held_out` is for choosing hyper-parameters. `indices` are the row numbers in the source, (train, held_out, test).
    `source_rows` is the number of its rows, with duplicates. `digest` is the SHA-256 of the whole matrix.
    """

    train: Tensor
    held_out: Tensor
    test: Tensor
    indices: tuple[Tensor, Tensor, Tensor]
    source_rows: int
    digest: str


def read_matrix(path: Path) -> np.ndarray:
    """Return the only matrix (rows, channels) of a file, float32.

    Exits with code 2 if the file is missing or damaged, or does not contain exactly one matrix.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            arrays = checkpoints.read_safetensors(path)
        else:
            loaded = np.load(path, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except FileNotFoundError:
        fail(f"--data {path} does not exist: give an existing matrix file ({', '.join(FORMATS)})")
    except OSError as error:
        fail(f"--data {path} cannot be read ({error.strerror}): give a file with one numeric matrix")
    except files.DamagedFile as error:
        fail(f"--data {error}: give a file with one numeric matrix")
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        fail(f"--data {path} cannot be read (cut off, damaged or not numeric): give a file with one numeric matrix")
    matrices = [array for array in arrays.values() if array.ndim == 2 and array.dtype.kind in "fiu"]
    if len(matrices) != 1:
        fail(
            f"--data {path} contains {len(matrices)} numeric matrices: give a file with one matrix, one row per concept"
        )
    limit = np.float64(MAX_ABS_VALUE)  # not a Python float: it would become infinity in float16
    if (np.isfinite(matrices[0]) & (np.abs(matrices[0]) > limit)).any():
        fail(f"--data {path} contains absolute values above {MAX_ABS_VALUE:g}: rescale the matrix")
    if matrices[0].shape[1] < 2:
        fail(f"--data {path} has one column: give at least two, because rows are scaled to equal norm")
    return matrices[0].astype(np.float32)


def load_splits(data_set: str, data: Path, device: torch.device, data_seed: int) -> Splits:
    """Return a data set without duplicate rows, split 8 : 1 : 1. The split and planted concepts depend on `data_seed`.

    Exits with code 2 if rows are not finite, (nearly) zero or equal to the mean of the training rows, which leaves
    nothing to reconstruct. The message lists their first indices, counted from 0.
    """

    def refuse(rows: np.ndarray, problem: str) -> None:
        if len(rows):
            fail(
                f"--data {path}: {len(rows)} of {len(matrix)} rows {problem} (first row indices, from 0: "
                f"{', '.join(map(str, rows[:5]))}): remove these rows"
            )

    path = data if data_set == "file" else data / "mesh-minilm.npy"
    if data_set == "mesh" and not path.exists():
        fail(f"--data {data}: {path} does not exist: run `python -m bsa.concepts --data {data}`")
    matrix = planted_concepts(seed=data_seed).rows if data_set == "planted" else read_matrix(path)
    refuse(np.flatnonzero(~np.isfinite(matrix).all(1)), "contain NaN or infinity")
    near_zero = (np.abs(matrix) < MIN_ABS_VALUE).all(1)
    refuse(np.flatnonzero(near_zero), f"contain no absolute value above {MIN_ABS_VALUE:g}")
    _, distinct = np.unique(matrix, axis=0, return_index=True)
    if duplicates := len(matrix) - len(distinct):
        print(f"{data_set}: {duplicates} duplicate rows dropped", flush=True)
    if len(distinct) < 20:
        fail(f"--data {path} contains {len(distinct)} distinct rows: give at least 20")
    permutation = seeding.permutation(data_seed, "split", 0, len(distinct), "cpu")
    order = torch.from_numpy(np.sort(distinct))[permutation]
    tenth = len(order) // 10
    test, held_out, train = (x.sort().values for x in order.tensor_split([tenth, 2 * tenth]))
    rows = torch.from_numpy(matrix)
    splits = Splits(
        train=rows[train].to(device),
        held_out=rows[held_out].to(device),
        test=rows[test].to(device),
        indices=(train, held_out, test),
        source_rows=len(rows),
        digest=checkpoints.sha256(rows),
    )
    mean = splits.train.mean(0)
    for split, indices in zip(splits[:3], splits.indices, strict=True):
        equal = ((split - mean).abs() < MIN_ABS_VALUE).all(1).cpu()
        refuse(indices[equal].numpy(), "equal the mean of the training rows")
    return splits


def epoch_steps(args: argparse.Namespace) -> list[range]:
    """Return the steps of each epoch. All epochs are equally long, except that the last one may be shorter."""
    steps, steps_per_epoch = args.steps, -(-args.steps // EPOCHS)
    if args.rehearse:
        steps, steps_per_epoch = 2 * args.rehearse, args.rehearse
    return [range(steps)[start : start + steps_per_epoch] for start in range(0, steps, steps_per_epoch)]


def batches(args: argparse.Namespace, rows: Tensor, steps: range) -> Iterator[Tensor]:
    """Yield the batches (B, d) of the consecutive `steps` of one epoch.

    Each pass over rows (n, d) has a new order and drops the last incomplete batch.
    """
    steps_per_pass = len(rows) // args.batch
    for step in steps:
        pass_index, batch_index = divmod(step, steps_per_pass)
        if batch_index == 0 or step == steps.start:  # an epoch may begin in the middle of a pass
            order = seeding.permutation(args.seed, "order", pass_index, len(rows), rows.device)
        yield rows[order[batch_index * args.batch : (batch_index + 1) * args.batch]]


# ------------------------------------------------------------------------------------------------- train


def train(args: argparse.Namespace, run: Run, model: BSA, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Train on normalised rows (n, d). Saves after each epoch; the same command resumes from there."""
    loss_fn = torch.compile(bsa_loss) if args.compile else bsa_loss
    epochs = epoch_steps(args)
    final_epoch = len(epochs)
    start_epoch = run.resume(model, optimizer)
    if start_epoch is None:
        start_epoch = 0
        run.end_epoch(0, final_epoch, {})

    bar = tqdm(range(start_epoch, final_epoch), run.name, final_epoch, initial=start_epoch, disable=None, leave=False)
    for epoch in bar:
        started, sums = time.perf_counter(), torch.zeros(5, device=rows.device)
        steps = epochs[epoch]

        for x in batches(args, rows, steps):
            loss, batch_metrics = loss_fn(
                model,
                x,
                active=args.active,
                alpha=args.alpha,
                reconstruction=args.reconstruction,
                alignment=args.alignment,
                target=args.target,
                reduction=args.mse_reduction,
                code=args.code,
                precision=args.precision,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums += batch_metrics  # stays on the device: no host-device synchronisation per step

        means = (sums / len(steps)).tolist()  # synchronises, so `seconds` includes the work of the device
        seconds = time.perf_counter() - started
        if run.finish_if_diverged(epoch + 1, sums):
            return
        names = ("loss", "reconstruction_loss", "alignment_loss", "active_mean", "empty_share")
        metrics = dict(zip(names, means, strict=True)) | {
            "step": steps.stop,
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": len(steps) * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(rows.device),
        }
        run.end_epoch(epoch + 1, final_epoch, metrics)

    run.save_model({"model": model.state_dict(), "epoch": final_epoch, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    usage = f"--latent {args.latent} --batch {args.batch}"
    remedy = f"use --batch {args.batch // 2} (about half the memory, different results)"
    with run_lock(args.out), devices.report_oom(device, usage, remedy, args.precision):
        run = Run(vars(args), __file__)
        if run.finished:
            return
        data = load_splits(args.data_set, args.data, device, args.data_seed)
        if args.batch > len(data.train):
            n = len(data.train)
            fail(f"--batch {args.batch} is larger than the training set ({n} examples): give at most {n}")
        run.write_config(
            f"{args.data_set}, code of {args.latent} features",
            devices.environment(device) | {"data": data.digest, "steps": args.steps},
        )
        model = build_model(args, data.train.shape[1], device)
        model.mean.copy_(data.train.mean(0))
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        train(args, run, model, model.normalise(data.train), optimizer)


if __name__ == "__main__":
    main()
