"""The experimental design of Seq-VCR: arms, contrasts and studies. Read by make, plot.py, the page and the tests.

An arm is run in a setting, ARM@SETTING: a task, and the batch that its covariances are taken over. Settings are never
pooled. `base` has the task's own pair of coefficients; where that is one of the six pairs it stands for it.
"""

from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, SettingError, Settings, Study, Sweep

METRICS = {
    "exact_match": Metric("exact match", "%", 1, "higher"),
    "entropy_mean": Metric("matrix entropy, mean", "", 3),
    "entropy_min": Metric("matrix entropy, lowest inner level", "", 3),
    "entropy_batch_level": Metric("batch entropy at its level", "", 3),
    "digit_accuracy": Metric("token accuracy", "%", 1, "higher"),
    "steps_to_solve": Metric("steps to solve", "", 0, "lower"),
    "variance_loss": Metric("variance loss", "", 3, judged=False),
    "covariance_loss": Metric("covariance loss", "", 3, judged=False),
    "projected_std": Metric("deviation of W h", "", 3),
    "predicted_std": Metric("predicted deviation", "", 3),
    "regulariser_loss": Metric("loss of the regulariser", "", 3, judged=False),
    "predicted_loss": Metric("its predicted floor", "", 3, judged=False),
    "cross_entropy": Metric("training cross entropy", "", 3, judged=False),
}
SETTINGS = {
    "2x2": "--task multiplication --size 2",
    "2x2-128": "--task multiplication --size 2 --covariance-batch 128",
    "4x4": "--task multiplication --size 4",
    "5x5": "--task multiplication --size 5",
    "arithmetic": "--task arithmetic --size 5",
    "lis": "--task lis --size 50",
}
TASKS = {"demo": ["2x2", "2x2-128"], "gpu": ["4x4", "arithmetic"], "paper": ["5x5", "4x4"]}
PAIRS = ("0.5-0.002", "1-0.004", "2-0.008", "0.05-0.25", "0.1-0.5", "0.2-1")  # lambda1-lambda2, the six of the plan
STRENGTHS = ("0.1-0.0004", "0.3-0.0012", "3-0.012", "10-0.04")
WIDTHS = (512, 1024, 4096)
PAUSES = (0, 4, 8)
OFF = "--lambda1 0 --lambda2 0"
FLAGS = {
    "base": "",
    "off": OFF,
    **{pair: "--lambda1 {} --lambda2 {}".format(*pair.split("-")) for pair in (*PAIRS, *STRENGTHS)},
    **{f"width-{d}": f"--projection-width {d}" for d in WIDTHS},
    "layer-1": "--layer 1",
    "layer-last": "--layer last",
    "batch-length": "--covariance-axis batch+length",
    "last-batch-length": "--layer last --covariance-axis batch+length",
    **{f"last-width-{d}": f"--layer last --projection-width {d}" for d in WIDTHS},
    **{f"pause-{k}": f"--pause {k}" for k in PAUSES},
    **{f"off-pause-{k}": f"{OFF} --pause {k}" for k in PAUSES},
}

study = partial(Study, metric="exact_match")
extra = partial(study, extra=True, seeds=(0, 1, 2))


def own_pair(task: str) -> str:
    """The pair that carries a setting's verdict: the task's default, or the other family's over a batch of 128."""
    return "0.1-0.5" if task in ("arithmetic", "lis", "2x2-128") else "1-0.004"


def first(task: str) -> str:
    """The arm of `own_pair`: base, which has the task's default."""
    return "0.1-0.5@2x2-128" if task == "2x2-128" else f"base@{task}"


def off(task: str) -> str:
    """No regulariser. It has no covariance, so that 2x2-128 takes 2x2's."""
    return "off@2x2" if task == "2x2-128" else f"off@{task}"


def beats_chance(arm: str) -> MustBeat:
    return MustBeat(arm, "the most frequent answer", "exact_match", baseline_metric="chance_exact_match")


def design(scale: str, settings: Settings) -> Design:
    for task in settings.tasks:
        if task not in SETTINGS:
            raise SettingError(f"TASKS: there is no '{task}', but {', '.join(SETTINGS)}")
    tasks = list(settings.tasks) or TASKS[scale]
    wide = next((task for task in tasks if task in ("2x2", "4x4", "5x5")), tasks[0])  # of the studies with one setting

    def at(*contrasts: str) -> list[str]:
        return [one.replace(":", f"@{wide}:") + f"@{wide}" for one in contrasts]

    def beats_off(arm: str) -> MustBeat:
        return MustBeat(f"{arm}@{wide}", "no regulariser", "exact_match", baseline_arm=f"off@{wide}")

    return Design(
        "seqvcr",
        "Seq-VCR",
        METRICS,
        [
            study(
                "seqvcr-coefficients",
                "What do variance and covariance contribute, in which proportion and at which strength?",
                [
                    *(f"{first(task)}:{off(task)}" for task in tasks),
                    *(f"{pair}@{task}:{off(task)}" for task in tasks for pair in PAIRS if pair != own_pair(task)),
                ],
                primary=len(tasks),
                must_beat=[beats_chance(first(task)) for task in tasks],
                published="none published for other pairs; with pause tokens, without and with the default pair: exact "
                "match 28 and 99.2 of 4x4 digits, 0 and 99.5 of 5x5 (table 1; GPT-2 small fine-tuned, 40 epochs of "
                "808,000 rows, no seeds given)",
            ),
            study(
                "seqvcr-projection-width",
                "How wide has the projection to be?",
                at("width-4096:width-512", *(f"width-{d}:base" for d in WIDTHS), "base:off"),
                must_beat=[beats_off("base")],
            ),
            extra(
                "seqvcr-strength",
                "How strong should the regulariser be, in the default pair's proportion?",
                at("base:off", *(f"{pair}:off" for pair in STRENGTHS), "0.5-0.002:off", "2-0.008:off"),
                must_beat=[beats_chance(f"base@{wide}")],
                sweep=Sweep(
                    ["exact_match", "digit_accuracy", "entropy_batch_level", "entropy_mean"],
                    "lambda1",
                    "λ₁, with λ₂ = 0.004 λ₁",
                    ["lambda2"],
                ),
            ),
            extra(
                "seqvcr-layer",
                "Which level is regularised best, and over which axis?",
                at("layer-last:base", "layer-1:base", "batch-length:base", "last-batch-length:base"),
                must_beat=[beats_chance(f"base@{wide}")],
                published="exact match of 5x5 digits from scratch: last level 3, level 0 97; over batch and length 87 "
                "and 99 (table 7; GPT-2 small)",
            ),
            extra(
                "seqvcr-last-width",
                "How wide at the last level, where the batch bounds the covariance's rank?",
                at("last-width-4096:last-width-512", *(f"last-width-{d}:layer-last" for d in WIDTHS), "layer-last:off"),
                must_beat=[beats_off("layer-last")],
            ),
            extra(
                "seqvcr-pause",
                "How many pause tokens help, with the regulariser and without?",
                at(*(f"pause-{k}:base" for k in PAUSES), "base:off", *(f"off-pause-{k}:off" for k in PAUSES)),
                must_beat=[beats_chance(f"base@{wide}")],
                published="figure 7, without numbers",
            ),
        ],
        arms=[
            Arm(f"{name}@{task}", f"{flags} {own}".strip())
            for task, flags in SETTINGS.items()
            for name, own in FLAGS.items()
        ],
        baselines=["chance_exact_match"],
        robustness=Robustness(
            ["exact_match", "entropy_batch_level"],
            [*(beats_chance(first(task)) for task in tasks), beats_off("width-512")],
        ),
    )
