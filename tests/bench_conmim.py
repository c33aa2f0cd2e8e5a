"""ConMIM's share of `make bench`: the pre-training step at CIFAR size (ViT-Tiny/4, projector 2048) beside three others.

operations      kernels that PyTorch dispatches in one step after the first ones, views left out; ours and plain
floor / step    the step's own matrix products alone (with convolution and fused attention, whose products cannot be
                had apart), replayed on operands of the same shapes and strides: the share of the step that they take
outside / step  what is not the networks: views and masks, loss, clipping, AdamW, the average
plain / step    a reference of the authors' structure: two Pillow views an image in two DataLoader workers, rows of the
                logits picked by their mask, AdamW, clipping and average parameter by parameter, `.item()` and
                synchronisation at every step; the same network

Our step is that of `train` itself: `measured` takes the place of its loader and measures what happens between two
batches.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from operations import Counted, Products
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from common import devices, images
from conmim import train

PATCHES = 64


class Pillow(Dataset):
    """The basic and the strong view of each picture, and a mask, as the authors' data set makes them."""

    def __init__(self, pixels: Tensor, length: int):
        self.pictures = [Image.fromarray(np.ascontiguousarray(one.permute(1, 2, 0).cpu().numpy())) for one in pixels]
        self.views = train.WorkerViews(32, True, **train.augmentation("cifar"))
        self.scale, self.length = v2.ToDtype(torch.float32, scale=True), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, np.ndarray]:
        query, key = self.scale(self.views(self.pictures[index % len(self.pictures)])) * 2 - 1
        cells = np.zeros(PATCHES // 4, dtype=bool)
        cells[np.random.permutation(len(cells))[: math.ceil(0.75 * len(cells))]] = True
        side = round(len(cells) ** 0.5)
        return query, key, cells.reshape(side, side).repeat(2, axis=0).repeat(2, axis=1).reshape(-1)


class Plain:
    """One step after another, as the authors' loop is structured."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.model, self.device, self.seen, self.length = train.build_model(args, device), device, 0, 1000
        decayed, free = (
            group["params"] for group in train.build_optimizer(argparse.Namespace(lr=1e-3), self.model).param_groups
        )
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.98), foreach=False)
        self.meters: dict[str, float] = {}

    def step(self, query: Tensor, key: Tensor, mask: Tensor) -> None:
        query, key, mask = (one.to(self.device, non_blocking=True) for one in (query, key, mask))
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate(self.seen, 100, self.length, 1e-3)
        with devices.autocast("auto", self.device):
            with torch.no_grad():
                k = F.normalize(self.model.ema(key, None), dim=-1)
            q = F.normalize(self.model.online(query, mask), dim=-1)
            scores = torch.einsum("bnc,bmc->bnm", [q, k]) / 0.1
            places = torch.arange(PATCHES, device=self.device).repeat(len(q), 1)
            loss = F.cross_entropy(scores[mask].float(), places[mask])
        self.meters["loss"] = loss.item()
        if not math.isfinite(self.meters["loss"]):
            raise FloatingPointError
        self.optimizer.zero_grad()
        loss.backward()
        online = list(self.model.online.parameters())
        norm = nn.utils.clip_grad_norm_(online, 3.0, foreach=False)
        self.optimizer.step()
        momentum = train.momentum_at(self.seen, self.length, 0.996)
        with torch.no_grad():
            for slow, fast in zip(self.model.ema.parameters(), online, strict=True):
                slow.data = slow.data * momentum + fast.data * (1.0 - momentum)
        synchronise(self.device)
        self.meters |= {"accuracy": (scores[mask].argmax(-1) == places[mask]).float().mean().item()}
        self.meters |= {"norm": norm.item(), "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        self.seen = (self.seen + 1) % self.length


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(device: torch.device, rounds: int) -> None:
    size = 512 if device.type == "cuda" else 32
    args = train.parse_args(["--scale", "gpu", "--batch", str(size), "--epochs", "1", "--warm-up", "1000"])
    pixels = torch.randint(0, 256, (max(2000, 4 * size), 3, 32, 32), dtype=torch.uint8, device=device)
    labels, half = torch.zeros(len(pixels), device=device), torch.full((3, 1, 1), 0.5, device=device)
    data = images.Images(pixels, labels, pixels[:8], labels[:8], 10, half, half, "")  # 8: diagnostics are not timed

    model = train.build_model(args, device)
    ema, online = (list(branch.parameters()) for branch in (model.ema, model.online))
    optimizer = train.build_optimizer(args, model)
    plain, pillow = Plain(args, device), iter(DataLoader(Pillow(pixels[:2000], 10_000 * size), size, num_workers=2))
    q, k = torch.randn(2, size, PATCHES, 256, device=device)
    q.requires_grad_()
    batches, products = train.batches, Products()
    operations: dict[str, int] = {}
    timed: dict[str, list[float]] = {name: [] for name in ("step", "plain", "outside", "floor")}

    def endless() -> Iterator[train.Batch]:
        for epoch in itertools.count():
            yield from batches(args, data, epoch, slice(0, size))

    def outside(mask: Tensor) -> None:
        q.grad = None
        train.denoising_contrast(q, k, mask, 0.1).backward()
        nn.utils.clip_grad_norm_(online, train.CLIP, foreach=True)
        optimizer.step()
        train.ema_update(ema, online, 0.996)

    def measured(*_) -> Iterator[train.Batch]:
        """Batches for the loop of `train`, and all measurements in between."""
        loader = endless()
        yield next(loader)
        ready = next(loader)
        with Counted() as counter:
            yield ready
        operations["step"] = counter.operations
        plain.step(*next(pillow))
        views = next(pillow)
        with Counted() as counter:
            plain.step(*views)
        operations["plain"] = counter.operations
        ready = next(loader)
        with products:
            yield ready

        for number in range(rounds + 1):  # the first one warms up
            for name, times in timed.items():
                repeats = 5 if name == "outside" or device.type == "cuda" else 1
                synchronise(device)
                started = time.perf_counter()
                for _ in range(repeats):
                    if name == "step":
                        yield next(loader)
                    elif name == "plain":
                        plain.step(*next(pillow))
                    elif name == "outside":
                        outside(next(loader)[2])
                    else:
                        products.replay()
                synchronise(device)
                if number:
                    times.append((time.perf_counter() - started) / repeats)

    run = mock.Mock(**{"resume.return_value": None, "diverged.return_value": False})
    run.name = "bench"
    with mock.patch.object(train, "batches", measured):
        train.train(args, run, model, data, optimizer)

    def ratio(a: str, b: str) -> str:
        found = [x / y for x, y in zip(timed[a], timed[b], strict=True)]
        return f"{statistics.median(found):.3f} [{min(found):.3f}-{max(found):.3f}]"

    print(
        f"ConMIM, ViT-Tiny/4, projector 2048, batch {size}: operations {operations['step']} / {operations['plain']} "
        f"plain = {operations['step'] / operations['plain']:.2f}; floor / step {ratio('floor', 'step')}, "
        f"outside / step {ratio('outside', 'step')}, plain / step {ratio('plain', 'step')} "
        f"({size / statistics.median(timed['step']):.0f} images/s, {rounds} rounds)",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(torch.device("cpu"), 3)
