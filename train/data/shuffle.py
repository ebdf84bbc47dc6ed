"""The order of batches, as arithmetic: no state, no random generator, the same on every machine and version.

A pass is a keyed permutation of the chunks; `pool_chunks` consecutive ones of that order are open at once; a pool's
windows are permuted by another key; batches are consecutive slices of it all, across pools and passes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.files import fingerprint

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 1 << 14  # numbers hashed at a time


def key_of(*parts: Any) -> int:
    """A 64-bit key from JSON values."""
    return int(fingerprint(list(parts))[:16], 16)


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection on uint64: distinct inputs give distinct, well-spread outputs."""
    z = values.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(key: int, n: int, start: int = 0) -> np.ndarray:
    """`n` distinct keyed uint64 values, the i-th a function of (key, start + i) alone."""
    with np.errstate(over="ignore"):
        return mix(np.uint64(key) + np.arange(start + 1, start + n + 1, dtype=np.uint64) * GOLDEN)


def permutation(key: int, n: int) -> np.ndarray:
    """A keyed permutation of range(n), int64: the numbers in the order of their hashes' upper 31 bits."""
    return shuffled(key, np.arange(n))


def shuffled(key: int, values: np.ndarray) -> np.ndarray:
    """Rising `values` (int64, below 2^32) in the keyed permutation of their places: `values[permutation(key, n)]`.

    Each is sorted as the lower half of an integer whose upper half is the hash of its place: a million take 7 ms of
    one thread, where argsort takes 80. Hashed in blocks, which stay in the processor's cache.
    """
    keyed = np.empty_like(values)
    for start in range(0, len(values), BLOCK):
        block = slice(start, start + BLOCK)
        upper = hashes(key, len(values[block]), start) >> np.uint64(33) << np.uint64(32)
        keyed[block] = upper.view(np.int64) | values[block]
    keyed.sort()
    keyed &= 2**32 - 1
    return keyed


@dataclass(frozen=True)
class Piece:
    """Part of a batch: entries `start` to `stop` of the window order of one pool of one pass."""

    pass_number: int
    pool: int
    start: int
    stop: int


@dataclass(frozen=True)
class Order:
    """The order of all windows of one length, over any number of passes.

    Attributes:
        key: from store id, hook, data settings and seed.
        chunks: chunk numbers in the store that are trained on.
        counts: windows in each of them, in the same order.
        pool_chunks: chunks open at once.
        window: tokens per window.
    """

    key: int
    chunks: tuple[int, ...]
    counts: tuple[int, ...]
    pool_chunks: int
    window: int

    @functools.cached_property
    def windows_per_pass(self) -> int:
        return sum(self.counts)

    @property
    def pools_per_pass(self) -> int:
        return -(-len(self.chunks) // self.pool_chunks)

    def pool_members(self, pass_number: int, pool: int) -> list[int]:
        """Chunk numbers of one pool, in the order in which they lie in it. The same for every window length."""
        order = permutation(key_of(self.key, "chunks", pass_number), len(self.chunks))
        return [self.chunks[i] for i in order[pool * self.pool_chunks :][: self.pool_chunks]]

    def shuffled(self, pass_number: int, pool: int, starts: np.ndarray) -> np.ndarray:
        """A pool's windows in the order of the pass, from their rising starts: int64."""
        return shuffled(key_of(self.key, "windows", self.window, pass_number, pool), starts)

    def pool_starts(self, pass_number: int) -> np.ndarray:
        """Windows before each pool of a pass, and all of them at the end: int64 [pools + 1]."""
        if pass_number not in self._known_starts:
            counts = dict(zip(self.chunks, self.counts, strict=True))
            pools = range(self.pools_per_pass)
            sizes = [sum(counts[chunk] for chunk in self.pool_members(pass_number, pool)) for pool in pools]
            self._known_starts[pass_number] = np.concatenate([[0], np.cumsum(sizes)])
        return self._known_starts[pass_number]

    @functools.cached_property
    def _known_starts(self) -> dict[int, np.ndarray]:
        return {}  # filled as passes are asked for; their layout never changes

    def pieces(self, step: int, n_windows: int) -> Iterator[Piece]:
        """Where the windows of batch number `step` lie; more than one piece where a batch straddles pools."""
        position, left = step * n_windows, n_windows
        while left:
            pass_number, within = divmod(position, self.windows_per_pass)
            starts = self.pool_starts(pass_number)
            pool = int(np.searchsorted(starts, within, side="right")) - 1
            start = within - int(starts[pool])
            taken = min(left, int(starts[pool + 1]) - within)
            yield Piece(pass_number, pool, start, start + taken)
            position, left = position + taken, left - taken
