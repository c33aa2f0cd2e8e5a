"""The experimental design of CoCoRD: arms, contrasts and studies. Read by make, plot.py, the page and the tests.

An arm is run for a pair of networks, ARM@TEACHER-STUDENT, and gets the weights of a teacher, which is trained once.
"""

from collections.abc import Sequence
from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, SettingError, Settings, Study, Sweep

METRICS = {
    "accuracy": Metric("top-1 accuracy, last epoch", "%", 2, "higher"),
    "accuracy_best_epoch": Metric("best epoch, chosen on the test set (optimistic)", "%", 2, "higher", judged=False),
    "accuracy_slow_student": Metric("slow student's accuracy", "%", 2, "higher"),
    "teacher_accuracy": Metric("teacher's accuracy", "%", 2, "higher", judged=False),
    "contrastive_accuracy": Metric("contrastive top-1 among K + 1", "", 3, "higher"),
    "positive_cosine": Metric("cosine to the own key", "", 3),
    "negative_cosine": Metric("cosine to the queue", "", 3),
    "key_consistency": Metric("cosine of keys, epoch to epoch", "", 4),
    "teacher_head_shift": Metric("shift of the teacher's head", "", 3),
    "train_loss": Metric("training loss", "", 3, judged=False),
    "examples_per_second": Metric("training images per second", "", 0, judged=False),
}
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
CROSS = [
    pair for pair in PUBLISHED if "ResNet50" in pair or pair.split("-")[1] in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
]
PREDICTION = {"demo": ["vgg_s32-vgg_s"], "gpu": ["resnet56-resnet20"], "paper": list(PUBLISHED)}
MOMENTUM = {
    "demo": ["resnet_s64-vgg_s"],
    "gpu": ["vgg13-MobileNetV2", "wrn_40_2-ShuffleV1", "resnet32x4-ShuffleV2"],
    "paper": CROSS,
}
CONTROLS = {  # beside the cross-architecture pairs: one style and unequal widths, two families and equal widths
    "demo": ["vgg_s64-vgg_s", "resnet_s32-vgg_s"],
    "gpu": ["wrn_40_2-wrn_40_1", "resnet110-wrn_40_1"],
    "paper": ["wrn_40_2-wrn_40_1", "resnet110-wrn_40_1"],
}
MOMENTA = (0.9, 0.97, 0.997)
ALONE = "--lambda-contrast 0 --forward-weight 0 --swapped-weight 0"

# Margin: points of accuracy; at the published spread between seeds less is no evidence.
study = partial(Study, metric="accuracy", margin=0.3)
sweep = partial(study, extra=True, seeds=(0, 1, 2))


def student_of(pair: str) -> str:
    return pair.split("-")[1]


def teacher_of(pair: str) -> str:
    return pair.split("-")[0]


def arms_of(pair: str, scale: str) -> list[Arm]:
    """The arms of a pair of networks."""
    both = f"--teacher {teacher_of(pair)} --student {student_of(pair)}"
    double = 1 if scale == "demo" else 8  # twice the weight of one direction
    weights = (0.1, 0.25, 1, 2, 4) if scale == "demo" else (1, 2, 8, 16)
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
        "distillation": f"{ALONE} --lambda-kd 0.9 --lambda-class 0.1",
        **{f"forward-{x}": f"--forward-weight {x}" for x in weights},
        **{f"swapped-{x}": f"--swapped-weight {x}" for x in weights},
        **{f"momentum-{x}": f"--teacher-head partial --teacher-momentum {x}" for x in MOMENTA},
    }
    needs = f"teacher@{teacher_of(pair)}"
    return [Arm(f"{name}@{pair}", f"{both} {own}".strip(), needs=needs) for name, own in flags.items()]


def at(pair: str, *contrasts: str) -> list[str]:
    """Contrasts of a pair; `cross-entropy` has no teacher, so it stands for all pairs with this student."""
    named = [one.replace(":", f"@{pair}:") + f"@{pair}" for one in contrasts]
    return [one.replace(f"cross-entropy@{pair}", f"cross-entropy@{student_of(pair)}") for one in named]


def beats_cross_entropy(arm: str, pairs: Sequence[str]) -> list[MustBeat]:
    baselines = [f"cross-entropy@{student_of(pair)}" for pair in pairs]
    return [
        MustBeat(f"{arm}@{pair}", "cross-entropy alone", "accuracy", baseline_arm=baseline)
        for pair, baseline in zip(pairs, baselines, strict=True)
    ]


def published(pairs: Sequence[str]) -> str:
    """The numbers that the authors publish of these pairs: of the whole method alone."""
    rows = [
        f"{pair.replace('-', ' → ')} {alone:.2f}, {distilled:.2f}, {whole:.2f}"
        for pair in dict.fromkeys(pairs)
        if pair in PUBLISHED
        for alone, distilled, whole in [PUBLISHED[pair]]
    ]
    none = "no number of this ablation could be had"
    return f"{none}; student alone, KD, CoCoRD on CIFAR-100, 240 epochs: {'; '.join(rows)}" if rows else none


def design(scale: str, settings: Settings) -> Design:
    for pair in settings.pairs:
        if len(pair.split("-")) != 2 or not all(pair.split("-")):
            raise SettingError(f"PAIRS: '{pair}' is not a pair of networks: write TEACHER-STUDENT")
    prediction = list(settings.pairs) or PREDICTION[scale]
    momentum = list(settings.pairs) or MOMENTUM[scale]
    controls = [] if settings.pairs else CONTROLS[scale]
    pairs = list(dict.fromkeys([*prediction, *momentum, *controls]))
    arms = [arm for pair in pairs for arm in arms_of(pair, scale)]
    arms += [
        Arm(f"cross-entropy@{student}", f"--teacher none --student {student} {ALONE}")
        for student in dict.fromkeys(map(student_of, pairs))
    ]
    # At demo scale, where 0.999 hardly moves in few steps, a faster momentum stands beside it.
    fast = ["moving-fast:frozen"] if scale == "demo" else []
    doses = [arm.name.partition("@")[0] for arm in arms_of(prediction[0], scale)]
    forward, swapped = (
        [f"{name}:base" for name in doses if name.startswith(side) and name.removeprefix(side)[0].isdigit()]
        for side in ("forward-", "swapped-")
    )
    one, two = prediction[0], momentum[0]
    return Design(
        "cocord",
        "CoCoRD",
        METRICS,
        [
            study(
                "cocord-prediction-loss",
                "Does the prediction loss need both directions, and is it more than its weight?",
                [
                    *(
                        contrast
                        for pair in prediction
                        for contrast in at(pair, "forward-only:base", "swapped-only:base")
                    ),
                    *(
                        contrast
                        for pair in prediction
                        for contrast in at(
                            pair,
                            "none:base",
                            "forward-x2:base",
                            "swapped-x2:base",
                            "base:cross-entropy",
                            "distillation:base",
                        )
                    ),
                ],
                primary=2 * len(prediction),
                must_beat=beats_cross_entropy("base", prediction),
                published=published(prediction),
            ),
            study(
                "cocord-teacher-momentum",
                "Across architectures: may the teacher's head move with the student's, or must it stay?",
                [
                    *(contrast for pair in momentum for contrast in at(pair, "moving:frozen")),
                    *(
                        contrast
                        for pair in momentum
                        for contrast in at(
                            pair, *fast, "adapter-moving:adapter-frozen", "frozen:cross-entropy", "distillation:frozen"
                        )
                    ),
                    *(
                        contrast
                        for pair in controls
                        for contrast in at(pair, "moving:frozen", "frozen:cross-entropy", "distillation:frozen")
                    ),
                ],
                primary=len(momentum),
                must_beat=beats_cross_entropy("frozen", [*momentum, *controls]),
                published=published([*momentum, *controls]),
            ),
            sweep(
                "cocord-forward-weight",
                "How much of the forward term, beside the swapped one?",
                at(one, "swapped-only:base", *forward, "base:cross-entropy"),
                must_beat=beats_cross_entropy("base", [one]),
                published=published([one]),
                sweep=Sweep(["accuracy", "contrastive_accuracy"], "forward_weight", "weight of the forward term"),
            ),
            sweep(
                "cocord-swapped-weight",
                "How much of the swapped term, beside the forward one?",
                at(one, "forward-only:base", *swapped, "base:cross-entropy"),
                must_beat=beats_cross_entropy("base", [one]),
                published=published([one]),
                sweep=Sweep(["accuracy", "contrastive_accuracy"], "swapped_weight", "weight of the swapped term"),
            ),
            sweep(
                "cocord-momentum",
                "Across architectures: how slowly must the teacher's head move?",
                at(
                    two,
                    "moving:frozen",
                    "moving-fast:frozen",
                    *(f"momentum-{x}:frozen" for x in MOMENTA),
                    "frozen:cross-entropy",
                ),
                must_beat=beats_cross_entropy("frozen", [two]),
                published=published([two]),
                sweep=Sweep(
                    ["accuracy", "contrastive_accuracy", "teacher_head_shift"],
                    "teacher_momentum",
                    "momentum of the teacher's head (1: it stays)",
                ),
            ),
        ],
        arms=arms,
        teachers=[
            Arm(f"teacher@{network}", f"--network {network}") for network in dict.fromkeys(map(teacher_of, pairs))
        ],
        data="" if scale == "demo" or settings.own_data else "cifar-100-python",
        robustness=Robustness(["accuracy", "contrastive_accuracy"], published=published([*prediction, *momentum])),
    )
