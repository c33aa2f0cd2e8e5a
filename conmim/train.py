"""ConMIM: masked image modelling by denoising contrast; each masked patch has to find its own key in the full picture.

Yi et al., "Masked Image Modeling with Denoising Contrast", ICLR 2023, arXiv 2205.09616.

One crop of an image is seen twice: plain and with patches masked by the network f that is trained, coloured and in full
by f~, a moving average of it. The query of a masked patch j is compared with the keys of all N patches of its own image
(equation 3; m goes from 0.996 to 1):

    q = f(x^)    k = f~(x)    L = mean over masked j of -log( exp(q_j sg[k_j] / tau) / sum_i exp(q_j sg[k_i] / tau) )
    f~ <- m f~ + (1 - m) f    after every step of the optimiser

    x^ basic view, masked (B, 3, S, S)      f   vision transformer, projector, L2 norm: (B, N, dim)
    x  strong view, full  (B, 3, S, S)      sg  stop-gradient: leak * k + (1 - leak) * k.detach(), leak 0 in the paper

    python conmim/train.py                                                      # demo: glyphs, about 35 s of one core
    python conmim/train.py --keys online --no-stop-gradient --out runs/scratch2 # an ablation
    python conmim/train.py --scale gpu --out runs/cifar                         # CIFAR-10, ViT-Tiny/4, 200 epochs
    torchrun --nproc-per-node 8 conmim/train.py --scale paper --data ImageNet --out runs/imagenet

With the average's keys nothing that the optimiser moves lies behind sg: --no-stop-gradient then changes no bit (a test
shows it). With --keys online it decides whether the keys are trained. The average is kept in every arm.

Differs from the authors' code:
 1. It has none of the ablations: --keys online and --views basic follow the paper's table 8 as far as it is known.
 2. Masks are random squares of 2 x 2 patches, always the same number (their recipe); block masks are left out, and so
    is the unused 8192-way head.
 3. CUDA trains under bfloat16 autocast, theirs under float16 with a scaled loss; similarities and softmax are float32.
 4. Peak rate, clipping (3.0), batch and warm-up of ViT-S and ViT-B are BEiT's and mc-BEiT's: the authors give a command
    for ViT-L alone (rate 7.5e-4, LayerScale 1e-5, clipping 1.0).
 5. Up to 64 pixels images live on the device and are cropped (bilinear, without mirroring glyphs) and coloured there in
    batches, on CIFAR without blur. Above, workers do it by torchvision's transforms, its 23-pixel Gaussian kernel in
    place of Pillow's blur; a second crop that the authors compute and drop is not made.
 6. Several processes: every rank's projector has batch statistics of its own, as theirs; --sync-batch-norm shares them.
 7. The demo and gpu scales (glyphs and CIFAR, small transformers and projectors, momentum, rates) are ours.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import augment, cli, devices, image_folder, images, probes, schedules, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import Run
from conmim.net import NETWORKS, POSITIONS, Projector, ViT

Batch = tuple[Tensor, Tensor, Tensor]  # queries' view, keys' view, mask
Range = tuple[float, float]

WEIGHT_DECAY, BETAS, LAST_RATE = 0.05, (0.9, 0.98), 1e-5
CLIP = 3.0  # norm of the gradient
CELL = 2  # patches: side of the squares that are masked
MEASURED = 256  # images behind the diagnostics

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #           demo           gpu             paper
    "data_set":    ("glyphs36",    "cifar10",      "folder"),
    "size":        (32,            32,             224),  # pixels; of a folder's images
    "network":     ("vit_demo",    "vit_tiny_4",   "vit_base_16"),
    "layer_scale": (0.1,           0.1,            0.1),  # the authors on ViT-L: 1e-5
    "positions":   ("both",        "relative",     "relative"),
    "hidden":      (128,           2048,           4096),  # of the projector
    "dim":         (64,            256,            256),
    "momentum":    (0.98,          0.996,          0.996),
    "epochs":      (2,             200,            300),  # the paper on ViT-B: 300 and 800
    "warm_up":     (0.4,           10,             10),  # epochs
    "batch":       (32,            512,            2048),
    "lr":          (2e-3,          1e-3,           1.5e-3),
    "workers":     (0,             4,              8),
}  # fmt: skip

# Crop, mirroring and blur of the authors' code; glyphs must not be mirrored, small pictures are cropped less.
AUGMENTATION: dict[str, dict[str, Any]] = {
    "glyphs": {"crop": (0.4, 1.0), "flip": 0.0, "blur": 0.0},
    "cifar": {"crop": (0.2, 1.0), "flip": 0.5, "blur": 0.0},
    "folder": {"crop": (0.08, 1.0), "flip": 0.5, "blur": 0.1},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: contradictions stop (exit 2)."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.NAMES, help="folder: --data holds train/CLASS/*, val/CLASS/*")
    data.add_argument("--size", type=cli.int_min(16), help="of a folder's images; above 64 pixels workers decode")
    data.add_argument("--workers", type=cli.int_min(0), help="processes that decode a folder's images")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=cli.int_min(0), help="0: initial weights; paper: 300, 800 (table 1)")
    optimisation.add_argument("--warm-up", type=cli.float_in(0), help="epochs of rising rate; official recipe: 10")
    optimisation.add_argument("--batch", type=cli.int_min(2), help="global batch; official recipe: 2048")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="peak rate, not scaled by the batch")
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="times --lr (robustness)")
    precisions = ("auto", "float32", "bfloat16")
    optimisation.add_argument("--precision", choices=precisions, default="auto", help="auto: bfloat16 on CUDA alone")
    optimisation.add_argument("--compile", action="store_true", help="torch.compile; for long runs on a GPU")
    optimisation.add_argument("--sync-batch-norm", action="store_true", help="batch statistics over all CUDA ranks")
    method = parser.add_argument_group("method (defaults: the paper's)")
    method.add_argument("--network", choices=tuple(NETWORKS), help="paper: vit_small_16, vit_base_16 (section 4)")
    method.add_argument("--layer-scale", type=cli.float_in(0), help="LayerScale at the start; official: 0.1")
    method.add_argument("--positions", choices=POSITIONS, help="official: relative; absolute ones are learned")
    method.add_argument("--hidden", type=cli.int_min(1), help="width of the projector; official: 4096")
    method.add_argument("--dim", type=cli.int_min(2), help="of queries and keys; official: 256")
    method.add_argument("--keys", choices=("ema", "online"), default="ema", help="network that makes them (table 8)")
    method.add_argument("--views", choices=("asymmetric", "basic"), default="asymmetric", help="basic: keys see the "
                        "queries' own view (table 8)")  # fmt: skip
    method.add_argument("--gradient-leak", type=cli.float_in(0, 1), help="share of the keys' gradient, default 0")
    method.add_argument("--no-stop-gradient", action="store_true", help="--gradient-leak 1 (equation 3)")
    method.add_argument("--mask-ratio", type=cli.float_in(0, 1), default=0.75, help="of squares of 2 x 2 patches")
    method.add_argument("--temperature", type=cli.float_in(1e-3), default=0.1, help="tau; official: 0.1")
    method.add_argument("--momentum", type=cli.float_in(0, 1), help="m at the start; a cosine leads to 1")
    args = cli.parse(parser, SCALES, argv)

    if args.no_stop_gradient and args.gradient_leak not in (None, 1.0):
        fail(f"--no-stop-gradient is --gradient-leak 1, but --gradient-leak {args.gradient_leak} was given: drop one")
    args.gradient_leak = 1.0 if args.no_stop_gradient else args.gradient_leak or 0.0
    args.lr *= args.lr_factor
    del args.no_stop_gradient, args.lr_factor
    if args.data_set != "folder" and args.size != 32:
        fail(f"--size {args.size} is for --data-set folder alone: {args.data_set} has 32 pixels")
    patch = NETWORKS[args.network].patch
    if args.size % (CELL * patch):
        fail(f"--size {args.size} must be a multiple of {CELL * patch}: --network {args.network} has patches of "
             f"{patch} pixels, masked in squares of {CELL} x {CELL}")  # fmt: skip
    if args.mask_ratio == 0:
        fail("--mask-ratio 0 masks nothing, and only masked patches have a loss: give more than 0")
    return args


# ------------------------------------------------------------------------------------------------- model


class Branch(nn.Module):
    """f: a vision transformer and its projector, each from a seed of its own, so arms start equal."""

    def __init__(
        self, network: str, size: int, positions: str, layer_scale: float, hidden: int, dim: int, seed: int
    ):  # fmt: skip
        super().__init__()
        with seeding.forked(seed, "vit"):
            self.vit = ViT(size, *NETWORKS[network], layer_scale, positions)
        with seeding.forked(seed, "projector"):
            self.projector = Projector(NETWORKS[network].width, hidden, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, 3, S, S) -> (B, N, dim). The class token counts in the projector's batch statistics, then is dropped."""
        return self.projector(self.vit(x, mask))[:, 1:]


class ConMIM(nn.Module):
    """The network that is trained and its moving average, which starts as its equal and is no one's alias."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.online = Branch(**settings)
        self.ema = Branch(**settings).requires_grad_(False)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor, keys: str, leak: float) -> tuple[Tensor, Tensor]:
        """q and k, (B, N, dim) each, from two views (B, 3, S, S); mask (B, N) bool for the queries.

        Two forward passes, never one over both, so that each has batch statistics of its own. The queries come first:
        weights that autocast converted without a graph are not to be taken for theirs.
        """
        q = self.online(query, mask)
        network = self.ema if keys == "ema" else self.online  # ABLATION (momentum encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and leak > 0):
            k = network(key, None)
        return q, leak * k + (1 - leak) * k.detach()  # ABLATION (stop-gradient): 0 is the paper's sg


@torch.no_grad()
def ema_update(ema: list[Tensor], online: list[Tensor], momentum: float) -> None:
    """ema <- m ema + (1 - m) online, in place. For parameters only, not for running statistics."""
    torch._foreach_lerp_(ema, online, 1 - momentum)


def build_model(args: argparse.Namespace, device: torch.device) -> ConMIM:
    """The networks that a run's arguments describe, at their start, on `device`."""
    model = ConMIM(
        network=args.network, size=args.size, positions=args.positions, layer_scale=args.layer_scale,
        hidden=args.hidden, dim=args.dim, seed=args.seed,
    )  # fmt: skip
    return model.to(device)


# ------------------------------------------------------------------------------------------------- loss


def similarities(q: Tensor, k: Tensor) -> Tensor:
    """Cosines between the queries and the keys of the same image, (B, N, N) float32, from (B, N, D) each."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=2) @ F.normalize(k.float(), dim=2).mT


def denoising_contrast(q: Tensor, k: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The mean over all masked patches of the cross-entropy between a query and its image's N keys (equation 3).

    q, k (B, N, D); mask (B, N) bool. Every row is computed and the visible ones weighted by 0: fixed shapes.
    """
    logits = similarities(q, k) / temperature
    rows = logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)
    return (rows * mask).sum() / mask.sum()


def loss_floor(n: int, temperature: float) -> float:
    """The loss of n mutually orthogonal keys, each found by its query without error: ln(1 + (n - 1) exp(-1 / tau))."""
    return math.log1p((n - 1) * math.exp(-1 / temperature))


# ------------------------------------------------------------------------------------------------- data


def augmentation(name: str) -> dict[str, Any]:
    """The row of AUGMENTATION for a data set."""
    return next(kind for start, kind in AUGMENTATION.items() if name.startswith(start))


def solarize(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Turn the values from 128 / 255 on into their complements, in the images `chosen` (B,) bool; in [0, 1]."""
    chosen = devices.upload(chosen, pixels.device)
    return torch.lerp(pixels, 1 - pixels, (chosen[:, None, None, None] & (pixels >= 128 / 255)).float())


def strong_view(crop: Tensor, numbers: seeding.SampleRNG, blur: float) -> Tensor:
    """Jitter, grey, blur, solarise: (B, 3, S, S) in [0, 1]."""
    view = augment.random_color_jitter(crop, numbers, 0.4, 0.4, 0.2, 0.1, probability=0.8)
    view = augment.random_grayscale(view, numbers, 0.2)
    view = augment.random_gaussian_blur(view, numbers, (0.1, 2.0), blur) if blur else view
    return solarize(view, numbers.uniform() < 0.2)


class WorkerViews:
    """The same of one Pillow picture by torchvision's own transforms: the crop, and its strong view where `coloured`.

    The result is (1 or 2, 3, size, size) uint8.
    """

    def __init__(self, size: int, coloured: bool, crop: Range, flip: float, blur: float):
        from torchvision.transforms import v2  # here: only large images need it, and it takes 2 s

        bicubic, jitter = v2.InterpolationMode.BICUBIC, v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
        blurred, numbers = v2.GaussianBlur(23, (0.1, 2.0)), v2.PILToTensor()
        crops = v2.RandomResizedCrop(size, crop, interpolation=bicubic)
        self.geometry = v2.Compose([v2.RandomHorizontalFlip(flip), crops])
        self.views: list[Callable[[Image.Image], Tensor]] = [numbers]
        if coloured:
            parts = [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2), v2.RandomApply([blurred], blur)]
            self.views.append(v2.Compose([*parts, v2.RandomSolarize(128, 0.2), numbers]))

    def __call__(self, picture: Image.Image) -> Tensor:
        crop = self.geometry(picture)
        return torch.stack([view(crop) for view in self.views])


def spread_cells(order: Tensor, ratio: float) -> Tensor:
    """The mask (B, N) bool of square grids of patches: the first ceil(cells * ratio) cells of each order are masked.

    order (B, cells): a permutation of the cells of CELL x CELL patches for each image.
    """
    cells = order.shape[1]
    side = round(cells**0.5)
    masked = order.argsort(1) < math.ceil(cells * ratio)
    squares = masked.view(-1, side, 1, side, 1).expand(-1, side, CELL, side, CELL)
    return squares.reshape(len(order), cells * CELL * CELL)


def random_masks(numbers: seeding.SampleRNG, patches: int, ratio: float) -> Tensor:
    """CPU masks (B, patches) bool, all with the same number of masked patches: 148 of 196 and 48 of 64 at 0.75."""
    return spread_cells(numbers.uniform(shape=(patches // CELL**2,)).argsort(1), ratio)


def patch_count(args: argparse.Namespace) -> int:
    """N, the number of patches of an image."""
    return (args.size // NETWORKS[args.network].patch) ** 2


def batches(args: argparse.Namespace, data: Data, epoch: int, rows: slice) -> Iterator[Batch]:
    """One epoch of (queries' view, keys' view, mask), normalised, cut to this rank's `rows` of the global batch.

    Order, crop, colours and mask follow from (seed, epoch) alone, each from draws of its own, so that arms share what
    they have in common; the last incomplete batch is dropped.
    """
    aug, patches, steps = augmentation(args.data_set), patch_count(args), data.examples // args.batch
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    order = order[: steps * args.batch].view(steps, args.batch)
    coloured = args.views == "asymmetric"  # ABLATION (views): otherwise the keys see the queries' own view
    streamed = None
    if isinstance(data, image_folder.StreamedImages):
        transform = WorkerViews(args.size, coloured, **aug)
        streamed = data.views(transform, 1, order[:, rows].tolist(), args.seed, epoch)

    for step, picked in enumerate(order, epoch * steps):
        if streamed:
            crop, *strong = next(streamed)[0].unbind(1)
        else:
            rng = seeding.SampleRNG(args.seed, "geometry", step, args.batch, rows)
            source = data.train[picked[rows]]
            crop, strong = augment.random_resized_crop(source, rng, aug["crop"], size=args.size, flip=aug["flip"]), []
            if coloured:
                rng = seeding.SampleRNG(args.seed, "colours", step, args.batch, rows)
                strong = [strong_view(crop, rng, aug["blur"])]
        query, *key = (data.normalise(view) for view in (crop, *strong))
        rng = seeding.SampleRNG(args.seed, "mask", step, args.batch, rows)
        mask = devices.upload(random_masks(rng, patches, args.mask_ratio), data.device)
        yield query, (key or [query])[0], mask


# ------------------------------------------------------------------------------------------------- train


def fixed_batch(data: Data, patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """What all arms and seeds are diagnosed on: plain test images (256, 3, S, S), evenly spread, and masks (256, N)."""
    x, _ = next(data.batches("test", 0, max(1, len(data.test) // MEASURED)))
    x = x[:MEASURED]
    mask = random_masks(seeding.SampleRNG(seeding.DATA_SEED, "diagnosed mask", 0, len(x)), patches, ratio)
    return x, devices.upload(mask, x.device)


@contextmanager
def unmoved_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms use the batch's statistics and leave their running ones as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def position_r2(k: Tensor) -> float:
    """Share of the variance of unit keys (B, N, D) that their mean at each position explains; 1: they say no more than
    where they are. (B images alone explain about 1 / B.)"""
    unit = F.normalize(k.double(), dim=2)
    centre = unit.mean((0, 1))
    explained, whole = (unit.mean(0) - centre).square().sum(), (unit - centre).square().sum() / len(k)
    return (explained / whole.clamp_min(1e-300)).item()


@torch.no_grad()
def diagnose(model: ConMIM, keys: str, x: Tensor, mask: Tensor) -> dict[str, float]:
    """Is the task solved by position alone? From one view x (B, 3, S, S) on both sides; mask (B, N) bool; train mode,
    float32.

    own_top1            share of masked queries whose own key is the nearest of their image's
    cross_top1          the same among the keys of another image: near own_top1, position is all that counts
    position_r2         of the keys (see there)
    key_effective_rank  exp of the entropy of the keys' singular values, 1 to dim
    """
    with unmoved_statistics(model):
        q, k = model(x, x, mask, keys, 0.0)
    place = torch.arange(mask.shape[1], device=x.device)

    def found(others: Tensor) -> float:
        return (((similarities(q, others).argmax(2) == place) & mask).sum() / mask.sum()).item()

    return {
        "own_top1": found(k),
        "cross_top1": found(k.roll(1, 0)),
        "position_r2": position_r2(k),
        "key_effective_rank": probes.effective_rank(k.flatten(0, 1)),
    }


def learning_rate(step: int, warm_up: int, steps: int, peak: float, last: float = LAST_RATE) -> float:
    """From 0 to `peak` in `warm_up` steps, then half a cosine towards `last` at `steps`."""
    if step < warm_up:
        return peak * step / max(1, warm_up - 1)
    return last + (peak - last) * schedules.cosine((step - warm_up) / (steps - warm_up))


def momentum_at(step: int, steps: int, first: float) -> float:
    """m, from `first` to 1 along half a cosine."""
    return 1 - (1 - first) * schedules.cosine(step / steps)


def build_optimizer(args: argparse.Namespace, model: ConMIM) -> torch.optim.AdamW:
    """AdamW on the online network; no decay of vectors, of the class token and of absolute positions."""
    free: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, weight in model.online.named_parameters():
        exempt = weight.ndim == 1 or name in ("vit.cls_token", "vit.pos_embed")
        (free if exempt else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, BETAS, fused=True)


def train(args: argparse.Namespace, run: Run, model: ConMIM, data: Data, optimizer: torch.optim.Optimizer) -> None:
    """Train to the last epoch; saves after each, and goes on from there when started again."""
    last, steps = min(2, args.epochs) if args.rehearse else args.epochs, data.examples // args.batch
    rows, fixed = devices.rows_of_rank(args.batch), fixed_batch(data, patch_count(args), args.mask_ratio)
    forward = devices.distribute(model, data.device, args.sync_batch_norm)
    online: list[Tensor] = [*model.online.parameters()]
    ema: list[Tensor] = [*model.ema.parameters()]
    first = run.resume(model, optimizer)
    if first is None:
        first, started = 0, time.perf_counter()
        record = diagnose(model, args.keys, *fixed)
        seconds = time.perf_counter() - started  # of the diagnostics: all that a run of no epochs does
        rate = {"examples_per_second": len(fixed[0]) / seconds, "seconds": seconds}
        run.end_epoch(0, last, record | rate | {"peak_memory": devices.peak_memory(data.device)})
    if args.compile:
        forward.compile()

    for epoch in tqdm(range(first, last), run.name, last, initial=first, disable=None, leave=False):
        started, totals = time.perf_counter(), torch.zeros(2, device=data.device)  # sums: loss, clipped steps
        for step, (query, key, mask) in enumerate(batches(args, data, epoch, rows), epoch * steps):
            # Both schedules move at every step.
            lr = learning_rate(step, round(args.warm_up * steps), args.epochs * steps, args.lr)
            momentum = momentum_at(step, args.epochs * steps, args.momentum)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with devices.autocast(args.precision, data.device):
                q, k = forward(query, key, mask, args.keys, args.gradient_leak)
            loss = denoising_contrast(q, k, mask, args.temperature)  # float32

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(online, CLIP, foreach=True)  # the norm before clipping
            optimizer.step()
            ema_update(ema, online, momentum)
            # .item() here would force a host-device synchronisation.
            totals += torch.stack([loss.detach(), (norm > CLIP).float()])

        loss_mean, clipped = devices.mean_over_ranks(totals / steps).tolist()
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, totals):
            return
        record = {
            "loss": loss_mean,
            **diagnose(model, args.keys, *fixed),
            "clipped_fraction": clipped,
            "momentum": momentum,
            "lr": lr,
            "examples_per_second": steps * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, last, record)
    run.save_model({"model": model.state_dict(), "epoch": last, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    rank, world = devices.start_ranks(args.device, device)
    if args.batch % world:
        fail(f"--batch {args.batch} is the global batch: {world} processes do not divide it")
    smaller = f"--precision bfloat16 needs less than float32; --batch {args.batch // 2} about half, but is another run"
    with run_lock(args.out, rank), devices.memory_for(device, f"--batch {args.batch} on {world} processes", smaller):
        run = Run(args.out, vars(args), __file__, args.replace, rank)
        if run.finished:
            return
        data = images.load_or_stream(args.data_set, args.data, args.size, device, args.workers)
        if args.batch > data.examples:
            fail(f"--batch {args.batch} is more than the {data.examples} training images")
        steps = args.epochs * (data.examples // args.batch)
        run.write_config(
            f"{args.data_set}, {args.network}", devices.environment(device) | {"data": data.digest, "steps": steps}
        )
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        model = build_model(args, device)
        train(args, run, model, data, build_optimizer(args, model))


if __name__ == "__main__":
    main()
