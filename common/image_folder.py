"""Image folders (`train/<class>/*`, `val/<class>/*`): decoded once to live on the device, or read by workers."""

import errno
import fcntl
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import seeding
from common.cli import EXIT_DISK, EXIT_USER, fail
from common.files import FULL

if TYPE_CHECKING:  # imported where it is used: it takes 2 s, and a demo without it starts a hundred processes
    from torchvision import datasets


def open_folder(root: Path) -> "datasets.ImageFolder":
    """torchvision's ImageFolder. Stops (exit 2) where `root` holds no class folders with images."""
    from torchvision import datasets

    try:
        return datasets.ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        fail(f"--data: {root} is no folder of class folders with images ({error})")


def open_parts(data: Path) -> "tuple[datasets.ImageFolder, datasets.ImageFolder]":
    """`train` and `val` of `data`. Stops (exit 2) where they do not hold the same classes."""
    train, test = open_folder(data / "train"), open_folder(data / "val")
    if differing := set(train.classes) ^ set(test.classes):
        fail(f"--data {data}: train and val must hold the same classes; only one has {sorted(differing)[:3]}")
    return train, test


def digest(data: Path) -> str:
    """sha256 of the names and sizes of all images: a cheap fingerprint of a large folder."""
    found = hashlib.sha256()
    for part in open_parts(data):
        for path, _ in part.samples:
            found.update(f"{Path(path).relative_to(data)} {os.path.getsize(path)}\n".encode())
    return found.hexdigest()


class Undecodable(Exception):
    """A picture file that cannot be read; the message names it."""


class Decoded(Dataset):
    """Pictures of an ImageFolder, each through `transform`; item i is (picture, label)."""

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable):
        self.folder, self.transform = folder, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = read(self.folder, index)
        return self.transform(picture), label


class Views(Dataset):
    """Random views of the pictures; each seeding from (seed, epoch, index, view), whichever worker makes it.

    Item i is the list of its views, (3, S, S) uint8 each.
    """

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable, views: int, seed: int, epoch: int):
        self.folder, self.transform, self.views, self.seed, self.epoch = folder, transform, views, seed, epoch

    def __getitem__(self, index: int) -> list[Tensor]:
        picture, _ = read(self.folder, index)
        views = []
        for view in range(self.views):
            with seeding.forked(self.seed, f"view {view} of epoch {self.epoch} of image {index}"):
                views.append(self.transform(picture))
        return views


def read(folder: "datasets.ImageFolder", index: int):
    """(PIL picture, label). Raises Undecodable."""
    try:
        return folder[index]
    except (OSError, SyntaxError) as error:
        raise Undecodable(f"{folder.samples[index][0]} cannot be decoded ({error})") from None


def loaded(pictures: Dataset, order: list[list[int]], workers: int, device: torch.device) -> Iterator:
    """The batches of `order` from `workers` processes. A picture that cannot be decoded stops the script (exit 2)."""
    loader = DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader seeding from it; the default generator is not its business
        worker_init_fn=leave_interrupts_to_the_parent,
    )
    try:
        yield from loader
    except Undecodable as error:  # a worker's comes with its traceback before the message
        fail(f"{str(error).strip().splitlines()[-1].split('Undecodable: ')[-1]}: restore or remove that file")


def leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the parent ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamedImages:
    """An image folder that workers decode, batch by batch: for pictures too many or too large for the device."""

    def __init__(self, data: Path, size: int, workers: int, device: torch.device):
        self.train, self.test = open_parts(data)
        self.size, self.workers, self.device = size, workers, device
        self.examples, self.classes, self.digest = len(self.train), len(self.train.classes), digest(data)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # of ImageNet
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def subset(self, count: int) -> "StreamedImages":
        """The same with at most `count` training and test pictures, drawn from the data seed."""
        for part in (self.train, self.test):
            rows = seeding.permutation(seeding.DATA_SEED, "few", 0, len(part), "cpu")[:count].tolist()
            part.samples, part.targets = [part.samples[row] for row in rows], [part.targets[row] for row in rows]
        self.examples = len(self.train)
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images (..., 3, S, S) to [0, 1] and normalise them by ImageNet's channel statistics."""
        return (images / 255 - self.mean) / self.std

    def views(
        self, transform: Callable, views: int, order: list[list[int]], seed: int, epoch: int
    ) -> Iterator[list[Tensor]]:
        """Lists of view batches (B, 3, S, S) uint8 on the device, a list per entry of `order`."""
        for batch in loaded(Views(self.train, transform, views, seed, epoch), order, self.workers, self.device):
            yield [view.to(self.device, non_blocking=True) for view in batch]

    def batches(self, part: str, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised test views and labels of `part` ("train", "test"): every world-th row.

        The test view is the paper's: shorter side to 8/7 of the size (256 for 224), then the central square.
        """
        from torchvision.transforms import v2

        folder = self.train if part == "train" else self.test
        transform = v2.Compose([v2.Resize(round(self.size * 8 / 7)), v2.CenterCrop(self.size), v2.PILToTensor()])
        rows = list(range(len(folder)))[rank::world]
        blocks = [rows[start : start + 256] for start in range(0, len(rows), 256)]
        for x, y in loaded(Decoded(folder, transform), blocks, self.workers, self.device):
            yield self.normalise(x.to(self.device, non_blocking=True)), y.to(self.device, non_blocking=True)


def resident(root: Path, size: int, cache: Path, workers: int, fingerprint: str) -> tuple[Tensor, Tensor]:
    """All pictures of `root` as one uint8 tensor (N, 3, size, size) on the CPU, and labels (N,) int64.

    Shorter side to `size`, central square. Decoded once into a file in `cache`, named after `fingerprint`; whoever
    comes while another process decodes waits for it, and an interrupted decoding goes on where its file ends. Stops
    (exit 2) where `cache` cannot be written, or that file is damaged.
    """
    folder = open_folder(root)
    path, shape = cache / f"{root.name}-{size}-{fingerprint[:12]}.npy", (len(folder), 3, size, size)
    if not path.exists():
        try:
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                if not path.exists():
                    decode(folder, path.with_suffix(".part"), shape, workers)
                    os.replace(path.with_suffix(".part"), path)
        except OSError as error:
            fail(f"--data: the decoded pictures cannot be written to {cache} ({error.strerror}): free or writable "
                 "space is needed there", EXIT_DISK if error.errno in FULL - {errno.EROFS} else EXIT_USER)  # fmt: skip
    try:
        pixels = np.load(path)
    except ValueError as error:
        fail(f"{path} is damaged ({error}): remove it, and it is decoded again")
    return torch.from_numpy(pixels), torch.tensor(folder.targets)


def decode(folder: "datasets.ImageFolder", part: Path, shape: tuple[int, ...], workers: int) -> None:
    """Append the pictures that `part` lacks; a whole one is a .npy file of `shape`, uint8. Raises OSError."""
    from torchvision.transforms import v2

    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start, one = len(header.getvalue()), int(np.prod(shape[1:]))
    with open(part, "ab") as file:
        done = (file.tell() - start) // one // 256 * 256 if file.tell() >= start else 0
        file.truncate(start + done * one if file.tell() >= start else 0)
        if file.seek(0, os.SEEK_END) == 0:
            file.write(header.getvalue())
        blocks = [list(range(i, min(i + 256, shape[0]))) for i in range(done, shape[0], 256)]
        transform = v2.Compose([v2.Resize(shape[2]), v2.CenterCrop(shape[2]), v2.PILToTensor()])
        made = loaded(Decoded(folder, transform), blocks, workers, torch.device("cpu"))
        for pictures, _ in tqdm(made, f"decoding {part.stem}", len(blocks), disable=None, unit="block"):
            file.write(pictures.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
