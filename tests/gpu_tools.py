"""Shared code of gpu_check: settings, comparison of weights, and contexts opened inside training loops."""

import contextlib
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bsa.eval
import bsa.plot
import bsa.train
import cocord.eval
import cocord.plot
import cocord.teacher
import cocord.train
import conmim.eval
import conmim.plot
import conmim.train
import seqvcr.eval
import seqvcr.plot
import seqvcr.train
import simsiam.eval
import simsiam.plot
import simsiam.train

PAPERS = {"simsiam": simsiam, "conmim": conmim, "cocord": cocord, "bsa": bsa, "seqvcr": seqvcr}
DRY_RUN_FLAGS = {
    "simsiam": ["--batch", "16", "--neighbours", "5"],
    "conmim": ["--batch", "16", "--hidden", "24", "--dim", "20"],
    "cocord": ["--batch", "16"],
    "bsa": ["--batch", "64"],
    "seqvcr": [],
}
TOLERANCE = 0.005  # allowed `relative_distance` between two runs of equal settings on a GPU
Case = tuple[str, Callable[[], str]]  # name, and a function that returns one line of findings or raises


class NotApplicable(Exception):
    """The case cannot run on this machine. The message gives the reason."""


class CaseFailed(Exception):
    """A check failed. The message gives the measured and the allowed value."""


def expect(condition: bool, message: str) -> None:
    """Raise CaseFailed with `message` unless `condition`."""
    if not condition:
        raise CaseFailed(message)


@dataclasses.dataclass
class Check:
    """Settings of a check, and `numbers` for report.json."""

    device: torch.device
    papers: list[str]
    data: Path
    work: Path  # temporary folder
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dry_run(self) -> bool:
        """True in a dry run on the CPU."""
        return self.device.type == "cpu"

    def flags(self, paper: str, out: str, *more: str, rehearse: int = 0, device: str = "") -> list[str]:
        """Return the arguments of a train.py; in a dry run they include DRY_RUN_FLAGS."""
        steps = ["--rehearse", str(rehearse)] if rehearse else []
        paths = ["--device", device or str(self.device), "--data", str(self.data), "--out", str(self.work / out)]
        return [*(DRY_RUN_FLAGS[paper] if self.dry_run else []), *more, *steps, *paths]

    def train_teacher(self, network: str, folder: str, *more: str) -> None:
        """Train a teacher for one step, in the folder where students in `folder`/ARM/0 look for it."""
        out = self.work / folder / f"teacher@{network}" / "0"
        if not (out / "model.pt").exists():
            small = ["--batch", "16"] if self.dry_run else []
            paths = ["--device", str(self.device), "--data", str(self.data), "--out", str(out)]
            cocord.teacher.main(["--network", network, "--rehearse", "1", *small, *more, *paths])

    def synchronise(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------------- comparing


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|, or 0 if both are 0."""
    difference, size = (a - b).norm().item(), b.norm().item()
    return difference / size if size else (math.inf if difference else 0.0)


def flatten(tensors: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return the tensors `names` as one float64 vector on the CPU."""
    return torch.cat([tensors[name].detach().cpu().double().flatten() for name in names])


def relative_distance(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return |a - b| / |b - start|: the distance between two trained models over that from the initial weights."""
    names = [name for name, tensor in b.items() if tensor.is_floating_point() and name in start]
    expect(a.keys() == b.keys(), "the weights have different names")
    return relative_difference(flatten(a, names) - flatten(start, names), flatten(b, names) - flatten(start, names))


# ------------------------------------------------------------------------------------------------- inside a loop


class Window:
    """A context that is open from step `first` until step `last` of the second epoch of a training loop."""

    def __init__(self, first: int, last: int, context: AbstractContextManager):
        self.first, self.last, self.context, self.open, self.done = first, last, context, False, False

    def before_step(self, step: int) -> None:
        if step == self.last and self.open:
            self.close()
            self.done = True
        if step == self.first:
            self.context.__enter__()
            self.open = True

    def close(self) -> None:
        self.open = False
        self.context.__exit__(None, None, None)


@contextlib.contextmanager
def open_windows(windows: list[Window], steps: int) -> Iterator[None]:
    """Open and close the windows in a train.py that runs inside this context with `--rehearse steps`.

    The start of a step is detected by Optimizer.zero_grad, which each loop calls once per step, between loss and
    backward pass. Raises CaseFailed if a window was not closed.
    """
    real_zero_grad, calls = torch.optim.Optimizer.zero_grad, 0

    def zero_grad(optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        nonlocal calls
        for window in windows:
            window.before_step(calls - steps)
        calls += 1
        real_zero_grad(optimizer, set_to_none)

    torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    try:
        yield
        expect(all(window.done for window in windows), "the training loop did not reach the last step to be measured")
    finally:
        torch.optim.Optimizer.zero_grad = real_zero_grad  # type: ignore[method-assign]
        for window in windows:
            if window.open:
                window.close()


class FailOnSynchronisation(TorchDispatchMode):
    """Raise CaseFailed if the host reads a value, a shape depends on data, or a tensor is copied to the CPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        to_host = name == "_to_copy" and "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"
        if name in self.NAMES or (to_host and args[0].device.type != "cpu"):
            raise CaseFailed(f"host-device synchronisation in a step: aten::{name}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Raise an error at each host-device synchronisation that PyTorch or FailOnSynchronisation detects."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with FailOnSynchronisation():
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Timer(contextlib.AbstractContextManager):
    """Measure the wall time of the context, with the device synchronised at both ends; result in `seconds`."""

    def __init__(self, check: Check):
        self.check, self.seconds = check, 0.0

    def __enter__(self) -> "Timer":
        self.check.synchronise()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.check.synchronise()
        self.seconds = time.perf_counter() - self.start


class Profiler(contextlib.AbstractContextManager):
    """Profile the context; the trace's events are in `events`, a list of dictionaries."""

    def __init__(self, check: Check):
        self.check, self.events = check, list[dict[str, Any]]()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [] if check.dry_run else [torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)

    def __enter__(self) -> "Profiler":
        self.check.synchronise()
        self.profiler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.check.synchronise()
        self.profiler.__exit__(None, None, None)
        path = self.check.work / "trace.json"
        self.profiler.export_chrome_trace(str(path))
        self.events = json.loads(path.read_text())["traceEvents"]


def trace_statistics(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the number of kernels, their seconds, and the numbers of synchronising calls and pageable copies."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    names = Counter(event.get("name", "") for event in events if event.get("cat") in ("cuda_runtime", "gpu_memcpy"))
    return {
        "kernels": len(kernels),
        "kernel_seconds": sum(event["dur"] for event in kernels) / 1e6,
        "synchronisations": sum(count for name, count in names.items() if "Synchronize" in name),
        "pageable_copies": sum(count for name, count in names.items() if "Pageable" in name),
    }
