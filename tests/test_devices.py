"""Which device and which backend a rank gets, what float32 means on it, and random numbers that no device changes."""

import pytest
import torch
import torch.distributed as dist
from conftest import FakeGPU

from common import augment, devices, seeding
from seqvcr import tasks


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that shows two CUDA GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize(
    ("name", "local_rank", "index", "backend"),
    [("cuda", "1", 1, "nccl"), ("auto", "1", 1, "nccl"), ("cuda:0", "1", 0, "gloo"), ("cuda:1", "0", 1, "gloo")],
)
def test_ranks_have_a_gpu_each_or_share_the_named_one(name, local_rank, index, backend, two_gpus, monkeypatch):
    """NCCL refuses two ranks on one GPU; a named GPU was once ignored under torchrun."""
    begun = []
    monkeypatch.setenv("RANK", local_rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: begun.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    device = devices.select_device(name, "gpu")
    devices.start_ranks(name, device)
    assert device == torch.device("cuda", index) and begun == [backend]


def test_a_rank_without_a_gpu_of_its_own_is_refused(two_gpus, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit) as end:
        devices.select_device("cuda", "gpu")
    assert end.value.code == 2 and "no such CUDA GPU" in capsys.readouterr().err


def test_float32_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    devices.select_device("cpu", "demo")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_random_numbers_are_drawn_on_the_cpu_for_every_device(fake_gpu: FakeGPU, monkeypatch):
    """No call that draws names a device; what is drawn is uploaded."""
    named = []
    for name in ("rand", "randperm", "randint"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *all, real=real, **words: named.append(words.get("device")) or real(*all, **words)
        )
    order = seeding.permutation(0, "order", 0, 8, "cuda")
    view = augment.random_resized_crop(torch.zeros(4, 3, 8, 8, device="cuda"), seeding.SampleRNG(0, "view", 0, 4))
    rows = tasks.stream(tasks.choose("lis", 8), 0, 0, 16, "cuda")
    assert order.device.type == view.device.type == rows.device.type == "cuda" and not fake_gpu.asked
    assert len(named) > 10 and set(named) == {None}
