"""Evaluate a ConMIM run: fine-tuned, linear and kNN accuracy of EMA and online network, written to metrics.json.

    python conmim/eval.py runs/scratch                                # a finished run of train.py
    python conmim/eval.py runs/official --weights checkpoint_copy-799.pth --data ImageNet  # the authors' checkpoint

`finetune_accuracy`, `linear_accuracy` and `knn_accuracy` are measured on the EMA weights in every arm, and with the
suffix `_online` on the online weights. Arms with online keys also maintain an EMA, so weight averaging does not
confound comparisons between arms. Features are the mean of the patch tokens after the final norm, because the class
token has no loss. Fine-tuning is the authors' (class `Classifier`, layer-wise learning rate decay) with the settings in
RECIPES and the run's --labels, --finetune-epochs and --transplant. The labelled images depend on the data seed; order
and augmentation depend on the run's seed. Linear probe and kNN use RECIPES' "bank" labelled images (demo: 2,000, else
all); of image folders above 64 pixels they always use all. `pixel_accuracy` is the accuracy of a 1-nearest-neighbour
classifier on normalised pixels (cosine similarity); its training set is the --labels images. The position diagnostics
are those of the last epoch in train.jsonl. `key_linear_accuracy` is a linear probe on the mean of an image's
L2-normalised keys; a pure position code is at chance level there. It is not strictly comparable between arms: the
projector's batch norms run in eval mode, and their running statistics come from full strong views (EMA keys), from
masked and full views (online keys), or are the initial ones (no pre-training).

The similarities of one image are written to similarity.npz: `own` (N, N), its queries by its own keys; `other` (N, N),
its queries by the keys of another image; `mask` (N,); and the image itself, `picture` (3, S, S).
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import augment, checkpoints, cli, devices, files, image_folder, images, probes, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import check_data, load_finished, read_log, write_metrics
from common.weights import read_weights
from conmim import net, train
from conmim.net import NETWORKS, Classifier, ViT
from conmim.train import ConMIM, build_model

RECIPES = {  #            demo         gpu          paper
    "bank":            (2000,        None,        None),  # labelled images for linear probe and kNN
    "warm_up":         (5,           5,           20),  # epochs
    "batch":           (50,          256,         1024),
    "lr":              (1e-3,        1e-3,        4e-3),  # peak learning rate of the head
    "head_scale":      (1.0,         0.001,       0.001),  # factor of the head's initial weights
    "final_lr":        (1e-6,        1e-6,        1e-6),
    "layer_decay":     (1.0,         0.75,        0.65),
    "weight_decay":    (0.05,        0.05,        0.05),
    "drop_path":       (0.0,         0.1,         0.1),
    "label_smoothing": (0.1,         0.1,         0.1),
    "crop":            ((0.8, 1.0),  (0.5, 1.0),  (0.08, 1.0)),
    "rand_augment":    (0,           27,          27),  # torchvision's magnitude (27 of 30 = timm's 9 of 10); 0: off
    "mixup":           (0.0,         0.8,         0.8),  # alpha; each batch uses mixup or cutmix; 0: off
    "cutmix":          (0.0,         1.0,         1.0),
    "random_erasing":  (0.0,         0.0,         0.25),  # probability
}  # fmt: skip
RAND_AUGMENT_CHUNK = 32  # images on the device that share RandAugment operations, for fewer kernel launches
SAVE_EVERY = 30.0  # seconds between saved states of fine-tuning, rounded up to whole epochs
KNN_K, KNN_TAU = 20, 0.07
MAX_PIXEL_LABELS = 50_000  # with more labelled images there is no `pixel_accuracy`: they are kept as float32
UNTRAINED = "_untrained"  # suffix of the initial network
ACCURACIES = ("finetune_accuracy", "linear_accuracy", "knn_accuracy")
DIAGNOSTICS = ("own_top1", "cross_top1", "position_r2", "key_effective_rank")
METRICS_IF_FINITE = (  # null if the run diverged
    *ACCURACIES,
    *(f"{name}_online" for name in ACCURACIES),
    "untrained_linear_accuracy",
    "pixel_accuracy",
    "key_linear_accuracy",
    *DIAGNOSTICS,
    "train_loss",
    "clipped_fraction",
)
Recipe = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; None means the value used in training."""
    parser = cli.eval_parser(__doc__)
    parser.add_argument("--weights", type=Path, help="evaluate this checkpoint of the authors, fine-tuned or not; the "
                        "folder is for the output")  # fmt: skip
    parser.add_argument("--network", choices=tuple(NETWORKS), help="network of --weights; default: vit_base_16")
    parser.add_argument("--workers", type=cli.int_in(0, cli.MAX_WORKERS), help="DataLoader workers for image folders; "
                        "default: as in training")  # fmt: skip
    parser.add_argument("--held-out", action="store_true", help="evaluate on a tenth of the training set, for tuning; "
                        "pre-training used these images, without labels")  # fmt: skip
    args = parser.parse_args(argv)
    if args.network and not args.weights:
        fail("--network is the network of --weights: give --weights, or drop --network")
    args.network = args.network or "vit_base_16"
    return args


# ------------------------------------------------------------------------------------------------- fine-tuning


def lr_scales(depth: int, decay: float) -> list[float]:
    """Return the factors of layer-wise learning rate decay for the depth + 2 layers: patch embedding, blocks, head."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 for embedding and class token, b + 1 for block b, depth + 1 for norm and head."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def build_optimizer(model: Classifier, decay: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with layer-wise learning rates, as an `lr_scale` per parameter group.

    1-D parameters (biases, norm and LayerScale weights), the class token and absolute positions have no weight decay.
    """
    depth = len(model.blocks)
    scales = lr_scales(depth, decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        scale = scales[layer_of(name, depth)]
        exempt = weight.ndim == 1 or name in ("cls_token", "pos_embed")
        groups.setdefault((scale, 0.0 if exempt else weight_decay), []).append(weight)
    return torch.optim.AdamW(
        [{"params": params, "lr_scale": scale, "weight_decay": wd} for (scale, wd), params in groups.items()],
        fused=True,
    )


def random_erasing(x: Tensor, rng: seeding.SampleRNG, probability: float) -> Tensor:
    """With `probability`, replace a box in an image by uniform noise of unit variance; x (B, 3, S, S).

    The box covers 2 % to 33 % of the image.
    """
    boxes = augment.random_boxes(rng, *x.shape[2:], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    boxes = torch.where(rng.uniform(shape=(1,)) < probability, boxes, 0)  # a box of size 0 erases nothing
    top, left, height, width = devices.upload(boxes, x.device)[:, :, None].unbind(1)
    y_pixels, x_pixels = (torch.arange(side, device=x.device) for side in x.shape[2:])
    in_rows = (y_pixels >= top) & (y_pixels < top + height)
    in_columns = (x_pixels >= left) & (x_pixels < left + width)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(inside, torch.empty_like(x).uniform_(-(3**0.5), 3**0.5), x)


class Subset(NamedTuple):
    """The labelled training images for fine-tuning."""

    indices: Tensor  # (n,) int64 on the CPU: indices into the training set
    labels: Tensor  # (N,) int64 on the device: labels of the whole training set

    def batch_size(self, recipe: Recipe) -> int:
        """Return the recipe's global batch size, reduced to the subset and to a multiple of the number of ranks."""
        world = devices.rank_and_world()[1]
        return min(recipe["batch"], len(self.indices)) // world * world


def fine_tuning_batches(
    args: argparse.Namespace, recipe: Recipe, data: Data, subset: Subset, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of augmented, normalised images (b, 3, S, S) and labels (b,): this rank's rows of each batch.

    The last incomplete batch is dropped.
    """
    batch = subset.batch_size(recipe)
    rows, steps_per_epoch = devices.rows_of_rank(batch), len(subset.indices) // batch
    order = subset.indices[seeding.permutation(args.seed, "fine-tuning order", epoch, len(subset.indices), "cpu")]
    order = order[: steps_per_epoch * batch].view(steps_per_epoch, batch)[:, rows]
    flip = train.augmentation(args.data_set)["flip"]
    rand_augment = build_rand_augment(recipe["rand_augment"])
    streamed = None
    if isinstance(data, image_folder.StreamedImages):
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(args.size, recipe["crop"], interpolation=v2.InterpolationMode.BICUBIC)
        transform = v2.Compose([crop, v2.RandomHorizontalFlip(flip), *rand_augment, v2.PILToTensor()])
        streamed = data.views(transform, 1, order.tolist(), args.seed, epoch)
    for step, indices in enumerate(order.to(data.device), epoch * steps_per_epoch):
        rng = seeding.SampleRNG(args.seed, "fine-tuning view", step, batch, rows)
        # RandAugment, mixup, CutMix, the noise of erased boxes and stochastic depth use the default generators.
        seeding.reseed(args.seed, "fine-tuning", step, devices.rank_and_world()[0])
        if streamed:
            x = next(streamed)[0]
        else:
            x = augment.random_resized_crop(data.train[indices], rng, recipe["crop"], size=args.size, flip=flip)
            for operation in rand_augment:
                x = torch.cat([operation(chunk) for chunk in x.split(RAND_AUGMENT_CHUNK)])
        x = data.normalise(x)
        if recipe["random_erasing"]:
            x = random_erasing(x, rng, recipe["random_erasing"])
        yield x, subset.labels[indices]


def build_rand_augment(magnitude: int) -> list[Callable[[Tensor], Tensor]]:
    """Return RandAugment: two operations, each with probability 0.5 as in timm. An empty list at magnitude 0."""
    if not magnitude:
        return []
    from torchvision.transforms import v2  # imported here: it takes 2 s, and the demo does not need it

    return [v2.RandomApply([v2.RandAugment(1, magnitude)], 0.5) for _ in range(2)]


def build_mixup(recipe: Recipe, classes: int) -> Callable[..., Any] | None:
    """Return mixup or CutMix, a random choice of the two if the recipe has both, and None if it has neither."""
    if not (recipe["mixup"] or recipe["cutmix"]):
        return None
    from torchvision.transforms import v2

    transforms = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    return v2.RandomChoice(
        [transform(alpha=recipe[name], num_classes=classes) for name, transform in transforms.items() if recipe[name]]
    )


def build_classifier(args: argparse.Namespace, recipe: Recipe, state: dict[str, Tensor], data: Data) -> Classifier:
    """Return a Classifier on the device of the data, initialised from the `state` of a pre-trained ViT."""
    with seeding.seeded_fork_rng(args.seed, "classifier"):
        model = Classifier(
            args.size,
            *NETWORKS[args.network],
            layer_scale=args.layer_scale,
            positions=args.positions,
            classes=data.classes,
            drop_path=recipe["drop_path"],
            head_scale=recipe["head_scale"],
        )
    weights = net.to_classifier(state)
    if args.transplant == "positions":  # ABLATION (everything but positions)
        weights = {name: weights[name] for name in weights if name.endswith(net.POSITION_PARAMETERS)}
    checkpoints.load_weights(model, model.state_dict() | weights, "the pre-trained network")
    return model.to(data.device)


def fine_tune(
    args: argparse.Namespace,
    recipe: Recipe,
    model: Classifier,
    data: Data,
    subset: Subset,
    evaluation: "EvaluationState",
) -> float:
    """Train `model` on `subset` and return its final test accuracy in percent. Resumes from `evaluation`."""
    optimizer = build_optimizer(model, recipe["layer_decay"], recipe["weight_decay"])
    state = evaluation.fine_tuning_state
    if state:
        checkpoints.load_weights(model, state["classifier"], "eval_state.pt")
        optimizer.load_state_dict(state["optimizer"])
    forward = devices.distribute(model, data.device)
    mixup, last_saved = build_mixup(recipe, data.classes), time.perf_counter()
    steps_per_epoch = len(subset.indices) // subset.batch_size(recipe)
    warm_up_steps, total_steps = recipe["warm_up"] * steps_per_epoch, args.finetune_epochs * steps_per_epoch
    model.train()
    for epoch in range(state.get("epoch", 0), args.finetune_epochs):
        loader = fine_tuning_batches(args, recipe, data, subset, epoch)
        for step, (x, y) in enumerate(loader, epoch * steps_per_epoch):
            lr = train.learning_rate(step, warm_up_steps, total_steps, recipe["lr"], recipe["final_lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if mixup:
                x, y = mixup(x, y)
            with devices.autocast(args.precision, data.device):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if time.perf_counter() - last_saved > SAVE_EVERY:
            evaluation.save(epoch=epoch + 1, classifier=model.state_dict(), optimizer=optimizer.state_dict())
            last_saved = time.perf_counter()
    return accuracy(model, data)


def accuracy(model: Classifier, data: Data) -> float:
    """Return the test accuracy in percent."""
    logits, labels = probes.extract_features([model], data, "test")
    return 100.0 * (logits.argmax(1) == labels).float().mean().item()


# ------------------------------------------------------------------------------------------------- frozen features


class Features(nn.Module):
    """Frozen features of an image: the mean of its patch tokens (B, width).

    With a projector the mean of its L2-normalised keys is appended: (B, width + dim).
    """

    def __init__(self, vit: ViT, projector: nn.Module | None = None):
        super().__init__()
        self.vit, self.projector = vit, projector

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit(x)
        pooled = tokens[:, 1:].float().mean(1)
        if self.projector is None:
            return pooled
        keys = F.normalize(self.projector(tokens)[:, 1:].float(), dim=2)
        return torch.cat([pooled, keys.mean(1)], 1)


def frozen_accuracies(args: argparse.Namespace, network: Features, data: Data, indices: Tensor) -> dict[str, float]:
    """Return linear and kNN accuracy in percent, trained on the images `indices` of the training set.

    Streamed data use the whole training set. With a projector, `key_linear_accuracy` is that of the keys.
    """
    bank_data = data
    if not isinstance(data, image_folder.StreamedImages):
        rows = indices.to(data.device)
        bank_data = data._replace(train=data.train[rows], train_labels=data.train_labels[rows])
    train_features, train_labels = probes.extract_features([network], bank_data, "train")
    test_features, test_labels = probes.extract_features([network], data, "test")
    selection_indices = seeding.held_out_split(len(train_features), data.device, data.data_seed)
    width = NETWORKS[args.network].width

    def labelled(columns: slice) -> tuple[probes.Labelled, probes.Labelled]:
        return (
            probes.Labelled(train_features[:, columns], train_labels),
            probes.Labelled(test_features[:, columns], test_labels),
        )

    token_features, key_features = labelled(slice(width)), labelled(slice(width, None))
    metrics = {
        "linear_accuracy": probes.linear_accuracy(*token_features, data.classes, selection_indices, args.seed),
        "knn_accuracy": probes.knn_accuracy(*token_features, data.classes, KNN_K, KNN_TAU),
    }
    if network.projector is not None:
        metrics["key_linear_accuracy"] = probes.linear_accuracy(
            *key_features, data.classes, selection_indices, args.seed
        )
    return metrics


def pixel_accuracy(data: images.Images, indices: Tensor) -> float:
    """Return the test accuracy in percent of the nearest of the images `indices` by the cosine of normalised pixels."""
    rows = indices.to(data.device)
    labelled = probes.Labelled(data.normalise(data.train[rows]).flatten(1), data.train_labels[rows])
    test = probes.Labelled(data.normalise(data.test).flatten(1), data.test_labels)
    return probes.knn_accuracy(labelled, test, data.classes, k=1)


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def similarity_arrays(args: argparse.Namespace, model: ConMIM, data: Data) -> dict[str, np.ndarray]:
    """Return the arrays of similarity.npz; `own` and `other` are cosine similarities, float32."""
    x, mask = train.diagnostic_batch(args, data)
    with train.frozen_running_statistics(model):
        q, k = model(x, x, mask, args.keys, 0.0)
    other_image = min(1, len(x) - 1)
    own, other = train.similarities(q[[0, 0]], k[[0, other_image]])
    picture = (x[0] * data.std + data.mean).clamp(0, 1)
    tensors = {"own": own, "other": other, "mask": mask[0], "picture": (255 * picture).round().byte()}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def write_similarity(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())


class EvaluationState:
    """Resumable state of an evaluation in eval_state.pt: finished accuracies and the fine-tuning in progress.

    A saved state is used only if weights and recipe have the same `identity`. Exits with code 2 if the file is damaged.
    """

    def __init__(self, path: Path, identity: str, device: torch.device):
        self.path, self.identity, self.metric = path, identity, ""
        try:
            state = checkpoints.load(path, device)
        except FileNotFoundError:
            state = {}
        except files.DamagedFile as error:
            fail(f"{error}: remove the file to restart the evaluation")
        self.state = state if state.get("identity") == identity else {}
        self.finished: dict[str, float] = dict(self.state.get("finished", {}))

    def start(self, metric: str) -> None:
        """Start the fine-tuning for `metric`."""
        self.metric = metric

    @property
    def fine_tuning_state(self) -> dict[str, Any]:
        """The saved state of an interrupted fine-tuning for the current metric; empty if there is none."""
        return self.state if self.state.get("metric") == self.metric and "epoch" in self.state else {}

    def save(self, **state: Any) -> None:
        """Save the finished accuracies and the `state` of the fine-tuning in progress."""
        if devices.rank_and_world()[0] == 0:
            state |= {"identity": self.identity, "finished": self.finished, "metric": self.metric}
            checkpoints.save(self.path, state)


def evaluation_identity(networks: dict[str, Features], settings: Any) -> str:
    """Return the sha256 of the networks' tensors, followed by the settings of the evaluation."""
    tensors = (
        tensor.detach().float().cpu() for network in networks.values() for tensor in network.state_dict().values()
    )
    return f"{checkpoints.sha256(*tensors)} {settings}"


def evaluate(
    args: argparse.Namespace, recipe: Recipe, networks: dict[str, Features], data: Data, folder: Path, held_out: bool
) -> dict[str, float]:
    """Return the accuracies in percent of `networks`, whose keys are the suffixes of their metrics.

    The network UNTRAINED gets linear accuracy only. Resumes from eval_state.pt in `folder`. With `held_out` the test
    set is a held-out tenth of the training set; pre-training used these images, without labels.
    """
    if held_out:
        data = data.with_held_out_test()
    if isinstance(data, image_folder.StreamedImages):
        labels = torch.tensor(data.train.targets)
    else:
        labels = data.train_labels.cpu()
    subset = Subset(images.balanced_subset(labels, args.labels, data.classes, data.data_seed), labels.to(data.device))
    bank = images.balanced_subset(labels, recipe["bank"], data.classes, data.data_seed)
    settings = [*recipe.items(), args.labels, args.finetune_epochs, args.transplant, held_out, data.digest]
    identity = evaluation_identity(networks, settings)
    state = EvaluationState(folder / "eval_state.pt", identity, data.device)
    for suffix, network in networks.items():
        state.start(f"finetune_accuracy{suffix}")
        if suffix != UNTRAINED and state.metric not in state.finished:
            model = build_classifier(args, recipe, network.vit.state_dict(), data)
            state.finished[state.metric] = fine_tune(args, recipe, model, data, subset, state)
            state.save()
    metrics = dict(state.finished)
    if not isinstance(data, image_folder.StreamedImages) and len(subset.indices) <= MAX_PIXEL_LABELS:
        metrics["pixel_accuracy"] = pixel_accuracy(data, subset.indices)
    for suffix, network in networks.items():
        accuracies = frozen_accuracies(args, network, data, bank)
        if suffix == UNTRAINED:
            metrics["untrained_linear_accuracy"] = accuracies["linear_accuracy"]
            continue
        for name, value in accuracies.items():
            metrics[name if name == "key_linear_accuracy" else f"{name}{suffix}"] = value
    return metrics


def evaluate_run(
    args: argparse.Namespace, recipe: Recipe, weights: dict[str, Tensor], data: Data, folder: Path, held_out: bool
) -> dict[str, float | None]:
    """Return the accuracies of a run with the given weights. Also writes similarity.npz to `folder`.

    After zero epochs the EMA, online and untrained networks are equal, so only one of them is evaluated.
    """
    model = build_model(args, data.device)
    checkpoints.load_weights(model, weights, folder / "model.pt")
    # The keys are probed on the network that computes them. Fixed codes of positions are not probed.
    ema_keys, online_keys = args.keys == "ema" or not args.epochs, args.keys == "online"
    networks = {"": Features(model.ema.vit, model.ema.projector if ema_keys else None)}
    if args.epochs:
        networks["_online"] = Features(model.online.vit, model.online.projector if online_keys else None)
        networks[UNTRAINED] = Features(build_model(args, data.device).ema.vit)
    metrics = evaluate(args, recipe, networks, data, folder, held_out)
    metrics.setdefault("key_linear_accuracy", None)
    if not args.epochs:
        metrics |= {f"{name}_online": metrics[name] for name in ACCURACIES}
        metrics["untrained_linear_accuracy"] = metrics["linear_accuracy"]
    if not held_out and devices.rank_and_world()[0] == 0:
        write_similarity(folder / "similarity.npz", similarity_arrays(args, model, data))
    return metrics


def training_metrics(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the metrics of train.jsonl. A run of zero epochs has only the line of epoch 0.

    `train_seconds` does not include the diagnostics between epochs.
    """
    first, *epochs = log
    last = epochs[-1] if epochs else first
    return {
        **{name: last[name] for name in DIAGNOSTICS},
        "train_loss": last.get("loss"),
        "clipped_fraction": last.get("clipped_fraction"),
        "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
        "train_seconds": sum(line["seconds"] for line in epochs or [first]),
        "peak_memory": last["peak_memory"],
    }


def read_authors_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the authors' checkpoint in `path`, pre-trained or fine-tuned.

    Exits with code 2 if the file cannot be read or is not a BEiT.
    """
    expected = "the authors' checkpoint"
    # The authors' checkpoints contain their arguments as a Namespace.
    state = read_weights(path, "--weights", expected, safe=(argparse.Namespace,)).tensors
    if "patch_embed.proj.weight" not in state:
        fail(
            f"--weights {path}: no parameter patch_embed.proj.weight (the first is {next(iter(state), None)}): "
            f"give {expected}"
        )
    return state


def evaluate_authors_checkpoint(path: Path, network: str, data: Data, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the accuracies of the authors' checkpoint in `path`; only the test accuracy if it is fine-tuned.

    --positions follows from the parameter names in the file. Its LayerScale values are loaded with the weights.
    """
    state = read_authors_checkpoint(path)
    if not any("relative_position_bias_table" in name for name in state):
        positions = "absolute"
    else:
        positions = "both" if "pos_embed" in state else "relative"
    args = train.parse_args(["--scale", "paper", "--network", network, "--positions", positions])
    shape = NETWORKS[network]
    if "head.weight" in state and "mask_token" not in state:
        weights = {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
        model = Classifier(args.size, *shape, args.layer_scale, positions, data.classes).to(data.device)
        checkpoints.load_weights(model, weights, f"--weights {path}", f"a fine-tuned {network}")
        return {"finetune_accuracy": accuracy(model, data)}
    vit = ViT(args.size, *shape, args.layer_scale, positions).to(data.device)
    renamed = net.from_authors_names(state)
    weights = {name.removeprefix("vit."): renamed[name] for name in renamed if name.startswith("vit.")}
    checkpoints.load_weights(vit, weights, f"--weights {path}", network)
    return evaluate(args, recipe, {"": Features(vit)}, data, folder, held_out=False)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.weights:
        run_args, saved, recorded = train.parse_args(["--scale", "paper"]), None, {}
    else:
        arguments, provenance, saved = load_finished(args.folder, __file__)
        run_args = argparse.Namespace(**arguments)
        recorded = {**training_metrics(read_log(args.folder, saved["epoch"])), **provenance}
    torch.set_num_threads(args.threads or run_args.threads)
    device_name = args.device or run_args.device
    device = devices.select_device(device_name, run_args.scale, distributed=True)
    rank, _ = devices.init_process_group(device_name, device)
    start_time = time.perf_counter()
    data_folder = args.data or Path(run_args.data)
    recipe = {name: row[cli.SCALES.index(run_args.scale)] for name, row in RECIPES.items()}
    if recipe["warm_up"] >= run_args.finetune_epochs > 1:
        limit = f"the warm-up of {recipe['warm_up']} epochs is as long as --finetune-epochs {run_args.finetune_epochs}"
        print(f"warning: {limit}: the learning rate never reaches its peak", file=sys.stderr)
    streamed = run_args.size > images.MAX_IN_MEMORY_PIXELS
    batch = image_folder.BLOCK if streamed else images.BLOCK
    usage = f"batches of {batch} images, {recipe['batch']} in fine-tuning"
    with run_lock(args.folder, rank), devices.report_oom(device, usage, "use a --device with more memory"):
        workers = run_args.workers if args.workers is None else args.workers
        data = images.load_or_stream(
            run_args.data_set,
            data_folder,
            run_args.size,
            device,
            workers,
            run_args.data_seed,
            train.TEST_INTERPOLATION,
        )
        check_data(data.digest, recorded.get("data"), data_folder, args.folder)
        if args.held_out and isinstance(data, image_folder.StreamedImages):
            fail("--held-out requires images of at most 64 pixels: evaluate without it")
        if run_args.rehearse:
            data = data.subset(run_args.rehearse * run_args.batch)
            recipe["warm_up"], run_args.finetune_epochs = 0, 1
        metrics: dict[str, Any] = {**recorded, "diverged": bool(saved and saved["diverged"])}
        if args.weights:
            metrics |= evaluate_authors_checkpoint(args.weights, args.network, data, recipe, args.folder)
            metrics["weights"] = args.weights.name
        elif metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            metrics |= evaluate_run(run_args, recipe, saved["model"], data, args.folder, args.held_out)
        if saved:
            metrics["loss_minimum"] = train.loss_minimum(train.patch_count(run_args), run_args.temperature)
        metrics["seconds"] = recorded.get("train_seconds", 0.0) + time.perf_counter() - start_time
        if rank == 0:
            file = args.folder / ("held_out.json" if args.held_out else "metrics.json")
            write_metrics(file, metrics, METRICS_IF_FINITE)
            (args.folder / "eval_state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
