"""Figures, tables and finding of one SimSiam study.

    python simsiam/plot.py simsiam-stop-gradient --scale demo --seeds 0 1 2

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.study import figures, plotting, results
from simsiam.studies import METRICS, design

SHOWN = ("linear_accuracy", "knn_accuracy", "train_loss", "std_ratio")  # the plan's own metrics
UNTRAINED = {"knn_accuracy": "untrained_knn_accuracy", "std_ratio": "untrained_std_ratio"}


def collapsed(runs: list[dict[str, Any]]) -> str | None:
    """The rule for the word: eval-mode std ratio below 0.4 and mean cosine above 0.8, in every seed."""
    every = all(run["std_ratio"] < 0.4 and run["mean_cosine"] > 0.8 for run in runs)
    return "collapsed in every seed" if every else None


def describe(runs: results.Runs) -> str:
    """Data and recipe in words, of the first run that is there; "" where there is none."""
    first = results.first_arguments(runs)
    if not first:
        return ""
    names = {"glyphs10": "glyphs (synthetic digits)", "cifar10": "CIFAR-10", "folder": f"images, {first['size']} px"}
    data = names.get(first["data_set"], first["data_set"])
    return f"{data}, {first['network']}, {first['epochs']} epochs of batch {first['batch']}"


def curve_panels(runs: results.Runs, batch: int) -> list[figures.Curves]:
    """Loss, spread of z in both modes, and kNN accuracy over the epochs; the collapse panels of figure 2.

    The isotropic value of std × √d is 1. An affine-free last batch norm keeps a train-mode batch of B off zero: its
    collapsed state is one outlier a batch, 2 √((1/B)(1 - 1/B)). Features without a projector are not negative and
    cannot reach 1, so they are compared with their own untrained value.
    """
    isotropic = {"isotropic": 1.0}
    bare = {
        f"{arm}\nuntrained": mean(untrained.values())
        for arm, by_seed in runs.items()
        if any(run.args and run.args["arguments"]["projector"] == "none" for run in by_seed.values())
        if (untrained := results.values(runs, arm, "untrained_std_ratio"))
    }
    floor = {"collapse": 2 * (1 / batch * (1 - 1 / batch)) ** 0.5}
    titles = {"loss": ("training loss", {}), "knn_accuracy": ("kNN accuracy (%)", {})}
    titles["std_ratio_train_mode"] = ("std of z × √d, train mode", isotropic | floor)
    titles["std_ratio"] = ("std of z × √d, eval mode", isotropic | bare)
    return [figures.Curves(title, results.series(runs, key), lines) for key, (title, lines) in titles.items()]


def dot_panels(runs: results.Runs) -> list[figures.Dots]:
    """The plan's four metrics, with the untrained network as hollow marks where it was measured."""
    return [
        figures.Dots(
            METRICS[key].title,
            {arm: list(results.values(runs, arm, key).values()) for arm in runs},
            {arm: list(results.values(runs, arm, UNTRAINED[key]).values()) for arm in runs} if key in UNTRAINED else {},
        )
        for key in SHOWN
    ]


def draw(view: results.View) -> dict[str, Figure]:
    """The figures of a study."""
    batch = results.first_arguments(view.runs)["batch"]
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in view.summary["rows"] if row["diverged"]}
    look = (view.study.arms, view.reference)
    return {
        "curves": figures.curves(curve_panels(view.runs, batch), *look, caption=view.caption),
        "metrics": figures.dots(dot_panels(view.runs), *look, remarks, caption=view.caption),
    }


def main(argv: list[str] | None = None) -> None:
    plotting.draw(argv, __doc__, design, describe, draw, collapsed)


if __name__ == "__main__":
    main()
