"""Experimental design of BSA: metrics, arms, contrasts and studies. Read by make, plot.py, the page and the tests."""

from functools import partial

from common.study.design import Arm, Design, Metric, MustBeat, Robustness, Settings, Study, Sweep

METRICS = {  # the first six are the main metrics, the others diagnostics
    "reconstruction_loss": Metric("reconstruction loss", "", 3, "lower"),
    "fixed_topk_reconstruction_loss": Metric("fixed top-K reconstruction loss", "", 3, "lower"),
    "fixed_topk_knn_overlap": Metric("fixed top-K kNN overlap", "", 3, "higher"),
    "active_mean": Metric("active features, mean", "", 1),
    "active_std": Metric("active features, std over rows", "", 1),
    "dead_fraction": Metric("share of dead features", "", 3),
    "always_on_fraction": Metric("share of features active in more than half of the rows", "", 3),
    "rare_fraction": Metric("share of features active in under K/(10 N) of the rows", "", 3),
    "knn_overlap": Metric("kNN overlap", "", 3, "higher"),
    "bits_per_row": Metric("code size", "bits per row", 0),
    "entropy_bits_per_row": Metric("entropy of the features", "bits per row", 0),
    "distinct_codes": Metric("distinct codes per row", "", 3),
    "reconstruction_mse": Metric("squared error per channel", "", 3, judged=False),
    "fixed_topk_reconstruction_mse": Metric("fixed top-K squared error per channel", "", 3, judged=False),
    "train_loss": Metric("training loss", "", 3, judged=False),
    "loss_moved": Metric("change of the loss over the last 20 % of training", "%", 1),
    "active_mean_moved": Metric("change of active features over the last 20 % of training", "%", 1),
    "settled_step": Metric("converged at step", "", 0),
    "atom_recovery_f1": Metric("F1 of planted atoms", "", 3, "higher"),
    "depth_correlation": Metric("correlation of active features with depth", "", 2),
    "atom_count_correlation": Metric("correlation of active features with true atoms", "", 2),
}
PUBLISHED = "none available (the paper's tables are not public; it claims 14 times smaller codes)"


def beats_untrained(arm: str) -> MustBeat:
    """Return the baseline that `arm` must beat: zK of its untrained encoder, with the best linear decoder for it."""
    metric = "fixed_topk_reconstruction_loss"
    return MustBeat(arm, "the untrained code", metric, baseline_metric=f"untrained_{metric}")


# Arms whose fixed top-K reconstruction losses differ by at most the margin count as equal.
study = partial(
    Study,
    metric="fixed_topk_reconstruction_loss",
    margin=0.01,
    must_beat=[beats_untrained("base")],
    published=PUBLISHED,
)
extra = partial(study, extra=True, n=5)
COSINE = [Arm(f"cosine-{a}", f"--alpha {a}", reference="base") for a in (0.1, 0.3, 3, 10)]
L1 = [Arm(f"l1-{a}", f"--alignment l1 --alpha {a}", reference="base") for a in (0.001, 0.003, 0.01, 0.03)]


# Swept values; that of `base` (the scale's default) is left out.
LATENTS = {"demo": (1024, 2048, 4096), "gpu": (512, 2048, 4096), "paper": (4096, 8192, 32768)}
BATCHES = {"demo": (64, 1024), "gpu": (64, 1024), "paper": (1024, 16384)}


def mse(name: str, flags: str, alphas: tuple[str, ...]) -> list[Arm]:
    """Return arms with a squared error, one per weight. `alphas` are in units of the matched weight N/(2K).

    At N/(2K) the squared alignment loss matches the cosine one near the optimum. The squared reconstruction error is
    about 2 (1 - cosine) there, so with mse in both losses --alpha 2matched (N/K) would give the ratio of base's two
    terms. No arm has this weight: in `mse-matched` the alignment loss counts half as much as in `base`.
    """
    return [Arm(f"{name}-{a}", f"{flags} --alpha {a}matched", reference="base") for a in alphas]


def design(scale: str, settings: Settings) -> Design:
    return Design(
        "bsa",
        "BSA",
        scale,
        METRICS,
        [
            study(
                "bsa-alignment-loss",
                "What does the alignment loss contribute, and how much of that comes from the sparse initialisation?",
                [
                    Arm("no-alignment", "--alpha 0", reference="base"),
                    Arm("no-alignment-stock-init", "--alpha 0 --init torch", reference="base-stock-init"),
                ],
                must_beat=[beats_untrained("base"), beats_untrained("base-stock-init")],
            ),
            study(
                "bsa-distance",
                "Is the cosine a better distance than the squared error, with equal weights and with matched weights?",
                [
                    Arm("mse", "--reconstruction mse --alignment mse", reference="base"),
                    Arm("mse-matched", "--reconstruction mse --alignment mse --alpha matched", reference="base"),
                    Arm("mse-reconstruction", "--reconstruction mse", reference="base"),
                    Arm("mse-alignment", "--alignment mse", reference="base"),
                ],
                primary=2,
            ),
            extra(
                "bsa-alignment-weight",
                "How large must the alignment weight be?",
                ["no-alignment:base", *(f"{arm.name}:base" for arm in COSINE)],
                sweep=Sweep(
                    ["fixed_topk_reconstruction_loss", "reconstruction_loss", "active_mean", "dead_fraction"],
                    "alpha",
                    "α, weight of the alignment loss",
                ),
            ),
            extra(
                "bsa-baselines",
                "How do other sparse codes compare?",
                [
                    Arm("topk", "--code topk --alpha 0", reference="base"),
                    Arm("topk-values", "--code topk-values --alpha 0", reference="base"),
                    "l1-0.01:base",
                ],
            ),
            extra(
                "bsa-latent",
                "Does one alignment weight suit every number of features?",
                [Arm(f"latent-{n}", f"--latent {n}", reference="base") for n in LATENTS[scale]],
                sweep=Sweep(
                    ["fixed_topk_reconstruction_loss", "fixed_topk_knn_overlap", "active_mean", "dead_fraction"],
                    "latent",
                    "N, number of features (α = 1)",
                ),
            ),
            extra(
                "bsa-batch",
                "Does the batch size matter?",
                [Arm(f"batch-{n}", f"--batch {n}", reference="base") for n in BATCHES[scale]],
                sweep=Sweep(
                    ["fixed_topk_reconstruction_loss", "fixed_topk_knn_overlap", "active_mean"],
                    "batch",
                    "rows per batch (equal number of steps)",
                ),
            ),
            extra(
                "bsa-alpha",
                "What is the trade-off between reconstruction and active features over the alignment weight?",
                [
                    *COSINE,
                    "mse:base",
                    *mse("mse", "--reconstruction mse --alignment mse", ("0.1", "0.3")),
                    "mse-matched:base",
                    *mse("mse", "--reconstruction mse --alignment mse", ("3",)),
                    "mse-alignment:base",
                    *mse("mse-alignment", "--alignment mse", ("0.1", "0.3", "1", "3")),
                    *L1,
                ],
            ),
        ],
        arms=[Arm("base"), Arm("base-stock-init", "--init torch")],
        data="mesh-minilm.npy" if scale == "gpu" and not settings.own_data else "",
        baselines=["untrained_fixed_topk_reconstruction_loss"],
        chance={"fixed_topk_reconstruction_loss": {"": 1.0}},  # a code that says nothing about its row
        robustness=Robustness(["fixed_topk_reconstruction_loss", "active_mean"], published=PUBLISHED),
    )
