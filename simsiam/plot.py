"""Draw the figures and write the tables and the finding of one SimSiam study.

    python simsiam/plot.py simsiam-stop-gradient --scale demo --seeds 0 1 2

Reads metrics.json and train.jsonl of the runs and evaluates nothing itself. Missing runs are left out and listed.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.study import figures, plotting, results
from simsiam.studies import CHANCE, METRICS, design

PLOTTED = ("linear_accuracy", "knn_accuracy", "train_loss", "std_ratio")
# Metrics that are also measured on the untrained network.
UNTRAINED = {
    "linear_accuracy": "untrained_linear_accuracy",
    "knn_accuracy": "untrained_knn_accuracy",
    "std_ratio": "untrained_std_ratio",
}


def collapsed(runs: list[dict[str, Any]]) -> str | None:
    """Return "collapsed in every seed", with the effective rank, by a rule that was declared beforehand; else None.

    In every run the train-mode std ratio is below the geometric mean of 1 (isotropic) and its value at collapse. The
    rule applies only to arms whose z comes from the affine-free batch norm, for which this value is known.
    """
    for run in runs:
        at_collapse = run["std_ratio_at_collapse"]
        if at_collapse is None or run["std_ratio_train_mode"] >= at_collapse**0.5:
            return None
    return f"collapsed in every seed (effective rank {mean(run['effective_rank'] for run in runs):.1f})"


def describe(runs: results.Runs) -> str:
    """Return data set, network, epochs and batch size of the first run as a caption; "" if there are no runs."""
    args = results.first_arguments(runs)
    if not args:
        return ""
    names = {
        "glyphs10": "glyphs (synthetic digits)",
        "mnist5k": "MNIST-5k (handwritten digits)",
        "cifar10": "CIFAR-10",
        "folder": f"images, {args['size']} px",
    }
    data = names.get(args["data_set"], args["data_set"])
    return f"{data}, {args['network']}, {args['epochs']} epochs, batch size {args['batch']}"


def same_sign(summary: dict[str, Any]) -> str:
    """Return a sentence: in how many primary contrasts linear and kNN accuracy change in the same direction."""
    means = {(item["arm"], item["metric"]): item["mean"] for item in summary["all_contrasts"]}
    pairs = [
        (means.get((item["arm"], "linear_accuracy")), item["mean"]) for item in summary["contrasts"] if item["primary"]
    ]
    compared = [linear * knn > 0 for linear, knn in pairs if linear is not None and knn is not None]
    count = f"{sum(compared)} of {len(compared)}"
    return f"Linear and kNN accuracy change in the same direction in {count} primary contrasts."


def curve_panels(runs: results.Runs, data_set: str) -> list[figures.Curves]:
    """Return the panels of training loss, kNN accuracy and std of z (train and eval mode) per epoch (cf. figure 2).

    Reference lines: std × √d is 1 for an isotropic z; its value at collapse: see `std_ratio_at_collapse` in eval.py.
    Without a projector z is not negative and cannot reach 1, so the value of the untrained network is shown.
    """
    isotropic, collapse = {"isotropic": 1.0}, {}
    if at_collapse := [value for arm in runs for value in results.values(runs, arm, "std_ratio_at_collapse").values()]:
        collapse["collapse"] = at_collapse[0]
    untrained = {}
    for arm, by_seed in runs.items():
        values = results.values(runs, arm, "untrained_std_ratio")
        if values and any(run.args and run.args["arguments"]["projector"] == "none" for run in by_seed.values()):
            untrained[f"{arm}\nuntrained"] = mean(values.values())
    accuracy = {"chance": CHANCE[data_set]} if data_set in CHANCE else {}
    before = [value for arm in runs for value in results.values(runs, arm, "untrained_knn_accuracy").values()]
    if before:
        accuracy["untrained"] = mean(before)
    panels = {
        "knn_accuracy": ("kNN accuracy (%)", accuracy),
        "loss": ("training loss", {}),
        "std_ratio_train_mode": ("std of z × √d, train mode", isotropic | collapse),
        "std_ratio": ("std of z × √d, eval mode", isotropic | untrained),
    }
    return [
        figures.Curves(f"{title}, {data_set}", results.series(runs, key), lines)
        for key, (title, lines) in panels.items()
    ]


def dot_panels(runs: results.Runs, data_set: str) -> list[figures.Dots]:
    """Return the panels of the four main metrics; hollow marks show the untrained network where it was measured."""
    return [
        figures.Dots(
            f"{METRICS[key].title}, {data_set}",
            results.values_by_arm(runs, key),
            results.values_by_arm(runs, UNTRAINED[key]) if key in UNTRAINED else {},
            {"chance": CHANCE[data_set]} if "accuracy" in key and data_set in CHANCE else {},
        )
        for key in PLOTTED
    ]


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study by name: "curves", "metrics" and "summary"."""
    arguments = results.first_arguments(view.runs)
    panels = curve_panels(view.runs, arguments["data_set"])
    styles = {arm: view.styles[arm] for arm in view.study.arms}
    view.summary["notes"].append(same_sign(view.summary))
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in view.summary["rows"] if row["diverged"]}
    return {
        "curves": figures.curves(panels, styles, view.highlight, view.caption),
        "metrics": figures.dots(dot_panels(view.runs, arguments["data_set"]), styles, remarks, caption=view.caption),
        "summary": figures.summary_slide(view.summary, panels[0], styles, view.highlight),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.main(argv, __doc__, design, describe, draw, collapsed)


if __name__ == "__main__":
    main()
