"""ConMIM's figures and sentences from run folders that the test writes: both studies, holes, and the arithmetic."""

import json

import numpy as np
import pytest
from scipy import stats

from common import records, statistics, studies
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
STUDIES = {
    "conmim-stop-gradient": [
        "online-no-stop-gradient:online-keys", "symmetric-no-stop-gradient:symmetric", "online-keys:base",
        "base:no-pretraining",
    ],
    "conmim-asymmetry": ["symmetric:base", "basic-views:base", "online-keys:base", "base:no-pretraining"],
}  # fmt: skip
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


def draw(root, study, seeds, results):
    asked = ["--seeds", *map(str, range(seeds)), "--results", str(results)]
    plot.main([study, *STUDIES[study], "--runs", str(root), *asked])
    path = results / f"{study}.json"
    return json.loads(path.read_text()) if path.exists() else None
