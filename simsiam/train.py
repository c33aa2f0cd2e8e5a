"""SimSiam: two views, one network, a predictor and a stop-gradient; no negatives, no momentum encoder.

Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.

Two augmented views x1, x2 of an image pass through the same encoder f (backbone and projector). A predictor h predicts
the projection of the other view, which is treated as a constant (section 3, equations 1 to 4):

    z_i = f(x_i)    p_i = h(z_i)    D(p, z) = - <p / |p|, z / |z|>
    L   = 1/2 D(p1, sg(z2)) + 1/2 D(p2, sg(z1))

    x  view        (B, 3, S, S)      h   predictor, a bottleneck of dim/4
    z  projection  (B, dim)          sg  stop-gradient: leak * z + (1 - leak) * z.detach(), leak 0 in the paper
    p  prediction  (B, dim)

    python simsiam/train.py                                          # demo: 5,000 glyphs, about 70 s on one CPU core
    python simsiam/train.py --no-stop-gradient --out runs/scratch2   # an ablation
    python simsiam/train.py --scale gpu --out runs/cifar             # CIFAR-10, ResNet-18, 200 epochs
    torchrun --nproc-per-node 8 simsiam/train.py --scale paper --data ImageNet --out runs/imagenet

Differs from the authors' code:
 1. The predictor's learning rate is constant by default, as in the authors' checkpoints and in most tables of the
    paper. The paper's first two ablations decayed it (section 4.2): --predictor-schedule cosine.
 2. Up to 64 pixels the ResNet has the CIFAR stem (3x3, stride 1, no max-pool). At demo and gpu scale the projector has
    two layers (appendix D); its hidden width is our choice. The output layer has a (frozen) bias only in the
    three-layer projector, because the authors' checkpoints contain one.
 3. Images up to 64 pixels are stored on the device and augmented there in batches. Larger images are decoded and
    augmented by DataLoader workers with torchvision. The blur has a Gaussian kernel of a tenth of the side on the
    device (7 pixels at 64), and of 23 pixels in the workers; the authors use Pillow's blur.
 4. On CUDA the networks run under bfloat16 autocast; the loss and the measurements of an evaluation are float32.
    --precision float32 turns autocast off.
 5. The demo scale is ours: glyphs, a small ResNet, and its own crop, hue, grayscale and learning rate. Its views have
    24 pixels (no antialiasing); it is evaluated at 32.
 6. On several CPU ranks each rank has its own batch statistics, because SyncBatchNorm requires CUDA. The value of the
    std at collapse (eval.py) assumes those of the global batch.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
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
    "size":              (32,              32,             224),  # pixels; can be changed for image folders only
    "network":           ("resnet8",       "resnet18",     "resnet50"),
    "projector_layers":  (2,               2,              3),  # section 3; appendix D
    "epochs":            (16,              200,            100),  # the paper on CIFAR-10: 800
    "batch":             (64,              512,            512),
    "lr":                (1.0,             0.03,           0.05),  # times batch / 256
    "weight_decay":      (5e-4,            5e-4,           1e-4),
    "neighbours":        (20,              200,            200),  # k of the kNN evaluation
    "monitor_every":     (4,               5,              10),
    "workers":           (0,               4,              8),
}  # fmt: skip

# The paper's augmentation (appendix A; without blur on CIFAR, appendix D). Glyphs and digits are cropped less and not
# flipped, because a mirrored character may not belong to its class.
AUGMENTATION: dict[str, Augmentation] = {
    "glyphs": {"pixels": 24, "crop": (0.4, 1.0), "flip": 0.0, "hue": 0.5, "grey": 0.6, "blur": 0.0},
    "mnist5k": {"pixels": 24, "crop": (0.4, 1.0), "flip": 0.0, "hue": 0.1, "grey": 0.2, "blur": 0.0},
    "cifar": {"pixels": 32, "crop": (0.2, 1.0), "flip": 0.5, "hue": 0.1, "grey": 0.2, "blur": 0.0},
    "folder": {"pixels": None, "crop": (0.2, 1.0), "flip": 0.5, "hue": 0.1, "grey": 0.2, "blur": 0.5},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags and resolve them: `dim` becomes an int. Exits with code 2 if flags contradict each other."""
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
    data.add_argument("--neighbours", type=cli.int_in(1), help="k of the kNN evaluation; not given in the paper")
    data.add_argument("--monitor-every", type=cli.int_in(1), help="epochs between two evaluations (kNN, collapse)")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=cli.int_in(1), help="paper: 100 on ImageNet, 800 on CIFAR-10")
    optimisation.add_argument("--batch", type=cli.int_in(2), help="global batch size; paper: 512")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="base learning rate; multiplied by --batch / 256")
    optimisation.add_argument(
        "--lr-factor", type=cli.float_in(0), default=1.0, help="multiplies --lr; used by the robustness study"
    )
    optimisation.add_argument("--weight-decay", type=cli.float_in(0), help="applies to all parameters (appendix A)")
    toggle = argparse.BooleanOptionalAction
    optimisation.add_argument("--channels-last", action=toggle, default=True, help="memory format of convolutions")
    optimisation.add_argument("--compile", action="store_true", help="apply torch.compile to the forward pass")
    method = parser.add_argument_group("method (defaults at --scale paper: the paper's)")
    method.add_argument("--network", choices=tuple(NETWORKS), help="backbone; paper: resnet50, on CIFAR resnet18")
    method.add_argument(
        "--gradient-leak",
        type=cli.float_in(0, 1),
        help="fraction of the gradient that passes the stop-gradient to the target; default 0",
    )
    method.add_argument("--no-stop-gradient", action="store_true", help="same as --gradient-leak 1 (figure 2)")
    predictors = ("mlp", "frozen", "none")
    method.add_argument(
        "--predictor", choices=predictors, default="mlp", help="frozen: keeps its random initialisation (table 1)"
    )
    method.add_argument("--projector", choices=("mlp", "bn", "none"), default="mlp", help="bn: affine-free batch norm")
    method.add_argument(
        "--head-bn",
        choices=("default", "hidden", "none"),
        default="default",
        help="batch norms of the heads: hidden: not at the projector's output; none: none at all (table 3)",
    )
    method.add_argument("--projector-layers", type=int, choices=(2, 3), help="3 on ImageNet, 2 on CIFAR")
    method.add_argument(
        "--dim",
        help="output width (appendix B): an integer, or `backbone` for the backbone's width; default: 256 for resnet8, "
        "else 2048",
    )
    method.add_argument(
        "--loss", choices=tuple(PAIRS), default="symmetric", help="asymmetric-2x: four views per image (section 4.6)"
    )
    method.add_argument(
        "--predictor-schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="learning rate schedule of the predictor (table 1c)",
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
    width, _, dim = NETWORKS[args.network]
    if args.projector != "mlp" and args.dim not in (None, "backbone", str(width)):
        fail(f"--dim {args.dim} contradicts --projector {args.projector}, which has output width {width}: drop --dim")
    if args.head_bn != "default" and (args.projector == "bn" or (args.projector, args.head_bn) == ("none", "hidden")):
        fail(f"--projector {args.projector} contradicts --head-bn {args.head_bn}: drop one of them")
    if args.predictor_schedule != "constant" and args.predictor != "mlp":
        fail(f"--predictor-schedule has no effect with --predictor {args.predictor}: drop one of them")
    if args.dim == "backbone" or args.projector != "mlp":
        dim = width
    elif args.dim is not None:
        dim = int(args.dim) if args.dim.isdecimal() and len(args.dim) < 9 else 0
    if not 4 <= dim <= cli.MAX_WIDTH or dim % 4:
        expected = f"backbone or a multiple of 4 up to {cli.MAX_WIDTH}"
        fail(f"invalid --dim {args.dim!r}: give {expected} (the predictor's bottleneck is dim / 4)")
    args.dim = dim
    return args


# ------------------------------------------------------------------------------------------------- model


def linear_bn(inputs: int, outputs: int, bn: bool) -> list[nn.Module]:
    """Return a fully connected layer with batch norm, or with a bias instead."""
    return [nn.Linear(inputs, outputs, bias=not bn), *([nn.BatchNorm1d(outputs)] if bn else [])]


def build_projector(
    variant: str, layers: int, width: int, hidden: int, dim: int, head_bn: str = "default"
) -> nn.Module:
    """Return the projector: 2 or 3 `layers`, fully connected with batch norm; the last batch norm has no affine.

    ABLATION (projector): `variant` is "mlp", "bn" (only the affine-free batch norm) or "none".
    ABLATION (batch norm): `head_bn` is "default", "hidden" (not at the output) or "none" (table 3).
    """
    if variant == "none":
        return nn.Identity()
    if variant == "bn":
        return nn.BatchNorm1d(width, affine=False)
    modules: list[nn.Module] = []
    for inputs in (width, hidden)[: layers - 1]:
        modules += [*linear_bn(inputs, hidden, head_bn != "none"), nn.ReLU(inplace=True)]
    if head_bn != "default":
        return nn.Sequential(*modules, nn.Linear(hidden, dim))
    output = nn.Linear(hidden, dim, bias=layers == 3)
    if output.bias is not None:  # cancelled by the batch norm, but the authors' checkpoints contain it
        output.bias.requires_grad_(False)
    return nn.Sequential(*modules, output, nn.BatchNorm1d(dim, affine=False))


def build_predictor(variant: str, dim: int, head_bn: str = "default") -> nn.Module:
    """Return the predictor: a bottleneck dim -> dim/4 -> dim without batch norm at its output.

    ABLATION (predictor): `variant` is "mlp", "frozen" (at its random initialisation) or "none".
    """
    if variant == "none":
        return nn.Identity()
    hidden = [*linear_bn(dim, dim // 4, head_bn != "none"), nn.ReLU(inplace=True)]
    predictor = nn.Sequential(*hidden, nn.Linear(dim // 4, dim))
    return predictor.requires_grad_(variant == "mlp")


class SimSiam(nn.Module):
    """Encoder (backbone and projector) and predictor.

    Each of the three parts has its own seed, so that arms share the initial weights of the parts they have in common.
    """

    def __init__(
        self,
        network: str,
        size: int,
        projector: str,
        projector_layers: int,
        dim: int,
        predictor: str,
        seed: int,
        head_bn: str = "default",
    ):
        super().__init__()
        self.width, hidden, _ = NETWORKS[network]
        with seeding.seeded_fork_rng(seed, "backbone"):
            self.backbone = build_backbone(network, size)
        with seeding.seeded_fork_rng(seed, "projector"):
            self.projector = build_projector(projector, projector_layers, self.width, hidden, dim, head_bn)
        with seeding.seeded_fork_rng(seed, "predictor"):
            self.predictor = build_predictor(predictor, dim, head_bn)

    def forward(self, views: list[Tensor], pairs: Pairs, leak: float) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Return the predictions p, by the index of the view, and the projections z of all views, (B, dim) each.

        Each view has its own forward pass and therefore its own batch statistics. A view that is only a constant
        target runs without autograd, but still updates the running statistics of the batch norms.
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
    """Return the initialised model for the arguments of a run, on `device`."""
    model = SimSiam(
        network=args.network,
        size=args.size,
        projector=args.projector,
        projector_layers=args.projector_layers,
        dim=args.dim,
        predictor=args.predictor,
        seed=args.seed,
        head_bn=args.head_bn,
    )
    return model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format).to(device)


# ------------------------------------------------------------------------------------------------- loss

PAIRS: dict[str, Pairs] = {  # ABLATION (symmetric loss); the loss is the mean over the pairs
    "symmetric": [(0, 1), (1, 0)],  # equation 4
    "asymmetric": [(0, 1)],
    "asymmetric-2x": [(0, 1), (2, 3)],  # two independent pairs of views per image (section 4.6)
}


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z), equation 1: mean negative cosine similarity of p and z, (B, dim) each; float32 in [-1, 1]."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def simsiam_loss(p: dict[int, Tensor], z: list[Tensor], pairs: Pairs, leak: float) -> Tensor:
    """Mean of D(p_a, sg(z_b)) over the pairs (a, b), equation 4. Its value does not depend on `leak`.

    ABLATION (stop-gradient): `leak` is the fraction of the target's gradient that is kept; 0 is the paper's sg.
    """
    z = [x.float() for x in z]
    targets = [leak * x + (1 - leak) * x.detach() for x in z]
    return torch.stack([negative_cosine(p[a], targets[b]) for a, b in pairs]).mean()


# ------------------------------------------------------------------------------------------------- data


def random_view(images: Tensor, rng: seeding.SampleRNG, aug: Augmentation) -> Tensor:
    """Return a random view of each image: (B, 3, S, S) uint8 to (B, 3, pixels, pixels) float32 in [0, 1].

    Crop, flip, colour jitter, grayscale, blur (appendix A).
    """
    view = augment.random_resized_crop(images, rng, scale=aug["crop"], size=aug["pixels"], flip=aug["flip"])
    view = augment.random_color_jitter(view, rng, 0.4, 0.4, 0.4, aug["hue"], probability=0.8)
    view = augment.random_grayscale(view, rng, aug["grey"])
    return augment.random_gaussian_blur(view, rng, (0.1, 2.0), aug["blur"]) if aug["blur"] else view


def torchvision_view(aug: Augmentation) -> v2.Compose:
    """Return the augmentation of `random_view` as a torchvision transform: PIL image to (3, pixels, pixels) uint8."""
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
    """Return the entry of AUGMENTATION for the run's data set; `pixels` defaults to --size."""
    aug = next(aug for name, aug in AUGMENTATION.items() if args.data_set.startswith(name))
    return aug | {"pixels": aug["pixels"] or args.size}


def batches(args: argparse.Namespace, data: Data, epoch: int, rows: slice) -> Iterator[list[Tensor]]:
    """Yield the batches of one epoch: lists of normalised views for the `rows` of this rank.

    Views are (B, 3, pixels, pixels); see AUGMENTATION. `rows` index the global batch. The order of the images and their
    views depend only on (seed, epoch). The last incomplete batch is dropped.
    """
    aug = augmentation(args)
    n_views = 1 + max(view for pair in PAIRS[args.loss] for view in pair)
    steps_per_epoch = data.examples // args.batch
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    order = order[: steps_per_epoch * args.batch].view(steps_per_epoch, args.batch)
    if isinstance(data, image_folder.StreamedImages):
        for views in data.views(torchvision_view(aug), n_views, order[:, rows].tolist(), args.seed, epoch):
            yield [data.normalise(view) for view in views]
        return
    for step, indices in enumerate(order, epoch * steps_per_epoch):
        batch = data.train[indices[rows]]
        rngs = [seeding.SampleRNG(args.seed, f"view {view}", step, args.batch, rows) for view in range(n_views)]
        yield [data.normalise(random_view(batch, rng, aug)) for rng in rngs]


# ------------------------------------------------------------------------------------------------- train


class Features(NamedTuple):
    """Backbone features (N, width), projections z (N, dim) and labels (N,) of a split, in eval mode."""

    backbone: Tensor
    z: Tensor
    labels: Tensor


def extract_features(model: SimSiam, data: Data, split: str) -> Features:
    """Return the features of a split, "train" or "test"."""
    return Features(*probes.extract_features([model.backbone, model.projector], data, split))


def representation_metrics(bank: Features, queries: Features, classes: int, k: int) -> dict[str, float]:
    """Return collapse metrics of the queries' z, and the kNN accuracy of features and of z in percent."""
    bank_features, features = (probes.Labelled(split.backbone, split.labels) for split in (bank, queries))
    bank_z, z = (probes.Labelled(split.z, split.labels) for split in (bank, queries))
    return {
        "std_ratio": probes.std_ratio(queries.z),
        "mean_cosine": probes.mean_cosine(queries.z),
        "effective_rank": probes.effective_rank(queries.z),
        "knn_accuracy": probes.knn_accuracy(bank_features, features, classes, k),
        "knn_accuracy_z": probes.knn_accuracy(bank_z, z, classes, k),
    }


def evaluate_epoch(model: SimSiam, data: Data, k: int) -> dict[str, float]:
    """Return the `representation_metrics` of the test set, with the training set as the kNN bank."""
    devices.broadcast_buffers(model)
    bank = extract_features(model, data, "train")
    queries = extract_features(model, data, "test")
    return representation_metrics(bank, queries, data.classes, k)


@torch.no_grad()
def untrained_metrics(args: argparse.Namespace, model: SimSiam, data: Data, rows: slice) -> dict[str, float]:
    """Return the metrics of epoch 0. A copy of the model first runs 20 batches to estimate its running statistics.

    At momentum 0.1 these still contain 12 % (0.9^20) of their initial values, mean 0 and variance 1.
    """
    untrained = copy.deepcopy(model)
    for views in itertools.islice(batches(args, data, 0, rows), 20):
        z = untrained.projector(untrained.backbone(views[0]))
    std_ratio = probes.std_ratio(devices.gather_rows(z))
    return {"std_ratio_train_mode": std_ratio, **evaluate_epoch(untrained, data, args.neighbours)}


def build_optimizer(args: argparse.Namespace, model: SimSiam) -> torch.optim.Optimizer:
    """Return SGD with weight decay on every trainable parameter (appendix A).

    Two parameter groups, encoder and predictor; `schedule` names the learning rate schedule of each.
    """
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    predictor = list(model.predictor.parameters())
    groups = [
        {"params": [x for x in encoder if x.requires_grad], "schedule": "cosine"},
        {"params": [x for x in predictor if x.requires_grad], "schedule": args.predictor_schedule},
    ]
    lr = args.lr * args.batch / 256  # section 3: linear scaling
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=args.weight_decay)


def train(args: argparse.Namespace, run: Run, model: SimSiam, data: Data, optimizer: torch.optim.Optimizer) -> None:
    """Train to the last epoch. Saves the state after each epoch, and resumes from it."""
    pairs, leak = PAIRS[args.loss], args.gradient_leak
    rows = devices.rows_of_rank(args.batch)
    steps_per_epoch = data.examples // args.batch
    final_epoch = min(2, args.epochs) if args.rehearse else args.epochs
    # Distribute before the first measurement: this may replace batch norms by SyncBatchNorm.
    forward = devices.distribute(model, data.device)
    start_epoch = run.resume(model, optimizer)
    if start_epoch is None:
        start_epoch = 0
        run.end_epoch(0, final_epoch, untrained_metrics(args, model, data, rows))
    if args.compile:
        forward.compile()

    epochs = range(start_epoch, final_epoch)
    for epoch in tqdm(epochs, run.name, final_epoch, initial=start_epoch, disable=None, leave=False):
        start_time = time.perf_counter()
        loss_sum = torch.zeros((), device=data.device)
        # Cosine decay of the encoder's learning rate, once per epoch; the predictor's is constant by default.
        for group in optimizer.param_groups:
            factor = schedules.cosine(epoch / args.epochs) if group["schedule"] == "cosine" else 1.0
            group["lr"] = optimizer.defaults["lr"] * factor

        for views in batches(args, data, epoch, rows):
            # One forward pass per view, not one for all views: each view needs its own batch statistics.
            with devices.autocast(args.precision, data.device):
                p, z = forward(views, pairs, leak)
            loss = simsiam_loss(p, z, pairs, leak)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()  # .item() here would force a host-device synchronisation

        mean_loss = devices.mean_over_ranks(loss_sum / steps_per_epoch).item()
        seconds = time.perf_counter() - start_time
        if run.finish_if_diverged(epoch + 1, loss_sum):
            return
        metrics = {
            "loss": mean_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "std_ratio_train_mode": probes.std_ratio(devices.gather_rows(z[0].detach())),
            "examples_per_second": steps_per_epoch * args.batch / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        if (epoch + 1) % args.monitor_every == 0 or epoch + 1 == final_epoch:
            metrics |= evaluate_epoch(model, data, args.neighbours)
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
        data = images.load_or_stream(args.data_set, args.data, args.size, device, args.workers, args.data_seed)
        if args.batch > data.examples:
            fail(
                f"--batch {args.batch} is larger than the training set ({data.examples} examples): "
                f"give at most {data.examples}"
            )
        if args.neighbours > data.examples:
            limit = f"the training set has {data.examples} examples, and kNN uses all of them"
            print(f"warning: --neighbours {args.neighbours}: {limit}", file=sys.stderr)
        steps = args.epochs * (data.examples // args.batch)
        provenance = devices.environment(device) | {"data": data.digest, "steps": steps}
        run.write_config(f"{args.data_set}, {args.network}", provenance)
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        model = build_model(args, device)
        train(args, run, model, data, build_optimizer(args, model))


if __name__ == "__main__":
    main()
