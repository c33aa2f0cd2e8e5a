"""SimSiam on two gloo ranks: equal to one rank, usage errors, and a run at paper scale through make and torchrun."""

import argparse
import json
import os
import shlex
import subprocess
import sys

import forked
import pytest
from conftest import ROOT, tiny

from common import checkpoints, files
from simsiam import eval as evaluate
from simsiam import train

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_the_fork_server_has_imported_all_listed_modules():
    process = forked.SERVER.Process(target=forked.exit_with_missing_imports)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_batch_not_divisible_by_two_ranks_is_an_error(pictures, tmp_path):
    folder = tmp_path / "run"
    done = forked.run(tmp_path, ROOT / "simsiam/train.py", *tiny(folder, pictures, "--batch", "15"), ranks=2)
    assert done.returncode != 0 and "not divisible by 2 processes" in done.stderr and not folder.exists()


@pytest.mark.parametrize("loss", ["symmetric", "asymmetric-2x"])
def test_two_ranks_train_as_one_rank_with_batch_norms_in_eval_mode(loss, pictures, tmp_path):
    """After six steps the change of each tensor agrees to 1e-5, plus the float32 resolution of the tensor."""
    script = tmp_path / "eval_mode.py"
    script.write_text(f"import sys\nfrom simsiam import train\n{forked.NORMS_IN_EVAL_MODE}train.main(sys.argv[1:])")
    flags = ["--loss", loss, "--lr", "0.5"]
    for name, ranks in (("two", 2), ("one", 1)):
        done = forked.run(tmp_path, script, *tiny(tmp_path / name, pictures, *flags), ranks=ranks)
        assert done.returncode == 0, done.stderr
    two, one = (checkpoints.load(tmp_path / name / "model.pt") for name in ("two", "one"))
    start = train.build_model(argparse.Namespace(**one["arguments"]), "cpu").state_dict()
    for name, expected in one["model"].items():
        expected, initial = expected.double(), start[name].double()
        difference = (two["model"][name].double() - expected).norm()
        assert difference <= 1e-5 * (expected - initial).norm() + 2e-7 * expected.norm(), name
    assert (one["model"]["predictor.0.weight"] - start["predictor.0.weight"]).norm() > 1e-3
    world = [json.loads((tmp_path / name / "args.json").read_text())["provenance"]["world"] for name in ("two", "one")]
    losses = [files.read_lines(tmp_path / name / "train.jsonl")[-1]["loss"] for name in ("two", "one")]
    assert world == [2, 1] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_ranks_measure_as_one_rank_and_their_run_does_not_resume_on_one(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    done = forked.run(tmp_path, ROOT / "simsiam/train.py", *tiny(out, pictures), ranks=2)
    assert done.returncode == 0, done.stderr
    log = files.read_lines(out / "train.jsonl")
    assert [line["epoch"] for line in log] == [0, 1, 2]
    evaluate.main([str(out)])
    one_rank = json.loads((out / "metrics.json").read_text())
    for name in ("std_ratio", "mean_cosine", "effective_rank", "knn_accuracy"):
        assert one_rank[name] == pytest.approx(log[-1][name], rel=1e-4)
    (out / "model.pt").unlink()
    with pytest.raises(SystemExit) as end:
        train.main(tiny(out, pictures))
    assert end.value.code == 2 and "was started in another environment (world 2 -> 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_paper_scale_runs_under_make_and_torchrun(pictures, tmp_path):
    """ResNet-50, DataLoader workers and the LARS probe on two ranks, with the README's `LAUNCH`."""
    launcher = f"{shlex.join(TORCHRUN)} --no-python --standalone --nproc-per-node=2"
    folder = tmp_path / "runs"
    command = ["make", "-C", str(ROOT), f"PYTHON={sys.executable}", "SCALE=paper", "DEVICE=cpu", f"DATA={pictures}"]
    command += [f"LAUNCH={launcher}", f"RUNS={folder}", "EXTRA=--size 72 --batch 8 --workers 1 --rehearse 1"]
    command += [f"{folder}/simsiam/base/0/metrics.json"]
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "simsiam/base/0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["world"] == 2 and metrics["threads"] == 1 and 0 <= metrics["linear_accuracy"] <= 100
    weights = checkpoints.load(run / "model.pt")["model"]
    assert weights["projector.6.weight"].shape == (2048, 2048) and weights["backbone.bn1.num_batches_tracked"] == 4
    assert not list(run.glob("*state*")) and (run / "flags").exists()
