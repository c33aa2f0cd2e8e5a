"""What a ConMIM run has learnt: fine-tuned, linear and kNN accuracy of both its networks, written to metrics.json.

    python conmim/eval.py runs/scratch                                # a finished run of train.py
    python conmim/eval.py runs/official --weights checkpoint_copy-799.pth --data ImageNet     # an official file

`finetune_accuracy`, `linear_accuracy` and `knn_accuracy` are those of the averaged weights, in every arm; the same
names with `_online` those of the weights that the optimiser moved. An arm whose keys are not the average's has an
average all the same, so that no difference between arms is one of weight averaging. Features are the mean of the patch
tokens after the final norm: the class token has no loss. Fine-tuning is the authors' (class `Classifier`, rates that
fall from the head to the patch embedding), its settings stand in RECIPES; which images are labelled follows from
the data seed, its order and augmentation from the run's. The position diagnostics are the last epoch's of train.jsonl;
`key_linear_accuracy` is a linear probe on the mean of an image's unit keys, which a pure position code cannot pass.

The picture of one image's similarities goes to similarity.npz: `own` (N, N), its queries by its keys; `other` (N, N),
its queries by another image's keys; `mask` (N,) and the `picture` (3, S, S).
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

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import augment, checkpoints, cli, devices, files, image_folder, images, probes, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import load_finished
from conmim import net, train
from conmim.net import NETWORKS, Classifier, ViT
from conmim.train import ConMIM, build_model

RECIPES = {  #            demo         gpu          paper
    "labels":        (360,         None,        None),  # that fine-tuning has, as many of each class; None: all
    "bank":          (2000,        None,        None),  # labelled images behind linear probe and kNN
    "epochs":        (8,           100,         100),
    "warm_up":       (1,           5,           20),  # epochs
    "batch":         (36,          256,         1024),
    "lr":            (3e-3,        1e-3,        4e-3),  # of the head, at its peak
    "last_lr":       (1e-6,        1e-6,        1e-6),
    "layer_decay":   (0.75,        0.75,        0.65),
    "weight_decay":  (0.05,        0.05,        0.05),
    "drop_path":     (0.0,         0.1,         0.1),
    "smoothing":     (0.1,         0.1,         0.1),
    "crop":          ((0.6, 1.0),  (0.5, 1.0),  (0.08, 1.0)),
    "rand_augment":  (0,           9,           9),  # its magnitude, two operations; 0: without
    "mixup":         (0.0,         0.8,         0.8),  # one of the two in each batch; 0: without
    "cutmix":        (0.0,         1.0,         1.0),
    "erase":         (0.0,         0.0,         0.25),  # probability
}  # fmt: skip
ALIKE = 32  # images of a batch on the device that share their operations of RandAugment: fewer launches
SAVED_EVERY = 30.0  # seconds of fine-tuning that an interruption may cost, at most an epoch more
NEIGHBOURS, TAU = 20, 0.07
UNTRAINED = "_untrained"
ACCURACIES = ("finetune_accuracy", "linear_accuracy", "knn_accuracy")
DIAGNOSTICS = ("own_top1", "cross_top1", "position_r2", "key_effective_rank")
METRICS_IF_FINITE = (  # of a diverged run they are null
    *(f"{name}{which}" for which in ("", "_online") for name in ACCURACIES),
    *("untrained_linear_accuracy", "key_linear_accuracy", *DIAGNOSTICS, "train_loss", "clipped_fraction"),
)
Recipe = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run; with --weights: where metrics.json goes")
    parser.add_argument("--weights", type=Path, help="an official file, pre-trained or fine-tuned, instead of a run")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="vit_base_16", help="of --weights")
    parser.add_argument("--data", type=Path, help="where the data lie; default: as in training")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: as in training")
    parser.add_argument("--threads", type=cli.int_min(1), help="default: as in training")
    parser.add_argument(
        "--held-out", action="store_true", help="measure on the training set's held-out tenth: for tuning"
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- labels


def labelled(labels: Tensor, count: int | None, classes: int) -> Tensor:
    """Row numbers, rising, of `count` images with equally many of each class (one more of some), by the data seed.

    labels (N,) int64 on the CPU; None, or more than there are, takes all.
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    order = seeding.permutation(seeding.DATA_SEED, "labelled", 0, len(labels), "cpu")
    shuffled = labels[order]
    place = F.one_hot(shuffled, classes).cumsum(0).gather(1, shuffled[:, None])[:, 0]  # among its class's
    return order[place.argsort(stable=True)[:count]].sort().values


def tenth_as_test(data: Any) -> Any:
    """The same with nine tenths of the training images, and the held-out tenth in place of the test images."""
    rest, tenth = seeding.held_out_split(data.examples, data.device)
    train_, labels = data.train, data.train_labels
    return data._replace(train=train_[rest], train_labels=labels[rest], test=train_[tenth], test_labels=labels[tenth])


# ------------------------------------------------------------------------------------------------- fine-tuning


def layer_scales(depth: int, decay: float) -> list[float]:
    """What the rate is multiplied with in each of the depth + 2 groups: patch embedding, blocks, head."""
    return [decay ** (depth + 1 - group) for group in range(depth + 2)]


def group_of(name: str, depth: int) -> int:
    """Group of a Classifier's parameter: 0 embedding and class token, b + 1 block b, depth + 1 norm and head."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def build_optimizer(model: Classifier, decay: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a `scale` in every group; no weight decay of vectors, class token and absolute positions."""
    scales = layer_scales(len(model.blocks), decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        scale = scales[group_of(name, len(model.blocks))]
        exempt = weight.ndim == 1 or name in ("cls_token", "pos_embed")
        groups.setdefault((scale, 0.0 if exempt else weight_decay), []).append(weight)
    return torch.optim.AdamW(
        [{"params": found, "scale": scale, "weight_decay": own} for (scale, own), found in groups.items()], fused=True
    )


def erased(x: Tensor, numbers: seeding.SampleRNG, probability: float) -> Tensor:
    """A box, a fiftieth to a third of an image (B, 3, S, S), becomes noise of unit variance, with `probability`."""
    boxes = augment.random_boxes(numbers, *x.shape[2:], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    boxes = torch.where(numbers.uniform(shape=(1,)) < probability, boxes, 0)  # of height and width 0: nothing is inside
    top, left, height, width = devices.upload(boxes, x.device)[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    down = (rows >= top) & (rows < top + height)
    inside = down[:, None, :, None] & ((columns >= left) & (columns < left + width))[:, None, None, :]
    return torch.where(inside, torch.empty_like(x).uniform_(-(3**0.5), 3**0.5), x)


class Subset(NamedTuple):
    """The images of the training set that have labels for fine-tuning."""

    rows: Tensor  # (n,) int64 on the CPU: their row numbers
    labels: Tensor  # (N,) int64 on the device: of the whole training set

    def batch(self, recipe: Recipe) -> int:
        """The recipe's global batch, cut to the subset, in whole rows for each rank."""
        world = devices.rank_and_world()[1]
        return min(recipe["batch"], len(self.rows)) // world * world


def labelled_batches(
    args: argparse.Namespace, recipe: Recipe, data: Data, subset: Subset, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented, normalised images (b, 3, S, S) and labels (b,), cut to this rank's rows.

    The last incomplete batch is dropped.
    """
    batch = subset.batch(recipe)
    mine, steps = devices.rows_of_rank(batch), len(subset.rows) // batch
    order = subset.rows[seeding.permutation(args.seed, "fine-tuning order", epoch, len(subset.rows), "cpu")]
    order = order[: steps * batch].view(steps, batch)[:, mine]
    flip, varied, streamed = train.augmentation(args.data_set)["flip"], rand_augment(recipe["rand_augment"]), None
    if isinstance(data, image_folder.StreamedImages):
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(args.size, recipe["crop"], interpolation=v2.InterpolationMode.BICUBIC)
        transform = v2.Compose([crop, v2.RandomHorizontalFlip(flip), *varied, v2.PILToTensor()])
        streamed = data.views(transform, 1, order.tolist(), args.seed, epoch)
    on_device = order.to(data.device)
    for step, picked in enumerate(on_device, epoch * steps):
        rng = seeding.SampleRNG(args.seed, "fine-tuning view", step, batch, mine)
        # RandAugment, mixing, erasing and stochastic depth draw from the default generators.
        seeding.reseed(args.seed, "fine-tuning", step, devices.rank_and_world()[0])
        if streamed:
            x = next(streamed)[0]
        else:
            x = augment.random_resized_crop(data.train[picked], rng, recipe["crop"], size=args.size, flip=flip)
            x = torch.cat([varied[0](few) for few in x.split(ALIKE)]) if varied else x
        x = data.normalise(x)
        yield erased(x, rng, recipe["erase"]) if recipe["erase"] else x, subset.labels[picked]


def rand_augment(magnitude: int) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment of two operations, or nothing at magnitude 0."""
    if not magnitude:
        return []
    from torchvision.transforms import v2  # here: the demo does without it, and it takes 2 s

    return [v2.RandAugment(2, magnitude)]


def mixing(recipe: Recipe, classes: int) -> Callable[..., Any] | None:
    """Mixup or CutMix, as the recipe has them; one of them at random where it has both, None where it has neither."""
    if not (recipe["mixup"] or recipe["cutmix"]):
        return None
    from torchvision.transforms import v2

    kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    return v2.RandomChoice(
        [kind(alpha=recipe[name], num_classes=classes) for name, kind in kinds.items() if recipe[name]]
    )


def build_classifier(args: argparse.Namespace, recipe: Recipe, state: dict[str, Tensor], data: Data) -> Classifier:
    """A Classifier on the data's device that starts from a ViT's `state`."""
    with seeding.forked(args.seed, "classifier"):
        shape = NETWORKS[args.network]
        model = Classifier(args.size, *shape, args.layer_scale, args.positions, data.classes, recipe["drop_path"])
    checkpoints.fit(model, model.state_dict() | net.to_classifier(state), "the pre-trained network")
    return model.to(data.device)


def fine_tune(
    args: argparse.Namespace, recipe: Recipe, model: Classifier, data: Data, subset: Subset, progress: "Progress"
) -> float:
    """Test accuracy in percent, after the last epoch, of `model` trained on `subset`. Goes on from `progress`."""
    optimizer = build_optimizer(model, recipe["layer_decay"], recipe["weight_decay"])
    begun = progress.fine_tuning
    if begun:
        checkpoints.fit(model, begun["classifier"], "eval_state.pt")
        optimizer.load_state_dict(begun["optimizer"])
    forward = devices.distribute(model, data.device)
    mix, last_saved = mixing(recipe, data.classes), time.perf_counter()
    steps = len(subset.rows) // subset.batch(recipe)
    model.train()
    for epoch in range(begun.get("epoch", 0), recipe["epochs"]):
        for step, (x, y) in enumerate(labelled_batches(args, recipe, data, subset, epoch), epoch * steps):
            rate = train.learning_rate(
                step, recipe["warm_up"] * steps, recipe["epochs"] * steps, recipe["lr"], recipe["last_lr"]
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            x, y = mix(x, y) if mix else (x, y)
            with devices.autocast(args.precision, data.device):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe["smoothing"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if time.perf_counter() - last_saved > SAVED_EVERY:
            progress.save(epoch=epoch + 1, classifier=model.state_dict(), optimizer=optimizer.state_dict())
            last_saved = time.perf_counter()
    return accuracy(model, data)


def accuracy(model: Classifier, data: Data) -> float:
    """Test accuracy in percent."""
    logits, truth = probes.extract_features([model], data, "test")
    return 100.0 * (logits.argmax(1) == truth).float().mean().item()


# ------------------------------------------------------------------------------------------------- frozen features


class Features(nn.Module):
    """Mean of the patches' tokens (B, width) and, with a projector, of their unit projections: (B, width + dim)."""

    def __init__(self, vit: ViT, projector: nn.Module | None = None):
        super().__init__()
        self.vit, self.projector = vit, projector

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit(x)
        found = tokens[:, 1:].float().mean(1)
        if self.projector is None:
            return found
        return torch.cat([found, F.normalize(self.projector(tokens)[:, 1:].float(), dim=2).mean(1)], 1)


def frozen(args: argparse.Namespace, features: Features, data: Data, rows: Tensor) -> dict[str, float]:
    """kNN and linear accuracy in percent from the labelled training images `rows`, a linear one of the keys if any."""
    if isinstance(data, image_folder.StreamedImages):
        known, labels = probes.extract_features([features], data, "train")
    else:
        picked = rows.to(data.device)
        few = data._replace(train=data.train[picked], train_labels=data.train_labels[picked])
        known, labels = probes.extract_features([features], few, "train")
    asked, truth = probes.extract_features([features], data, "test")
    parts, width = seeding.held_out_split(len(known), data.device), NETWORKS[args.network].width

    def linear(part: slice) -> float:
        train_set, test_set = probes.Labelled(known[:, part], labels), probes.Labelled(asked[:, part], truth)
        return probes.linear_accuracy(train_set, test_set, data.classes, parts, args.seed)

    bank, queries = probes.Labelled(known[:, :width], labels), probes.Labelled(asked[:, :width], truth)
    found = {
        "linear_accuracy": linear(slice(width)),
        "knn_accuracy": probes.knn_accuracy(bank, queries, data.classes, NEIGHBOURS, TAU),
    }
    return found | ({} if features.projector is None else {"key_linear_accuracy": linear(slice(width, None))})


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def similarity(args: argparse.Namespace, model: ConMIM, data: Data) -> dict[str, np.ndarray]:
    """What similarity.npz holds; `own` and `other` are cosines between -1 and 1, float32."""
    x, mask = train.fixed_batch(data, train.patch_count(args), args.mask_ratio)
    with train.unmoved_statistics(model):
        q, k = model(x, x, mask, args.keys, 0.0)
    other = min(1, len(x) - 1)
    own, cross = train.similarities(q[[0, 0]], k[[0, other]])
    picture = (x[0] * data.std + data.mean).clamp(0, 1)
    found = {"own": own, "other": cross, "mask": mask[0], "picture": (255 * picture).round().byte()}
    return {name: value.cpu().numpy() for name, value in found.items()}


def write_similarity(path: Path, found: dict[str, np.ndarray]) -> None:
    """A .npz file of plain arrays, written atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **found)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())


class Progress:
    """eval_state.pt: the accuracies that are finished, and the fine-tuning under way.

    Taken up only by an evaluation of the same weights with the same recipe (`identity`). Stops on damage.
    """

    def __init__(self, path: Path, identity: str, device: torch.device):
        self.path, self.identity, self.name = path, identity, ""
        try:
            state = checkpoints.load(path, device)
        except FileNotFoundError:
            state = {}
        except files.DamagedFile as error:
            fail(f"{error}: remove it to begin the evaluation again")
        self.state = state if state.get("identity") == identity else {}
        self.done: dict[str, float] = dict(self.state.get("done", {}))

    def begin(self, name: str) -> None:
        """Fine-tune for the metric `name` from here on."""
        self.name = name

    @property
    def fine_tuning(self) -> dict[str, Any]:
        """What `save` was given in this metric's fine-tuning before an interruption, or nothing."""
        return self.state if self.state.get("name") == self.name and "epoch" in self.state else {}

    def save(self, **state: Any) -> None:
        """Save what is done, and the `state` of the fine-tuning under way."""
        if devices.rank_and_world()[0] == 0:
            checkpoints.save(self.path, {"identity": self.identity, "done": self.done, "name": self.name, **state})


def identity_of(networks: dict[str, Features], settings: Any) -> str:
    """sha256 of the networks' tensors, and what they are evaluated with."""
    tensors = (one.detach().float().cpu() for part in networks.values() for one in part.state_dict().values())
    return f"{checkpoints.sha256(*tensors)} {settings}"


def evaluate(
    args: argparse.Namespace, recipe: Recipe, networks: dict[str, Features], data: Data, folder: Path, held_out: bool
) -> dict[str, float]:
    """Accuracies in percent of the networks, by the suffix of their metrics; of `untrained` the linear one alone.

    Goes on from eval_state.pt. With `held_out` measured on the training set's tenth.
    """
    if held_out:
        data = tenth_as_test(data)
    labels = (
        torch.tensor(data.train.targets) if isinstance(data, image_folder.StreamedImages) else data.train_labels.cpu()
    )
    rows, bank = (labelled(labels, recipe[key], data.classes) for key in ("labels", "bank"))
    subset = Subset(rows, labels.to(data.device))
    progress = Progress(folder / "eval_state.pt", identity_of(networks, [*recipe.items(), held_out]), data.device)
    for suffix, features in networks.items():
        progress.begin(f"finetune_accuracy{suffix}")
        if suffix != UNTRAINED and progress.name not in progress.done:
            model = build_classifier(args, recipe, features.vit.state_dict(), data)
            progress.done[progress.name] = fine_tune(args, recipe, model, data, subset, progress)
            progress.save()
    found = dict(progress.done)
    for suffix, features in networks.items():
        one = frozen(args, features, data, bank)
        if suffix == UNTRAINED:
            found["untrained_linear_accuracy"] = one["linear_accuracy"]
            continue
        found |= {f"{name}{'' if name.startswith('key') else suffix}": value for name, value in one.items()}
    return found


def evaluate_run(
    args: argparse.Namespace, recipe: Recipe, weights: dict[str, Tensor], data: Data, folder: Path, held_out: bool
) -> dict[str, float]:
    """The claims of a run whose networks have these weights; writes similarity.npz beside them.

    A run of no epochs has one network, the untrained one, under all its names.
    """
    model = build_model(args, data.device)
    checkpoints.fit(model, weights, folder / "model.pt")
    averaged = args.keys == "ema" or not args.epochs
    networks = {"": Features(model.ema.vit, model.ema.projector if averaged else None)}
    if args.epochs:
        networks["_online"] = Features(model.online.vit, None if averaged else model.online.projector)
        networks[UNTRAINED] = Features(build_model(args, data.device).average.vit)
    found = evaluate(args, recipe, networks, data, folder, held_out)
    if not args.epochs:
        found |= {f"{name}_online": found[name] for name in ACCURACIES}
        found["untrained_linear_accuracy"] = found["linear_accuracy"]
    if not held_out and devices.rank_and_world()[0] == 0:
        write_similarity(folder / "similarity.npz", similarity(args, model, data))
    return found


def training_facts(folder: Path) -> dict[str, float | None]:
    """The keys that only training knows, from train.jsonl; a run of no epochs has its line of epoch 0 alone."""
    try:
        first, *epochs = files.read_lines(folder / "train.jsonl")
        last = epochs[-1] if epochs else first
        return {
            **{name: last[name] for name in DIAGNOSTICS},
            "train_loss": last.get("loss"),
            "clipped_fraction": last.get("clipped_fraction"),
            "examples_per_second": median(line["examples_per_second"] for line in epochs or [first]),
            "train_seconds": sum(line["seconds"] for line in epochs or [first]),
            "peak_memory": last["peak_memory"],
        }
    except (ValueError, KeyError) as error:
        fail(f"{folder / 'train.jsonl'} is damaged or empty ({error}): move {folder} away and train this run again")


def official_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an official file, pre-trained or fine-tuned (`model`, else `module`, else the file itself)."""
    torch.serialization.add_safe_globals([argparse.Namespace])  # the authors keep their flags in the file
    try:
        state = checkpoints.load(path)
    except FileNotFoundError:
        fail(f"--weights {path}: no such file")
    except files.DamagedFile as error:
        fail(f"--weights: {error}")
    state = state.get("model", state.get("module", state))
    if "patch_embed.proj.weight" not in state:
        fail(f"--weights {path}: no patch_embed.proj.weight in it; the first name is {next(iter(state), None)}")
    return state


def official(path: Path, network: str, data: Data, recipe: Recipe, folder: Path, held_out: bool) -> dict[str, Any]:
    """What an official file's network is worth: fine-tuned ones are only tested, pre-trained ones evaluated as a run's.

    The kind of position and LayerScale follow from the names and values in the file.
    """
    state = official_weights(path)
    positions = ("absolute" if not any("relative_position_bias_table" in name for name in state) else
                 "both" if "pos_embed" in state else "relative")  # fmt: skip
    args = train.parse_args(["--scale", "paper", "--network", network, "--positions", positions])
    shape = NETWORKS[network]
    if "head.weight" in state and "mask_token" not in state:
        kept = {name: one for name, one in state.items() if not name.endswith("relative_position_index")}
        model = Classifier(args.size, *shape, 0.1, positions, data.classes).to(data.device)
        checkpoints.fit(model, kept, path)
        return {"finetune_accuracy": accuracy(model, data)}
    vit = ViT(args.size, *shape, 0.1, positions).to(data.device)
    named = {name[4:]: one for name, one in net.from_official(state).items() if name.startswith("vit.")}
    checkpoints.fit(vit, named, path)
    return evaluate(args, recipe, {"": Features(vit)}, data, folder, held_out)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.weights:
        run_args, saved, facts = train.parse_args(["--scale", "paper"]), None, {}
    else:
        arguments, facts, saved = load_finished(args.folder, "conmim/train.py")
        run_args, facts = argparse.Namespace(**arguments), {**training_facts(args.folder), **facts}
    torch.set_num_threads(args.threads or run_args.threads)
    name = args.device or run_args.device
    device = devices.select_device(name, run_args.scale)
    rank, _ = devices.start_ranks(name, device)
    started, folder = time.perf_counter(), args.data or Path(run_args.data)
    recipe = {name: row[cli.SCALES.index(run_args.scale)] for name, row in RECIPES.items()}
    now = f"batches of 500 images, {recipe['batch']} in fine-tuning"
    with (
        run_lock(args.folder, rank),
        devices.memory_for(device, now, "A --device with more memory gives the same metrics"),
    ):
        data = images.load_or_stream(run_args.data_set, folder, run_args.size, device, run_args.workers)
        if data.digest != facts.get("data", data.digest):
            fail(f"--data {folder} is not what {args.folder} was trained on (digest {data.digest[:12]}): give that")
        if args.held_out and isinstance(data, image_folder.StreamedImages):
            fail("--held-out is for data that live on the device: up to 64 pixels")
        if run_args.rehearse:
            data, recipe = data.subset(run_args.rehearse * run_args.batch), recipe | {"epochs": 1, "warm_up": 0}
        metrics: dict[str, Any] = {**facts, "diverged": bool(saved and saved["diverged"])}
        if args.weights:
            metrics |= official(args.weights, args.network, data, recipe, args.folder, args.held_out)
            metrics["weights"] = args.weights.name
        elif metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            metrics |= evaluate_run(run_args, recipe, saved["model"], data, args.folder, args.held_out)
        if saved:
            metrics["loss_floor"] = train.loss_floor(train.patch_count(run_args), run_args.temperature)
        metrics["seconds"] = facts.get("train_seconds", 0.0) + time.perf_counter() - started
        if rank == 0:
            files.write_json(args.folder / ("held_out.json" if args.held_out else "metrics.json"), metrics)
            (args.folder / "eval_state.pt").unlink(missing_ok=True)
            shown = (f"{name} {metrics[name]:.4g}" for name in METRICS_IF_FINITE if metrics.get(name) is not None)
            print(f"{args.folder}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
