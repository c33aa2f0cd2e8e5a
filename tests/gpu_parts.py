"""Parts of gpu_check that compare results with the CPU's and run all arms; each part yields its cases."""

import argparse
import contextlib
import io
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
import numpy as np
import torch
from gpu_problems import CPU, PROBLEMS, Problem, random_images
from gpu_tools import (
    PAPERS,
    TOLERANCE,
    Case,
    Check,
    NotApplicable,
    Profiler,
    Window,
    expect,
    flatten,
    no_synchronisation,
    open_windows,
    relative_difference,
    relative_distance,
    trace_statistics,
)
from plan import ROOT, plan
from torch import Tensor, nn

import bsa.eval
import cocord.train
import conmim.train
import seqvcr.eval
import simsiam.train
from common import checkpoints, devices, files, images, probes, seeding
from common.run import Run
from seqvcr import tasks

# ------------------------------------------------------------------------------------------------- agreement


def agreement(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        for scale in ("demo",) if check.dry_run else ("demo", "gpu"):
            yield f"{paper}, {scale}: loss and gradients", partial(agree_on_gradients, check, paper, scale)
        yield f"{paper}: bfloat16", partial(agree_under_bfloat16, check, paper)
        yield f"{paper}: optimiser", partial(agree_on_optimiser, check, paper)
    yield "views and masks", partial(agree_on_views, check)
    yield "data of Seq-VCR", partial(agree_on_sequences, check)
    yield "kNN, linear probe, collapse metrics, entropies", partial(agree_on_measurements, check)
    yield "std ratio of features with a small std", partial(measure_a_small_std, check)
    yield "collapse metrics in training under bfloat16", partial(collapse_metrics_under_bfloat16, check)


# Allowed relative difference of gradients: (of each parameter, of the full gradient). Rounding switches a few ReLUs:
# on the CPU, a change of all weights by 1e-7 changes a parameter's gradient by 0.003 and the full gradient by 0.002
# (CoCoRD, gpu scale), and one by 1e-5, as of cuDNN's fast convolutions, the full gradient by 0.02.
GRADIENT_TOLERANCES = {
    "simsiam": (5e-2, 3e-2),
    "cocord": (5e-2, 3e-2),
    "conmim": (5e-2, 2e-3),
    "bsa": (1e-3, 1e-3),
    "seqvcr": (1e-3, 1e-3),
}


def agree_on_gradients(check: Check, paper: str, scale: str) -> str:
    """Compare loss and gradients of one batch with the CPU's, in float32.

    The tolerance of a parameter includes a hundredth of the norm of the full gradient, because the gradient of a
    parameter may be zero in exact arithmetic, as for a bias before a batch norm.
    """
    cpu_loss, cpu_gradients = PROBLEMS[paper](scale, 32, CPU).gradients("float32")
    loss, gradients = PROBLEMS[paper](scale, 32, check.device).gradients("float32")
    parameter_tolerance, tolerance = GRADIENT_TOLERANCES[paper]
    error = abs(loss - cpu_loss) / max(1.0, abs(cpu_loss))  # SimSiam's loss starts near 0, in a range of 2
    expect(error <= 1e-4, f"loss {loss:.6g}, on the CPU {cpu_loss:.6g}: relative difference {error:.1e}, allowed 1e-4")
    expect(gradients.keys() == cpu_gradients.keys(), "other parameters than on the CPU have gradients")
    cpu_gradient, gradient = flatten(cpu_gradients, cpu_gradients), flatten(gradients, cpu_gradients)
    errors = {}
    for name, expected in cpu_gradients.items():
        allowed = parameter_tolerance * (expected.norm() + cpu_gradient.norm() / 100)
        errors[name] = ((gradients[name] - expected).norm() / allowed).item()
    worst = max(errors, key=lambda name: errors[name])
    expect(errors[worst] <= 1, f"gradient of {worst}: difference {errors[worst]:.3g} times the tolerance")
    difference = relative_difference(gradient, cpu_gradient)
    scaling = abs((gradient @ cpu_gradient / (cpu_gradient @ cpu_gradient)).item() - 1)
    expect(difference <= tolerance, f"full gradient: relative difference {difference:.2g}, allowed {tolerance}")
    allowed = min(tolerance / 5, 2e-3)
    expect(scaling <= allowed, f"full gradient: length differs by {scaling:.2g}, allowed {allowed:g}")
    return (
        f"relative differences: loss {error:.1e}, full gradient {difference:.1e}; "
        f"worst parameter {errors[worst]:.2g} times the tolerance ({worst})"
    )


def bfloat16_errors(problem: Problem) -> tuple[float, float]:
    """Return the relative difference of (loss, full gradient) between bfloat16 and float32 on the same device."""
    loss, gradients = problem.gradients("float32")
    bfloat16_loss, bfloat16_gradients = problem.gradients("bfloat16")
    loss_error = abs(bfloat16_loss - loss) / max(1.0, abs(loss))
    return loss_error, relative_difference(flatten(bfloat16_gradients, gradients), flatten(gradients, gradients))


def agree_under_bfloat16(check: Check, paper: str) -> str:
    """Bfloat16 may differ from float32 by three times the difference on the CPU, plus 2^-8 (rounding)."""
    cpu_errors = bfloat16_errors(PROBLEMS[paper]("demo", 32, CPU))
    errors = bfloat16_errors(PROBLEMS[paper]("demo", 32, check.device))
    for name, error, cpu_error in zip(("loss", "gradient"), errors, cpu_errors, strict=True):
        allowed = 3 * cpu_error + 2**-8
        expect(error <= allowed, f"{name}: {error:.3g} from float32, on the CPU {cpu_error:.3g}")
    cpu = f"on the CPU {cpu_errors[0]:.1e}, {cpu_errors[1]:.3f}"
    return f"difference from float32: loss {errors[0]:.1e}, gradient {errors[1]:.3f} ({cpu})"


def agree_on_optimiser(check: Check, paper: str) -> str:
    """Compare the weights after three optimiser steps with equal gradients, and the EMA updates."""
    trained_weights = []
    for device in (CPU, check.device):
        problem = PROBLEMS[paper]("demo", 32, device)
        start = {name: tensor.detach().cpu().clone() for name, tensor in problem.model.state_dict().items()}
        for step in range(3):
            for number, (_, weight) in enumerate(problem.model.named_parameters()):
                if weight.requires_grad:
                    generator = seeding.generator(number, "gradient", step)
                    weight.grad = (0.01 * torch.randn(weight.shape, generator=generator)).to(device)
            problem.optimizer.step()
            problem.ema_update()
        trained_weights.append(problem.model.state_dict())
    cpu_weights, weights = trained_weights
    difference = relative_distance(weights, cpu_weights, start)
    expect(difference <= 1e-5, f"relative distance {difference:.2e}, allowed 1e-5")
    return f"relative distance {difference:.1e}"


def agree_on_views(check: Check) -> str:
    """Compare views of random pixels. Their parameters are drawn on the CPU; rounding may change a few pixels."""
    results = []
    for device in (CPU, check.device):
        data = random_images(64, 32, 10, device)
        args = simsiam.train.parse_args(["--data-set", "folder", "--batch", "64"])
        views = list(next(simsiam.train.batches(args, data, 3, slice(0, 64))))
        args = conmim.train.parse_args(["--data-set", "folder", "--batch", "64"])
        query, key, mask = next(conmim.train.batches(args, data, 3, slice(0, 64)))
        cocord_args = cocord.train.parse_args(["--data-set", "cifar100", "--batch", "64"])
        crops, labels = next(cocord.train.batches(cocord_args, data, 3))
        results.append((torch.stack([*views, query, key, *crops]).cpu(), mask.cpu(), labels.cpu()))
    (cpu_pixels, cpu_mask, cpu_labels), (pixels, mask, labels) = results
    expect(torch.equal(mask, cpu_mask) and torch.equal(labels, cpu_labels), "masks or labels differ")
    difference = (pixels - cpu_pixels).abs()
    mean, share = difference.mean().item(), (difference > 1e-2).float().mean().item()
    expect(mean <= 1e-4 and share <= 1e-3, f"mean difference {mean:.1e}; {share:.1e} of the pixels differ by over 0.01")
    return f"mean difference {mean:.1e}; {share:.1e} of the pixels differ by over 0.01; masks equal"


def agree_on_sequences(check: Check) -> str:
    settings = (("multiplication", 2), ("multiplication", 4), ("arithmetic", 3), ("lis", 8))
    for name, size in settings[: 1 if check.dry_run else None]:
        task = tasks.build_task(name, size)
        task.eval_rows = 100
        cpu_splits, splits = (tasks.load(task, 500, None, device) for device in (CPU, check.device))
        cpu_stream, stream = (tasks.stream(task, 0, 5, 64, device).cpu() for device in (CPU, check.device))
        equal = all(torch.equal(a, b.cpu()) for a, b in zip(cpu_splits, splits, strict=True))
        expect(equal and torch.equal(cpu_stream, stream), f"sequences of {name} differ")
    return "all tokens equal, in the splits and in the training streams"


def agree_on_measurements(check: Check) -> str:
    """Compare kNN, linear probe and metrics of random features around ten centres."""
    generator = torch.Generator().manual_seed(0)
    all_labels = torch.arange(600) % 10
    all_features = torch.randn(10, 32, generator=generator)[all_labels] + torch.randn(600, 32, generator=generator)
    all_h = torch.randn(16, 6, 32, generator=generator)
    results = []
    for device in (CPU, check.device):
        features, labels, h = all_features.to(device), all_labels.to(device), all_h.to(device)
        split = seeding.held_out_split(400, device, 0)
        train_set = probes.Labelled(features[:400], labels[:400])
        test_set = probes.Labelled(features[400:], labels[400:])
        code = (features > 1).float()
        results.append(
            {
                "knn": probes.knn_accuracy(train_set, test_set, 10, 20),
                "linear": probes.linear_accuracy(train_set, test_set, 10, split, 0),
                "std": probes.std_ratio(features),
                "cosine": probes.mean_cosine(features),
                "rank": probes.effective_rank(features),
                "position": conmim.train.position_r2(h),
                "entropy": seqvcr.eval.token_entropy(h).mean().item(),
                "batch entropy": seqvcr.eval.batch_entropy(h).mean().item(),
                "jaccard": bsa.eval.jaccard(code, code).mean().item(),
            }
        )
    cpu_values, values = results
    for name, cpu_value in cpu_values.items():
        allowed = 1.0 if name in ("knn", "linear") else 1e-5 * abs(cpu_value)  # 1.0: two of 200 rows
        expect(abs(values[name] - cpu_value) <= allowed, f"{name}: {values[name]:.6g}, on the CPU {cpu_value:.6g}")
    return f"kNN {values['knn']:.1f} %, linear {values['linear']:.1f} %; all other metrics equal to 1e-5"


def measure_a_small_std(check: Check) -> str:
    """Features 1 + 0.001 n (n normal) have std ratio 1 after a batch norm; bfloat16 or TF32 would lose their std."""
    stage = nn.Sequential(nn.Conv2d(3, 64, 32), nn.Flatten(), nn.BatchNorm1d(64, affine=False))
    convolution, norm = stage[0], stage[2]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(0.001 / 3072**0.5 * torch.randn(convolution.weight.shape, generator=generator))
        convolution.bias.fill_(1.0)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(1e-6)
    norm.eps = 1e-12
    data = random_images(200, 32, 10, check.device)
    data = data._replace(std=data.std * 2 / 3**0.5)  # unit variance
    std_ratio = probes.std_ratio(probes.extract_features([stage.to(check.device)], data, "test")[0])
    expect(0.97 <= std_ratio <= 1.03, f"std ratio {std_ratio:.3f}, expected 1")
    return f"std ratio {std_ratio:.3f}"


def collapse_metrics_under_bfloat16(check: Check) -> str:
    """Compare SimSiam's train-mode collapse metrics, computed from the training step's z, in bfloat16 and float32."""
    args = simsiam.train.parse_args(["--batch", "256"])
    views = next(simsiam.train.batches(args, random_images(256, 32, 10, check.device), 0, slice(0, 256)))
    model = simsiam.train.build_model(args, check.device)

    def measure(precision: str) -> tuple[float, float]:
        with torch.no_grad(), devices.autocast(precision, check.device):
            z = model.projector(model.backbone(views[0]))
        return probes.std_ratio(z), probes.mean_cosine(z)

    (std32, cosine32), (std16, cosine16) = measure("float32"), measure("bfloat16")
    expect(
        abs(std16 - std32) <= 0.02 and abs(cosine16 - cosine32) <= 0.02,
        f"std ratio {std16:.3f} (float32 {std32:.3f}), mean cosine {cosine16:.3f} ({cosine32:.3f})",
    )
    return f"std ratio {std16:.3f} (float32 {std32:.3f}), mean cosine {cosine16:.3f} ({cosine32:.3f})"


# ------------------------------------------------------------------------------------------------- exchange


def exchange(check: Check) -> Iterator[Case]:
    device = str(check.device)
    pairs = [(device, "cpu")] if check.dry_run else [(device, "cpu"), ("cpu", device)]
    for paper in check.papers:
        for trained_on, evaluated_on in pairs:
            name = f"{paper}: trained on {trained_on}, evaluated on {evaluated_on}"
            yield name, partial(evaluate_on_both, check, paper, trained_on, evaluated_on)


def evaluate_on_both(check: Check, paper: str, trained_on: str, evaluated_on: str) -> str:
    """Train on one device, evaluate on both; metrics agree up to rounding and a few test examples."""
    if paper == "cocord":
        check.train_teacher("vgg_s64", "exchange/cocord")
    folder = f"exchange/{paper}/{trained_on.replace(':', '-')}/0"
    PAPERS[paper].train.main(check.flags(paper, folder, "--precision", "float32", rehearse=2, device=trained_on))
    results = []
    for device in (trained_on, evaluated_on):
        PAPERS[paper].eval.main([str(check.work / folder), "--device", device])
        results.append(files.read_json(check.work / folder / "metrics.json"))
    compared = 0
    for name, a in results[0].items():
        b = results[1][name]
        not_compared = name in ("seconds", "train_seconds", "examples_per_second", "peak_memory")
        if not_compared or not isinstance(a, float) or not isinstance(b, float):
            continue
        percent = "accuracy" in name or "match" in name or "top1" in name
        allowed = 5.0 if percent else 0.02 * abs(a) + 1e-3
        expect(abs(a - b) <= allowed, f"{name}: {a:.6g} on {trained_on}, {b:.6g} on {evaluated_on}")
        compared += 1
    expect(compared > 3, f"only {compared} metrics were compared")
    return f"{compared} metrics agree"


# ------------------------------------------------------------------------------------------------- arms and scales


def arms(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        flags_by_arm, studies = plan(paper, "demo")
        if check.dry_run:  # only SimSiam's first study; `exchange` trains and evaluates the other papers
            studies = dict(list(studies.items())[:1]) if paper == "simsiam" else {}
            needed = {arm for contrasts in studies.values() for pair in contrasts for arm in pair.split(":")}
            flags_by_arm = {arm: flags for arm, flags in flags_by_arm.items() if arm in needed}
        for arm, flags in flags_by_arm.items():
            yield f"{paper}, {arm}", partial(run_arm, check, paper, arm, flags)
        for study in studies:
            yield f"{study}: figures", partial(plot_study, check, paper, study)


def run_arm(check: Check, paper: str, arm: str, flags: list[str]) -> str:
    folder = f"arms/{paper}/{arm}/0"
    if paper == "cocord":
        network = cocord.train.parse_args(flags).teacher
        if network != "none":
            check.train_teacher(network, "arms/cocord")
    PAPERS[paper].train.main(check.flags(paper, folder, *flags, rehearse=2))
    PAPERS[paper].eval.main([str(check.work / folder)])
    diverged = files.read_json(check.work / folder / "metrics.json")["diverged"]
    expect(not diverged, "diverged within a few steps")
    last_epoch = files.read_lines(check.work / folder / "train.jsonl")[-1]
    return f"loss {last_epoch.get('loss', math.nan):.4g}"


def plot_study(check: Check, paper: str, study: str) -> str:
    runs, results = check.work / "arms" / paper, check.work / "figures"
    PAPERS[paper].plot.main([study, "--runs", str(runs), "--seeds", "0", "--results", str(results)])
    figures = list(results.glob(f"{study}*.png"))
    expect(bool(figures), "no figure was written")
    return f"{len(figures)} figures"


@contextlib.contextmanager
def data_or_random(check: Check) -> Iterator[list[str]]:
    """Replace CIFAR by random pixels inside the context if it is not in --data. Yields BSA's --data flag."""
    real_cifar = images.cifar

    def cifar(name: str, data: Path, train: bool) -> tuple[Tensor, Tensor]:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            return real_cifar(name, data, train)
        random_data = random_images(12_000 if train else 2000, 32, int(name.removeprefix("cifar")), CPU)
        return random_data.train, random_data.train_labels

    matrix = check.data / "mesh-minilm.npy"
    if not matrix.exists():
        matrix = check.work / "rows.npy"
        rows = 4000 if check.dry_run else 30_532
        np.save(matrix, np.random.default_rng(0).standard_normal((rows, 384), np.float32))
    images.cifar = cifar
    try:
        yield ["--data", str(matrix)]
    finally:
        images.cifar = real_cifar


def gpu_flags(check: Check, paper: str, out: str, matrix: list[str], rehearse: int, *more: str) -> list[str]:
    """Return the arguments of a run at gpu scale (dry run: demo scale); `matrix` is BSA's --data flag."""
    if check.dry_run:
        return check.flags(paper, out, *more, rehearse=rehearse)
    paths = ["--device", str(check.device), "--data", str(check.data), "--out", str(check.work / out)]
    if paper == "bsa":
        paths += matrix
    return ["--scale", "gpu", *more, "--rehearse", str(rehearse), *paths]


def train_teacher_of(check: Check, folder: str, flags: list[str]) -> None:
    """Train the teacher that a CoCoRD arm with these flags needs at gpu scale (dry run: `base` at demo scale)."""
    scale = ["--scale", "demo" if check.dry_run else "gpu"]
    network = cocord.train.parse_args([*scale, *([] if check.dry_run else flags)]).teacher
    if network != "none":
        check.train_teacher(network, folder, *scale)


def scales(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        flags_by_arm = {"base": []} if check.dry_run else plan(paper, "gpu")[0]
        for arm, flags in flags_by_arm.items():
            yield f"{paper}, {arm}, gpu scale", partial(run_at_gpu_scale, check, paper, arm, flags)
    for paper in check.papers:
        yield f"{paper}, network of paper scale", partial(run_at_paper_scale, check, paper)


def run_at_gpu_scale(check: Check, paper: str, arm: str, flags: list[str]) -> str:
    """Train two epochs of ten steps; in a dry run, of one step."""
    folder = f"scales/{paper}/{arm}/0"
    if not check.dry_run:
        torch.cuda.reset_peak_memory_stats(check.device)
    with data_or_random(check) as matrix:
        if paper == "cocord":
            train_teacher_of(check, "scales/cocord", flags)
        PAPERS[paper].train.main(gpu_flags(check, paper, folder, matrix, 1 if check.dry_run else 10, *flags))
    diverged = checkpoints.load(check.work / folder / "model.pt")["diverged"]
    metrics = files.read_lines(check.work / folder / "train.jsonl")[-1]
    shutil.rmtree(check.work / folder)
    loss = metrics.get("loss")  # missing if the arm trains for 0 epochs
    expect(not diverged and (loss is None or math.isfinite(loss)), f"diverged within a few steps, loss {loss}")
    memory = metrics["peak_memory"] / 2**30
    check.numbers[f"peak GiB, {paper}, {arm}"] = memory
    return f"loss {loss if loss is None else round(loss, 4)}, peak memory {memory:.2f} GiB"


def run_at_paper_scale(check: Check, paper: str) -> str:
    """Train two steps with the network of paper scale."""
    scale, rows = ("demo", 32) if check.dry_run else ("paper", 4096 if paper == "bsa" else 32)
    problem = PROBLEMS[paper](scale, rows, check.device)
    if not check.dry_run:
        torch.cuda.reset_peak_memory_stats(check.device)
    losses = [problem.step("auto").item() for _ in range(2)]
    expect(all(map(math.isfinite, losses)), f"losses {losses}")
    weights = sum(weight.numel() for weight in problem.model.parameters())
    memory = devices.peak_memory(check.device) / 2**30
    return f"{weights / 1e6:.1f} million weights, batch size {rows}, peak memory {memory:.2f} GiB"


# ------------------------------------------------------------------------------------------------- sync


def sync(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        yield f"{paper}: no host-device synchronisation in a step", partial(detect_synchronisation, check, paper)
        yield f"{paper}: synchronising calls and pageable copies", partial(count_calls, check, paper)


def run_with_windows(check: Check, paper: str, out: str, windows: list[Window], steps: int) -> None:
    """Train at gpu scale (dry run: demo scale), with windows in the second epoch."""
    more = ["--teacher", "resnet56", "--student", "resnet20"] if paper == "cocord" and not check.dry_run else []
    folder = check.work / out / paper / "base"
    try:
        with data_or_random(check) as matrix:
            if paper == "cocord":
                train_teacher_of(check, f"{out}/cocord", more)
            with open_windows(windows, steps):
                PAPERS[paper].train.main(gpu_flags(check, paper, f"{out}/{paper}/base/0", matrix, steps, *more))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def detect_synchronisation(check: Check, paper: str) -> str:
    steps = 5 if check.dry_run else 8
    run_with_windows(check, paper, "sync", [Window(0, steps - 1, no_synchronisation(check.device))], steps)
    return f"none in {steps - 1} training steps and their batches"


def count_calls(check: Check, paper: str) -> str:
    """Count with the profiler, which itself synchronises two or three times at its end."""
    if check.dry_run:
        raise NotApplicable("the profiler records no CUDA calls on a CPU")
    steps, profiler = 8, Profiler(check)
    run_with_windows(check, paper, "calls", [Window(2, steps - 1, profiler)], steps)
    trace, count = trace_statistics(profiler.events), steps - 3
    if not trace["kernels"]:
        raise NotApplicable("the profiler records no kernels: CUPTI is not available")
    expect(trace["synchronisations"] <= 3, f"{trace['synchronisations']} synchronisations in {count} steps")
    expect(trace["pageable_copies"] == 0, f"{trace['pageable_copies']} pageable copies in {count} steps")
    return f"{trace['kernels'] / count:.0f} kernels per step, no synchronisation, no pageable copy"


# ------------------------------------------------------------------------------------------------- resume


class Killed(Exception):
    """Simulates a kill; raised when the state of an epoch has been written."""


def resume(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        yield f"{paper}: killed after an epoch", partial(kill_and_resume, check, paper)


def train_weights(
    check: Check, paper: str, out: str, kill: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train for two epochs. Returns (initial weights, final weights). With `kill`, stop after one epoch and resume."""
    dropout = ["--dropout", "0.1"] if paper == "seqvcr" else []  # its masks are drawn on the device
    argv = check.flags(paper, out, *dropout, rehearse=2 if check.dry_run else 4)
    real_save, initial_weights = Run.save, {}

    def save(run: Run, epoch: int, metrics: dict, state: dict) -> None:
        real_save(run, epoch, metrics, state)
        if epoch == 0:
            initial_weights.update({name: tensor.detach().cpu().clone() for name, tensor in state["model"].items()})
        elif epoch == 1 and kill:
            raise Killed

    Run.save = save  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Killed):
            PAPERS[paper].train.main(argv)
    finally:
        Run.save = real_save  # type: ignore[method-assign]
    if kill:
        PAPERS[paper].train.main(argv)
    return initial_weights, checkpoints.load(check.work / out / "model.pt")["model"]


def kill_and_resume(check: Check, paper: str) -> str:
    """Compare a resumed run with an uninterrupted one: bitwise on a CPU.

    On a GPU the order of atomic additions varies. There the relative distance may be TOLERANCE, or three times that
    between two uninterrupted runs.
    """
    if paper == "cocord":
        check.train_teacher("vgg_s64", "resume/cocord")
    start, uninterrupted = train_weights(check, paper, f"resume/{paper}/straight/0")
    _, repeated = train_weights(check, paper, f"resume/{paper}/again/0")
    _, resumed = train_weights(check, paper, f"resume/{paper}/killed/0", kill=True)
    noise = relative_distance(repeated, uninterrupted, start)
    difference = relative_distance(resumed, uninterrupted, start)
    allowed = 0.0 if check.dry_run else max(TOLERANCE, 3 * noise)
    expect(
        difference <= allowed,
        f"relative distance {difference:.1e}, allowed {allowed}; between two uninterrupted runs {noise:.1e}",
    )
    return f"relative distance {difference:.1e}; between two uninterrupted runs {noise:.1e}"


# ------------------------------------------------------------------------------------------------- ranks


# Allowed `relative_distance` between one and two ranks. Measured on the CPU: after a change of the weights by 1e-5 up
# to 0.02; if the batch norms of the ranks are not synchronised 0.07 (SimSiam) and 0.3 (ConMIM).
RANKS_TOLERANCE = 0.03


def ranks(check: Check) -> Iterator[Case]:
    for paper in ("simsiam", "conmim"):
        if paper in check.papers and (paper == "simsiam" or not check.dry_run):
            yield f"{paper}: two gloo ranks", partial(compare_two_ranks, check, paper)


def compare_two_ranks(check: Check, paper: str) -> str:
    """Compare training on two ranks and on one process.

    On CUDA, batch norms are synchronised across ranks; on a CPU they are in eval mode.
    """
    folder = check.work / "ranks" / paper
    folder.mkdir(parents=True)
    script = folder / "script.py"
    patch = forked.NORMS_IN_EVAL_MODE if check.dry_run else ""
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {paper} import train\n{patch}"
                      "train.main(sys.argv[1:])")  # fmt: skip
    device = "cpu" if check.dry_run else f"cuda:{check.device.index or 0}"
    saved = []
    for count in (1, 2):
        more = ["--precision", "float32"]
        if paper == "conmim" and count == 2:
            more.append("--sync-batch-norm")
        argv = check.flags(paper, f"ranks/{paper}/{count}", *more, rehearse=3, device=device)
        done = forked.run(folder, script, *argv, ranks=count)
        expect(done.returncode == 0, f"{count} ranks: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        saved.append(checkpoints.load(folder / str(count) / "model.pt"))
    one_rank, two_ranks = saved
    start = PAPERS[paper].train.build_model(argparse.Namespace(**one_rank["arguments"]), CPU).state_dict()
    difference = relative_distance(two_ranks["model"], one_rank["model"], start)
    expect(difference <= RANKS_TOLERANCE, f"relative distance {difference:.1e}, allowed {RANKS_TOLERANCE}")
    return f"relative distance {difference:.1e}"


# ------------------------------------------------------------------------------------------------- make, packing


def make(check: Check) -> Iterator[Case]:
    yield "simsiam-stop-gradient", partial(make_study, check)


def make_study(check: Check) -> str:
    folder = check.work / "make"
    variables = {
        "SCALE": "demo", "SEEDS": "0", "DEVICE": check.device.type, "DATA": check.data, "RUNS": folder,
        "PYTHON": sys.executable, "EXTRA": "--rehearse 2",
        "GPUS": "" if check.dry_run else f"{check.device.index} {check.device.index}",
    }  # fmt: skip
    command = ["make", "-C", str(ROOT), "-j2", "simsiam-stop-gradient"]
    command += [f"{name}={value}" for name, value in variables.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    print(shlex.join(command), done.stdout, done.stderr, sep="\n")
    expect(
        done.returncode == 0,
        f"make exited with code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}",
    )
    runs = list(folder.rglob("metrics.json"))
    expect(len(runs) == 2 and (folder / "report/index.html").exists(), f"{len(runs)} runs instead of 2, or no page")
    return "two arms trained and evaluated; figures and page written"


def packing(check: Check) -> Iterator[Case]:
    yield "Seq-VCR's demo", partial(pack_runs, check)


def pack_runs(check: Check) -> str:
    """Compare the throughput of one run and of several concurrent runs, process start included."""
    concurrent = 2 if check.dry_run else 4
    steps = ["--rehearse", "2"] if check.dry_run else []

    def seconds(count: int) -> float:
        start = time.perf_counter()
        processes = []
        for number in range(count):
            argv = check.flags("seqvcr", f"packing/{count}/{number}", *steps, "--seed", str(number))
            script = [sys.executable, str(ROOT / "seqvcr/train.py"), *argv]
            processes.append(subprocess.Popen(script, stdout=subprocess.DEVNULL))
        codes = [process.wait(300) for process in processes]
        expect(not any(codes), f"{count} concurrent runs: exit codes {codes}")
        return time.perf_counter() - start

    single, packed = seconds(1), seconds(concurrent)
    check.numbers["packing"] = {"seconds alone": single, f"seconds of {concurrent} side by side": packed}
    return (
        f"{3600 / single:.0f} runs per hour one at a time, {concurrent * 3600 / packed:.0f} with {concurrent} at once"
    )
