"""Image folders (`train/<class>/*`, `val/<class>/*`): decoded once into a cache, or streamed by DataLoader workers."""

import errno
import fcntl
import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from common.files import PERMANENT_ERRORS
from common.pictures import UnreadableImage, open_rgb

if TYPE_CHECKING:  # imported inside the functions: it takes 2 s, and the demo starts a hundred processes
    from torchvision import datasets

BLOCK = 256  # images per batch in decoding and evaluation
SAMPLED = 500  # images per split whose bytes count in the digest of a streamed folder
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # as torchvision reads


def open_folder(root: Path) -> "datasets.ImageFolder":
    """Open torchvision's ImageFolder with `open_rgb` as its loader, without hidden files and folders.

    Prints one line about files that are left out. Exits with code 2 if `root` has no class folders with images, or a
    class folder without one.
    """
    from torchvision import datasets

    try:
        folder = datasets.ImageFolder(str(root), loader=open_rgb, allow_empty=True)
    except OSError as error:
        fail(f"invalid --data: {root} has no class folders with images ({error})")
    classes = [name for name in folder.classes if not name.startswith(".")]
    samples = []
    for path, label in folder.samples:
        if folder.classes[label] in classes and not Path(path).name.startswith("."):
            samples.append((path, classes.index(folder.classes[label])))
    if not classes:
        fail(f"invalid --data: {root} has no class folders with images")
    if empty := set(range(len(classes))) - {label for _, label in samples}:
        fail(f"invalid --data: {root / classes[min(empty)]} has no image that can be read (suffixes: "
             f"{', '.join(datasets.folder.IMG_EXTENSIONS)})")  # fmt: skip
    folder.classes, folder.class_to_idx = classes, {name: label for label, name in enumerate(classes)}
    folder.samples = folder.imgs = samples
    folder.targets = [label for _, label in samples]
    if left_out := describe_left_out(root, len(samples)):
        print(f"warning: {root}: {left_out} left out", file=sys.stderr)
    return folder


def describe_left_out(root: Path, used: int) -> str:
    """Return how many files, hidden and unreadable folders `root` has beside the `used` images; "" if none."""
    unreadable: list[OSError] = []
    suffixes: Counter[str] = Counter()
    for _, _, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        suffixes.update("hidden" if name.startswith(".") else Path(name).suffix.lower() for name in names)
    count = suffixes.total() - used
    parts = []
    if count:
        common = [suffix or "no suffix" for suffix, _ in suffixes.most_common() if suffix not in IMAGE_SUFFIXES]
        parts.append(f"{count} files ({', '.join(common[:4])})")
    if unreadable:
        parts.append(f"{len(unreadable)} folders that cannot be read ({unreadable[0].filename})")
    return " and ".join(parts)


def open_splits(data: Path) -> "tuple[datasets.ImageFolder, datasets.ImageFolder]":
    """Open `data`/train and `data`/val. Exits with code 2 if their classes differ."""
    train, test = open_folder(data / "train"), open_folder(data / "val")
    if difference := set(train.classes) ^ set(test.classes):
        fail(f"invalid --data {data}: train and val must have the same classes; only one has {sorted(difference)[:3]}")
    return train, test


def looks_like_images(data: Path) -> bool:
    """Return whether `data` holds an image folder: train/ or val/, or images in it or in one of its folders."""
    if (data / "train").is_dir() or (data / "val").is_dir():
        return True
    for folder in (data, *(path for path in data.glob("*") if path.is_dir())):
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.glob("*.*")):
            return True
    return False


def file_status(path: str) -> os.stat_result:
    """Return os.stat of an image. Exits with code 2 if that fails, for example for a dangling link."""
    try:
        return os.stat(path)
    except OSError as error:
        fail(f"--data: {path} cannot be read ({error.strerror}): restore or remove it")


def content_digest(data: Path, splits: "Sequence[datasets.ImageFolder]") -> str:
    """Return a sha256 of the names and sizes of all images and of the bytes of up to SAMPLED images of each split.

    It does not change when the folder is copied. A change of a few images of equal size can stay unnoticed.
    """
    sha256 = hashlib.sha256()
    for folder in splits:
        step = max(1, len(folder.samples) // SAMPLED)
        for index, (path, _) in enumerate(folder.samples):
            entry = f"{Path(path).relative_to(data)} {file_status(path).st_size}\n"
            sha256.update(entry.encode("utf-8", "surrogateescape"))
            if index % step == 0:
                sha256.update(Path(path).read_bytes())
    return sha256.hexdigest()


def cache_key(folder: "datasets.ImageFolder") -> str:
    """Return a sha256 of name, size, and times of last change of all images. Replacing any image changes it."""
    sha256 = hashlib.sha256()
    for path, _ in folder.samples:
        status = file_status(path)
        entry = f"{Path(path).relative_to(folder.root)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
        sha256.update(entry.encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


class TransformedImages(Dataset):
    """Images of an ImageFolder under `transform`; item i is (image, label)."""

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable):
        self.folder, self.transform = folder, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        return self.transform(image), label


class RandomViews(Dataset):
    """Random views of the images of an ImageFolder; item i is the list of its views, (3, S, S) uint8 each.

    Each view is seeded from (seed, epoch, index, view), so it does not depend on the worker that computes it.
    """

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable, views: int, seed: int, epoch: int):
        self.folder, self.transform, self.views, self.seed, self.epoch = folder, transform, views, seed, epoch

    def __getitem__(self, index: int) -> list[Tensor]:
        image, _ = self.folder[index]
        views = []
        for view in range(self.views):
            with seeding.forked(self.seed, f"view {view} of epoch {self.epoch} of image {index}"):
                views.append(self.transform(image))
        return views


def load_batches(dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device) -> Iterator:
    """Yield batches of the indices in `batches`, loaded by `workers` processes, in pinned memory if for a GPU.

    Exits with code 2 if an image cannot be decoded.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader draws its base seed from the default generator
        worker_init_fn=ignore_sigint,
    )
    try:
        yield from loader
    except UnreadableImage as error:  # from a worker, the message comes after its traceback
        fail(f"{str(error).strip().splitlines()[-1].split('UnreadableImage: ')[-1]}; or remove that file")


def ignore_sigint(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of the terminal: the parent process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamedImages:
    """An image folder too large for the device: DataLoader workers decode each batch."""

    def __init__(self, data: Path, size: int, workers: int, device: torch.device):
        self.train, self.test = open_splits(data)
        self.size, self.workers, self.device = size, workers, device
        self.examples, self.classes = len(self.train), len(self.train.classes)
        self.digest = content_digest(data, (self.train, self.test))
        check_contrast(self.train)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet's statistics
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def subset(self, count: int) -> "StreamedImages":
        """Keep at most `count` training and test images, a random subset fixed by DATA_SEED. Changes and returns self.

        The rows are those that `Images.subset` takes.
        """
        for folder in (self.train, self.test):
            rows = seeding.permutation(seeding.DATA_SEED, "few", 0, len(folder), "cpu")[:count].tolist()
            folder.samples = [folder.samples[row] for row in rows]
            folder.targets = [folder.targets[row] for row in rows]
        self.examples = len(self.train)
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images (..., 3, S, S) to [0, 1] and normalise them with ImageNet's channel statistics."""
        return (images / 255 - self.mean) / self.std

    def views(
        self, transform: Callable, views: int, batches: list[list[int]], seed: int, epoch: int
    ) -> Iterator[list[Tensor]]:
        """Yield a list of `views` tensors (B, 3, S, S) uint8 on the device for each list of B indices in `batches`."""
        dataset = RandomViews(self.train, transform, views, seed, epoch)
        for batch in load_batches(dataset, batches, self.workers, self.device):
            yield [view.to(self.device, non_blocking=True) for view in batch]

    def batches(self, split: str, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, 3, S, S) and labels (B,) of `split` ("train", "test").

        With several ranks, each gets the rows rank, rank + world, rank + 2 world, ... The images are the paper's test
        views: the shorter side resized to 8/7 of the size (256 for 224), then a centre crop.
        """
        from torchvision.transforms import v2

        folder = self.train if split == "train" else self.test
        transform = v2.Compose([v2.Resize(round(self.size * 8 / 7)), v2.CenterCrop(self.size), v2.PILToTensor()])
        rows = list(range(len(folder)))[rank::world]
        batches = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        for x, y in load_batches(TransformedImages(folder, transform), batches, self.workers, self.device):
            yield self.normalise(x.to(self.device, non_blocking=True)), y.to(self.device, non_blocking=True)


def check_contrast(folder: "datasets.ImageFolder") -> None:
    """Decode a few images. Exits with code 2 if one cannot be decoded or all have one and the same colour."""
    colours: set[int] = set()
    for index in range(0, len(folder), max(1, len(folder) // 20)):
        try:
            colours |= set(np.unique(np.asarray(folder[index][0])).tolist())
        except UnreadableImage as error:
            fail(f"{error}; or remove that file")
    if len(colours) == 1:
        fail(f"invalid --data: the images of {folder.root} have one and the same colour")


def load_cached(
    folder: "datasets.ImageFolder", name: str, size: int, cache: Path, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Return all images as one uint8 tensor (N, 3, size, size) on the CPU, and labels (N,) int64.

    The shorter side is resized to `size`, then the centre is cropped. Images are decoded once into a file in `cache`,
    named after `name` and `cache_key`. A file lock makes other processes wait, and interrupted decoding resumes. Exits
    with code 2 if `cache` is not writable or the file is damaged, with code 4 if the disk is full.
    """
    shape = (len(folder), 3, size, size)
    path = cache / f"{name}-{size}-{cache_key(folder)[:12]}.npy"
    partial = path.with_suffix(".part")
    if not path.exists():
        try:
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                if not path.exists():
                    decode(folder, partial, shape, workers)
                    os.replace(partial, path)
        except OSError as error:
            code = EXIT_DISK if error.errno in PERMANENT_ERRORS - {errno.EROFS} else EXIT_USER
            fail(f"--data: decoded images cannot be written to {cache} ({error.strerror}): free space there, or make "
                 "it writable", code)  # fmt: skip
    try:
        pixels = np.load(path)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"{pixels.dtype} of shape {pixels.shape}")
    except (ValueError, EOFError) as error:
        fail(f"{path} is damaged ({error}): remove it, and the images are decoded again")
    return torch.from_numpy(pixels), torch.tensor(folder.targets)


def decode(folder: "datasets.ImageFolder", partial: Path, shape: tuple[int, ...], workers: int) -> None:
    """Write the images to `partial` as a .npy file of `shape`, uint8. Resumes where the file ends. Raises OSError."""
    from torchvision.transforms import v2

    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    header, image_bytes = buffer.getvalue(), int(np.prod(shape[1:]))
    with open(partial, "ab") as file:
        pixel_bytes = file.tell() - len(header)
        if pixel_bytes >= 0:
            done = pixel_bytes // image_bytes // BLOCK * BLOCK
            file.truncate(len(header) + done * image_bytes)
        else:
            done = 0
            file.truncate(0)
            file.write(header)
        batches = [list(range(start, min(start + BLOCK, shape[0]))) for start in range(done, shape[0], BLOCK)]
        transform = v2.Compose([v2.Resize(shape[2]), v2.CenterCrop(shape[2]), v2.PILToTensor()])
        loader = load_batches(TransformedImages(folder, transform), batches, workers, torch.device("cpu"))
        for images, _ in tqdm(loader, f"decoding {partial.stem}", len(batches), disable=None, unit="batch"):
            file.write(images.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
