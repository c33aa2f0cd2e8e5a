"""Figures, tables and finding of one SimSiam study; make calls it with the study's contrasts.

    python simsiam/plot.py simsiam-stop-gradient no-stop-gradient:base --runs runs/demo/simsiam \\
        --seeds 0 1 2 3 4 --results runs/demo/report

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

from statistics import mean
from typing import Any

from common import command, figures, records, studies, sweeps, tables

QUESTIONS = {  # study: (the plan's question, what the paper publishes)
    "simsiam-stop-gradient": (
        "What does the stop-gradient contribute?",
        "linear 67.7 ± 0.1 with, 0.1 without (figure 2; ImageNet, ResNet-50, 100 epochs, predictor rate decayed)",
    ),
    "simsiam-predictor": (
        "What does the predictor contribute, and does it have to learn?",
        "linear 67.7 with, 0.1 without, 1.5 fixed at its random start (table 1; ImageNet, ResNet-50, 100 epochs)",
    ),
    "simsiam-projector": ("What does the projector contribute?", "none published"),
    "simsiam-symmetric-loss": (
        "What does the symmetric loss contribute, and is it more than twice the comparisons?",
        "linear 68.1 symmetric, 64.8 asymmetric, 67.3 asymmetric with two pairs an image (section 4.6; ImageNet, "
        "ResNet-50, 100 epochs)",
    ),
}
METRICS = {
    "linear_accuracy": studies.Metric("linear accuracy", "%", 1),
    "knn_accuracy": studies.Metric("kNN accuracy", "%", 1),
    "train_loss": studies.Metric("training loss", "", 3, judged=False),
    "std_ratio": studies.Metric("std of z × √d, eval mode", "", 2),
    "std_ratio_train_mode": studies.Metric("std of z × √d, train mode", "", 2),
    "mean_cosine": studies.Metric("mean cosine between images", "", 2),
    "effective_rank": studies.Metric("effective rank of z", "", 1),
    "knn_accuracy_z": studies.Metric("kNN accuracy on z", "%", 1),
}
ASKED = tuple(METRICS)[:4]  # the plan's own
MARGIN = 2.0  # points of kNN accuracy; declared before any run: within it arms count as alike
SWEEPS = {
    "simsiam-robustness": sweeps.Sweep(sweeps.ROBUSTNESS, ("knn_accuracy", "std_ratio")),
    "simsiam-gradient-leak": sweeps.Sweep(
        "How much of the target's gradient may pass before the representation collapses?",
        ("knn_accuracy", "linear_accuracy", "std_ratio", "mean_cosine"), "gradient_leak",
        "share of the target's gradient that passes",
    ),
}  # fmt: skip
UNTRAINED = {"knn_accuracy": "untrained_knn_accuracy", "std_ratio": "untrained_std_ratio"}


def collapsed(runs: list[dict[str, Any]]) -> str | None:
    """The rule for the word: eval-mode std ratio below 0.4 and mean cosine above 0.8, in every seed."""
    every = all(run["std_ratio"] < 0.4 and run["mean_cosine"] > 0.8 for run in runs)
    return "collapsed in every seed" if every else None


def setting(runs: records.Runs) -> tuple[str, dict[str, Any]]:
    """(data and recipe in words, arguments) of the first run that is there."""
    first = next((run.args["arguments"] for arm in runs.values() for run in arm.values() if run.args), None)
    if first is None:
        return "", {}
    names = {"glyphs10": "glyphs (synthetic digits)", "cifar10": "CIFAR-10", "folder": f"images, {first['size']} px"}
    data = names.get(first["data_set"], first["data_set"])
    return f"{data}, {first['network']}, {first['epochs']} epochs of batch {first['batch']}", first


def curve_panels(runs: records.Runs, batch: int) -> list[figures.Curves]:
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
        if (untrained := records.values(runs, arm, "untrained_std_ratio"))
    }
    floor = {"collapse": 2 * (1 / batch * (1 - 1 / batch)) ** 0.5}
    titles = {"loss": ("training loss", {}), "knn_accuracy": ("kNN accuracy (%)", {})}
    titles["std_ratio_train_mode"] = ("std of z × √d, train mode", isotropic | floor)
    titles["std_ratio"] = ("std of z × √d, eval mode", isotropic | bare)
    return [figures.Curves(title, records.series(runs, key), lines) for key, (title, lines) in titles.items()]


def dot_panels(runs: records.Runs) -> list[figures.Dots]:
    """The plan's four metrics, with the untrained network as hollow marks where it was measured."""
    return [
        figures.Dots(
            tables.title(METRICS[key]._asdict()),
            {arm: list(records.values(runs, arm, key).values()) for arm in runs},
            {arm: list(records.values(runs, arm, UNTRAINED[key]).values()) for arm in runs} if key in UNTRAINED else {},
        )
        for key in ASKED
    ]


def control(arm: str) -> studies.Control:
    """What `arm` must beat: its own network before training."""
    return studies.Control("untrained", "knn_accuracy", arm, "untrained_knn_accuracy")


def main(argv: list[str] | None = None) -> None:
    args = command.parse_study(__doc__, (*QUESTIONS, *SWEEPS), argv)
    question, published = QUESTIONS.get(args.study, ("", "none published"))
    references = dict.fromkeys(contrast.split(":")[1] for contrast in args.contrasts)
    design = studies.Study(
        args.study, "SimSiam", args.scale, question, "", args.reproduce, "knn_accuracy", args.contrasts,
        [control(arm) for arm in references], published, margin=MARGIN,
    )  # fmt: skip
    if sweep := SWEEPS.get(args.study):
        sweeps.draw(args, design, sweep, METRICS, lambda runs: setting(runs)[0], collapsed)
        return
    runs = records.read_runs(args.runs, design.arms, args.seeds)
    data, arguments = setting(runs)
    if not arguments:
        print(f"{args.study}: no runs in {args.runs} yet")
        return
    summary = studies.summarise(design._replace(data=data), runs, METRICS, collapsed)
    reference = args.contrasts[0].split(":")[1]
    caption = f"{data}. "
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in summary["rows"] if row["diverged"]}
    drawn = {
        "curves": figures.curves(curve_panels(runs, arguments["batch"]), design.arms, reference, caption),
        "metrics": figures.dots(dot_panels(runs), design.arms, reference, remarks, caption=caption),
    }
    studies.publish(summary, drawn, args.results)


if __name__ == "__main__":
    main()
