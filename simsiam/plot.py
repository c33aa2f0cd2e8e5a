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
from simsiam.studies import METRICS, design

PLOTTED = ("linear_accuracy", "knn_accuracy", "train_loss", "std_ratio")
CHANCE = {"glyphs10": 10.0, "cifar10": 10.0}  # accuracy in percent, by data set
# Metrics that are also measured on the untrained network.
UNTRAINED = {"knn_accuracy": "untrained_knn_accuracy", "std_ratio": "untrained_std_ratio"}


def collapsed(runs: list[dict[str, Any]]) -> str | None:
    """Return "collapsed in every seed" if all runs have eval-mode std ratio < 0.4 and mean cosine > 0.8, else None."""
    in_every_seed = all(run["std_ratio"] < 0.4 and run["mean_cosine"] > 0.8 for run in runs)
    return "collapsed in every seed" if in_every_seed else None


def describe(runs: results.Runs) -> str:
    """Return data set, network, epochs and batch size of the first run as a caption; "" if there are no runs."""
    args = results.first_arguments(runs)
    if not args:
        return ""
    names = {"glyphs10": "glyphs (synthetic digits)", "cifar10": "CIFAR-10", "folder": f"images, {args['size']} px"}
    data = names.get(args["data_set"], args["data_set"])
    return f"{data}, {args['network']}, {args['epochs']} epochs, batch size {args['batch']}"


def curve_panels(runs: results.Runs, data_set: str, batch: int) -> list[figures.Curves]:
    """Return the panels of training loss, kNN accuracy and std of z (train and eval mode) per epoch (cf. figure 2).

    Reference lines: std × √d is 1 for an isotropic z. In train mode it is not 0 after collapse, because the last batch
    norm has no affine: with one outlier per batch of size B it is 2 √((1/B)(1 - 1/B)). Without a projector z is not
    negative and cannot reach 1, so the value of the untrained network is shown.
    """
    isotropic = {"isotropic": 1.0}
    collapse = {"collapse": 2 * (1 / batch * (1 - 1 / batch)) ** 0.5}
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
            {arm: list(results.values(runs, arm, key).values()) for arm in runs},
            {arm: list(results.values(runs, arm, UNTRAINED[key]).values()) for arm in runs} if key in UNTRAINED else {},
            {"chance": CHANCE[data_set]} if "accuracy" in key and data_set in CHANCE else {},
        )
        for key in PLOTTED
    ]


def draw(view: results.View) -> dict[str, figures.Drawing]:
    """Return the figures of a study by name: "curves", "metrics" and "summary"."""
    arguments = results.first_arguments(view.runs)
    panels = curve_panels(view.runs, arguments["data_set"], arguments["batch"])
    styles = {arm: view.styles[arm] for arm in view.study.arms}
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in view.summary["rows"] if row["diverged"]}
    return {
        "curves": figures.curves(panels, styles, view.highlight, view.caption),
        "metrics": figures.dots(dot_panels(view.runs, arguments["data_set"]), styles, remarks, caption=view.caption),
        "summary": figures.summary_slide(view.summary, panels[0], styles, view.highlight),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw, collapsed)


if __name__ == "__main__":
    main()
