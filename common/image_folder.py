"""Image folders (`train/<class>/*`, `val/<class>/*`): decoded once into a cache, or streamed by DataLoader workers."""

import copy
import errno
import hashlib
import os
import signal
import sys
import tempfile
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
from common.files import PERMANENT_ERRORS, error_reason
from common.image_file import UnreadableImage, open_rgb
from common.lock import wait_for_lock

if TYPE_CHECKING:  # imported in the functions that need it: it takes 2 s, and the demo starts a hundred processes
    from torchvision import datasets

# Loader workers send tensors through a socket TMPDIR/pymp-12345678/listener-12345678. A longer address than 107 bytes
# would be an error in a background thread, and the training process would wait for ever.
MAX_TEMP_PATH = 75
BLOCK = 256  # images per batch in decoding and evaluation
SAMPLED = 500  # images per split whose bytes enter the digest of a streamed folder
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # those of torchvision


def open_folder(root: Path) -> "datasets.ImageFolder":
    """Open DATA/train or DATA/val as torchvision's ImageFolder with `open_rgb` as its loader.

    Hidden files and folders are ignored. Prints a warning with the number of ignored files. Exits with code 2 if
    `root` has no class folders with images, or a class folder without images.
    """
    from torchvision import datasets

    no_images = (
        f"--data {root.parent}: {root} has no class folders with images: "
        "give a folder with train/CLASS/* and val/CLASS/*"
    )
    try:
        folder = datasets.ImageFolder(str(root), loader=open_rgb, allow_empty=True)
    except PermissionError as error:
        fail(f"--data {root.parent}: {error.filename} cannot be read ({error.strerror}): change its permissions")
    except OSError:
        fail(no_images)
    classes = [name for name in folder.classes if not name.startswith(".")]
    samples = []
    for path, label in folder.samples:
        if folder.classes[label] in classes and not Path(path).name.startswith("."):
            samples.append((path, classes.index(folder.classes[label])))
    if not classes:
        fail(no_images)
    if empty := set(range(len(classes))) - {label for _, label in samples}:
        fail(f"--data {root.parent}: {root / classes[min(empty)]} has no images: add images "
             f"({', '.join(datasets.folder.IMG_EXTENSIONS)}) or delete the folder")  # fmt: skip
    folder.classes, folder.class_to_idx = classes, {name: label for label, name in enumerate(classes)}
    folder.samples = folder.imgs = samples
    folder.targets = [label for _, label in samples]
    if ignored := describe_ignored(root, len(samples)):
        print(f"warning: {root}: {ignored} ignored", file=sys.stderr)
    return folder


def describe_ignored(root: Path, used: int) -> str:
    """Return the number of files in `root` other than the `used` images, and of unreadable folders; "" if none."""
    unreadable: list[OSError] = []
    suffixes: Counter[str] = Counter()
    for _, _, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        suffixes.update("hidden" if name.startswith(".") else Path(name).suffix.lower() for name in names)
    count = suffixes.total() - used
    parts = []
    if count:
        frequent = [suffix or "no suffix" for suffix, _ in suffixes.most_common() if suffix not in IMAGE_SUFFIXES]
        parts.append(f"{count} files ({', '.join(frequent[:4])})")
    if unreadable:
        parts.append(f"{len(unreadable)} folders that cannot be read ({unreadable[0].filename})")
    return " and ".join(parts)


def open_splits(data: Path) -> "tuple[datasets.ImageFolder, datasets.ImageFolder]":
    """Open `data`/train and `data`/val. Exits with code 2 if their classes differ."""
    train, test = open_folder(data / "train"), open_folder(data / "val")
    if difference := set(train.classes) ^ set(test.classes):
        fail(f"--data {data}: classes {sorted(difference)[:3]} are only in train or only in val: make them equal")
    if len(train.classes) < 2:
        fail(f"--data {data}: there is only the class {train.classes[0]}: give at least two class folders")
    return train, test


def contains_images(data: Path) -> bool:
    """Return whether `data` contains train/ or val/, or images directly or one folder below."""
    if (data / "train").is_dir() or (data / "val").is_dir():
        return True
    for folder in (data, *(path for path in data.glob("*") if path.is_dir())):
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.glob("*.*")):
            return True
    return False


def file_status(path: str) -> os.stat_result:
    """Return os.stat of an image. Exits with code 2 if that fails, for example for a broken symbolic link."""
    try:
        return os.stat(path)
    except OSError as error:
        fail(f"--data: image {path} cannot be read ({error.strerror}): replace or delete it")


def content_digest(data: Path, splits: "Sequence[datasets.ImageFolder]") -> str:
    """Return a sha256 of the names and sizes of all images and of the bytes of up to SAMPLED images of each split.

    It does not change when the folder is copied. Changes of a few images without a change of size may be missed.
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
    """Return a sha256 of name, size, mtime and ctime of all images. It changes when any image is replaced."""
    sha256 = hashlib.sha256()
    for path, _ in folder.samples:
        status = file_status(path)
        entry = f"{Path(path).relative_to(folder.root)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
        sha256.update(entry.encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


class TransformedImages(Dataset):
    """Images of an ImageFolder with `transform` applied; item i is (image, label)."""

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable):
        self.folder, self.transform = folder, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        return self.transform(image), label


class RandomViews(Dataset):
    """Random views of the images of an ImageFolder; item i is the list of `n_views` outputs of the transform, uint8:
    (3, S, S), in ConMIM with a leading axis of views.

    Each view is seeded from (seed, epoch, index, view), so it does not depend on the worker that computes it.
    """

    def __init__(self, folder: "datasets.ImageFolder", transform: Callable, n_views: int, seed: int, epoch: int):
        self.folder, self.transform, self.n_views, self.seed, self.epoch = folder, transform, n_views, seed, epoch

    def __getitem__(self, index: int) -> list[Tensor]:
        image, _ = self.folder[index]
        views = []
        for view in range(self.n_views):
            with seeding.seeded_fork_rng(self.seed, f"view {view} of epoch {self.epoch} of image {index}"):
                views.append(self.transform(image))
        return views


def load_batches(dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device) -> Iterator:
    """Yield the batches with the indices in `batches`, loaded by `workers` processes; in pinned memory for a GPU.

    Exits with code 2 if an image cannot be decoded, or if workers cannot communicate because TMPDIR is too long.
    """
    if workers and len(os.fsencode(tempfile.gettempdir())) > MAX_TEMP_PATH:
        fail(f"TMPDIR {tempfile.gettempdir()} is too long for --workers: set TMPDIR to a path of at most "
             f"{MAX_TEMP_PATH} bytes, or use --workers 0")  # fmt: skip
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
    except UnreadableImage as error:
        message = str(error).strip().splitlines()[-1]  # an error in a worker has the worker's traceback before it
        fail(f"--data: image {message.split('UnreadableImage: ')[-1]}")


def ignore_sigint(worker: int) -> None:
    """Ignore Ctrl-C in a worker: the terminal sends it to all processes, and the parent process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamedImages:
    """An image folder with images above 64 pixels, decoded batch by batch in DataLoader workers.

    `interpolation` (of torchvision) is that of the test views.
    """

    def __init__(
        self,
        data: Path,
        size: int,
        workers: int,
        device: torch.device,
        data_seed: int = 0,
        interpolation: str = "bilinear",
    ):
        self.train, self.test = open_splits(data)
        self.size, self.workers, self.device, self.data_seed = size, workers, device, data_seed
        self.interpolation = interpolation
        self.examples, self.classes = len(self.train), len(self.train.classes)
        self.digest = content_digest(data, (self.train, self.test))
        check_contrast(self.train)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet's statistics
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def subset(self, count: int) -> "StreamedImages":
        """Return a copy with at most `count` images of each split: the same random subset as `Images.subset`."""

        def select(folder: "datasets.ImageFolder") -> "datasets.ImageFolder":
            rows = seeding.permutation(self.data_seed, "few", 0, len(folder), "cpu")[:count].tolist()
            selected = copy.copy(folder)
            selected.samples = selected.imgs = [folder.samples[row] for row in rows]
            selected.targets = [folder.targets[row] for row in rows]
            return selected

        subset = copy.copy(self)
        subset.train, subset.test = select(self.train), select(self.test)
        subset.examples = len(subset.train)
        return subset

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images (..., 3, S, S), uint8 only, by ImageNet's channel mean and std after division by 255."""
        return (images / 255 - self.mean) / self.std

    def views(
        self, transform: Callable, n_views: int, batches: list[list[int]], seed: int, epoch: int
    ) -> Iterator[list[Tensor]]:
        """Yield `n_views` batches of outputs of the transform, uint8 on the device, for each list of B indices."""
        dataset = RandomViews(self.train, transform, n_views, seed, epoch)
        for batch in load_batches(dataset, batches, self.workers, self.device):
            yield [view.to(self.device, non_blocking=True) for view in batch]

    def batches(self, split: str, start: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, 3, S, S) and labels (B,) of `split` ("train", "test"): every `step`-th image.

        The images are test views: the shorter side is resized to 8/7 of the size (256 for 224) with the folder's
        interpolation, then the centre is cropped.
        """
        from torchvision.transforms import v2

        folder = self.train if split == "train" else self.test
        resize = v2.Resize(round(self.size * 8 / 7), v2.InterpolationMode(self.interpolation))
        transform = v2.Compose([resize, v2.CenterCrop(self.size), v2.PILToTensor()])
        rows = list(range(start, len(folder), step))
        batches = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
        for x, y in load_batches(TransformedImages(folder, transform), batches, self.workers, self.device):
            yield self.normalise(x.to(self.device, non_blocking=True)), y.to(self.device, non_blocking=True)


def check_contrast(folder: "datasets.ImageFolder") -> None:
    """Decode about 20 images. Exits with code 2 if an image cannot be decoded, or if all pixels have the same value."""
    values: set[int] = set()
    for index in range(0, len(folder), max(1, len(folder) // 20)):
        try:
            values |= set(np.unique(np.asarray(folder[index][0])).tolist())
        except UnreadableImage as error:
            fail(f"--data: image {error}")
    if len(values) == 1:
        fail(f"--data: all pixels of the images in {folder.root} are equal: give images that are not constant")


def load_cached(
    folder: "datasets.ImageFolder", name: str, size: int, cache: Path, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Return all images as one uint8 tensor (N, 3, size, size) on the CPU, and labels (N,) int64.

    The shorter side is resized to `size`, then the centre is cropped. Images are decoded once into a file in `cache`,
    named after `name` and `cache_key`. A file lock makes other processes wait, and interrupted decoding resumes. Exits
    with code 2 if the folder `cache` is not writable or the file is damaged, with code 4 if the disk is full.
    """
    shape = (len(folder), 3, size, size)
    path = cache / f"{name}-{size}-{cache_key(folder)[:12]}.npy"
    partial = path.with_suffix(".part")
    if not path.exists():
        try:
            with open(path.with_suffix(".lock"), "w") as lock:
                wait_for_lock(lock, f"the image cache {path}")
                if not path.exists():
                    decode(folder, partial, shape, workers)
                    os.replace(partial, path)
        except OSError as error:
            code = EXIT_DISK if error.errno in PERMANENT_ERRORS - {errno.EROFS} else EXIT_USER
            reason = error.strerror or error_reason(error)
            fail(f"--data {cache}: image cache {path} cannot be written ({reason}): free disk space or change its "
                 "permissions", code)  # fmt: skip
    try:
        pixels = np.load(path)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"{pixels.dtype} of shape {pixels.shape}")
    except (ValueError, EOFError) as error:
        fail(f"image cache {path} is damaged ({error_reason(error)}): delete it to decode the images again")
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
