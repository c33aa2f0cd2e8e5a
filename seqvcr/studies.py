"""Experimental design of Seq-VCR: arms, contrasts and studies. Read by make, plot.py, the HTML page and the tests.

Arms are named ARM@SETTING. A setting is a task and a number of sequences per covariance. Results of different settings
are never pooled. `base` has the default coefficients of its task and represents that pair in the studies.
"""

from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, SettingError, Settings, Study, Sweep
from common.study.names import setting_of

METRICS = {
    "exact_match": Metric("exact match", "%", 1, "higher"),
    "entropy_mean": Metric("matrix entropy, mean over levels", "", 3),
    "entropy_min": Metric("matrix entropy, lowest inner level", "", 3),
    "entropy_batch_level": Metric("batch entropy at the arm's own level", "", 3),
    "digit_accuracy": Metric("token accuracy", "%", 1, "higher"),
    "test_cross_entropy": Metric("test cross entropy", "", 3, "lower"),
    "steps_to_solve": Metric("steps to solve", "", 0, "lower", judged=False),
    "variance_loss": Metric("variance loss", "", 3, judged=False),
    "covariance_loss": Metric("covariance loss", "", 3, judged=False),
    "projected_std": Metric("std of W h", "", 3),
    "predicted_std": Metric("predicted std of W h", "", 3, judged=False),
    "std_to_predicted": Metric("std of W h / predicted", "", 3),
    "regulariser_loss": Metric("regulariser loss", "", 3, judged=False),
    "predicted_loss": Metric("predicted regulariser loss", "", 3, judged=False),
    "cross_entropy": Metric("training cross entropy", "", 3, judged=False),
    "clipped_fraction": Metric("share of clipped steps", "", 3, judged=False),
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
LEVELS = ("0", "1", "last")
BASE_LEVEL = {"demo": "last", "gpu": "0", "paper": "last"}  # --layer of base
OFF = "--lambda1 0 --lambda2 0"

study = partial(Study, metric="exact_match", margin=3.0)
extra = partial(study, extra=True)


def flags_of_arms(scale: str, setting: str) -> dict[str, str]:
    """Return the flags of every arm of a setting at `scale`, without those of the setting itself."""
    other_levels = [level for level in LEVELS if level != BASE_LEVEL[scale]]
    other = other_level(scale)
    double = {"demo": 5000, "gpu": 120_000, "paper": 2_020_000}[scale]
    flags = {
        "base": "",
        "off": OFF,
        **{pair: coefficients(pair) for pair in (*PAIRS, *STRENGTHS, "0.3-0.05")},
        **{f"width-{d}": f"--projection-width {d}" for d in (256, *WIDTHS)},
        **{f"level-{level}": f"--layer {level}" for level in other_levels},
        **{f"level-{level}-batch-length": f"--layer {level} --covariance-axis batch+length" for level in LEVELS},
        f"off-level-{other}": f"{OFF} --layer {other}",  # equals off; the entropy is that of the other level
        **{f"level-{other}-width-{d}": f"--layer {other} --projection-width {d}" for d in WIDTHS},
        **{f"pause-{k}": f"--pause {k}" for k in PAUSES},
        **{f"off-pause-{k}": f"{OFF} --pause {k}" for k in PAUSES},
        "off-half-rate": f"{OFF} --lr-factor 0.5",
        "off-double-steps": f"{OFF} --steps {double}",
        "base-double-steps": f"--steps {double}",
    }
    if scale == "demo":
        flags["batch-64"] = "--covariance-batch 64"
    if scale != "paper" and "multiplication" in SETTINGS[setting]:
        flags["chain-of-thought"] = f"{OFF} --pause 0 --chain-of-thought"
    return flags


def coefficients(pair: str) -> str:
    """Return the flags of a pair "lambda1-lambda2"."""
    return "--lambda1 {} --lambda2 {}".format(*pair.split("-"))


def other_level(scale: str) -> str:
    """Return the level that table 7 compares with the level of base."""
    return "last" if BASE_LEVEL[scale] == "0" else "0"


def base_pair(setting: str) -> str:
    """Return the coefficients of base, which are the defaults of the task."""
    return "0.1-0.5" if setting in ("arithmetic", "lis") else "1-0.004"


def arm_of_pair(pair: str, setting: str) -> str:
    """Return the arm with a pair of coefficients; it is base if they are the default."""
    return f"{'base' if pair == base_pair(setting) else pair}@{setting}"


def paper_pair(setting: str) -> str:
    """Return the paper's pair for a setting. With 128 sequences per covariance it is that of the other tasks."""
    return "0.1-0.5" if setting == "2x2-128" else base_pair(setting)


def off_arm(setting: str) -> str:
    """Return the arm without regulariser. It has no covariance, so 2x2-128 shares the arm of 2x2."""
    return "off@2x2" if setting == "2x2-128" else f"off@{setting}"


def beats_off(arm: str) -> MustBeat:
    """Require that `arm` has a higher exact match than the arm without regulariser."""
    return MustBeat(arm, "no regulariser", "exact_match", baseline_arm=off_arm(setting_of(arm)))


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
        pairs = [contrast.split(":") for contrast in contrasts]
        return [":".join(off_arm(setting) if arm == "off" else f"{arm}@{setting}" for arm in pair) for pair in pairs]

    own = {task: arm_of_pair(paper_pair(task), task) for task in tasks}
    others = {task: arm_of_pair("1-0.004" if paper_pair(task) == "0.1-0.5" else "0.1-0.5", task) for task in tasks}
    level, other = BASE_LEVEL[scale], other_level(scale)
    expected = {}
    if "chain-of-thought" in flags_of_arms(scale, setting):  # multiplication from scratch
        expected[f"level-{other}@{setting}"] = "better" if level == "last" else "worse"  # in table 7 level 0 is better
        expected[f"chain-of-thought@{setting}"] = "better"
    calibration = extra(
        "seqvcr-calibration",
        "Does the regularised level matter, and do chains of thought help, as published?",
        [f"{arm}:{f'base@{setting}' if 'level' in arm else off_arm(setting)}" for arm in expected],
        primary=len(expected),
        published="exact match on 5x5 digits from scratch: last level 3 %, level 0 97 % (table 7); "
        "chains of thought solve 4x4 and 5x5 digits (table 1); both with GPT-2 small",
        expected=expected,
    )
    prediction = extra(
        "seqvcr-prediction",
        "Is std of W h / predicted the same as in base for another batch, width and ratio, and with more steps?",
        at_setting("batch-64:base", "width-256:base", "0.3-0.05:base", "base-double-steps:base"),
        primary=4,
        metric="std_to_predicted",
        margin=0.05,
        n=5,
        must_beat=[beats_majority(f"base@{setting}")],
    )
    strength = extra(
        "seqvcr-strength",
        "How strong should the regulariser be, at the default ratio of the coefficients?",
        at_setting("base:off", *(f"{pair}:off" for pair in STRENGTHS), "0.5-0.002:off", "2-0.008:off"),
        n=5,
        must_beat=[beats_majority(f"base@{setting}")],
        sweep=Sweep(
            ["exact_match", "digit_accuracy", "entropy_batch_level", "entropy_mean"],
            "lambda1",
            "λ₁, with λ₂ = 0.004 λ₁",
            ["lambda2"],
        ),
    )
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
                    *(f"{others[task]}:{own[task]}" for task in tasks),
                    *(f"{arm_of_pair(pair, task)}:{off_arm(task)}" for task in tasks for pair in PAIRS),
                ],
                primary=len(tasks),
                second_metric="entropy_batch_level",
                must_beat=[beats_off(own[task]) for task in tasks],
                published="none published for other pairs; with pause tokens, without and with the default pair: exact "
                "match 28 and 99.2 % on 4x4 digits, 0 and 99.5 % on 5x5 digits (table 1; GPT-2 small, fine-tuned for "
                "40 epochs of 808,000 rows; number of seeds not given)",
            ),
            study(
                "seqvcr-projection-width",
                "How wide should the projection be?",
                at_setting("width-4096:width-512", *(f"width-{d}:base" for d in WIDTHS), "base:off"),
                metric="entropy_batch_level",
                margin=None,
                second_metric="exact_match",
                must_beat=[beats_off(f"{arm}@{setting}") for arm in ("width-512", "base")],
            ),
            *([calibration] if expected else []),
            extra(
                "seqvcr-level",
                "Which level should be regularised, and over which axis?",
                at_setting(
                    *(f"level-{name}:base" for name in LEVELS if name != level),
                    *(f"level-{name}-batch-length:base" for name in LEVELS),
                    "base:off",
                ),
                n_other=10,
                must_beat=[beats_off(f"base@{setting}")],
                published="exact match on 5x5 digits from scratch: last level 3 %, level 0 97 %; covariance over batch "
                "and length 87 and 99 % (table 7; GPT-2 small)",
            ),
            extra(
                "seqvcr-equal-time",
                "Is the regulariser still ahead if training without it has another rate or twice the steps?",
                at_setting("base:off-double-steps", "base:off-half-rate", "base:off"),
                must_beat=[beats_off(f"base@{setting}")],
            ),
            *([prediction] if scale == "demo" else []),
            *([strength] if base_pair(setting) == "1-0.004" else []),
            extra(
                f"seqvcr-level-{other}-width",
                "How wide should the projection be at the other level of table 7?",
                at_setting(
                    f"level-{other}-width-4096:level-{other}-width-512",
                    *(f"level-{other}-width-{d}:level-{other}" for d in WIDTHS),
                    f"level-{other}:off-level-{other}",
                ),
                metric="entropy_batch_level",
                margin=None,
                n=5,
                must_beat=[beats_off(f"level-{other}{arm}@{setting}") for arm in ("-width-512", "")],
            ),
            extra(
                "seqvcr-pause",
                "How many pause tokens help, with and without the regulariser?",
                at_setting(*(f"pause-{k}:base" for k in PAUSES), "base:off", *(f"off-pause-{k}:off" for k in PAUSES)),
                n=5,
                must_beat=[beats_majority(f"base@{setting}")],
                published="figure 7 (plot only, no numbers)",
            ),
        ],
        arms=[
            Arm(f"{name}@{task}", f"{task_flags} {arm_flags}".strip())
            for task, task_flags in SETTINGS.items()
            for name, arm_flags in flags_of_arms(scale, task).items()
        ],
        baselines=["chance_exact_match"],
        chance={"exact_match": {"": 0.0}},
        base=f"base@{setting}",
        robustness=Robustness(["exact_match", "entropy_batch_level"]),
    )
