"""Experimental design of SimSiam: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests."""

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
}
LEAKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # values of --gradient-leak; 0 is base, 1 is no-stop-gradient


def beats_untrained(arm: str) -> MustBeat:
    """Require that `arm` has a higher kNN accuracy than its untrained network."""
    return MustBeat(arm, "untrained", "knn_accuracy", baseline_metric="untrained_knn_accuracy")


# The verdict "no difference" requires an interval within +-5 points of kNN accuracy (margin).
study = partial(Study, metric="knn_accuracy", margin=5.0, must_beat=[beats_untrained("base")])


def design(scale: str, settings: Settings) -> Design:
    """Return the arms and studies of SimSiam at `scale`."""
    projectors = [
        Arm("no-projector", "--projector none", reference="base"),
        Arm("projector-bn", "--projector bn", reference="base"),
    ]
    if scale != "paper":  # at paper scale it equals base: the width of ResNet-50 is 2048
        projectors.append(Arm("narrow", "--dim backbone", reference="base"))
    return Design(
        "simsiam",
        "SimSiam",
        METRICS,
        [
            study(
                "simsiam-stop-gradient",
                "What does the stop-gradient contribute?",
                [Arm("no-stop-gradient", "--no-stop-gradient", reference="base")],
                published="linear 67.7 ± 0.1 with, 0.1 without (figure 2; ImageNet, ResNet-50, 100 epochs, predictor "
                "learning rate decayed)",
            ),
            study(
                "simsiam-predictor",
                "What does the predictor contribute, and does it have to learn?",
                [
                    Arm("no-predictor", "--predictor none", reference="base"),
                    Arm("frozen-predictor", "--predictor frozen", reference="base"),
                ],
                published="linear 67.7 with, 0.1 without, 1.5 fixed at its random start (table 1; ImageNet, ResNet-50, "
                "100 epochs)",
            ),
            study("simsiam-projector", "What does the projector contribute?", projectors),
            study(
                "simsiam-symmetric-loss",
                "What does the symmetric loss contribute, and is it more than twice the comparisons?",
                [
                    Arm("asymmetric", "--loss asymmetric", reference="base"),
                    Arm("asymmetric-2x", "--loss asymmetric-2x", reference="base"),
                ],
                published="linear 68.1 symmetric, 64.8 asymmetric, 67.3 asymmetric with two pairs an image (section "
                "4.6; ImageNet, ResNet-50, 100 epochs)",
            ),
            study(
                "simsiam-gradient-leak",
                "How much of the target's gradient may pass before the representation collapses?",
                [
                    "no-stop-gradient:base",
                    *(Arm(f"leak-{x}", f"--gradient-leak {x}", reference="base") for x in LEAKS),
                ],
                extra=True,
                seeds=(0, 1, 2),
                sweep=Sweep(
                    ["knn_accuracy", "linear_accuracy", "std_ratio", "mean_cosine"],
                    "gradient_leak",
                    "share of the target's gradient that passes",
                ),
            ),
        ],
        arms=[Arm("base")],
        data="cifar-10-batches-py" if scale == "gpu" and not settings.own_data else "",
        baselines=["untrained_knn_accuracy"],
        robustness=Robustness(["knn_accuracy", "std_ratio"]),
    )
