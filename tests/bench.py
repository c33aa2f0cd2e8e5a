"""Measure speed ratios (`make bench`): medians over paired rounds on one machine, with one thread unless on a GPU.

SimSiam:

step / bare     time of our complete training step / the same step (forward, backward, optimiser) on ready-made views
plain / step    time of a plain reference step / our step. The reference augments PIL images in two DataLoader workers
                and uses contiguous tensors and `.item()` at every step; network, loss and optimiser are the same
views / step    share of our step spent on indexing, augmenting and normalising the views

CoCoRD and ConMIM: see bench_cocord.py and bench_conmim.py.

BSA (N = 4096, K = 64, batch size 256, 384 channels):

step / floor    time of our complete training step / its five matrix products
dense / closed  time of the alignment loss with a dense target of width N / in closed form, forward and backward
of a step       shares of top-K, of the alignment loss (top-K included) and of Adam

Seq-VCR (regulariser: 32 sequences of 13 tokens, 256 channels, forward and backward; network: 3 blocks of width 128):

direct / ours   time and extra memory of equation 4 with d x d covariance matrices / of `variance_covariance`
on / off        time of our complete step with the regulariser (d = 2048) / without
plain / off     time of a minimal GPT of the same shape / our step without the regulariser. The minimal GPT has an
                explicit attention matrix, logits at all positions, non-fused AdamW and `.item()` at every step
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

SETTINGS = {  # name: (network, projector layers, augmentation, batch size on CPU, batch size on GPU, steps per round)
    "demo, ResNet-8": ("resnet8", 2, "glyphs", 32, 64, 40),
    "CIFAR, ResNet-18": ("resnet18", 2, "cifar", 8, 512, 3),
}
PAIRS = train.PAIRS["symmetric"]


class PillowViews(Dataset):
    """Two views of each PIL image by torchvision's transforms, as in most implementations. Images repeat."""

    def __init__(self, pixels: Tensor, aug: dict, length: int):
        self.images = [Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).cpu().numpy())) for x in pixels]
        self.view = v2.Compose([train.torchvision_view(aug), v2.ToDtype(torch.float32, scale=True)])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.images[index % len(self.images)]
        return [self.view(image), self.view(image)]


def seconds_per_step(steps: int, device: torch.device, step: Callable[[], None]) -> float:
    """Return the mean wall time of a step over `steps` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def build_step(network: str, layers: int, device: torch.device, memory_format: torch.memory_format) -> Callable:
    """Return a function that performs one optimiser step on a list of views and returns the loss."""
    model = train.SimSiam(network, 32, "mlp", layers, train.NETWORKS[network][1], "mlp", 0)
    model = model.to(device, memory_format=memory_format)
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


Times = dict[str, list[float]]


def time_in_rounds(timers: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Call each timer once per round and return its results by name. A first round for warm-up is discarded."""
    times: Times = {name: [] for name in timers}
    for i in range(rounds + 1):
        for name, timer in timers.items():
            seconds = timer()
            if i > 0:
                times[name].append(seconds)
    return times


def ratio(times: Times, a: str, b: str) -> str:
    """Return median, minimum and maximum of a / b over the rounds, as text."""
    ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


def endless(epoch_batches: Callable[[int], Iterator[list[Tensor]]]) -> Iterator[list[Tensor]]:
    """Yield the batches of epoch 0, 1, 2, ... without end."""
    epoch = 0
    while True:
        yield from epoch_batches(epoch)
        epoch += 1


def measure_simsiam(name: str, device: torch.device, rounds: int) -> None:
    """Print the three ratios of SimSiam in one of SETTINGS."""
    network, layers, aug_name, cpu_batch, gpu_batch, steps = SETTINGS[name]
    batch = gpu_batch if device.type == "cuda" else cpu_batch
    aug = train.AUGMENTATION[aug_name]
    pixels = torch.randint(0, 256, (max(2000, 2 * batch), 3, 32, 32), dtype=torch.uint8, device=device)
    empty, flat = torch.zeros(0, device=device), torch.zeros(3, 1, 1, device=device)
    data = images.Images(pixels, empty, pixels, empty, 10, flat, flat + 1, "")
    args = train.parse_args(["--batch", str(batch)])
    args.data_set = aug_name
    loader = endless(lambda epoch: train.batches(args, data, epoch, slice(0, batch)))
    step = build_step(network, layers, device, torch.channels_last)
    plain_step = build_step(network, layers, device, torch.contiguous_format)
    ready_views = next(loader)
    dataset = PillowViews(pixels[:2000], aug, batch * (steps + 6))

    def time_plain_steps() -> float:
        """Time plain steps with new DataLoader workers, which have ended before the other timers run."""
        plain_loader = iter(DataLoader(dataset, batch, num_workers=2))

        def run_step() -> None:
            plain_step([view.to(device) for view in next(plain_loader)]).item()

        for _ in range(6):  # warm-up
            run_step()
        return seconds_per_step(steps, device, run_step)

    timers = {
        "views": lambda: seconds_per_step(steps, device, lambda: next(loader)),
        "bare": lambda: seconds_per_step(steps, device, lambda: step(ready_views)),
        "step": lambda: seconds_per_step(steps, device, lambda: step(next(loader))),
        "plain": time_plain_steps,
    }
    times = time_in_rounds(timers, rounds)
    rate = batch / statistics.median(times["step"])
    print(
        f"{name}, batch size {batch}: step / bare {ratio(times, 'step', 'bare')}, views / step "
        f"{ratio(times, 'views', 'step')}, plain / step {ratio(times, 'plain', 'step')} ({rate:.0f} images/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def dense_alignment(s: Tensor, h: Tensor, active: int) -> Tensor:
    """Return 1 - cos(s, zK) of each row, (B,), with a dense target zK."""
    return 1 - torch.nn.functional.cosine_similarity(s, bsa.train.topk_code(h.detach(), active), dim=1)


def measure_bsa(device: torch.device, rounds: int, steps: int = 5) -> None:
    """Print the ratios of BSA."""
    batch, width, latent, active = 256, 384, 4096, 64
    model = bsa.train.BSA(width, latent, active, "sparse", 0).to(device)
    x = model.normalise(torch.randn(batch, width, device=device))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    codes, outputs = torch.randn(batch, latent, device=device), torch.randn(batch, width, device=device)
    logits = (2 * codes).requires_grad_()
    encoder, decoder = model.encoder.weight.detach(), model.decoder.weight.detach()

    def step() -> None:
        loss, _ = bsa.train.bsa_loss(
            model, x, active=active, alpha=1.0, reconstruction="cosine", alignment="cosine", target="binary",
            reduction="mean", code="round", precision="float32",
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def matrix_products() -> None:
        x @ encoder.T  # forward: encoder, then decoder
        codes @ decoder.T
        outputs @ decoder  # backward: gradients of the codes, the decoder and the encoder
        outputs.T @ codes
        codes.T @ x

    def forward_backward(loss: Callable) -> None:
        loss(logits.sigmoid(), logits).mean().backward()

    work: dict[str, Callable[[], object]] = {
        "floor": matrix_products,
        "step": step,
        "closed": lambda: forward_backward(lambda s, h: bsa.train.alignment_loss(s, h, active, "cosine")),
        "dense": lambda: forward_backward(lambda s, h: dense_alignment(s, h, active)),
        "top-K": lambda: codes.topk(active, dim=1),
        "adam": optimizer.step,
    }
    timers = {name: functools.partial(seconds_per_step, steps, device, function) for name, function in work.items()}
    times = time_in_rounds(timers, rounds)
    rate = batch / statistics.median(times["step"])
    print(
        f"BSA, N {latent}, K {active}, batch size {batch}, d {width}: step / floor {ratio(times, 'step', 'floor')}, "
        f"dense / closed {ratio(times, 'dense', 'closed')}; of a step: top-K {ratio(times, 'top-K', 'step')}, "
        f"alignment loss {ratio(times, 'closed', 'step')}, Adam {ratio(times, 'adam', 'step')} ({rate:.0f} rows/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def direct_terms(h: Tensor, weight: Tensor) -> Tensor:
    """Return L_var + L_cov of one chunk by equation 4 as written, with a d x d covariance matrix per position."""
    x = (h @ weight.T).transpose(0, 1)
    x = x - x.mean(1, keepdim=True)
    covariances = x.mT @ x / (x.shape[1] - 1)
    variances = covariances.diagonal(dim1=1, dim2=2)
    off_diagonal = covariances.square().sum() - variances.square().sum()
    return F.relu(1 - (variances + seqvcr.train.ETA).sqrt()).mean() + off_diagonal / variances.numel()


def extra_memory(device: torch.device, work: Callable[[], object]) -> float:
    """Return the peak memory of `work` in GiB, minus the memory in use before. On a CPU it runs in a forked process."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = devices.peak_memory(device)
        work()
        os.write(write_end, f"{(devices.peak_memory(device) - before) / 2**30}".encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        gibibytes = float(file.read())
    os.waitpid(pid, 0)
    return gibibytes


class MinimalGPT(nn.Module):
    """A GPT as in most tutorials, with the weights of `gpt`: masked softmax attention, logits at every position."""

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

        direct_memory, our_memory = extra_memory(device, direct), extra_memory(device, ours)
        timers = {
            "direct": functools.partial(seconds_per_step, 1, device, direct),
            "ours": functools.partial(seconds_per_step, 5, device, ours),
        }
        times = time_in_rounds(timers, rounds)
        print(
            f"Seq-VCR, d {width}: direct / ours {ratio(times, 'direct', 'ours')} in time, {direct_memory:.2f} / "
            f"{our_memory:.2f} GiB in memory ({1000 * statistics.median(times['ours']):.1f} ms, {rounds} rounds)",
            flush=True,
        )

    task, batch = tasks.build_task("multiplication", 4), 128
    rows = tasks.with_pauses(task, task.draw(None, batch, device, True), 2).long()
    models = {
        name: seqvcr.train.SeqVCR(GPT(len(task.symbols), 32, 3, 4, 128, 0.0, 0), 2048, 0).to(device)
        for name in ("off", "on", "plain")
    }
    optimizers = {
        name: seqvcr.train.build_optimizer(argparse.Namespace(lr=1e-4), model) for name, model in models.items()
    }
    optimizers["plain"] = torch.optim.AdamW(models["plain"].gpt.parameters(), 1e-4, foreach=False)
    minimal = MinimalGPT(models["plain"].gpt)

    def step(name: str, lambda1: float, lambda2: float) -> None:
        loss, _ = seqvcr.train.seqvcr_loss(
            models[name], rows, n_targets=task.answer, lambda1=lambda1, lambda2=lambda2, layer=0, axis="batch",
            covariance_batch=32, precision="auto",
        )  # fmt: skip
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[name].step()

    def plain() -> None:
        targets = rows[:, 1:].clone()
        targets[:, : -task.answer] = -100  # ignored by cross_entropy
        with devices.autocast("auto", device):
            loss = F.cross_entropy(minimal(rows[:, :-1]).flatten(0, 1), targets.flatten())
        optimizers["plain"].zero_grad()
        loss.backward()
        optimizers["plain"].step()
        loss.item()

    steps = {"off": lambda: step("off", 0, 0), "on": lambda: step("on", 1.0, 0.004), "plain": plain}
    timers = {name: functools.partial(seconds_per_step, 3, device, function) for name, function in steps.items()}
    times = time_in_rounds(timers, rounds)
    rate = batch * (rows.shape[1] - 1) / statistics.median(times["off"])
    print(
        f"Seq-VCR, 3 blocks of width 128, batch size {batch}, {rows.shape[1] - 1} tokens: on / off "
        f"{ratio(times, 'on', 'off')}, plain / off {ratio(times, 'plain', 'off')} ({rate:.0f} tokens/s without the "
        f"regulariser, {rounds} rounds)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=cli.int_in(1), default=5, help="timed rounds; ratios are medians over them")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = devices.select_device(args.device, "demo")
    measure_seqvcr(device, args.rounds)
    measure_bsa(device, args.rounds)
    bench_cocord.main(device, args.rounds)
    bench_conmim.main(device, args.rounds)
    for name in SETTINGS:
        measure_simsiam(name, device, args.rounds)


if __name__ == "__main__":
    main()
