"""Tests of conmim/plot.py on synthetic run folders: figures, verdicts, missing runs, and the factorial's statistics."""

import errno
import json

import numpy as np
import pytest
from scipy import stats

from common.study import figures, results
from common.study.design import load
from conmim import plot

CELLS = {  # arm: arguments, accuracy, position R²
    "base": ({}, 52.0, 0.35),
    "basic-views": ({"views": "basic"}, 51.0, 0.45),
    "online-keys": ({"keys": "online"}, 44.0, 0.30),
    "symmetric": ({"keys": "online", "views": "basic"}, 41.0, 0.33),
    "online-no-stop-gradient": ({"keys": "online", "gradient_leak": 1.0}, 47.0, 0.995),
    "symmetric-no-stop-gradient": ({"keys": "online", "views": "basic", "gradient_leak": 1.0}, 46.0, 0.99),
    "positions-only": ({"transplant": "positions"}, 36.0, 0.35),
    "no-pretraining": ({"epochs": 0}, 33.0, 0.04),
    "no-pretraining-long": ({"epochs": 0, "finetune_epochs": 618}, 35.0, 0.04),
}
STUDIES = {study.name: study for study in load("conmim", "demo").studies if study.group == "all"}
NAMES = ("curves", "differences", "factorial", "metrics", "similarity", "summary")


def write_run(root, arm, seed, *, diverged=False, changed_arguments=None, **changed_metrics):
    """Write one finished run with plausible numbers."""
    rng = np.random.default_rng([seed, *arm.encode()])
    arm_arguments, mean_accuracy, r2 = CELLS[arm]
    arguments = {"keys": "ema", "views": "asymmetric", "gradient_leak": 0.0, "data_set": "glyphs10-light", "size": 32}
    arguments |= {"network": "vit_demo", "positions": "both", "epochs": 3, "batch": 32, "seed": seed} | arm_arguments
    arguments |= {"out": f"somewhere/{arm}/{seed}"} | (changed_arguments or {})
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    provenance = {"commit": "c", "dirty": False, "torch": "2", "device": "cpu", "threads": 1, "world": 1}
    provenance |= {"data": "d" * 64, "source": "a" * 64}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, "provenance": provenance}))
    epochs = 0 if arm.startswith("no-pretraining") else 1 if diverged else arguments["epochs"]
    lines = [{"epoch": 0, "own_top1": 0.1, "cross_top1": 0.1, "position_r2": 0.03}]
    for epoch in range(1, epochs + 1):
        progress = 1 - np.exp(-2.0 * epoch / arguments["epochs"])
        line = {"own_top1": 0.9 * progress, "cross_top1": 0.9 * progress * r2, "position_r2": float(r2 * progress)}
        lines.append({"epoch": epoch, "loss": 4.2 - 3.5 * progress * r2, **line})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "flags").write_text(f"flags: --{arm}\n")
    accuracy = mean_accuracy + rng.standard_normal()
    metrics = {
        "finetune_accuracy": accuracy,
        "linear_accuracy": accuracy - 12,
        "knn_accuracy": accuracy - 20,
        "finetune_accuracy_online": accuracy - 1 + 0.3 * rng.standard_normal(),
        "linear_accuracy_online": accuracy - 13,
        "knn_accuracy_online": accuracy - 22,
        "own_top1": 0.9,
        "cross_top1": min(1.0, 0.3 + r2),
        "position_r2": min(1.0, r2 + 0.004 * rng.standard_normal()),
        "key_effective_rank": 20.0,
        "key_linear_accuracy": 40 * (1 - r2) + 3,
        "train_loss": lines[-1].get("loss"),
        "clipped_fraction": 0.1 if epochs else None,
        "untrained_linear_accuracy": 20.0,
        "pixel_accuracy": 22.0,
    }
    if diverged:
        metrics = dict.fromkeys(metrics)
    metrics |= {"diverged": diverged, "seconds": 10.0, "loss_minimum": 0.003} | changed_metrics
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if not diverged:
        diagonal, noise = np.eye(64), rng.uniform(-0.3, 0.3, (2, 64, 64))
        own, other = np.clip(0.8 * diagonal + noise[0], -1, 1), np.clip(0.8 * r2 * diagonal + noise[1], -1, 1)
        mask = np.kron(rng.permutation(16).reshape(4, 4) < 12, np.ones((2, 2))).astype(bool).flatten()
        picture = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
        np.savez(folder / "similarity.npz", own=own, other=other, mask=mask, picture=picture)
    return folder


def write_runs(root, seeds, arms=tuple(CELLS)):
    for arm in arms:
        for seed in range(seeds):
            write_run(root, arm, seed)


def draw(root, study, seeds, report):
    plot.main([study, "--runs", str(root), "--seeds", *map(str, range(seeds)), "--results", str(report)])
    path = report / f"{study}.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("study", "seeds"), [("conmim-stop-gradient", 3), pytest.param("conmim-asymmetry", 1, marks=pytest.mark.slow)]
)
def test_figures_and_tables_of_every_study(tmp_path, study, seeds):
    declared = STUDIES[study]
    write_runs(tmp_path / "runs", seeds)
    summary = draw(tmp_path / "runs", study, seeds, tmp_path / "report")
    figures = [f"{study}-{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    tables = [f"{study}.{suffix}" for suffix in ("csv", "json", "tex")]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted([*figures, *tables])
    assert summary["question"] == declared.question and summary["primary_metric"] == "finetune_accuracy"
    assert summary["published"] == declared.published and not summary["not_run"]
    contrasts = summary["contrasts"]
    assert [f"{contrast['arm']}:{contrast['reference']}" for contrast in contrasts] == declared.contrasts
    assert summary["margin"] == 3.0 and [contrast["primary"] for contrast in contrasts].count(True) == 1
    tested = "online-keys" if study == "conmim-stop-gradient" else "base"
    for required, baseline in zip(summary["baselines"], ("no-pretraining", "no-pretraining-long"), strict=False):
        beaten = None if seeds == 1 else True
        assert (required["arm"], required["baseline_arm"], required["beaten"]) == (tested, baseline, beaten)
    assert (summary["verdict"] == "one seed") == (seeds == 1)
    assert summary["data"] == "glyphs (synthetic light digits), vit_demo, both positions, 3 epochs of batch 32"
    text = (tmp_path / "report" / f"{study}-factorial.svg").read_text()
    assert all(words in text for words in ("basic views", "keys × views", "no-pretraining-long", "position R²"))
    assert "1-NN on pixels" in (tmp_path / "report" / f"{study}-metrics.svg").read_text()
    assert "Missing:" not in summary["captions"][f"{study}-factorial"] and summary["notes"][0].startswith(
        "Position diagnostics"
    )


def test_arms_with_a_position_code_are_named(tmp_path, no_figure_files):
    write_runs(tmp_path / "runs", 2)
    summary = draw(tmp_path / "runs", "conmim-stop-gradient", 2, tmp_path / "report")
    named = {row["arm"] for row in summary["rows"] if row["remark"]}
    assert named == {"online-no-stop-gradient", "symmetric-no-stop-gradient"}
    assert any("has a position code" in note for note in summary["notes"])
    assert "online-no-stop-gradient has a position code for keys in every seed" in " ".join(summary["finding"])
    runs = [{"position_r2": 0.99, "cross_top1": 0.99}, {"position_r2": 0.99, "cross_top1": 0.94}]
    assert plot.position_code(runs[:1]) and plot.position_code(runs) is None


def test_without_runs_nothing_is_written(tmp_path, capsys):
    assert draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / "report") is None
    assert capsys.readouterr().out == (
        f"conmim-asymmetry: no finished runs in {tmp_path / 'runs'}; make conmim-asymmetry SCALE=demo trains them\n"
    )
    assert not (tmp_path / "report").exists()


def test_results_that_cannot_be_written_end_with_one_sentence(tmp_path, monkeypatch, capsys):
    write_runs(tmp_path / "runs", 1, ("base", "symmetric"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "runs", "conmim-asymmetry", 1, tmp_path / "file")
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "--results" in printed and printed.count("\n") == 1

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    monkeypatch.setattr(figures, "save", full_disk)
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "runs", "conmim-asymmetry", 1, tmp_path / "report")
    printed = capsys.readouterr().err
    assert end.value.code == 4 and "free disk space" in printed and printed.count("\n") == 1


def test_an_unknown_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(["conmim-views", "--runs", str(tmp_path), "--results", str(tmp_path / "report")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "no study 'conmim-views'" in printed and printed.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_unfinished_runs_are_reported_as_missing(tmp_path):
    write_runs(tmp_path / "runs", 1)
    for path in (tmp_path / "runs").glob("*/*/metrics.json"):
        path.unlink()
    summary = draw(tmp_path / "runs", "conmim-asymmetry", 1, tmp_path / "report")
    assert "symmetric: 1 of 1 missing (seed 0)." in summary["notes"] and not summary["has_finding"]
    assert (tmp_path / "report/conmim-asymmetry-factorial.png").exists()


def test_missing_diverged_and_damaged_runs_are_reported(tmp_path):
    root = tmp_path / "runs"
    write_runs(root, 3, ("base", "no-pretraining", "no-pretraining-long"))
    write_run(root, "online-keys", 0)
    write_run(root, "online-keys", 1, diverged=True)
    write_run(root, "symmetric", 0, diverged=True)
    (root / "base/0/similarity.npz").write_bytes(b"junk")
    np.savez(root / "online-keys/0/similarity.npz", **dict.fromkeys(("own", "other", "mask", "picture"), np.zeros(5)))
    summary = draw(root, "conmim-asymmetry", 3, tmp_path / "report")
    notes = "\n".join(summary["notes"])
    assert "online-keys: 1 of 3 diverged, counted as chance (seed 1)." in notes
    assert "symmetric: 2 of 3 missing" in notes
    assert "base, seed 0: similarity.npz cannot be used." in notes
    factorial, curves, similarity = (
        summary["captions"][f"conmim-asymmetry-{name}"] for name in ("factorial", "curves", "similarity")
    )
    assert "Missing: asymmetric views, keys online, no stop-gradient; basic views, keys ema;" in factorial
    assert "online-keys: 1 diverged, 1 missing" in factorial and "online-keys: 1 diverged, 1 missing" in curves
    assert "no run" in (tmp_path / "report/conmim-asymmetry-similarity.svg").read_text()
    assert "Seed 1" in similarity  # base has a readable file for seed 1, symmetric has none
    assert summary["verdict"] == "one seed" and summary["not_run"] == ["basic-views", "positions-only"]
    assert summary["contrasts"][0]["arm_mean"] == 10  # the only run of symmetric diverged: chance


def test_no_similarity_figure_without_similarity_files(tmp_path):
    write_runs(tmp_path / "runs", 2, ("base", "symmetric", "no-pretraining", "no-pretraining-long"))
    for path in (tmp_path / "runs").glob("*/*/similarity.npz"):
        path.unlink()
    draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / "report")
    assert len(list((tmp_path / "report").glob("*.png"))) == len(NAMES) - 1


def test_pickled_similarity_files_are_refused(tmp_path):
    np.savez(tmp_path / "similarity.npz", **dict.fromkeys(("own", "other", "mask", "picture"), np.array([object()])))
    with pytest.raises(ValueError, match="cannot be read"):
        plot.read_similarity(tmp_path / "similarity.npz")
    assert plot.read_similarity(tmp_path / "none.npz") is None


# ---------------------------------------------------------------------------------------------- verdict


def draw_with_accuracies(tmp_path, online=0.0, study="conmim-asymmetry"):
    """Return the summary of exact accuracies, with those of symmetric's online weights shifted by `online`."""
    for arm in CELLS:
        for seed in range(4):
            ema_accuracy = CELLS[arm][1] + 0.1 * seed
            accuracies = {"finetune_accuracy": ema_accuracy, "finetune_accuracy_online": ema_accuracy}
            if arm == "symmetric":
                accuracies["finetune_accuracy_online"] += online
            write_run(tmp_path / "runs", arm, seed, **accuracies)
    return draw(tmp_path / "runs", study, 4, tmp_path / "report")


def test_a_finding_requires_that_ema_and_online_weights_agree_in_sign(tmp_path, no_figure_files):
    summary = draw_with_accuracies(tmp_path / "agree")
    assert summary["verdict"] == "worse" and summary["has_finding"]
    assert not any("disagree" in note for note in summary["notes"])
    summary = draw_with_accuracies(tmp_path / "disagree", online=20.0)
    assert summary["verdict"] == plot.DISAGREE and not summary["has_finding"]
    primary = next(contrast for contrast in summary["contrasts"] if contrast["primary"])
    assert primary["verdict"] == plot.DISAGREE and plot.DISAGREE in summary["headline"]
    assert "no verdict" in summary["headline"]
    finding = " ".join(summary["finding"])
    assert plot.DISAGREE in finding and ", worse (" not in finding.partition("Secondary")[0]
    note = next(note for note in summary["notes"] if "disagree" in note)
    assert "symmetric:base" in note and "-11.0" in note and "9.0" in note and note in finding


@pytest.mark.parametrize("unbeaten", ["no-pretraining", "no-pretraining-long"])
def test_a_baseline_that_is_not_beaten_is_too_weak(unbeaten, tmp_path, no_figure_files):
    for seed in range(3):
        for arm in ("base", "symmetric", "no-pretraining", "no-pretraining-long"):
            if arm != unbeaten:
                write_run(tmp_path / "runs", arm, seed)
        write_run(tmp_path / "runs", unbeaten, seed, finetune_accuracy=51.0 + seed)
    summary = draw(tmp_path / "runs", "conmim-asymmetry", 3, tmp_path / "report")
    assert summary["verdict"] == "too weak to test" and not summary["has_finding"]
    finding = " ".join(summary["finding"])
    assert "no pre-training" in finding and "Position diagnostics" in finding


# ---------------------------------------------------------------------------------------------- statistics


def test_effects_of_the_factorial_are_paired_over_the_seeds_that_all_cells_have(tmp_path):
    values = {"base": [3.0, 4.5, 5.0, 7.0], "online-keys": [1.0, 1.5, 4.0], "symmetric": [2.0, 2.0, 6.0, 1.0]}
    for arm, by_seed in values.items():
        for seed, value in enumerate(by_seed):
            write_run(tmp_path / "runs", arm, seed, finetune_accuracy=value)
    runs = results.read_runs(tmp_path / "runs", dict.fromkeys(values, range(4)))
    sums = np.array(values["base"][:3]) - np.array(values["online-keys"]) + 2 * np.array(values["symmetric"][:3])
    low, high = stats.t.interval(0.95, 2, sums.mean(), stats.sem(sums))
    summary = plot.seed_summary(runs, list(values), [1, -1, 2], "finetune_accuracy")
    assert (summary.mean, summary.low, summary.high, summary.n) == pytest.approx((sums.mean(), low, high, 3))
    assert plot.seed_summary(runs, ["base", "missing"], [1, -1], "finetune_accuracy") is None


def test_factorial_effects():
    """Cells 1 and 2 have ema keys, 3 and 4 online keys, 5 and 6 no stop-gradient; odd cells have asymmetric views."""
    number = {(views, keys): 1 + 2 * keys + plot.VIEWS.index(views) for views in plot.VIEWS for keys in range(3)}
    c = [0.0] + [float(10**exponent) for exponent in range(1, 7)]  # mean of each cell
    effects = [
        (effect.name, sum(weight * c[number[cell]] for cell, weight in effect.weights.items()))
        for effect in plot.factorial_effects()
    ]
    assert effects == [
        ("keys: online − ema", (c[3] - c[1] + c[4] - c[2]) / 2),
        ("at asymmetric views", c[3] - c[1]), ("at basic views", c[4] - c[2]),
        ("views: basic − asymmetric", (c[2] - c[1] + c[4] - c[3]) / 2),
        ("at ema keys", c[2] - c[1]), ("at online keys", c[4] - c[3]),
        ("keys × views", (c[4] - c[3]) - (c[2] - c[1])),
        ("both: symmetric − base", c[4] - c[1]),
        ("stop-gradient: without − with", (c[5] - c[3] + c[6] - c[4]) / 2),
        ("at asymmetric views", c[5] - c[3]), ("at basic views", c[6] - c[4]),
        ("stop-gradient × views", (c[6] - c[4]) - (c[5] - c[3])),
    ]  # fmt: skip


def test_the_sign_rule_covers_every_primary_contrast(tmp_path, no_figure_files):
    for seed in range(3):
        for arm in ("base", "online-keys", "basic-views", "no-pretraining", "no-pretraining-long"):
            accuracies = dict.fromkeys(("finetune_accuracy", "finetune_accuracy_online"), CELLS[arm][1] + 0.1 * seed)
            if arm == "basic-views":
                accuracies["finetune_accuracy_online"] = 30.0
            write_run(tmp_path / "runs", arm, seed, **accuracies)
    summary = draw(tmp_path / "runs", "conmim-calibration", 3, tmp_path / "report")
    words = [contrast["verdict"] for contrast in summary["contrasts"]]
    assert words == ["worse", plot.DISAGREE]
    assert summary["calibration"] == {"online-keys": "reproduced", "basic-views": "unclear"}
    assert summary["has_finding"] and plot.DISAGREE in summary["verdict"] and "no verdict" in summary["headline"]


def test_a_study_is_drawn_before_base_has_runs(tmp_path):
    """`make primary` may draw the stop-gradient study before base is trained."""
    write_runs(
        tmp_path / "runs", 2, ("online-no-stop-gradient", "online-keys", "no-pretraining", "no-pretraining-long")
    )
    summary = draw(tmp_path / "runs", "conmim-stop-gradient", 2, tmp_path / "report")
    assert "base" in summary["not_run"] and summary["contrasts"][0]["mean"] is not None
    assert not (tmp_path / "report/conmim-stop-gradient-factorial.png").exists()


def test_cells_are_identified_by_arguments(tmp_path):
    write_runs(tmp_path, 1)
    write_run(tmp_path, "basic-views", 1, changed_arguments={"temperature": 0.5})
    (tmp_path / "basic-views/1").rename(tmp_path / "other")
    (tmp_path / "an-ablation").mkdir()
    (tmp_path / "other").rename(tmp_path / "an-ablation/0")
    names = plot.all_arms(tmp_path, ["base"])
    assert names[0] == "base" and set(names) == {*CELLS, "an-ablation"}
    cells = plot.cells(results.read_runs(tmp_path, dict.fromkeys(names, (0,))), "base")
    assert cells == {
        ("asymmetric", 0): "base",
        ("asymmetric", 1): "online-keys",
        ("asymmetric", 2): "online-no-stop-gradient",
        ("basic", 0): "basic-views",
        ("basic", 1): "symmetric",
        ("basic", 2): "symmetric-no-stop-gradient",
    }


@pytest.mark.slow
def test_equal_runs_give_identical_files(tmp_path):
    write_runs(tmp_path / "runs", 2)
    for name in ("a", "b"):
        draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
