"""Experimental design of ConMIM: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests.

Keys (ema, online), views (asymmetric, basic) and stop-gradient (with, without) form a factorial of eight cells. With
ema keys the stop-gradient has no effect (bit-identical weights, a test checks this), so only six cells are run.
"""

from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, Settings, Study, Sweep

METRICS = {
    "finetune_accuracy": Metric("fine-tuned accuracy", "%", 1, "higher"),
    "finetune_accuracy_online": Metric("fine-tuned, online weights", "%", 1, "higher"),
    "linear_accuracy": Metric("linear accuracy", "%", 1, "higher"),
    "linear_accuracy_online": Metric("linear, online weights", "%", 1, "higher"),
    "knn_accuracy": Metric("kNN accuracy", "%", 1, "higher"),
    "knn_accuracy_online": Metric("kNN, online weights", "%", 1, "higher"),
    "own_top1": Metric("own-key top-1", "", 3),
    "cross_top1": Metric("cross-image top-1", "", 3),
    "position_r2": Metric("position R²", "", 3),
    "key_effective_rank": Metric("effective rank of the keys", "", 1),
    "key_linear_accuracy": Metric("linear accuracy of the keys", "%", 1, "higher"),
    "train_loss": Metric("training loss", "", 3, judged=False),
    "clipped_fraction": Metric("share of clipped steps", "", 3, judged=False),
}
LEAKS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # values of --gradient-leak; 1 is no stop-gradient

no_pretraining = MustBeat("base", "no pre-training", "finetune_accuracy", baseline_arm="no-pretraining")
study = partial(Study, metric="finetune_accuracy", margin=3.0, must_beat=[no_pretraining])


def design(scale: str, settings: Settings) -> Design:
    """Return the arms and studies of ConMIM at `scale`."""
    return Design(
        "conmim",
        "ConMIM",
        scale,
        METRICS,
        [
            study(
                "conmim-stop-gradient",
                "What does the stop-gradient contribute if the keys come from the trained network?",
                [
                    Arm("online-no-stop-gradient", "--keys online --no-stop-gradient", reference="online-keys"),
                    Arm(
                        "symmetric-no-stop-gradient",
                        "--keys online --views basic --no-stop-gradient",
                        reference="symmetric",
                    ),
                    "online-keys:base",
                    "base:no-pretraining",
                ],
                published="none published for a removed stop-gradient; keys from the trained network: -1.98 points of "
                "fine-tuned accuracy (table 8; ImageNet; architecture and epochs not known)",
            ),
            study(
                "conmim-asymmetry",
                "What do asymmetric views and the momentum encoder contribute, each alone and both together?",
                ["symmetric:base", "basic-views:base", "online-keys:base", "base:no-pretraining"],
                published="fine-tuned accuracy: -1.98 points without the momentum encoder; -0.10 and -0.16 with "
                "symmetric and switched views (which is which is not known); none for both together (table 8; "
                "ImageNet; architecture and epochs not known)",
            ),
            study(
                "conmim-gradient-leak",
                "What share of the keys' gradient turns the keys into a position code?",
                [
                    "online-no-stop-gradient:online-keys",
                    *(Arm(f"leak-{x}", f"--keys online --gradient-leak {x}", reference="online-keys") for x in LEAKS),
                    "base:no-pretraining",
                ],
                extra=True,
                n=5,
                sweep=Sweep(
                    ["finetune_accuracy", "linear_accuracy", "position_r2", "cross_top1"],
                    "gradient_leak",
                    "share of the gradient that reaches the keys (online keys)",
                ),
            ),
        ],
        arms=[
            Arm("base"),
            Arm("basic-views", "--views basic"),
            Arm("online-keys", "--keys online"),
            Arm("symmetric", "--keys online --views basic"),
            Arm("no-pretraining", "--epochs 0"),
        ],
        data="cifar-10-batches-py" if scale == "gpu" and not settings.own_data else "",
        chance={"finetune_accuracy": {"glyphs36": 100 / 36, "cifar10": 10.0}},
        robustness=Robustness(["finetune_accuracy", "position_r2", "own_top1"]),
    )
