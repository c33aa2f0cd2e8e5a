"""A teacher for CoCoRD: one network, trained by cross-entropy alone, measured, and kept for all students and seeds.

    python cocord/teacher.py --out runs/teacher                                    # the demo's, about 15 s of one core
    python cocord/teacher.py --scale gpu --network vgg13 --out runs/vgg13          # CIFAR-100, 240 epochs
    make cocord-teachers SCALE=gpu                                                 # all that the studies need

The recipe is the students': SGD, one crop of every image, and the rate of the papers that share these networks. A run
like any other (args.json, train.jsonl, exact resume), which also writes its own metrics.json. The host of the published
teachers answers no more; whoever has their files gives them to train.py as --weights.
"""

import argparse
import functools
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord import net
from cocord.train import VIEWS, Made, accuracy, batches, build_optimizer, load_data, optimisation_flags, rate_factor
from common import checkpoints, cli, devices, draws, files, images
from common.hold import held
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
    run: Run, network: nn.Module, data: images.Images, made: Made, optimizer: torch.optim.Optimizer, *, epochs: int,
    last: int, batch: int, lr: float, precision: str,
) -> None:  # fmt: skip
    """The training up to epoch `last` of `epochs`; saves after each, and goes on from there when started again."""

    def state() -> dict[str, Any]:
        return {"model": network.state_dict(), "optimizer": optimizer.state_dict()}

    saved, steps = run.state(data.device), -(-data.examples // batch)
    if saved is None:
        run.save(0, {}, state())
    else:
        checkpoints.fit(network, saved["model"], run.folder)
        optimizer.load_state_dict(saved["optimizer"])
    for epoch in tqdm(range(saved["epoch"] if saved else 0, last), run.name, disable=None, leave=False):
        started, seen, total = time.perf_counter(), 0, torch.zeros((), device=data.device)
        for number, ((x,), labels) in enumerate(made(epoch)):
            optimizer.param_groups[0]["lr"] = lr * rate_factor((epoch + number / steps) / epochs)
            with devices.autocast(precision, data.device):
                logits = network(x)[1]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total.add_(loss.detach(), alpha=len(labels))
            seen += len(labels)
        mean_loss = (total / seen).item()  # asks the device, once an epoch
        seconds = time.perf_counter() - started
        if not devices.finite_on_all_ranks([*network.state_dict().values(), total]):
            run.diverge(epoch + 1, data.device)
            return
        record = {
            "loss": mean_loss,
            "test_accuracy": accuracy(network, data),
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": seen / seconds,
            "seconds": seconds,
            "peak_memory": devices.peak_memory(data.device),
        }
        run.save(epoch + 1, record, state())
        run.say(epoch + 1, last, record)
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
    run.finish({"model": network.state_dict(), "epoch": last, "diverged": False, "accuracy": measured})


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = devices.choose(args.device, args.scale)
    smaller = f"--batch {args.batch // 2} needs about half, but is another run"
    with held(args.out), devices.memory_for(device, f"--batch {args.batch}", smaller):
        run = Run(args.out, vars(args), __file__, args.replace)
        if run.finished:
            return
        data = load_data(args.data_set, args.data, args.held_out, device)
        kind = next(kind for name, kind in VIEWS.items() if args.data_set.startswith(name))
        steps, last = -(-data.examples // args.batch), args.epochs
        run.begin(devices.facts(device) | {"data": data.digest, "steps": args.epochs * steps})
        if args.rehearse:
            data, last = data.few(args.rehearse * args.batch), min(2, args.epochs)
        with draws.forked(args.seed, "teacher"):
            network = net.build(args.network, data.classes)
        network.to(memory_format=torch.channels_last).to(device)
        optimizer = build_optimizer([network], args.lr, args.weight_decay)
        made = functools.partial(batches, data, kind, 1, args.batch, args.seed)
        train(
            run, network, data, made, optimizer, epochs=args.epochs, last=last, batch=args.batch, lr=args.lr,
            precision=args.precision,
        )  # fmt: skip


if __name__ == "__main__":
    main()
