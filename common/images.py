"""Image data sets as uint8 tensors that live on the device, and the fixed splits of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import checkpoints, cli, files, glyphs, image_folder, seeding
from common.cli import fail

GLYPHS = {"train": 5000, "test": 1000}
CIFAR = ("cifar10", "cifar100")
NAMES = (*glyphs.PRESETS, *CIFAR, "folder")
SMALL = 64  # pixels: up to here a folder's images live on the device


class Images(NamedTuple):
    """A data set on the device: images (N, 3, S, S) uint8, labels (N,) int64."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    mean: Tensor  # (3, 1, 1), of the training images scaled to [0, 1]
    std: Tensor  # (3, 1, 1)
    digest: str  # sha256; of an image folder: of its names and sizes

    @property
    def examples(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def device(self) -> torch.device:
        return self.train.device

    def subset(self, count: int) -> "Images":
        """The same with at most `count` training and test images, drawn from the data seed."""

        def cut(*parts: Tensor) -> list[Tensor]:
            rows = seeding.permutation(seeding.DATA_SEED, "few", 0, len(parts[0]), "cpu")[:count].to(self.device)
            return [part[rows] for part in parts]

        (train, train_labels), (test, test_labels) = cut(*self[:2]), cut(*self[2:4])
        return self._replace(train=train, train_labels=train_labels, test=test, test_labels=test_labels)

    def batches(self, part: str, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (B, 3, S, S) and labels (B,) of `part` ("train", "test"): every world-th row."""
        pixels, labels = (self.train, self.train_labels) if part == "train" else (self.test, self.test_labels)
        mine = slice(rank, None, world)
        for x, y in zip(pixels[mine].split(500), labels[mine].split(500), strict=True):
            yield self.normalise(x), y

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images to [0, 1], then subtract the channel means and divide by the deviations."""
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std


def load(name: str, data: Path, size: int, device: torch.device, workers: int = 0) -> Images:
    """The data set `name` from the folder `data`. Stops (exit 2) where it is absent or broken.

    `size` (pixels) counts for image folders only, which are decoded once into one file.
    """
    if name == "folder":
        digest = image_folder.digest(data)
        parts = [image_folder.resident(data / part, size, data, workers, digest) for part in ("train", "val")]
        classes = int(parts[0][1].max()) + 1
    else:
        drawn = name in glyphs.PRESETS
        parts = [cached_glyphs(name, part, data) if drawn else cifar(name, data, part == "train") for part in GLYPHS]
        digest = checkpoints.sha256(*parts[0], *parts[1])
        classes = glyphs.classes(name) if drawn else int(name[5:])
    (train, train_labels), (test, test_labels) = parts
    train, test = train.to(device), test.to(device)
    mean, deviation = channel_statistics(train)
    return Images(train, train_labels.to(device), test, test_labels.to(device), classes, mean, deviation, digest)


def cached_glyphs(name: str, part: str, data: Path) -> tuple[Tensor, Tensor]:
    """Glyphs from the cache file, or drawn now; a folder that cannot be written only costs the drawing again."""
    path = data / f"{name}-{part}-{GLYPHS[part]}.pt"
    try:
        cached = checkpoints.load(path)
        return cached["images"], cached["labels"]
    except (OSError, files.DamagedFile, KeyError, TypeError):
        images, labels = glyphs.glyphs(name, GLYPHS[part], part)
    try:
        data.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, {"images": images, "labels": labels})
    except OSError:
        pass
    return images, labels


Data = Images | image_folder.StreamedImages


def load_or_stream(name: str, data: Path, size: int, device: torch.device, workers: int) -> Data:
    """The same; only a folder's images above 64 pixels are not resident: workers read them."""
    if name == "folder" and size > SMALL:
        return image_folder.StreamedImages(data, size, workers, device)
    return load(name, data, size, device, workers)


def torchvision_class(name: str) -> Any:
    """torchvision's class of `name`, one of CIFAR."""
    from torchvision import datasets  # here: it takes 2 s, and a demo without it starts a hundred processes

    return getattr(datasets, name.upper())


def cifar(name: str, data: Path, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR through torchvision, whose checksums stand before its unpickling: (N, 3, 32, 32) uint8 and labels."""
    try:
        found = torchvision_class(name)(str(data), train=train)
    except RuntimeError:
        fail(f"{name} is not in {data}, or damaged: python -m common.images {name} --data {data} downloads it")
    return torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))), torch.tensor(found.targets)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of uint8 images scaled to [0, 1], (3, 1, 1) each."""
    count = images.numel() // 3
    sums = torch.zeros(2, 3, dtype=torch.float64, device=images.device)
    for block in images.split(4096):
        scaled = block.double() / 255
        sums += torch.stack([scaled.sum((0, 2, 3)), scaled.square().sum((0, 2, 3))])
    mean, square = sums / count
    return mean.float().view(3, 1, 1), (square - mean**2).sqrt().float().view(3, 1, 1)


def main(argv: list[str] | None = None) -> None:
    """Download what can be downloaded: `python -m common.images cifar10 cifar100 --data data`."""
    parser = cli.Parser(main.__doc__)
    parser.add_argument("names", nargs="+", choices=CIFAR)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args(argv)
    for name in args.names:
        try:
            torchvision_class(name)(str(args.data), download=True)
        except (OSError, RuntimeError) as error:
            archive = torchvision_class(name).filename
            fail(f"{name} could not be downloaded ({error}): put {archive} into {args.data} and run this again")
        print(f"{name} is in {args.data}")


if __name__ == "__main__":
    main()
