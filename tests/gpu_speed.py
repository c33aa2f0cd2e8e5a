"""Parts of gpu_check that measure speed and the gain of each switch; each part yields its cases."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench
import bench_cocord
import bench_conmim
import torch
from gpu_parts import data_or_random, gpu_flags, run_with_windows
from gpu_tools import (
    PAPERS,
    Case,
    Check,
    NotApplicable,
    Profiler,
    Timer,
    Window,
    expect,
    open_windows,
    relative_difference,
    trace_statistics,
)
from operations import MatrixProducts, OperationCounter
from torch.utils.flop_counter import FlopCounterMode

import seqvcr.train
from common import devices, files

# ------------------------------------------------------------------------------------------------- speed


def speed(check: Check) -> Iterator[Case]:
    yield "a large matrix product", partial(large_product, check)
    for paper in check.papers:
        yield f"{paper}, gpu scale", partial(time_a_paper, check, paper)
    if "seqvcr" in check.papers:
        yield "seqvcr: regulariser in float32 and TF32", partial(time_the_regulariser, check)
    for paper, measure in plain_references(check).items():
        if paper in check.papers:
            yield f"{paper}: compared with a plain reference", partial(compare_with_plain, measure)


def large_product(check: Check) -> str:
    side, repeats = (256, 3) if check.dry_run else (8192, 10)
    a, b = torch.randn(2, side, side, device=check.device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    with Timer(check) as timer:
        for _ in range(repeats):
            a @ b
    rate = 2 * side**3 * repeats / timer.seconds / 1e12
    check.numbers["large product, TFLOP/s"] = rate
    return f"{rate:.3g} TFLOP/s in bfloat16 at {side} x {side} x {side}"


def time_a_paper(check: Check, paper: str) -> str:
    """Run train.py: time some steps, record operations and matrix products of one step each, and profile three."""
    steps = 8 if check.dry_run else 20
    first, last = (1, 4) if check.dry_run else (2, 13)
    timer, flops = Timer(check), FlopCounterMode(display=False)
    products, counter, profiler = MatrixProducts(), OperationCounter(), Profiler(check)
    windows = [
        Window(first, last, timer),
        Window(last, last + 1, flops),
        Window(last + 1, last + 2, products),
        Window(last + 2, last + 3, counter),
    ]
    if not check.dry_run:
        windows.append(Window(last + 3, last + 6, profiler))
    run_with_windows(check, paper, "speed", windows, steps)
    batch = PAPERS[paper].train.parse_args(gpu_flags(check, paper, "speed", [], steps)).batch
    products.replay()
    with Timer(check) as products_timer:
        for _ in range(3):
            products.replay()
    step_seconds, trace = timer.seconds / (last - first), trace_statistics(profiler.events)
    numbers = {
        "examples per second": batch / step_seconds,
        "ms per step": 1000 * step_seconds,
        "operations per step": counter.operations,
        "products / step": products_timer.seconds / 3 / step_seconds,
        "TFLOP/s": flops.get_total_flops() / step_seconds / 1e12,
    }
    line = f"{batch / step_seconds:,.0f} examples/s ({1000 * step_seconds:.2f} ms per step of {batch})"
    line += f"; {counter.operations} operations; matrix products alone, one launch each: "
    line += f"{numbers['products / step']:.0%} of the step"
    line += f"; {numbers['TFLOP/s']:.3g} TFLOP/s"
    if large := check.numbers.get("large product, TFLOP/s"):
        numbers["share of the large product"] = numbers["TFLOP/s"] / large
        line += f", {numbers['share of the large product']:.1%} of the large matrix product's"
    if trace["kernels"]:
        numbers |= {"kernels per step": trace["kernels"] / 3, "busy": trace["kernel_seconds"] / 3 / step_seconds}
        bound = "launch-bound" if numbers["busy"] < 0.8 else "not launch-bound"
        line += f"; {numbers['kernels per step']:.0f} kernels keep the GPU busy {numbers['busy']:.0%}: {bound}"
    check.numbers[f"speed, {paper}"] = numbers
    return line


def time_the_regulariser(check: Check) -> str:
    """Time forward and backward pass at gpu scale in float32, as trained, and in TF32, and compare the gradients."""
    sequences, width = (32, 64) if check.dry_run else (512, 512)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(sequences, 20, width, generator=generator).to(check.device).requires_grad_()
    weight = (torch.randn(2048, width, generator=generator) / width**0.5).to(check.device).requires_grad_()
    times, gradients = [], []
    for allow_tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        try:
            for warm_up in (True, False):
                h.grad = weight.grad = None
                with Timer(check) as timer:
                    variance, covariance, _ = seqvcr.train.variance_covariance(h, weight, 32)
                    (variance + 0.004 * covariance).backward()
                if not warm_up:
                    times.append(1000 * timer.seconds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        gradients.append(weight.grad.clone())
    check.numbers["regulariser, ms"] = {"float32": times[0], "TF32": times[1]}
    difference = relative_difference(gradients[1], gradients[0])
    return f"{times[0]:.2f} ms; with TF32 {times[1]:.2f} ms and a relative gradient difference of {difference:.1e}"


def plain_references(check: Check) -> dict[str, Callable[[], None]]:
    """Return the comparison of each paper in `make bench`; in a dry run, only the shortest one."""
    measurements: dict[str, Callable[[], None]] = {
        "bsa": partial(bench.measure_bsa, check.device, 1),
        "seqvcr": partial(bench.measure_seqvcr, check.device, 1),
        "cocord": partial(bench_cocord.measure, bench_cocord.PAIRS[0], check.device, 1),
        "simsiam": partial(bench.measure_simsiam, "CIFAR, ResNet-18", check.device, 1),
        "conmim": partial(bench_conmim.main, check.device, 1),
    }
    return {"bsa": partial(bench.measure_bsa, check.device, 1, 1)} if check.dry_run else measurements


def compare_with_plain(measure: Callable[[], None]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        measure()
    return "; ".join(printed.getvalue().strip().splitlines())


# ------------------------------------------------------------------------------------------------- switches


def switches(check: Check) -> Iterator[Case]:
    if "simsiam" in check.papers:
        yield "simsiam: channels-last", partial(switch, check, "simsiam", "layout", [], ["--no-channels-last"])
        yield "simsiam: cuDNN's benchmark mode", partial(switch_benchmark, check)
    for paper in ("bsa", "seqvcr", "conmim", "simsiam"):
        if paper in check.papers:
            yield f"{paper}: --compile", partial(switch_compile, check, paper)


def short_run(check: Check, paper: str, out: str, more: list[str], matrix: list[str]) -> tuple[float, float]:
    """Train at gpu scale. Returns (ms per step, mean loss of the second epoch)."""
    steps, timer = 3 if check.dry_run else 12, Timer(check)
    with open_windows([Window(1, steps - 1, timer)], steps):
        PAPERS[paper].train.main(gpu_flags(check, paper, out, matrix, steps, *more))
    return 1000 * timer.seconds / (steps - 2), files.read_lines(check.work / out / "train.jsonl")[-1]["loss"]


def switch(check: Check, paper: str, name: str, on: list[str], off: list[str]) -> str:
    """Compare two runs that differ in one switch.

    Their losses must agree to 5 %, because different kernels round differently.
    """
    with data_or_random(check) as matrix:
        ms_on, loss_on = short_run(check, paper, f"switches/{paper}/{name}-on/0", on, matrix)
        ms_off, loss_off = short_run(check, paper, f"switches/{paper}/{name}-off/0", off, matrix)
    expect(abs(loss_on - loss_off) <= 0.05 * max(1.0, abs(loss_off)), f"loss {loss_on:.5g}, without {loss_off:.5g}")
    times = f"{ms_on:.2f} ms per step, without {ms_off:.2f} ({ms_off / ms_on:.2f} times as fast)"
    return f"{times}; loss {loss_on:.4f}, without {loss_off:.4f}"


def switch_benchmark(check: Check) -> str:
    """Compare cuDNN's benchmark mode on and off.

    The batch sizes differ, because cuDNN keeps the algorithm it has once chosen for a shape.
    """
    real_select_device = devices.select_device
    runs = [("on", 12), ("off", 10)] if check.dry_run else [("on", 500), ("off", 508)]
    rates = []

    def select_device(*arguments: Any, **keywords: Any) -> torch.device:
        device = real_select_device(*arguments, **keywords)
        torch.backends.cudnn.benchmark = benchmark
        return device

    devices.select_device = select_device
    try:
        with data_or_random(check) as matrix:
            for label, batch in runs:
                benchmark = label == "on"
                more = ["--batch", str(batch)]
                ms, _ = short_run(check, "simsiam", f"switches/benchmark-{label}/0", more, matrix)
                rates.append(1000 * batch / ms)
    finally:
        devices.select_device = real_select_device
        torch.backends.cudnn.benchmark = True
    return f"{rates[0]:,.0f} examples/s, without {rates[1]:,.0f} ({rates[0] / rates[1]:.2f} times as fast)"


def switch_compile(check: Check, paper: str) -> str:
    if check.dry_run and paper != "bsa":
        raise NotApplicable("compilation for the CPU takes too long for a dry run")
    if not (shutil.which("gcc") or shutil.which("cc")):
        raise NotApplicable("torch.compile needs a C compiler, and none is installed")
    off = ["--dropout", "0"] if paper == "seqvcr" else []
    return switch(check, paper, "compile", [*off, "--compile"], off)
