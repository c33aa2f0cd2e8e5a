"""The parts of gpu_check that ask whether everything runs and agrees with the CPU; each yields its cases."""

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
    Profiled,
    Window,
    distance,
    expect,
    no_synchronisation,
    ratio,
    trace_facts,
    watched,
    whole,
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
        for scale in ("demo",) if check.dry else ("demo", "gpu"):
            yield f"{paper}, {scale}: loss and gradients", partial(agree_on_gradients, check, paper, scale)
        yield f"{paper}: bfloat16", partial(agree_under_bfloat16, check, paper)
        yield f"{paper}: optimiser", partial(agree_on_optimiser, check, paper)
    yield "views and masks", partial(agree_on_views, check)
    yield "rows of Seq-VCR", partial(agree_on_rows, check)
    yield "kNN, linear probe, spread, entropies", partial(agree_on_measurements, check)
    yield "a spread of a thousandth", partial(measure_a_small_spread, check)
    yield "collapse meters in training under bfloat16", partial(meter_under_bfloat16, check)


# What rounding may do to a gradient g: (|d| / |g| of each parameter, of the whole). It turns a few ReLUs on or off: on
# the CPU a change of all weights by 1e-7 moves a parameter's gradient by 0.003, the whole one by 0.002 (CoCoRD, gpu).
ALLOWED = {"simsiam": (5e-2, 1e-2), "cocord": (5e-2, 1e-2), "conmim": (5e-2, 2e-3), "bsa": (1e-3, 1e-3),
           "seqvcr": (1e-3, 1e-3)}  # fmt: skip


def agree_on_gradients(check: Check, paper: str, scale: str) -> str:
    """A parameter's gradient may differ by a hundredth of its share of the whole one, too: it may vanish in exact
    arithmetic, such as that of a bias before a batch norm."""
    (loss, reference), (other, found) = (
        PROBLEMS[paper](scale, 32, device).gradients("float32") for device in (CPU, check.device)
    )
    each, in_all = ALLOWED[paper]
    error = abs(other - loss) / max(1.0, abs(loss))  # SimSiam's loss begins near 0, in a range of 2
    expect(error <= 1e-4, f"loss {other:.6g}, on the CPU {loss:.6g}: {error:.1e} apart, 1e-4 allowed")
    expect(found.keys() == reference.keys(), "other parameters have gradients")
    g, h = whole(reference, reference), whole(found, reference)
    worst, name = max(
        (((found[name] - own).norm() / (each * (own.norm() + g.norm() / 100))).item(), name)
        for name, own in reference.items()
    )
    expect(worst <= 1, f"gradient of {name}: {worst:.3g} times what is allowed")
    apart, scaled = ratio(h, g), abs((h @ g / (g @ g)).item() - 1)
    expect(apart <= in_all, f"whole gradient {apart:.2g} of its length apart, {in_all} allowed")
    expect(scaled <= in_all / 5, f"whole gradient {scaled:.2g} longer or shorter, {in_all / 5:g} allowed")
    return f"loss {error:.1e} apart, whole gradient {apart:.1e}, worst {worst:.2g} of what is allowed ({name})"


def bfloat16_errors(problem: Problem) -> tuple[float, float]:
    """(of the loss, of the whole gradient): bfloat16 against float32 on the same device."""
    (loss, reference), (other, found) = problem.gradients("float32"), problem.gradients("bfloat16")
    return abs(other - loss) / max(1.0, abs(loss)), ratio(whole(found, reference), whole(reference, reference))


def agree_under_bfloat16(check: Check, paper: str) -> str:
    """The CPU's own bfloat16 says how far rounding takes this network and batch; a rounding unit is added (2^-8)."""
    cpu, device = (bfloat16_errors(PROBLEMS[paper]("demo", 32, one)) for one in (CPU, check.device))
    for what, a, b in zip(("loss", "gradient"), device, cpu, strict=True):
        expect(a <= 3 * b + 2**-8, f"{what}: {a:.3g} from float32, on the CPU {b:.3g}")
    return f"from float32: loss {device[0]:.1e}, gradient {device[1]:.3f} (on the CPU {cpu[0]:.1e}, {cpu[1]:.3f})"


def agree_on_optimiser(check: Check, paper: str) -> str:
    """Three steps on equal gradients, and what follows a step."""
    ends = []
    for device in (CPU, check.device):
        problem = PROBLEMS[paper]("demo", 32, device)
        start = {name: one.detach().cpu().clone() for name, one in problem.model.state_dict().items()}
        for step in range(3):
            for number, (_, weight) in enumerate(problem.model.named_parameters()):
                if weight.requires_grad:
                    generator = seeding.generator(number, "gradient", step)
                    weight.grad = (0.01 * torch.randn(weight.shape, generator=generator)).to(device)
            problem.optimizer.step()
            problem.follow()
        ends.append(problem.model.state_dict())
    apart = distance(ends[1], ends[0], start)
    expect(apart <= 1e-5, f"{apart:.2e} of the way apart, 1e-5 allowed")
    return f"{apart:.1e} of the way apart"


def agree_on_views(check: Check) -> str:
    """Views of random pixels, whose every number is drawn on the CPU: a rounding may flip a threshold in few pixels."""
    made = []
    for device in (CPU, check.device):
        data = random_images(64, 32, 10, device)
        args = simsiam.train.parse_args(["--data-set", "folder", "--batch", "64"])
        views = list(next(simsiam.train.batches(args, data, 3, slice(0, 64))))
        args = conmim.train.parse_args(["--data-set", "folder", "--batch", "64"])
        query, key, mask = next(conmim.train.batches(args, data, 3, slice(0, 64)))
        cocord_args = cocord.train.parse_args(["--data-set", "cifar100", "--batch", "64"])
        crops, labels = next(cocord.train.batches(cocord_args, data, 3))
        made.append((torch.stack([*views, query, key, *crops]).cpu(), mask.cpu(), labels.cpu()))
    (reference, *others), (found, *equal) = made
    expect(all(map(torch.equal, others, equal)), "masks or labels differ")
    apart = (found - reference).abs()
    mean, share = apart.mean().item(), (apart > 1e-2).float().mean().item()
    expect(mean <= 1e-4 and share <= 1e-3, f"mean difference {mean:.1e}, {share:.1e} of the pixels beyond 0.01")
    return f"mean difference {mean:.1e}; {share:.1e} of the pixels differ by more than 0.01; masks equal"


def agree_on_rows(check: Check) -> str:
    every = (("multiplication", 2), ("multiplication", 4), ("arithmetic", 3), ("lis", 8))
    for name, size in every[: 1 if check.dry else None]:
        task = tasks.choose(name, size)
        task.measured = 100
        reference, found = (tasks.load(task, 500, None, device) for device in (CPU, check.device))
        streams = [tasks.stream(task, 0, 5, 64, device).cpu() for device in (CPU, check.device)]
        same = all(torch.equal(a, b.cpu()) for a, b in zip(reference, found, strict=True)) and torch.equal(*streams)
        expect(same, f"rows of {name} differ")
    return "equal in every token: all parts of the split, and streams"


def agree_on_measurements(check: Check) -> str:
    """kNN, linear probe and meters of random features around ten centres."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    rows = torch.randn(10, 32, generator=generator)[labels] + torch.randn(600, 32, generator=generator)
    h = torch.randn(16, 6, 32, generator=generator)
    found = []
    for device in (CPU, check.device):
        x, y, levels = rows.to(device), labels.to(device), h.to(device)
        parts = seeding.held_out_split(400, device)
        known, unknown = probes.Labelled(x[:400], y[:400]), probes.Labelled(x[400:], y[400:])
        found.append({
            "knn": probes.knn_accuracy(known, unknown, 10, 20),
            "linear": probes.linear_accuracy(known, unknown, 10, parts, 0),
            "std": probes.std_ratio(x), "cosine": probes.mean_cosine(x), "rank": probes.effective_rank(x),
            "position": conmim.train.position_r2(levels),
            "entropy": seqvcr.eval.token_entropy(levels).mean().item(),
            "batch entropy": seqvcr.eval.batch_entropy(levels).mean().item(),
            "jaccard": bsa.eval.jaccard((x > 1).float(), (x > 1).float()).mean().item(),
        })  # fmt: skip
    for name, a in found[0].items():
        allowed = 1.0 if name in ("knn", "linear") else 1e-5 * abs(a)  # 1.0: two of 200 rows
        expect(abs(found[1][name] - a) <= allowed, f"{name}: {found[1][name]:.6g}, on the CPU {a:.6g}")
    return f"kNN {found[1]['knn']:.1f} %, linear {found[1]['linear']:.1f} %; all meters equal to 1e-5"


def measure_a_small_spread(check: Check) -> str:
    """Features of 1 + 0.001 n behind a batch norm that undoes both: in bfloat16 or TF32 their spread would be lost."""
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
    data = data._replace(deviation=data.std * 2 / 3**0.5)  # unit variance
    measured = probes.std_ratio(probes.extract_features([stage.to(check.device)], data, "test")[0])
    expect(0.97 <= measured <= 1.03, f"std ratio {measured:.3f} where 1 is right")
    return f"std ratio {measured:.3f}"


def meter_under_bfloat16(check: Check) -> str:
    """SimSiam's train-mode spread is that of the training step's own z: what its precision does to it."""
    args = simsiam.train.parse_args(["--batch", "256"])
    views = next(simsiam.train.batches(args, random_images(256, 32, 10, check.device), 0, slice(0, 256)))
    model, found = simsiam.train.build_model(args, check.device), {}
    for precision in ("float32", "bfloat16"):
        with torch.no_grad(), devices.autocast(precision, check.device):
            z = model.projector(model.backbone(views[0]))
        found[precision] = probes.std_ratio(z), probes.mean_cosine(z)
    (std, cosine), (other, other_cosine) = found["float32"], found["bfloat16"]
    expect(abs(other - std) <= 0.02 and abs(other_cosine - cosine) <= 0.02, f"std ratio {other:.3f}, float32 {std:.3f}")
    return f"std ratio {other:.3f} (float32 {std:.3f}), mean cosine {other_cosine:.3f} ({cosine:.3f})"


# ------------------------------------------------------------------------------------------------- exchange


def exchange(check: Check) -> Iterator[Case]:
    here = str(check.device)
    for paper in check.papers:
        for trained_on, evaluated_on in [(here, "cpu")] if check.dry else [(here, "cpu"), ("cpu", here)]:
            name = f"{paper}: trained on {trained_on}, evaluated on {evaluated_on}"
            yield name, partial(evaluate_elsewhere, check, paper, trained_on, evaluated_on)


def evaluate_elsewhere(check: Check, paper: str, here: str, there: str) -> str:
    """The same metrics, up to rounding and to what a few test examples decide."""
    if paper == "cocord":
        check.teacher("vgg_s32", "exchange/cocord")
    folder = f"exchange/{paper}/{here.replace(':', '-')}/0"
    PAPERS[paper].train.main(check.flags(paper, folder, rehearse=2, device=here))
    metrics = []
    for device in (here, there):
        PAPERS[paper].eval.main([str(check.work / folder), "--device", device])
        metrics.append(files.read_json(check.work / folder / "metrics.json"))
    compared = 0
    for name, a in metrics[0].items():
        b = metrics[1][name]
        timing = name in ("seconds", "train_seconds", "examples_per_second", "peak_memory")
        if timing or not isinstance(a, float) or not isinstance(b, float):
            continue
        percent = "accuracy" in name or "match" in name or "top1" in name
        allowed = 5.0 if percent else 0.02 * abs(a) + 1e-3
        expect(abs(a - b) <= allowed, f"{name}: {a:.6g} on {here}, {b:.6g} on {there}")
        compared += 1
    expect(compared > 3, f"only {compared} metrics were compared")
    return f"{compared} metrics agree"


# ------------------------------------------------------------------------------------------------- arms and scales


def arms(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        every, studies = plan(paper, "demo")
        if check.dry:  # SimSiam's first contrast; `exchange` trains and evaluates the others
            studies = dict(list(studies.items())[:1]) if paper == "simsiam" else {}
            needed = {arm for contrasts in studies.values() for pair in contrasts for arm in pair.split(":")}
            every = {arm: flags for arm, flags in every.items() if arm in needed}
        for arm, flags in every.items():
            yield f"{paper}, {arm}", partial(run_an_arm, check, paper, arm, flags)
        for study in studies:
            yield f"{study}: figures", partial(draw, check, paper, study)


def run_an_arm(check: Check, paper: str, arm: str, flags: list[str]) -> str:
    folder = f"arms/{paper}/{arm}/0"
    if paper == "cocord" and (network := cocord.train.parse_args(flags).teacher) != "none":
        check.teacher(network, "arms/cocord")
    PAPERS[paper].train.main(check.flags(paper, folder, *flags, rehearse=2))
    PAPERS[paper].eval.main([str(check.work / folder)])
    diverged = files.read_json(check.work / folder / "metrics.json")["diverged"]
    expect(not diverged, "diverged within a few steps")
    return f"loss {files.read_lines(check.work / folder / 'train.jsonl')[-1].get('loss', math.nan):.4g}"


def draw(check: Check, paper: str, study: str) -> str:
    runs, results = check.work / "arms" / paper, check.work / "figures"
    PAPERS[paper].plot.main([study, "--runs", str(runs), "--seeds", "0", "--results", str(results)])
    drawn = list(results.glob(f"{study}*.png"))
    expect(bool(drawn), "no figure was drawn")
    return f"{len(drawn)} figures"


@contextlib.contextmanager
def data_or_random(check: Check) -> Iterator[list[str]]:
    """Inside, CIFAR that is not in --data is random pixels; yields the flags that give BSA a matrix."""
    real = images.cifar

    def cifar(name: str, data: Path, train: bool) -> tuple[Tensor, Tensor]:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            return real(name, data, train)
        made = random_images(12_000 if train else 2000, 32, int(name[5:]), CPU)
        return made.train, made.train_labels

    matrix = check.data / "mesh-minilm.npy"
    if not matrix.exists():
        matrix = check.work / "rows.npy"
        np.save(matrix, np.random.default_rng(0).standard_normal((4000 if check.dry else 30_532, 384), np.float32))
    images.cifar = cifar
    try:
        yield ["--data", str(matrix)]
    finally:
        images.cifar = real


def gpu_flags(check: Check, paper: str, out: str, matrix: list[str], rehearse: int, *more: str) -> list[str]:
    """Arguments of a run at gpu scale, of a dry run at demo scale; `matrix` is for BSA."""
    if check.dry:
        return check.flags(paper, out, *more, rehearse=rehearse)
    place = ["--device", str(check.device), "--data", str(check.data), "--out", str(check.work / out)]
    own = matrix if paper == "bsa" else []
    return ["--scale", "gpu", *more, "--rehearse", str(rehearse), *place, *own]


def teach(check: Check, folder: str, flags: list[str]) -> None:
    """The teacher that a CoCoRD arm at gpu scale, or in a dry run at demo scale, needs."""
    scale = ["--scale", "demo" if check.dry else "gpu"]
    network = cocord.train.parse_args([*scale, *([] if check.dry else flags)]).teacher
    if network != "none":
        check.teacher(network, folder, *scale)


def scales(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        every = {"base": []} if check.dry else plan(paper, "gpu")[0]
        for arm, flags in every.items():
            yield f"{paper}, {arm}, gpu scale", partial(take_steps, check, paper, arm, flags)
    for paper in check.papers:
        yield f"{paper}, network of paper scale", partial(take_two_steps, check, paper)


def take_steps(check: Check, paper: str, arm: str, flags: list[str]) -> str:
    """Twenty steps, ten an epoch; in a dry run two."""
    folder = f"scales/{paper}/{arm}/0"
    if not check.dry:
        torch.cuda.reset_peak_memory_stats(check.device)
    with data_or_random(check) as matrix:
        if paper == "cocord":
            teach(check, "scales/cocord", flags)
        PAPERS[paper].train.main(gpu_flags(check, paper, folder, matrix, 1 if check.dry else 10, *flags))
    diverged = checkpoints.load(check.work / folder / "model.pt")["diverged"]
    last = files.read_lines(check.work / folder / "train.jsonl")[-1]
    shutil.rmtree(check.work / folder)
    loss = last.get("loss")  # a run of no epochs has none
    expect(not diverged and (loss is None or math.isfinite(loss)), f"diverged within a few steps, loss {loss}")
    memory = last["peak_memory"] / 2**30
    check.numbers[f"peak GiB, {paper}, {arm}"] = memory
    return f"loss {loss if loss is None else round(loss, 4)}, {memory:.2f} GiB at most"


def take_two_steps(check: Check, paper: str) -> str:
    scale, rows = ("demo", 32) if check.dry else ("paper", 4096 if paper == "bsa" else 32)
    problem = PROBLEMS[paper](scale, rows, check.device)
    if not check.dry:
        torch.cuda.reset_peak_memory_stats(check.device)
    losses = [problem.step("auto").item() for _ in range(2)]
    expect(all(map(math.isfinite, losses)), f"losses {losses}")
    weights = sum(weight.numel() for weight in problem.model.parameters())
    memory = devices.peak_memory(check.device) / 2**30
    return f"{weights / 1e6:.1f} million weights, {rows} examples, {memory:.2f} GiB at most"


# ------------------------------------------------------------------------------------------------- sync


def sync(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        yield f"{paper}: nothing waits for the device", partial(watch_for_synchronisation, check, paper)
        yield f"{paper}: calls and copies a step", partial(count_calls, check, paper)


def watched_run(check: Check, paper: str, out: str, windows: list[Window], steps: int) -> None:
    """A run at gpu scale (of a dry run at demo scale) with windows in its second epoch."""
    more = ["--teacher", "resnet56", "--student", "resnet20"] if paper == "cocord" and not check.dry else []
    if paper == "cocord":
        teach(check, f"{out}/cocord", more)
    folder = check.work / out / paper / "base"
    try:
        with data_or_random(check) as matrix, watched(windows, steps):
            PAPERS[paper].train.main(gpu_flags(check, paper, f"{out}/{paper}/base/0", matrix, steps, *more))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def watch_for_synchronisation(check: Check, paper: str) -> str:
    steps = 5 if check.dry else 8
    watched_run(check, paper, "sync", [Window(0, steps - 1, no_synchronisation(check.device))], steps)
    return f"{steps - 1} steps of training and their batches"


def count_calls(check: Check, paper: str) -> str:
    """The profiler synchronises at its end: twice by itself, and once more where Kineto does."""
    if check.dry:
        raise NotApplicable("the profiler sees no CUDA calls on a CPU")
    steps, profiled = 8, Profiled(check)
    watched_run(check, paper, "calls", [Window(2, steps - 1, profiled)], steps)
    facts, count = trace_facts(profiled.events), steps - 3
    if not facts["kernels"]:
        raise NotApplicable("the profiler sees no kernel: CUPTI is not available here")
    expect(facts["synchronisations"] <= 3, f"{facts['synchronisations']} synchronisations in {count} steps")
    expect(facts["pageable_copies"] == 0, f"{facts['pageable_copies']} pageable copies in {count} steps")
    return f"{facts['kernels'] / count:.0f} kernels a step, no synchronisation, no pageable copy"


# ------------------------------------------------------------------------------------------------- resume


class Killed(Exception):
    """Stands in for a kill: raised when an epoch's state has been written."""


def resume(check: Check) -> Iterator[Case]:
    for paper in check.papers:
        yield f"{paper}: killed after an epoch", partial(kill_and_go_on, check, paper)


def trained(check: Check, paper: str, out: str, *more: str, kill: bool = False) -> tuple[dict[str, Tensor], ...]:
    """(weights at the start, at the end) of a short run; with `kill` it dies after its first epoch and goes on."""
    argv, real, start = check.flags(paper, out, *more, rehearse=2 if check.dry else 4), Run.save, {}

    def save(run: Run, epoch: int, record: dict, state: dict) -> None:
        real(run, epoch, record, state)
        if epoch == 0:
            start.update({name: one.detach().cpu().clone() for name, one in state["model"].items()})
        elif epoch == 1 and kill:
            raise Killed

    Run.save = save  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Killed):
            PAPERS[paper].train.main(argv)
    finally:
        Run.save = real  # type: ignore[method-assign]
    if kill:
        PAPERS[paper].train.main(argv)
    return start, checkpoints.load(check.work / out / "model.pt")["model"]


def kill_and_go_on(check: Check, paper: str) -> str:
    """Equal in every bit on a CPU. On a GPU atomic additions come in any order: there `TOLERANCE` of the way, or three
    times what two straight runs differ by."""
    if paper == "cocord":
        check.teacher("vgg_s32", "resume/cocord")
    start, straight = trained(check, paper, f"resume/{paper}/straight/0")
    again = trained(check, paper, f"resume/{paper}/again/0")[1]
    resumed = trained(check, paper, f"resume/{paper}/killed/0", kill=True)[1]
    noise, apart = distance(again, straight, start), distance(resumed, straight, start)
    allowed = 0.0 if check.dry else max(TOLERANCE, 3 * noise)
    expect(apart <= allowed, f"{apart:.1e} of the way apart, {allowed} allowed; two straight runs {noise:.1e}")
    return f"{apart:.1e} of the way apart; two runs that nobody killed {noise:.1e}"


# ------------------------------------------------------------------------------------------------- ranks


def ranks(check: Check) -> Iterator[Case]:
    for paper in ("simsiam", "conmim"):
        if paper in check.papers and (paper == "simsiam" or not check.dry):
            yield f"{paper}: two gloo ranks", partial(two_ranks, check, paper)


def two_ranks(check: Check, paper: str) -> str:
    """On CUDA batch norms share their statistics, as those of one process do; on a CPU they are in eval mode."""
    folder = check.work / "ranks" / paper
    folder.mkdir(parents=True)
    script = folder / "script.py"
    patch = forked.NORMS_IN_EVAL_MODE if check.dry else ""
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {paper} import train\n{patch}"
                      "train.main(sys.argv[1:])")  # fmt: skip
    device = "cpu" if check.dry else f"cuda:{check.device.index or 0}"
    ends = []
    for count in (1, 2):
        more = ["--precision", "float32", *(["--sync-batch-norm"] if paper == "conmim" and count == 2 else [])]
        argv = check.flags(paper, f"ranks/{paper}/{count}", *more, rehearse=3, device=device)
        done = forked.run(folder, script, *argv, ranks=count)
        expect(done.returncode == 0, f"{count} ranks: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        ends.append(checkpoints.load(folder / str(count) / "model.pt"))
    start = PAPERS[paper].train.build_model(argparse.Namespace(**ends[0]["arguments"]), CPU).state_dict()
    apart = distance(ends[1]["model"], ends[0]["model"], start)
    expect(apart <= TOLERANCE, f"{apart:.1e} of the way apart, {TOLERANCE} allowed")
    return f"{apart:.1e} of the way apart"


# ------------------------------------------------------------------------------------------------- make, packing


def make(check: Check) -> Iterator[Case]:
    yield "simsiam-stop-gradient", partial(make_a_study, check)


def make_a_study(check: Check) -> str:
    folder = check.work / "make"
    variables = {
        "SCALE": "demo", "SEEDS": "0", "DEVICE": check.device.type, "DATA": check.data, "RUNS": folder,
        "PYTHON": sys.executable, "EXTRA": "--rehearse 2",
        "GPUS": "" if check.dry else f"{check.device.index} {check.device.index}",
    }  # fmt: skip
    words = ["make", "-C", str(ROOT), "-j2", "simsiam-stop-gradient"]
    words += [f"{name}={value}" for name, value in variables.items()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(words, env=clean, capture_output=True, text=True, timeout=300)
    print(shlex.join(words), done.stdout, done.stderr, sep="\n")
    expect(done.returncode == 0, f"make ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    runs = list(folder.rglob("metrics.json"))
    expect(len(runs) == 2 and (folder / "report/index.html").exists(), f"{len(runs)} runs, or no page")
    return "two arms trained, evaluated, drawn; the page is there"


def packing(check: Check) -> Iterator[Case]:
    yield "Seq-VCR's demo", partial(pack, check)


def pack(check: Check) -> str:
    """Whole runs, with the start of their process."""
    together = 2 if check.dry else 4
    length = ["--rehearse", "2"] if check.dry else []

    def seconds(count: int) -> float:
        started = time.perf_counter()
        processes = []
        for number in range(count):
            argv = check.flags("seqvcr", f"packing/{count}/{number}", *length, "--seed", str(number))
            script = [sys.executable, str(ROOT / "seqvcr/train.py"), *argv]
            processes.append(subprocess.Popen(script, stdout=subprocess.DEVNULL))
        codes = [process.wait(300) for process in processes]
        expect(not any(codes), f"{count} side by side: exit codes {codes}")
        return time.perf_counter() - started

    alone, packed = seconds(1), seconds(together)
    check.numbers["packing"] = {"seconds alone": alone, f"seconds of {together} side by side": packed}
    rates = 3600 / alone, together * 3600 / packed
    return f"{rates[0]:.0f} runs an hour one at a time, {rates[1]:.0f} with {together} side by side"
