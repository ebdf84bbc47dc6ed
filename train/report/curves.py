"""A kind's figures at one L0, seed by seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from train.report.points import FIGURES, Point

BEYOND = 1.1  # how far outside of a curve's L0 the figure of its end still stands for the L0 wanted
EQUAL = 1.02  # L0s this close are one: points are merged, and figures compared


def each_seed(members: Sequence[Point]) -> dict[int, dict[str, float]]:
    """Figures by seed of a kind with no L0 of its own to aim at."""
    return {
        point.seed: point.figures | {"l0": point.l0, "tokens_per_s": point.tokens_per_s or math.nan}
        for point in members
    }


def at_l0(members: Sequence[Point], l0: float) -> dict[int, dict[str, float]]:
    """Figures at this L0 by seed, `l0` the one they are of; a seed whose curve does not come near it is left out."""
    curves: dict[int, list[Point]] = defaultdict(list)
    for point in members:
        curves[point.seed].append(point)
    found = {}
    for seed, curve in curves.items():
        merged = merge(curve)
        l0s = [float(np.mean([point.l0 for point in near])) for near in merged]
        if not l0s[0] / BEYOND <= l0 <= l0s[-1] * BEYOND:
            continue
        where = np.log(np.maximum(l0s, 1e-9))
        values = {
            name: float(np.interp(math.log(l0), where, [np.mean([p.figures[name] for p in near]) for near in merged]))
            for name in FIGURES
        }
        speed = float(np.median([point.tokens_per_s or math.nan for point in curve]))
        found[seed] = values | {"l0": min(max(l0, l0s[0]), l0s[-1]), "tokens_per_s": speed}
    return found


def merge(curve: Sequence[Point]) -> list[list[Point]]:
    """Points by rising L0, those of practically one L0 together: the line between them would be noise."""
    merged: list[list[Point]] = []
    for point in sorted(curve, key=lambda point: point.l0):
        if merged and point.l0 <= merged[-1][0].l0 * EQUAL:
            merged[-1].append(point)
        else:
            merged.append([point])
    return merged
