"""Evaluate a SimSiam run: linear probe, kNN accuracy and collapse metrics, written to metrics.json.

    python simsiam/eval.py runs/scratch                                # a finished run of train.py
    python simsiam/eval.py runs/official --weights checkpoint.pth.tar --data ImageNet   # the authors' checkpoint

Features are the output of the backbone (pool5, appendix A). No hyper-parameter is selected on the test set. Up to 64
pixels the linear probe is trained on precomputed, standardised features and selects its learning rate on a held-out
tenth of the training set. Above 64 pixels it is the paper's linear evaluation: LARS, batch size 4096, 90 epochs, random
crops and flips, base learning rate 0.1 as in the authors' code (the paper gives 0.02, with which PyTorch users report
about two points less).
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

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, cli, devices, files, image_folder, images, probes, schedules, seeding
from common.cli import fail
from common.images import Data
from common.lock import run_lock
from common.run import check_data, load_finished, read_log, write_metrics
from common.weights import read_weights
from simsiam import train
from simsiam.train import Features, SimSiam, build_model, extract_features, representation_metrics

PREFIXES = ("encoder.", "backbone.")  # of parameter names in checkpoints
METRICS_IF_FINITE = (  # null if the run diverged
    "linear_accuracy",
    "untrained_linear_accuracy",
    "knn_accuracy",
    "knn_accuracy_z",
    "train_loss",
    "std_ratio",
    "std_ratio_train_mode",
    "mean_cosine",
    "effective_rank",
)
PROBE = {"epochs": 90, "batch": 4096, "lr": 0.1}  # above 64 pixels: appendix A and the authors' code


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; None means the value used in training."""
    parser = cli.eval_parser(__doc__)
    parser.add_argument("--weights", type=Path, help="evaluate this checkpoint of the authors (ResNet-50); the "
                        "folder is for the output")  # fmt: skip
    parser.add_argument("--workers", type=cli.int_in(0, cli.MAX_WORKERS), help="DataLoader workers for image folders; "
                        "default: as in training")  # fmt: skip
    parser.add_argument("--held-out", action="store_true", help="evaluate on a tenth of the training set, for tuning; "
                        "pre-training used these images, without labels")  # fmt: skip
    return parser.parse_args(argv)


def read_authors_checkpoint(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts {"backbone": ..., "projector": ...} of the authors' checkpoint in `path`.

    Names begin with one of PREFIXES; the projector is called `fc`. Names without a prefix, such as the predictor's, are
    ignored. Exits with code 2 if the file cannot be read, or if no name has a prefix, as in a linear-probe checkpoint
    of the authors.
    """
    state = read_weights(path, "--weights", "the authors' checkpoint (ResNet-50)").tensors
    backbone: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        prefix = next((prefix for prefix in PREFIXES if full_name.startswith(prefix)), None)
        if prefix is None:
            continue
        name = full_name.removeprefix(prefix)
        if name.startswith("fc."):
            projector[name.removeprefix("fc.")] = tensor
        else:
            backbone[name] = tensor
    if not backbone:
        first = next(iter(state), None)
        fail(f"--weights {path}: no parameter name begins with {', '.join(PREFIXES)} (the first is {first}): "
             "give the authors' checkpoint (ResNet-50)")  # fmt: skip
    if "layer1.0.conv2.weight" in backbone and "layer1.0.conv3.weight" not in backbone:
        fail(f"--weights {path} is a ResNet-18 or ResNet-34: give the authors' checkpoint (ResNet-50)")
    return {"backbone": backbone, "projector": projector}


def digest(module: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers of a module."""
    return checkpoints.sha256(*(tensor.detach().float().cpu() for tensor in module.state_dict().values()))


def scale_gradients_lars(parameters: list[nn.Parameter], trust: float = 0.001) -> None:
    """Scale the gradients in place by LARS as in the authors' linear probe (LARC without clipping or weight decay).

    The gradient g of a tensor w becomes g * trust * |w| / (|g| + 1e-8) if both norms are non-zero. The zero-initialised
    bias is therefore not scaled in the first step. A plain SGD step follows.
    """
    for weight in parameters:
        assert weight.grad is not None
        weight_norm, grad_norm = weight.detach().norm(), weight.grad.norm()
        factor = trust * weight_norm / (grad_norm + 1e-8)
        weight.grad.mul_(torch.where((weight_norm > 0) & (grad_norm > 0), factor, torch.ones_like(factor)))


def linear_probe_lars(
    model: SimSiam, data: image_folder.StreamedImages, folder: Path, seed: int, probe: dict[str, Any]
) -> float:
    """Return the test accuracy in percent of the paper's linear evaluation, after the last epoch.

    `probe` has the keys of PROBE; its batch size is reduced for a smaller training set. Resumes from eval_state.pt in
    `folder`, which is saved after each epoch.
    """
    device = data.device
    rank, world = devices.rank_and_world()
    epochs = probe["epochs"]
    batch = min(probe["batch"], data.examples // world * world)
    lr = probe["lr"] * batch / 256
    steps_per_epoch = data.examples // batch
    rows = devices.rows_of_rank(batch)
    labels = torch.tensor(data.train.targets)
    transform = v2.Compose([v2.RandomResizedCrop(data.size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    with seeding.seeded_fork_rng(seed, "linear probe"):
        head = nn.Linear(model.width, data.classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    start_epoch, path = 0, folder / "eval_state.pt"
    identity = f"{digest(model.backbone)} {data.digest} {sorted(probe.items())}"
    try:
        state = checkpoints.load(path, device)
    except FileNotFoundError:
        state = {}
    except files.DamagedFile as error:
        fail(f"{error}: remove the file to restart the linear probe")
    if state.get("identity") == identity:  # otherwise it belongs to other weights, data or settings
        checkpoints.load_weights(head, state["head"], path)
        optimizer.load_state_dict(state["optimizer"])
        start_epoch = state["epoch"]
    model.eval()  # keeps the running statistics of the batch norms
    for epoch in range(start_epoch, epochs):
        optimizer.param_groups[0]["lr"] = lr * schedules.cosine(epoch / epochs)
        order = seeding.permutation(seed, "linear probe order", epoch, data.examples, "cpu")
        order = order[: steps_per_epoch * batch].view(steps_per_epoch, batch)[:, rows]
        for indices, (x,) in zip(order, data.views(transform, 1, order.tolist(), seed, epoch), strict=True):
            with torch.no_grad():  # in parts, to limit memory
                parts = x.split(image_folder.BLOCK)
                features = torch.cat([model.backbone(data.normalise(part)) for part in parts])
            loss = F.cross_entropy(head(features), devices.upload(labels[indices], device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in head.parameters():
                devices.mean_over_ranks(parameter.grad)
            scale_gradients_lars(list(head.parameters()))
            optimizer.step()
        if rank == 0:
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            checkpoints.save(path, {**state, "identity": identity})
    test = extract_features(model, data, "test")
    return 100.0 * (head(test.backbone).argmax(1) == test.labels).float().mean().item()


def features_of_splits(model: SimSiam, data: Data, held_out: bool) -> tuple[Features, Features]:
    """Return the features of the training and the test set.

    With `held_out` the test set is a held-out tenth of the training set, and the rest is the training set. Pre-training
    used the images of both, without labels.
    """
    bank = extract_features(model, data, "train")
    if not held_out:
        return bank, extract_features(model, data, "test")
    if len(bank.labels) < 20:
        fail(f"--held-out needs at least 20 training images, not {len(bank.labels)}: evaluate without it")
    rest, tenth = seeding.held_out_split(len(bank.labels), data.device, data.data_seed)
    return Features(*(rows[rest] for rows in bank)), Features(*(rows[tenth] for rows in bank))


def linear_accuracy(bank: Features, queries: Features, data: Data, seed: int) -> float:
    """Return the accuracy in percent of a linear probe on backbone features, trained on `bank`, tested on `queries`."""
    selection_indices = seeding.held_out_split(len(bank.labels), data.device, data.data_seed)
    train_set, test_set = (probes.Labelled(split.backbone, split.labels) for split in (bank, queries))
    return probes.linear_accuracy(train_set, test_set, data.classes, selection_indices, seed)


def evaluate(args: argparse.Namespace, model: SimSiam, data: Data, held_out: bool, folder: Path) -> dict[str, float]:
    """Return linear and kNN accuracy in percent and the collapse metrics of z, in eval mode.

    `args` are the arguments of the training run. `held_out`: see `features_of_splits`. `folder` is for the state of
    the linear probe. The linear accuracy of the untrained network is included for images of at most 64 pixels. Its
    batch norms have their initial statistics; those of epoch 0 in train.jsonl are estimated (`untrained_metrics`).
    """
    bank, queries = features_of_splits(model, data, held_out)
    metrics = representation_metrics(bank, queries, data.classes, args.neighbours)
    if isinstance(data, image_folder.StreamedImages):
        del bank, queries  # free memory that the probe does not need
        probe = PROBE | ({"epochs": 1} if args.rehearse else {})
        return {"linear_accuracy": linear_probe_lars(model, data, folder, args.seed, probe), **metrics}
    metrics = {"linear_accuracy": linear_accuracy(bank, queries, data, args.seed), **metrics}
    bank, queries = features_of_splits(build_model(args, data.device), data, held_out)
    return metrics | {"untrained_linear_accuracy": linear_accuracy(bank, queries, data, args.seed)}


def std_ratio_at_collapse(args: argparse.Namespace) -> float | None:
    """Return the train-mode std ratio if all rows of z but one are equal: 2 sqrt((1/B)(1 - 1/B)) in a batch of B.

    It is not 0, because a batch norm without affine parameters gives each channel variance 1. None if z does not come
    from this batch norm.
    """
    share = 1 / args.batch
    affine_free = args.projector != "none" and args.head_bn == "default"
    return 2 * (share * (1 - share)) ** 0.5 if affine_free else None


def training_metrics(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return metrics from train.jsonl: those of the last epoch, and of the untrained network (epoch 0).

    `train_seconds` does not include the evaluations between epochs (kNN, collapse).
    """
    first, *epochs = log
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
        arguments, saved, recorded = vars(train.parse_args(["--scale", "paper"])), None, {}
    else:
        arguments, provenance, saved = load_finished(args.folder, __file__)
        recorded = {**training_metrics(read_log(args.folder, saved["epoch"])), **provenance}
    torch.set_num_threads(args.threads or arguments["threads"])
    device_name = args.device or arguments["device"]
    device = devices.select_device(device_name, arguments["scale"], distributed=True)
    rank, _ = devices.init_process_group(device_name, device)
    start_time = time.perf_counter()
    data_folder = args.data or Path(arguments["data"])
    streamed = arguments["size"] > images.MAX_IN_MEMORY_PIXELS
    usage = f"batches of {image_folder.BLOCK if streamed else images.BLOCK} images"
    remedy = "use a --device with more memory, or --device cpu (same metrics)"
    with run_lock(args.folder, rank), devices.report_oom(device, usage, remedy):
        data = images.load_or_stream(
            arguments["data_set"],
            data_folder,
            arguments["size"],
            device,
            arguments["workers"] if args.workers is None else args.workers,
            arguments["data_seed"],
        )
        check_data(data.digest, recorded.get("data"), data_folder, args.folder)
        if args.held_out and isinstance(data, image_folder.StreamedImages):
            fail("--held-out requires images of at most 64 pixels: evaluate without it")
        if arguments["rehearse"]:
            data = data.subset(arguments["rehearse"] * arguments["batch"])
        run_args = argparse.Namespace(**arguments)
        model = build_model(run_args, device)
        if saved:
            checkpoints.load_weights(model, saved["model"], args.folder / "model.pt")
        else:
            for name, state in read_authors_checkpoint(args.weights).items():
                part = f"the {name} of SimSiam with ResNet-50"
                checkpoints.load_weights(getattr(model, name), state, f"--weights {args.weights}", part)
        metrics: dict[str, Any] = {**recorded, "diverged": bool(saved and saved["diverged"])}
        if metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            metrics |= evaluate(run_args, model, data, args.held_out, args.folder)
        metrics["std_ratio_at_collapse"] = std_ratio_at_collapse(run_args)
        if args.weights:
            metrics["weights"] = f"{args.weights.name}, backbone sha256 {digest(model.backbone)}"
        metrics["seconds"] = recorded.get("train_seconds", 0.0) + time.perf_counter() - start_time
        if rank == 0:
            file = args.folder / ("held_out.json" if args.held_out else "metrics.json")
            write_metrics(file, metrics, METRICS_IF_FINITE)
            (args.folder / "eval_state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
