"""No input is ignored: a flag, file or folder is used, or it is an error with a one-line message before training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import bsa.eval
import bsa.train
import cocord.teacher
import cocord.train
import conmim.eval
import conmim.train
import seqvcr.eval
import seqvcr.train
import simsiam.eval
import simsiam.train
from cocord import net
from common import checkpoints, cli, images

PAPERS = {"simsiam": simsiam, "conmim": conmim, "cocord": cocord, "bsa": bsa, "seqvcr": seqvcr}
EVALUATIONS = [simsiam.eval, conmim.eval, bsa.eval, seqvcr.eval]  # that of CoCoRD has no flags of its own


def error_line(capsys, function, *arguments) -> str:
    """Return the error message of a call that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert "Traceback" not in printed and "\x1b" not in printed
    return printed


def matrix(rows: int = 60) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- BSA's --data


@pytest.mark.parametrize("name", ["emb.npy", "emb.NPY", "emb.Npz", "emb.SafeTensors"])
def test_matrix_suffixes_are_case_insensitive(name, tmp_path):
    path = tmp_path / name
    if name.lower().endswith("npy"):
        with open(path, "wb") as file:
            np.save(file, matrix())
    elif name.lower().endswith("npz"):
        with open(path, "wb") as file:
            np.savez(file, x=matrix())
    else:
        header = json.dumps({"x": {"dtype": "F32", "shape": [60, 8], "data_offsets": [0, 1920]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + matrix().tobytes())
    args = bsa.train.parse_args(["--data", str(path)])
    assert args.data_set == "file"
    assert len(bsa.train.load_splits(args.data_set, path, torch.device("cpu"), 0).train) == 48


def test_the_content_of_a_matrix_file_counts_not_its_suffix(tmp_path):
    for save, wrong in ((np.savez, "x.npy"), (np.save, "x.npz")):
        with open(tmp_path / wrong, "wb") as file:
            save(file, matrix())
        assert np.array_equal(bsa.train.read_matrix(tmp_path / wrong), matrix())


@pytest.mark.parametrize("name", ["vec.csv", "vec.txt", "vec", "missing.parquet"])
def test_a_matrix_of_another_format_is_an_error(name, tmp_path, capsys):
    if name != "missing.parquet":
        (tmp_path / name).write_text("1,2\n")
    assert "give a matrix file (.npy" in error_line(capsys, bsa.train.parse_args, ["--data", str(tmp_path / name)])


def test_a_folder_with_an_unused_matrix_is_an_error(tmp_path, capsys):
    np.save(tmp_path / "emb.npy", matrix())
    assert "does not read" in error_line(capsys, bsa.train.parse_args, ["--data", str(tmp_path)])
    (tmp_path / "emb.npy").rename(tmp_path / "train-32-0123456789ab.npy")  # a cache of this project
    np.save(tmp_path / "mesh-minilm.npy", matrix())
    assert bsa.train.parse_args(["--data", str(tmp_path)]).data_set == "planted"


@pytest.mark.parametrize(("factor", "words"), [(1e22, "above 1e+15"), (1e-25, "contain no absolute value above 1e-15")])
def test_values_whose_squares_overflow_or_underflow_in_float32_are_an_error(factor, words, tmp_path, capsys):
    np.save(tmp_path / "emb.npy", factor * matrix())
    assert words in error_line(capsys, bsa.train.load_splits, "file", tmp_path / "emb.npy", torch.device("cpu"), 0)


def test_float64_values_above_the_float32_range_are_an_error(tmp_path, capsys):
    np.save(tmp_path / "emb.npy", 1e200 * matrix().astype(np.float64))
    assert "above 1e+15" in error_line(
        capsys, bsa.train.load_splits, "file", tmp_path / "emb.npy", torch.device("cpu"), 0
    )


# ---------------------------------------------------------------------------------------------- image folders


@pytest.mark.parametrize("paper", ["simsiam", "conmim", "cocord"])
def test_an_image_folder_without_data_set_folder_is_an_error(paper, pictures, tmp_path, capsys):
    data = tmp_path / "photos"
    shutil.copytree(pictures, data)
    before = sorted(data.rglob("*"))
    flags = ["--teacher", "none", "--lambda-contrast", "0", "--lambda-kd", "0"] if paper == "cocord" else []
    argv = ["--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", *flags]
    assert "train with --data-set folder" in error_line(capsys, PAPERS[paper].train.main, argv)
    assert sorted(data.rglob("*")) == before and not (tmp_path / "run/args.json").exists()


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("paper", PAPERS)
def test_a_learning_rate_that_float32_cannot_represent_is_an_error(paper, capsys):
    argv = ["--lr", "1e20", "--lr-factor", "1e20"]
    assert "too large" in error_line(capsys, PAPERS[paper].train.parse_args, argv)


# ---------------------------------------------------------------------------------------------- Seq-VCR


def test_a_file_of_rows_as_data_is_an_error(tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("1 2||3 4 #### 1\n")
    assert "as --data-file" in error_line(capsys, seqvcr.train.parse_args, ["--data", str(tmp_path / "rows.txt")])


def test_gpt2_requires_its_number_of_heads(tmp_path, capsys):
    flags = ["--init-from", str(tmp_path / "model.safetensors"), "--width", "768", "--task", "multiplication"]
    assert "give --width 768 --heads 12" in error_line(capsys, seqvcr.train.parse_args, [*flags, "--heads", "6"])
    assert seqvcr.train.parse_args([*flags, "--heads", "12"]).heads == 12


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory) -> Path:
    """A finished Seq-VCR run."""
    out = tmp_path_factory.mktemp("arithmetic") / "run"
    seqvcr.train.main(["--out", str(out), "--rehearse", "1", "--device", "cpu", "--batch", "32", "--width", "16"])
    return out


def test_entropies_of_another_order_are_written_to_another_file(arithmetic, tmp_path):
    shutil.copytree(arithmetic, tmp_path / "run")
    seqvcr.eval.main([str(tmp_path / "run"), "--alpha", "2"])
    assert (tmp_path / "run/metrics-alpha-2.json").exists() and not (tmp_path / "run/metrics.json").exists()


def test_a_data_file_for_a_run_on_generated_rows_is_an_error(arithmetic, tmp_path, capsys):
    argv = [str(arithmetic), "--data-file", str(tmp_path / "rows.txt")]
    assert "were generated" in error_line(capsys, seqvcr.eval.main, argv)


def test_a_run_is_evaluated_after_its_data_file_has_moved(tmp_path, capsys):
    lines = []
    for a in range(10, 60):
        for b in (11, 47):
            digits = [str(n)[::-1] for n in (a, b, f"{a * b:04d}")]
            lines.append(f"{' '.join(digits[0])} * {' '.join(digits[1])}||#### {' '.join(digits[2])}")
    (tmp_path / "rows.txt").write_text("\n".join(lines) + "\n")
    flags = ["--data-file", str(tmp_path / "rows.txt"), "--size", "2", "--rehearse", "1", "--batch", "32"]
    seqvcr.train.main([*flags, "--out", str(tmp_path / "run"), "--device", "cpu", "--width", "16"])
    (tmp_path / "rows.txt").rename(tmp_path / "moved.txt")
    assert "does not exist" in error_line(capsys, seqvcr.eval.main, [str(tmp_path / "run")])
    seqvcr.eval.main([str(tmp_path / "run"), "--data-file", str(tmp_path / "moved.txt")])
    assert (tmp_path / "run/metrics.json").exists()


# ---------------------------------------------------------------------------------------------- teachers


def test_teacher_accuracy_is_compared_with_the_table_only_on_cifar100(tmp_path):
    torch.save(net.build("resnet20", 100).state_dict(), tmp_path / "x.pth")
    flags = ["--teacher", "resnet20", "--student", "resnet8", "--weights", str(tmp_path / "x.pth")]
    args = cocord.train.parse_args([*flags, "--data-set", "folder"])
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    labels, channel = torch.zeros(8, dtype=torch.int64), torch.full((3, 1, 1), 0.5)
    data = images.Images(pixels, labels, pixels, labels, 100, channel, channel, "")
    assert cocord.train.load_teacher(args, data).digest  # another data set with 100 classes


def test_a_teacher_with_nan_weights_is_an_error_before_training(tmp_path, capsys):
    state = net.build("resnet8", 10).state_dict()
    state["conv1.weight"][0] = float("nan")
    torch.save({"model": state}, tmp_path / "x.pth")
    assert "conv1.weight contains NaN" in error_line(capsys, net.load, "resnet8", 10, tmp_path / "x.pth")


@pytest.mark.parametrize("value", [{"top1": 71}, [71.0], float("nan"), 7100])
def test_an_invalid_recorded_accuracy_is_an_error(value, tmp_path, capsys):
    torch.save({"model": net.build("resnet8", 10).state_dict(), "accuracy": value}, tmp_path / "x.pth")
    assert "accuracy" in error_line(capsys, net.load, "resnet8", 10, tmp_path / "x.pth")


def test_a_recorded_accuracy_below_1_is_a_fraction(tmp_path):
    torch.save({"model": net.build("resnet8", 10).state_dict(), "accuracy": 0.71}, tmp_path / "x.pth")
    assert net.load("resnet8", 10, tmp_path / "x.pth")[1] == pytest.approx(71)


# ---------------------------------------------------------------------------------------------- authors' checkpoints


@pytest.mark.parametrize("legacy", [False, True])
def test_authors_checkpoints_are_read_in_both_formats_of_torch(legacy, tmp_path):
    model = simsiam.train.build_model(simsiam.train.parse_args(["--network", "resnet50"]), torch.device("cpu"))
    state = {f"module.encoder.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 100, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    assert set(simsiam.eval.read_authors_checkpoint(path)["backbone"]) == set(model.backbone.state_dict())
    torch.save({"model": {"patch_embed.proj.weight": torch.ones(1)}}, path, _use_new_zipfile_serialization=not legacy)
    assert set(conmim.eval.read_authors_checkpoint(path)) == {"patch_embed.proj.weight"}


def test_a_smaller_resnet_than_the_authors_is_named(tmp_path, capsys):
    model = simsiam.train.build_model(simsiam.train.parse_args(["--network", "resnet18"]), torch.device("cpu"))
    state = {f"module.encoder.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    message = error_line(capsys, simsiam.eval.read_authors_checkpoint, tmp_path / "x.pt")
    assert "is a ResNet-18 or ResNet-34: give the authors' checkpoint (ResNet-50)" in message


@pytest.mark.parametrize(
    "read", [simsiam.eval.read_authors_checkpoint, conmim.eval.read_authors_checkpoint, seqvcr.net.read_gpt2]
)
@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"wte.weight": torch.full((2, 2), float("nan"))}])
def test_files_without_the_weights_are_an_error_in_all_readers(read, content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.bin")
    error_line(capsys, read, tmp_path / "x.bin")


# ---------------------------------------------------------------------------------------------- logs


def test_the_untrained_baseline_is_always_epoch_0(pictures, tmp_path, capsys):
    """If the line of epoch 0 is missing from the log, the evaluation is an error."""
    out = tmp_path / "run"
    simsiam.train.main(tiny(out, pictures, "--epochs", "2"))
    log = (out / "train.jsonl").read_text().splitlines(keepends=True)
    simsiam.eval.main([str(out)])
    expected = json.loads((out / "metrics.json").read_text())["untrained_knn_accuracy"]
    assert json.loads(log[0])["knn_accuracy"] == expected
    (out / "train.jsonl").write_text("".join(log[1:]))
    assert "epochs are missing" in error_line(capsys, simsiam.eval.main, [str(out)])


def test_the_state_of_an_evaluation_on_other_data_is_not_resumed(tmp_path):
    """With --weights, only the identity links an interrupted evaluation to its data."""
    settings = [{"labels": 24}.items(), False, "digest of the data"]
    features = conmim.eval.Features(
        conmim.train.build_model(conmim.train.parse_args([]), torch.device("cpu")).online.vit
    )
    names = {conmim.eval.evaluation_identity({"": features}, [*settings[:2], data]) for data in ("a", "b")}
    assert len(names) == 2
    checkpoints.save(tmp_path / "eval_state.pt", {"identity": min(names), "finished": {"finetune_accuracy": 1.0}})
    device = torch.device("cpu")
    assert conmim.eval.EvaluationState(tmp_path / "eval_state.pt", max(names), device).finished == {}


# ---------------------------------------------------------------------------------------------- silent nonsense


def save_images(root: Path, classes: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(root / split / f"class{label}/{number}.png")
    return root


@pytest.mark.parametrize("size", [32, 96])
def test_a_single_class_is_refused_because_every_accuracy_would_be_100(size, tmp_path, capsys):
    data = save_images(tmp_path / "data", 1)
    assert "at least two class folders" in assert_usage_error_of_load(capsys, data, size)


@pytest.mark.parametrize("size", [32, 96])
def test_a_file_with_several_frames_is_refused_because_only_one_would_be_read(size, tmp_path, capsys):
    data = save_images(tmp_path / "data", 2)
    frames = [Image.fromarray(np.full((40, 40, 3), value, np.uint8)) for value in (9, 99, 199)]
    frames[0].save(data / "train/class0/0.tif", save_all=True, append_images=frames[1:])
    assert "0.tif has 3 frames" in assert_usage_error_of_load(capsys, data, size)


def assert_usage_error_of_load(capsys, data: Path, size: int) -> str:
    return error_line(capsys, images.load_or_stream, "folder", data, size, torch.device("cpu"), 0)


def test_test_images_that_are_also_training_images_are_counted(tmp_path, capsys):
    data = save_images(tmp_path / "data", 2)
    images.load("folder", data, 32, torch.device("cpu"))
    assert "also in train" not in capsys.readouterr().err
    for number in range(3):
        shutil.copy(data / f"train/class0/{number}.png", data / f"val/class1/copy{number}.png")
    images.load("folder", data, 32, torch.device("cpu"))
    assert "3 of 11 images in val are also in train" in capsys.readouterr().err


def test_a_matrix_with_one_column_is_refused(tmp_path, capsys):
    np.save(tmp_path / "x.npy", matrix()[:, :1])
    assert "has one column" in error_line(capsys, bsa.train.read_matrix, tmp_path / "x.npy")


def test_more_neighbours_than_training_images_are_reported(pictures, tmp_path, capsys):
    simsiam.train.main([*tiny(tmp_path / "run", pictures), "--rehearse", "1", "--neighbours", "1000"])
    assert "--neighbours 1000: the training set has 48 examples" in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_training_is_reported(tmp_path, capsys):
    flags = ["--rehearse", "1", "--warm-up", "8", "--epochs", "8", "--batch", "16", "--device", "cpu"]
    conmim.train.main([*flags, "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert "warning: --warm-up 8 is as long as --epochs 8" in capsys.readouterr().err


@pytest.mark.parametrize("script", [*(PAPERS[paper].train for paper in PAPERS), cocord.teacher, *EVALUATIONS])
def test_numbers_far_out_of_range_are_refused(script, monkeypatch, capsys):
    """Every flag with a number, of every script."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "__init__", remember(parsers, cli.Parser.__init__))
    folder = ["folder"] if script in EVALUATIONS else []
    script.parse_args(folder)
    numbers = {action.option_strings[0]: action.type.__name__ for action in parsers[0]._actions
               if getattr(action.type, "__name__", "") in ("integer", "number")}  # fmt: skip
    assert len(numbers) > (0 if folder else 8) and "--threads" in numbers
    for flag, kind in numbers.items():
        for text in ("9" * 25, *(["1e300", "nan"] if kind == "number" else ["9" * 4400])):
            if text[:2] != "99" or kind == "integer":
                assert flag in error_line(capsys, script.parse_args, [*folder, flag, text])


def remember(parsers: list, initialise):
    """Return an __init__ that appends each new parser to `parsers`."""

    def init(parser, *arguments, **keywords):
        initialise(parser, *arguments, **keywords)
        parsers.append(parser)

    return init


@pytest.mark.parametrize("dim", ["9" * 25, "9" * 4400, "2147483648"])
def test_a_head_that_is_far_too_wide_is_refused(dim, capsys):
    assert "a multiple of 4 up to" in error_line(capsys, simsiam.train.parse_args, ["--dim", dim])


def test_flags_that_would_be_ignored_are_refused(capsys):
    assert "--weights" in error_line(capsys, conmim.eval.parse_args, ["folder", "--network", "vit_base_16"])
    assert "--export" in error_line(capsys, bsa.eval.parse_args, ["folder", "--names", "names.txt"])


@pytest.mark.parametrize("paper", ["simsiam", "cocord"])
def test_a_held_out_tenth_of_few_images_is_refused(paper, pictures, tmp_path, capsys):
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    for path in sorted((few / "train").glob("*/*.png")):
        if int(path.stem) >= 7:
            path.unlink()
    if paper == "simsiam":
        simsiam.train.main([*tiny(tmp_path / "run", few), "--batch", "4"])
        capsys.readouterr()
        message = error_line(capsys, simsiam.eval.main, [str(tmp_path / "run"), "--held-out"])
    else:
        flags = ["--data-set", "folder", "--data", str(few), "--held-out", "--device", "cpu"]
        message = error_line(capsys, cocord.teacher.main, [*flags, "--out", str(tmp_path / "run")])
    assert "--held-out needs at least 20 training images, not 14" in message


def test_weights_without_a_teacher_are_refused(tmp_path, capsys):
    flags = ["--teacher", "none", "--lambda-contrast", "0", "--lambda-kd", "0", "--weights", str(tmp_path / "x.pt")]
    assert "drop one of the two flags" in error_line(capsys, cocord.train.parse_args, flags)


def test_a_training_size_that_does_not_exist_is_reported(capsys):
    task = seqvcr.train.tasks.build_task("multiplication", 1)
    splits = seqvcr.train.tasks.load(task, 10_000, None, "cpu")
    assert f"only {len(splits.train)} distinct training rows are available" in capsys.readouterr().out


def test_help_shows_the_defaults_of_flags_but_not_of_switches():
    parser = cli.Parser(None)
    parser.add_argument("--seed", type=int, default=0, help="seed")
    parser.add_argument("--replace", action="store_true", help="replace")
    parser.add_argument("--lr", type=float, help="rate")
    text = " ".join(parser.format_help().split())
    assert "seed (default: 0)" in text and text.count("(default:") == 1
