"""SimSiam: two views, one network, a predictor and a stop-gradient; no negatives, no momentum encoder.

Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.

Two augmented views x1, x2 of an image pass through the same encoder f (backbone and projector); the predictor h
has to find the other view's output, which is held constant (section 3, equations 1 to 4):

    z_i = f(x_i)    p_i = h(z_i)    D(p, z) = - <p / |p|, z / |z|>
    L   = 1/2 D(p1, sg(z2)) + 1/2 D(p2, sg(z1))

    x  view        (B, 3, S, S)      h   predictor, a bottleneck of dim/4
    z  projection  (B, dim)          sg  stop-gradient: leak * z + (1 - leak) * z.detach(), leak 0 in the paper
    p  prediction  (B, dim)

    python simsiam/train.py                                          # demo: 5,000 glyphs, about 70 s of one core
    python simsiam/train.py --no-stop-gradient --out runs/scratch2   # an ablation
    python simsiam/train.py --scale gpu --out runs/cifar             # CIFAR-10, ResNet-18, 200 epochs
    torchrun --nproc-per-node 8 simsiam/train.py --scale paper --data ImageNet --out runs/imagenet

Differs from the authors' code:
 1. The predictor's learning rate is constant by default, as in the released checkpoints and most of the paper's
    tables; the paper's first two ablations decayed it (section 4.2): --predictor-schedule cosine.
 2. Up to 64 pixels the ResNet has the CIFAR stem (3x3, stride 1, no max-pool), and the projector two layers, 2048
    wide (appendix D); the output layer has a (frozen) bias only in the three-layer projector, where the released
    checkpoints have one.
 3. Small images live on the device and are augmented there in batches; at 224 pixels workers decode and augment
    with torchvision (its 23-pixel Gaussian kernel, where the authors use Pillow's).
 4. CUDA trains under bfloat16 autocast; loss and all measurements are float32. --precision float32 undoes it.
 5. The demo scale (glyphs, a small ResNet, its own crop, hue, grey and learning rate) is ours.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import augment, cli, devices, image_folder, images, probes, schedules, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import Run
from simsiam.net import NETWORKS, build_backbone

Augmentation = dict[str, Any]
Pairs = list[tuple[int, int]]  # (view that predicts, view that is predicted)

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #                demo             gpu             paper
    "data_set":          ("glyphs10",      "cifar10",      "folder"),
    "size":              (32,              32,             224),  # pixels; of a folder's images
    "network":           ("resnet8",       "resnet18",     "resnet50"),
    "projector_layers":  (2,               2,              3),  # section 3; appendix D
    "epochs":            (8,               200,            100),  # the paper on CIFAR-10: 800
    "batch":             (32,              512,            512),
    "lr":                (1.4,             0.03,           0.05),  # times batch / 256
    "weight_decay":      (5e-4,            5e-4,           1e-4),
    "neighbours":        (20,              200,            200),  # of the kNN monitor
    "monitor_every":     (2,               5,              10),
    "workers":           (0,               4,              8),
}  # fmt: skip

# The paper's views (appendix A; on CIFAR without blur, appendix D); glyphs must not be mirrored, and ours are smaller.
AUGMENTATION: dict[str, Augmentation] = {
    "glyphs": {"pixels": 24, "crop": (0.4, 1.0), "flip": 0.0, "hue": 0.5, "grey": 0.6, "blur": 0.0},
    "cifar": {"pixels": 32, "crop": (0.2, 1.0), "flip": 0.5, "hue": 0.1, "grey": 0.2, "blur": 0.0},
    "folder": {"pixels": None, "crop": (0.2, 1.0), "flip": 0.5, "hue": 0.1, "grey": 0.2, "blur": 0.5},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: contradictions stop (exit 2), and `dim` is a number."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.NAMES, help="folder: --data holds train/CLASS/*, val/CLASS/*")
    data.add_argument("--size", type=cli.int_min(16), help="of a folder's images; above 64 pixels workers decode")
    data.add_argument("--workers", type=cli.int_min(0), help="processes that decode a folder's images")
    data.add_argument("--neighbours", type=cli.int_min(1), help="k of the kNN monitor; the paper gives none")
    data.add_argument("--monitor-every", type=cli.int_min(1), help="epochs between kNN and collapse measures")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=cli.int_min(1), help="paper: 100 on ImageNet, 800 on CIFAR-10")
    optimisation.add_argument("--batch", type=cli.int_min(2), help="global batch; paper: 512")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="base rate, times batch / 256 (section 3)")
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="times --lr (robustness)")
    optimisation.add_argument("--weight-decay", type=cli.float_in(0), help="on every parameter (appendix A)")
    precisions = ("auto", "float32", "bfloat16")
    optimisation.add_argument("--precision", choices=precisions, default="auto", help="auto: bfloat16 on CUDA alone")
    toggle = argparse.BooleanOptionalAction
    optimisation.add_argument("--channels-last", action=toggle, default=True, help="memory layout of convolutions")
    optimisation.add_argument("--compile", action="store_true", help="torch.compile; for long runs on a GPU")
    method = parser.add_argument_group("method (defaults: the paper's)")
    method.add_argument("--network", choices=tuple(NETWORKS), help="backbone; paper: resnet50, on CIFAR resnet18")
    method.add_argument("--gradient-leak", type=cli.float_in(0, 1), help="share of the target's gradient, default 0")
    method.add_argument("--no-stop-gradient", action="store_true", help="--gradient-leak 1 (figure 2)")
    method.add_argument("--predictor", choices=("mlp", "frozen", "none"), default="mlp", help="table 1")
    method.add_argument("--projector", choices=("mlp", "bn", "none"), default="mlp", help="bn: affine-free batch norm")
    method.add_argument("--projector-layers", type=int, choices=(2, 3), help="3 on ImageNet, 2 on CIFAR")
    method.add_argument("--dim", help="output width: a number, or `backbone` for the backbone's (appendix B)")
    method.add_argument("--loss", choices=tuple(PAIRS), default="symmetric", help="section 4.6")
    method.add_argument("--predictor-schedule", choices=("constant", "cosine"), default="constant", help="table 1c")
    args = cli.parse(parser, SCALES, argv)

    if args.no_stop_gradient and args.gradient_leak not in (None, 1.0):
        fail(f"--no-stop-gradient is --gradient-leak 1, but --gradient-leak {args.gradient_leak} was given: drop one")
    args.gradient_leak = 1.0 if args.no_stop_gradient else args.gradient_leak or 0.0
    args.lr *= args.lr_factor
    del args.no_stop_gradient, args.lr_factor
    if args.data_set != "folder" and args.size != 32:
        fail(f"--size {args.size} is for --data-set folder alone: {args.data_set} has 32 pixels")
    width, dim = NETWORKS[args.network]
    if args.projector != "mlp" and args.dim not in (None, "backbone", str(width)):
        fail(f"--dim {args.dim}: with --projector {args.projector} the width is the backbone's, {width}; drop --dim")
    if args.dim == "backbone" or args.projector != "mlp":
        dim = width
    elif args.dim is not None:
        dim = int(args.dim) if args.dim.isdecimal() else 0
    if dim < 4 or dim % 4:
        fail(f"--dim {args.dim} is neither `backbone` nor a multiple of 4 (the predictor's bottleneck is dim / 4)")
    args.dim = dim
    return args


# ------------------------------------------------------------------------------------------------- model


def build_projector(kind: str, layers: int, width: int, hidden: int, dim: int) -> nn.Module:
    """ABLATION (projector): `layers` fully connected layers with batch norm, the last one affine-free."""
    if kind == "none":
        return nn.Identity()
    if kind == "bn":
        return nn.BatchNorm1d(width, affine=False)
    parts: list[nn.Module] = []
    for inputs in (width, hidden)[: layers - 1]:
        parts += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    output = nn.Linear(hidden, dim, bias=layers == 3)
    if output.bias is not None:
        output.bias.requires_grad_(False)  # the batch norm subtracts it; kept for the official checkpoints' names
    return nn.Sequential(*parts, output, nn.BatchNorm1d(dim, affine=False))


def build_predictor(kind: str, dim: int) -> nn.Module:
    """ABLATION (predictor): a bottleneck dim -> dim/4 -> dim without batch norm at its output."""
    if kind == "none":
        return nn.Identity()
    predictor = nn.Sequential(
        nn.Linear(dim, dim // 4, bias=False),
        nn.BatchNorm1d(dim // 4),
        nn.ReLU(inplace=True),
        nn.Linear(dim // 4, dim),
    )
    return predictor.requires_grad_(kind == "mlp")


class SimSiam(nn.Module):
    """Encoder and predictor. Each part starts from a seed of its own, so arms share what they have in common."""

    def __init__(
        self,
        network: str,
        size: int,
        projector: str,
        projector_layers: int,
        dim: int,
        predictor: str,
        seed: int,
    ):
        super().__init__()
        self.width, hidden = NETWORKS[network]
        with seeding.forked(seed, "backbone"):
            self.backbone = build_backbone(network, size)
        with seeding.forked(seed, "projector"):
            self.projector = build_projector(projector, projector_layers, self.width, hidden, dim)
        with seeding.forked(seed, "predictor"):
            self.predictor = build_predictor(predictor, dim)

    def forward(self, views: list[Tensor], pairs: Pairs, leak: float) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Predictions p by view and projections z of all views, (B, dim) each.

        Each view has a forward pass, and so batch statistics, of its own. A view that is only ever a constant target
        needs no autograd; it moves the running statistics all the same.
        """
        predicting = {view for view, _ in pairs}
        p: dict[int, Tensor] = {}
        z = []
        for view, x in enumerate(views):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (view in predicting or leak > 0)):
                z.append(self.projector(self.backbone(x)))
                if view in predicting:
                    p[view] = self.predictor(z[view])
        return p, z


def build_model(args: argparse.Namespace, device: torch.device) -> SimSiam:
    """The network that a run's arguments describe, on `device`."""
    model = SimSiam(args.network, args.size, args.projector, args.projector_layers, args.dim, args.predictor, args.seed)
    return model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format).to(device)


# ------------------------------------------------------------------------------------------------- loss

PAIRS: dict[str, Pairs] = {  # ABLATION (symmetric loss); the loss is the mean over the pairs
    "symmetric": [(0, 1), (1, 0)],  # equation 4
    "asymmetric": [(0, 1)],
    "asymmetric-2x": [(0, 1), (2, 3)],  # two independent pairs an image (section 4.6)
}


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z), equation 1: minus the mean cosine of the rows of p and z, (B, dim) each; float32, in [-1, 1]."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def simsiam_loss(p: dict[int, Tensor], z: list[Tensor], pairs: Pairs, leak: float) -> Tensor:
    """Mean of D(p_a, sg(z_b)) over the pairs (a, b), equation 4. Its value does not depend on `leak`.

    ABLATION (stop-gradient): `leak` is the share of the target's gradient that passes; 0 is the paper's sg.
    """
    targets = [leak * x + (1 - leak) * x.detach() for x in (x.float() for x in z)]
    return torch.stack([negative_cosine(p[a], targets[b]) for a, b in pairs]).mean()


# ------------------------------------------------------------------------------------------------- data


def one_view(source: Tensor, rng: seeding.SampleRNG, aug: Augmentation) -> Tensor:
    """Crop, flip, jitter, grey, blur (appendix A): (B, 3, S, S) uint8 to (B, 3, pixels, pixels) float32 in [0, 1]."""
    view = augment.random_resized_crop(source, rng, scale=aug["crop"], size=aug["pixels"], flip=aug["flip"])
    view = augment.random_color_jitter(view, rng, 0.4, 0.4, 0.4, aug["hue"], probability=0.8)
    view = augment.random_grayscale(view, rng, aug["grey"])
    return augment.random_gaussian_blur(view, rng, (0.1, 2.0), aug["blur"]) if aug["blur"] else view


def worker_view(aug: Augmentation) -> v2.Compose:
    """The same view of one Pillow image by torchvision's own transforms: (3, pixels, pixels) uint8."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(aug["pixels"], aug["crop"]),
            v2.RandomHorizontalFlip(aug["flip"]),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, aug["hue"])], 0.8),
            v2.RandomGrayscale(aug["grey"]),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], aug["blur"]),
            v2.PILToTensor(),
        ]
    )


def augmentation(args: argparse.Namespace) -> Augmentation:
    """The row of AUGMENTATION for the run's data set, with `pixels` resolved."""
    aug = next(aug for name, aug in AUGMENTATION.items() if args.data_set.startswith(name))
    return aug | {"pixels": aug["pixels"] or args.size}


def batches(args: argparse.Namespace, data: Data, epoch: int, rows: slice) -> Iterator[list[Tensor]]:
    """One epoch of lists of normalised views (B, 3, S, S), cut to this rank's `rows` of the global batch.

    The order and every view follow from (seed, epoch) alone; the last incomplete batch is dropped.
    """
    aug, views = augmentation(args), 1 + max(view for pair in PAIRS[args.loss] for view in pair)
    steps = data.examples // args.batch
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    order = order[: steps * args.batch].view(steps, args.batch)
    if isinstance(data, image_folder.StreamedImages):
        for loaded in data.views(worker_view(aug), views, order[:, rows].tolist(), args.seed, epoch):
            yield [data.normalise(view) for view in loaded]
        return
    for step, picked in enumerate(order, epoch * steps):
        source = data.train[picked[rows]]
        rngs = [seeding.SampleRNG(args.seed, f"view {view}", step, args.batch, rows) for view in range(views)]
        yield [data.normalise(one_view(source, rng, aug)) for rng in rngs]


# ------------------------------------------------------------------------------------------------- train


def represent(model: SimSiam, data: Data, part: str) -> list[Tensor]:
    """Backbone features (N, width), projections (N, dim) and labels (N,) of `part` ("train", "test"), in eval mode."""
    return probes.extract_features([model.backbone, model.projector], data, part)


def measure(bank: Sequence[Tensor], queries: Sequence[Tensor], classes: int, k: int) -> dict[str, float]:
    """Collapse meters of the queries' z, and kNN accuracy on features and on z; both as `represent` returns them."""
    (known, known_z, known_labels), (features, z, labels) = bank, queries
    return {
        "std_ratio": probes.std_ratio(z),
        "mean_cosine": probes.mean_cosine(z),
        "effective_rank": probes.effective_rank(z),
        "knn_accuracy": probes.knn_accuracy(
            probes.Labelled(known, known_labels), probes.Labelled(features, labels), classes, k
        ),
        "knn_accuracy_z": probes.knn_accuracy(
            probes.Labelled(known_z, known_labels), probes.Labelled(z, labels), classes, k
        ),
    }


def monitor(model: SimSiam, data: Data, k: int) -> dict[str, float]:
    """`measure` on the training and the test set."""
    devices.share_buffers(model)
    bank, queries = (represent(model, data, part) for part in ("train", "test"))
    return measure(bank, queries, data.classes, k)


@torch.no_grad()
def untrained(args: argparse.Namespace, model: SimSiam, data: Data, rows: slice) -> dict[str, float]:
    """The record of epoch 0, from a copy of the model whose running statistics have seen 20 batches."""
    copied = copy.deepcopy(model)
    for views in itertools.islice(batches(args, data, 0, rows), 20):
        z = copied.projector(copied.backbone(views[0]))
    spread = probes.std_ratio(devices.gather_rows(z))
    return {"std_ratio_train_mode": spread, **monitor(copied, data, args.neighbours)}


def build_optimizer(args: argparse.Namespace, model: SimSiam) -> torch.optim.Optimizer:
    """SGD on every trainable parameter, decay included (appendix A); `schedule` says how a group's rate moves."""
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    parts = [(encoder, "cosine"), (list(model.predictor.parameters()), args.predictor_schedule)]
    groups = [{"params": [x for x in part if x.requires_grad], "schedule": schedule} for part, schedule in parts]
    lr = args.lr * args.batch / 256  # section 3: linear scaling
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=args.weight_decay)


def train(args: argparse.Namespace, run: Run, model: SimSiam, data: Data, optimizer: torch.optim.Optimizer) -> None:
    """Train to the last epoch; saves after each, and goes on from there when started again."""
    pairs, leak, rows = PAIRS[args.loss], args.gradient_leak, devices.rows_of_rank(args.batch)
    last, steps = min(2, args.epochs) if args.rehearse else args.epochs, data.examples // args.batch
    forward = devices.distribute(model, data.device)  # before the first measurement: it may change batch norms
    first = run.resume(model, optimizer)
    if first is None:
        first = 0
        run.end_epoch(0, last, untrained(args, model, data, rows))
    if args.compile:
        forward.compile()

    for epoch in tqdm(range(first, last), run.name, last, initial=first, disable=None, leave=False):
        started, total = time.perf_counter(), torch.zeros((), device=data.device)
        # The encoder's rate falls along a cosine, epoch by epoch; the predictor's stays (section 3).
        for group in optimizer.param_groups:
            factor = schedules.cosine(epoch / args.epochs) if group["schedule"] == "cosine" else 1.0
            group["lr"] = args.lr * args.batch / 256 * factor

        for views in batches(args, data, epoch, rows):
            # Two forwards, not one of both views: each view has batch statistics of its own.
            with devices.autocast(args.precision, data.device):
                p, z = forward(views, pairs, leak)
            loss = simsiam_loss(p, z, pairs, leak)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()  # .item() here would force a host-device synchronisation

        loss_mean = devices.mean_over_ranks(total / steps).item()
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, total):
            return
        record = {
            "loss": loss_mean,
            "lr": optimizer.param_groups[0]["lr"],
            "std_ratio_train_mode": probes.std_ratio(devices.gather_rows(z[0].detach())),
            "examples_per_second": steps * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        if (epoch + 1) % args.monitor_every == 0 or epoch + 1 == last:
            record |= monitor(model, data, args.neighbours)
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
