"""Experimental design of SimSiam: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests."""

from dataclasses import replace
from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, Settings, Study, Sweep

METRICS = {  # four main metrics, then diagnostics
    "linear_accuracy": Metric("linear accuracy", "%", 1, "higher"),
    "knn_accuracy": Metric("kNN accuracy", "%", 1, "higher"),
    "train_loss": Metric("training loss", "", 3, judged=False),
    "std_ratio": Metric("std of z × √d, eval mode", "", 2),
    "std_ratio_train_mode": Metric("std of z × √d, train mode", "", 2),
    "mean_cosine": Metric("mean cosine between images", "", 2),
    "effective_rank": Metric("effective rank of z", "", 1),
    "knn_accuracy_z": Metric("kNN accuracy on z", "%", 1, "higher"),
    "untrained_knn_accuracy": Metric("untrained kNN accuracy", "%", 1, judged=False),
    "untrained_linear_accuracy": Metric("untrained linear accuracy", "%", 1, judged=False),
}
CHANCE = {"glyphs10": 10.0, "mnist5k": 10.0, "cifar10": 10.0}  # kNN accuracy in percent, by data set
LEAKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # values of --gradient-leak; 0 is base, 1 is no-stop-gradient


def beats_untrained(arm: str) -> MustBeat:
    """Require that `arm` has a higher kNN accuracy than its untrained network."""
    return MustBeat(arm, "untrained", "knn_accuracy", baseline_metric="untrained_knn_accuracy")


# The verdict "no difference" requires an interval within +-5 points of kNN accuracy (margin).
study = partial(Study, metric="knn_accuracy", margin=5.0, must_beat=[beats_untrained("base")])


def on_mnist(main_study: Study) -> Study:
    """Return `main_study` on MNIST-5k as an extra study; its arms are named NAME@mnist5k."""
    return replace(
        main_study,
        name=f"{main_study.name}-mnist5k",
        question=f"{main_study.question[:-1]}, on handwritten digits?",
        contrasts=[f"{arm}@mnist5k:{reference}@mnist5k" for arm, reference in main_study.pairs],
        must_beat=[beats_untrained(f"{item.arm}@mnist5k") for item in main_study.must_beat],
        extra=True,
    )


def design(scale: str, settings: Settings) -> Design:
    """Return the arms and studies of SimSiam at `scale`."""
    flags = {
        "base": "",
        "no-stop-gradient": "--no-stop-gradient",
        "no-predictor": "--predictor none",
        "frozen-predictor": "--predictor frozen",
        "no-projector": "--projector none",
        "projector-bn": "--projector bn",
        "narrow": "--dim backbone",
        "asymmetric": "--loss asymmetric",
        "asymmetric-2x": "--loss asymmetric-2x",
        "no-bn": "--head-bn none",
        "hidden-bn": "--head-bn hidden",
        **{f"leak-{x}": f"--gradient-leak {x}" for x in LEAKS},
    }
    projectors = ["no-projector:base", "projector-bn:base"]
    if scale == "paper":  # there `narrow` equals base: the width of ResNet-50 is 2048
        del flags["narrow"]
    else:
        projectors.append("narrow:base")
    main_studies = [
        study(
            "simsiam-stop-gradient",
            "What does the stop-gradient contribute?",
            ["no-stop-gradient:base"],
            published="linear 67.7 ± 0.1 with, 0.1 without (figure 2; ImageNet, ResNet-50, 100 epochs, predictor "
            "learning rate decayed)",
        ),
        study(
            "simsiam-predictor",
            "What does the predictor contribute, and does it have to learn?",
            [
                "no-predictor:base",
                "frozen-predictor:base",
            ],
            published="linear 67.7 with, 0.1 without, 1.5 fixed at its random start (table 1; ImageNet, ResNet-50, "
            "100 epochs)",
        ),
        study("simsiam-projector", "What does the projector contribute?", projectors),
        study(
            "simsiam-symmetric-loss",
            "What does the symmetric loss contribute, beyond twice as many comparisons?",
            ["asymmetric:base", "asymmetric-2x:base"],
            primary=2,
            published="linear 68.1 symmetric, 64.8 asymmetric, 67.3 asymmetric with two pairs an image (section "
            "4.6; ImageNet, ResNet-50, 100 epochs)",
        ),
    ]
    arms = [Arm(name, arm_flags) for name, arm_flags in flags.items()]
    # An arm may also be declared in the contrasts of a study, as in README.md.
    in_contrasts = [arm for main_study in main_studies for arm in main_study.contrasts if isinstance(arm, Arm)]
    mnist_arms = [
        Arm(f"{arm.name}@mnist5k", f"{arm.flags} --data-set mnist5k".strip(), data="mnist5k.pt")
        for arm in [*arms, *in_contrasts]
        if any(arm.name in main_study.arms for main_study in main_studies)
    ]
    rates = ["", "@third", "@triple"]
    extras = [
        study(
            "simsiam-calibration",
            "Do batch norm in the heads and a frozen predictor act as published?",
            ["no-bn:base", "hidden-bn:base", "frozen-predictor:base"],
            primary=3,
            published="linear 34.6 without batch norm in the heads (with 10 epochs of warm-up, which ours lacks), 67.4 "
            "without that at the projector's output, 68.1 by default (table 3); 1.5 with a frozen predictor, 67.7 by "
            "default (table 1); ImageNet, ResNet-50, 100 epochs",
            extra=True,
            expected={"no-bn": "worse", "hidden-bn": "no difference", "frozen-predictor": "worse"},
        ),
        study(
            "simsiam-projector-rates",
            "Does the projector's contribution depend on the learning rate?",
            [f"no-projector{rate}:base{rate}" for rate in rates],
            n_other=10,
            must_beat=[beats_untrained(f"base{rate}") for rate in rates],
            extra=True,
            sweep=Sweep(["knn_accuracy", "linear_accuracy"]),
        ),
        study(
            "simsiam-gradient-leak",
            "How much of the target's gradient may pass before the representation collapses?",
            ["no-stop-gradient:base", *(f"leak-{x}:base" for x in LEAKS)],
            n_other=10,
            extra=True,
            sweep=Sweep(
                ["knn_accuracy", "linear_accuracy", "std_ratio", "mean_cosine"],
                "gradient_leak",
                "share of the target's gradient that passes",
            ),
        ),
    ]
    demo = scale == "demo"
    return Design(
        "simsiam",
        "SimSiam",
        scale,
        METRICS,
        [*main_studies, *extras, *(map(on_mnist, main_studies) if demo else ())],
        arms=[*arms, *(mnist_arms if demo else ())],
        data="cifar-10-batches-py" if scale == "gpu" and not settings.own_data else "",
        baselines=["untrained_knn_accuracy"],
        chance={"knn_accuracy": CHANCE},
        robustness=Robustness(["knn_accuracy", "std_ratio"]),
    )
