"""ConMIM's figures and sentences from run folders that the test writes: both studies, holes, and the arithmetic."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from common.study import results, statistics
from common.study.design import load
from conmim import plot

CELLS = {  # arm: its arguments, and the accuracy and position R² that it comes to
    "base": ({}, 52.0, 0.35),
    "basic-views": ({"views": "basic"}, 51.0, 0.45),
    "online-keys": ({"keys": "online"}, 44.0, 0.30),
    "symmetric": ({"keys": "online", "views": "basic"}, 41.0, 0.33),
    "online-no-stop-gradient": ({"keys": "online", "gradient_leak": 1.0}, 47.0, 0.995),
    "symmetric-no-stop-gradient": ({"keys": "online", "views": "basic", "gradient_leak": 1.0}, 46.0, 0.99),
    "no-pretraining": ({"epochs": 0}, 33.0, 0.04),
}
STUDIES = {study.name: study for study in load("conmim", "demo").studies if study.group == "all"}
NAMES = ("curves", "factorial", "metrics", "similarity")


def run(root, arm, seed, *, diverged=False, given=None, **metrics):
    """One finished run with plausible numbers."""
    draws = np.random.default_rng([seed, *arm.encode()])
    told, level, r2 = CELLS[arm]
    arguments = {"keys": "ema", "views": "asymmetric", "gradient_leak": 0.0, "data_set": "glyphs36", "size": 32}
    arguments |= {"network": "vit_demo", "positions": "both", "epochs": 3, "batch": 32, "seed": seed} | told
    arguments |= {"out": f"somewhere/{arm}/{seed}"} | (given or {})
    folder = root / arm / str(seed)
    folder.mkdir(parents=True)
    provenance = {"commit": "c", "dirty": False, "torch": "2", "device": "cpu", "threads": 1, "world": 1}
    provenance |= {"data": "d" * 64, "source": "a" * 64}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, "provenance": provenance}))
    epochs = 0 if arm == "no-pretraining" else 1 if diverged else arguments["epochs"]
    lines = [{"epoch": 0, "own_top1": 0.1, "cross_top1": 0.1, "position_r2": 0.03}]
    for epoch in range(1, epochs + 1):
        far = 1 - np.exp(-2.0 * epoch / arguments["epochs"])
        line = {"own_top1": 0.9 * far, "cross_top1": 0.9 * far * r2, "position_r2": float(r2 * far)}
        lines.append({"epoch": epoch, "loss": 4.2 - 3.5 * far * r2, **line})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "flags").write_text(f"flags: --{arm}\n")
    accuracy = level + draws.standard_normal()
    claims = {
        "finetune_accuracy": accuracy, "linear_accuracy": accuracy - 12, "knn_accuracy": accuracy - 20,
        "finetune_accuracy_online": accuracy - 1 + 0.3 * draws.standard_normal(),
        "linear_accuracy_online": accuracy - 13, "knn_accuracy_online": accuracy - 22, "own_top1": 0.9,
        "cross_top1": min(1.0, 0.3 + r2), "position_r2": min(1.0, r2 + 0.004 * draws.standard_normal()),
        "key_effective_rank": 20.0, "key_linear_accuracy": 40 * (1 - r2) + 3,
        "train_loss": lines[-1].get("loss"), "clipped_fraction": 0.1 if epochs else None,
        "untrained_linear_accuracy": 20.0,
    }  # fmt: skip
    found = (dict.fromkeys(claims) if diverged else claims) | {"diverged": diverged, "seconds": 10.0}
    (folder / "metrics.json").write_text(json.dumps(found | {"loss_floor": 0.003} | metrics))
    if not diverged:
        code, noise = np.eye(64), draws.uniform(-0.3, 0.3, (2, 64, 64))
        own, other = np.clip(0.8 * code + noise[0], -1, 1), np.clip(0.8 * r2 * code + noise[1], -1, 1)
        mask = np.kron(draws.permutation(16).reshape(4, 4) < 12, np.ones((2, 2))).astype(bool).flatten()
        picture = draws.integers(0, 256, (3, 32, 32), dtype=np.uint8)
        np.savez(folder / "similarity.npz", own=own, other=other, mask=mask, picture=picture)
    return folder


def grid(root, seeds, arms=tuple(CELLS)):
    for arm in arms:
        for seed in range(seeds):
            run(root, arm, seed)


def draw(root, study, seeds, report):
    plot.main([study, "--runs", str(root), "--seeds", *map(str, range(seeds)), "--results", str(report)])
    path = report / f"{study}.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(("study", "seeds"), list(zip(STUDIES, (3, 1), strict=True)))
def test_every_study_is_drawn(tmp_path, study, seeds):
    declared = STUDIES[study]
    grid(tmp_path / "runs", seeds)
    found = draw(tmp_path / "runs", study, seeds, tmp_path / "report")
    figures = [f"{study}-{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    tables = [f"{study}.{kind}" for kind in ("csv", "json")]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted([*figures, *tables])
    assert found["question"] == declared.question and found["primary_metric"] == "finetune_accuracy"
    assert found["published"] == declared.published and not found["not_run"]
    assert [f"{one['arm']}:{one['reference']}" for one in found["contrasts"]] == declared.contrasts
    assert found["margin"] is None and [one["primary"] for one in found["contrasts"]].count(True) == 1
    control = found["controls"][0]
    assert (control["arm"], control["baseline_arm"], control["passed"]) == ("base", "no-pretraining", seeds > 1 or None)
    assert (found["verdict"] == "one seed: no interval") == (seeds == 1)
    assert found["data"] == "glyphs (synthetic characters, 36 classes), vit_demo, both positions, 3 epochs of batch 32"
    text = (tmp_path / "report" / f"{study}-factorial.svg").read_text()
    assert all(word in text for word in ("basic views", "keys × views", "no-pretraining", "position R²"))
    assert "Not there" not in text and found["notes"][0].startswith("Position diagnostics")


def test_position_codes_are_named(tmp_path):
    grid(tmp_path / "runs", 2)
    found = draw(tmp_path / "runs", "conmim-stop-gradient", 2, tmp_path / "report")
    words = {row["arm"]: row["word"] for row in found["rows"]}
    assert {arm for arm, word in words.items() if word} == {"online-no-stop-gradient", "symmetric-no-stop-gradient"}
    assert "online-no-stop-gradient has a position code for keys in every seed" in found["finding"]
    runs = [{"position_r2": 0.99, "cross_top1": 0.99}, {"position_r2": 0.99, "cross_top1": 0.94}]
    assert plot.position_code(runs[:1]) and plot.position_code(runs) is None


def test_no_run_is_said_and_nothing_written(tmp_path, capsys):
    assert draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / "report") is None
    assert capsys.readouterr().out == f"conmim-asymmetry: no runs in {tmp_path / 'runs'} yet\n"
    assert not (tmp_path / "report").exists()


def test_an_unknown_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plot.main(["conmim-views", "--runs", str(tmp_path), "--results", str(tmp_path / "report")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "no study 'conmim-views'" in printed and printed.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_runs_that_have_only_begun_are_drawn_as_holes(tmp_path):
    grid(tmp_path / "runs", 1)
    for path in (tmp_path / "runs").glob("*/*/metrics.json"):
        path.unlink()
    found = draw(tmp_path / "runs", "conmim-asymmetry", 1, tmp_path / "report")
    assert "symmetric: 1 of 1 missing (seed 0)." in found["notes"] and not found["counted"]
    assert (tmp_path / "report/conmim-asymmetry-factorial.png").exists()


def test_holes_divergence_and_damage_are_shown(tmp_path):
    root = tmp_path / "runs"
    grid(root, 3, ("base", "no-pretraining"))
    run(root, "online-keys", 0)
    run(root, "online-keys", 1, diverged=True)
    run(root, "symmetric", 0, diverged=True)
    (root / "base/0/similarity.npz").write_bytes(b"junk")
    np.savez(root / "online-keys/0/similarity.npz", **dict.fromkeys(("own", "other", "mask", "picture"), np.zeros(5)))
    found = draw(root, "conmim-asymmetry", 3, tmp_path / "report")
    notes = "\n".join(found["notes"])
    assert "online-keys: 1 of 3 diverged, not averaged (seed 1)." in notes and "symmetric: 2 of 3 missing" in notes
    assert "base, seed 0: similarity.npz cannot be used." in notes
    texts = [
        " ".join(re.sub("<[^>]+>", " ", (tmp_path / f"report/conmim-asymmetry-{name}.svg").read_text()).split())
        for name in ("factorial", "curves", "similarity")
    ]
    assert "Not there: asymmetric views, keys online, no stop-gradient; basic views, keys ema;" in texts[0]
    assert all("online-keys: 1 diverged, 1 missing" in text for text in texts[:2])
    similarity = texts[2]
    assert "no run" in similarity and "Seed 1" in similarity  # of base; symmetric has none
    assert found["verdict"] == "symmetric: 1 of 3 diverged" and found["not_run"] == ["basic-views"]


def test_without_similarities_there_is_no_such_figure(tmp_path):
    grid(tmp_path / "runs", 2, ("base", "symmetric", "no-pretraining"))
    for path in (tmp_path / "runs").glob("*/*/similarity.npz"):
        path.unlink()
    draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / "report")
    assert len(list((tmp_path / "report").glob("*.png"))) == 3


def test_pickled_similarities_are_refused(tmp_path):
    np.savez(tmp_path / "similarity.npz", **dict.fromkeys(("own", "other", "mask", "picture"), np.array([object()])))
    with pytest.raises(ValueError, match="cannot be read"):
        plot.read_similarity(tmp_path / "similarity.npz")
    assert plot.read_similarity(tmp_path / "none.npz") is None


# ---------------------------------------------------------------------------------------------- what follows


def verdict_of(tmp_path, shift=0.0, online=0.0, study="conmim-asymmetry"):
    """Verdict with all fine-tuned accuracies moved by `shift`, and those of symmetric's online weights by `online`."""
    for arm in CELLS:
        for seed in range(4):
            level = CELLS[arm][1] + shift + 0.1 * seed
            other = level + (online if arm == "symmetric" else 0)
            run(tmp_path / "runs", arm, seed, finetune_accuracy=level, finetune_accuracy_online=other)
    return draw(tmp_path / "runs", study, 4, tmp_path / "report")


def test_a_finding_needs_both_weights_to_agree_in_sign(tmp_path):
    found = verdict_of(tmp_path / "agree")
    assert found["verdict"] == "lower" and found["counted"] and not any("disagree" in note for note in found["notes"])
    found = verdict_of(tmp_path / "disagree", online=20.0)
    assert found["verdict"] == plot.DISAGREE and not found["counted"]
    note = next(note for note in found["notes"] if "disagree" in note)
    assert "symmetric:base" in note and "-11.0" in note and "9.0" in note and note in found["finding"]


@pytest.mark.parametrize(
    ("shift", "words"), [(-20.0, "13.2 %, outside 20 to 80 %"), (48.0, "81.2 %, outside 20 to 80 %")]
)
def test_a_control_near_chance_or_ceiling_informs_of_nothing(tmp_path, shift, words):
    found = verdict_of(tmp_path, shift)
    assert found["verdict"] == "not informative at this scale" and not found["counted"]
    assert words in found["finding"] and any(words in note for note in found["notes"])
    assert "Position diagnostics, which need no labels: symmetric minus base" in found["finding"]


def test_a_control_that_is_not_beaten_informs_of_nothing(tmp_path):
    for seed in range(3):
        for arm in ("base", "symmetric"):
            run(tmp_path / "runs", arm, seed)
        run(tmp_path / "runs", "no-pretraining", seed, finetune_accuracy=51.0 + seed)
    found = draw(tmp_path / "runs", "conmim-asymmetry", 3, tmp_path / "report")
    assert found["verdict"] == "not informative at this scale" and not found["counted"]
    assert "no pre-training" in found["finding"] and "Position diagnostics" in found["finding"]


# ---------------------------------------------------------------------------------------------- arithmetic


def test_two_cells_have_welchs_interval():
    one, other = [3.0, 4.5, 5.0, 7.0], [1.0, 1.5, 4.0]
    found, expected = plot.combine([one, other], [1, -1]), statistics.welch(one, other)
    assert found == pytest.approx((expected.mean, expected.low, expected.high))
    alone = stats.t.interval(0.95, 3, np.mean(one), stats.sem(one))
    assert plot.combine([one], [1])[1:] == pytest.approx(alone)
    assert plot.combine([one, []], [1, -1]) is None and plot.combine([one, [1.0]], [1, -1]) == (3.875, None, None)
    assert plot.combine([[2.0, 2.0], [1.0, 1.0]], [1, -1]) == (1.0, 1.0, 1.0)


def test_four_cells_of_equal_spread_have_all_degrees_of_freedom():
    values = [[a, a + 1, a + 2] for a in (0.0, 5.0, 1.0, 9.0)]
    found = plot.combine(values, [1, -1, -1, 1])
    half = stats.t.ppf(0.975, 8) * (4 * 1.0 / 3) ** 0.5
    assert found == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_effects_are_those_of_the_specification():
    """Cells numbered as there: 1 and 2 ema, 3 and 4 online, 5 and 6 without stop-gradient; asymmetric, then basic."""
    number = {("asymmetric", 0): 1, ("basic", 0): 2, ("asymmetric", 1): 3, ("basic", 1): 4, ("asymmetric", 2): 5,
              ("basic", 2): 6}  # fmt: skip
    level = {cell: float(10**place) for cell, place in number.items()}
    c = [0.0] + [float(10**place) for place in range(1, 7)]
    found = [(row.name, sum(w * level[cell] for cell, w in row.weights.items())) for row in plot.factors()]
    assert found == [
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


def test_cells_are_found_by_their_arguments_alone(tmp_path):
    grid(tmp_path, 1)
    run(tmp_path, "basic-views", 1, given={"temperature": 0.5})
    (tmp_path / "basic-views/1").rename(tmp_path / "other")
    (tmp_path / "an-ablation").mkdir()
    (tmp_path / "other").rename(tmp_path / "an-ablation/0")
    names = plot.every_arm(tmp_path, ["base"])
    assert names[0] == "base" and set(names) == {*CELLS, "an-ablation"}
    found = plot.cells(results.read_runs(tmp_path, names, [0]), "base")
    places = [
        "base",
        "online-keys",
        "online-no-stop-gradient",
        "basic-views",
        "symmetric",
        "symmetric-no-stop-gradient",
    ]
    assert [found[views, place] for views in plot.VIEWS for place in range(3)] == places


def test_equal_runs_give_equal_bytes(tmp_path):
    grid(tmp_path / "runs", 2)
    for name in ("a", "b"):
        draw(tmp_path / "runs", "conmim-asymmetry", 2, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
