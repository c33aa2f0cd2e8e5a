"""Fixtures of several tests: one thread, and a tiny folder of real picture files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train/ and val/ with two classes of PNG files, 40x36 pixels: red or blue on noise; 24 and 8 a class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, channel in (("red", 0), ("blue", 2)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                pixels[8:28, 8:30, channel] = rng.integers(150, 255)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def arms(paper: str) -> dict[str, list[str]]:
    """The arms of the Makefile with their flags."""
    lines = re.findall(rf"^{paper}\.([\w-]+) +:=(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name: flags.split() for name, flags in lines}


def tiny(folder, pictures, *flags) -> list[str]:
    """Arguments of a SimSiam run of two epochs, three steps each, on the tiny pictures."""
    common = ["--data-set", "folder", "--size", "32", "--data", str(pictures), "--batch", "16", "--neighbours", "5"]
    return [*common, "--epochs", "2", "--device", "cpu", "--out", str(folder), *flags]
