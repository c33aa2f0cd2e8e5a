"""Train a teacher for CoCoRD by cross-entropy. All students on the same data (--data-seed) use the same teacher.

    python cocord/teacher.py --out runs/teacher                                    # demo, 30 s on a CPU core
    python cocord/teacher.py --scale gpu --network vgg13 --out runs/vgg13          # CIFAR-100, 240 epochs
    make cocord-teachers SCALE=gpu                                                 # all teachers of the studies

The recipe is that of the students: SGD, one random crop per image, and RepDistiller's learning rates. The run folder
contains args.json, train.jsonl, model.pt and metrics.json; an interrupted run resumes exactly. The download server of
RepDistiller's teachers is offline. If you have their checkpoints, give them to train.py as --weights.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord import net
from cocord.train import (
    HELD_OUT_HELP,
    accuracy,
    batches,
    build_optimizer,
    load_data,
    lr_multiplier,
    optimisation_flags,
)
from common import cli, devices, files, images, seeding
from common.lock import run_lock
from common.run import Run, read_log

SCALES = {  #    demo             gpu         paper
    "data_set": ("glyphs36-hard", "cifar100", "cifar100"),
    "network":  ("vgg_s64",       "resnet56", "resnet56"),
    "epochs":   (12,              240,        240),
    "batch":    (32,              64,         64),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags and resolve them: `lr` becomes a number."""
    parser = cli.Parser(__doc__, SCALES)
    data = cli.run_flags(parser)
    data.add_argument("--data-set", choices=images.DATA_SETS, help="folder: --data contains train/CLASS/*, val/CLASS/*")
    data.add_argument("--held-out", action="store_true", help=HELD_OUT_HELP)
    optimisation_flags(parser)
    parser.add_argument("--network", choices=tuple(net.NETWORKS), help="teacher network")
    args = cli.parse(parser, SCALES, argv)
    if args.lr is None:
        args.lr = net.default_lr(args.network)
    return args


def train(
    args: argparse.Namespace, run: Run, network: nn.Module, data: images.Images, optimizer: torch.optim.Optimizer
) -> None:
    """Train to the last epoch. Saves the state after each epoch, and resumes from it."""
    final_epoch = min(2, args.epochs) if args.rehearse else args.epochs
    steps_per_epoch = math.ceil(data.examples / args.batch)
    start_epoch = run.resume(network, optimizer)
    if start_epoch is None:
        start_epoch = 0
        run.end_epoch(0, final_epoch, {})

    for epoch in tqdm(range(start_epoch, final_epoch), run.name, disable=None, leave=False):
        start_time = time.perf_counter()
        samples = 0
        loss_sum = torch.zeros((), device=data.device)
        for step, ((x,), labels) in enumerate(batches(args, data, epoch, n_views=1)):
            progress = (epoch + step / steps_per_epoch) / args.epochs
            optimizer.param_groups[0]["lr"] = args.lr * lr_multiplier(progress)
            with devices.autocast(args.precision, data.device):
                logits = network(x)[1]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum.add_(loss.detach(), alpha=len(labels))
            samples += len(labels)
        mean_loss = (loss_sum / samples).item()  # the first host-device synchronisation of the epoch
        seconds = time.perf_counter() - start_time
        if run.finish_if_diverged(epoch + 1, loss_sum):
            return
        epoch_metrics = {
            "loss": mean_loss,
            "test_accuracy": accuracy(network, data),
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": samples / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.end_epoch(epoch + 1, final_epoch, epoch_metrics)
    log = read_log(run.folder, final_epoch)[1:]
    final_accuracy = log[-1]["test_accuracy"]
    metrics = {
        "accuracy": final_accuracy,
        "accuracy_best_epoch": max(line["test_accuracy"] for line in log),
        "examples_per_second": median(line["examples_per_second"] for line in log),
        "seconds": sum(line["seconds"] for line in log),
        "peak_memory": log[-1]["peak_memory"],
        "runs_on_this_gpu": int(os.environ.get(cli.RUNS_ON_THIS_GPU, "1")),
        "diverged": False,
    }
    files.write_json(run.folder / "metrics.json", metrics)
    saved = {"model": network.state_dict(), "epoch": final_epoch, "diverged": False, "accuracy": final_accuracy}
    run.save_model(saved | {"data": data.digest})  # train.py refuses a teacher of other data


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.select_device(args.device, args.scale)
    remedy = f"use --batch {args.batch // 2} (about half the memory, different results)"
    with run_lock(args.out), devices.report_oom(device, f"--batch {args.batch}", remedy, args.precision):
        run = Run(vars(args), __file__)
        if run.finished:
            return
        data = load_data(args.data_set, args.data, args.held_out, device, args.data_seed)
        steps = args.epochs * math.ceil(data.examples / args.batch)
        provenance = devices.environment(device) | {"data": data.digest, "steps": steps}
        run.write_config(f"{args.data_set}, {args.network}", provenance)
        if args.rehearse:
            data = data.subset(args.rehearse * args.batch)
        with seeding.seeded_fork_rng(args.seed, "teacher"):
            network = net.build(args.network, data.classes)
        network.to(memory_format=torch.channels_last).to(device)
        optimizer = build_optimizer(args, [network])
        train(args, run, network, data, optimizer)


if __name__ == "__main__":
    main()
