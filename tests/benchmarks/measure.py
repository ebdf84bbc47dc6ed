"""Interleaved timing of two or more things, as medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(things: dict[str, Callable[[], object]], rounds: int = 7, warmups: int = 1) -> dict[str, Timing]:
    """Run all `things` in turn, `rounds` times after the warm-ups: A B A B …"""
    for _ in range(warmups):
        for thing in things.values():
            thing()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, thing in things.items():
            started = time.perf_counter()
            thing()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(values) for name, values in seconds.items()}


def median_ratio(a: Timing, b: Timing) -> float:
    """Median over the rounds of a's seconds over b's, pair by pair."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        ratio: ours against the floor or peer, above 1 is faster than it.
        wanted: what the ratio should at least be.
    """

    name: str
    ours: str
    against: str
    ratio: float
    wanted: float
