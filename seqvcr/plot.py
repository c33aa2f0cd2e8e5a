"""Figures, tables and finding of one Seq-VCR study; make calls it with the study's contrasts.

    python seqvcr/plot.py seqvcr-coefficients base@2x2:off@2x2 --runs runs/demo/seqvcr --seeds 0 1 2 3 4 \\
        --results runs/demo/report

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from common import command, figures, records, studies, sweeps, tables

QUESTIONS = {  # study: (the plan's question, what the paper publishes)
    "seqvcr-coefficients": (
        "What do variance and covariance contribute, in which proportion and at which strength?",
        "none published for other pairs; with pause tokens, without and with the default pair: exact match 28 and 99.2 "
        "of 4x4 digits, 0 and 99.5 of 5x5 (table 1; GPT-2 small fine-tuned, 40 epochs of 808,000 rows, no seeds given)",
    ),
    "seqvcr-projection-width": ("How wide has the projection to be?", "none published"),
    "seqvcr-layer": (
        "Which level is regularised best, and over which axis?",
        "exact match of 5x5 digits from scratch: last level 3, level 0 97; over batch and length 87 and 99 (table 7; "
        "GPT-2 small)",
    ),
    "seqvcr-last-width": (
        "How wide at the last level, where the batch bounds the covariance's rank?",
        "none published",
    ),
    "seqvcr-pause": ("How many pause tokens help, with the regulariser and without?", "figure 7, without numbers"),
}
PRIMARY = "exact_match"
METRICS = {
    "exact_match": studies.Metric("exact match", "%", 1),
    "entropy_mean": studies.Metric("matrix entropy, mean", "", 3),
    "entropy_min": studies.Metric("matrix entropy, lowest inner level", "", 3),
    "entropy_batch_level": studies.Metric("batch entropy at its level", "", 3),
    "digit_accuracy": studies.Metric("token accuracy", "%", 1),
    "steps_to_solve": studies.Metric("steps to solve", "", 0),
    "variance_loss": studies.Metric("variance loss", "", 3, judged=False),
    "covariance_loss": studies.Metric("covariance loss", "", 3, judged=False),
    "projected_std": studies.Metric("deviation of W h", "", 3),
    "predicted_std": studies.Metric("predicted deviation", "", 3),
    "regulariser_loss": studies.Metric("loss of the regulariser", "", 3, judged=False),
    "predicted_loss": studies.Metric("its predicted floor", "", 3, judged=False),
    "cross_entropy": studies.Metric("training cross entropy", "", 3, judged=False),
}
ASKED = ("exact_match", "entropy_mean", "entropy_batch_level", "digit_accuracy")
SWEEPS = {
    "seqvcr-robustness": sweeps.Sweep(sweeps.ROBUSTNESS, (PRIMARY, "entropy_batch_level")),
    "seqvcr-strength": sweeps.Sweep(
        "How strong should the regulariser be, in the default pair's proportion?",
        (PRIMARY, "digit_accuracy", "entropy_batch_level", "entropy_mean"), "lambda1", "λ₁, with λ₂ = 0.004 λ₁",
        ("lambda2",),
    ),
}  # fmt: skip
SOLVED = {"solved": 90.0}  # percent of exact match
TASKS = {"multiplication": "{0}x{0} digits", "arithmetic": "{0} operators modulo 11", "lis": "sequences of {0} numbers"}


def solved(runs: list[dict[str, Any]]) -> str:
    """How many seeds ended with an exact match of 90 % at least: that is bimodal, so a mean alone would mislead."""
    return f"{sum(bool(run['solved']) for run in runs)} of {len(runs)} solved"


# ------------------------------------------------------------------------------------------------- what the runs say


def arguments_of(runs: records.Runs) -> dict[str, dict[str, Any]]:
    """By arm the arguments of its first run that is there."""
    found = {
        arm: next((run.args["arguments"] for run in seeds.values() if run.args), None) for arm, seeds in runs.items()
    }
    return {arm: arguments for arm, arguments in found.items() if arguments}


def setting(arguments: Mapping[str, Mapping[str, Any]]) -> str:
    """Tasks and recipe in words."""
    first = next(iter(arguments.values()))
    named = dict.fromkeys(TASKS[one["task"]].format(one["size"]) for one in arguments.values())
    shape = f"{first['layers']} blocks of width {first['width']}"
    return f"{' and '.join(named)}, {shape}, {first['steps']} steps of batch {first['batch']}"


def recipe(runs: records.Runs) -> str:
    """`setting` of runs; nothing where there are none."""
    found = arguments_of(runs)
    return setting(found) if found else ""


def label(study: str, arm: str, arguments: Mapping[str, Any] | None) -> str:
    """What an arm is called in a figure of its study, whatever its setting."""
    if arguments is None:
        return arm.partition("@")[0]
    coefficients = arguments["lambda1"], arguments["lambda2"]
    if study in ("seqvcr-coefficients", "seqvcr-projection-width", "seqvcr-last-width") and not any(coefficients):
        return "off"
    if study == "seqvcr-coefficients":
        return "λ {:g}, {:g}".format(*coefficients)
    if "width" in study:
        return f"d = {arguments['projection_width']}"
    return arm.partition("@")[0]


def by_setting(
    summary: Mapping[str, Any], study: str, arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """By setting its arms with their labels; an arm that two settings are compared with stands in both."""
    return {
        name: {arm: label(study, arm, arguments[arm]) for arm in arms if arm in arguments}
        for name, arms in tables.settings(summary).items()
    }


def levels(runs: records.Runs, arm: str, metric: str) -> list[records.Curve]:
    """A list metric of every finished seed over its index."""
    found = [run.metrics for run in runs[arm].values() if run.metrics and not run.metrics.get("diverged")]
    return [(list(map(float, range(len(one[metric])))), one[metric]) for one in found if one.get(metric)]


# ------------------------------------------------------------------------------------------------- figures


def titled(title: str, name: str, groups: Mapping[str, Any]) -> str:
    """A panel's title, with its setting where there are several."""
    return f"{title}\n{name}" if len(groups) > 1 else title


def entropy_panels(runs: records.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Both entropies by level, a pair of panels for each setting."""
    titles = {"entropy": "matrix entropy over tokens (eq. 2)", "entropy_batch": "entropy over the batch"}
    return [
        figures.Curves(
            titled(title, name, groups),
            {text: levels(runs, arm, metric) for arm, text in arms.items()},
            x_label="level",
        )
        for name, arms in groups.items()
        for metric, title in titles.items()
    ]


def whole_levels(figure: Figure) -> Figure:
    """Levels are whole numbers."""
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def position_panels(runs: records.Runs, groups: Mapping[str, Mapping[str, str]]) -> list[figures.Curves]:
    """Accuracy of each position of the answer on validation rows over the steps; settings side by side."""
    keys = {key for seeds in runs.values() for run in seeds.values() for line in run.log for key in line}
    positions = sorted(int(key.removeprefix("accuracy_")) for key in keys if key.startswith("accuracy_"))
    panels = []
    for place in positions:
        found = records.series(runs, f"accuracy_{place}", x="step")
        for name, arms in groups.items():
            shown = {text: found[arm] for arm, text in arms.items() if found[arm]}
            if shown:
                title = titled(f"token {place + 1} of the answer (%)", name, groups)
                panels.append(figures.Curves(title, shown, x_label="step"))
    return panels


def dot_panels(runs: records.Runs) -> list[figures.Dots]:
    """The plan's metrics, with chance as a hollow mark."""
    return [
        figures.Dots(
            tables.title(METRICS[key]._asdict()),
            {arm: list(records.values(runs, arm, key).values()) for arm in runs},
            {arm: list(records.values(runs, arm, "chance_exact_match").values()) for arm in runs}
            if key == PRIMARY
            else {},
        )
        for key in ASKED
    ]


def solved_panels(runs: records.Runs) -> list[figures.Dots]:
    """Exact match beside the mark of a solved seed, and after how many steps seeds were solved."""
    keys = {"exact_match": SOLVED, "steps_to_solve": {}}
    values = {key: {arm: list(records.values(runs, arm, key).values()) for arm in runs} for key in keys}
    return [
        figures.Dots(tables.title(METRICS[key]._asdict()), values[key], lines=lines)
        for key, lines in keys.items()
        if key == PRIMARY or any(values[key].values())
    ]


def prediction(runs: records.Runs, reference: str, caption: str) -> Figure:
    """Deviation and loss of the regularised runs as measured, with what is predicted as hollow marks."""
    arms = [arm for arm in runs if records.values(runs, arm, "projected_std")]
    pairs = {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    panels = [
        figures.Dots(
            METRICS[key].label,
            {arm: list(records.values(runs, arm, key).values()) for arm in arms},
            {arm: list(records.values(runs, arm, other).values()) for arm in arms},
        )
        for key, other in pairs.items()
    ]
    return figures.dots(panels, arms, reference, hollow="predicted from rank, width and coefficients", caption=caption)


def width_curves(runs: records.Runs, arguments: Mapping[str, Mapping[str, Any]], caption: str) -> Figure:
    """Accuracy, entropies, deviation and loss over the projection's width, with `off` as a dotted line."""
    on = {arm: one["projection_width"] for arm, one in arguments.items() if one["lambda1"] or one["lambda2"]}
    on = dict(sorted(on.items(), key=lambda item: item[1]))
    off = [arm for arm in runs if arm in arguments and arm not in on]
    seeds = list(dict.fromkeys(seed for arm in on for seed in runs[arm]))

    def over_width(metric: str) -> list[records.Curve]:
        found = {width: records.values(runs, arm, metric) for arm, width in on.items()}
        curves = [[(width, values[seed]) for width, values in found.items() if seed in values] for seed in seeds]
        return [([float(width) for width, _ in curve], [value for _, value in curve]) for curve in curves if curve]

    panels, predicted = [], {"projected_std": "predicted_std", "regulariser_loss": "predicted_loss"}
    for key in ("exact_match", "entropy_mean", *predicted):
        lines = {arm.partition("@")[0]: list(records.values(runs, arm, key).values()) for arm in off}
        values = {"measured": over_width(key)} | ({"predicted": over_width(predicted[key])} if key in predicted else {})
        level = {name: mean(found) for name, found in lines.items() if found}
        panels.append(figures.Curves(tables.title(METRICS[key]._asdict()), values, level, "projection width d", "log"))
    figure = figures.curves(panels, ["measured", "predicted"], "predicted", caption)
    ticks = sorted(set(on.values()))
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    return figure


# ------------------------------------------------------------------------------------------------- main


def controls(study: str, contrasts: Sequence[str], primaries: int) -> list[studies.Control]:
    """What must be beaten: chance, by the arms of the primary contrasts; where widths are compared no regulariser, by
    the arm of the last contrast. In robustness both, at every rate."""
    pairs = [one.split(":") for one in contrasts]
    if study == "seqvcr-robustness":
        references = [reference for _, reference in pairs]
        wide = {arm: other for arm, other in pairs if arm in references}
        plain = set(wide.values())
        return [
            studies.Control("no regulariser", PRIMARY, arm, other_arm=wide[arm])
            if arm in wide
            else studies.Control("the most frequent answer", PRIMARY, arm, "chance_exact_match")
            for arm, reference in pairs
            if reference in plain
        ]
    if "width" in study:
        arm, off = contrasts[-1].split(":")
        return [studies.Control("no regulariser", PRIMARY, arm, other_arm=off)]
    place = 0 if study in ("seqvcr-coefficients", "seqvcr-strength") else 1
    arms = dict.fromkeys(pair[place] for pair in pairs[:primaries])
    return [studies.Control("the most frequent answer", PRIMARY, arm, "chance_exact_match") for arm in arms]


def main(argv: list[str] | None = None) -> None:
    args = command.parse_study(__doc__, (*QUESTIONS, *SWEEPS), argv)
    question, published = QUESTIONS.get(args.study, ("", "none published"))
    settings = {one.split(":")[0].partition("@")[2] for one in args.contrasts}
    primaries = len(settings) if args.study == "seqvcr-coefficients" else 1
    design = studies.Study(
        args.study, "Seq-VCR", args.scale, question, "", args.reproduce, PRIMARY, args.contrasts,
        controls(args.study, args.contrasts, primaries), published, primaries,
    )  # fmt: skip
    if sweep := SWEEPS.get(args.study):
        sweeps.draw(args, design, sweep, METRICS, recipe, solved)
        return
    runs = records.read_runs(args.runs, design.arms, args.seeds)
    arguments = arguments_of(runs)
    if not arguments:
        print(f"{args.study}: no runs in {args.runs} yet")
        return
    data = setting(arguments)
    summary = studies.summarise(design._replace(data=data), runs, METRICS, solved)
    groups, caption = by_setting(summary, args.study, arguments), f"{data}. "
    own = args.contrasts[0].split(":")[1]
    labels = list(dict.fromkeys(text for arms in groups.values() for text in arms.values()))
    reference = label(args.study, own, arguments.get(own))
    remarks = {row["arm"]: f"{len(row['diverged'])} diverged" for row in summary["rows"] if row["diverged"]}
    words = {row["arm"]: row["word"] or "" for row in summary["rows"]}
    chance, every = "the most frequent answer", [arm for arms in groups.values() for arm in arms]
    ordered = list(dict.fromkeys([*every, *design.arms]))
    drawn = {
        "entropy": whole_levels(figures.curves(entropy_panels(runs, groups), labels, reference, caption)),
        "metrics": figures.dots(dot_panels(runs), ordered, own, remarks, chance, caption),
        "prediction": prediction({arm: runs[arm] for arm in ordered}, own, caption),
        "solved": figures.dots(solved_panels(runs), ordered, own, words, caption=caption),
    }
    if positions := position_panels(runs, groups):  # there are none before the first validation
        drawn["positions"] = figures.curves(positions, labels, reference, caption)
    if "width" in args.study:
        drawn["width"] = width_curves(runs, arguments, caption)
    studies.publish(summary, drawn, args.results)


if __name__ == "__main__":
    main()
