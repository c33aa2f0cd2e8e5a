"""A teacher for CoCoRD: one network, trained by cross-entropy alone, measured, and kept for all students and seeds.

    python cocord/teacher.py --out runs/teacher                                    # the demo's, about 15 s of one core
    python cocord/teacher.py --scale gpu --network vgg13 --out runs/vgg13          # CIFAR-100, 240 epochs
    make cocord-teachers SCALE=gpu                                                 # all that the studies need

The recipe is the students': SGD, one crop of every image, and the rate of the papers that share these networks. A run
like any other (args.json, train.jsonl, exact resume), which also writes its own metrics.json. The host of the published
teachers answers no more; whoever has their files gives them to train.py as --weights.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord import net
from cocord.train import accuracy, batches, build_optimizer, load_data, optimisation_flags, rate_factor
from common import cli, devices, files, images, seeding
from common.lock import run_lock
from common.run import Run

SCALES = {  #    demo        gpu         paper
    "data_set": ("glyphs36", "cifar100", "cifar100"),
    "network":  ("vgg_s32",  "resnet56", "resnet56"),
    "epochs":   (5,          240,        240),
    "batch":    (32,         64,         64),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, resolved: `lr` is a number."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.NAMES)
    data.add_argument("--held-out", action="store_true", help="train on nine tenths, measure on the tenth: for tuning")
    optimisation_flags(parser)
    parser.add_argument("--network", choices=tuple(net.NETWORKS))
    args = cli.parse(parser, SCALES, argv)
    args.lr = (0.01 if args.network in net.MOBILE else 0.05) if args.lr is None else args.lr
    return args


def train(
    args: argparse.Namespace, run: Run, network: nn.Module, data: images.Images, optimizer: torch.optim.Optimizer
) -> None:
    """Train, or go on after the last saved epoch; save after each epoch."""
    last = min(2, args.epochs) if args.rehearse else args.epochs
    steps_per_epoch = -(-data.examples // args.batch)
    first = run.resume(network, optimizer)
    if first is None:
        run.end_epoch(0, last, {})

    for epoch in tqdm(range(first or 0, last), run.name, disable=None, leave=False):
        started, seen, total = time.perf_counter(), 0, torch.zeros((), device=data.device)
        for step, ((x,), labels) in enumerate(batches(args, data, epoch, views=1)):
            optimizer.param_groups[0]["lr"] = args.lr * rate_factor((epoch + step / steps_per_epoch) / args.epochs)
            with devices.autocast(args.precision, data.device):
                logits = network(x)[1]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total.add_(loss.detach(), alpha=len(labels))
            seen += len(labels)
        mean_loss = (total / seen).item()  # the epoch's only host-device synchronisation
        seconds = time.perf_counter() - started
        if run.diverged(epoch + 1, total):
            return
        record = {
            "loss": mean_loss,
            "test_accuracy": accuracy(network, data),
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": seen / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, last, record)
    measured = accuracy(network, data)
    lines = files.read_lines(run.folder / "train.jsonl")[1:]
    metrics = {
        "accuracy": measured,
        "accuracy_best_epoch": max(line["test_accuracy"] for line in lines),
        "examples_per_second": median(line["examples_per_second"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
        "peak_memory": lines[-1]["peak_memory"],
        "diverged": False,
    }
    files.write_json(run.folder / "metrics.json", metrics)
    run.save_model({"model": network.state_dict(), "epoch": last, "diverged": False, "accuracy": measured})


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
        run.write_config(
            f"{args.data_set}, {args.network}",
            devices.environment(device) | {"data": data.digest, "steps": args.epochs * -(-data.examples // args.batch)},
        )
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        with seeding.forked(args.seed, "teacher"):
            network = net.build(args.network, data.classes)
        network.to(memory_format=torch.channels_last).to(device)
        optimizer = build_optimizer(args, [network])
        train(args, run, network, data, optimizer)


if __name__ == "__main__":
    main()
