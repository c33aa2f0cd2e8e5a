"""BSA: binary codes of about K features for given embeddings; a linear autoencoder whose code is rounded.

"Sparsity beyond TopK: A Novel Cosine Loss for Sparse Binary Representations", ICLR 2025 submission UbLvSPMvMA,
withdrawn. Re-implemented from secondary sources: the abstract, three reviews and five ablation plans; the paper's text
and code could not be had. README.md lists what is therefore not known.

A linear encoder and a sigmoid give every feature a number between 0 and 1; rounded, those are the code, and the
gradient passes through the rounding unchanged. The alignment loss pulls the numbers towards the code that has exactly
the K largest features on:

    s  = sigmoid(W_enc x + b_enc)     z  = round(s), dz/ds := 1     x^ = W_dec z + b_dec
    zK = one on the K largest entries of s, zero elsewhere
    L  = 1 - cos(x^, x)  +  alpha (1 - cos(s, zK))                  means over the batch

    x  embedding, centred, |x|^2 = d   (B, d)      s  pre-rounding code   (B, N)      N, K  --latent, --active
    z  code                            (B, N)      x^ reconstruction      (B, d)      alpha --alpha, 1 in the paper

    python bsa/train.py                                     # demo: planted concepts, about 15 s of one core
    python bsa/train.py --alpha 0 --out runs/scratch2       # an ablation
    python bsa/train.py --scale gpu --device cpu            # 30,532 MeSH terms, about 80 s of one core
    python bsa/train.py --data my.npy --latent 4096 --active 64 --out runs/mine

Ours, not the paper's:
 1. Everything about training: Adam and its constant rate, the batch, the number of steps, the split, N and K.
 2. Rows are centred by the training mean and scaled to norm sqrt(d).
 3. The sparse start (--init sparse): encoder weights three times as large, and a bias that lets K features begin on.
    It does part of the alignment loss's work, so the study on that loss is run from both starts.
 4. The alignment target is zK itself (--target binary); two other readings of the sources are flags.
"""

import argparse
import math
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.planted import plant
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
EPOCHS = 20  # a run is logged and saved so often


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: contradictions stop (exit 2), and `alpha` is a number."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=("planted", "mesh", "file"), help="file: --data names a matrix")
    optimisation = parser.add_argument_group("optimisation (unknown in the paper)")
    optimisation.add_argument("--steps", type=cli.int_min(1), help=f"in {EPOCHS} epochs of equal length")
    optimisation.add_argument("--batch", type=cli.int_min(2), help="rows a step")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="of Adam, constant")
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="times --lr (robustness)")
    precisions = ("auto", "float32", "bfloat16")
    optimisation.add_argument("--precision", choices=precisions, default="auto", help="of the matrix products alone")
    optimisation.add_argument("--compile", action="store_true", help="torch.compile; for long runs on a GPU")
    method = parser.add_argument_group("method")
    method.add_argument("--latent", type=cli.int_min(2), help="N, features of the code")
    method.add_argument("--active", type=cli.int_min(1), help="K, features that should be on")
    method.add_argument("--alpha", default="1", help="weight of the alignment loss; `matched`, `4matched` ...: times "
                        "what makes the mse alignment equal the cosine's near the solution; paper: 1")  # fmt: skip
    method.add_argument("--reconstruction", choices=("cosine", "mse"), default="cosine")
    method.add_argument("--alignment", choices=("cosine", "mse", "l1"), default="cosine", help="l1: sum of s instead")
    targets = ("binary", "value", "rounded")
    method.add_argument("--target", choices=targets, default="binary", help="what is aligned: s with zK, s with its "
                        "own K largest values, or the rounded z with zK")  # fmt: skip
    method.add_argument("--mse-reduction", choices=("mean", "sum"), default="mean", help="over channels or features")
    method.add_argument("--init", choices=("sparse", "torch"), default="sparse", help="torch: as nn.Linear starts")
    codes = ("round", "topk", "topk-values")
    method.add_argument("--code", choices=codes, default="round", help="baselines: exactly the K largest features on, "
                        "or their values (a TopK autoencoder); take --alpha 0")  # fmt: skip
    args = cli.parse(parser, SCALES, argv)

    args.lr *= args.lr_factor
    del args.lr_factor
    if args.data.suffix in FORMATS:
        args.data_set = "file"
    elif args.data_set == "file":
        fail(f"--data-set file wants a matrix, --data FILE ending in {', '.join(FORMATS)}; --data is {args.data}")
    if args.active >= args.latent:
        fail(f"--active {args.active} must be less than --latent {args.latent}: else all features are on")
    factor, matched, rest = args.alpha.partition("matched")
    if matched and args.alignment != "mse":
        fail(f"--alpha {args.alpha} is for --alignment mse: for {args.alignment} give a number")
    try:
        args.alpha = 1.0 if matched and not factor else cli.float_in(0)(factor + rest)
    except (ValueError, argparse.ArgumentTypeError):
        fail(f"--alpha {args.alpha} is neither `matched` nor a number of at least 0")
    if matched:
        args.alpha *= (args.latent if args.mse_reduction == "mean" else 1) / (2 * args.active)
    if args.code != "round" and args.alpha:
        fail(f"--code {args.code} has its K features without an alignment loss: give --alpha 0")
    return args


# ------------------------------------------------------------------------------------------------- model


class PassThrough(torch.autograd.Function):
    """`code` in the forward pass; in the backward pass its gradient goes to `s` unchanged."""

    @staticmethod
    def forward(context: Any, s: Tensor, code: Tensor) -> Tensor:
        return code

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


def rounded(s: Tensor) -> Tensor:
    """round(s) for s in (0, 1), one half going to zero as in torch.round; the gradient passes through."""
    return PassThrough.apply(s, (s.detach() > 0.5).to(s.dtype))


def topk_code(h: Tensor, active: int) -> Tensor:
    """zK: one on the `active` largest entries of every row of h (B, N), zero elsewhere; exactly as many under ties."""
    return torch.zeros_like(h).scatter_(1, h.topk(active, dim=1).indices, 1.0)


class BSA(nn.Module):
    """Encoder and decoder, both linear with bias, untied. `mean` (d,) is that of the training rows."""

    mean: Tensor

    def __init__(self, width: int, latent: int, active: int, init: str, seed: int):
        super().__init__()
        with seeding.forked(seed, "encoder"):
            self.encoder = nn.Linear(width, latent)
        with seeding.forked(seed, "decoder"):
            self.decoder = nn.Linear(latent, width)
        self.register_buffer("mean", torch.zeros(width))
        if init == "sparse":  # rows of |x|^2 = d give logits of deviation sqrt(3), so that about K exceed the bias
            with torch.no_grad():
                self.encoder.weight.mul_(3)
                self.encoder.bias.fill_(-NormalDist().inv_cdf(1 - active / latent) * math.sqrt(3))

    def normalise(self, rows: Tensor) -> Tensor:
        """Centre rows (n, d) and scale each to norm sqrt(d)."""
        centred = rows - self.mean
        return centred * (rows.shape[1] ** 0.5 / centred.norm(dim=1, keepdim=True).clamp_min(1e-12))


def encode(h: Tensor, active: int, code: str) -> tuple[Tensor, Tensor]:
    """(s, z) from logits h (B, N): the pre-rounding code and the code, float32."""
    s = h.float().sigmoid()
    if code == "round":
        return s, rounded(s)
    largest = topk_code(h.detach().float(), active)
    return s, PassThrough.apply(s, largest) if code == "topk" else h.float().relu() * largest


def build_model(args: argparse.Namespace, width: int, device: torch.device) -> BSA:
    """Return the network of a run for rows of `width` channels, on `device`. Its `mean` is still zero."""
    return BSA(width, args.latent, args.active, args.init, args.seed).to(device)


# ------------------------------------------------------------------------------------------------- loss


def reconstruction_loss(rebuilt: Tensor, x: Tensor, kind: str, reduction: str = "mean") -> Tensor:
    """ABLATION (distance): 1 - cos(x^, x) of each row, or its squared error; (B,) from (B, d), float32.

    An empty code without bias would rebuild 0, where the cosine's gradient has no bound: lengths below 1e-4 |x| count
    as that much. `reduction` of the squared error is over the channels.
    """
    rebuilt = rebuilt.float()
    if kind == "mse":
        return getattr((rebuilt - x).square(), reduction)(1)
    length = x.norm(dim=1)
    return 1 - (rebuilt * x).sum(1) / (length * rebuilt.norm(dim=1).clamp_min(1e-4 * length))


def alignment_loss(
    s: Tensor, h: Tensor, active: int, kind: str, target: str = "binary", reduction: str = "mean"
) -> Tensor:
    """ABLATION (distance): how far the code of each row is from having exactly its K largest features on; (B,).

    s (B, N) is compared with a target t: zK (`binary`) or s where zK is one (`value`); `rounded` compares round(s)
    with zK. In closed form, without t: with S2 = sum s^2, and V1 = sum v, V2 = sum v^2 over the K largest v of s,

        cosine  1 - V1 / sqrt(K S2)    or, for `value`,  1 - sqrt(V2 / S2)
        mse     (S2 - 2 V1 + K) / N                      (S2 - V2) / N

    `l1` is the sum of s. The K largest are looked for among the logits h, which do not tie where s saturates.
    """
    if kind == "l1":
        return s.sum(1)
    code = rounded(s) if target == "rounded" else s
    largest = code.gather(1, h.topk(active, dim=1).indices)
    energy, inside = code.square().sum(1), largest.sum(1)
    if kind == "cosine":
        if target == "value":
            return 1 - ((largest.square().sum(1) + 1e-12) / (energy + 1e-12)).sqrt()
        return 1 - inside / (active * energy.clamp_min(1e-4)).sqrt()
    error = energy - largest.square().sum(1) if target == "value" else energy - 2 * inside + active
    return error / s.shape[1] if reduction == "mean" else error


def bsa_loss(
    model: BSA, x: Tensor, *, active: int, alpha: float, reconstruction: str, alignment: str, target: str,
    reduction: str, code: str, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of normalised rows x (B, d); and (5,) for the log: loss, its two parts, active features, empty rows.

    ABLATION (alignment loss): `alpha`; at 0 the K largest are not even looked for.
    """
    with devices.autocast(precision, x.device):
        h = model.encoder(x)
    s, z = encode(h, active, code)
    with devices.autocast(precision, x.device):
        rebuilt = model.decoder(z)
    rebuilding = reconstruction_loss(rebuilt, x, reconstruction, reduction).mean()
    loss, aligning = rebuilding, torch.zeros_like(rebuilding)
    if alpha:
        aligning = alignment_loss(s, h.float(), active, alignment, target, reduction).mean()
        loss = loss + alpha * aligning
    on = z.detach().count_nonzero(1).float()
    return loss, torch.stack([loss, rebuilding, aligning, on.mean(), (on == 0).float().mean()]).detach()


# ------------------------------------------------------------------------------------------------- data


class Rows(NamedTuple):
    """Embeddings as they are, float32 on the device: the distinct rows in three parts. `held_out` is for our choices.

    `numbers`: which row of the source each is, (train, held_out, test).
    """

    train: Tensor
    held_out: Tensor
    test: Tensor
    numbers: tuple[Tensor, Tensor, Tensor]
    digest: str


def read_matrix(path: Path) -> np.ndarray:
    """The one matrix (rows, channels) of a file, float32. Stops (exit 2) where it is not there, not one, or damaged."""
    try:
        if path.suffix == ".safetensors":
            found = checkpoints.read_safetensors(path)
        else:
            loaded = np.load(path, allow_pickle=False)
            found = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    except FileNotFoundError:
        fail(f"--data {path}: no such file")
    except (OSError, EOFError, ValueError, files.DamagedFile, zipfile.BadZipFile) as error:
        fail(f"--data {path} cannot be read as {path.suffix} ({error})")
    matrices = {name: one for name, one in found.items() if one.ndim == 2 and one.dtype.kind in "fiu"}
    if len(matrices) != 1:
        fail(f"--data {path} must hold one matrix of numbers, one row a concept; it holds {len(matrices)}")
    return next(iter(matrices.values())).astype(np.float32)


def load_rows(data_set: str, data: Path, device: torch.device) -> Rows:
    """The rows of a data set, split 8 : 1 : 1 by the data seed after duplicates are dropped.

    Stops (exit 2) at rows that are not finite or have norm 0, named by their numbers (the first is 0).
    """
    path = data if data_set == "file" else data / "mesh-minilm.npy"
    if data_set == "mesh" and not path.exists():
        fail(f"{path} is not there: python -m bsa.concepts --data {data} makes it")
    matrix = plant().rows if data_set == "planted" else read_matrix(path)
    for what, bad in {
        "are not finite": ~np.isfinite(matrix).all(1),
        "have norm 0": ~matrix.any(1),
    }.items():
        if bad.any():
            listed = ", ".join(map(str, np.flatnonzero(bad)[:5]))
            fail(f"--data {path}: {bad.sum()} of {len(matrix)} rows {what} (rows {listed}): remove them")
    _, distinct = np.unique(matrix, axis=0, return_index=True)
    if dropped := len(matrix) - len(distinct):
        print(f"{data_set}: {dropped} rows that stand twice are dropped", flush=True)
    if len(distinct) < 20:
        fail(f"--data {path} has {len(distinct)} different rows: at least 20 are needed")
    order = torch.from_numpy(np.sort(distinct))[
        seeding.permutation(seeding.DATA_SEED, "split", 0, len(distinct), "cpu")
    ]
    tenth = len(order) // 10
    train, held_out, test = (x.sort().values for x in (order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth]))
    whole = torch.from_numpy(matrix)
    parts = (whole[train].to(device), whole[held_out].to(device), whole[test].to(device))
    return Rows(*parts, (train, held_out, test), checkpoints.sha256(whole))


def schedule(args: argparse.Namespace) -> list[range]:
    """Return the steps of each epoch. All epochs are equally long, except that the last one may be shorter."""
    steps, steps_per_epoch = args.steps, -(-args.steps // EPOCHS)
    if args.rehearse:
        steps, steps_per_epoch = 2 * args.rehearse, args.rehearse
    return [range(steps)[first : first + steps_per_epoch] for first in range(0, steps, steps_per_epoch)]


def batches(args: argparse.Namespace, rows: Tensor, epoch: int) -> Iterator[Tensor]:
    """Yield the batches (B, d) of one epoch. Each pass over rows (n, d) has a new order and drops the remainder."""
    steps, steps_per_pass = schedule(args)[epoch], len(rows) // args.batch
    for step in steps:
        number, place = divmod(step, steps_per_pass)
        if place == 0 or step == steps.start:  # an epoch may begin in the middle of a pass
            order = seeding.permutation(args.seed, "order", number, len(rows), rows.device)
        yield rows[order[place * args.batch : (place + 1) * args.batch]]


# ------------------------------------------------------------------------------------------------- train


def train(args: argparse.Namespace, run: Run, model: BSA, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Train on normalised rows (n, d). Saves after each epoch; the same command resumes from there."""
    loss_function = torch.compile(bsa_loss) if args.compile else bsa_loss
    epochs = schedule(args)
    last = len(epochs)
    first = run.resume(model, optimizer)
    if first is None:
        first = 0
        run.end_epoch(0, last, {})

    for epoch in tqdm(range(first, last), run.name, last, initial=first, disable=None, leave=False):
        started, totals = time.perf_counter(), torch.zeros(5, device=rows.device)

        for x in batches(args, rows, epoch):
            loss, parts = loss_function(
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
            totals += parts  # stays on the device: reading it here would synchronise at every step

        steps = epochs[epoch]
        means = (totals / len(steps)).tolist()  # waits for the device, so `seconds` covers its work
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, totals):
            return
        names = ("loss", "reconstruction_loss", "alignment_loss", "active_mean", "empty_share")
        record = dict(zip(names, means, strict=True)) | {
            "step": steps.stop,
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": len(steps) * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(rows.device),
        }
        run.end_epoch(epoch + 1, last, record)

    run.save_model({"model": model.state_dict(), "epoch": last, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    smaller = f"--batch {args.batch // 2} or a smaller --latent needs less, but is another run"
    with run_lock(args.out), devices.memory_for(device, f"--latent {args.latent} --batch {args.batch}", smaller):
        run = Run(args.out, vars(args), __file__, args.replace)
        if run.finished:
            return
        data = load_rows(args.data_set, args.data, device)
        if args.batch > len(data.train):
            fail(f"--batch {args.batch} is more than the {len(data.train)} training rows")
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
