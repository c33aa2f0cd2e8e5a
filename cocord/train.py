"""CoCoRD: a student learns from a frozen teacher by a contrastive loss and from its own EMA by a prediction loss.

Fu, Yang & Yang, "Contrastive Consistent Representation Distillation", BMVC 2023 (first an ICLR 2023 submission).
Re-implemented from the abstract, the tables and the diagram that the authors published, and the behaviour of their
code. The rest of the paper was not available; README.md lists what is not known.

Each image gives three random crops x, x', x". The student g with projection head f and predictor h sees x and x'. The
teacher g_t with its own head f_t maps x" to the key k; a queue holds the keys of earlier batches. The slow student
g', f' is an EMA of g, f and gives the targets u, u' of the predictions p, p':

    z  = f(g(x))   z' = f(g(x'))   p = h(z)   p' = h(z')   u = f'(g'(x'))   u' = f'(g'(x))   k = n(f_t(g_t(x")))
    L  = contrast * CE([n(z) k, n(z) queue] / tau, 0)  +  class * CE(logits(x), y)
       + forward * (2 - 2 cos(p, u))  +  swapped * (2 - 2 cos(p', u'))  +  kd * T^2 KL(teacher's || student's logits)

    x, x', x"   views           (B, 3, S, S)      n      L2 normalisation of each row
    z, p, u, k  embeddings      (B, dim)          tau    --temperature;  T = 4
    queue       last K keys     (K, dim)          means over the batch, weights --lambda-*, --*-weight

One step: student forward; EMA updates of g', f' (--student-momentum) and of f_t towards f (--teacher-momentum);
targets; loss; optimiser step; the keys enter the queue. After training only the student is used.

    python cocord/teacher.py --out runs/teacher                      # a teacher for the demo, 30 s on a CPU core
    python cocord/train.py --weights runs/teacher                    # demo: 36 classes of glyphs, a minute
    python cocord/train.py --swapped-weight 0 --weights runs/teacher --out runs/scratch2     # an ablation
    python cocord/train.py --scale gpu --teacher vgg13 --student MobileNetV2 --weights vgg13_vanilla/ckpt_epoch_240.pth

Differs from the authors' code:
 1. Their code fails for pairs of unequal feature widths. Here the teacher's head is then frozen, as a secondary summary
    of the paper describes it (--teacher-head auto). With partial and adapter it is updated.
 2. Keys enter the queue after the backward pass instead of before it. The loss is the same, and no copy of the queue
    is needed. On CUDA the networks run under bfloat16 autocast.
 3. Terms of weight 0 are not computed, except for the cross-entropy. Without the swapped term, for example, the student
    sees only x.
 4. The teacher's batch norms are folded into its convolutions. A last batch of a single image is dropped.
 5. We report the last epoch; their code keeps the epoch with the best test accuracy.
 6. The distillation term is in their tables, but not in their code. Ours compares the logits of the same view x.
 7. The demo scale is ours: glyphs, small networks, heads and queue, epochs, batch size, and the weights of the
    prediction terms. The default demo networks have unequal feature widths, so in the arm `base` the teacher's head is
    frozen.
 8. MobileNetV2 and the ShuffleNets train at learning rate 0.01, as in RepDistiller; the authors' file has 0.05 for all.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord import net
from common import checkpoints, cli, devices, images, probes, seeding
from common.cli import fail
from common.lock import run_lock
from common.run import Run, load_finished

# ------------------------------------------------------------------------------------------------- arguments

SCALES = {  #          demo              gpu         paper
    "data_set":        ("glyphs36-hard", "cifar100", "cifar100"),
    "teacher":         ("vgg_s64",       "resnet56", "resnet56"),
    "student":         ("vgg_s",         "resnet20", "resnet20"),
    "epochs":          (12,              240,        240),
    "batch":           (32,              64,         64),
    "forward_weight":  (1.0,             4.0,        4.0),
    "swapped_weight":  (1.0,             4.0,        4.0),
    "hidden":          (256,             2048,       2048),
    "dim":             (128,             2048,       2048),
    "bottleneck":      (64,              512,        512),
    "queue":           (512,             2048,       2048),
}  # fmt: skip
# By prefix of --data-set: random crop of the padded image and horizontal flip. Flipping would change the class of a
# glyph or digit.
AUGMENTATION = {
    "glyphs": {"pad": 2, "flip": 0.0},
    "mnist5k": {"pad": 2, "flip": 0.0},
    "cifar": {"pad": 4, "flip": 0.5},
    "folder": {"pad": 4, "flip": 0.5},
}
LR_MILESTONES = (150 / 240, 180 / 240, 210 / 240)  # fractions of all steps; the learning rate is divided by 10 at each
TEACHER_HEADS = ("frozen", "partial", "adapter", "full")
TEACHER_MOMENTUM = 0.999
# In the order of `cocord_loss`; train.jsonl contains their means over an epoch, except those of terms of weight 0. Both
# accuracies are fractions.
TRAIN_METRICS = (
    "loss",
    "contrastive_loss",
    "class_loss",
    "forward_loss",
    "swapped_loss",
    "distillation_loss",
    "train_accuracy",
    "contrastive_accuracy",
    "positive_cosine",
    "negative_cosine",
)
HELD_OUT_HELP = "train on 9/10 of the training set and test on the other 1/10, for tuning"
UNLABELLED = -1  # label of the training images that --labels leaves out
N_PROBE = 256  # training images whose keys are compared between consecutive epochs


def optimisation_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the optimisation flags of train.py and teacher.py; return their argument group."""
    group = parser.add_argument_group("optimisation")
    decay = "the learning rate is divided by 10 after 5/8, 3/4 and 7/8 of the steps"
    group.add_argument("--epochs", type=cli.int_in(1), help=f"paper: 240; {decay}")
    group.add_argument("--batch", type=cli.int_in(2), help="batch size; paper: 64; the last batch may be smaller")
    group.add_argument("--lr", type=cli.float_in(0), help="default 0.05; 0.01 for MobileNetV2 and ShuffleNets")
    group.add_argument("--weight-decay", type=cli.float_in(0), default=5e-4, help="of all trained parameters")
    return group


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags and resolve them: `lr` becomes a number and `teacher_head` one of TEACHER_HEADS.

    Exits with code 2 if flags contradict each other.
    """
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.DATA_SETS, help="folder: --data contains train/CLASS/*, val/CLASS/*")
    data.add_argument("--held-out", action="store_true", help=HELD_OUT_HELP)
    labels = "class labels for the cross-entropy: N training images, class-balanced; the other losses use all images"
    data.add_argument("--labels", type=cli.int_in(1), metavar="N", help=f"{labels}; default: all")
    weights = "teacher: folder of a run of teacher.py, or a checkpoint file; default OUT/../../teacher@NAME/DATA_SEED"
    data.add_argument("--weights", type=Path, help=weights)
    optimisation = optimisation_flags(parser)
    lr_factor = "multiplies --lr; used by the robustness study"
    optimisation.add_argument("--lr-factor", type=cli.float_in(0), default=1.0, help=lr_factor)
    method = parser.add_argument_group("method (defaults at --scale paper: the paper's)")
    method.add_argument("--teacher", choices=(*net.NETWORKS, "none"), help="none: no contrastive or distillation loss")
    method.add_argument("--student", choices=tuple(net.NETWORKS), help="student network")
    forward = "weight of the prediction loss p -> u (student predicts slow student); paper: 4"
    method.add_argument("--forward-weight", type=cli.float_in(0), help=forward)
    swapped = "weight of the swapped prediction loss p' -> u', with the views exchanged; paper: 4"
    method.add_argument("--swapped-weight", type=cli.float_in(0), help=swapped)
    method.add_argument("--lambda-contrast", type=cli.float_in(0), default=1.0, help="weight of the contrastive loss")
    method.add_argument("--lambda-class", type=cli.float_in(0), default=1.0, help="weight of the cross-entropy loss")
    method.add_argument("--lambda-kd", type=cli.float_in(0), default=0.0, help="weight of plain distillation (T = 4)")
    method.add_argument("--temperature", type=cli.float_in(1e-3), default=0.1, help="tau of the contrastive loss")
    momentum = "EMA momentum of the teacher's head (default: 0.999); 1: frozen"
    method.add_argument("--teacher-momentum", type=cli.float_in(0, 1), help=momentum)
    momentum = "EMA momentum of the slow student"
    method.add_argument("--student-momentum", type=cli.float_in(0, 1), default=0.9, help=momentum)
    method.add_argument("--teacher-head", choices=("auto", *TEACHER_HEADS), default="auto", help=(
        "tensors of the teacher's head that are an EMA of the student's head. frozen: none; partial: those of equal "
        "shape; adapter: all, in a head of the student's shape after a fixed random linear map; full: all; "
        "auto: full if the feature widths are equal, else frozen"))  # fmt: skip
    method.add_argument("--queue", type=cli.int_in(1, cli.MAX_WIDTH), help="K, number of keys in the queue (negatives)")
    method.add_argument("--hidden", type=cli.int_in(1, cli.MAX_WIDTH), help="hidden width of the heads")
    method.add_argument("--dim", type=cli.int_in(2, cli.MAX_WIDTH), help="width of the embeddings")
    method.add_argument("--bottleneck", type=cli.int_in(1, cli.MAX_WIDTH), help="hidden width of the predictor")
    args = cli.parse(parser, SCALES, argv)

    if args.lr is None:
        args.lr = net.default_lr(args.student)
    cli.apply_lr_factor(args)
    if args.labels and not args.lambda_class:
        fail(f"--labels {args.labels} has no effect with --lambda-class 0: drop one of the two flags")
    if args.teacher == "none":
        if args.lambda_contrast or args.lambda_kd:
            fail("--teacher none excludes contrastive and distillation loss: give --lambda-contrast 0 --lambda-kd 0")
        if args.weights:
            fail(f"--weights {args.weights} are not used with --teacher none: drop one of the two flags")
        if args.teacher_head != "auto" or args.teacher_momentum is not None:
            fail("--teacher none has no head: drop --teacher-head and --teacher-momentum")
        args.teacher_head, args.teacher_momentum = "frozen", TEACHER_MOMENTUM
        return args
    teacher_width, student_width = net.feature_width(args.teacher), net.feature_width(args.student)
    if args.teacher_head == "full" and teacher_width != student_width:
        fail(
            f"--teacher-head full needs equal feature widths, but {args.teacher} has {teacher_width} and "
            f"{args.student} has {student_width}: give frozen, partial or adapter"
        )
    if args.teacher_head == "auto":
        args.teacher_head = "full" if teacher_width == student_width else "frozen"
    if args.teacher_momentum is None:
        args.teacher_momentum = TEACHER_MOMENTUM
    elif args.teacher_head == "frozen":
        fail(f"--teacher-momentum {args.teacher_momentum} has no effect, because the teacher's head is frozen: give "
             "--teacher-head partial or adapter, or drop it")  # fmt: skip
    if args.queue < args.batch:
        fail(f"--queue {args.queue} is less than --batch {args.batch}: give --queue {args.batch} or more")
    if args.weights is None:
        args.weights = args.out.parent.parent / f"teacher@{args.teacher}" / str(args.data_seed)
    return args


# ------------------------------------------------------------------------------------------------- model


def build_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a two-layer MLP with batch norm after its first layer."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


class CoCoRD(nn.Module):
    """Trained modules (student, head, predictor), their EMAs, the teacher's head and the queue; not the teacher.

    Each module has its own seed. An EMA starts as a copy of its online module.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        student: str,
        classes: int,
        teacher_width: int,
        hidden: int,
        dim: int,
        bottleneck: int,
        queue_size: int,
        teacher_head: str,
        seed: int,
    ):
        super().__init__()
        width = net.feature_width(student)
        with seeding.seeded_fork_rng(seed, "student"):
            self.student = net.build(student, classes)
        with seeding.seeded_fork_rng(seed, "head"):
            self.head = build_head(width, hidden, dim)
        with seeding.seeded_fork_rng(seed, "predictor"):
            self.predictor = build_head(dim, bottleneck, dim)
        self.slow_student = copy.deepcopy(self.student)
        self.slow_head = copy.deepcopy(self.head)
        # ABLATION (teacher momentum): a head of the student's shape starts as a copy of the student's head, also if it
        # is frozen. At unequal feature widths without the adapter it is an independent random head.
        use_adapter = teacher_head == "adapter"
        if use_adapter or teacher_width == width:
            self.teacher_head = copy.deepcopy(self.head)
        else:
            with seeding.seeded_fork_rng(seed, "teacher head"):
                self.teacher_head = build_head(teacher_width, hidden, dim)
        with seeding.seeded_fork_rng(seed, "adapter"):
            self.adapter = nn.Linear(teacher_width, width, bias=False) if use_adapter else nn.Identity()
        for module in (self.slow_student, self.slow_head, self.teacher_head, self.adapter):
            module.requires_grad_(False)
        with seeding.seeded_fork_rng(seed, "queue"):
            self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.update_teacher_head = teacher_head != "frozen"

    def ema_pairs(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return the (EMA, online) parameters of the slow student with its head, and of the teacher's head.

        Tensors of the teacher's head whose shape differs from the student's are left out; all if it is frozen.
        """
        slow_weights: list[Tensor] = [*self.slow_student.parameters(), *self.slow_head.parameters()]
        online_weights: list[Tensor] = [*self.student.parameters(), *self.head.parameters()]
        teacher_head_weights: list[Tensor] = []
        head_weights: list[Tensor] = []
        for ema, online in zip(self.teacher_head.parameters(), self.head.parameters(), strict=True):
            if self.update_teacher_head and ema.shape == online.shape:
                teacher_head_weights.append(ema)
                head_weights.append(online)
        return [slow_weights, online_weights], [teacher_head_weights, head_weights]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue (a ring buffer) by `keys` (B, dim)."""
        rows = (torch.arange(len(keys), device=keys.device) + self.pointer) % len(self.queue)
        self.queue.index_copy_(0, rows, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


@torch.no_grad()
def ema_update(ema: list[Tensor], online: list[Tensor], momentum: float) -> None:
    """Exponential moving average in place: ema <- momentum * ema + (1 - momentum) * online; exact at 0 and 1."""
    if ema and momentum < 1:
        torch._foreach_lerp_(ema, online, 1 - momentum)


def build_model(args: argparse.Namespace, classes: int, device: torch.device) -> CoCoRD:
    """Return the initialised model for the arguments of a run, on `device`."""
    teacher = args.student if args.teacher == "none" else args.teacher
    model = CoCoRD(
        student=args.student,
        classes=classes,
        teacher_width=net.feature_width(teacher),
        hidden=args.hidden,
        dim=args.dim,
        bottleneck=args.bottleneck,
        queue_size=args.queue,
        teacher_head=args.teacher_head,
        seed=args.seed,
    )
    return model.to(memory_format=torch.channels_last).to(device)


# ------------------------------------------------------------------------------------------------- loss


def contrastive_loss(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE loss of queries z (B, dim) with positive keys (B, dim) and the queue (K, dim) as negatives.

    Keys and queue have unit length. Returns (loss, metrics (3,)). The metrics are the fraction of queries whose
    positive key has the largest cosine (top-1), the mean cosine to the positive key, and the mean cosine to the queue.
    """
    q = F.normalize(z.float(), dim=1)
    positive = (q * keys).sum(1, keepdim=True)
    negative = q @ queue.T
    logits = torch.cat([positive, negative], 1)
    labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)  # the positive key is class 0
    with torch.no_grad():
        metrics = torch.stack([(logits.argmax(1) == 0).float().mean(), positive.mean(), negative.mean()])
    return F.cross_entropy(logits / temperature, labels), metrics


def prediction_loss(p: Tensor, u: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over the rows of p and u, (B, dim) each: squared distance of the unit vectors, in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(p.float(), u.float(), dim=1).mean()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T: sum over classes, mean over the batch; logits (B, classes)."""
    student = F.log_softmax(student_logits.float() / temperature, 1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def cocord_loss(
    *, logits: Tensor, labels: Tensor, z: Tensor, keys: Tensor, queue: Tensor, p: Tensor, u: Tensor, swapped_p: Tensor,
    swapped_u: Tensor, teacher_logits: Tensor, forward_weight: float, swapped_weight: float, lambda_contrast: float,
    lambda_class: float, lambda_kd: float, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss of a batch, and its TRAIN_METRICS followed by the share of labelled rows, (11,).

    Logits are (B, classes), labels (B,), the queue (K, dim), the other tensors (B, dim). The cross-entropy is the mean
    over the rows with a label other than UNLABELLED; it is computed at weight 0, too. The tensors of another term of
    weight 0 are not used, and its metrics are 0.
    """
    zero = torch.zeros((), device=labels.device)
    forward_loss = prediction_loss(p, u) if forward_weight else zero
    swapped_loss = prediction_loss(swapped_p, swapped_u) if swapped_weight else zero
    contrast, contrast_metrics = zero, zero.expand(3)
    if lambda_contrast:
        contrast, contrast_metrics = contrastive_loss(z, keys, queue, temperature)
    distillation = distillation_loss(logits, teacher_logits) if lambda_kd else zero
    is_labelled = labels != UNLABELLED
    class_losses = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    class_loss = class_losses / is_labelled.sum().clamp(min=1)
    loss = lambda_class * class_loss + lambda_contrast * contrast + lambda_kd * distillation
    # ABLATION (prediction loss): the two directions are summed, not averaged.
    loss = loss + forward_weight * forward_loss + swapped_weight * swapped_loss
    # Means over all rows, so that `train` can average the batches; a row without label counts as 0.
    labelled_metrics = torch.stack([class_losses, (logits.argmax(1) == labels).sum(), is_labelled.sum()]) / len(labels)
    class_mean, train_accuracy, labelled_share = labelled_metrics
    losses = [loss, contrast, class_mean, forward_loss, swapped_loss, distillation]
    return loss, torch.stack([*losses, train_accuracy, *contrast_metrics, labelled_share]).detach()


@torch.no_grad()
def make_keys(model: CoCoRD, teacher: nn.Module, x: Tensor) -> Tensor:
    """Return the teacher's keys of views x (B, 3, S, S): (B, dim) float32 of unit length.

    The batch norm of the teacher's head uses batch statistics (train mode).
    """
    return F.normalize(model.teacher_head(model.adapter(teacher(x)[0])).float(), dim=1)


# ------------------------------------------------------------------------------------------------- data


def load_data(name: str, folder: Path, held_out: bool, device: torch.device, data_seed: int) -> images.Images:
    """Return images of 32 pixels on `device`. With `held_out` a random tenth of the training set is the test set."""
    data = images.load(name, folder, 32, device, data_seed=data_seed)
    return data.with_held_out_test() if held_out else data


def keep_labels(data: images.Images, count: int | None) -> images.Images:
    """Return the data with the labels of `count` training images (see balanced_subset); the others are UNLABELLED."""
    kept = images.balanced_subset(data.train_labels.cpu(), count, data.classes, data.data_seed).to(data.device)
    labels = torch.full_like(data.train_labels, UNLABELLED)
    return data._replace(train_labels=labels.index_copy(0, kept, data.train_labels[kept]))


def crop_and_flip(padded: Tensor, rows: Tensor, offsets: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop M windows from padded images (N, H, W, 3) uint8: (M, 3, size, size) uint8 in channels-last memory format.

    rows (M,): index of the image; offsets (M, 2): top and left pixel; flip (M,) bool: flip the window horizontally.
    """
    positions = torch.arange(size, device=padded.device)
    x = torch.where(flip[:, None], size - 1 - positions, positions) + offsets[:, 1:]
    y = offsets[:, :1] + positions + rows[:, None] * padded.shape[1]  # row in the vertical stack of all images
    indices = y[:, :, None] * padded.shape[2] + x[:, None, :]
    windows = padded.flatten(0, 2).index_select(0, indices.flatten())
    return windows.view(len(rows), size, size, 3).permute(0, 3, 1, 2)


def batches(
    args: argparse.Namespace, data: images.Images, epoch: int, n_views: int = 3
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the batches of one epoch: a list of `n_views` normalised views, (B, 3, S, S) each, and the labels (B,).

    A view is a random crop of the image padded with black, flipped at random (cocord/loader.py of the authors' code).
    Order and views depend only on (seed, epoch). The last batch may be smaller; a last batch of a single image is
    dropped, because batch norm needs at least two.
    """
    aug = next(aug for prefix, aug in AUGMENTATION.items() if args.data_set.startswith(prefix))
    pad, size = int(aug["pad"]), data.train.shape[-1]
    padded = F.pad(data.train, (pad, pad, pad, pad)).permute(0, 2, 3, 1).contiguous()
    order = seeding.permutation(args.seed, "order", epoch, data.examples, data.device)
    row_batches = [rows for rows in order.split(args.batch) if len(rows) > 1]
    for step, rows in enumerate(row_batches, epoch * len(row_batches)):
        # Always draw numbers for three views, so that the first view does not depend on `n_views`.
        rng = seeding.SampleRNG(args.seed, "views", step, 3 * args.batch, slice(0, n_views * len(rows)))
        random = devices.upload(rng.uniform(shape=(3,)), data.device)
        offsets = (random[:, :2] * (2 * pad + 1)).long()
        windows = crop_and_flip(padded, rows.repeat(n_views), offsets, random[:, 2] < aug["flip"], size)
        yield list(data.normalise(windows).split(len(rows))), data.train_labels[rows]


@torch.no_grad()
def accuracy(network: nn.Module, data: images.Images) -> float:
    """Return the top-1 accuracy on the test images in percent, in float32 and eval mode; restores the mode."""
    was_training = network.training
    network.eval()
    correct = torch.zeros((), device=data.device)
    for x, labels in data.batches("test"):
        logits = network(x.contiguous(memory_format=torch.channels_last))[1]
        correct += (logits.argmax(1) == labels).sum()
    network.train(was_training)
    return 100 * correct.item() / len(data.test)


class Teacher(NamedTuple):
    """The frozen network, the sha256 of its weights, and its test accuracy in percent."""

    network: nn.Module = nn.Identity()  # never called if there is no teacher
    digest: str | None = None
    accuracy: float | None = None


def load_teacher(args: argparse.Namespace, data: images.Images) -> Teacher:
    """Load the frozen teacher and measure its test accuracy.

    Exits with code 2 if teacher.py trained it on other data than `data`, or if the accuracy is below half of the
    expected one, unless --rehearse is given. The expected accuracy is the one in the checkpoint, or RepDistiller's for
    CIFAR-100.
    """
    name, path = args.teacher, args.weights
    network, expected = net.load(name, data.classes, path, data.digest, args.held_out)
    if expected is None and args.data_set == "cifar100":
        expected = net.EXPECTED_ACCURACY.get(name)
    digest = checkpoints.sha256(*network.state_dict().values())
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last).to(data.device)
    measured = accuracy(network, data)
    comparison = "" if expected is None else f", expected {expected:.2f} %"
    print(f"teacher {name} from {path}: test accuracy {measured:.2f} %{comparison}", flush=True)
    if expected is not None and measured < expected / 2 and not args.rehearse:
        fail(
            f"--weights {path}: {name} has a test accuracy of {measured:.2f} %, expected {expected:.2f} %: "
            f"give weights trained on --data-set {args.data_set}"
        )
    network = net.fold_batch_norms(network)
    if devices.uses_bfloat16(args.precision, data.device):
        net.weights_to_bfloat16(network)
    return Teacher(network, digest, measured)


def check_teacher(args: argparse.Namespace) -> None:
    """Exit with code 2 if --weights exist, but are not those of the teacher of the finished run in --out."""
    if args.teacher == "none" or not (args.weights / "model.pt" if args.weights.is_dir() else args.weights).exists():
        return
    _, provenance, saved = load_finished(args.out, __file__)
    last_bias = [weight for name, weight in saved["model"].items() if name.startswith("student.")][-1]
    network, _ = net.load(args.teacher, len(last_bias), args.weights)
    if checkpoints.sha256(*network.state_dict().values()) != provenance["teacher_weights"]:
        fail(f"{args.out} was trained with another teacher than --weights {args.weights}: give the former --weights, "
             "or another --out", record=False)  # fmt: skip


# ------------------------------------------------------------------------------------------------- train


def lr_multiplier(progress: float) -> float:
    """Return the factor of the learning rate at a `progress` in [0, 1]: divided by 10 at each of LR_MILESTONES."""
    return 0.1 ** sum(progress >= milestone for milestone in LR_MILESTONES)


def build_optimizer(args: argparse.Namespace, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """Return SGD with momentum 0.9 and weight decay on all parameters of the modules."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay, foreach=True)


def train(
    args: argparse.Namespace,
    run: Run,
    model: CoCoRD,
    data: images.Images,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
) -> None:
    """Train to the last epoch. Saves the state after each epoch, and resumes from it."""
    probe = seeding.permutation(args.data_seed, "probe images", 0, data.examples, data.device)[:N_PROBE]
    probe_images = data.normalise(data.train[probe]).contiguous(memory_format=torch.channels_last)
    (slow_weights, online_weights), (teacher_head_weights, head_weights) = model.ema_pairs()
    ema_matrices = [weight for weight in teacher_head_weights if weight.ndim == 2]  # without biases and batch norm
    initial = [weight.clone() for weight in ema_matrices]  # before `resume` changes them
    final_epoch = min(2, args.epochs) if args.rehearse else args.epochs
    steps_per_epoch = math.ceil(data.examples / args.batch)
    totals = torch.zeros(len(TRAIN_METRICS) + 1, device=data.device)
    unused = torch.empty(0, device=data.device)  # replaces tensors of terms with weight 0
    not_measured = [name for name, weight in {
        "contrastive_loss": args.lambda_contrast, "contrastive_accuracy": args.lambda_contrast,
        "positive_cosine": args.lambda_contrast, "negative_cosine": args.lambda_contrast,
        "forward_loss": args.forward_weight, "swapped_loss": args.swapped_weight, "distillation_loss": args.lambda_kd,
    }.items() if not weight]  # fmt: skip

    def make_probe_keys() -> Tensor:
        """Return the keys of `probe_images` under the precision of training."""
        if not args.lambda_contrast:
            return unused
        with devices.autocast(args.precision, data.device):
            return make_keys(model, teacher.network, probe_images)

    start_epoch = run.resume(model, optimizer)
    if start_epoch is None:
        start_epoch = 0
        probe_keys = make_probe_keys()
        metrics = {"test_accuracy": accuracy(model.student, data), "teacher_accuracy": teacher.accuracy}
        run.end_epoch(0, final_epoch, metrics, probe=probe_keys)
    else:
        probe_keys = run.extra["probe"]

    epochs = range(start_epoch, final_epoch)
    for epoch in tqdm(epochs, run.name, final_epoch, initial=start_epoch, disable=None, leave=False):
        start_time = time.perf_counter()
        samples = 0
        totals.zero_()
        for step, ((x, swapped_x, teacher_x), labels) in enumerate(batches(args, data, epoch)):
            progress = (epoch + step / steps_per_epoch) / args.epochs
            optimizer.param_groups[0]["lr"] = args.lr * lr_multiplier(progress)

            # Student. What only terms of weight 0 need is not computed.
            with devices.autocast(args.precision, data.device):
                feature, logits = model.student(x)
                z = model.head(feature) if args.forward_weight or args.lambda_contrast else unused
                p = model.predictor(z) if args.forward_weight else unused
                swapped_p = model.predictor(model.head(model.student(swapped_x)[0])) if args.swapped_weight else unused

            # EMA updates: after the student's forward pass, before the targets (the authors' order).
            if args.forward_weight or args.swapped_weight:
                ema_update(slow_weights, online_weights, args.student_momentum)
            # ABLATION (teacher momentum): EMA momentum of the teacher's head
            ema_update(teacher_head_weights, head_weights, args.teacher_momentum)

            # Targets. The slow student sees the other view.
            with torch.no_grad(), devices.autocast(args.precision, data.device):
                u = model.slow_head(model.slow_student(swapped_x)[0]) if args.forward_weight else unused
                swapped_u = model.slow_head(model.slow_student(x)[0]) if args.swapped_weight else unused
                keys = make_keys(model, teacher.network, teacher_x) if args.lambda_contrast else unused
                teacher_logits = teacher.network(x)[1] if args.lambda_kd else unused

            loss, batch_metrics = cocord_loss(
                logits=logits,
                labels=labels,
                z=z,
                keys=keys,
                queue=model.queue,
                p=p,
                u=u,
                swapped_p=swapped_p,
                swapped_u=swapped_u,
                teacher_logits=teacher_logits,
                forward_weight=args.forward_weight,
                swapped_weight=args.swapped_weight,
                lambda_contrast=args.lambda_contrast,
                lambda_class=args.lambda_class,
                lambda_kd=args.lambda_kd,
                temperature=args.temperature,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if args.lambda_contrast:
                model.enqueue(keys)
            totals.add_(batch_metrics, alpha=len(labels))
            samples += len(labels)
        *means, labelled_share = (totals / samples).tolist()  # the first host-device synchronisation of the epoch
        seconds = time.perf_counter() - start_time
        if run.finish_if_diverged(epoch + 1, totals):
            return
        previous_keys, probe_keys = probe_keys, make_probe_keys()
        metrics = dict(zip(TRAIN_METRICS, means, strict=True))
        metrics |= {name: metrics[name] / labelled_share for name in ("class_loss", "train_accuracy")}
        metrics = {name: value for name, value in metrics.items() if name not in not_measured}
        if args.lambda_contrast:
            metrics |= {
                "key_consistency": (previous_keys * probe_keys).sum(1).mean().item(),
                "key_cosine": probes.mean_cosine(probe_keys),
                "teacher_head_shift": relative_change(ema_matrices, initial),
            }
        metrics |= {
            "test_accuracy": accuracy(model.student, data),
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": samples / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, final_epoch, metrics, probe=probe_keys)
    run.save_model({"model": student_weights(model.state_dict()), "epoch": final_epoch, "diverged": False})


def relative_change(tensors: list[Tensor], initial: list[Tensor]) -> float:
    """Return the norm of the change of all tensors together, divided by their initial norm. 0 if there are none."""
    if not tensors:
        return 0.0
    change, scale = (
        torch.stack(torch._foreach_norm(values)).norm() for values in (torch._foreach_sub(tensors, initial), initial)
    )
    return (change / scale).item()


def student_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a state dict that eval.py needs: those of the student and of the slow student."""
    return {name: value for name, value in state.items() if name.startswith(("student.", "slow_student."))}


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    remedy = f"use --batch {args.batch // 2} (about half the memory, different results)"
    with run_lock(args.out), devices.report_oom(device, f"--batch {args.batch}", remedy, args.precision):
        run = Run(vars(args), __file__)
        if run.finished:
            check_teacher(args)
            return
        data = load_data(args.data_set, args.data, args.held_out, device, args.data_seed)
        if args.labels and args.labels > data.examples:
            fail(
                f"--labels {args.labels} is more than the training set ({data.examples} examples): "
                f"give at most {data.examples}"
            )
        steps = args.epochs * math.ceil(data.examples / args.batch)
        provenance = devices.environment(device) | {"data": data.digest, "steps": steps}
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        data = keep_labels(data, args.labels)
        teacher = Teacher()
        if args.teacher != "none":
            teacher = load_teacher(args, data)
        provenance |= {"teacher_weights": teacher.digest}
        run.write_config(f"{args.data_set}, {args.teacher} -> {args.student}", provenance)
        model = build_model(args, data.classes, device)
        optimizer = build_optimizer(args, [model.student, model.head, model.predictor])
        train(args, run, model, data, optimizer, teacher)


if __name__ == "__main__":
    main()
