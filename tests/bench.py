"""Ratios of speed, not seconds: `make bench`. Medians over paired rounds on one machine, one thread unless on a GPU.

step / bare     our whole training step over forward, backward and optimiser of the same network on ready tensors
plain / step    a plain reference over our step: Pillow augmentation in two DataLoader workers, contiguous
                tensors, `.item()` at every step; the same network, loss and optimiser
views / step    share of our step that picking, augmenting and normalising the views takes

CoCoRD: bench_cocord.py says what is counted and timed.

BSA, at N = 4096, K = 64, batch 256 and 384 channels:

step / floor    our whole training step over its five matrix products alone
dense / closed  the alignment loss with its target of width N written out over the closed form, forward and backward
parts           what the largest K, the alignment loss (with them) and Adam take of a step
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import bench_cocord
import bsa.train
from common import command, devices, images
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
        self.view = v2.Compose([train.worker_view(**kind), v2.ToDtype(torch.float32, scale=True)])
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
    optimizer = train.build_optimizer(model, 0.01, 5e-4, "constant")

    def step(views: list[Tensor]) -> Tensor:
        with devices.autocast("auto", device):
            p, z = model(views, PAIRS, 0.0)
        loss = train.simsiam_loss(p, z, PAIRS, 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


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
    ours = endless(lambda epoch: train.batches(data, kind, 2, batch, slice(0, batch), 0, epoch))
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
    timed: dict[str, list[float]] = {which: [] for which in work}
    for number in range(rounds + 1):
        for which, timing in work.items():
            spent = timing()
            if number:  # the first round warms up
                timed[which].append(spent)

    def ratio(a: str, b: str) -> str:
        found = [x / y for x, y in zip(timed[a], timed[b], strict=True)]
        return f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]"

    rate = batch / statistics.median(timed["step"])
    print(
        f"{name}, batch {batch}: step / bare {ratio('step', 'bare')}, views / step {ratio('views', 'step')}, "
        f"plain / step {ratio('plain', 'step')} ({rate:.0f} images/s, {rounds} rounds of {steps} steps)",
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
    losses = functools.partial(
        bsa.train.bsa_loss, active=active, alpha=1.0, reconstruction="cosine", alignment="cosine", target="binary",
        reduction="mean", code="round", precision="float32",
    )  # fmt: skip
    wide, narrow = torch.randn(batch, latent, device=device), torch.randn(batch, width, device=device)
    logits = (2 * wide).requires_grad_()
    weights = (model.encoder.weight.detach(), model.decoder.weight.detach())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(model, x)[0].backward()
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
    timed: dict[str, list[float]] = {which: [] for which in work}
    for number in range(rounds + 1):
        for which, once in work.items():
            spent = seconds(steps, device, once)
            if number:
                timed[which].append(spent)

    def ratio(a: str, b: str) -> str:
        found = [x / y for x, y in zip(timed[a], timed[b], strict=True)]
        return f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]"

    rate = batch / statistics.median(timed["step"])
    print(
        f"BSA, N {latent}, K {active}, batch {batch}, d {width}: step / floor {ratio('step', 'floor')}, "
        f"dense / closed {ratio('dense', 'closed')}; of a step: largest K {ratio('largest', 'step')}, alignment loss "
        f"{ratio('closed', 'step')}, Adam {ratio('adam', 'step')} ({rate:.0f} rows/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=command.whole(1), default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = devices.choose(args.device, "demo")
    measure_bsa(device, args.rounds)
    bench_cocord.main(device, args.rounds)
    for name in SETTINGS:
        measure(name, device, args.rounds)


if __name__ == "__main__":
    main()
