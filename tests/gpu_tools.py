"""What the parts of gpu_check share: the check's settings, comparisons of weights, and windows into training loops."""

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
SMALL = {  # flags of a dry run at demo scale
    "simsiam": ["--batch", "16", "--neighbours", "5"],
    "conmim": ["--batch", "16", "--hidden", "24", "--dim", "20"],
    "cocord": ["--batch", "16"],
    "bsa": ["--batch", "64"],
    "seqvcr": [],
}
TOLERANCE = 0.01  # of the distance that training travelled: what two runs of equal settings may differ by on a GPU
Case = tuple[str, Callable[[], str]]  # a name, and what raises or returns one line of findings


class NotApplicable(Exception):
    """The message says why."""


class Failed(Exception):
    """The message says what was found and what was expected."""


def expect(true: bool, found: str) -> None:
    """Raises Failed."""
    if not true:
        raise Failed(found)


@dataclasses.dataclass
class Check:
    """What every part is given. `numbers` go into report.json as they are."""

    device: torch.device
    papers: list[str]
    data: Path
    work: Path
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dry(self) -> bool:
        """Whether this is a dry run on the CPU."""
        return self.device.type == "cpu"

    def flags(self, paper: str, out: str, *more: str, rehearse: int = 0, device: str = "") -> list[str]:
        """Arguments of a train.py; in a dry run small ones."""
        steps = ["--rehearse", str(rehearse)] if rehearse else []
        place = ["--device", device or str(self.device), "--data", str(self.data), "--out", str(self.work / out)]
        return [*(SMALL[paper] if self.dry else []), *more, *steps, *place]

    def teacher(self, network: str, folder: str, *more: str) -> None:
        """A teacher that has taken a few steps, where students in `folder`/ARM/0 look for it."""
        out = self.work / folder / f"teacher@{network}" / "0"
        if not (out / "model.pt").exists():
            small = ["--batch", "16"] if self.dry else []
            place = ["--device", str(self.device), "--data", str(self.data), "--out", str(out)]
            cocord.teacher.main(["--network", network, "--rehearse", "1", *small, *more, *place])

    def synchronise(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------------- comparing


def ratio(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, 0 where both are 0."""
    difference, size = (a - b).norm().item(), b.norm().item()
    return difference / size if size else (math.inf if difference else 0.0)


def whole(tensors: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """Tensors as one float64 vector on the CPU."""
    return torch.cat([tensors[name].detach().cpu().double().flatten() for name in names])


def distance(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two ends of training are apart, as a share of the way from the start to the second."""
    names = [name for name, one in b.items() if one.is_floating_point() and name in start]
    expect(a.keys() == b.keys(), "the weights have other names")
    return ratio(whole(a, names) - whole(start, names), whole(b, names) - whole(start, names))


# ------------------------------------------------------------------------------------------------- inside a loop


class Window:
    """A context that is open from step `first` to step `last` of the second epoch of a training loop."""

    def __init__(self, first: int, last: int, context: AbstractContextManager):
        self.first, self.last, self.context, self.open, self.done = first, last, context, False, False

    def before(self, step: int) -> None:
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
def watched(windows: list[Window], steps: int) -> Iterator[None]:
    """Inside, the loop of a train.py that is rehearsed for two epochs of `steps` opens and closes the windows.

    Every loop clears its gradients once a step, between loss and backward pass: there a step is noticed. Raises Failed
    where a window was never closed.
    """
    real, calls = torch.optim.Optimizer.zero_grad, [0]

    def zero_grad(optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        for window in windows:
            window.before(calls[0] - steps)
        calls[0] += 1
        real(optimizer, set_to_none)

    torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    try:
        yield
        expect(all(window.done for window in windows), "the training loop did not reach the steps to be watched")
    finally:
        torch.optim.Optimizer.zero_grad = real  # type: ignore[method-assign]
        for window in windows:
            if window.open:
                window.close()


class NoReads(TorchDispatchMode):
    """Raises where a number is read from a tensor, a shape depends on data, or a tensor goes from device to CPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        to_host = name == "_to_copy" and "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"
        if name in self.NAMES or (to_host and args[0].device.type != "cpu"):
            raise Failed(f"a step waits for the device: aten::{name}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Raises where the host waits for the device, in whatever way PyTorch or `NoReads` sees."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoReads():
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Timed(contextlib.AbstractContextManager):
    """Wall time between two synchronisations, in `seconds`."""

    def __init__(self, check: Check):
        self.check, self.seconds = check, 0.0

    def __enter__(self) -> "Timed":
        self.check.synchronise()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.check.synchronise()
        self.seconds = time.perf_counter() - self.started


class Profiled(contextlib.AbstractContextManager):
    """`events` of the profiler's trace, a list of dictionaries."""

    def __init__(self, check: Check):
        self.check, self.events = check, list[dict[str, Any]]()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [] if check.dry else [torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=kinds)

    def __enter__(self) -> "Profiled":
        self.check.synchronise()
        self.profiler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.check.synchronise()
        self.profiler.__exit__(None, None, None)
        path = self.check.work / "trace.json"
        self.profiler.export_chrome_trace(str(path))
        self.events = json.loads(path.read_text())["traceEvents"]


def trace_facts(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of a trace: kernels launched, seconds of kernels, synchronising calls, copies from and to pageable memory."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    names = Counter(event.get("name", "") for event in events if event.get("cat") in ("cuda_runtime", "gpu_memcpy"))
    return {
        "kernels": len(kernels),
        "kernel_seconds": sum(event["dur"] for event in kernels) / 1e6,
        "synchronisations": sum(count for name, count in names.items() if "Synchronize" in name),
        "pageable_copies": sum(count for name, count in names.items() if "Pageable" in name),
    }
