"""Random numbers as a pure function of (seed, purpose, step).

No generator keeps its state between steps. A resumed run therefore needs no saved generator state, and arms with the
same seed get the same batches, views and initial weights. Numbers are drawn on the CPU and copied to the device,
because CUDA generators give other numbers than the CPU generator, and these differ between GPU models. The exceptions
are dropout and stochastic depth, which draw on the device (`reseed`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from common.devices import upload


def key(seed: int, purpose: str, step: int = 0) -> int:
    """Return a 63-bit key, a hash of (seed, purpose, step)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """Return a new CPU generator, seeded from (seed, purpose, step)."""
    return torch.Generator().manual_seed(key(seed, purpose, step))


@contextmanager
def seeded_fork_rng(seed: int, purpose: str) -> Iterator[None]:
    """Context manager: seed the default CPU generator from (seed, purpose), and restore its state afterwards.

    Each module of a network is built with a separate seed, so arms without a module initialise the others identically.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, purpose))
        yield


def reseed(seed: int, purpose: str, step: int, rank: int = 0) -> None:
    """Seed the default generators of all devices for this step.

    Dropout and stochastic depth draw from them, so their masks depend on the device.
    """
    torch.manual_seed(key(seed, f"{purpose} of rank {rank}", step))


class SampleRNG:
    """Per-sample random numbers of one step, on the CPU.

    Numbers are drawn for all `count` samples of the global batch, and the slice `rows` of them is returned. A sample
    therefore gets the same numbers on one device and on any rank of a distributed run.
    """

    def __init__(self, seed: int, purpose: str, step: int, count: int, rows: slice = slice(None)):
        self.count, self.rows = count, rows
        self._numpy_generator = np.random.Generator(np.random.Philox(key=key(seed, purpose, step)))
        self._generator = generator(seed, purpose, step)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniform numbers in [low, high), (rows, *shape) float32."""
        numbers = torch.rand((self.count, *shape), generator=self._generator)
        return numbers[self.rows] * (high - low) + low

    def numpy_uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return uniform numbers in [0, 1), (rows, *shape) float64, from an independent NumPy generator."""
        return self._numpy_generator.random((self.count, *shape))[self.rows]


def permutation(seed: int, purpose: str, step: int, length: int, device: torch.device | str) -> Tensor:
    """Return a random permutation of 0..length-1, drawn on the CPU, (length,) int64 on `device`."""
    return upload(torch.randperm(length, generator=generator(seed, purpose, step)), device)


def held_out_split(count: int, device: torch.device | str, data_seed: int) -> tuple[Tensor, Tensor]:
    """Split the rows of a training set into nine tenths and a held-out tenth: sorted indices, int64 on `device`.

    Hyper-parameters are chosen on the held-out tenth, never on the test split.
    """
    order = permutation(data_seed, "held-out tenth", 0, count, "cpu")
    rest, held_out = order[count // 10 :].sort().values, order[: count // 10].sort().values
    return rest.to(device), held_out.to(device)
