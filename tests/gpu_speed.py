"""The parts of gpu_check that measure speed, and what each switch gains; each yields its cases."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import bench
import bench_cocord
import bench_conmim
import torch
from gpu_parts import data_or_random, gpu_flags, watched_run
from gpu_tools import PAPERS, Case, Check, NotApplicable, Profiled, Timed, Window, expect, ratio, trace_facts, watched
from operations import Counted, Products
from torch.utils.flop_counter import FlopCounterMode

import seqvcr.train
from common import devices, files

# ------------------------------------------------------------------------------------------------- speed


def speed(check: Check) -> Iterator[Case]:
    yield "a large matrix product", partial(large_product, check)
    for paper in check.papers:
        yield f"{paper}, gpu scale", partial(time_a_paper, check, paper)
    if "seqvcr" in check.papers:
        yield "seqvcr: the regulariser in float32 and TF32", partial(time_the_regulariser, check)
    for name, measure in plain_references(check).items():
        if name in check.papers:
            yield f"{name}: beside a plain reference", partial(beside_plain, measure)


def large_product(check: Check) -> str:
    side, repeats = (256, 3) if check.dry else (8192, 10)
    a, b = torch.randn(2, side, side, device=check.device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    with Timed(check) as timed:
        for _ in range(repeats):
            a @ b
    check.numbers["large product, TFLOP/s"] = rate = 2 * side**3 * repeats / timed.seconds / 1e12
    return f"{rate:.3g} TFLOP/s in bfloat16 at {side} x {side} x {side}"


def time_a_paper(check: Check, paper: str) -> str:
    """Its own loop: ten steps timed, then one step's operations and products recorded, then three steps profiled."""
    steps = 8 if check.dry else 20
    first, last = (1, 4) if check.dry else (2, 13)
    timed, flops, products, counted, profiled = (
        Timed(check), FlopCounterMode(display=False), Products(), Counted(), Profiled(check)
    )  # fmt: skip
    places = [(first, last, timed)]
    places += [(last + number, last + number + 1, one) for number, one in enumerate((flops, products, counted))]
    if not check.dry:
        places.append((last + 3, last + 6, profiled))
    windows = [Window(*place) for place in places]
    watched_run(check, paper, "speed", windows, steps)
    batch = PAPERS[paper].train.parse_args(gpu_flags(check, paper, "speed", [], steps)).batch
    products.replay()
    with Timed(check) as alone:
        for _ in range(3):
            products.replay()
    step, kernels = timed.seconds / (last - first), trace_facts(profiled.events)
    facts = {
        "examples per second": batch / step, "ms per step": 1000 * step, "operations per step": counted.operations,
        "products / step": alone.seconds / 3 / step, "TFLOP/s": flops.get_total_flops() / step / 1e12,
    }  # fmt: skip
    line = f"{batch / step:,.0f} examples/s ({1000 * step:.2f} ms a step of {batch}); {counted.operations} operations; "
    line += f"its own products alone {facts['products / step']:.0%} of the step; {facts['TFLOP/s']:.3g} TFLOP/s"
    if large := check.numbers.get("large product, TFLOP/s"):
        facts["share of the large product"] = facts["TFLOP/s"] / large
        line += f", {facts['share of the large product']:.1%} of the large product's"
    if kernels["kernels"]:
        facts |= {"kernels per step": kernels["kernels"] / 3, "busy": kernels["kernel_seconds"] / 3 / step}
        bound = "launch-bound" if facts["busy"] < 0.8 else "not launch-bound"
        line += f"; {facts['kernels per step']:.0f} kernels keep the GPU busy {facts['busy']:.0%}: {bound}"
    check.numbers[f"speed, {paper}"] = facts
    return line


def time_the_regulariser(check: Check) -> str:
    """Forward and backward at gpu scale. It runs in float32; what TF32 would gain, and what it would change."""
    sequences, width = (32, 64) if check.dry else (512, 512)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(sequences, 20, width, generator=generator).to(check.device).requires_grad_()
    weight = (torch.randn(2048, width, generator=generator) / width**0.5).to(check.device).requires_grad_()
    times, gradients = [], []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            for timing in (False, True):
                h.grad = weight.grad = None
                with Timed(check) as timed:
                    variance, covariance, _ = seqvcr.train.variance_covariance(h, weight, 32)
                    (variance + 0.004 * covariance).backward()
                if timing:
                    times.append(1000 * timed.seconds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        gradients.append(weight.grad.clone())
    check.numbers["regulariser, ms"] = {"float32": times[0], "TF32": times[1]}
    return f"{times[0]:.2f} ms, with TF32 {times[1]:.2f} ms and a gradient {ratio(gradients[1], gradients[0]):.1e} away"


def plain_references(check: Check) -> dict[str, Callable[[], None]]:
    """make bench's measurements of each paper; in a dry run the shortest."""
    every: dict[str, Callable[[], None]] = {
        "bsa": partial(bench.measure_bsa, check.device, 1),
        "seqvcr": partial(bench.measure_seqvcr, check.device, 1),
        "cocord": partial(bench_cocord.measure, bench_cocord.PAIRS[0], check.device, 1),
        "simsiam": partial(bench.measure, "CIFAR, ResNet-18", check.device, 1),
        "conmim": partial(bench_conmim.main, check.device, 1),
    }
    return {"bsa": partial(bench.measure_bsa, check.device, 1, 1)} if check.dry else every


def beside_plain(measure: Callable[[], None]) -> str:
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
            yield f"{paper}: --compile", partial(compiled, check, paper)


def short_run(check: Check, paper: str, out: str, more: list[str], matrix: list[str]) -> tuple[float, float]:
    """(ms a step, mean loss of the second epoch) of a run at gpu scale."""
    steps, timed = 3 if check.dry else 12, Timed(check)
    with watched([Window(1, steps - 1, timed)], steps):
        PAPERS[paper].train.main(gpu_flags(check, paper, out, matrix, steps, *more))
    return 1000 * timed.seconds / (steps - 2), files.read_lines(check.work / out / "train.jsonl")[-1]["loss"]


def beside(on: tuple[float, float], off: tuple[float, float]) -> str:
    """Two results of `short_run`. Their losses must agree to 2 %: another kernel rounds a few steps in another way."""
    (ms, loss), (without, other) = on, off
    expect(abs(loss - other) <= 0.02 * max(1.0, abs(other)), f"loss {loss:.5g}, without {other:.5g}")
    return f"{ms:.2f} ms a step, without {without:.2f} ({without / ms:.2f} times); loss {loss:.4f}, {other:.4f}"


def switch(check: Check, paper: str, name: str, on: list[str], off: list[str]) -> str:
    """Two runs that differ in one switch."""
    with data_or_random(check) as matrix:
        found = [
            short_run(check, paper, f"switches/{paper}/{name}-{word}/0", flags, matrix)
            for word, flags in (("on", on), ("off", off))
        ]
    return beside(found[0], found[1])


def switch_benchmark(check: Check) -> str:
    """With another batch on either side: cuDNN keeps what it once chose for a shape, whatever the mode is then."""
    real, rates = devices.select_device, []

    def choose(name: str, scale: str) -> torch.device:
        device = real(name, scale)
        torch.backends.cudnn.benchmark = not rates
        return device

    devices.select_device = choose
    try:
        with data_or_random(check) as matrix:
            for word, batch in (("on", 12), ("off", 10)) if check.dry else (("on", 500), ("off", 508)):
                more = ["--batch", str(batch)]
                ms, _ = short_run(check, "simsiam", f"switches/benchmark-{word}/0", more, matrix)
                rates.append(1000 * batch / ms)
    finally:
        devices.select_device = real
        torch.backends.cudnn.benchmark = True
    return f"{rates[0]:,.0f} examples/s, without {rates[1]:,.0f} ({rates[0] / rates[1]:.2f} times)"


def compiled(check: Check, paper: str) -> str:
    if check.dry and paper != "bsa":
        raise NotApplicable("compiling its network for the CPU takes too long for a dry run")
    if not (shutil.which("gcc") or shutil.which("cc")):
        raise NotApplicable("torch.compile needs a C compiler, and there is none")
    off = ["--dropout", "0"] if paper == "seqvcr" else []
    return switch(check, paper, "compile", [*off, "--compile"], off)
