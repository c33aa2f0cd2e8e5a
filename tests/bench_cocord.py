"""CoCoRD's share of `make bench`: operations dispatched in a step, and the step's speed, beside a plain reference.

operations  kernels that PyTorch dispatches in one training step after the first ones, views left out
plain       a reference with the structure of common code: three Pillow crops an image in two DataLoader workers, moving
            averages and SGD parameter by parameter, a copy of the queue, the teacher as it was trained, meters read by
            `.item()` at every step, contiguous tensors; the same networks, losses and weights
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from operations import Counted
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cocord import net, train
from common import images

PAIRS = ("resnet56-resnet20", "resnet110-resnet32", "vgg13-vgg8")
BATCH = 64
TERMS = {
    "forward_weight": 4.0, "swapped_weight": 4.0, "lambda_contrast": 1.0, "lambda_class": 1.0, "lambda_kd": 0.0,
    "temperature": 0.1, "student_momentum": 0.9, "teacher_momentum": 0.999, "precision": "float32",
}  # fmt: skip


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
        self.model, self.teacher, self.device = *networks(pair, device, torch.contiguous_format), device
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


def networks(pair: str, device: torch.device, layout: torch.memory_format) -> tuple[train.CoCoRD, nn.Module]:
    """The model of a pair at its published widths, and an untrained teacher."""
    name, student = pair.split("-")
    args = vars(train.parse_args(["--scale", "gpu", "--teacher", name, "--student", student]))
    teacher = net.build(name, 100).eval().requires_grad_(False)
    return train.build_model(args, 100, device).to(memory_format=layout), teacher.to(device, memory_format=layout)


def ours(pair: str, device: torch.device) -> Callable[[list[Tensor], Tensor], None]:
    """Our step."""
    model, teacher = networks(pair, device, torch.channels_last)
    optimizer = train.build_optimizer([model.student, model.head, model.predictor], 0.05, 5e-4)
    totals = torch.zeros(len(train.PARTS), device=device)
    terms = TERMS | {"precision": "auto"}
    return functools.partial(
        train.one_step, model, optimizer, net.fold(teacher), terms, model.followers(), totals
    )  # fmt: skip


def endless(made: Callable[[int], Iterator]) -> Iterator:
    epoch = 0
    while True:
        yield from made(epoch)
        epoch += 1


def measure(pair: str, device: torch.device, rounds: int, steps: int = 2) -> None:
    """Print operations and speeds of one pair."""
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40 * BATCH, 3, 32, 32), dtype=torch.uint8, generator=numbers).to(device)
    labels, flat = torch.arange(len(pixels), device=device) % 100, torch.full((3, 1, 1), 0.5, device=device)
    data = images.Images(pixels, labels, pixels, labels, 100, flat, flat / 2, "")
    made = endless(lambda epoch: train.batches(data, train.VIEWS["cifar"], 3, BATCH, 0, epoch))
    step, plain = ours(pair, device), Plain(pair, device)
    loader = iter(DataLoader(Pillow(pixels[:2000], labels, BATCH * 10_000), BATCH, num_workers=2))
    work = {"ours": lambda: step(*next(made)), "plain": lambda: plain.step(*next(loader))}
    counted, timed = {}, {name: [] for name in work}
    for name, once in work.items():
        for _ in range(2):
            once()
        with Counted() as counter:
            once()
        counted[name] = counter.operations
    for _ in range(rounds):
        for name, once in work.items():
            once()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                once()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timed[name].append((time.perf_counter() - started) / steps)
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
