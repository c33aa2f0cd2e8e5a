"""What a CoCoRD run has learnt: accuracies of the student and of the slow student, written to metrics.json.

    python cocord/eval.py runs/scratch                                 # a finished run of train.py

`accuracy` is the last epoch's, on the test split, in eval mode; `accuracy_best_epoch` is chosen on that split and
therefore optimistic. What only training sees (cosines, contrastive accuracy: means over the last epoch's batches; key
consistency: mean over the epochs) comes from train.jsonl.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord.train import accuracy, build_model, kept, load_data
from common import checkpoints, cli, devices, files
from common.cli import fail
from common.lock import run_lock
from common.run import load_finished

METRICS_IF_FINITE = (  # of a diverged run they are null
    *("accuracy", "accuracy_best_epoch", "accuracy_slow_student", "contrastive_accuracy", "positive_cosine"),
    *("negative_cosine", "key_consistency", "teacher_head_shift", "train_loss", "train_accuracy"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("--data", type=Path, help="where the data lie; default: as in training")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: as in training")
    parser.add_argument("--threads", type=cli.int_min(1), help="default: as in training")
    return parser.parse_args(argv)


def training_facts(log: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """The keys that only training knows, from the lines of train.jsonl; None where an arm has no such part."""
    first, epochs = log[0], log[1:]
    last = epochs[-1] if epochs else {}
    contrasted = ("contrastive_accuracy", "positive_cosine", "negative_cosine", "teacher_head_shift")
    found = {name: last.get(name) if arguments["lambda_contrast"] else None for name in contrasted}
    consistent = [line["key_consistency"] for line in epochs] if arguments["lambda_contrast"] else []
    return {
        **found,
        "key_consistency": mean(consistent) if consistent else None,
        "teacher_accuracy": first["teacher_accuracy"],
        "accuracy_best_epoch": max((line["test_accuracy"] for line in epochs), default=None),
        "train_loss": last.get("loss"),
        "train_accuracy": 100 * last["train_accuracy"] if last else None,
        "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
        "train_seconds": sum(line["seconds"] for line in epochs),
        "peak_memory": last.get("peak_memory"),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    arguments, facts, saved = load_finished(args.folder, "cocord/train.py")
    try:
        told = training_facts(files.read_lines(args.folder / "train.jsonl"), arguments)
    except (files.DamagedFile, IndexError, KeyError) as error:
        fail(f"{args.folder / 'train.jsonl'} is damaged ({error}): move {args.folder} away and train this run again")
    torch.set_num_threads(args.threads or arguments["threads"])
    device = devices.select_device(args.device or arguments["device"], arguments["scale"])
    started, folder = time.perf_counter(), args.data or Path(arguments["data"])
    elsewhere = "A --device with more memory, or --device cpu, gives the same metrics"
    with run_lock(args.folder), devices.memory_for(device, "batches of 500 images", elsewhere):
        metrics: dict[str, Any] = {**told, **facts, "diverged": saved["diverged"]}
        if metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            data = load_data(arguments["data_set"], folder, arguments["held_out"], device)
            if data.digest != facts["data"]:
                fail(f"--data {folder} is not what {args.folder} was trained on (digest {data.digest[:12]}): give that")
            if arguments["rehearse"]:
                data = data.subset(arguments["rehearse"] * arguments["batch"])
            model = build_model(argparse.Namespace(**arguments), data.classes, device)
            networks = torch.nn.ModuleDict({"student": model.student, "slow_student": model.slow_student})
            checkpoints.fit(networks, kept(saved["model"]), args.folder / "model.pt")
            followed = arguments["forward_weight"] or arguments["swapped_weight"]
            metrics |= {
                "accuracy": accuracy(model.student, data),
                "accuracy_slow_student": accuracy(model.slow_student, data) if followed else None,
            }
        metrics["seconds"] = told["train_seconds"] + time.perf_counter() - started
        files.write_json(args.folder / "metrics.json", metrics)
        shown = (f"{name} {metrics[name]:.4g}" for name in METRICS_IF_FINITE if metrics.get(name) is not None)
        print(f"{args.folder}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
