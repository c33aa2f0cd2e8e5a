"""Synthetic embeddings with known ground truth: each row is a sum of atoms along a path of a random tree, plus noise.

192 atoms are the nodes of the tree. A concept is one node; it has the atoms on the path from its root to that node, and
the length of this path is its depth. 64 further atoms are modifiers, which may occur with any concept. A row is the sum
of its concept's atoms, 1 to 5 modifiers and Gaussian noise.
"""

import functools
from typing import NamedTuple

import numpy as np

TREE, MODIFIERS, WIDTH, NOISE, MAX_DEPTH = 192, 64, 128, 0.05, 5


class PlantedConcepts(NamedTuple):
    """rows (n, 128) float32; atoms (n, 256) bool, True for the atoms of each row; depth (n,) int64, 1 to 5."""

    rows: np.ndarray
    atoms: np.ndarray
    depth: np.ndarray


@functools.lru_cache(maxsize=1)  # an evaluation needs them twice
def planted_concepts(count: int = 20_000, seed: int = 0) -> PlantedConcepts:
    """Return `count` rows, which depend on `seed` only. Atoms have norm 1; the noise has std 0.05 in each channel.

    Calls with equal arguments return the same arrays: do not change them.
    """
    rng = np.random.default_rng(np.random.Philox(key=seed))
    directions = rng.standard_normal((TREE + MODIFIERS, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    paths = np.zeros((TREE, TREE + MODIFIERS), dtype=bool)
    # The first eight nodes are roots. The parent of any other node is among the older half and not at the last level.
    for node in range(TREE):
        if node >= 8:
            parent = rng.choice(np.flatnonzero(paths[: max(8, node // 2)].sum(1) < MAX_DEPTH))
            paths[node] = paths[parent]
        paths[node, node] = True
    concepts = rng.integers(TREE, size=count)
    atoms = paths[concepts].copy()
    for row in atoms:
        row[TREE + rng.choice(MODIFIERS, rng.integers(1, 6), replace=False)] = True
    rows = atoms.astype(np.float64) @ directions + NOISE * rng.standard_normal((count, WIDTH))
    return PlantedConcepts(rows.astype(np.float32), atoms, paths[concepts].sum(1))
