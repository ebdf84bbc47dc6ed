"""Moments of the activations at one hook, and how the sums of many chunks are read: several at a time, by dask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.layout import SUMMARY

READERS = 16  # threads, which wait for the network most of the time; a task of dask is a run of chunks for each
TOGETHER = 512  # chunks whose sums are in memory at once: 19 MB at d_model 2,304


@dataclass(frozen=True)
class Moments:
    """Moments of the activations at one hook over the tokens that may be trained on.

    Attributes:
        count: tokens.
        mean: E x, float64 [d_model].
        second_moment: E x², float64 [d_model].
        max_abs: largest |x| of any element.
    """

    count: int
    mean: np.ndarray
    second_moment: np.ndarray
    max_abs: float

    @property
    def mean_squared_norm(self) -> float:
        """E ‖x‖²."""
        return float(self.second_moment.sum())

    @property
    def variance(self) -> float:
        """E ‖x − E x‖², summed over dimensions."""
        return float(self.second_moment.sum() - (self.mean**2).sum())

    def summary(self) -> dict[str, np.ndarray]:
        """What a store keeps of them for other readers: float64 [d_model] or [1], by name."""
        return {name: np.atleast_1d(np.asarray(getattr(self, name), np.float64)) for name in SUMMARY}


def in_order(read: Callable[[int], np.ndarray], chunks: Sequence[int], few: int) -> Iterator[np.ndarray]:
    """`read` of every chunk, in the order given, as adding floats needs it; side by side where there are more than few.

    Args:
        few: so many are read one after another before threads would have begun.

    Raises:
        GranaryError: one that `read` raised.
    """
    if len(chunks) <= few:
        yield from map(read, chunks)
        return
    from dask.threaded import get

    for start in range(0, len(chunks), TOGETHER):
        block = chunks[start : start + TOGETHER]
        size = -(-len(block) // READERS)
        runs = [block[first : first + size] for first in range(0, len(block), size)]
        tasks = {f"sums-{number}": (read_run, read, list(run)) for number, run in enumerate(runs)}
        for sums in get(tasks, list(tasks), num_workers=READERS):
            yield from sums


def read_run(read: Callable[[int], np.ndarray], chunks: list[int]) -> list[np.ndarray]:
    return [read(chunk) for chunk in chunks]
