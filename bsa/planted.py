"""Planted concepts: vectors that are sums of known atoms along the paths of a random tree, so that truth can be asked.

192 atoms hang in a tree (a concept is a node of it and owns the atoms from its root down: its depth), 64 more modify
any concept freely. A row is the sum of its concept's atoms, of 1 to 5 modifiers and of noise.
"""

from typing import NamedTuple

import numpy as np

TREE, MODIFIERS, WIDTH, NOISE, DEEPEST = 192, 64, 128, 0.05, 5


class Planted(NamedTuple):
    """rows (n, 128) float32; atoms (n, 256) bool, which of them a row holds; depth (n,) int64, 1 to 5."""

    rows: np.ndarray
    atoms: np.ndarray
    depth: np.ndarray


def plant(count: int = 20_000, seed: int = 0) -> Planted:
    """`count` rows; equal for equal seeds. Atoms have length 1, the noise 0.05 in each of the 128 channels."""
    random = np.random.default_rng(np.random.Philox(key=seed))
    directions = random.standard_normal((TREE + MODIFIERS, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    paths = np.zeros((TREE, TREE + MODIFIERS), dtype=bool)
    for node in range(TREE):  # eight roots; then below one of the older half that is not too deep
        if node >= 8:
            parent = random.choice(np.flatnonzero(paths[: max(8, node // 2)].sum(1) < DEEPEST))
            paths[node] = paths[parent]
        paths[node, node] = True
    concepts = random.integers(TREE, size=count)
    atoms = paths[concepts].copy()
    for row in atoms:
        row[TREE + random.choice(MODIFIERS, random.integers(1, 6), replace=False)] = True
    rows = atoms.astype(np.float64) @ directions + NOISE * random.standard_normal((count, WIDTH))
    return Planted(rows.astype(np.float32), atoms, paths[concepts].sum(1))
