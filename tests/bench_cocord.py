"""Benchmark of CoCoRD (`make bench`): number of operations and speed of a training step and of a plain reference.

operations  kernels that PyTorch dispatches in one training step after a warm-up, without tensor views
plain       a reference implementation with the same networks, losses and weights, in the usual style: three
            Pillow crops per image in two DataLoader workers, EMA and SGD parameter by parameter, a copy of the queue,
            no folded batch norms, `.item()` for each metric in every step, contiguous tensors
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from conftest import FakeRun
from operations import OperationCounter
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cocord import net, train
from common import devices, images

PAIRS = ("resnet56-resnet20", "resnet110-resnet32", "vgg13-vgg8")
BATCH = 64


class PillowDataset(Dataset):
    """Three random views of a Pillow image by torchvision transforms, and its label; repeats up to `length` samples."""

    def __init__(self, pixels: Tensor, labels: Tensor, length: int):
        arrays = [image.permute(1, 2, 0).cpu().numpy() for image in pixels]
        self.images = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
        self.labels, self.length = labels.tolist(), length
        self.view = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        index %= len(self.images)
        return [self.view(self.images[index]) for _ in range(3)], self.labels[index]


class PlainReference:
    """The training step of the plain reference."""

    def __init__(self, pair: str, device: torch.device):
        self.device = device
        self.model, self.teacher = networks(arguments(pair), device, torch.contiguous_format)
        parameters = [*self.model.parameters(), *self.teacher.parameters()]
        self.optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4, foreach=False)
        self.pointer = 0
        self.metrics: dict[str, float] = {}

    def ema_update(self, ema_module: nn.Module, online_module: nn.Module, momentum: float) -> None:
        for ema, online in zip(ema_module.parameters(), online_module.parameters(), strict=True):
            ema.data = ema.data * momentum + online.data * (1.0 - momentum)

    def step(self, views: list[Tensor], labels: Tensor) -> None:
        m = self.model
        x, swapped_x, teacher_x = (view.to(self.device) for view in views)
        labels = labels.to(self.device)
        with devices.autocast("auto", self.device):
            feature, logits = m.student(x)
            z, swapped_z = m.head(feature), m.head(m.student(swapped_x)[0])
            p, swapped_p = m.predictor(z), m.predictor(swapped_z)
        q, p, swapped_p, logits = F.normalize(z.float(), dim=1), p.float(), swapped_p.float(), logits.float()
        with torch.no_grad(), devices.autocast("auto", self.device):
            self.ema_update(m.slow_student, m.student, 0.9)
            self.ema_update(m.slow_head, m.head, 0.9)
            self.ema_update(m.teacher_head, m.head, 0.999)
            k = F.normalize(m.teacher_head(self.teacher(teacher_x)[0]).float(), dim=1)
            u, swapped_u = (m.slow_head(m.slow_student(view)[0]).float() for view in (swapped_x, x))
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, m.queue.T.clone().detach()])
        similarities = torch.cat([positive, negative], dim=1) / 0.1
        zeros = torch.zeros(len(similarities), dtype=torch.long, device=self.device)
        contrast = F.cross_entropy(similarities, zeros)
        predictions = [
            2 - 2 * (F.normalize(a, dim=-1) * F.normalize(b.detach(), dim=-1)).sum(dim=-1).mean()
            for a, b in ((p, u), (swapped_p, swapped_u))
        ]
        class_loss = F.cross_entropy(logits, labels)
        loss = contrast + class_loss + 4 * (predictions[0] + predictions[1])
        until_end = min(len(k), len(m.queue) - self.pointer)  # keys before the ring buffer wraps around
        m.queue[self.pointer : self.pointer + until_end] = k[:until_end]
        m.queue[: len(k) - until_end] = k[until_end:]
        self.pointer = (self.pointer + len(k)) % len(m.queue)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for name, (output, target) in {"contrast": (similarities, zeros), "class": (logits, labels)}.items():
            correct = output.topk(5, 1)[1].t().eq(target.view(1, -1))
            for k in (1, 5):
                accuracy = correct[:k].reshape(-1).float().sum(0).mul_(100 / len(target))
                self.metrics[f"{name} top-{k}"] = accuracy.item()
        losses = (loss, contrast, class_loss, *predictions)
        for name, value in zip(("loss", "contrast", "class", "forward", "swapped"), losses, strict=True):
            self.metrics[name] = value.item()


def arguments(pair: str) -> argparse.Namespace:
    """Return the arguments of a pair TEACHER-STUDENT at gpu scale (the authors' widths)."""
    teacher, student = pair.split("-")
    return train.parse_args(["--scale", "gpu", "--teacher", teacher, "--student", student, "--batch", str(BATCH)])


def networks(
    args: argparse.Namespace, device: torch.device, layout: torch.memory_format
) -> tuple[train.CoCoRD, nn.Module]:
    """Return the model and an untrained teacher."""
    teacher = net.build(args.teacher, 100).eval().requires_grad_(False)
    return train.build_model(args, 100, device).to(memory_format=layout), teacher.to(device, memory_format=layout)


class OneEpoch(FakeRun):
    """A fake run that skips the metrics of epoch 0 and stops after the training steps of the first epoch."""

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        self.extra = {"probe": None}
        return 0

    def finish_if_diverged(self, epoch: int, totals: Tensor) -> bool:
        self.totals = totals
        return True


def measure(pair: str, device: torch.device, rounds: int, steps: int = 2) -> None:
    """Print number of operations and speed of one pair: the loop of train.py ("ours") and the plain reference."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40 * BATCH, 3, 32, 32), dtype=torch.uint8, generator=rng).to(device)
    labels = torch.arange(len(pixels), device=device) % 100
    mean = torch.full((3, 1, 1), 0.5, device=device)
    data = images.Images(pixels, labels, pixels, labels, 100, mean, mean / 2, "")
    args, plain, batches = arguments(pair), PlainReference(pair, device), train.batches
    model, teacher = networks(args, device, torch.channels_last)
    optimizer = train.build_optimizer(args, [model.student, model.head, model.predictor])
    pillow = iter(DataLoader(PillowDataset(pixels[:2000], labels, BATCH * 10_000), BATCH, num_workers=2))
    operations: dict[str, int] = {}
    step_seconds: dict[str, list[float]] = {"ours": [], "plain": []}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def measured_batches(*_) -> Iterator:
        """Replace `train.batches`: the loop runs one step of ours per `yield`; plain steps run in between."""
        endless = (batch for epoch in itertools.count() for batch in batches(args, data, epoch))
        for _ in range(2):
            yield next(endless)
        with OperationCounter() as counter:
            yield next(endless)
        operations["ours"] = counter.operations
        for _ in range(2):
            plain.step(*next(pillow))
        with OperationCounter() as counter:
            plain.step(*next(pillow))
        operations["plain"] = counter.operations
        for _ in range(rounds):
            yield next(endless)
            start_time = now()
            for _ in range(steps):
                yield next(endless)
            step_seconds["ours"].append((now() - start_time) / steps)
            plain.step(*next(pillow))
            start_time = now()
            for _ in range(steps):
                plain.step(*next(pillow))
            step_seconds["plain"].append((now() - start_time) / steps)

    with mock.patch.object(train, "batches", measured_batches):
        train.train(args, OneEpoch(), model, data, optimizer, train.Teacher(net.fold_batch_norms(teacher)))
    ratios = [plain / ours for ours, plain in zip(step_seconds["ours"], step_seconds["plain"], strict=True)]
    print(
        f"CoCoRD, {pair}, batch {BATCH}: operations {operations['ours']} / {operations['plain']} plain = "
        f"{operations['ours'] / operations['plain']:.2f}; plain / step {statistics.median(ratios):.2f} "
        f"[{min(ratios):.2f}-{max(ratios):.2f}] ({BATCH / statistics.median(step_seconds['ours']):.0f} images/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def main(device: torch.device, rounds: int) -> None:
    for pair in PAIRS:
        measure(pair, device, rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(torch.device("cpu"), 3)
