"""What a SimSiam run has learnt: linear probe, kNN and the meters of collapse, written to metrics.json.

    python simsiam/eval.py runs/scratch                                # a finished run of train.py
    python simsiam/eval.py runs/official --weights checkpoint.pth.tar --data ImageNet   # released weights

Features are the backbone's (section 3.1 of the paper: before the projector), the test split is used for measuring
alone; the linear probe chooses its learning rate on a fixed tenth of the training set. Up to 64 pixels the probe runs
on features computed once, standardised without affine. At 224 pixels it is the paper's: LARS, batch 4096, 90 epochs,
random crops and flips, base rate 0.1 (the authors' code; the paper prints 0.02, with which PyTorch users lose about
two points).
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, files, image_folder, images, probes, schedules, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import load_finished
from simsiam import train
from simsiam.train import SimSiam, build_model, measure, represent

PREFIXES = ("module.encoder.", "encoder.", "module.backbone.", "backbone.")
METRICS_IF_FINITE = (  # of a diverged run they are null
    *("linear_accuracy", "knn_accuracy", "knn_accuracy_z", "train_loss", "std_ratio", "std_ratio_train_mode"),
    *("mean_cosine", "effective_rank"),
)
PROBE = {"epochs": 90, "batch": 4096, "lr": 0.1}  # appendix A and the authors' code, at 224 pixels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run; with --weights: where metrics.json goes")
    parser.add_argument("--weights", type=Path, help="an official checkpoint (ResNet-50) instead of the folder's model")
    parser.add_argument("--data", type=Path, help="where the data lie; default: as in training")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: as in training")
    parser.add_argument("--threads", type=cli.int_min(1), help="default: as in training")
    parser.add_argument(
        "--held-out", action="store_true", help="measure on the training set's held-out tenth: for tuning"
    )
    return parser.parse_args(argv)


def official_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """State of backbone and projector from a checkpoint under the authors' names (PREFIXES, projector in `fc`).

    Returns {"backbone": ..., "projector": ...}; linear-probe heads and predictors are left out. Stops (exit 2) where
    no known name is found.
    """
    try:
        state = checkpoints.load(path)
    except FileNotFoundError:
        fail(f"--weights {path}: no such file")
    except files.DamagedFile as error:
        fail(f"--weights: {error}")
    state = state.get("state_dict", state)
    found: dict[str, dict[str, Tensor]] = {"backbone": {}, "projector": {}}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix:
            short = name[len(prefix) :]
            part, short = ("projector", short[3:]) if short.startswith("fc.") else ("backbone", short)
            found[part][short] = tensor
    if not found["backbone"]:
        fail(f"--weights {path}: no name begins with {', '.join(PREFIXES)}; the first is {next(iter(state), None)}")
    return found


def digest(module: nn.Module) -> str:
    """sha256 over all tensors of a module."""
    return checkpoints.sha256(*(tensor.detach().float().cpu() for tensor in module.state_dict().values()))


def scale_gradients_by_layer(parameters: list[nn.Parameter], trust: float = 0.001) -> None:
    """LARS as the official linear probe uses it (LARC without clipping), before a plain SGD step without decay.

    Every gradient g of a tensor w becomes g * trust * |w| / (|g| + 1e-8), where both norms are non-zero: the
    zero-initialised bias therefore takes its first step unscaled.
    """
    for weight in parameters:
        assert weight.grad is not None
        size, slope = weight.detach().norm(), weight.grad.norm()
        factor = trust * size / (slope + 1e-8)
        weight.grad.mul_(torch.where((size > 0) & (slope > 0), factor, torch.ones_like(factor)))


def probe_at_full_size(
    model: SimSiam, data: image_folder.StreamedImages, folder: Path, seed: int, probe: dict[str, Any]
) -> float:
    """The paper's linear evaluation: test accuracy in percent after the last epoch. Goes on from eval_state.pt.

    `probe` has the keys of PROBE. Its batch is cut to what a small training set has, in whole rows for each rank.
    """
    device, (rank, world) = data.device, devices.rank_and_world()
    epochs, batch = probe["epochs"], min(probe["batch"], data.examples // world * world)
    lr, steps = probe["lr"] * batch / 256, data.examples // batch
    rows, labels = devices.rows_of_rank(batch), torch.tensor(data.train.targets)
    transform = v2.Compose([v2.RandomResizedCrop(data.size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    with seeding.forked(seed, "linear probe"):
        head = nn.Linear(model.width, data.classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    first, path = 0, folder / "eval_state.pt"
    identity = digest(model.backbone)
    try:
        state = checkpoints.load(path, device)
    except FileNotFoundError:
        state = {}
    except files.DamagedFile as error:
        fail(f"{error}: remove it to begin the probe again")
    if state.get("features") == identity:  # else it is the probe of other weights
        checkpoints.fit(head, state["head"], path)
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    model.eval()  # the batch norms' statistics stay as trained
    for epoch in range(first, epochs):
        optimizer.param_groups[0]["lr"] = lr * schedules.cosine(epoch / epochs)
        order = seeding.permutation(seed, "linear probe order", epoch, data.examples, "cpu")
        order = order[: steps * batch].view(steps, batch)[:, rows]
        for picked, (x,) in zip(order, data.views(transform, 1, order.tolist(), seed, epoch), strict=True):
            with torch.no_grad():
                features = model.backbone(data.normalise(x))
            loss = F.cross_entropy(head(features), devices.upload(labels[picked], device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in head.parameters():
                devices.mean_over_ranks(parameter.grad)
            scale_gradients_by_layer(list(head.parameters()))
            optimizer.step()
        if rank == 0:
            done = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            checkpoints.save(path, {**done, "features": identity})
    features, _, truth = represent(model, data, "test")
    return 100.0 * (head(features).argmax(1) == truth).float().mean().item()


def evaluate(model: SimSiam, data: Data, settings: dict[str, Any], held_out: bool, folder: Path) -> dict[str, float]:
    """Accuracies in percent and the spread of z, in eval mode; with `held_out` on the training set's tenth."""
    seed, classes = settings["seed"], data.classes
    bank = represent(model, data, "train")
    if held_out:
        rest, tenth = seeding.held_out_split(len(bank[0]), data.device)
        bank, queries = [rows[rest] for rows in bank], [rows[tenth] for rows in bank]
    else:
        queries = represent(model, data, "test")
    if isinstance(data, image_folder.StreamedImages):
        probe = PROBE | ({"epochs": 1} if settings["rehearse"] else {})
        linear = probe_at_full_size(model, data, folder, seed, probe)
    else:
        parts = seeding.held_out_split(len(bank[0]), data.device)
        train_set, test_set = (probes.Labelled(features, labels) for features, _, labels in (bank, queries))
        linear = probes.linear_accuracy(train_set, test_set, classes, parts, seed)
    return {"linear_accuracy": linear, **measure(bank, queries, classes, settings["neighbours"])}


def training_facts(folder: Path) -> dict[str, float | None]:
    """The keys that only training knows, from train.jsonl: its last line, and the untrained values of epoch 0."""
    try:
        first, *epochs = files.read_lines(folder / "train.jsonl")
    except ValueError as error:
        fail(f"{folder / 'train.jsonl'} is damaged or empty ({error}): move {folder} away and train this run again")
    last = epochs[-1] if epochs else {}
    return {
        "train_loss": last.get("loss"),
        "std_ratio_train_mode": last.get("std_ratio_train_mode"),
        "untrained_knn_accuracy": first["knn_accuracy"],
        "untrained_std_ratio": first["std_ratio"],
        "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
        "train_seconds": sum(line["seconds"] for line in epochs),
        "peak_memory": last.get("peak_memory"),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.weights:
        arguments, saved, facts = vars(train.parse_args(["--scale", "paper"])), None, {}
    else:
        arguments, facts, saved = load_finished(args.folder, "simsiam/train.py")
        facts = {**training_facts(args.folder), **facts}
    torch.set_num_threads(args.threads or arguments["threads"])
    name = args.device or arguments["device"]
    device = devices.select_device(name, arguments["scale"])
    rank, _ = devices.start_ranks(name, device)
    started, folder = time.perf_counter(), args.data or Path(arguments["data"])
    elsewhere = "A --device with more memory, or --device cpu, gives the same metrics"
    with run_lock(args.folder, rank), devices.memory_for(device, "batches of 500 images", elsewhere):
        data = images.load_or_stream(arguments["data_set"], folder, arguments["size"], device, arguments["workers"])
        if data.digest != facts.get("data", data.digest):
            fail(f"--data {folder} is not what {args.folder} was trained on (digest {data.digest[:12]}): give that")
        if args.held_out and isinstance(data, image_folder.StreamedImages):
            fail("--held-out is for data that live on the device: up to 64 pixels")
        if arguments["rehearse"]:
            data = data.subset(arguments["rehearse"] * arguments["batch"])
        model = build_model(argparse.Namespace(**arguments), device)
        if saved:
            checkpoints.fit(model, saved["model"], args.folder / "model.pt")
        else:
            for part, state in official_weights(args.weights).items():
                checkpoints.fit(getattr(model, part), state, args.weights)
        metrics: dict[str, Any] = {**facts, "diverged": bool(saved and saved["diverged"])}
        if metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            metrics |= evaluate(model, data, arguments, args.held_out, args.folder)
        if args.weights:
            metrics["weights"] = f"{args.weights.name}, backbone sha256 {digest(model.backbone)}"
        metrics["seconds"] = facts.get("train_seconds", 0.0) + time.perf_counter() - started
        if rank == 0:
            files.write_json(args.folder / ("held_out.json" if args.held_out else "metrics.json"), metrics)
            (args.folder / "eval_state.pt").unlink(missing_ok=True)
            shown = (f"{name} {metrics[name]:.4g}" for name in METRICS_IF_FINITE if metrics.get(name) is not None)
            print(f"{args.folder}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
