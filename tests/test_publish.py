"""make publish and make page: what is copied to results/ and what is refused, for a toy paper in its own clone."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from common.study import publish
from common.study.design import Arm
from common.study.request import Request

STUDIES = """
from common.study.design import Arm, Design, Metric, MustBeat, Study
METRICS = {"knn": Metric("kNN accuracy", "%", 1, "higher")}
def design(scale, settings):
    must_beat = [MustBeat("base", "untrained", "knn", baseline_metric="untrained")]
    arm = Arm("arm", "--leak 1", reference="base")
    extra = Arm("more", "--leak 2", reference="base")
    return Design("toy", "Toy", scale, METRICS, [
        Study("toy-arm", "What does it do?", [arm], "knn", must_beat=must_beat, seeds=(0, 1), margin=5.0),
        Study("toy-more", "And more?", [extra], "knn", must_beat=must_beat, seeds=(0, 1), extra=True),
        Study("toy-seeds", "Both?", ["arm:base", "more:base"], "knn", must_beat=must_beat, n=3, n_other=2, extra=True),
    ], arms=[Arm("base")], baselines=["untrained"], chance={"knn": {"": 5.0}})
"""
PLOT = """
import sys
sys.path[:0] = [{root!r}, "."]
from common.study import figures, plotting
from toy.studies import design
def draw(view):
    return {{"metrics": figures.dots([figures.Dots("knn", {{"base": [1.0]}})], view.styles)}}
if __name__ == "__main__":
    plotting.main(None, None, design, lambda runs: "pictures", draw)
"""
VARIABLES = ["PAPERS=toy", "SCALE=demo"]


def git(*words):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git clone with the paper `toy`, whose main study has been run and drawn."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/studies.py").write_text(STUDIES)
    (tmp_path / "toy/train.py").write_text("# trains")
    (tmp_path / "toy/plot.py").write_text(PLOT.format(root=str(ROOT)))
    (tmp_path / "README.md").write_text("\n".join(["# Toy", publish.BLOCK[0], "old table", publish.BLOCK[1], "end\n"]))
    (tmp_path / ".gitignore").write_text("runs\n__pycache__\n*.html\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a paper")
    for arm, flags, knn in (("base", "", 60.0), ("arm", "--leak 1", 20.0)):
        for seed in (0, 1):
            run(arm, seed, knn + seed, flags)
    draw("toy-arm")
    yield tmp_path
    for name in ("toy", "toy.studies"):
        sys.modules.pop(name, None)


def run(arm, seed, knn, flags, eval_source="e" * 64, data_seed=0, **provenance):
    folder = f"runs/demo/toy/{arm}/{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    source = hashlib.sha256(b"# trains").hexdigest()
    defaults = {"commit": "c", "dirty": False, "data": "d", "source": source, "script": "toy/train.py"}
    Path(folder).mkdir(parents=True)
    saved = {"arguments": {"seed": seed, "data_seed": data_seed}, "provenance": defaults | provenance}
    Path(folder, "args.json").write_text(json.dumps(saved))
    metrics = {"knn": knn, "untrained": 10.0 + seed, "eval_source": eval_source}
    Path(folder, "metrics.json").write_text(json.dumps(metrics))
    Path(folder, "flags").write_text(f"flags: {flags}".strip() + "\n")
    Path(folder, "model.pt").touch()


def draw(study, *seeds):
    subprocess.run([sys.executable, "toy/plot.py", study, *(["--seeds", *seeds] if seeds else [])], check=True)


def errors(capsys, *words):
    """Return the error messages of `make publish`, which exits with code 2 and copies nothing."""
    with pytest.raises(SystemExit) as end:
        publish.main([*VARIABLES, *words])
    assert end.value.code == 2 and not Path("results").exists()
    return capsys.readouterr().err


def test_a_complete_study_is_published_and_appears_on_the_page(clone, capsys):
    publish.main(VARIABLES)
    published = sorted(path.name for path in (clone / "results/demo").iterdir())
    names = ["toy-arm-differences.png", "toy-arm-metrics.png", "toy-arm.csv", "toy-arm.json"]
    assert published == ["README.md", *names]
    readme = (clone / "results/demo/README.md").read_text()
    assert "![toy-arm-metrics](toy-arm-metrics.png)" in readme and "| arm | --leak 1 | 20.5" in readme
    front = (clone / "README.md").read_text()
    assert "old table" not in front and front.startswith("# Toy\n") and front.endswith(f"{publish.BLOCK[1]}\nend\n")
    assert "| [toy-arm](results/demo/README.md#toy-arm) | arm hurts: kNN accuracy 60.5 -> 20.5 %" in front.replace(
        "→", "->"
    )
    git("add", ".")
    git("commit", "-qm", "results")
    publish.main(["page", *VARIABLES])
    page = (clone / "results/demo/index.html").read_text()
    assert "data:image/png;base64," in page and "arm hurts: kNN accuracy" in page
    assert not subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    for seed in (0, 1):
        run("more", seed, 50.0, "--leak 2")
    draw("toy-more")
    publish.main([*VARIABLES, "toy-more"])
    assert "toy-more-metrics.png" in (clone / "results/demo/extras.md").read_text()
    assert "toy-more" not in (clone / "results/demo/README.md").read_text()


def test_outdated_figures_of_published_studies_are_deleted(clone):
    (clone / "results/demo").mkdir(parents=True)
    for name in ("toy-arm-old.png", "toy-more-metrics.png"):
        (clone / "results/demo" / name).write_bytes(b"")
    publish.main([*VARIABLES, "toy-arm"])
    figures = {path.name for path in (clone / "results/demo").glob("*.png")}
    assert figures == {"toy-arm-differences.png", "toy-arm-metrics.png", "toy-more-metrics.png"}


def test_publish_redraws_the_study_as_declared(clone):
    """The report itself may show other seeds or contain outdated figures."""
    draw("toy-arm", "0")
    report = clone / "runs/demo/report"
    (report / "toy-arm-old.png").write_bytes(b"")
    publish.main(VARIABLES)
    summary = json.loads((clone / "results/demo/toy-arm.json").read_text())
    assert summary["seeds"] == [0, 1] and not (clone / "results/demo/toy-arm-old.png").exists()
    assert json.loads((report / "toy-arm.json").read_text())["seeds"] == [0]  # the report is unchanged
    draw("toy-arm")
    assert not (report / "toy-arm-old.png").exists()  # drawing deletes outdated figures


def test_missing_runs_are_refused(clone, capsys):
    for name in ("metrics.json", "args.json"):
        path = clone / "runs/demo/toy/arm/1" / name
        saved = path.read_text()
        path.unlink()
        assert "toy-arm: missing or incomplete runs: runs/demo/toy/arm/1" in errors(capsys)
        path.write_text(saved)
    assert "unknown study 'toy'" in errors(capsys, "toy")
    assert "toy-more: missing or incomplete runs: runs/demo/toy/more/0" in errors(capsys, "toy-more")


def test_other_flags_and_settings_are_refused(clone, capsys):
    run("arm", 1, 21.0, "--leak 1 --epochs 3")
    assert "flags differ from the declared ones: runs/demo/toy/arm/1" in errors(capsys)
    for word in ("EXTRA=--epochs 3", "SEEDS=0", "PAIRS=a-b", "TASKS=lis", "DATA=my.npy"):
        assert word.partition("=")[0] in errors(capsys, word)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"source": "0" * 64}, "runs come from several versions of toy/train.py"),
        ({"eval_source": "0" * 64}, "runs come from several versions of toy/eval.py"),
        ({"eval_source": None}, "runs come from several versions of toy/eval.py"),
        ({"data": "other"}, "runs used different data"),
        ({"dirty": True}, "run with uncommitted changes"),
    ],
)
def test_inconsistent_or_dirty_runs_are_refused(provenance, message, clone, capsys):
    run("arm", 1, 21.0, "--leak 1", **provenance)
    assert f"toy-arm: {message}" in errors(capsys)


def test_blocks_may_have_different_data_and_the_arms_of_a_block_may_not(clone, capsys):
    """At demo scale a seed draws the data. At other scales all seeds have the same data."""
    for arm, flags in (("base", ""), ("arm", "--leak 1")):
        run(arm, 1, 20.0, flags, data="drawn with seed 1", data_seed=1)
    request = Request.parse(VARIABLES)
    design = request.designs["toy"]
    assert publish.problems(request, design, design.study("toy-arm")) == []
    publish.main(VARIABLES)
    summary = json.loads((clone / "results/demo/toy-arm.json").read_text())
    assert summary["seed_draws"] == "data, initial weights and order" and summary["notes"] == []
    assert "A seed draws data, initial weights and order." in (clone / "results/demo/README.md").read_text()
    shutil.rmtree(clone / "results")
    given = Request.parse([*VARIABLES, "SCALE=gpu", "RUNS=runs/demo"])
    (reason,) = publish.problems(given, given.designs["toy"], given.designs["toy"].study("toy-arm"))
    assert "runs used different data" in reason
    run("arm", 1, 21.0, "--leak 1", data="d", data_seed=1)
    assert "toy-arm: runs used different data" in errors(capsys)


def test_runs_with_other_weights_of_one_teacher_are_refused(clone):
    """A teacher that was trained again has other weights; its finished students are not trained again."""
    request = Request.parse(VARIABLES)
    design = request.designs["toy"]
    design.teachers, study = [Arm("teacher")], design.study("toy-arm")
    for name in ("base", "arm"):
        design.by_name[name] = replace(design.by_name[name], needs="teacher")
    design.by_name["teacher"] = design.teachers[0]
    for arm, flags in (("base", ""), ("arm", "--leak 1"), ("teacher", "")):
        for seed in (0, 1):
            run(arm, seed, 60.0, flags, data_seed=seed, data=str(seed), teacher_weights=f"weights {seed}")
    assert publish.problems(request, design, study) == []
    run("arm", 1, 60.0, "--leak 1", data_seed=1, data="1", teacher_weights="other weights")
    (reason,) = publish.problems(request, design, study)
    assert "runs used different weights of the teacher (teacher, seed 1)" in reason


def test_every_arm_needs_only_its_own_seeds(clone):
    """The primary contrast needs the seeds 10 to 12, the other arm the first two of these."""
    for seed in (10, 11, 12):
        run("base", seed, 60.0, "")
        run("arm", seed, 50.0, "--leak 1")
    for seed in (10, 11):
        run("more", seed, 50.0, "--leak 2")
    request = Request.parse(VARIABLES)
    design = request.designs["toy"]
    assert publish.problems(request, design, design.study("toy-seeds")) == []
    shutil.rmtree("runs/demo/toy/more/11")
    shutil.rmtree("runs/demo/toy/arm/12")
    (reason,) = publish.problems(request, design, design.study("toy-seeds"))
    assert "missing or incomplete runs: runs/demo/toy/arm/12, runs/demo/toy/more/11;" in reason


def test_a_diverged_run_is_published_as_chance(clone):
    path = clone / "runs/demo/toy/arm/1/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"knn": None, "diverged": True}))
    publish.main(VARIABLES)
    summary = json.loads((clone / "results/demo/toy-arm.json").read_text())
    assert summary["rows"][1]["metrics"]["knn"]["values"] == {"0": 20.0, "1": 5.0}
    assert "arm: 1 of 2 diverged, counted as chance (seed 1)." in summary["notes"]
    assert summary["seed_draws"] == "initial weights and order"  # both runs have data seed 0


def test_an_a_a_test_is_published_and_counted_in_both_readmes(clone):
    for seed in (10, 11, 12, 13, 14):
        run("base", seed, 60.0 + seed % 3, "")
        run("base-again", seed, 60.1 + seed % 3 + 0.1 * (seed % 2), "--seed-offset 1000")
    for seed in range(15, 20):
        run("base", seed, 60.0 + seed % 3, "")
        run("base-again", seed, 60.1 + seed % 3 - 0.1 * (seed % 2), "--seed-offset 1000")
    draw("toy-base-again")
    publish.main([*VARIABLES, "toy-arm", "toy-base-again"])
    summary = json.loads((clone / "results/demo/toy-base-again.json").read_text())
    assert summary["seeds"] == list(range(10, 20)) and summary["calibration"] == {"base-again": "reproduced"}
    for name in ("README.md", "extras.md"):
        assert (
            "A/A tests: 0 of 1 gave a false difference (1 no difference)."
            in (clone / "results/demo" / name).read_text()
        )
    publish.main(["page", *VARIABLES])
    assert (
        "A/A tests: 0 of 1 gave a false difference (1 no difference)."
        in (clone / "results/demo/index.html").read_text()
    )


def test_uncommitted_changes_are_refused(clone, capsys):
    (clone / "toy/train.py").write_text("# trains otherwise")
    assert "the working tree has uncommitted changes" in errors(capsys)


def test_page_without_results_is_refused(clone, capsys):
    assert "results/demo does not exist" in errors(capsys, "page")
