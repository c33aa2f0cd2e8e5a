"""Shared fixtures: one CPU thread, a tiny image folder, a run that writes nothing, a fake GPU."""

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from common import files
from common.run import Run
from common.study import figures

ROOT = Path(__file__).parent.parent
READ_BY_COMMON = {"seed_offset", "replace", "tensorboard", "resume_elsewhere"}  # flags that cli.parse and Run use
LONG_FILES = ("gpu_check", "seqvcr", "make", "conmim", "simsiam", "faults", "cocord", "bsa_plot", "conmim_plot", "bsa")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `cuda` if there is no GPU. Long files come first, so that all processes end together."""
    order = {f"test_{name}": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cuda")])
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_figures(monkeypatch) -> None:
    """Figures have 50 dots per inch and full colours, which takes a third of the time."""
    monkeypatch.setattr(figures, "quantise_png", lambda png: png)
    for style in (figures.STYLE, figures.SLIDE):
        monkeypatch.setitem(style, "figure.dpi", 50)


@pytest.fixture
def no_figure_files(monkeypatch) -> None:
    """plot.py draws its figures but writes only tables and summary."""
    monkeypatch.setattr(figures, "save", lambda *_: None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Image folder with 24 training and 8 validation PNG files per class: a red or blue box on noise, 36x40 pixels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for label, channel in (("red", 0), ("blue", 2)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                pixels[8:28, 8:30, channel] = rng.integers(150, 255)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def no_checkpoints(monkeypatch) -> None:
    """Runs log their epochs but save no state: at full network width a state has hundreds of megabytes."""

    def log(run: Run, epoch: int, metrics: dict, state: dict) -> None:
        files.append_line(run.folder / "train.jsonl", json.dumps({"epoch": epoch, **metrics}))

    monkeypatch.setattr(Run, "save", log)


class FakeRun:
    """A run that writes nothing and always starts from scratch."""

    name = folder = "fake"

    def resume(self, model, optimizer):
        self.model = model

    def do_nothing(self, *_, **__):
        pass

    end_epoch = _finish_diverged = save_model = do_nothing
    finish_if_diverged = Run.finish_if_diverged  # the real check, which synchronises once per epoch


def assert_usage_error(main, flags: list[str], message: str, folder: Path, capsys) -> None:
    """Check that `main` exits with code 2 and one line that contains `message`, before a run begins."""
    if torch.cuda.is_available() and any("gpu" in text or "cuda" in text for text in [*flags, message]):
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as end:
        main([*flags, "--out", str(folder / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not (folder / "run/args.json").exists()


class FakeGPU:
    """`syncs` counts host-device synchronisations: calls of .item() and of operations that use it."""

    syncs = 0


@pytest.fixture
def fake_gpu(monkeypatch) -> Iterator[FakeGPU]:
    """Device "cuda" without a GPU: tensors have shapes but no values (FakeTensorMode).

    Mixed devices and data-dependent shapes raise an error, as on a GPU. Operations that FakeTensorMode lacks are
    replaced: .item() returns 0.5 and is counted, backward() gives zero gradients, pin_memory() does nothing, .to()
    gives a module new tensors, and deepcopy() returns the module itself.
    """
    gpu, mode, real_item, real_bool = FakeGPU(), FakeTensorMode(), Tensor.item, Tensor.__bool__

    def item(tensor: Tensor) -> float:
        if not isinstance(tensor, FakeTensor):
            return real_item(tensor)
        gpu.syncs += tensor.device.type == "cuda"
        return 0.5 if tensor.is_floating_point() else 0

    def backward(loss: Tensor) -> None:
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for value in gc.get_objects():
            if type(value) is FakeTensor and value.fake_mode is mode and isinstance(value, nn.Parameter):
                value.grad = torch.zeros_like(value) if value.requires_grad else None

    def to(module: nn.Module, device: torch.device | str | None = None, **_) -> nn.Module:
        for submodule in module.modules() if device else ():
            for name, weight in submodule.named_parameters(recurse=False):
                new = nn.Parameter(torch.zeros(weight.shape, device=device), weight.requires_grad)
                setattr(submodule, name, new)
            for name, buffer in submodule.named_buffers(recurse=False):
                setattr(submodule, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
        return module

    def to_bool(tensor: Tensor) -> bool:
        return item(tensor) >= 0 if isinstance(tensor, FakeTensor) else real_bool(tensor)

    monkeypatch.setattr(Tensor, "item", item)
    monkeypatch.setattr(Tensor, "__bool__", to_bool)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(copy, "deepcopy", lambda module: module)
    gc.freeze()  # existing objects hold no fake parameter: `backward` can skip them
    with mode:
        yield gpu
    gc.unfreeze()


def tiny(folder, pictures, *flags) -> list[str]:
    """Return the arguments of a SimSiam run on the fixture `pictures`: two epochs of three steps."""
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--batch", "16", "--neighbours", "5"]
    return [*common, "--epochs", "2", "--device", "cpu", "--out", str(folder), *flags]
