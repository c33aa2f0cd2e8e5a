"""Image folders (`train/<class>/*`, `val/<class>/*`): decoded once to live on the device, or read by workers."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from common import draws, files
from common.exits import stop


def open_folder(root: Path) -> datasets.ImageFolder:
    """torchvision's ImageFolder. Stops (exit 2) where `root` holds no class folders with images."""
    try:
        return datasets.ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        stop(f"--data: {root} is no folder of class folders with images ({error})")


def digest(data: Path) -> str:
    """sha256 of the names and sizes of all images: a cheap fingerprint of a large folder."""
    found = hashlib.sha256()
    for part in ("train", "val"):
        for path, _ in open_folder(data / part).samples:
            found.update(f"{Path(path).relative_to(data)} {os.path.getsize(path)}\n".encode())
    return found.hexdigest()


class Decoded(Dataset):
    """Pictures of an ImageFolder, each through `transform`; item i is (picture, label)."""

    def __init__(self, folder: datasets.ImageFolder, transform: Callable):
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = read(self.folder, index)
        return self.transform(picture), label


class Views(Dataset):
    """Random views of the pictures; each draws from (seed, epoch, index, view), whichever worker makes it.

    Item i is the list of its views, (3, S, S) uint8 each.
    """

    def __init__(self, folder: datasets.ImageFolder, transform: Callable, views: int, seed: int, epoch: int):
        self.folder, self.transform, self.views, self.seed, self.epoch = folder, transform, views, seed, epoch

    def __getitem__(self, index: int) -> list[Tensor]:
        picture, _ = read(self.folder, index)
        views = []
        for view in range(self.views):
            with draws.forked(self.seed, f"view {view} of epoch {self.epoch} of image {index}"):
                views.append(self.transform(picture))
        return views


def read(folder: datasets.ImageFolder, index: int):
    """(PIL picture, label). A file that cannot be decoded ends the run with its name (exit 2)."""
    try:
        return folder[index]
    except (OSError, SyntaxError) as error:
        raise RuntimeError(f"{folder.samples[index][0]} cannot be decoded ({error}): restore or remove it") from None


class Streamed:
    """An image folder that workers decode, batch by batch: for pictures too many or too large for the device."""

    def __init__(self, data: Path, size: int, workers: int, device: torch.device):
        self.train, self.test = (open_folder(data / part) for part in ("train", "val"))
        self.size, self.workers, self.device = size, workers, device
        self.examples, self.classes, self.digest = len(self.train), len(self.train.classes), digest(data)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # of ImageNet
        self.deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images (..., 3, S, S) to [0, 1] and normalise them by ImageNet's channel statistics."""
        return (images / 255 - self.mean) / self.deviation

    def views(
        self, transform: Callable, views: int, order: list[list[int]], seed: int, epoch: int
    ) -> Iterator[list[Tensor]]:
        """Lists of view batches (B, 3, S, S) uint8 on the device, a list per entry of `order`."""
        for batch in self._loader(Views(self.train, transform, views, seed, epoch), order):
            yield [view.to(self.device, non_blocking=True) for view in batch]

    def batches(self, part: str, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised test views and labels of `part` ("train", "test"), in order; every world-th batch.

        The test view is the paper's: shorter side to 8/7 of the size (256 for 224), then the central square.
        """
        folder = self.train if part == "train" else self.test
        transform = v2.Compose([v2.Resize(round(self.size * 8 / 7)), v2.CenterCrop(self.size), v2.PILToTensor()])
        blocks = [list(range(i, min(i + 256, len(folder)))) for i in range(0, len(folder), 256)]
        for x, y in self._loader(Decoded(folder, transform), blocks[rank::world]):
            yield self.normalise(x.to(self.device, non_blocking=True)), y.to(self.device)

    def _loader(self, pictures: Dataset, order: list[list[int]]) -> DataLoader:
        own = torch.Generator()  # the loader draws from it; the default generator is not its business
        pin = self.device.type == "cuda"
        return DataLoader(pictures, batch_sampler=order, num_workers=self.workers, pin_memory=pin, generator=own)


def resident(root: Path, size: int, cache: Path, workers: int) -> tuple[Tensor, Tensor]:
    """All pictures of `root` as one uint8 tensor (N, 3, size, size) on the CPU, and labels (N,) int64.

    Shorter side to `size`, central square. Decoded once into `cache`; an interrupted decoding goes on. Stops
    (exit 2) where `cache` cannot be written.
    """
    folder = open_folder(root)
    labels = torch.tensor(folder.targets)
    path = cache / f"{root.name}-{size}-{digest(root.parent)[:12]}.npy"
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    if not path.exists():
        shape = (len(folder), 3, size, size)
        try:
            done = files.read_json(progress) if progress.exists() and part.exists() else 0
            pixels = np.lib.format.open_memmap(part, "r+" if done else "w+", np.uint8, None if done else shape)
        except OSError as error:
            stop(f"--data: the decoded pictures cannot be written to {cache} ({error.strerror})")
        transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
        blocks = [list(range(i, min(i + 256, len(folder)))) for i in range(done, len(folder), 256)]
        loader = DataLoader(Decoded(folder, transform), batch_sampler=blocks, num_workers=workers)
        bar = tqdm(zip(blocks, loader, strict=True), f"decoding {root}", len(blocks), disable=None, unit="block")
        for number, (block, (pictures, _)) in enumerate(bar, 1):
            pixels[block[0] : block[-1] + 1] = pictures.numpy()
            if number % 40 == 0:
                pixels.flush()
                files.write_json(progress, block[-1] + 1)
        pixels.flush()
        os.replace(part, path)
        progress.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path)), labels
