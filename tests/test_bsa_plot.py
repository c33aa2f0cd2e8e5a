"""BSA's figures and texts, drawn from synthetic run folders: all studies, missing runs, and the computed numbers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bsa import plot
from bsa.studies import METRICS
from common.study import analysis, figures, results
from common.study.design import load

LATENT, ACTIVE, DIM = 512, 6, 128
UNTRAINED = 0.35
MATCHED = LATENT / (2 * ACTIVE)
ARMS = {  # arm: arguments that differ from the defaults, and its mean active count
    "base": ({}, 6.6),
    "no-alignment": ({"alpha": 0.0}, 70.0),
    "base-stock-init": ({"init": "torch"}, 9.0),
    "no-alignment-stock-init": ({"alpha": 0.0, "init": "torch"}, 250.0),
    "mse": ({"alignment": "mse", "reconstruction": "mse"}, 48.0),
    "mse-matched": ({"alignment": "mse", "reconstruction": "mse", "alpha": MATCHED}, 6.8),
    "mse-reconstruction": ({"reconstruction": "mse"}, 12.0),
    "mse-alignment": ({"alignment": "mse"}, 30.0),
    "topk": ({"code": "topk", "alpha": 0.0}, 6.0),
    "topk-values": ({"code": "topk-values", "alpha": 0.0}, 6.0),
}
for factor, active in {0.1: 25.0, 0.3: 11.0, 3.0: 6.1, 10.0: 5.7}.items():
    ARMS[f"cosine-{factor:g}"] = ({"alpha": factor}, active)
for factor, active in {0.1: 22.0, 0.3: 10.5, 3.0: 5.9}.items():
    ARMS[f"mse-{factor:g}"] = ({"alignment": "mse", "reconstruction": "mse", "alpha": factor * MATCHED}, active)
for factor, active in {0.1: 19.0, 0.3: 9.5, 1.0: 6.7, 3.0: 5.8}.items():
    ARMS[f"mse-alignment-{factor:g}"] = ({"alignment": "mse", "alpha": factor * MATCHED}, active)
for factor, active in {0.001: 40.0, 0.003: 16.0, 0.01: 7.1, 0.03: 4.0}.items():
    ARMS[f"l1-{factor:g}"] = ({"alignment": "l1", "alpha": factor}, active)
STUDIES = {study.name: study for study in load("bsa", "demo").studies if study.group in ("all", "")}
TABLES = ("csv", "json", "tex")
NAMES = ("activations", "curves", "differences", "metrics", "summary", "tradeoff")
FIGURES = [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]


def arguments(arm, seed, changes):
    defaults = {"alpha": 1.0, "alignment": "cosine", "reconstruction": "cosine", "code": "round", "init": "sparse"}
    defaults |= {"target": "binary", "mse_reduction": "mean", "data_set": "planted", "latent": LATENT, "active": ACTIVE}
    return defaults | {"steps": 1500, "batch": 256, "seed": seed, "out": f"somewhere/{arm}/{seed}"} | changes


def feature_shares(active, rng):
    """Activation frequencies in descending order: a power law that sums to about `active`, then dead features."""
    alive = LATENT - 90 - int(rng.integers(20))
    shares = np.arange(1, alive + 1) ** -1.05 * np.exp(0.05 * rng.standard_normal(alive))
    for _ in range(20):
        shares = np.minimum(shares * active / shares.sum(), 0.9)
    return [*np.sort(shares)[::-1].tolist(), *[0.0] * (LATENT - alive)]


def run(root, arm, seed, *, diverged=False, changes=None, without=(), **overrides):
    """Write the folder of a finished run with plausible numbers.

    `changes`: arguments that differ from the defaults (default: as in ARMS). `without`: metrics that are left out.
    `overrides`: values of metrics.
    """
    rng = np.random.default_rng([seed, *arm.encode()])
    arm_changes, count = ARMS.get(arm, ({}, 6.6))
    args = arguments(arm, seed, arm_changes if changes is None else changes)
    active = count * (1 + 0.02 * rng.standard_normal())
    loss = 0.45 * active**-0.5 + 0.002 * rng.standard_normal()
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    provenance = {"commit": "c", "dirty": False, "torch": "2", "device": "cpu", "threads": 1, "world": 1}
    provenance |= {"data": "d" * 64, "source": "a" * 64}
    (folder / "args.json").write_text(json.dumps({"arguments": args, "provenance": provenance}))
    unit = {"cosine": 0.3, "mse": 0.01, "l1": 2 * active}[args["alignment"]]
    lines = [{"epoch": 0}]
    for epoch in range(1, 6 if diverged else 21):
        decay = math.exp(-epoch / 3)
        line = {"reconstruction_loss": loss + 0.5 * decay, "alignment_loss": unit * (0.3 + decay) * bool(args["alpha"])}
        line["loss"] = line["reconstruction_loss"] + args["alpha"] * line["alignment_loss"]
        lines.append({"epoch": epoch, "step": 75 * epoch, "active_mean": active + (ACTIVE - active) * decay} | line)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "flags").write_text(f"flags: --{arm}\n")
    fixed_topk = loss + 0.02 * math.log(active) ** 2 + 0.002 * rng.standard_normal()
    metrics = {
        "reconstruction_loss": loss, "fixed_topk_reconstruction_loss": fixed_topk, "reconstruction_mse": 2 * loss,
        "fixed_topk_reconstruction_mse": 2 * fixed_topk, "active_mean": active, "active_std": 0.2 * active,
        "dead_fraction": 0.2, "always_on_fraction": 0.001, "rare_fraction": 0.1, "bits_per_row": min(512, 9 * active),
        "entropy_bits_per_row": 5 * active, "knn_overlap": 0.4 + 0.05 * math.log(active), "distinct_codes": 0.99,
        "fixed_topk_knn_overlap": 0.4 - 0.02 * math.log(active) ** 2,
        "train_loss": lines[-1]["loss"] if not diverged else None, "loss_moved": 0.7, "active_mean_moved": 0.4,
        "settled_step": None if seed == 1 else 1200, "atom_recovery_f1": 0.8, "depth_correlation": 0.7,
        "atom_count_correlation": 0.6,
    }  # fmt: skip
    if diverged:
        metrics = dict.fromkeys(metrics)
    metrics |= {
        "diverged": diverged,
        "seconds": 10.0,
        "untrained_fixed_topk_reconstruction_loss": UNTRAINED + 0.001 * rng.standard_normal(),
        "sign_reconstruction_loss": 0.2,
        "sign_knn_overlap": 0.62,
        "sign_bits_per_row": float(DIM),
    }
    metrics |= overrides
    (folder / "metrics.json").write_text(json.dumps({key: metrics[key] for key in metrics if key not in without}))
    if not diverged:
        density = np.exp(-0.5 * ((np.arange(LATENT) - active) / (0.2 * active)) ** 2)
        activations = {
            "feature_shares": feature_shares(active, rng),
            "rows_by_active_count": (2000 * density / density.sum()).round().tolist(),
        }
        (folder / "activations.json").write_text(json.dumps(activations))
    return folder


def draw(root, study, seeds, report):
    plot.main([study, "--runs", str(root), "--seeds", *map(str, range(seeds)), "--results", str(report)])
    path = report / f"{study}.json"
    return json.loads(path.read_text()) if path.exists() else None


def texts(figure):
    """Return all texts of a figure, including its legend."""
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in artists if artist.get_text()]


@pytest.mark.slow
@pytest.mark.parametrize(("study", "seeds"), list(zip(STUDIES, (2, 1, 2, 1), strict=True)))
def test_every_study_gets_its_figures_tables_and_summary(tmp_path, study, seeds):
    declared = STUDIES[study]
    for arm in declared.arms:
        for seed in range(seeds):
            run(tmp_path / "runs", arm, seed)
    summary = draw(tmp_path / "runs", study, seeds, tmp_path / "report")
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == sorted([*(f"{study}-{name}" for name in FIGURES), *(f"{study}.{suffix}" for suffix in TABLES)])
    assert all((tmp_path / "report" / name).stat().st_size > 500 for name in names)
    assert summary["question"] == declared.question and summary["reproduce"] == f"make {study} SCALE=demo"
    assert [f"{contrast['arm']}:{contrast['reference']}" for contrast in summary["contrasts"]] == declared.contrasts
    assert summary["contrasts"][0]["metric"] == "fixed_topk_reconstruction_loss" and summary["margin"] == 0.01
    references = ["base", "base-stock-init"] if study == "bsa-alignment-loss" else ["base"]
    assert [baseline["arm"] for baseline in summary["baselines"]] == references
    assert {baseline["beaten"] for baseline in summary["baselines"]} == {True if seeds > 1 else None}
    assert (summary["verdict"] == "one seed") == (seeds == 1)
    assert set(summary["metrics"]) == set(METRICS) and not summary["not_run"]
    assert summary["data"] == "planted concepts, N = 512, K = 6, 1500 steps, batch 256"
    assert all(word in (tmp_path / "report" / f"{study}-curves.svg").read_text() for word in ("planted", "K = 6"))
    assert "Planted concepts" in summary["captions"][f"{study}-curves"]
    matched = " ".join(summary["finding"]).partition("Reconstruction loss at")[2]
    assert bool(matched) == (study == "bsa-alpha") and "95 %" not in matched  # one seed


def test_without_runs_a_message_is_printed_and_nothing_is_written(tmp_path, capsys):
    assert draw(tmp_path / "runs", "bsa-distance", 2, tmp_path / "report") is None
    assert capsys.readouterr().out == (
        f"bsa-distance: no finished runs in {tmp_path / 'runs'}; make bsa-distance SCALE=demo trains them\n"
    )
    assert not (tmp_path / "report").exists()


def test_an_unknown_study_exits_with_a_one_line_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(["bsa-mse", "--runs", str(tmp_path), "--results", str(tmp_path / "report")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "no study 'bsa-mse'" in printed and printed.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_missing_and_diverged_runs_are_named_in_figures_and_notes(tmp_path):
    root = tmp_path / "runs"
    for seed in range(3):
        run(root, "base", seed)
    run(root, "mse", 0)
    run(root, "mse", 1, diverged=True)
    run(root, "mse-matched", 0, diverged=True)
    run(root, "mse-reconstruction", 0, without=("dead_fraction", "active_std"))
    (run(root, "mse-reconstruction", 1) / "activations.json").write_text('{"feature_shares": [0.1')
    summary = draw(root, "bsa-distance", 3, tmp_path / "report")
    for name in ("metrics", "tradeoff", "curves", "activations"):
        text = (tmp_path / "report" / f"bsa-distance-{name}.svg").read_text() + summary["captions"][
            f"bsa-distance-{name}"
        ]
        assert "1 diverged, 1 missing" in text, name
    notes = "\n".join(summary["notes"])
    assert "mse: 1 of 3 diverged, counted as chance (seed 1)." in notes and "mse-matched: 2 of 3 missing" in notes
    assert summary["not_run"] == ["mse-alignment"] and "Not run: mse-alignment." in summary["notes"]
    assert "mse-reconstruction: 1 of 3 without dead_fraction (seed 0)." in notes
    assert "mse-reconstruction, seed 1: activations.json is missing or cannot be read" in notes
    assert "base: 1 of 3 runs not converged" in notes and "(seed 1)" in notes
    rows = {row["arm"]: row for row in summary["rows"]}
    assert rows["mse"]["metrics"]["active_mean"]["n"] == 1 and rows["base"]["metrics"]["active_mean"]["n"] == 3
    assert rows["mse"]["metrics"]["fixed_topk_reconstruction_loss"]["values"]["1"] == 1.0  # chance


@pytest.mark.slow
def test_studies_are_drawn_although_all_runs_diverged(tmp_path):
    for study in ("bsa-baselines", "bsa-alpha"):
        for arm in STUDIES[study].arms:
            if not (tmp_path / "runs" / arm).exists():
                run(tmp_path / "runs", arm, 0, diverged=True)
        summary = draw(tmp_path / "runs", study, 1, tmp_path / "report")
        assert summary["verdict"] == "one seed" and not summary["has_finding"]
        finding = " ".join(summary["finding"])
        assert "base: 1 of 1 diverged, counted as chance" in finding
        assert summary["contrasts"][0]["arm_mean"] == summary["contrasts"][0]["reference_mean"] == 1.0
        assert "Reconstruction loss at" not in finding
    assert len(list((tmp_path / "report").glob("*.png"))) == 2 * len(NAMES)


def test_metrics_that_no_finished_run_has_are_left_out(tmp_path, no_figure_files):
    absent = {"atom_recovery_f1", "depth_correlation"}
    for arm in ("base", "mse"):
        for seed in range(2):
            run(tmp_path / "runs", arm, seed, without=absent)
    run(tmp_path / "runs", "base", 2, diverged=True)  # its nulls include metrics that these data do not have
    summary = draw(tmp_path / "runs", "bsa-distance", 3, tmp_path / "report")
    assert set(METRICS) - set(summary["metrics"]) == absent
    assert not [note for note in summary["notes"] if any(name in note for name in absent)]


@pytest.mark.slow
def test_unfinished_runs_count_as_missing(tmp_path):
    for arm in ("base", "mse"):
        (run(tmp_path / "runs", arm, 0) / "metrics.json").unlink()
    summary = draw(tmp_path / "runs", "bsa-distance", 1, tmp_path / "report")
    assert summary["contrasts"][0]["verdict"] == "not run" and "mse: 1 of 1 missing (seed 0)." in summary["notes"]
    assert (tmp_path / "report/bsa-distance-metrics.png").exists()


@pytest.mark.parametrize(("base", "verdict"), [(0.25, "worse"), (0.45, "too weak to test")])
def test_a_study_is_too_weak_unless_base_is_below_the_untrained_code(tmp_path, base, verdict):
    for seed in range(4):
        run(tmp_path, "base", seed, fixed_topk_reconstruction_loss=base + seed / 1000)
        run(tmp_path, "mse", seed, fixed_topk_reconstruction_loss=0.5 + seed / 1000)
    runs = results.read_runs(tmp_path, dict.fromkeys(["base", "mse"], range(4)))
    study = replace(STUDIES["bsa-distance"], contrasts=["mse:base"])
    assert analysis.summarise(study, runs, METRICS)["verdict"] == verdict


def test_families_depend_on_arguments_and_not_on_arm_names(tmp_path):
    run(tmp_path, "mse-16", 0, changes={"alpha": 0.3})
    run(tmp_path, "cosine-0.3", 0, changes={"alignment": "mse", "reconstruction": "mse", "alpha": 16.0})
    run(tmp_path, "l1-9", 0, changes={"alpha": 3})
    run(tmp_path, "base", 0, changes={"alignment": "l1", "alpha": 0.01})
    run(tmp_path, "a", 0, changes={"alignment": "mse"})
    run(tmp_path, "b", 0, changes={"init": "torch", "target": "value"})
    run(tmp_path, "c", 0, changes={"code": "topk-values", "alpha": 0})
    arms = ["l1-9", "mse-16", "cosine-0.3", "base", "a", "b", "c", "absent"]
    families = plot.families(results.read_runs(tmp_path, dict.fromkeys(arms, (0,))))
    assert families == {
        "cosine alignment": {"mse-16": 0.3, "l1-9": 3.0},
        "mse alignment and reconstruction": {"cosine-0.3": 16.0},
        "l1": {"base": 0.01},
        "mse alignment": {"a": 1.0},
        "cosine alignment, torch init, value target": {"b": 1.0},
        "topk-values code": {"c": 0.0},
    }
    assert list(families["cosine alignment"]) == ["mse-16", "l1-9"]  # in ascending order of alpha


def test_interpolated_losses_by_hand():
    far, middle, near = plot.Point(32.0, 0.10), plot.Point(8.0, 0.20), plot.Point(2.0, 0.40)
    assert plot.interpolate([far, middle, near], 16.0) == pytest.approx(0.15)  # halfway in log2: 3, 4, 5
    assert plot.interpolate([far, middle, near], 4.0) == pytest.approx(0.30)
    assert plot.interpolate([far, middle, near], 8.0) == pytest.approx(0.20)
    assert plot.interpolate([far, middle, near], 8 * 4**0.25) == pytest.approx(0.175)
    assert plot.interpolate([far, middle, near], 33.0) is None and plot.interpolate([far, middle], 7.9) is None
    assert plot.interpolate([far, None, near], 16.0) is None  # not across a missing run
    assert plot.interpolate([middle], 8.0) == 0.20 and plot.interpolate([middle], 9.0) is None
    assert plot.interpolate([], 8.0) is None
    assert plot.interpolate([plot.Point(0.0, 1.0), far], 8.0) is None  # log(0) does not exist
    assert plot.interpolate([middle, plot.Point(8.0, 0.3)], 8.0) == pytest.approx(0.20)


def run_with_values(root, arm, seed, changes, active, loss):
    """Write a run with the given active count and reconstruction loss."""
    run(root, arm, seed, changes=changes, active_mean=active, reconstruction_loss=loss)


def test_losses_at_the_activity_of_base_by_hand(tmp_path):
    """base has 7 and 9 active features, 8 on average. The family l1 encloses 8 in seed 0 only."""
    for seed, (active, loss) in enumerate([(7.0, 0.22), (9.0, 0.20)]):
        run_with_values(tmp_path, "base", seed, {}, active, loss)
        run_with_values(tmp_path, "x", seed, {"alpha": 3.0}, 2.0, 0.40)
        run_with_values(tmp_path, "y", seed, {"alpha": 0.1}, 16.0, 0.10)
        run_with_values(tmp_path, "p", seed, {"alignment": "mse", "alpha": 1.0}, 32.0, 0.1 + 0.02 * seed)
        run_with_values(tmp_path, "q", seed, {"alignment": "mse", "alpha": 9.0}, 2.0, 0.3 + 0.02 * seed)
        run_with_values(tmp_path, "r", seed, {"alignment": "l1", "alpha": 0.1}, 8.0 + seed, 0.25)
        run_with_values(tmp_path, "s", seed, {"alignment": "l1", "alpha": 0.2}, 7.0 + 2 * seed, 0.35)
        run_with_values(tmp_path, "t", seed, {"reconstruction": "mse"}, 50.0, 0.05)
    runs = results.read_runs(tmp_path, dict.fromkeys(["base", "x", "y", "p", "q", "r", "s", "t"], range(2)))
    assert plot.loss_at_activity(runs, ["p", "q"], 8.0) == {0: pytest.approx(0.2), 1: pytest.approx(0.22)}
    assert plot.loss_at_activity(runs, ["r", "s"], 8.0) == {0: pytest.approx(0.25), 1: None}
    cosine = [
        0.22 + math.log(8 / 7) / math.log(16 / 7) * (0.10 - 0.22),
        0.40 + math.log(8 / 2) / math.log(9 / 2) * (0.20 - 0.40),
    ]
    assert list(plot.loss_at_activity(runs, ["y", "base", "x"], 8.0).values()) == pytest.approx(cosine)
    base = [0.22, 0.20]  # measured, not interpolated
    (sentence,) = plot.matched_activity_finding(runs, "base")
    half = stats.t.ppf(0.975, 1) * stats.sem([0.2, 0.22])
    difference = stats.ttest_rel([0.2, 0.22], base).confidence_interval()
    assert sentence.startswith("Reconstruction loss at the 8.0 active features of base (descriptive; other families")
    assert f"; mse alignment: 0.210 (95 % interval {0.21 - half:.3f} to {0.21 + half:.3f}; n = 2; minus" in sentence
    assert f"minus base 0.000, {difference.low:.3f} to {difference.high:.3f})" in sentence
    assert f"neighbouring alphas): base: {sum(base) / 2:.3f} (95 % interval" in sentence
    assert "l1: 0.250 (n = 1, 1 more outside its range; minus" in sentence
    assert sentence.endswith("; mse reconstruction: outside its range.")


def test_there_is_no_matched_activity_finding_without_a_run_of_the_reference(tmp_path):
    run_with_values(tmp_path, "x", 0, {}, 8.0, 0.2)
    assert plot.matched_activity_finding(results.read_runs(tmp_path, dict.fromkeys(["x", "base"], (0,))), "base") == []


def test_the_alpha_figure_joins_means_in_the_order_of_alpha(tmp_path):
    for seed in range(2):
        run_with_values(tmp_path, "base", seed, {}, 8.0 + seed, 0.2)
        run_with_values(tmp_path, "x", seed, {"alpha": 10.0}, 9.0 + seed, 0.4)
        run_with_values(tmp_path, "y", seed, {"alpha": 0.1}, 16.0 + seed, 0.1)
    runs = results.read_runs(tmp_path, dict.fromkeys(["base", "x", "y"], range(2)))
    figure, _ = plot.alpha_figure(runs, "base", 6, "")
    joined = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in joined] == [[16.5, 8.5, 9.5]]
    assert joined[0].get_ydata() == pytest.approx([0.1, 0.2, 0.4])
    assert {"0.1", "1, 10", "K = 6"} <= set(texts(figure))


def test_alphas_with_nearly_equal_activity_share_a_label():
    assert plot.near_alphas({10: 6.0, 0.1: 150.0, 1: 6.2, 3: 6.1, 0.3: 7.1}) == [
        (pytest.approx(6.1), "1, 3, 10"),
        (7.1, "0.3"),
        (150.0, "0.1"),
    ]


def test_the_tradeoff_figure_shows_every_run_and_the_sign_code(tmp_path):
    for seed in range(3):
        run(tmp_path, "base", seed)
        run(tmp_path, "topk", seed, diverged=seed == 2)
    runs = results.read_runs(tmp_path, dict.fromkeys(["base", "topk"], range(3)))
    styles = figures.arm_styles(list(runs), [])
    figure, _ = plot.tradeoff_figure(runs, styles, 6, "")
    marks = [line for line in figure.axes[1].lines if line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in marks] == [3, 2]
    assert list(marks[0].get_ydata()) == list(results.values(runs, "base", plot.PRIMARY_METRIC).values())
    sign = {"sign_bits_per_row": 128.0, "sign_reconstruction_loss": 0.2, "sign_knn_overlap": 0.62}
    figure, caption = plot.tradeoff_figure(runs, styles, 6, "", sign)
    assert len(figure.axes) == 4 and "128 bits per row" in caption
    assert (list(figure.axes[2].lines[-1].get_xdata()), list(figure.axes[2].lines[-1].get_ydata())) == ([128], [0.2])


def test_an_arm_with_alpha_zero_has_no_alignment_loss_curve(tmp_path):
    run(tmp_path, "base", 0)
    run(tmp_path, "no-alignment", 0)
    panels = plot.curve_panels(results.read_runs(tmp_path, dict.fromkeys(["base", "no-alignment"], (0,))), 6, "planted")
    by_title = {panel.title: panel for panel in panels}
    aligned = by_title["alignment loss, before × α, planted"].values
    assert aligned.get("base") and not aligned.get("no-alignment")
    assert by_title["active features, planted"].values["no-alignment"][0][0][:2] == [75, 150]  # steps, not epochs
    assert (by_title["active features, planted"].y_scale, by_title["active features, planted"].lines) == (
        "log",
        {"K = 6": 6.0},
    )


def test_the_activation_figure_by_hand():
    by_arm = {
        "base": [
            plot.Activations(np.array([0.5, 0.1, 0.0, 0.0]), np.array([0.0, 0.5, 0.5])),
            plot.Activations(np.array([0.3, 0.0, 0.0, 0.0]), np.array([0.25, 0.75])),
        ],
        "mse": [],
    }
    figure, caption = plot.activation_figure(by_arm, figures.arm_styles(list(by_arm), []), 1, "")
    by_rank, by_frequency, by_count = figure.axes
    assert list(by_rank.lines[0].get_ydata()) == pytest.approx([0.4, 0.05])  # dead features are not drawn
    (bar,) = by_frequency.patches[1:] if len(by_frequency.patches) > 1 else by_frequency.patches
    assert bar.get_height() == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert by_frequency.get_xticklabels()[0].get_text() == "dead"
    stairs = by_frequency.patches[0].get_data()
    assert stairs.values.sum() == pytest.approx((2 / 4 + 1 / 4) / 2) and stairs.edges[-1] == 0
    stairs = by_count.patches[0].get_data()
    doublings = np.diff(np.log2(stairs.edges))
    assert stairs.values[:2] * doublings[:2] == pytest.approx([0.625, 0.25])
    assert "base 12.5 %" in caption  # rows without an active feature are named


def test_count_bins_have_edges_between_integers_and_keep_all_rows():
    edges = plot.count_bin_edges(300)
    assert edges[0] == 0.5 and edges[-1] > 300 and set(edges % 1) == {0.5} and (np.diff(edges[:10]) == 1).all()
    rows = np.zeros(301)
    rows[[3, 300]] = 0.4, 0.6
    assert (plot.rows_per_doubling(rows, edges) * np.diff(np.log2(edges))).sum() == pytest.approx(1.0)
