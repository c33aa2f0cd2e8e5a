"""ConMIM: masked image modelling with denoising contrast. The query of a masked patch has to identify its own key.

Yi et al., "Masked Image Modeling with Denoising Contrast", ICLR 2023, arXiv 2205.09616.

Both views come from one crop of an image. The trained network f sees the basic view with masked patches and gives the
queries. Its exponential moving average f~ (EMA, the momentum encoder) sees the strong view in full and gives the keys.
The query of a masked patch j is compared with the keys of all N patches of the same image (equation 3; m rises from
0.996 to 1):

    q = f(x^)    k = f~(x)    L = mean over masked j of -log( exp(q_j sg[k_j] / tau) / sum_i exp(q_j sg[k_i] / tau) )
    f~ <- m f~ + (1 - m) f    after every step of the optimiser; q and k are L2-normalised in `similarities`

    x^ basic view, masked (B, 3, S, S)      f   vision transformer, projector: (B, N, dim)
    x  strong view, full  (B, 3, S, S)      sg  stop-gradient: leak * k + (1 - leak) * k.detach(), leak 0 in the paper

    python conmim/train.py                                                       # demo: 1 to 2 min on one CPU core
    python conmim/train.py --keys online --no-stop-gradient --out runs/scratch2  # an ablation
    python conmim/train.py --scale gpu --out runs/cifar                          # CIFAR-10, ViT-Tiny/4, 200 epochs
    torchrun --nproc-per-node 8 conmim/train.py --scale paper --data ImageNet --out runs/imagenet

With EMA keys the optimiser does not update the key network, so --no-stop-gradient gives bit-identical weights (a test
checks this). With --keys online it decides whether the keys receive a gradient. Every arm maintains the EMA.

Differs from the authors' code:
 1. The authors' code has none of the ablations. --keys online and --views basic follow the paper's table 8 as far as
    it is known.
 2. Masks are random squares of 2 x 2 patches (demo: single patches), the same number in every image (the authors'
    recipe). Block masks and the unused 8192-way head are left out.
 3. CUDA training uses bfloat16 autocast (authors: float16 with loss scaling). Similarities and softmax are float32.
 4. The authors give a command for ViT-L only: --network vit_large_16 --layer-scale 1e-5 --lr 7.5e-4 --clip 1 --epochs
    1600. Peak learning rate, gradient clipping (3.0) and batch of ViT-S and ViT-B are those of BEiT and mc-BEiT; their
    warm-up is that of ViT-L. All networks are fine-tuned with the authors' settings for ViT-B.
 5. Images of up to 64 pixels stay on the device and are augmented there in batches (bilinear crops, no flips of
    glyphs, no blur on CIFAR). Larger images are augmented in DataLoader workers by torchvision, whose 23-pixel Gaussian
    kernel replaces Pillow's blur. The second crop, which the authors compute and never use, is left out.
 6. On several ranks each rank's projector has its own batch statistics, as in the authors' code; --sync-batch-norm
    synchronises them.
 7. The demo and gpu scales (glyphs and CIFAR, small transformers and projectors, momentum, learning rates) are ours.
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

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import augment, cli, devices, image_folder, images, probes, schedules, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import Run
from conmim.net import NETWORKS, POSITIONS, Projector, ViT

Batch = tuple[Tensor, Tensor, Tensor]  # query view, key view, mask
Range = tuple[float, float]

WEIGHT_DECAY, BETAS, FINAL_LR = 0.05, (0.9, 0.98), 1e-5
N_DIAGNOSTIC = 256  # test images for the diagnostics
TEST_INTERPOLATION = "bicubic"  # of test images above 64 pixels, as in the authors' fine-tuning

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #          demo              gpu           paper
    "data_set":        ("glyphs10-light", "cifar10",    "folder"),
    "size":            (32,               32,           224),  # pixels
    "network":         ("vit_demo",       "vit_tiny_4", "vit_base_16"),
    "layer_scale":     (1.0,              0.1,          0.1),
    "positions":       ("both",           "relative",   "relative"),
    "hidden":          (128,              2048,         4096),  # width of the projector
    "dim":             (64,               256,          256),  # of queries and keys
    "mask_square":     (1,                2,            2),  # side of a masked square, in patches
    "momentum":        (0.98,             0.996,        0.996),
    "epochs":          (24,               200,          300),  # paper, ViT-B: 300 and 800
    "warm_up":         (1,                10,           10),  # epochs
    "batch":           (64,               512,          2048),
    "lr":              (4e-3,             1e-3,         1.5e-3),
    "workers":         (0,                4,            8),
    "labels":          (200,              None,         None),  # labelled images for fine-tuning; None: all
    "finetune_epochs": (150,              100,          100),
}  # fmt: skip

# `folder`: the authors' crop, flip and blur. Glyphs and digits are not flipped, because a mirrored one may be another
# character. Small images are cropped less and not blurred.
AUGMENTATION: dict[str, dict[str, Any]] = {
    "glyphs": {"crop": (0.4, 1.0), "flip": 0.0, "blur": 0.0},
    "mnist5k": {"crop": (0.4, 1.0), "flip": 0.0, "blur": 0.0},
    "cifar": {"crop": (0.2, 1.0), "flip": 0.5, "blur": 0.0},
    "folder": {"crop": (0.08, 1.0), "flip": 0.5, "blur": 0.1},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return all flags with their defaults filled in. Exits with code 2 if they contradict each other."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.DATA_SETS, help="folder: --data contains train/CLASS/*, val/CLASS/*")
    data.add_argument(
        "--size",
        type=cli.int_in(16),
        help="image size in pixels, only for --data-set folder; images larger than 64 pixels are decoded by --workers",
    )
    data.add_argument(
        "--workers", type=cli.int_in(0, cli.MAX_WORKERS), help="number of DataLoader workers for --data-set folder"
    )
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--epochs", type=cli.int_in(0), help="0: keep the initial weights; paper: 300, 800 (table 1)"
    )
    optimisation.add_argument(
        "--warm-up", type=cli.float_in(0), help="epochs of linear warm-up; authors' ViT-L command: 10"
    )
    optimisation.add_argument("--batch", type=cli.int_in(2), help="global batch size; authors' ViT-L command: 2048")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="peak learning rate, not scaled by --batch")
    optimisation.add_argument(
        "--lr-factor", type=cli.float_in(0), default=1.0, help="multiplies --lr; used by the robustness study"
    )
    optimisation.add_argument(
        "--clip", type=cli.float_in(1e-3), default=3.0, help="maximum gradient norm; authors' ViT-L command: 1"
    )
    optimisation.add_argument("--compile", action="store_true", help="apply torch.compile to the forward pass")
    optimisation.add_argument("--sync-batch-norm", action="store_true", help="batch statistics over all CUDA ranks")
    method = parser.add_argument_group("method (defaults at --scale paper: the paper's)")
    method.add_argument("--network", choices=tuple(NETWORKS), help="paper: vit_small_16, vit_base_16, vit_large_16")
    method.add_argument("--layer-scale", type=cli.float_in(0), help="initial LayerScale; authors: 0.1, ViT-L 1e-5")
    method.add_argument(
        "--positions",
        choices=POSITIONS,
        help="position encoding. relative: relative bias (authors' code); absolute: learned embedding; both",
    )
    width = cli.int_in(2, cli.MAX_WIDTH)
    method.add_argument("--hidden", type=width, help="hidden width of the projector; authors' code: 4096")
    method.add_argument("--dim", type=width, help="width of queries and keys; authors' code: 256")
    method.add_argument(
        "--keys",
        choices=("ema", "online", "position"),
        default="ema",
        help="encoder of the keys: ema (momentum encoder) or online (table 8); position: no encoder, the keys are "
        "fixed codes of the positions",
    )
    method.add_argument(
        "--views",
        choices=("asymmetric", "basic"),
        default="asymmetric",
        help="asymmetric: keys of the strong view, queries of the basic view; basic: both of the basic view (table 8)",
    )
    method.add_argument(
        "--gradient-leak",
        type=cli.float_in(0, 1),
        help="fraction of the gradient that passes the stop-gradient to the keys; default 0",
    )
    method.add_argument(
        "--no-stop-gradient", action="store_true", help="same as --gradient-leak 1; no effect with --keys ema"
    )
    method.add_argument(
        "--mask-ratio",
        type=cli.float_in(0, 1),
        default=0.75,
        help="fraction of masked patches",
    )
    method.add_argument(
        "--mask-square", type=cli.int_in(1), help="side of a masked square, in patches; authors' code: 2 (32 pixels)"
    )
    method.add_argument("--temperature", type=cli.float_in(1e-3), default=0.1, help="tau; authors' code: 0.1")
    method.add_argument("--momentum", type=cli.float_in(0, 1), help="initial EMA momentum m; rises to 1")
    fine_tuning = parser.add_argument_group("fine-tuning (used by eval.py)")
    fine_tuning.add_argument(
        "--labels", type=cli.int_in(1), help="number of labelled images, class-balanced; default at gpu and paper: all"
    )
    fine_tuning.add_argument("--finetune-epochs", type=cli.int_in(1), help="passes over the labelled images")
    fine_tuning.add_argument(
        "--transplant",
        choices=("all", "positions"),
        default="all",
        help="pre-trained weights that fine-tuning starts from. positions: position embeddings and biases only",
    )
    args = cli.parse(parser, SCALES, argv)

    if args.no_stop_gradient and args.gradient_leak not in (None, 1.0):
        fail(
            f"--no-stop-gradient (= --gradient-leak 1) contradicts --gradient-leak {args.gradient_leak}: "
            "give only one of them"
        )
    args.gradient_leak = 1.0 if args.no_stop_gradient else args.gradient_leak or 0.0
    cli.apply_lr_factor(args)
    del args.no_stop_gradient
    if args.data_set != "folder" and args.size != 32:
        fail(f"--size {args.size} requires --data-set folder ({args.data_set} images have 32 x 32 pixels): drop --size")
    patch = NETWORKS[args.network].patch
    if args.size % (args.mask_square * patch):
        fail(
            f"invalid --size {args.size}: give a multiple of {args.mask_square * patch}, because --network "
            f"{args.network} has patches of {patch} pixels, which are masked in squares of --mask-square "
            f"{args.mask_square} x {args.mask_square}"
        )
    if args.mask_ratio == 0:
        fail("invalid --mask-ratio 0: give more than 0, because only masked patches contribute to the loss")
    if args.keys == "position":
        if args.gradient_leak or args.views != "asymmetric":
            fail("--keys position encodes no image: drop --no-stop-gradient, --gradient-leak and --views")
        if args.dim < patch_count(args):
            fail(
                f"--keys position requires --dim of at least {patch_count(args)}, the number of patches: "
                f"--dim is {args.dim}"
            )
    return args


# ------------------------------------------------------------------------------------------------- model


class Branch(nn.Module):
    """The network f: a vision transformer and a projector. Each has its own seed, so arms share initial weights."""

    def __init__(self, network: str, size: int, positions: str, layer_scale: float, hidden: int, dim: int, seed: int):
        super().__init__()
        with seeding.seeded_fork_rng(seed, "vit"):
            self.vit = ViT(size, *NETWORKS[network], layer_scale, positions)
        with seeding.seeded_fork_rng(seed, "projector"):
            self.projector = Projector(NETWORKS[network].width, hidden, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (B, 3, S, S) to (B, N, dim). The class token enters the batch statistics and is then dropped."""
        return self.projector(self.vit(x, mask))[:, 1:]


class ConMIM(nn.Module):
    """The trained network (`online`) and its EMA (`ema`): an independent copy at initialisation."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.online = Branch(**settings)
        self.ema = Branch(**settings).requires_grad_(False)

    def forward(
        self, query_view: Tensor, key_view: Tensor, mask: Tensor, keys: str, leak: float
    ) -> tuple[Tensor, Tensor]:
        """Return queries q and keys k, (B, N, dim) each, from two views (B, 3, S, S).

        mask (B, N) bool: the masked patches of `query_view`. `keys`: "ema" or "online", the network that encodes
        `key_view`; "position": the keys are orthonormal constants, one per position. `leak` is the fraction of the
        gradient that reaches the keys. Each view has its own forward pass and therefore its own batch statistics.
        """
        # Run the queries first: otherwise autocast reuses weight casts cached under no_grad, and the queries get no
        # gradient.
        q = self.online(query_view, mask)
        if keys == "position":  # ABLATION (explicit position classification)
            return q, torch.eye(q.shape[2], dtype=q.dtype, device=q.device)[: q.shape[1]].expand_as(q)
        network = self.ema if keys == "ema" else self.online  # ABLATION (momentum encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and leak > 0):
            k = network(key_view, None).float()  # bfloat16 would round the sum below
        return q, leak * k + (1 - leak) * k.detach()  # ABLATION (stop-gradient): 0 is the paper's sg


@torch.no_grad()
def ema_update(ema: list[Tensor], online: list[Tensor], momentum: float) -> None:
    """Update in place: ema <- m ema + (1 - m) online. For parameters only, not for running statistics."""
    torch._foreach_lerp_(ema, online, 1 - momentum)


def build_model(args: argparse.Namespace, device: torch.device) -> ConMIM:
    """Return the initialised model for the arguments of a run, on `device`."""
    model = ConMIM(
        network=args.network,
        size=args.size,
        positions=args.positions,
        layer_scale=args.layer_scale,
        hidden=args.hidden,
        dim=args.dim,
        seed=args.seed,
    )
    return model.to(device)


# ------------------------------------------------------------------------------------------------- loss


def similarities(q: Tensor, k: Tensor) -> Tensor:
    """Return the cosine similarities of the queries and keys of each image: (B, N, D) each to (B, N, N) float32."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=2) @ F.normalize(k.float(), dim=2).mT


def denoising_contrast(q: Tensor, k: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each query over the N keys of its image, mean over all masked patches (equation 3).

    q, k (B, N, D); mask (B, N) bool. Visible patches are weighted by 0 instead of removed, which keeps shapes fixed.
    """
    logits = similarities(q, k) / temperature
    losses = logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)
    return (losses * mask).sum() / mask.sum()


def loss_minimum(n: int, temperature: float) -> float:
    """Return the minimum of the loss: each of the n queries equals its key, and the keys form a simplex.

    Then the cosine of two keys is -1 / (n - 1). This requires --dim of at least n - 1, and every patch masked equally
    often. Orthonormal keys (--keys position) only reach ln(1 + (n - 1) exp(-sqrt(n / (n - 1)) / tau)).
    """
    return math.log1p((n - 1) * math.exp(-n / (max(1, n - 1) * temperature)))


# ------------------------------------------------------------------------------------------------- data


def augmentation(name: str) -> dict[str, Any]:
    """Return the entry of AUGMENTATION for a data set."""
    return next(aug for prefix, aug in AUGMENTATION.items() if name.startswith(prefix))


def solarize(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Invert the values >= 128 / 255 of the images `chosen` (B,) bool; pixels (B, 3, S, S) in [0, 1]."""
    chosen = devices.upload(chosen, pixels.device)
    return torch.lerp(pixels, 1 - pixels, (chosen[:, None, None, None] & (pixels >= 128 / 255)).float())


def strong_view(crop: Tensor, rng: seeding.SampleRNG, blur: float) -> Tensor:
    """Apply colour jitter, grayscale, blur (with probability `blur`) and solarise to (B, 3, S, S) in [0, 1]."""
    view = augment.random_color_jitter(crop, rng, 0.4, 0.4, 0.2, 0.1, probability=0.8)
    view = augment.random_grayscale(view, rng, 0.2)
    if blur:
        view = augment.random_gaussian_blur(view, rng, (0.1, 2.0), blur)
    return solarize(view, rng.uniform() < 0.2)


class WorkerViews:
    """Views of one Pillow image in a DataLoader worker, with torchvision's transforms.

    Returns (1, 3, size, size) uint8, the crop, or with `strong` (2, 3, size, size), the crop and its strong view.
    """

    def __init__(self, size: int, strong: bool, crop: Range, flip: float, blur: float):
        from torchvision.transforms import v2  # imported here: it takes 2 s, and only large images need it

        bicubic = v2.InterpolationMode.BICUBIC
        resized_crop = v2.RandomResizedCrop(size, crop, interpolation=bicubic)
        self.geometry = v2.Compose([v2.RandomHorizontalFlip(flip), resized_crop])
        self.views: list[Callable[[Image.Image], Tensor]] = [v2.PILToTensor()]
        if strong:
            steps = [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, 0.2),
                v2.PILToTensor(),
            ]
            self.views.append(v2.Compose(steps))

    def __call__(self, image: Image.Image) -> Tensor:
        crop = self.geometry(image)
        return torch.stack([view(crop) for view in self.views])


def masks_from_order(order: Tensor, ratio: float, square: int) -> Tensor:
    """Return masks (B, N) bool in which the first ceil(cells * ratio) cells of each order are masked.

    order (B, cells): for each image a permutation of the cells, which are squares of `square` x `square` patches.
    """
    cells = order.shape[1]
    side = round(cells**0.5)
    masked = order.argsort(1) < math.ceil(cells * ratio)
    squares = masked.view(-1, side, 1, side, 1).expand(-1, side, square, side, square)
    return squares.reshape(len(order), cells * square**2)


def random_masks(rng: seeding.SampleRNG, patches: int, ratio: float, square: int) -> Tensor:
    """Return masks (B, patches) bool on the CPU, all with the same number of masked patches.

    At ratio 0.75, 148 of 196 patches are masked in squares of 2 x 2, and 12 of 16 one by one.
    """
    return masks_from_order(rng.uniform(shape=(patches // square**2,)).argsort(1), ratio, square)


def patch_count(args: argparse.Namespace) -> int:
    """Return N, the number of patches in an image."""
    return (args.size // NETWORKS[args.network].patch) ** 2


def batches(args: argparse.Namespace, data: Data, epoch: int, rows: slice) -> Iterator[Batch]:
    """Yield one epoch of (query view, key view, mask), normalised: this rank's `rows` of the global batch.

    Order, crop, colours and mask depend only on (seed, epoch). Each is drawn from its own random stream, so that an
    ablation of one does not change the others. The last incomplete batch is dropped.
    """
    aug, patches, steps_per_epoch = augmentation(args.data_set), patch_count(args), data.examples // args.batch
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    order = order[: steps_per_epoch * args.batch].view(steps_per_epoch, args.batch)
    # ABLATION (views): otherwise the keys see the view of the queries. Fixed codes of positions see no view.
    strong = args.views == "asymmetric" and args.keys != "position"
    streamed = None
    if isinstance(data, image_folder.StreamedImages):
        transform = WorkerViews(args.size, strong, **aug)
        streamed = data.views(transform, 1, order[:, rows].tolist(), args.seed, epoch)

    for step, indices in enumerate(order, epoch * steps_per_epoch):
        if streamed:
            views = list(next(streamed)[0].unbind(1))
        else:
            rng = seeding.SampleRNG(args.seed, "geometry", step, args.batch, rows)
            source = data.train[indices[rows]]
            views = [augment.random_resized_crop(source, rng, aug["crop"], size=args.size, flip=aug["flip"])]
            if strong:
                rng = seeding.SampleRNG(args.seed, "colours", step, args.batch, rows)
                views.append(strong_view(views[0], rng, aug["blur"]))
        query = data.normalise(views[0])
        key = data.normalise(views[1]) if strong else query
        rng = seeding.SampleRNG(args.seed, "mask", step, args.batch, rows)
        mask = devices.upload(random_masks(rng, patches, args.mask_ratio, args.mask_square), data.device)
        yield query, key, mask


# ------------------------------------------------------------------------------------------------- train


def diagnostic_batch(args: argparse.Namespace, data: Data) -> tuple[Tensor, Tensor]:
    """Return the batch for the diagnostics: images (256, 3, S, S) and masks (256, N), equal for equal data seeds.

    The images are evenly spaced in the test set and not augmented. A smaller test set is taken whole.
    """
    spacing = max(1, len(data.test) // N_DIAGNOSTIC)
    x, _ = next(data.batches("test", 0, spacing))
    x = x[:N_DIAGNOSTIC]
    rng = seeding.SampleRNG(data.data_seed, "diagnosed mask", 0, len(x))
    mask = random_masks(rng, patch_count(args), args.mask_ratio, args.mask_square)
    return x, devices.upload(mask, x.device)


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Context manager: batch norms use batch statistics and do not update their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def position_r2(k: Tensor) -> float:
    """Return the share of the variance of the L2-normalised keys (B, N, D) that the mean key of each position explains.

    1: a pure position code, in which a key encodes nothing but its position. Independent keys give about 1 / B.
    """
    unit = F.normalize(k.double(), dim=2)
    mean = unit.mean((0, 1))
    explained = (unit.mean(0) - mean).square().sum()
    total = (unit - mean).square().sum() / len(k)
    return (explained / total.clamp_min(1e-300)).item()


@torch.no_grad()
def diagnose(model: ConMIM, keys: str, x: Tensor, mask: Tensor) -> dict[str, float]:
    """Measure whether the model solves the task by position alone.

    Queries and keys see the same view x (B, 3, S, S); mask (B, N) bool. `keys`: see ConMIM.forward. Runs in train mode
    and float32.

    own_top1            share of masked queries whose nearest key in their own image is their own
    cross_top1          share whose nearest key in another image has their position; near own_top1 if content is ignored
    position_r2         see position_r2
    key_effective_rank  exp of the entropy of the keys' singular values, 1 to dim
    """
    with frozen_running_statistics(model):
        q, k = model(x, x, mask, keys, 0.0)
    position = torch.arange(mask.shape[1], device=x.device)

    def top1(candidates: Tensor) -> float:
        correct = similarities(q, candidates).argmax(2) == position
        return ((correct & mask).sum() / mask.sum()).item()

    return {
        "own_top1": top1(k),
        "cross_top1": top1(k.roll(1, 0)),
        "position_r2": position_r2(k),
        "key_effective_rank": probes.effective_rank(k.flatten(0, 1)),
    }


def learning_rate(step: int, warm_up: int, steps: int, peak: float, final: float = FINAL_LR) -> float:
    """Return the rate: linear from 0 to `peak` over `warm_up` steps, then cosine decay to `final` at `steps`."""
    if step < warm_up:
        return peak * step / max(1, warm_up - 1)
    return final + (peak - final) * schedules.cosine((step - warm_up) / (steps - warm_up))


def ema_momentum(step: int, steps: int, start: float) -> float:
    """Return the EMA momentum m: a cosine schedule from `start` to 1."""
    return 1 - (1 - start) * schedules.cosine(step / steps)


def build_optimizer(args: argparse.Namespace, model: ConMIM) -> torch.optim.AdamW:
    """Return AdamW for the online network.

    1-D parameters (biases, norm and LayerScale weights), the class token and absolute positions have no weight decay.
    """
    decay: list[Tensor] = []
    no_decay: list[Tensor] = []
    for name, weight in model.online.named_parameters():
        exempt = weight.ndim == 1 or name in ("vit.cls_token", "vit.pos_embed")
        (no_decay if exempt else decay).append(weight)
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, BETAS, fused=True)


def train(args: argparse.Namespace, run: Run, model: ConMIM, data: Data, optimizer: torch.optim.Optimizer) -> None:
    """Train to the final epoch. The state is saved after every epoch, and a restarted run resumes from it."""
    final_epoch = min(2, args.epochs) if args.rehearse else args.epochs
    steps_per_epoch = data.examples // args.batch
    rows = devices.rows_of_rank(args.batch)
    x, x_mask = diagnostic_batch(args, data)
    forward = devices.distribute(model, data.device, args.sync_batch_norm)
    online: list[Tensor] = [*model.online.parameters()]
    ema: list[Tensor] = [*model.ema.parameters()]
    start_epoch = run.resume(model, optimizer)
    if start_epoch is None:
        start_epoch, started = 0, time.perf_counter()
        metrics = diagnose(model, args.keys, x, x_mask)
        # The diagnostics are the only work of a run with --epochs 0.
        metrics |= {"seconds": time.perf_counter() - started, "peak_memory": devices.peak_memory(data.device)}
        run.end_epoch(0, final_epoch, metrics)
    if args.compile:
        forward.compile()

    total_steps, warm_up_steps = args.epochs * steps_per_epoch, round(args.warm_up * steps_per_epoch)
    epochs = range(start_epoch, final_epoch)
    for epoch in tqdm(epochs, run.name, final_epoch, initial=start_epoch, disable=None, leave=False):
        started = time.perf_counter()
        totals = torch.zeros(2, device=data.device)  # sums over the steps: loss, clipped gradients
        for step, (query, key, mask) in enumerate(batches(args, data, epoch, rows), epoch * steps_per_epoch):
            lr = learning_rate(step, warm_up_steps, total_steps, args.lr)
            momentum = ema_momentum(step, total_steps, args.momentum)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with devices.autocast(args.precision, data.device):
                q, k = forward(query, key, mask, args.keys, args.gradient_leak)
            loss = denoising_contrast(q, k, mask, args.temperature)  # float32

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(online, args.clip, foreach=True)  # the norm before clipping
            optimizer.step()
            ema_update(ema, online, momentum)
            # .item() here would force a host-device synchronisation.
            totals += torch.stack([loss.detach(), (norm > args.clip).float()])

        mean_loss, clipped_fraction = devices.mean_over_ranks(totals / steps_per_epoch).tolist()
        seconds = time.perf_counter() - started
        if run.finish_if_diverged(epoch + 1, totals):
            return
        metrics = {
            "loss": mean_loss,
            **diagnose(model, args.keys, x, x_mask),
            "clipped_fraction": clipped_fraction,
            "momentum": momentum,
            "lr": lr,
            "examples_per_second": steps_per_epoch * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, final_epoch, metrics)
    run.save_model({"model": model.state_dict(), "epoch": final_epoch, "diverged": False})


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale, distributed=True)
    rank, world = devices.init_process_group(args.device, device)
    if args.batch % world:
        fail(f"--batch {args.batch} (global) is not divisible by {world} processes: give a multiple of {world}")
    usage = f"--batch {args.batch} on {world} processes"
    remedy = f"use --batch {args.batch // 2} (about half the memory, different results)"
    with run_lock(args.out, rank), devices.report_oom(device, usage, remedy, args.precision):
        run = Run(vars(args), __file__, rank)
        if run.finished:
            return
        data = images.load_or_stream(
            args.data_set, args.data, args.size, device, args.workers, args.data_seed, TEST_INTERPOLATION
        )
        if args.labels and args.labels < world:
            fail(f"--labels {args.labels} is less than one image for each of {world} processes: give at least {world}")
        if args.labels and args.labels > data.examples and rank == 0:
            limit = f"--labels {args.labels} is more than the training set ({data.examples} examples)"
            print(f"warning: {limit}: eval.py will use all labels", file=sys.stderr)
        if args.batch > data.examples:
            fail(
                f"--batch {args.batch} is larger than the training set ({data.examples} examples): "
                f"give at most {data.examples}"
            )
        if args.warm_up >= args.epochs > 0 and rank == 0:
            limit = f"--warm-up {args.warm_up:g} is as long as --epochs {args.epochs}"
            print(f"warning: {limit}: the learning rate never reaches --lr", file=sys.stderr)
        steps = args.epochs * (data.examples // args.batch)
        provenance = devices.environment(device) | {"data": data.digest, "steps": steps}
        run.write_config(f"{args.data_set}, {args.network}", provenance)
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        model = build_model(args, device)
        train(args, run, model, data, build_optimizer(args, model))


if __name__ == "__main__":
    main()
