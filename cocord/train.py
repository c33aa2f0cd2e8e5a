"""CoCoRD: a student learns a frozen teacher's representation by contrast, and a slow copy of itself by prediction.

Fu, Yang & Yang, "Contrastive Consistent Representation Distillation", BMVC 2023 (first an ICLR 2023 submission).
Re-implemented from its abstract, the tables and the diagram that its authors published, and the behaviour of their
code; README.md says what of the paper could not be had.

Three random crops x, x', x" of every image. The student g with projection head f and predictor h sees x and x'; the
teacher, through a head of its own, turns x" into the key k, which is kept in a queue; a slow student g', f' follows
g, f and gives the targets of the predictions:

    z  = f(g(x))   z' = f(g(x'))   p = h(z)   p' = h(z')   u = f'(g'(x'))   u' = f'(g'(x))   k = n(f_t(g_t(x")))
    L  = contrast * CE([n(z) k, n(z) queue] / tau, first)  +  class * CE(logits(x), y)
       + forward * (2 - 2 cos(p, u))  +  swapped * (2 - 2 cos(p', u'))  +  kd * T^2 KL(teacher's || student's logits)

    x, x', x"   views           (B, 3, S, S)      n      scales rows to length 1
    z, p, u, k  embeddings      (B, dim)          tau    --temperature;  T = 4
    queue       the last keys   (K, dim)          means over the batch, weights --lambda-*, --*-weight

Before the targets are made, g' and f' move by their momentum towards g and f, and f_t towards f by its own. A step:
forward, these three moves, targets, loss, gradient, queue. The student alone is kept.

    python cocord/teacher.py --out runs/teacher                      # a teacher for the demo, about 15 s of one core
    python cocord/train.py --weights runs/teacher                    # demo: 36 kinds of glyphs, about 20 s of one core
    python cocord/train.py --swapped-weight 0 --weights runs/teacher --out runs/scratch2     # an ablation
    python cocord/train.py --scale gpu --teacher vgg13 --student MobileNetV2 --weights vgg13_vanilla/ckpt_epoch_240.pth

Differs from the authors' code:
 1. Pairs of unequal feature widths: theirs do not build. The teacher's head is then frozen, as the paper is said to
    have it (--teacher-head auto); partial and adapter let it move.
 2. The queue takes the keys after the gradient instead of before it, which changes nothing and saves its copy.
 3. What an arm does not use is not computed: no second view of the student without the swapped term.
 4. The teacher's batch norms are folded into its convolutions; a last batch of one image is left out.
 5. Reported is the last epoch; theirs keeps the epoch that is best on the test set.
 6. The distillation term: their tables have it, their code has not; ours compares logits of the same view x.
 7. The demo scale (glyphs, small networks and heads, epochs, the weights of the prediction) is ours.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord import net
from common import checkpoints, cli, devices, images, seeding
from common.cli import fail
from common.lock import run_lock
from common.run import Run

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #          demo         gpu         paper
    "data_set":        ("glyphs36", "cifar100", "cifar100"),
    "teacher":         ("vgg_s32",  "resnet56", "resnet56"),
    "student":         ("vgg_s",    "resnet20", "resnet20"),
    "epochs":          (4,          240,        240),
    "batch":           (32,         64,         64),
    "forward_weight":  (0.5,        4.0,        4.0),
    "swapped_weight":  (0.5,        4.0,        4.0),
    "hidden":          (256,        2048,       2048),
    "dim":             (128,        2048,       2048),
    "bottleneck":      (64,         512,        512),
    "queue":           (512,        2048,       2048),
}  # fmt: skip
VIEWS = {"glyphs": {"pad": 2, "flip": 0.0}, "cifar": {"pad": 4, "flip": 0.5}, "folder": {"pad": 4, "flip": 0.5}}
DECAYS = (150 / 240, 180 / 240, 210 / 240)  # of the steps; there the rate falls to a tenth
HEADS = ("frozen", "partial", "adapter", "full")
PARTS: tuple[str, ...] = ("loss", "contrastive_loss", "class_loss", "forward_loss", "swapped_loss", "distillation_loss")
PARTS += ("train_accuracy", "contrastive_accuracy", "positive_cosine", "negative_cosine")  # means over an epoch
PROBED = 256  # training images whose keys tell how consistent keys are


def optimisation_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What teachers and students have in common; returns the group."""
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=cli.int_min(1), help="paper: 240; the rate falls tenfold after 5/8, "
                              "3/4 and 7/8 of the steps")  # fmt: skip
    optimisation.add_argument("--batch", type=cli.int_min(2), help="paper: 64; the last one may be smaller")
    optimisation.add_argument("--lr", type=cli.float_in(0), help="default 0.05; 0.01 for MobileNetV2 and ShuffleNets")
    optimisation.add_argument("--weight-decay", type=cli.float_in(0), default=5e-4, help="on all that is trained")
    precisions = ("auto", "float32", "bfloat16")
    optimisation.add_argument("--precision", choices=precisions, default="auto", help="auto: bfloat16 on CUDA alone")
    return optimisation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: contradictions stop (exit 2), `lr` is a number and `teacher_head` one of HEADS."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.NAMES)
    data.add_argument("--held-out", action="store_true", help="train on nine tenths, measure on the tenth: for tuning")
    data.add_argument("--weights", type=Path, help="the teacher's: folder of a run of teacher.py, or a checkpoint; "
                      "default ../../teacher@NAME/0 beside --out")  # fmt: skip
    optimisation = optimisation_flags(parser)
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help="times --lr (robustness)")
    method = parser.add_argument_group("method (defaults: the paper's)")
    method.add_argument("--teacher", choices=(*net.NETWORKS, "none"), help="none: without contrast and distillation")
    method.add_argument("--student", choices=tuple(net.NETWORKS))
    method.add_argument("--forward-weight", type=cli.float_in(0), help="of the term p to u; paper: 4")
    method.add_argument("--swapped-weight", type=cli.float_in(0), help="of the term p' to u'; paper: 4")
    method.add_argument("--lambda-contrast", type=cli.float_in(0), default=1.0)
    method.add_argument("--lambda-class", type=cli.float_in(0), default=1.0)
    method.add_argument("--lambda-kd", type=cli.float_in(0), default=0.0, help="plain distillation, temperature 4")
    method.add_argument("--temperature", type=cli.float_in(1e-3), default=0.1, help="tau of the contrast")
    method.add_argument("--teacher-momentum", type=cli.float_in(0, 1), default=0.999, help="1: its head stays")
    method.add_argument("--student-momentum", type=cli.float_in(0, 1), default=0.9, help="of the slow student")
    method.add_argument("--teacher-head", choices=("auto", *HEADS), default="auto", help="what moves of the teacher's "
                        "head: nothing, tensors of equal shape, a head of the student's shape behind a random linear "
                        "map, everything; auto: full at equal feature widths, else frozen")  # fmt: skip
    method.add_argument("--queue", type=cli.int_min(1), help="K, keys that are negatives")
    method.add_argument("--hidden", type=cli.int_min(1), help="of the heads")
    method.add_argument("--dim", type=cli.int_min(2), help="of the embedding")
    method.add_argument("--bottleneck", type=cli.int_min(1), help="of the predictor")
    args = cli.parse(parser, SCALES, argv)

    args.lr = (0.01 if args.student in net.MOBILE else 0.05) if args.lr is None else args.lr
    args.lr *= args.lr_factor
    del args.lr_factor
    if args.teacher == "none":
        if args.lambda_contrast or args.lambda_kd:
            fail("--teacher none: contrast and distillation need one; give --lambda-contrast 0 and --lambda-kd 0")
        args.teacher_head = "frozen"
        return args
    widths = net.width(args.teacher), net.width(args.student)
    if args.teacher_head == "full" and widths[0] != widths[1]:
        fail(f"--teacher-head full: features of {args.teacher} are {widths[0]} wide, those of {args.student} "
             f"{widths[1]}; take frozen, partial or adapter")  # fmt: skip
    if args.teacher_head == "auto":
        args.teacher_head = "full" if widths[0] == widths[1] else "frozen"
    if args.queue < args.batch:
        fail(f"--queue {args.queue} is less than --batch {args.batch}: it must hold a batch")
    if args.weights is None:
        args.weights = args.out.parent.parent / f"teacher@{args.teacher}" / "0"
    return args


# ------------------------------------------------------------------------------------------------- model


def build_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A two-layer perceptron with batch norm and without normalisation at its end."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


class CoCoRD(nn.Module):
    """All but the teacher: what is trained (student, head, predictor), what follows it, and the queue of keys.

    Every part has a seed of its own; what follows starts as a copy of what it follows, built from the same seed.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self, student: str, classes: int, teacher_width: int, hidden: int, dim: int, bottleneck: int, queue: int,
        teacher_head: str, seed: int,
    ):  # fmt: skip
        super().__init__()
        width = net.width(student)
        with seeding.forked(seed, "student"):
            self.student = net.build(student, classes)
        with seeding.forked(seed, "head"):
            self.head = build_head(width, hidden, dim)
        with seeding.forked(seed, "predictor"):
            self.predictor = build_head(dim, bottleneck, dim)
        with seeding.forked(seed, "student"):
            self.slow_student = net.build(student, classes)
        with seeding.forked(seed, "head"):
            self.slow_head = build_head(width, hidden, dim)
        # ABLATION (teacher momentum): a head of the student's shape starts as its copy, any other at random.
        adapted = teacher_head == "adapter"
        with seeding.forked(seed, "head" if adapted or teacher_width == width else "teacher head"):
            self.teacher_head = build_head(width if adapted else teacher_width, hidden, dim)
        with seeding.forked(seed, "adapter"):
            self.adapter = nn.Linear(teacher_width, width, bias=False) if adapted else nn.Identity()
        for part in (self.slow_student, self.slow_head, self.teacher_head, self.adapter):
            part.requires_grad_(False)
        with seeding.forked(seed, "queue"):
            self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.moves = teacher_head != "frozen"

    def ema_pairs(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """([of the slow student and its head, what they follow], [of the teacher's head, what it follows])."""
        slow: list[Tensor] = [*self.slow_student.parameters(), *self.slow_head.parameters()]
        fast: list[Tensor] = [*self.student.parameters(), *self.head.parameters()]
        both = zip(self.teacher_head.parameters(), self.head.parameters(), strict=True)
        equal = [(a, b) for a, b in both if self.moves and a.shape == b.shape]
        return [slow, fast], [[a for a, _ in equal], [b for _, b in equal]]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """The keys (B, dim) take the place of the oldest ones, round the end of the queue."""
        places = (torch.arange(len(keys), device=keys.device) + self.pointer) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


@torch.no_grad()
def ema_update(slow: list[Tensor], fast: list[Tensor], momentum: float) -> None:
    """slow <- momentum * slow + (1 - momentum) * fast, in place; exact at 0 and 1."""
    if slow and momentum < 1:
        torch._foreach_lerp_(slow, fast, 1 - momentum)


def build_model(args: argparse.Namespace, classes: int, device: torch.device) -> CoCoRD:
    """The networks that a run's arguments describe, on `device`."""
    teacher = args.student if args.teacher == "none" else args.teacher
    model = CoCoRD(
        args.student, classes, net.width(teacher), args.hidden, args.dim, args.bottleneck, args.queue,
        args.teacher_head, args.seed,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last).to(device)


# ------------------------------------------------------------------------------------------------- loss


def contrastive_loss(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of queries z (B, dim) with their own keys (B, dim, unit length) among the queue's (K, dim).

    And (3,) for the log: share of queries nearest to their own key, mean cosine to it, mean cosine to the queue.
    """
    q = F.normalize(z.float(), dim=1)
    positive, negative = (q * keys).sum(1, keepdim=True), q @ queue.T
    logits = torch.cat([positive, negative], 1)
    first = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    with torch.no_grad():
        seen = torch.stack([(logits.argmax(1) == 0).float().mean(), positive.mean(), negative.mean()])
    return F.cross_entropy(logits / temperature, first), seen


def prediction_loss(p: Tensor, u: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over the rows of p and u, (B, dim) each: the unit vectors' squared distance, 0 to 4."""
    return 2 - 2 * F.cosine_similarity(p.float(), u.float(), dim=1).mean()


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of logits (B, classes) at temperature T, summed over classes, mean over the batch."""
    student, target = (F.log_softmax(x.float() / temperature, 1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def cocord_loss(
    outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], queue: Tensor, *, forward_weight: float,
    swapped_weight: float, lambda_contrast: float, lambda_class: float, lambda_kd: float, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of a batch, and the PARTS for the log, (10,).

    `outputs` are the student's: logits (B, classes), z, p, p'. `targets` are labels (B,), k, u, u' and the teacher's
    logits. A term of weight 0 is 0 in the log: its tensors are not looked at.
    """
    logits, z, p, swapped_p = outputs
    labels, keys, u, swapped_u, teacher_logits = targets
    zero = torch.zeros((), device=labels.device)
    forward_loss = prediction_loss(p, u) if forward_weight else zero
    swapped_loss = prediction_loss(swapped_p, swapped_u) if swapped_weight else zero
    contrast, seen = zero, zero.expand(3)
    if lambda_contrast:
        contrast, seen = contrastive_loss(z, keys, queue, temperature)
    distillation = distillation_loss(logits, teacher_logits) if lambda_kd else zero
    classes = F.cross_entropy(logits.float(), labels)
    loss = lambda_class * classes + lambda_contrast * contrast + lambda_kd * distillation
    # ABLATION (prediction loss): the two directions are summed, not averaged.
    loss = loss + forward_weight * forward_loss + swapped_weight * swapped_loss
    right = (logits.argmax(1) == labels).float().mean()
    parts = torch.stack([loss, contrast, classes, forward_loss, swapped_loss, distillation, right, *seen]).detach()
    return loss, parts


@torch.no_grad()
def make_keys(model: CoCoRD, teacher: nn.Module, x: Tensor) -> Tensor:
    """Teacher keys of views (B, 3, S, S), unit length, (B, dim) float32. The head's batch norm is in train mode."""
    return F.normalize(model.teacher_head(model.adapter(teacher(x)[0])).float(), dim=1)


# ------------------------------------------------------------------------------------------------- data


def load_data(name: str, folder: Path, held_out: bool, device: torch.device) -> images.Images:
    """Resident on the device. `held_out`: the training set's tenth stands in the place of the test set."""
    data = images.load(name, folder, 32, device)
    if not held_out:
        return data
    rest, tenth = seeding.held_out_split(data.examples, device)
    train, labels = data.train, data.train_labels
    return data._replace(train=train[rest], train_labels=labels[rest], test=train[tenth], test_labels=labels[tenth])


def crops(pixels: Tensor, rows: Tensor, offsets: Tensor, flip: Tensor, size: int) -> Tensor:
    """Windows of padded pictures: (M, 3, size, size) uint8 in channels-last order, from pixels (N, H, W, 3) uint8.

    rows (M,): which picture; offsets (M, 2): the window's top and left; flip (M,) bool: mirror it.
    """
    places = torch.arange(size, device=pixels.device)
    across = torch.where(flip[:, None], size - 1 - places, places) + offsets[:, 1:]
    down = offsets[:, :1] + places + rows[:, None] * pixels.shape[1]
    numbers = down[:, :, None] * pixels.shape[2] + across[:, None, :]
    taken = pixels.flatten(0, 2).index_select(0, numbers.flatten())
    return taken.view(len(rows), size, size, 3).permute(0, 3, 1, 2)


def batches(
    args: argparse.Namespace, data: images.Images, epoch: int, views: int = 3
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """One epoch: `views` normalised crops (B, 3, S, S) of every image, padded with black (C:loader's recipe), and the
    labels (B,).

    Order and crops follow from (seed, epoch) alone. The last batch may be smaller; if it is of one image, which batch
    norm cannot take, it is left out.
    """
    aug = next(aug for name, aug in VIEWS.items() if args.data_set.startswith(name))
    pad, size = int(aug["pad"]), data.train.shape[-1]
    pixels = F.pad(data.train, (pad, pad, pad, pad)).permute(0, 2, 3, 1).contiguous()
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    row_batches = [rows for rows in order.split(args.batch) if len(rows) > 1]
    for step, rows in enumerate(row_batches, epoch * len(row_batches)):
        rng = seeding.SampleRNG(args.seed, "views", step, 3 * args.batch, slice(0, 3 * len(rows)))
        drawn = devices.upload(rng.uniform(shape=(3,))[: views * len(rows)], data.device)
        offsets = (drawn[:, :2] * (2 * pad + 1)).long()
        windows = crops(pixels, rows.repeat(views), offsets, drawn[:, 2] < aug["flip"], size)
        yield list(data.normalise(windows).split(len(rows))), data.train_labels[rows]


@torch.no_grad()
def accuracy(network: nn.Module, data: images.Images) -> float:
    """Top-1 on the test pictures in percent, in eval mode and float32; the network goes back to the mode it was in."""
    mode, correct = network.training, torch.zeros((), device=data.device)
    network.eval()
    for x, labels in data.batches("test"):
        logits = network(x.contiguous(memory_format=torch.channels_last))[1]
        correct += (logits.argmax(1) == labels).sum()
    network.train(mode)
    return 100 * correct.item() / len(data.test)


class Teacher(NamedTuple):
    """The frozen network, the sha256 of its weights, and its accuracy in percent before it teaches."""

    network: nn.Module = nn.Identity()  # without a teacher nothing calls it
    digest: str | None = None
    accuracy: float | None = None


def load_teacher(name: str, path: Path, data: images.Images, precision: str, rehearsing: bool) -> Teacher:
    """Load the frozen teacher and measure it.

    Stops (exit 2) where its accuracy is under half of what its file says, or RepDistiller's table on CIFAR-100.
    """
    network, told = net.load(name, data.classes, path)
    told = net.EXPECTED.get(name) if told is None and data.classes == 100 else told
    digest = checkpoints.sha256(*network.state_dict().values())
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last).to(data.device)
    measured = accuracy(network, data)
    beside = "" if told is None else f"; expected {told:.2f} %"
    print(f"teacher {name} from {path}: {measured:.2f} % of the test pictures{beside}", flush=True)
    if told is not None and measured < told / 2 and not rehearsing:
        fail(f"--weights {path}: {name} reaches {measured:.2f} % where {told:.2f} % were expected: are these its "
             "weights, and is this its data set?")  # fmt: skip
    network = net.fold(network)
    if devices.uses_bfloat16(precision, data.device):
        net.round_weights(network)
    return Teacher(network, digest, measured)


# ------------------------------------------------------------------------------------------------- train


def rate_factor(progress: float) -> float:
    """The factor of the learning rate at a progress from 0 to 1: a tenth from each of DECAYS on."""
    return 0.1 ** sum(progress >= decay for decay in DECAYS)


def build_optimizer(args: argparse.Namespace, parts: list[nn.Module]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 on all parameters of the parts, decay included."""
    trained = [weight for part in parts for weight in part.parameters()]
    return torch.optim.SGD(trained, args.lr, momentum=0.9, weight_decay=args.weight_decay, foreach=True)


def train(
    args: argparse.Namespace, run: Run, model: CoCoRD, data: images.Images, optimizer: torch.optim.Optimizer,
    teacher: Teacher,
) -> None:  # fmt: skip
    """Train, or go on after the last saved epoch; save after each epoch."""
    start = [weight.clone() for weight in model.teacher_head.parameters()]
    fixed = data.normalise(data.train[:PROBED]).contiguous(memory_format=torch.channels_last)
    (slow, fast), (slow_head, fast_head) = model.ema_pairs()
    last = min(2, args.epochs) if args.rehearse else args.epochs
    steps_per_epoch = -(-data.examples // args.batch)
    totals = torch.zeros(len(PARTS), device=data.device)
    unused = torch.empty(0, device=data.device)  # in the place of what an arm does not compute

    def probe_keys() -> Tensor:
        """Keys of `fixed` as the student is taught them, under the training's precision."""
        if args.teacher == "none":
            return torch.zeros(1, 1, device=data.device)
        with devices.autocast(args.precision, data.device):
            return make_keys(model, teacher.network, fixed)

    first = run.resume(model, optimizer)
    if first is None:
        probe = probe_keys()
        record = {"test_accuracy": accuracy(model.student, data), "teacher_accuracy": teacher.accuracy}
        run.end_epoch(0, last, record, probe=probe)
    else:
        probe = run.extra["probe"]

    for epoch in tqdm(range(first or 0, last), run.name, last, initial=first or 0, disable=None, leave=False):
        started, seen = time.perf_counter(), 0
        totals.zero_()
        for step, ((x, swapped_x, teacher_x), labels) in enumerate(batches(args, data, epoch)):
            optimizer.param_groups[0]["lr"] = args.lr * rate_factor((epoch + step / steps_per_epoch) / args.epochs)

            # The student. A term of weight 0 is not computed.
            with devices.autocast(args.precision, data.device):
                feature, logits = model.student(x)
                z = model.head(feature) if args.forward_weight or args.lambda_contrast else unused
                p = model.predictor(z) if args.forward_weight else unused
                swapped_p = model.predictor(model.head(model.student(swapped_x)[0])) if args.swapped_weight else unused

            # EMA of the weights that this forward used, before it makes the targets.
            if args.forward_weight or args.swapped_weight:
                ema_update(slow, fast, args.student_momentum)
            # ABLATION (teacher momentum): how fast the teacher's head follows the student's
            ema_update(slow_head, fast_head, args.teacher_momentum)

            # The targets: the slow student sees the other view.
            with torch.no_grad(), devices.autocast(args.precision, data.device):
                u = model.slow_head(model.slow_student(swapped_x)[0]) if args.forward_weight else unused
                swapped_u = model.slow_head(model.slow_student(x)[0]) if args.swapped_weight else unused
                keys = make_keys(model, teacher.network, teacher_x) if args.lambda_contrast else unused
                teacher_logits = teacher.network(x)[1] if args.lambda_kd else unused

            loss, parts = cocord_loss(
                (logits, z, p, swapped_p), (labels, keys, u, swapped_u, teacher_logits), model.queue,
                forward_weight=args.forward_weight, swapped_weight=args.swapped_weight,
                lambda_contrast=args.lambda_contrast, lambda_class=args.lambda_class, lambda_kd=args.lambda_kd,
                temperature=args.temperature,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if args.lambda_contrast:
                model.enqueue(keys)
            totals.add_(parts, alpha=len(labels))
            seen += len(labels)
        means = (totals / seen).tolist()  # the epoch's only host-device synchronisation
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, totals):
            return
        before, probe = probe, probe_keys()
        moved = torch._foreach_sub(list(model.teacher_head.parameters()), start)
        record = dict(zip(PARTS, means, strict=True)) | {
            "test_accuracy": accuracy(model.student, data),
            "key_consistency": (before * probe).sum(1).mean().item(),
            "teacher_head_shift": (norm(moved) / norm(start)).item(),
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": seen / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, last, record, probe=probe)
    run.save_model({"model": kept(model.state_dict()), "epoch": last, "diverged": False})


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean length of all numbers together."""
    return torch.stack(torch._foreach_norm(list(tensors))).norm()


def kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is evaluated: the student and the slow student."""
    return {name: one for name, one in state.items() if name.startswith(("student.", "slow_student."))}


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    smaller = f"--batch {args.batch // 2} needs about half, but is another run"
    with run_lock(args.out), devices.memory_for(device, f"--batch {args.batch}", smaller):
        run = Run(args.out, vars(args), __file__, args.replace)
        if run.finished:
            return
        data = load_data(args.data_set, args.data, args.held_out, device)
        facts = {"data": data.digest, "steps": args.epochs * -(-data.examples // args.batch)}
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        teacher = Teacher()
        if args.teacher != "none":
            teacher = load_teacher(args.teacher, args.weights, data, args.precision, bool(args.rehearse))
        networks = f"{args.teacher} -> {args.student}"
        run.write_config(
            f"{args.data_set}, {networks}", devices.environment(device) | facts | {"teacher_weights": teacher.digest}
        )
        model = build_model(args, data.classes, device)
        optimizer = build_optimizer(args, [model.student, model.head, model.predictor])
        train(args, run, model, data, optimizer, teacher)


if __name__ == "__main__":
    main()
