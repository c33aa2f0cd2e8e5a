"""Benchmark of a ConMIM training step at CIFAR size (ViT-Tiny/4, projector width 2048), part of `make bench`.

operations      operations that PyTorch dispatches in one step after warm-up, views excluded: ours and the reference's
floor / step    time of the step's matrix products alone (with convolution and fused attention, whose products cannot be
                separated), replayed on operands of the same shapes and strides, as a share of the step
outside / step  time outside the networks as a share of the step: views and masks, loss, clipping, AdamW, EMA
plain / step    time of a reference written like the authors' code, relative to the step: the same network, two Pillow
                views per image from two DataLoader workers, logits indexed by the mask, AdamW, clipping and EMA
                parameter by parameter, `.item()` and synchronisation in every step

Our step is the loop of `train.train`. `measuring_batches` replaces its data loader and measures the time between two
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
from operations import MatrixProducts, OperationCounter
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from common import devices, images
from conmim import train

PATCHES = 64


class PillowViews(Dataset):
    """Basic view, strong view and mask of each image, like the authors' data set."""

    def __init__(self, pixels: Tensor, length: int):
        arrays = [np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]
        self.images = [Image.fromarray(array) for array in arrays]
        self.views = train.WorkerViews(32, True, **train.augmentation("cifar"))
        self.scale, self.length = v2.ToDtype(torch.float32, scale=True), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, np.ndarray]:
        query, key = self.scale(self.views(self.images[index % len(self.images)])) * 2 - 1
        cells = np.zeros(PATCHES // 4, dtype=bool)
        cells[np.random.permutation(len(cells))[: math.ceil(0.75 * len(cells))]] = True
        side = round(len(cells) ** 0.5)
        return query, key, cells.reshape(side, side).repeat(2, axis=0).repeat(2, axis=1).reshape(-1)


class Reference:
    """A training loop with the structure of the authors' loop."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.model, self.device = train.build_model(args, device), device
        self.steps, self.total_steps = 0, 1000
        decay, no_decay = (
            group["params"] for group in train.build_optimizer(argparse.Namespace(lr=1e-3), self.model).param_groups
        )
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.98), foreach=False)
        self.meters: dict[str, float] = {}

    def step(self, query: Tensor, key: Tensor, mask: Tensor) -> None:
        query, key, mask = (tensor.to(self.device, non_blocking=True) for tensor in (query, key, mask))
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate(self.steps, 100, self.total_steps, 1e-3)
        with devices.autocast("auto", self.device):
            with torch.no_grad():
                k = F.normalize(self.model.ema(key, None), dim=-1)
            q = F.normalize(self.model.online(query, mask), dim=-1)
            logits = torch.einsum("bnc,bmc->bnm", [q, k]) / 0.1
            positions = torch.arange(PATCHES, device=self.device).repeat(len(q), 1)
            loss = F.cross_entropy(logits[mask].float(), positions[mask])
        self.meters["loss"] = loss.item()
        if not math.isfinite(self.meters["loss"]):
            raise FloatingPointError
        self.optimizer.zero_grad()
        loss.backward()
        online = list(self.model.online.parameters())
        norm = nn.utils.clip_grad_norm_(online, 3.0, foreach=False)
        self.optimizer.step()
        momentum = train.ema_momentum(self.steps, self.total_steps, 0.996)
        with torch.no_grad():
            for ema_weight, weight in zip(self.model.ema.parameters(), online, strict=True):
                ema_weight.data = ema_weight.data * momentum + weight.data * (1.0 - momentum)
        synchronise(self.device)
        self.meters |= {"accuracy": (logits[mask].argmax(-1) == positions[mask]).float().mean().item()}
        self.meters |= {"norm": norm.item(), "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        self.steps = (self.steps + 1) % self.total_steps


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(device: torch.device, rounds: int) -> None:
    """Print the measurements; `rounds` is the number of repetitions."""
    batch = 512 if device.type == "cuda" else 32
    args = train.parse_args(["--scale", "gpu", "--batch", str(batch), "--epochs", "1", "--warm-up", "1000"])
    pixels = torch.randint(0, 256, (max(2000, 4 * batch), 3, 32, 32), dtype=torch.uint8, device=device)
    labels, half = torch.zeros(len(pixels), device=device), torch.full((3, 1, 1), 0.5, device=device)
    # Eight test images are enough, because the diagnostics are not timed.
    data = images.Images(pixels, labels, pixels[:8], labels[:8], 10, half, half, "")

    model = train.build_model(args, device)
    ema, online = (list(branch.parameters()) for branch in (model.ema, model.online))
    optimizer = train.build_optimizer(args, model)
    reference = Reference(args, device)
    reference_batches = iter(DataLoader(PillowViews(pixels[:2000], 10_000 * batch), batch, num_workers=2))
    q, k = torch.randn(2, batch, PATCHES, 256, device=device)
    q.requires_grad_()
    batches, products = train.batches, MatrixProducts()
    operations: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in ("step", "plain", "outside", "floor")}

    def endless_batches() -> Iterator[train.Batch]:
        for epoch in itertools.count():
            yield from batches(args, data, epoch, slice(0, batch))

    def step_outside_networks(mask: Tensor) -> None:
        q.grad = None
        train.denoising_contrast(q, k, mask, 0.1).backward()
        nn.utils.clip_grad_norm_(online, args.clip, foreach=True)
        optimizer.step()
        train.ema_update(ema, online, 0.996)

    def measuring_batches(*_) -> Iterator[train.Batch]:
        """Yield batches to the loop of `train.train`, and measure between them."""
        loader = endless_batches()
        yield next(loader)
        next_batch = next(loader)
        with OperationCounter() as counter:
            yield next_batch
        operations["step"] = counter.operations
        reference.step(*next(reference_batches))
        reference_batch = next(reference_batches)
        with OperationCounter() as counter:
            reference.step(*reference_batch)
        operations["plain"] = counter.operations
        next_batch = next(loader)
        with products:
            yield next_batch

        for number in range(rounds + 1):  # round 0 is warm-up
            for name in times:
                repeats = 5 if name == "outside" or device.type == "cuda" else 1
                synchronise(device)
                started = time.perf_counter()
                for _ in range(repeats):
                    if name == "step":
                        yield next(loader)
                    elif name == "plain":
                        reference.step(*next(reference_batches))
                    elif name == "outside":
                        step_outside_networks(next(loader)[2])
                    else:
                        products.replay()
                synchronise(device)
                if number:
                    times[name].append((time.perf_counter() - started) / repeats)

    run = mock.Mock(**{"resume.return_value": None, "finish_if_diverged.return_value": False})
    run.name = "bench"
    with mock.patch.object(train, "batches", measuring_batches):
        train.train(args, run, model, data, optimizer)

    def ratio(a: str, b: str) -> str:
        ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
        return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]"

    print(
        f"ConMIM, ViT-Tiny/4, projector 2048, batch {batch}: operations {operations['step']} / {operations['plain']} "
        f"plain = {operations['step'] / operations['plain']:.2f}; floor / step {ratio('floor', 'step')}, "
        f"outside / step {ratio('outside', 'step')}, plain / step {ratio('plain', 'step')} "
        f"({batch / statistics.median(times['step']):.0f} images/s, {rounds} rounds)",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(torch.device("cpu"), 3)
