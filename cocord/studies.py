"""The experimental design of CoCoRD: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests.

The name of an arm contains its pair of networks: ARM@TEACHER-STUDENT. Each teacher is trained once for all arms.
"""

from collections.abc import Sequence
from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, SettingError, Settings, Study, Sweep

METRICS = {
    "accuracy": Metric("top-1 accuracy, last epoch", "%", 2, "higher"),
    "accuracy_best_epoch": Metric("best test accuracy of all epochs (optimistic)", "%", 2, "higher", judged=False),
    "accuracy_slow_student": Metric("slow student's accuracy", "%", 2, "higher"),
    "teacher_accuracy": Metric("teacher's accuracy", "%", 2, "higher", judged=False),
    "contrastive_accuracy": Metric("contrastive top-1", "", 3, "higher"),
    "positive_cosine": Metric("cosine to the positive key", "", 3),
    "negative_cosine": Metric("cosine to the queue", "", 3),
    "key_consistency": Metric("key consistency (cosine between epochs)", "", 4),
    "key_cosine": Metric("cosine between keys of different images", "", 3),
    "teacher_head_shift": Metric("relative change of the teacher's head", "", 3),
    "train_loss": Metric("training loss", "", 3, judged=False),
    "examples_per_second": Metric("training images per second", "", 0, judged=False),
}
# The authors' top-1 on CIFAR-100: (student alone, KD, CoCoRD). Number of seeds and reported epoch are unknown.
PUBLISHED = {
    "wrn_40_2-wrn_16_2": (73.26, 74.92, 75.48), "wrn_40_2-wrn_40_1": (71.98, 73.54, 75.17),
    "resnet56-resnet20": (69.06, 70.66, 71.74), "resnet110-resnet20": (69.06, 70.67, 72.11),
    "resnet110-resnet32": (71.14, 73.08, 74.10), "resnet32x4-resnet8x4": (72.50, 73.33, 75.29),
    "vgg13-vgg8": (70.36, 72.98, 73.99), "vgg13-MobileNetV2": (64.60, 67.37, 69.86),
    "ResNet50-MobileNetV2": (64.60, 67.35, 70.22), "ResNet50-vgg8": (70.36, 73.81, 74.52),
    "resnet32x4-ShuffleV1": (70.50, 74.07, 75.99), "resnet32x4-ShuffleV2": (71.82, 74.45, 77.28),
    "wrn_40_2-ShuffleV1": (70.50, 74.83, 76.42),
}  # fmt: skip
CROSS_ARCHITECTURE = [
    pair for pair in PUBLISHED if "ResNet50" in pair or pair.split("-")[1] in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
]
# Default pairs of the prediction studies, of the momentum studies and of the momentum study's controls.
PREDICTION_PAIRS = {"demo": ["vgg_s64-vgg_s"], "gpu": ["resnet56-resnet20"], "paper": list(PUBLISHED)}
MOMENTUM_PAIRS = {
    "demo": ["resnet_s64-vgg_s"],
    "gpu": ["vgg13-MobileNetV2", "wrn_40_2-ShuffleV1", "resnet32x4-ShuffleV2"],
    "paper": CROSS_ARCHITECTURE,
}
CONTROL_PAIRS = {  # same architecture with unequal feature widths; different architectures with equal widths
    "demo": ["vgg_s64-vgg_s", "resnet_s32-vgg_s"],
    "gpu": ["wrn_40_2-wrn_40_1", "resnet110-wrn_40_1"],
    "paper": ["wrn_40_2-wrn_40_1", "resnet110-wrn_40_1"],
}
SWEPT_MOMENTA = (0.9, 0.97, 0.997)
NO_COCORD_LOSS = "--lambda-contrast 0 --forward-weight 0 --swapped-weight 0"

# Margin in accuracy points, chosen by us before the runs.
study = partial(Study, metric="accuracy", margin=1.0)
sweep = partial(study, extra=True, n=5)
# Demo only, arms NAME@PAIR@few: the student has labels for 1,000 of 5,000 images, its teacher for all. Cross-entropy
# alone stays at chance at the default learning rate, so that arm has --lr-factor 0.3.
FEW = "--data-set glyphs36 --epochs 8 --labels 1000"


def student_of(pair: str) -> str:
    return pair.split("-")[1]


def teacher_of(pair: str) -> str:
    return pair.split("-")[0]


def swept_weights(scale: str) -> tuple[float, ...]:
    """Weights of one prediction term in its sweep; the default weight is the arm `base`."""
    return (0.1, 0.25, 0.5, 2, 4) if scale == "demo" else (1, 2, 8, 16)


def arms_of(pair: str, scale: str) -> list[Arm]:
    """Return the arms of a pair of networks."""
    networks = f"--teacher {teacher_of(pair)} --student {student_of(pair)}"
    double = 2 if scale == "demo" else 8  # twice the default weight of one direction
    weights = swept_weights(scale)
    flags = {
        "base": "",
        "forward-only": "--swapped-weight 0",
        "swapped-only": "--forward-weight 0",
        "none": "--forward-weight 0 --swapped-weight 0",
        "forward-x2": f"--forward-weight {double} --swapped-weight 0",
        "swapped-x2": f"--forward-weight 0 --swapped-weight {double}",
        "frozen": "--teacher-head partial --teacher-momentum 1",
        "moving": "--teacher-head partial --teacher-momentum 0.999",
        "moving-fast": "--teacher-head partial --teacher-momentum 0.99",
        "adapter-frozen": "--teacher-head adapter --teacher-momentum 1",
        "adapter-moving": "--teacher-head adapter --teacher-momentum 0.999",
        "distillation": f"{NO_COCORD_LOSS} --lambda-kd 0.9 --lambda-class 0.1",
        **{f"forward-{x}": f"--forward-weight {x}" for x in weights},
        **{f"swapped-{x}": f"--swapped-weight {x}" for x in weights},
        **{f"momentum-{x}": f"--teacher-head partial --teacher-momentum {x}" for x in SWEPT_MOMENTA},
    }
    teacher = f"teacher@{teacher_of(pair)}"
    return [Arm(f"{name}@{pair}", f"{networks} {rest}".strip(), needs=teacher) for name, rest in flags.items()]


def few_labels(pair: str) -> Study:
    """Return the study of the prediction loss with labels for a fifth of the images."""
    networks, needs = f"--teacher {teacher_of(pair)} --student {student_of(pair)}", f"teacher@{teacher_of(pair)}@few"
    base, none = f"base@{pair}@few", f"none@{pair}@few"
    cross_entropy = f"cross-entropy@{student_of(pair)}@few"
    return study(
        "cocord-few-labels",
        "What does the prediction loss add if the student, but not its teacher, has labels of a fifth of the images?",
        [
            Arm(none, f"{networks} {FEW} --forward-weight 0 --swapped-weight 0", base, needs),
            Arm(f"forward-only@{pair}@few", f"{networks} {FEW} --forward-weight 2 --swapped-weight 0", base, needs),
            Arm(f"swapped-only@{pair}@few", f"{networks} {FEW} --forward-weight 0 --swapped-weight 2", base, needs),
            Arm(base, f"{networks} {FEW} --forward-weight 2 --swapped-weight 2", cross_entropy, needs),
        ],
        must_beat=[MustBeat(base, "cross-entropy alone", "accuracy", baseline_arm=cross_entropy)],
        extra=True,
    )


def at(pair: str, *contrasts: str) -> list[str]:
    """Return the contrasts "ARM:REFERENCE" with the pair added to both names.

    The arm `cross-entropy` has no teacher, so only the student is added to its name.
    """
    named = []
    for contrast in contrasts:
        arms = [f"{arm}@{student_of(pair) if arm == 'cross-entropy' else pair}" for arm in contrast.split(":")]
        named.append(":".join(arms))
    return named


def at_each(pairs: Sequence[str], *contrasts: str) -> list[str]:
    """Return the contrasts for each of the pairs, pair by pair."""
    return [contrast for pair in pairs for contrast in at(pair, *contrasts)]


def beats_cross_entropy(arm: str, pairs: Sequence[str]) -> list[MustBeat]:
    """Require for each of the pairs that `arm` has a higher accuracy than a student trained by cross-entropy only."""
    return [
        MustBeat(f"{arm}@{pair}", "cross-entropy alone", "accuracy", baseline_arm=f"cross-entropy@{student_of(pair)}")
        for pair in pairs
    ]


def published(pairs: Sequence[str]) -> str:
    """Return the authors' results for these pairs in words. They are results of the full method, not of an ablation."""
    text = "the authors' numbers for this ablation are not available"
    rows = []
    for pair in dict.fromkeys(pairs):
        if pair in PUBLISHED:
            student, kd, cocord = PUBLISHED[pair]
            rows.append(f"{pair.replace('-', ' → ')} {student:.2f}, {kd:.2f}, {cocord:.2f}")
    return f"{text}; student alone, KD, CoCoRD on CIFAR-100, 240 epochs: {'; '.join(rows)}" if rows else text


def design(scale: str, settings: Settings) -> Design:
    """Return the design at `scale`. PAIRS in `settings` replace the default pairs. Raises SettingError."""
    for pair in settings.pairs:
        if len(pair.split("-")) != 2 or not all(pair.split("-")):
            raise SettingError(f"invalid PAIRS='{pair}': give TEACHER-STUDENT")
    prediction = list(settings.pairs) or PREDICTION_PAIRS[scale]
    momentum = list(settings.pairs) or MOMENTUM_PAIRS[scale]
    controls = [] if settings.pairs else CONTROL_PAIRS[scale]
    pairs = list(dict.fromkeys([*prediction, *momentum, *controls]))
    arms = [arm for pair in pairs for arm in arms_of(pair, scale)]
    arms += [
        Arm(f"cross-entropy@{student}", f"--teacher none --student {student} {NO_COCORD_LOSS}")
        for student in dict.fromkeys(map(student_of, pairs))
    ]
    # The demo has 1,884 steps: a momentum of 0.999 keeps 15 % of the initial head, 0.99 nothing.
    fast = ["moving-fast:frozen"] if scale == "demo" else []
    # The sweeps use the first pair of each study.
    prediction_pair, momentum_pair = prediction[0], momentum[0]
    extras = [
        study(
            "cocord-calibration",
            "Does distillation help, and CoCoRD more, as published?",
            at(prediction_pair, "distillation:cross-entropy", "base:distillation"),
            primary=2,
            published=published([prediction_pair]) + "; in all 13 published pairs student alone < KD < CoCoRD",
            extra=True,
            expected={f"distillation@{prediction_pair}": "better", f"base@{prediction_pair}": "better"},
        )
    ]
    teachers = [Arm(f"teacher@{network}", f"--network {network}") for network in dict.fromkeys(map(teacher_of, pairs))]
    if scale == "demo" and not settings.pairs and not settings.own_data:
        teacher, student = prediction_pair.split("-")
        extras.append(few_labels(prediction_pair))
        teachers.append(Arm(f"teacher@{teacher}@few", f"--network {teacher} --data-set glyphs36"))
        arms.append(
            Arm(
                f"cross-entropy@{student}@few",
                f"--teacher none --student {student} {FEW} --lr-factor 0.3 {NO_COCORD_LOSS}",
            )
        )
    forward_sweep = [f"forward-{x}:base" for x in swept_weights(scale)]
    swapped_sweep = [f"swapped-{x}:base" for x in swept_weights(scale)]
    return Design(
        "cocord",
        "CoCoRD",
        scale,
        METRICS,
        [
            study(
                "cocord-prediction-loss",
                "Does the prediction loss need both directions?",
                [
                    *at_each(prediction, "forward-only:base", "swapped-only:base"),
                    *at_each(
                        prediction,
                        "none:base",
                        "forward-x2:base",
                        "swapped-x2:base",
                        "base:cross-entropy",
                        "distillation:base",
                    ),
                ],
                primary=2 * len(prediction),
                must_beat=beats_cross_entropy("base", prediction),
                published=published(prediction),
            ),
            study(
                "cocord-teacher-momentum",
                "Cross-architecture pairs: should the teacher's head follow the student's head, or stay frozen?",
                [
                    *at_each(momentum, "moving:frozen"),
                    *at_each(
                        momentum, *fast, "adapter-moving:adapter-frozen", "frozen:cross-entropy", "distillation:frozen"
                    ),
                    *at_each(controls, "moving:frozen", "frozen:cross-entropy", "distillation:frozen"),
                ],
                primary=len(momentum),
                must_beat=beats_cross_entropy("frozen", [*momentum, *controls]),
                published=published([*momentum, *controls]),
            ),
            *extras,
            sweep(
                "cocord-forward-weight",
                "Which weight should the forward term have, next to the swapped term?",
                at(prediction_pair, "swapped-only:base", *forward_sweep, "base:cross-entropy"),
                must_beat=beats_cross_entropy("base", [prediction_pair]),
                published=published([prediction_pair]),
                sweep=Sweep(["accuracy", "contrastive_accuracy"], "forward_weight", "weight of the forward term"),
            ),
            sweep(
                "cocord-swapped-weight",
                "Which weight should the swapped term have, next to the forward term?",
                at(prediction_pair, "forward-only:base", *swapped_sweep, "base:cross-entropy"),
                must_beat=beats_cross_entropy("base", [prediction_pair]),
                published=published([prediction_pair]),
                sweep=Sweep(["accuracy", "contrastive_accuracy"], "swapped_weight", "weight of the swapped term"),
            ),
            sweep(
                "cocord-momentum",
                "Cross-architecture pairs: which EMA momentum should the teacher's head have?",
                at(
                    momentum_pair,
                    "moving:frozen",
                    "moving-fast:frozen",
                    *(f"momentum-{x}:frozen" for x in SWEPT_MOMENTA),
                    "frozen:cross-entropy",
                ),
                must_beat=beats_cross_entropy("frozen", [momentum_pair]),
                published=published([momentum_pair]),
                sweep=Sweep(
                    ["accuracy", "contrastive_accuracy", "key_cosine"],
                    "teacher_momentum",
                    "EMA momentum of the teacher's head (1: frozen)",
                ),
            ),
        ],
        arms=arms,
        teachers=teachers,
        data="" if scale == "demo" or settings.own_data else "cifar-100-python",
        chance={"accuracy": {"glyphs36": 100 / 36, "glyphs36-hard": 100 / 36, "cifar100": 1.0}},
        base=f"base@{prediction_pair}",
        robustness=Robustness(["accuracy", "contrastive_accuracy"], published=published([*prediction, *momentum])),
    )
