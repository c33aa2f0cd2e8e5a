"""A seed is a block: --data-seed draws data, splits and subsets, --seed the rest, and --seed-offset is an A/A test."""

import argparse
import hashlib
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

import bsa.eval
import bsa.train
import cocord.eval
import cocord.teacher
import cocord.train
import conmim.eval
import conmim.train
import seqvcr.eval
import seqvcr.train
import simsiam.eval
import simsiam.train
from bsa.planted import planted_concepts
from common import checkpoints, glyphs, image_folder, images, seeding
from common.run import FORMAT, load_finished, read_log
from seqvcr import tasks

CPU = torch.device("cpu")
# Train and eval modules of each paper, and flags for a run of seconds.
PAPERS: dict[str, tuple[ModuleType, ModuleType, list[str]]] = {
    "simsiam": (simsiam.train, simsiam.eval, ["--rehearse", "2"]),
    "conmim": (conmim.train, conmim.eval, ["--rehearse", "2"]),
    "cocord": (cocord.train, cocord.eval, ["--rehearse", "2"]),
    "bsa": (bsa.train, bsa.eval, ["--rehearse", "2", "--latent", "64", "--active", "4"]),
    "seqvcr": (seqvcr.train, seqvcr.eval, ["--rehearse", "2", "--train-size", "300", "--batch", "32"]),
}


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(images, "GLYPH_COUNTS", {"train": 250, "test": 60})
    for module in (bsa.train, bsa.eval):
        monkeypatch.setattr(module, "planted_concepts", lambda seed: planted_concepts(600, seed))
    monkeypatch.setitem(conmim.eval.RECIPES, "bank", (72, None, None))
    monkeypatch.setitem(conmim.train.SCALES, "labels", (72, None, None))


def digest(*tensors: Tensor) -> str:
    return checkpoints.sha256(*tensors)[:16]


def random_images(data_seed: int) -> images.Images:
    """600 images of one grey value each, labelled by their row."""
    pixels = (torch.arange(600) % 251).byte().view(-1, 1, 1, 1).expand(600, 3, 8, 8).contiguous()
    half = torch.full((3, 1, 1), 0.5)
    return images.Images(pixels, torch.arange(600), pixels, torch.arange(600), 7, half, half, "", data_seed)


def task_rows(name: str, size: int, data_seed: int) -> tuple[str, str]:
    """Return digests of the three splits and of a streamed batch of a task."""
    task = tasks.build_task(name, size, data_seed)
    return digest(*tasks.load(task, 300, None, CPU)), digest(tasks.stream(task, 5, 3, 64, CPU))


CONMIM = argparse.Namespace(size=32, network="vit_tiny_4", mask_ratio=0.75, mask_square=2)
# Draws by name: a function of the data seed, and its result at data seed 0 before there was a --data-seed.
DRAWS: dict[str, tuple[Any, Any]] = {
    "glyphs10, train": (lambda s: digest(*glyphs.generate("glyphs10", 500, "train", s)), "160f75c67d70acec"),
    "glyphs36, test": (lambda s: digest(*glyphs.generate("glyphs36", 500, "test", s)), "7cb734863a5fbf27"),
    "held-out tenth": (lambda s: digest(*seeding.held_out_split(500, CPU, s)), "5432f614269f9f81"),
    "subset of --rehearse": (lambda s: digest(random_images(s).subset(50).train_labels), "0e5b9f17492eff0d"),
    "planted concepts": (
        lambda s: hashlib.sha256(b"".join(array.tobytes() for array in planted_concepts(300, s)[:2])).hexdigest()[:16],
        "eb77093034b90d26",
    ),
    "labelled images": (
        lambda s: digest(images.balanced_subset(torch.arange(500) % 7, 40, 7, s)),
        "2433e303d57c5a5e",
    ),
    "diagnosed masks": (
        lambda s: digest(conmim.train.diagnostic_batch(CONMIM, random_images(s))[1]),
        "f41954f250ba4eb9",
    ),
    "ConMIM's held-out test": (
        lambda s: digest(random_images(s).with_held_out_test().test_labels),
        "4791ee9b331bc9d1",
    ),
    "multiplication, all rows": (
        lambda s: task_rows("multiplication", 2, s),
        ("d2cfce63b53bb5c2", "6298168a364ae3c1"),
    ),
    "multiplication": (lambda s: task_rows("multiplication", 4, s), ("7669e9ce7782366f", "0aff72f3da2b65e2")),
    "arithmetic": (lambda s: task_rows("arithmetic", 3, s), ("33de931138d463f1", "bd5556b3a1841fe8")),
    "lis": (lambda s: task_rows("lis", 10, s), ("3ce4e0e5f789fd90", "b3f971a6de8702ef")),
}


SLOW = pytest.mark.slow  # 65,536 rows in each draw of these tasks


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) if n in ("arithmetic", "lis") else n for n in DRAWS])
def test_data_seed_0_gives_the_known_draws_and_other_seeds_give_others(name):
    draw, known = DRAWS[name]
    drawn, first, second = draw(0), draw(1), draw(2)
    assert drawn == known
    digests = ([result] if isinstance(result, str) else result for result in (drawn, first, second))
    assert all(len(set(row)) == 3 for row in zip(*digests, strict=True))


def test_bsa_splits_planted_concepts_and_given_matrices_by_the_data_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(bsa.train, "planted_concepts", lambda seed: planted_concepts(seed=seed))
    planted = [bsa.train.load_splits("planted", tmp_path, CPU, data_seed) for data_seed in (0, 1)]
    assert digest(*planted[0].indices) == "368c4131b5f43d48"  # as before there was a --data-seed
    assert planted[0].digest != planted[1].digest and not torch.equal(planted[0].indices[2], planted[1].indices[2])
    matrix = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "matrix.npy", matrix.numpy())
    given = [bsa.train.load_splits("file", tmp_path / "matrix.npy", CPU, data_seed) for data_seed in (0, 1)]
    assert given[0].digest == given[1].digest and not torch.equal(given[0].indices[2], given[1].indices[2])


def test_the_splits_of_two_data_seeds_are_independent():
    """Neither equal nor shifted: a tenth of the test pairs of one seed are test pairs of the other."""
    first, second = (tasks.build_task("multiplication", 2, data_seed) for data_seed in (0, 1))
    rows = first.all_rows()
    assert rows is not None
    is_test = [tasks.split_of(task, rows) == tasks.TEST for task in (first, second)]
    for shift in range(-2, 3):
        overlap = (is_test[0] & is_test[1].roll(shift)).sum() / is_test[0].sum()
        assert 0.05 < overlap < 0.16, shift


def test_a_streamed_folder_is_subset_by_the_data_seed(pictures):
    paths = []
    for data_seed in (0, 0, 1):
        data = images.load_or_stream("folder", pictures, 96, CPU, 0, data_seed)
        assert isinstance(data, image_folder.StreamedImages)
        paths.append([path for path, _ in data.subset(10).train.samples])
    assert paths[0] == paths[1] != paths[2]


def test_the_glyph_caches_of_two_data_seeds_are_different_files(tmp_path):
    first, second = (images.load("glyphs10", tmp_path, 32, CPU, data_seed=data_seed) for data_seed in (0, 1))
    assert len(list(tmp_path.glob("glyphs10-*-seed0-*.pt"))) == len(list(tmp_path.glob("glyphs10-*-seed1-*.pt"))) == 2
    cached = images.load("glyphs10", tmp_path, 32, CPU, data_seed=1)
    assert first.digest != second.digest == cached.digest and torch.equal(second.train, cached.train)


def test_the_first_images_of_a_glyph_split_do_not_depend_on_their_number():
    assert 1000 % glyphs.CHUNK == 0  # so the former 1,000 test images are the first of the 5,000
    short, long = (glyphs.generate("glyphs10", count, "test") for count in (1000, 1500))
    assert torch.equal(short[0], long[0][:1000]) and torch.equal(short[1], long[1][:1000])


# ---------------------------------------------------------------------------------------------- runs


def train(paper: str, root, name: str, *flags: str) -> tuple[dict, list[dict], dict]:
    """Train a run. Returns args.json, train.jsonl without times, and model.pt."""
    module, _, tiny = PAPERS[paper]
    module.main([*tiny, "--device", "cpu", "--data", str(root / "data"), "--out", str(root / name / "0"), *flags])
    lines = [json.loads(line) for line in (root / name / "0/train.jsonl").read_text().splitlines()]
    times = ("seconds", "examples_per_second", "peak_memory")
    log = [{key: value for key, value in line.items() if key not in times} for line in lines]
    return json.loads((root / name / "0/args.json").read_text()), log, checkpoints.load(root / name / "0/model.pt")


def teacher(root, data_seed: int) -> None:
    """Train a teacher where students of this data seed look for it by default."""
    out = ["--out", str(root / f"teacher@vgg_s64/{data_seed}"), "--data-seed", str(data_seed)]
    cocord.teacher.main(["--rehearse", "2", "--device", "cpu", "--data", str(root / "data"), *out])


@pytest.mark.parametrize("paper", PAPERS)
def test_a_run_and_its_evaluation_use_the_data_seed(paper, tmp_path, capsys):
    if paper == "cocord":
        for data_seed in (0, 1):
            teacher(tmp_path, data_seed)
    (base, log, _), (again, log_again, _), (other, other_log, _) = (
        train(paper, tmp_path, name, *flags)
        for name, flags in (
            ("base", []),
            ("again", ["--seed-offset", "1000"]),
            ("other", ["--data-seed", "1"]),
        )
    )
    # base-again has the data of base, and other weights and batches.
    assert base["provenance"]["data"] == again["provenance"]["data"] != other["provenance"]["data"]
    assert [run["arguments"]["seed"] for run in (base, again, other)] == [0, 1000, 0]
    assert [run["arguments"]["seed_offset"] for run in (base, again, other)] == [0, 1000, 0]
    assert log[1]["loss"] != log_again[1]["loss"] and log[1]["loss"] != other_log[1]["loss"]
    metrics = []
    for name in ("base", "other"):  # fails if the digest differs from the recorded one
        PAPERS[paper][1].main([str(tmp_path / name / "0")])
        metrics.append(json.loads((tmp_path / name / "0/metrics.json").read_text()))
    assert metrics[0]["data"] != metrics[1]["data"] == other["provenance"]["data"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(paper, tmp_path, "base", "--data-seed", "1")
    assert end.value.code == 2 and "contains a run with other flags (--data-seed 0 -> 1)" in capsys.readouterr().err


@pytest.mark.parametrize("paper", PAPERS)
def test_initial_weights_depend_on_seed_and_offset_but_not_on_the_data_seed(paper, tmp_path):
    module = PAPERS[paper][0]

    def weights(*flags: str) -> dict[str, Tensor]:
        args = module.parse_args(["--out", str(tmp_path), *flags])
        if paper == "cocord":
            model = module.build_model(args, 36, CPU)
        elif paper == "bsa":
            model = module.build_model(args, 16, CPU)
        elif paper == "seqvcr":
            model = module.build_model(args, tasks.build_task(args.task, args.size, args.data_seed), CPU)
        else:
            model = module.build_model(args, CPU)
        return model.state_dict()

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    base = weights()
    assert equal(base, weights("--data-seed", "1")) and not equal(base, weights("--seed-offset", "7"))
    assert equal(weights("--seed", "9"), weights("--seed", "2", "--seed-offset", "7"))


def test_batches_depend_on_the_offset_but_not_on_the_data_seed():
    def first_batch(*flags: str) -> Tensor:
        args = conmim.train.parse_args(["--batch", "8", *flags])
        return next(conmim.train.batches(args, random_images(args.data_seed), 0, slice(None)))[0]

    base = first_batch()
    assert torch.equal(base, first_batch("--data-seed", "1"))
    assert not torch.equal(base, first_batch("--seed-offset", "1"))


def test_a_teacher_of_another_block_is_refused(tmp_path, capsys):
    teacher(tmp_path, 0)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train("cocord", tmp_path, "student", "--data-seed", "1", "--weights", str(tmp_path / "teacher@vgg_s64/0"))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert "teacher was trained on other data (--data-set glyphs36-hard --data-seed 0): train one with" in printed
    # So is a teacher of an older version, which does not record its data. A file without arguments is not ours.
    path = tmp_path / "teacher@vgg_s64/0/model.pt"
    saved = checkpoints.load(path)
    checkpoints.save(path, {name: value for name, value in saved.items() if name != "data"})
    with pytest.raises(SystemExit):
        train("cocord", tmp_path, "student")
    assert "trained on other data" in capsys.readouterr().err
    checkpoints.save(path, saved["model"])
    train("cocord", tmp_path, "student", "--data-seed", "1", "--weights", str(path))


def test_a_run_of_this_format_is_read():
    """tests/format-2 was written when FORMAT became 2. If it cannot be read any more, give the new format a number."""
    folder = ROOT / f"tests/format-{FORMAT}"
    arguments, provenance, saved = load_finished(folder, str(ROOT / "bsa/eval.py"))
    assert provenance["format"] == FORMAT and saved["epoch"] == 2
    assert [line["epoch"] for line in read_log(folder, 2)] == [0, 1, 2]
    model = bsa.train.build_model(argparse.Namespace(**arguments), 128, CPU)
    checkpoints.load_weights(model, saved["model"], folder)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_a_run_of_another_format_is_refused(number, tmp_path, capsys):
    """Format 1 had no number. An unfinished run without a data seed has other arguments."""
    train("bsa", tmp_path, "old")
    path = tmp_path / "old/0/args.json"
    config = json.loads(path.read_text())
    config["provenance"] = {**config["provenance"], "format": number}
    path.write_text(json.dumps(config))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        bsa.eval.main([str(tmp_path / "old/0")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and "was not trained by this version" in printed
    del config["arguments"]["data_seed"]
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        train("bsa", tmp_path, "old")
    assert "--data-seed None -> 0" in capsys.readouterr().err
