"""Which latents of two levels are active together, a block of upper latents at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from train.evaluate.codes import switched

BLOCK = 256  # upper latents whose counts with all lower ones are held


def together(lower: sparse.csc_array, upper: sparse.csc_array) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of upper latents, and on how many tokens each lower and each of them are active: [lower, block]."""
    lower_on, upper_on = switched(lower).T.tocsr(), switched(upper)
    for start in range(0, upper.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, upper.shape[1]))
        yield block, (lower_on @ upper_on[:, block]).toarray()


def correlations(lower: sparse.csc_array, upper: sparse.csc_array) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of upper latents, and φ of the events "active" [lower, block]; 0 where one of them never varies."""
    n = max(lower.shape[0], 1)
    p, q = np.diff(lower.indptr) / n, np.diff(upper.indptr) / n
    for block, both in together(lower, upper):
        spread = np.sqrt((p * (1 - p))[:, None] * (q * (1 - q))[block])
        covariance = both / n - p[:, None] * q[block]
        yield block, np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)


def strongest(lower: sparse.csc_array, upper: sparse.csc_array, among: np.ndarray, count: int) -> np.ndarray:
    """The `count` lower latents `among` (bool) of largest |φ| with each upper one, largest first: [upper, count]."""
    candidates = np.flatnonzero(among)
    count = min(count, len(candidates))
    found = np.zeros((upper.shape[1], count), dtype=np.int64)
    for block, phi in correlations(lower, upper):
        order = np.argsort(-np.abs(phi[candidates]), axis=0, kind="stable")[:count]
        found[block] = candidates[order].T
    return found
