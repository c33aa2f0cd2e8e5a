"""Figures, tables and finding of one CoCoRD study; make calls it with the study's contrasts.

    python cocord/plot.py cocord-prediction-loss forward-only@vgg_s32-vgg_s:base@vgg_s32-vgg_s \\
        --runs runs/demo/cocord --results runs/demo/report

Reads the runs' metrics.json and train.jsonl, computes nothing new, and draws what there is; missing runs are holes.
"""

from collections.abc import Mapping, Sequence
from statistics import stdev

from common import command, figures, records, statistics, studies, sweeps, tables

QUESTIONS = {
    "cocord-prediction-loss": "Does the prediction loss need both directions, and is it more than its weight?",
    "cocord-teacher-momentum": "Across architectures: may the teacher's head move with the student's, or must it stay?",
}
PRIMARIES = {"cocord-prediction-loss": ("forward-only", "swapped-only"), "cocord-teacher-momentum": ("moving",)}
PRIMARY = "accuracy"
METRICS = {
    "accuracy": studies.Metric("top-1 accuracy, last epoch", "%", 2),
    "accuracy_best_epoch": studies.Metric("best epoch, chosen on the test set (optimistic)", "%", 2, judged=False),
    "accuracy_slow_student": studies.Metric("slow student's accuracy", "%", 2),
    "teacher_accuracy": studies.Metric("teacher's accuracy", "%", 2, judged=False),
    "contrastive_accuracy": studies.Metric("contrastive top-1 among K + 1", "", 3),
    "positive_cosine": studies.Metric("cosine to the own key", "", 3),
    "negative_cosine": studies.Metric("cosine to the queue", "", 3),
    "key_consistency": studies.Metric("cosine of keys, epoch to epoch", "", 4),
    "teacher_head_shift": studies.Metric("shift of the teacher's head", "", 3),
    "train_loss": studies.Metric("training loss", "", 3, judged=False),
    "examples_per_second": studies.Metric("training images per second", "", 0, judged=False),
}
SHOWN = ("accuracy", "contrastive_accuracy")
SWEEPS = {
    "cocord-robustness": sweeps.Sweep(sweeps.ROBUSTNESS, SHOWN),
    "cocord-forward-weight": sweeps.Sweep(
        "How much of the forward term, beside the swapped one?", SHOWN, "forward_weight", "weight of the forward term"
    ),
    "cocord-swapped-weight": sweeps.Sweep(
        "How much of the swapped term, beside the forward one?", SHOWN, "swapped_weight", "weight of the swapped term"
    ),
    "cocord-momentum": sweeps.Sweep(
        "Across architectures: how slowly must the teacher's head move?", (*SHOWN, "teacher_head_shift"),
        "teacher_momentum", "momentum of the teacher's head (1: it stays)",
    ),
}  # fmt: skip
MARGIN = 0.3  # points; declared before any reported run: at the published spread less is no evidence
SPREAD = 0.18  # points; sample sd of five published CIFAR-100 runs (DKD, resnet32x4 to resnet8x4, mdistiller #7)
# Top-1 that the authors publish on CIFAR-100 (student alone, plain distillation, CoCoRD); seeds and epoch unknown.
PUBLISHED = {
    "wrn_40_2-wrn_16_2": (73.26, 74.92, 75.48), "wrn_40_2-wrn_40_1": (71.98, 73.54, 75.17),
    "resnet56-resnet20": (69.06, 70.66, 71.74), "resnet110-resnet20": (69.06, 70.67, 72.11),
    "resnet110-resnet32": (71.14, 73.08, 74.10), "resnet32x4-resnet8x4": (72.50, 73.33, 75.29),
    "vgg13-vgg8": (70.36, 72.98, 73.99), "vgg13-MobileNetV2": (64.60, 67.37, 69.86),
    "ResNet50-MobileNetV2": (64.60, 67.35, 70.22), "ResNet50-vgg8": (70.36, 73.81, 74.52),
    "resnet32x4-ShuffleV1": (70.50, 74.07, 75.99), "resnet32x4-ShuffleV2": (71.82, 74.45, 77.28),
    "wrn_40_2-ShuffleV1": (70.50, 74.83, 76.42),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what the runs say


def setting(runs: records.Runs) -> str:
    """Data and recipe in words, of the first run that is there; nothing where there is none."""
    first = next((run.args["arguments"] for arm in runs.values() for run in arm.values() if run.args), None)
    if first is None:
        return ""
    names = {"glyphs36": "glyphs (synthetic characters, 36 classes)", "cifar100": "CIFAR-100"}
    data = names.get(first["data_set"], first["data_set"])
    return f"{data}, {first['epochs']} epochs of batch {first['batch']}"


def published(pairs: Sequence[str]) -> str:
    """What the authors publish of these pairs: the whole method alone."""
    told = [
        f"{pair.replace('-', ' → ')} {alone:.2f}, {distilled:.2f}, {whole:.2f}"
        for pair in pairs
        if pair in PUBLISHED
        for alone, distilled, whole in [PUBLISHED[pair]]
    ]
    none = "no number of this ablation could be had"
    return f"{none}; student alone, KD, CoCoRD on CIFAR-100, 240 epochs: {'; '.join(told)}" if told else none


def resolution(runs: records.Runs, reference: str, seeds: int) -> str:
    """Which difference of two means so many seeds resolve: the half-width of Welch's interval at equal spread."""
    if seeds < 2:
        return "One seed resolves no difference."

    def half(spread: float) -> float:
        return statistics.student_t_quantile(0.975, 2 * seeds - 2) * spread * (2 / seeds) ** 0.5

    text = f"{seeds} seeds an arm resolve differences above about {half(SPREAD):.2f} points at the spread published "
    text += f"for CIFAR-100 (sd {SPREAD})"
    found = list(records.values(runs, reference, PRIMARY).values())
    if len(found) > 1:
        text += f", above {half(stdev(found)):.2f} at that of {reference} here (sd {stdev(found):.2f})"
    return text + "."


# ------------------------------------------------------------------------------------------------- figures


def short(arm: str) -> str:
    """An arm without its pair."""
    return arm.partition("@")[0]


def curve_panels(
    runs: records.Runs, groups: Mapping[str, Sequence[str]], metrics: Mapping[str, str]
) -> list[figures.Curves]:
    """For each pair a panel for each metric of the log."""
    panels = []
    for pair, arms in groups.items():
        for key, title in metrics.items():
            curves = records.series({arm: runs[arm] for arm in arms}, key)
            made = {short(arm): kept(runs[arm], key, found) for arm, found in curves.items()}
            panels.append(figures.Curves(f"{title}\n{pair.replace('-', ' → ')}", made))
    return panels


def kept(seeds: Mapping[int, records.Record], key: str, found: list[records.Curve]) -> list[records.Curve]:
    """No curve where an arm has no contrast, and so no keys."""
    contrasted = any(run.args and run.args["arguments"]["lambda_contrast"] for run in seeds.values())
    return found if contrasted or key == "test_accuracy" else []


def dot_panels(runs: records.Runs, groups: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> list[figures.Dots]:
    """For each pair a panel for each metric; the slow student as hollow marks beside the accuracy."""
    panels = []
    for pair, arms in groups.items():
        for key in metrics:
            values = {short(arm): list(records.values(runs, arm, key).values()) for arm in arms}
            slow = {short(arm): list(records.values(runs, arm, "accuracy_slow_student").values()) for arm in arms}
            title = f"{tables.title(METRICS[key]._asdict())}\n{pair.replace('-', ' → ')}"
            percent = {"within": (0, 100)} if METRICS[key].unit == "%" else {}
            panels.append(figures.Dots(title, values, slow if key == PRIMARY else {}, **percent))
    return panels


# ------------------------------------------------------------------------------------------------- main


def primaries(study: str, contrasts: Sequence[str]) -> int:
    """How many contrasts at the beginning carry the verdict."""
    names = [short(contrast) for contrast in contrasts]
    return next((place for place, name in enumerate(names) if name not in PRIMARIES[study]), len(names))


def controls(contrasts: Sequence[str]) -> list[studies.Control]:
    """Every arm that is compared with the student trained by cross-entropy alone must beat it."""
    pairs = [contrast.split(":") for contrast in contrasts]
    return [
        studies.Control("cross-entropy alone", PRIMARY, arm, other_arm=other)
        for arm, other in pairs
        if short(other) == "cross-entropy"
    ]


def main(argv: list[str] | None = None) -> None:
    args = command.parse_study(__doc__, (*QUESTIONS, *SWEEPS), argv)
    sweep = SWEEPS.get(args.study)
    pairs = list(dict.fromkeys(contrast.split(":")[0].partition("@")[2] for contrast in args.contrasts))
    design = studies.Study(
        args.study, "CoCoRD", args.scale, QUESTIONS.get(args.study, ""), "", args.reproduce, PRIMARY, args.contrasts,
        controls(args.contrasts), published(pairs), 1 if sweep else primaries(args.study, args.contrasts), MARGIN,
    )  # fmt: skip
    if sweep:
        sweeps.draw(args, design, sweep, METRICS, setting)
        return
    runs = records.read_runs(args.runs, design.arms, args.seeds)
    data = setting(runs)
    if not data:
        print(f"{args.study}: no runs in {args.runs} yet")
        return
    summary = studies.summarise(design._replace(data=data), runs, METRICS)
    reference = args.contrasts[0].split(":")[1]
    summary["notes"] = [resolution(runs, reference, len(args.seeds)), *summary["notes"]]
    groups = tables.settings(summary)
    names = [short(arm) for group in groups.values() for arm in group]
    arms = sorted(dict.fromkeys(names), key=lambda arm: -names.count(arm))  # what every pair has stands first
    remarks = {short(row["arm"]): "diverged" for row in summary["rows"] if row["diverged"]}
    caption = f"{data}. "
    momentum = args.study == "cocord-teacher-momentum"
    curves = {"test_accuracy": "test accuracy (%)"}
    curves |= {"key_consistency": "keys, cosine epoch to epoch"} if momentum else {}
    curves |= {} if momentum else {"contrastive_accuracy": "contrastive top-1"}
    shown = ("accuracy", "teacher_head_shift") if momentum else ("accuracy", "contrastive_accuracy")
    drawn = {
        "curves": figures.whole_epochs(
            figures.curves(curve_panels(runs, groups, curves), arms, short(reference), caption)
        ),
        "metrics": figures.dots(
            dot_panels(runs, groups, shown), arms, short(reference), remarks, "slow student", caption
        ),
    }
    studies.publish(summary, drawn, args.results)


if __name__ == "__main__":
    main()
