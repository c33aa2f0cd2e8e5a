"""Experimental design of Seq-VCR: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests.

Arms are named ARM@SETTING. A setting is a task and a number of sequences per covariance. Results of different settings
are never pooled. `base` has the default coefficients of its task and represents that pair in the studies.
"""

from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, SettingError, Settings, Study, Sweep

METRICS = {
    "exact_match": Metric("exact match", "%", 1, "higher"),
    "entropy_mean": Metric("matrix entropy, mean over levels", "", 3),
    "entropy_min": Metric("matrix entropy, lowest inner level", "", 3),
    "entropy_batch_level": Metric("batch entropy at the regularised level", "", 3),
    "digit_accuracy": Metric("token accuracy", "%", 1, "higher"),
    "steps_to_solve": Metric("steps to solve", "", 0, "lower"),
    "variance_loss": Metric("variance loss", "", 3, judged=False),
    "covariance_loss": Metric("covariance loss", "", 3, judged=False),
    "projected_std": Metric("std of W h", "", 3),
    "predicted_std": Metric("predicted std of W h", "", 3),
    "regulariser_loss": Metric("regulariser loss", "", 3, judged=False),
    "predicted_loss": Metric("predicted regulariser loss", "", 3, judged=False),
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
PAIRS = ("0.5-0.002", "1-0.004", "2-0.008", "0.05-0.25", "0.1-0.5", "0.2-1")  # lambda1-lambda2
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

study = partial(Study, metric="exact_match", margin=3.0)
extra = partial(study, extra=True, n=5)


def primary_pair(setting: str) -> str:
    """Return the pair of coefficients in the primary contrast of a setting: the paper's for that task or batch."""
    return "0.1-0.5" if setting in ("arithmetic", "lis", "2x2-128") else "1-0.004"


def primary_arm(setting: str) -> str:
    """Return the arm with `primary_pair`. It is base, except in 2x2-128, where base has another pair."""
    return "0.1-0.5@2x2-128" if setting == "2x2-128" else f"base@{setting}"


def off_arm(setting: str) -> str:
    """Return the arm without regulariser. It has no covariance, so 2x2-128 shares the arm of 2x2."""
    return "off@2x2" if setting == "2x2-128" else f"off@{setting}"


def beats_majority(arm: str) -> MustBeat:
    """Require that `arm` has a higher exact match than the most frequent answer."""
    return MustBeat(arm, "the most frequent answer", "exact_match", baseline_metric="chance_exact_match")


def design(scale: str, settings: Settings) -> Design:
    """Return the design at `scale`. TASKS in `settings` replace the default tasks. Raises SettingError."""
    for task in settings.tasks:
        if task not in SETTINGS:
            raise SettingError(f"invalid TASKS='{task}': give {', '.join(SETTINGS)}")
    tasks = list(settings.tasks) or TASKS[scale]
    multiplication = [task for task in tasks if task in ("2x2", "4x4", "5x5")]
    setting = multiplication[0] if multiplication else tasks[0]  # for studies with a single setting

    def at_setting(*contrasts: str) -> list[str]:
        return [contrast.replace(":", f"@{setting}:") + f"@{setting}" for contrast in contrasts]

    def beats_off(arm: str) -> MustBeat:
        return MustBeat(f"{arm}@{setting}", "no regulariser", "exact_match", baseline_arm=f"off@{setting}")

    return Design(
        "seqvcr",
        "Seq-VCR",
        scale,
        METRICS,
        [
            study(
                "seqvcr-coefficients",
                "How do the coefficients of variance and covariance loss affect accuracy, in ratio and in strength?",
                [
                    *(f"{primary_arm(task)}:{off_arm(task)}" for task in tasks),
                    *(
                        f"{pair}@{task}:{off_arm(task)}"
                        for task in tasks
                        for pair in PAIRS
                        if pair != primary_pair(task)
                    ),
                ],
                primary=len(tasks),
                must_beat=[beats_majority(primary_arm(task)) for task in tasks],
                published="none published for other pairs; with pause tokens, without and with the default pair: exact "
                "match 28 and 99.2 % on 4x4 digits, 0 and 99.5 % on 5x5 digits (table 1; GPT-2 small, fine-tuned for "
                "40 epochs of 808,000 rows; number of seeds not given)",
            ),
            study(
                "seqvcr-projection-width",
                "How wide should the projection be?",
                at_setting("width-4096:width-512", *(f"width-{d}:base" for d in WIDTHS), "base:off"),
                must_beat=[beats_off("base")],
            ),
            extra(
                "seqvcr-strength",
                "How strong should the regulariser be, at the default ratio of the coefficients?",
                at_setting("base:off", *(f"{pair}:off" for pair in STRENGTHS), "0.5-0.002:off", "2-0.008:off"),
                must_beat=[beats_majority(f"base@{setting}")],
                sweep=Sweep(
                    ["exact_match", "digit_accuracy", "entropy_batch_level", "entropy_mean"],
                    "lambda1",
                    "λ₁, with λ₂ = 0.004 λ₁",
                    ["lambda2"],
                ),
            ),
            extra(
                "seqvcr-layer",
                "Which level should be regularised, and over which axis?",
                at_setting("layer-last:base", "layer-1:base", "batch-length:base", "last-batch-length:base"),
                must_beat=[beats_majority(f"base@{setting}")],
                published="exact match on 5x5 digits from scratch: last level 3 %, level 0 97 %; covariance over batch "
                "and length 87 and 99 % (table 7; GPT-2 small)",
            ),
            extra(
                "seqvcr-last-width",
                "How wide should the projection be at the last level, where the batch size bounds the covariance rank?",
                at_setting(
                    "last-width-4096:last-width-512",
                    *(f"last-width-{d}:layer-last" for d in WIDTHS),
                    "layer-last:off",
                ),
                must_beat=[beats_off("layer-last")],
            ),
            extra(
                "seqvcr-pause",
                "How many pause tokens help, with and without the regulariser?",
                at_setting(*(f"pause-{k}:base" for k in PAUSES), "base:off", *(f"off-pause-{k}:off" for k in PAUSES)),
                must_beat=[beats_majority(f"base@{setting}")],
                published="figure 7 (plot only, no numbers)",
            ),
        ],
        arms=[
            Arm(f"{name}@{task}", f"{task_flags} {arm_flags}".strip())
            for task, task_flags in SETTINGS.items()
            for name, arm_flags in FLAGS.items()
        ],
        baselines=["chance_exact_match"],
        chance={"exact_match": {"": 0.0}},
        base=f"base@{setting}",
        robustness=Robustness(
            ["exact_match", "entropy_batch_level"],
            [*(beats_majority(primary_arm(task)) for task in tasks), beats_off("width-512")],
        ),
    )
