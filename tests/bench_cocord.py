"""CoCoRD's share of `make bench`: operations dispatched in a step, and the step's speed, beside a plain reference.

operations  kernels that PyTorch dispatches in one training step after the first ones, views left out
plain       a reference with the structure of common code: three Pillow crops an image in two DataLoader workers, moving
            averages and SGD parameter by parameter, a copy of the queue, the teacher as it was trained, meters read by
            `.item()` at every step, contiguous tensors; the same networks, losses and weights
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
from conftest import Unwritten
from operations import Counted
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cocord import net, train
from common import images

PAIRS = ("resnet56-resnet20", "resnet110-resnet32", "vgg13-vgg8")
BATCH = 64


class Pillow(Dataset):
    """Three crops of each picture by torchvision's transforms on Pillow images, and the label."""

    def __init__(self, pixels: Tensor, labels: Tensor, length: int):
        self.pictures = [Image.fromarray(np.ascontiguousarray(one.permute(1, 2, 0).cpu().numpy())) for one in pixels]
        self.labels, self.length = labels.tolist(), length
        norm = v2.Normalize((0.5,) * 3, (0.25,) * 3)
        crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self.view = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), norm])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        place = index % len(self.pictures)
        return [self.view(self.pictures[place]) for _ in range(3)], self.labels[place]


class Plain:
    """One step after another, as common code writes it."""

    def __init__(self, pair: str, device: torch.device):
        self.model, self.teacher, self.device = *networks(arguments(pair), device, torch.contiguous_format), device
        every = [*self.model.parameters(), *self.teacher.parameters()]
        self.optimizer = torch.optim.SGD(every, 0.05, momentum=0.9, weight_decay=5e-4, foreach=False)
        self.pointer = 0
        self.meters: dict[str, float] = {}

    def move(self, slow: nn.Module, fast: nn.Module, momentum: float) -> None:
        for one, other in zip(slow.parameters(), fast.parameters(), strict=True):
            one.data = one.data * momentum + other.data * (1.0 - momentum)

    def step(self, views: list[Tensor], labels: Tensor) -> None:
        m, (x, swapped_x, teacher_x) = self.model, (view.to(self.device) for view in views)
        labels = labels.to(self.device)
        feature, logits = m.student(x)
        z, swapped_z = m.head(feature), m.head(m.student(swapped_x)[0])
        p, swapped_p = m.predictor(z), m.predictor(swapped_z)
        q = F.normalize(z, dim=1)
        with torch.no_grad():
            self.move(m.slow_student, m.student, 0.9)
            self.move(m.slow_head, m.head, 0.9)
            self.move(m.teacher_head, m.head, 0.999)
            k = F.normalize(m.teacher_head(self.teacher(teacher_x)[0]), dim=1)
            u, swapped_u = m.slow_head(m.slow_student(swapped_x)[0]), m.slow_head(m.slow_student(x)[0])
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, m.queue.T.clone().detach()])
        scores = torch.cat([positive, negative], dim=1) / 0.1
        first = torch.zeros(len(scores), dtype=torch.long, device=self.device)
        contrast = F.cross_entropy(scores, first)
        predictions = [
            2 - 2 * (F.normalize(a, dim=-1) * F.normalize(b.detach(), dim=-1)).sum(dim=-1).mean()
            for a, b in ((p, u), (swapped_p, swapped_u))
        ]
        classes = F.cross_entropy(logits, labels)
        loss = contrast + classes + 4 * (predictions[0] + predictions[1])
        room = min(len(k), len(m.queue) - self.pointer)
        m.queue[self.pointer : self.pointer + room] = k[:room]
        m.queue[: len(k) - room] = k[room:]
        self.pointer = (self.pointer + len(k)) % len(m.queue)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for name, (output, target) in {"contrast": (scores, first), "class": (logits, labels)}.items():
            found = output.topk(5, 1)[1].t().eq(target.view(1, -1))
            for best in (1, 5):
                self.meters[f"{name} {best}"] = found[:best].reshape(-1).float().sum(0).mul_(100 / len(target)).item()
        parts = (loss, contrast, classes, *predictions)
        for name, part in zip(("loss", "contrast", "class", "forward", "swapped"), parts, strict=True):
            self.meters[name] = part.item()


def arguments(pair: str) -> argparse.Namespace:
    """A pair at its published widths."""
    teacher, student = pair.split("-")
    return train.parse_args(["--scale", "gpu", "--teacher", teacher, "--student", student, "--batch", str(BATCH)])


def networks(
    args: argparse.Namespace, device: torch.device, layout: torch.memory_format
) -> tuple[train.CoCoRD, nn.Module]:
    """The model, and an untrained teacher."""
    teacher = net.build(args.teacher, 100).eval().requires_grad_(False)
    return train.build_model(args, 100, device).to(memory_format=layout), teacher.to(device, memory_format=layout)


class OneEpoch(Unwritten):
    """A run that goes on in its first epoch and ends before that is measured: its steps alone change the model."""

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        self.extra = {"probe": None}
        return 0

    def diverged(self, epoch: int, totals: Tensor) -> bool:
        self.totals = totals
        return True


def measure(pair: str, device: torch.device, rounds: int, steps: int = 2) -> None:
    """Print operations and speeds of one pair. Ours are the steps of the loop of train.py."""
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40 * BATCH, 3, 32, 32), dtype=torch.uint8, generator=numbers).to(device)
    labels, flat = torch.arange(len(pixels), device=device) % 100, torch.full((3, 1, 1), 0.5, device=device)
    data = images.Images(pixels, labels, pixels, labels, 100, flat, flat / 2, "")
    args, plain, batches = arguments(pair), Plain(pair, device), train.batches
    model, teacher = networks(args, device, torch.channels_last)
    optimizer = train.build_optimizer(args, [model.student, model.head, model.predictor])
    pillow = iter(DataLoader(Pillow(pixels[:2000], labels, BATCH * 10_000), BATCH, num_workers=2))
    counted: dict[str, int] = {}
    timed: dict[str, list[float]] = {"ours": [], "plain": []}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def measured_batches(*_) -> Iterator:
        """The batches of the loop. From one `yield` to the next passes one step; in between the plain steps run."""
        endless = (batch for epoch in itertools.count() for batch in batches(args, data, epoch))
        for _ in range(2):
            yield next(endless)
        with Counted() as counter:
            yield next(endless)
        counted["ours"] = counter.operations
        for _ in range(2):
            plain.step(*next(pillow))
        with Counted() as counter:
            plain.step(*next(pillow))
        counted["plain"] = counter.operations
        for _ in range(rounds):
            yield next(endless)
            started = now()
            for _ in range(steps):
                yield next(endless)
            timed["ours"].append((now() - started) / steps)
            plain.step(*next(pillow))
            started = now()
            for _ in range(steps):
                plain.step(*next(pillow))
            timed["plain"].append((now() - started) / steps)

    with mock.patch.object(train, "batches", measured_batches):
        train.train(args, OneEpoch(), model, data, optimizer, train.Teacher(net.fold(teacher)))
    found = [b / a for a, b in zip(*timed.values(), strict=True)]
    print(
        f"CoCoRD, {pair}, batch {BATCH}: operations {counted['ours']} / {counted['plain']} plain = "
        f"{counted['ours'] / counted['plain']:.2f}; plain / step {statistics.median(found):.2f} "
        f"[{min(found):.2f}-{max(found):.2f}] ({BATCH / statistics.median(timed['ours']):.0f} images/s, "
        f"{rounds} rounds of {steps} steps)",
        flush=True,
    )


def main(device: torch.device, rounds: int) -> None:
    for pair in PAIRS:
        measure(pair, device, rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(torch.device("cpu"), 3)
