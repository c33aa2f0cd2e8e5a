"""Image data sets as uint8 tensors that stay on the device, and splits and subsets that a data seed fixes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import checkpoints, cli, files, glyphs, image_folder, mnist5k, seeding
from common.cli import EXIT_DISK, EXIT_USER, fail
from common.download import download

GLYPH_COUNTS = {"train": 5000, "test": 5000}  # images per split of each glyphs preset
CIFAR = ("cifar10", "cifar100")
DATA_SETS = (*glyphs.PRESETS, "mnist5k", *CIFAR, "folder")
BLOCK = 500  # images per batch in evaluation
MAX_IN_MEMORY_PIXELS = 64  # side length: larger images of a folder are streamed instead of kept on the device


class Images(NamedTuple):
    """A data set on the device: images (N, 3, S, S) uint8, labels (N,) int64."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    mean: Tensor  # (3, 1, 1), of the training images scaled to [0, 1]
    std: Tensor  # (3, 1, 1)
    digest: str  # sha256 of the images and labels
    data_seed: int = 0  # determines glyphs, splits and subsets

    @property
    def examples(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def device(self) -> torch.device:
        return self.train.device

    def subset(self, count: int) -> "Images":
        """Return a copy with at most `count` images of each split: a random subset fixed by the data seed."""

        def select(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            rows = seeding.permutation(self.data_seed, "few", 0, len(images), "cpu")[:count].to(self.device)
            return images[rows], labels[rows]

        train, train_labels = select(self.train, self.train_labels)
        test, test_labels = select(self.test, self.test_labels)
        return self._replace(train=train, train_labels=train_labels, test=test, test_labels=test_labels)

    def with_held_out_test(self) -> "Images":
        """Return a copy for tuning: a random tenth of the training set is the test set. The digest changes.

        Exits with code 2 if that tenth is less than two images.
        """
        if self.examples < 20:
            fail(f"--held-out needs at least 20 training images, not {self.examples}: give more, or drop --held-out")
        rest, tenth = seeding.held_out_split(self.examples, self.device, self.data_seed)
        return self._replace(
            train=self.train[rest],
            train_labels=self.train_labels[rest],
            test=self.train[tenth],
            test_labels=self.train_labels[tenth],
            digest=f"{self.digest}, a tenth held out",
        )

    def batches(self, split: str, start: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, 3, S, S) and labels (B,) of `split` ("train", "test"): every `step`-th image."""
        images, labels = (self.train, self.train_labels) if split == "train" else (self.test, self.test_labels)
        rows = slice(start, None, step)
        for x, y in zip(images[rows].split(BLOCK), labels[rows].split(BLOCK), strict=True):
            yield self.normalise(x), y

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images by channel mean and std. uint8 is first divided by 255; float must already be in [0, 1]."""
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std


def balanced_subset(labels: Tensor, count: int | None, classes: int, data_seed: int) -> Tensor:
    """Return the sorted indices of `count` images with equal class counts (± 1), drawn from the data seed.

    labels (N,) int64 on the CPU. Returns all indices if `count` is None or at least N.
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    order = seeding.permutation(data_seed, "labelled", 0, len(labels), "cpu")
    shuffled = labels[order]
    rank_in_class = F.one_hot(shuffled, classes).cumsum(0).gather(1, shuffled[:, None])[:, 0]
    return order[rank_in_class.argsort(stable=True)[:count]].sort().values


Data = Images | image_folder.StreamedImages


def load(name: str, data: Path, size: int, device: torch.device, workers: int = 0, data_seed: int = 0) -> Images:
    """Load the data set `name` from the folder `data`. Exits with code 2 if it is missing or damaged.

    `size` (pixels) applies to image folders only. They are decoded once into a cache file. `data_seed` determines
    glyphs, the split of mnist5k, and later splits and subsets of all data sets.
    """
    check_data_folder(name, data)
    if name == "folder":
        folders = image_folder.open_splits(data)
        splits = [
            image_folder.load_cached(folder, split, size, data, workers)
            for folder, split in zip(folders, ("train", "val"), strict=True)
        ]
        classes = len(folders[0].classes)
        warn_of_duplicates(splits[0][0], splits[1][0], data)
    elif name in glyphs.PRESETS:
        splits = [cached_glyphs(name, split, data, data_seed) for split in GLYPH_COUNTS]
        classes = glyphs.classes(name)
    elif name == "mnist5k":
        splits, classes = mnist5k.load(data, data_seed), mnist5k.CLASSES
    else:
        splits = [cifar(name, data, train) for train in (True, False)]
        classes = int(name.removeprefix("cifar"))
    (train, train_labels), (test, test_labels) = splits
    digest = checkpoints.sha256(*splits[0], *splits[1])
    train, test = train.to(device), test.to(device)
    mean, std = channel_statistics(train)
    constant = std.flatten() == 0
    if constant.all():
        fail(f"--data {data}: all pixels of the training images are equal: give images that are not constant")
    if constant.any():
        channels = ", ".join(channel for channel, same in zip(("red", "green", "blue"), constant, strict=True) if same)
        print(f"warning: --data {data}: channel {channels} is constant and not divided by its std", file=sys.stderr)
        std = torch.where(std == 0, 1.0, std)
    return Images(train, train_labels.to(device), test, test_labels.to(device), classes, mean, std, digest, data_seed)


def load_or_stream(
    name: str,
    data: Path,
    size: int,
    device: torch.device,
    workers: int,
    data_seed: int = 0,
    interpolation: str = "bilinear",
) -> Data:
    """Like `load`, but image folders with --size above 64 pixels are streamed by DataLoader workers.

    `interpolation`: see `StreamedImages`.
    """
    check_data_folder(name, data)
    if name == "folder" and size > MAX_IN_MEMORY_PIXELS:
        return image_folder.StreamedImages(data, size, workers, device, data_seed, interpolation)
    return load(name, data, size, device, workers, data_seed)


def warn_of_duplicates(train: Tensor, test: Tensor, data: Path) -> None:
    """Warn if test images (N, 3, S, S) uint8 also occur in the training set."""
    known = {image.numpy().tobytes() for image in train}
    duplicates = sum(image.numpy().tobytes() in known for image in test)
    if duplicates:
        print(f"warning: --data {data}: {duplicates} of {len(test)} images in val are also in train", file=sys.stderr)


def check_data_folder(name: str, data: Path) -> None:
    """Exit with code 2 if `data` is a file, or contains images that the data set `name` would not use."""
    if data.exists() and not data.is_dir():
        fail(f"--data {data} is a file: give a folder")
    if name != "folder" and image_folder.contains_images(data):
        fail(f"--data {data} contains images, but the data set {name} does not read them: give another --data for "
             "downloads and caches, or train with --data-set folder")  # fmt: skip


def cached_glyphs(name: str, split: str, data: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Load the glyphs of a seed from the cache file in `data`, or generate and cache them.

    The file name contains the seed and `glyphs.fingerprint`. Files are written atomically, so runs may start together.
    A missing, damaged or unwritable cache is not an error: the glyphs are generated again.
    """
    path = data / f"{name}-{split}-{GLYPH_COUNTS[split]}-seed{seed}-{glyphs.fingerprint()[:12]}.pt"
    try:
        cached = checkpoints.load(path)
        return cached["images"], cached["labels"]
    except (OSError, files.DamagedFile, KeyError, TypeError):
        images, labels = glyphs.generate(name, GLYPH_COUNTS[split], split, seed)
    try:
        data.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, {"images": images, "labels": labels})
    except OSError:
        pass
    return images, labels


def torchvision_class(name: str) -> Any:
    """Return torchvision's data set class for `name`, "cifar10" or "cifar100"."""
    from torchvision import datasets  # imported here because it takes 2 s, and the demo starts a hundred processes

    return getattr(datasets, name.upper())


def cifar(name: str, data: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Load CIFAR through torchvision: images (N, 3, 32, 32) uint8 and labels (N,) int64.

    torchvision verifies the checksums before unpickling. Exits with code 2 if files are missing or damaged.
    """
    try:
        data_set = torchvision_class(name)(str(data), train=train)
    except RuntimeError:
        fail(f"{name} is missing or damaged in {data}: run python -m common.images {name} --data {data}")
    pixels = np.ascontiguousarray(data_set.data.transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.tensor(data_set.targets)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images scaled to [0, 1], (3, 1, 1) each.

    A constant channel has a standard deviation of exactly 0.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)  # how often each value occurs in a channel
    for block in images.split(4096):
        counts += torch.stack([block[:, channel].flatten().bincount(minlength=256) for channel in range(3)])
    values, count = torch.arange(256, dtype=torch.float64, device=images.device) / 255, images.numel() // 3
    mean, mean_square = ((counts * powers).sum(1) / count for powers in (values, values.square()))
    std = (mean_square - mean**2).clamp_min(0).sqrt()
    constant = (counts > 0).sum(1) == 1  # with rounding errors, their variance may be above 0
    return mean.float().view(3, 1, 1), std.masked_fill(constant, 0).float().view(3, 1, 1)


def downloaded(name: str, data: Path) -> bool:
    """Return whether CIFAR is complete in `data`, after unpacking the archive if it is there and intact."""
    from torchvision.datasets.utils import check_integrity

    cifar_class = torchvision_class(name)
    intact = check_integrity(str(data / cifar_class.filename), cifar_class.tgz_md5)
    try:
        cifar_class(str(data), download=intact)
    except RuntimeError:  # files are missing or damaged
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    """Download CIFAR, prepare MNIST-5k (common/mnist5k.py): `python -m common.images cifar10 mnist5k --data data`.

    A download that was cut continues when the command is repeated.
    """
    parser = cli.Parser(main.__doc__)
    parser.add_argument("names", nargs="+", choices=(*CIFAR, "mnist5k"), help="data sets to prepare")
    parser.add_argument("--data", type=Path, default=Path("data"), help="output folder")
    parser.add_argument("--mirror", metavar="URL", help="download CIFAR's archives from URL/ instead of their own site")
    args = parser.parse_args(argv)
    check_data_folder(args.names[0], args.data)
    if args.mirror and "mnist5k" in args.names:
        fail("--mirror applies to cifar10 and cifar100 only: drop it, or prepare mnist5k in a separate command")
    for name in args.names:
        if name == "mnist5k":
            mnist5k.prepare(args.data)
            print(f"{name} is in {args.data}")
            continue
        cifar_class = torchvision_class(name)
        archive = args.data / cifar_class.filename
        url = f"{args.mirror.rstrip('/')}/{archive.name}" if args.mirror else cifar_class.url
        try:
            args.data.mkdir(parents=True, exist_ok=True)
            if not downloaded(name, args.data):
                download(url, archive, cifar_class.tgz_md5)
                cifar_class(str(args.data), download=True)  # unpacks the archive
        except (OSError, ValueError, RuntimeError) as error:
            full = isinstance(error, OSError) and error.errno in files.PERMANENT_ERRORS
            fail(f"download of {name} failed ({error}): run this command again to continue, give another --mirror, or "
                 f"put {archive.name} into {args.data}", EXIT_DISK if full else EXIT_USER)  # fmt: skip
        print(f"{name} is in {args.data}")


if __name__ == "__main__":
    main()
