"""Ratios of speed, not seconds: `make bench`. Medians over paired rounds on one machine, one thread unless on a GPU.

step / bare     our whole training step over forward, backward and optimiser of the same network on ready tensors
plain / step    a plain reference over our step: Pillow augmentation in two DataLoader workers, contiguous
                tensors, `.item()` at every step; the same network, loss and optimiser
views / step    share of our step that picking, augmenting and normalising the views takes

CoCoRD and ConMIM: bench_cocord.py and bench_conmim.py say what is counted and timed.

BSA, at N = 4096, K = 64, batch 256 and 384 channels:

step / floor    our whole training step over its five matrix products alone
dense / closed  the alignment loss with its target of width N written out over the closed form, forward and backward
parts           what the largest K, the alignment loss (with them) and Adam take of a step

Seq-VCR, regulariser over 32 sequences of 13 tokens at 256 channels, forward and backward; network of 3 blocks of 128:

direct / ours   equation 4 with its d x d covariances over `variance_covariance`, time and memory beyond the inputs
on / off        our whole step with the regulariser (d = 2048) over the step without
plain / off     a minimal GPT of the same shape (attention written out, logits everywhere, AdamW tensor by tensor,
                `.item()` at every step) over ours without the regulariser
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import bench_cocord
import bench_conmim
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import bsa.train
import seqvcr.train
from common import cli, devices, images
from seqvcr import tasks
from seqvcr.net import GPT
from simsiam import train

SETTINGS = {  # name: (network, projector layers, data as, batch on a CPU, batch on a GPU, steps a round)
    "demo, ResNet-8": ("resnet8", 2, "glyphs", 32, 64, 40),
    "CIFAR, ResNet-18": ("resnet18", 2, "cifar", 8, 512, 3),
}
PAIRS = train.PAIRS["symmetric"]


class Pillow(Dataset):
    """Two views of each picture by torchvision's transforms on Pillow images, as most code does it."""

    def __init__(self, pixels: Tensor, kind: dict, length: int):
        self.pictures = [Image.fromarray(np.ascontiguousarray(one.permute(1, 2, 0).cpu().numpy())) for one in pixels]
        self.view = v2.Compose([train.worker_view(kind), v2.ToDtype(torch.float32, scale=True)])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        picture = self.pictures[index % len(self.pictures)]
        return [self.view(picture), self.view(picture)]


def seconds(steps: int, device: torch.device, step: Callable[[], None]) -> float:
    """Wall time of a step, the mean of `steps`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / steps


def stepper(network: str, layers: int, device: torch.device, layout: torch.memory_format) -> Callable:
    """A function that takes a list of views one optimiser step further and returns the loss."""
    model = train.SimSiam(network, 32, "mlp", layers, train.NETWORKS[network][1], "mlp", 0)
    model = model.to(device, memory_format=layout)
    optimizer = train.build_optimizer(train.parse_args(["--lr", "0.08", "--batch", "32"]), model)

    def step(views: list[Tensor]) -> Tensor:
        with devices.autocast("auto", device):
            p, z = model(views, PAIRS, 0.0)
        loss = train.simsiam_loss(p, z, PAIRS, 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


Timed = dict[str, list[float]]


def in_turn(work: dict[str, Callable[[], float]], rounds: int) -> Timed:
    """Each kind of work once a round, its seconds by kind; a first round warms up and does not count."""
    timed: Timed = {which: [] for which in work}
    for number in range(rounds + 1):
        for which, timing in work.items():
            spent = timing()
            if number:
                timed[which].append(spent)
    return timed


def ratio(timed: Timed, a: str, b: str) -> str:
    """Median, lowest and highest of a / b, round by round."""
    found = [x / y for x, y in zip(timed[a], timed[b], strict=True)]
    return f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]"


def endless(made: Callable[[int], Iterator[list[Tensor]]]) -> Iterator[list[Tensor]]:
    epoch = 0
    while True:
        yield from made(epoch)
        epoch += 1


def measure(name: str, device: torch.device, rounds: int) -> None:
    """Print the three ratios of one setting."""
    network, layers, kind_name, small, large, steps = SETTINGS[name]
    batch, kind = (large if device.type == "cuda" else small), {**train.AUGMENTATION[kind_name]}
    pixels = torch.randint(0, 256, (max(2000, 2 * batch), 3, 32, 32), dtype=torch.uint8, device=device)
    empty, flat = torch.zeros(0, device=device), torch.zeros(3, 1, 1, device=device)
    data = images.Images(pixels, empty, pixels, empty, 10, flat, flat + 1, "")
    args = train.parse_args(["--batch", str(batch)])
    args.data_set = kind_name
    ours = endless(lambda epoch: train.batches(args, data, epoch, slice(0, batch)))
    step = stepper(network, layers, device, torch.channels_last)
    plain_step = stepper(network, layers, device, torch.contiguous_format)
    ready = next(ours)
    pillow = Pillow(pixels[:2000], kind, batch * (steps + 6))

    def plain_round() -> float:
        """Loader workers of its own, which are gone when the other kinds are timed; six batches to get going."""
        plain = iter(DataLoader(pillow, batch, num_workers=2))

        def once() -> None:
            plain_step([view.to(device) for view in next(plain)]).item()

        for _ in range(6):
            once()
        return seconds(steps, device, once)

    work = {
        "views": lambda: seconds(steps, device, lambda: next(ours)),
        "bare": lambda: seconds(steps, device, lambda: step(ready)),
        "step": lambda: seconds(steps, device, lambda: step(next(ours))),
        "plain": plain_round,
    }
    timed = in_turn(work, rounds)
    rate = batch / statistics.median(timed["step"])
    print(
        f"{name}, batch {batch}: step / bare {ratio(timed, 'step', 'bare')}, views / step "
        f"{ratio(timed, 'views', 'step')}, plain / step {ratio(timed, 'plain', 'step')} ({rate:.0f} images/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def dense_alignment(s: Tensor, h: Tensor, active: int) -> Tensor:
    """1 - cos(s, zK) as it is usually written, (B,)."""
    return 1 - torch.nn.functional.cosine_similarity(s, bsa.train.topk_code(h.detach(), active), dim=1)


def measure_bsa(device: torch.device, rounds: int, steps: int = 5) -> None:
    """Print the three ratios of BSA."""
    batch, width, latent, active = 256, 384, 4096, 64
    model = bsa.train.BSA(width, latent, active, "sparse", 0).to(device)
    x = model.normalise(torch.randn(batch, width, device=device))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    wide, narrow = torch.randn(batch, latent, device=device), torch.randn(batch, width, device=device)
    logits = (2 * wide).requires_grad_()
    weights = (model.encoder.weight.detach(), model.decoder.weight.detach())

    def step() -> None:
        loss, _ = bsa.train.bsa_loss(
            model, x, active=active, alpha=1.0, reconstruction="cosine", alignment="cosine", target="binary",
            reduction="mean", code="round", precision="float32",
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def floor() -> None:
        for a, b in ((x, weights[0].T), (wide, weights[1].T), (narrow, weights[1]), (narrow.T, wide), (wide.T, x)):
            a @ b

    def align(loss: Callable) -> None:
        loss(logits.sigmoid(), logits).mean().backward()

    work: dict[str, Callable[[], object]] = {
        "floor": floor,
        "step": step,
        "closed": lambda: align(lambda s, h: bsa.train.alignment_loss(s, h, active, "cosine")),
        "dense": lambda: align(lambda s, h: dense_alignment(s, h, active)),
        "largest": lambda: wide.topk(active, dim=1),
        "adam": optimizer.step,
    }
    timed = in_turn({which: functools.partial(seconds, steps, device, once) for which, once in work.items()}, rounds)
    rate = batch / statistics.median(timed["step"])
    print(
        f"BSA, N {latent}, K {active}, batch {batch}, d {width}: step / floor "
        f"{ratio(timed, 'step', 'floor')}, dense / closed {ratio(timed, 'dense', 'closed')}; of a step: largest K "
        f"{ratio(timed, 'largest', 'step')}, alignment loss {ratio(timed, 'closed', 'step')}, Adam "
        f"{ratio(timed, 'adam', 'step')} ({rate:.0f} rows/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def direct_terms(h: Tensor, weight: Tensor) -> Tensor:
    """L_var + L_cov of one chunk as equation 4 is usually written: a d x d covariance for every position."""
    x = (h @ weight.T).transpose(0, 1)
    x = x - x.mean(1, keepdim=True)
    covariances = x.mT @ x / (x.shape[1] - 1)
    variances = covariances.diagonal(dim1=1, dim2=2)
    off_diagonal = covariances.square().sum() - variances.square().sum()
    return F.relu(1 - (variances + seqvcr.train.ETA).sqrt()).mean() + off_diagonal / variances.numel()


def memory(device: torch.device, work: Callable[[], object]) -> float:
    """GiB that `work` held at most beyond what was there: on a CPU that of a forked process."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before = devices.peak_memory(device)
        work()
        os.write(writing, f"{(devices.peak_memory(device) - before) / 2**30}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        held = float(file.read())
    os.waitpid(child, 0)
    return held


class Minimal(nn.Module):
    """A GPT as most tutorials write it: attention by a masked softmax, logits at every position."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.gpt.wte(tokens) + self.gpt.wpe.weight[: tokens.shape[1]]
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        for block in self.gpt.h:
            q, k, v = (
                part.unflatten(2, (block.attn.heads, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
            )
            scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(future, float("-inf"))
            x = x + block.attn.c_proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return self.gpt.ln_f(x) @ self.gpt.wte.weight.T


def measure_seqvcr(device: torch.device, rounds: int) -> None:
    """Print the ratios of Seq-VCR."""
    h = torch.randn(32, 13, 256, device=device).requires_grad_()
    for width in (512, 1024, 2048, 4096):
        weight = (torch.randn(width, 256, device=device) / 32).requires_grad_()

        def ours(weight: Tensor = weight) -> None:
            variance, covariance, _ = seqvcr.train.variance_covariance(h, weight, 32)
            (variance + covariance).backward()

        def direct(weight: Tensor = weight) -> None:
            direct_terms(h, weight).backward()

        held = [memory(device, work) for work in (direct, ours)]
        work = {
            "direct": functools.partial(seconds, 1, device, direct),
            "ours": functools.partial(seconds, 5, device, ours),
        }
        timed = in_turn(work, rounds)
        print(
            f"Seq-VCR, d {width}: direct / ours {ratio(timed, 'direct', 'ours')} in time, {held[0]:.2f} / "
            f"{held[1]:.2f} GiB in memory ({1000 * statistics.median(timed['ours']):.1f} ms, {rounds} rounds)",
            flush=True,
        )

    task, batch = tasks.choose("multiplication", 4), 128
    rows = tasks.with_pauses(task, task.draw(None, batch, device, True), 2).long()
    models = {
        name: seqvcr.train.SeqVCR(GPT(len(task.symbols), 32, 3, 4, 128, 0.0, 0), 2048, 0).to(device)
        for name in ("off", "on", "plain")
    }
    optimizers = {
        name: seqvcr.train.build_optimizer(argparse.Namespace(lr=1e-4), model) for name, model in models.items()
    }
    optimizers["plain"] = torch.optim.AdamW(models["plain"].gpt.parameters(), 1e-4, foreach=False)
    minimal = Minimal(models["plain"].gpt)

    def step(name: str, lambda1: float, lambda2: float) -> None:
        loss, _ = seqvcr.train.seqvcr_loss(
            models[name], rows, answer=task.answer, lambda1=lambda1, lambda2=lambda2, layer=0, axis="batch",
            covariance_batch=32, precision="auto",
        )  # fmt: skip
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[name].step()

    def plain() -> None:
        wanted = rows[:, 1:].clone()
        wanted[:, : -task.answer] = -100
        loss = F.cross_entropy(minimal(rows[:, :-1]).flatten(0, 1), wanted.flatten())
        optimizers["plain"].zero_grad()
        loss.backward()
        optimizers["plain"].step()
        loss.item()

    steps = {"off": lambda: step("off", 0, 0), "on": lambda: step("on", 1.0, 0.004), "plain": plain}
    timed = in_turn({name: functools.partial(seconds, 3, device, once) for name, once in steps.items()}, rounds)
    rate = batch * (rows.shape[1] - 1) / statistics.median(timed["off"])
    print(
        f"Seq-VCR, 3 blocks of 128, batch {batch}, {rows.shape[1] - 1} tokens: on / off {ratio(timed, 'on', 'off')}, "
        f"plain / off {ratio(timed, 'plain', 'off')} ({rate:.0f} tokens/s without the regulariser, {rounds} rounds)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=cli.int_min(1), default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = devices.select_device(args.device, "demo")
    measure_seqvcr(device, args.rounds)
    measure_bsa(device, args.rounds)
    bench_cocord.main(device, args.rounds)
    bench_conmim.main(device, args.rounds)
    for name in SETTINGS:
        measure(name, device, args.rounds)


if __name__ == "__main__":
    main()
