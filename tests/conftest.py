"""What several tests need: one thread, a tiny folder of real picture files, a fake GPU."""

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

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are left out where there is no GPU."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cuda")])
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train/ and val/ with two classes of PNG files, 40x36 pixels: red or blue on noise; 24 and 8 a class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, channel in (("red", 0), ("blue", 2)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                pixels[8:28, 8:30, channel] = rng.integers(150, 255)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def unsaved(monkeypatch) -> None:
    """Runs log their epochs but save no state: of true widths one has hundreds of megabytes."""

    def log(run: Run, epoch: int, record: dict, state: dict) -> None:
        files.append_line(run.folder / "train.jsonl", json.dumps({"epoch": epoch, **record}))

    monkeypatch.setattr(Run, "save", log)


class Unwritten:
    """Stands in for a run's folder."""

    name = folder = "fake"

    def state(self, device):
        return None

    def nothing(self, *_, **__):
        pass

    def resume(self, model, optimizer):
        self.model = model

    save = say = finish = diverge = end_epoch = nothing
    diverged = Run.diverged  # the real check: it is the epoch's synchronisation


def refused(main, flags: list[str], words: str, folder: Path, capsys) -> None:
    """A user's mistake: exit 2, one line that holds `words`, and no run has begun."""
    if torch.cuda.is_available() and any("gpu" in one or "cuda" in one for one in [*flags, words]):
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as end:
        main([*flags, "--out", str(folder / "run")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and words in printed and printed.count("\n") == 1
    assert not (folder / "run/args.json").exists()


class FakeGPU:
    """`asked`: how often a number was asked of the device (.item() and what rests on it)."""

    asked = 0


@pytest.fixture
def fake_gpu(monkeypatch) -> Iterator[FakeGPU]:
    """Inside, "cuda" is a GPU that computes nothing, and that raises where devices are mixed or where a shape depends
    on data. What it cannot do is stood in for: .item() counts and gives 0.5, backward gives gradients of zero,
    nothing is pinned, a moved module gets new tensors, a copied one is the module itself.
    """
    gpu, mode, item, truth = FakeGPU(), FakeTensorMode(), Tensor.item, Tensor.__bool__

    def counted(tensor: Tensor) -> float:
        if not isinstance(tensor, FakeTensor):
            return item(tensor)
        gpu.asked += tensor.device.type == "cuda"
        return 0.5 if tensor.is_floating_point() else 0

    def backward(loss: Tensor) -> None:
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for one in gc.get_objects():
            if type(one) is FakeTensor and one.fake_mode is mode and isinstance(one, nn.Parameter):
                one.grad = torch.zeros_like(one) if one.requires_grad else None

    def moved(module: nn.Module, device: torch.device | str | None = None, **_) -> nn.Module:
        for part in module.modules() if device else ():
            for name, one in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.zeros(one.shape, device=device), one.requires_grad))
            for name, one in part.named_buffers(recurse=False):
                setattr(part, name, torch.zeros(one.shape, dtype=one.dtype, device=device))
        return module

    def true(tensor: Tensor) -> bool:
        return counted(tensor) >= 0 if isinstance(tensor, FakeTensor) else truth(tensor)

    monkeypatch.setattr(Tensor, "item", counted)
    monkeypatch.setattr(Tensor, "__bool__", true)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(copy, "deepcopy", lambda module: module)
    gc.freeze()  # what is there already holds no fake parameter: `backward` need not look through it
    with mode:
        yield gpu
    gc.unfreeze()


def tiny(folder, pictures, *flags) -> list[str]:
    """Arguments of a SimSiam run of two epochs, three steps each, on the tiny pictures."""
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--batch", "16", "--neighbours", "5"]
    return [*common, "--epochs", "2", "--device", "cpu", "--out", str(folder), *flags]
