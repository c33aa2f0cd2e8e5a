"""Evaluate a finished CoCoRD run: test accuracy of the student and of the slow student, written to metrics.json.

    python cocord/eval.py runs/scratch                                 # a finished run of train.py

`accuracy` is the test accuracy after the last epoch. `accuracy_best_epoch` is the best epoch on the test split, and
therefore optimistic. Metrics of the training come from train.jsonl: cosines and contrastive accuracy are means over the
batches of the last epoch. Two metrics use the teacher's keys of 256 training images without augmentation:
`key_consistency` is the cosine between the keys of the same image in consecutive epochs, averaged over all epochs, and
`key_cosine` that between the keys of different images after the last epoch. Keys that all point in one direction are
consistent, too. `teacher_head_shift` is the norm of the change of the teacher head's weight matrices since
initialisation, divided by their initial norm. Only matrices that are an EMA count: both, or with --teacher-head partial
at unequal feature widths only the second; if the head is frozen, the change is 0. Accuracies are percent, but
`contrastive_accuracy`, and `train_accuracy` in train.jsonl, are fractions.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cocord.train import accuracy, build_model, load_data, student_weights
from common import checkpoints, cli, devices, images
from common.lock import run_lock
from common.run import check_data, load_finished, read_log, write_metrics

KEY_METRICS = (  # need a contrastive loss
    "contrastive_accuracy",
    "positive_cosine",
    "negative_cosine",
    "key_consistency",
    "key_cosine",
    "teacher_head_shift",
)
METRICS_IF_FINITE = (  # null in metrics.json of a diverged run
    "accuracy",
    "accuracy_best_epoch",
    "accuracy_slow_student",
    *KEY_METRICS,
    "train_loss",
    "train_accuracy",
)


def training_metrics(log: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that are measured during training, from the lines of train.jsonl.

    Metrics of the keys are None if the run has no contrastive loss.
    """
    start, epochs = log[0], log[1:]
    last = epochs[-1] if epochs else {}
    key_metrics: dict[str, Any] = dict.fromkeys(KEY_METRICS)
    if arguments["lambda_contrast"] and epochs:
        key_metrics = {name: last.get(name) for name in key_metrics}
        key_metrics["key_consistency"] = mean(line["key_consistency"] for line in epochs)
    return {
        **key_metrics,
        "teacher_accuracy": start["teacher_accuracy"],
        "accuracy_best_epoch": max((line["test_accuracy"] for line in epochs), default=None),
        "train_loss": last.get("loss"),
        "train_accuracy": 100 * last["train_accuracy"] if last else None,
        "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
        "train_seconds": sum(line["seconds"] for line in epochs),
        "peak_memory": last.get("peak_memory"),
    }


def main(argv: list[str] | None = None) -> None:
    args = cli.eval_parser(__doc__).parse_args(argv)
    arguments, provenance, saved = load_finished(args.folder, __file__)
    from_log = training_metrics(read_log(args.folder, saved["epoch"]), arguments)
    torch.set_num_threads(args.threads or arguments["threads"])
    device = devices.select_device(args.device or arguments["device"], arguments["scale"])
    start_time = time.perf_counter()
    data_folder = args.data or Path(arguments["data"])
    remedy = "use a --device with more memory, or --device cpu (same metrics)"
    with run_lock(args.folder), devices.report_oom(device, f"batches of {images.BLOCK} images", remedy):
        metrics: dict[str, Any] = {**from_log, **provenance, "diverged": saved["diverged"]}
        if metrics["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            data = load_data(arguments["data_set"], data_folder, arguments["held_out"], device, arguments["data_seed"])
            check_data(data.digest, provenance["data"], data_folder, args.folder)
            if arguments["rehearse"]:
                data = data.subset(arguments["rehearse"] * arguments["batch"])
            model = build_model(argparse.Namespace(**arguments), data.classes, device)
            networks = torch.nn.ModuleDict({"student": model.student, "slow_student": model.slow_student})
            checkpoints.load_weights(networks, student_weights(saved["model"]), args.folder / "model.pt")
            has_slow_student = arguments["forward_weight"] or arguments["swapped_weight"]
            metrics |= {
                "accuracy": accuracy(model.student, data),
                "accuracy_slow_student": accuracy(model.slow_student, data) if has_slow_student else None,
            }
        metrics["seconds"] = from_log["train_seconds"] + time.perf_counter() - start_time
        write_metrics(args.folder / "metrics.json", metrics, METRICS_IF_FINITE)


if __name__ == "__main__":
    main()
