"""Device and backend of each rank, TF32 off, and random numbers drawn on the CPU for all devices."""

import pytest
import torch
import torch.distributed as dist
from conftest import FakeGPU

from common import augment, devices, seeding
from seqvcr import tasks


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that this machine has two CUDA GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize(
    ("name", "local_rank", "index", "backend"),
    [("cuda", "1", 1, "nccl"), ("auto", "1", 1, "nccl"), ("cuda:0", "1", 0, "gloo"), ("cuda:1", "0", 1, "gloo")],
)
def test_ranks_have_one_gpu_each_or_share_the_named_one(name, local_rank, index, backend, two_gpus, monkeypatch):
    """NCCL does not support two ranks on one GPU: with `cuda:N` the backend is gloo."""
    backends = []
    monkeypatch.setenv("RANK", local_rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    for variable, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    device = devices.select_device(name, "gpu", distributed=True)
    devices.init_process_group(name, device)
    assert device == torch.device("cuda", index) and backends == [backend]


def test_rank_without_its_own_gpu_is_an_error(two_gpus, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit) as end:
        devices.select_device("cuda", "gpu")
    assert end.value.code == 2 and "no such CUDA GPU" in capsys.readouterr().err


def test_apple_gpus_are_refused_with_the_reason(capsys):
    with pytest.raises(SystemExit) as end:
        devices.select_device("mps", "demo")
    assert end.value.code == 2 and "float64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"RANK": "0"}, "RANK is set"), ({"RANK": "0", "WORLD_SIZE": "2"}, "but not MASTER_ADDR and MASTER_PORT")],
)
def test_a_part_of_torchruns_environment_is_an_error(environment, words, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        devices.init_process_group("cpu", torch.device("cpu"))
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_torchrun_on_a_script_without_ranks_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    devices.select_device("cpu", "demo", distributed=True)
    with pytest.raises(SystemExit) as end:
        devices.select_device("cpu", "demo")
    assert end.value.code == 2 and "start it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    devices.select_device("cpu", "demo")


def test_tf32_and_cudnn_attention_are_disabled(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    devices.select_device("cpu", "demo")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_random_numbers_are_drawn_on_the_cpu_for_all_devices(fake_gpu: FakeGPU, monkeypatch):
    """Random calls name no device, so they run on the CPU; their results are copied to the device."""
    requested_devices = []

    def record_device(real):
        def random_call(*arguments, **keywords):
            requested_devices.append(keywords.get("device"))
            return real(*arguments, **keywords)

        return random_call

    for name in ("rand", "randperm", "randint"):
        monkeypatch.setattr(torch, name, record_device(getattr(torch, name)))
    order = seeding.permutation(0, "order", 0, 8, "cuda")
    view = augment.random_resized_crop(torch.zeros(4, 3, 8, 8, device="cuda"), seeding.SampleRNG(0, "view", 0, 4))
    rows = tasks.stream(tasks.build_task("lis", 8), 0, 0, 16, "cuda")
    assert order.device.type == view.device.type == rows.device.type == "cuda" and not fake_gpu.syncs
    assert len(requested_devices) > 10 and set(requested_devices) == {None}
