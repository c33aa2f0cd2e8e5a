"""Random numbers as a pure function of (seed, purpose, step): the base of exact resume.

Nothing here keeps a state between steps, so a run that goes on after a kill needs no generator
saved, and arms with one seed see equal batches, views and initial weights. All numbers are drawn on the CPU and
copied to the device: CUDA generators give other numbers than the CPU's, and other ones on another GPU.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from common.devices import upload

DATA_SEED = 0  # of every data set and split; a run's own seed never moves them


def key(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit key that differs for every (seed, purpose, step)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A fresh CPU generator for this one purpose and step."""
    return torch.Generator().manual_seed(key(seed, purpose, step))


@contextmanager
def forked(seed: int, purpose: str) -> Iterator[None]:
    """Build one part of a network under a seed of its own: arms that lack another part start equal in this one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, purpose))
        yield


def reseed(seed: int, purpose: str, step: int, rank: int = 0) -> None:
    """Seed the default generators of all devices for this step: dropout draws from them, and so differs by device."""
    torch.manual_seed(key(seed, f"{purpose} of rank {rank}", step))


class SampleRNG:
    """Per-sample random numbers of one step, on the CPU.

    They are drawn for the `count` rows of the global batch and cut to `rows`, so every rank of a
    distributed run (and a run on one device) gives the same sample the same numbers.
    """

    def __init__(
        self,
        seed: int,
        purpose: str,
        step: int,
        count: int,
        rows: slice = slice(None),
    ):
        self.count, self.rows = count, rows
        self._order = np.random.Generator(np.random.Philox(key=key(seed, purpose, step)))
        self._generator = generator(seed, purpose, step)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [low, high), (rows, *shape) float32."""
        numbers = torch.rand((self.count, *shape), generator=self._generator)
        return numbers[self.rows] * (high - low) + low

    def numpy_uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Uniform numbers in [0, 1), (rows, *shape) float64, from a second generator."""
        return self._order.random((self.count, *shape))[self.rows]


def permutation(seed: int, purpose: str, step: int, length: int, device: torch.device | str) -> Tensor:
    """A random order of 0..length-1, drawn on the CPU, (length,) int64 on `device`."""
    return upload(torch.randperm(length, generator=generator(seed, purpose, step)), device)


def held_out_split(count: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Row numbers, in order, of nine tenths of a training set and of a fixed tenth for choices, int64 on the device.

    A test split never makes a choice.
    """
    order = permutation(DATA_SEED, "held-out tenth", 0, count, "cpu")
    rest, tenth = order[count // 10 :].sort().values, order[: count // 10].sort().values
    return rest.to(device), tenth.to(device)
