"""make publish and make page: what is copied to results/ and what is refused, for a toy paper in its own clone."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.study import publish

STUDIES = """
from common.study.design import Arm, Design, Metric, MustBeat, Study
METRICS = {"knn": Metric("kNN accuracy", "%", 1, "higher")}
def design(scale, settings):
    must_beat = [MustBeat("base", "untrained", "knn", "untrained")]
    arm = Arm("arm", "--leak 1", reference="base")
    extra = Arm("more", "--leak 2", reference="base")
    return Design("toy", "Toy", scale, METRICS, [
        Study("toy-arm", "What does it do?", [arm], "knn", must_beat=must_beat, seeds=(0, 1)),
        Study("toy-more", "And more?", [extra], "knn", must_beat=must_beat, seeds=(0, 1), extra=True),
    ], arms=[Arm("base")], baselines=["untrained"])
"""
PLOT = """
import sys
sys.path[:0] = [{root!r}, "."]
from common.study import figures, plotting
from toy.studies import design
def draw(view):
    return {{"metrics": figures.dots([figures.Dots("knn", {{"base": [1.0]}})], view.styles)}}
if __name__ == "__main__":
    plotting.draw(None, None, design, lambda runs: "pictures", draw)
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


def run(arm, seed, knn, flags, **provenance):
    folder = f"runs/demo/toy/{arm}/{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    source = hashlib.sha256(b"# trains").hexdigest()
    defaults = {"commit": "c", "dirty": False, "data": "d", "source": source, "script": "toy/train.py"}
    Path(folder).mkdir(parents=True)
    Path(folder, "args.json").write_text(json.dumps({"arguments": {"seed": seed}, "provenance": defaults | provenance}))
    Path(folder, "metrics.json").write_text(json.dumps({"knn": knn, "untrained": 10.0 + seed}))
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
        ({"data": "other"}, "runs used different data"),
        ({"dirty": True}, "run with uncommitted changes"),
    ],
)
def test_inconsistent_or_dirty_runs_are_refused(provenance, message, clone, capsys):
    run("arm", 1, 21.0, "--leak 1", **provenance)
    assert f"toy-arm: {message}" in errors(capsys)


def test_uncommitted_changes_are_refused(clone, capsys):
    (clone / "toy/train.py").write_text("# trains otherwise")
    assert "the working tree has uncommitted changes" in errors(capsys)


def test_page_without_results_is_refused(clone, capsys):
    assert "results/demo does not exist" in errors(capsys, "page")
