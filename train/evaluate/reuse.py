"""How lower latents are shared among upper ones, from weights A ≥ 0 [upper, lower] (evaluation spec §5.2).

Parts of an upper latent are the lower ones with more than a tenth of its largest weight. A lower latent's out-degree
is how many upper ones it is part of. The overlap of two upper latents is the Jaccard index of their parts; it is held
against bipartite graphs with the same degrees on both sides, drawn by trades of parts between two upper latents
(curveball; Strona et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.gini import gini

IS_PART = 0.1  # of the largest weight of an upper latent
GRAPHS = 30
TRADES, FIRST_TRADES = 2, 10  # per upper latent: between two graphs, and before the first


@dataclass(frozen=True)
class Reuse:
    """See the module.

    Attributes:
        none, once, shared: shares of lower latents with an out-degree of 0, 1, and 2 or more.
        gini: of the out-degrees; 0 when all are equal.
        in_degree: mean number of parts of an upper latent that has any.
        parts: mean effective number of parts, exp of the entropy of an upper latent's weights.
        overlap: mean Jaccard index over pairs of upper latents.
        overlap_z: how far it lies above that of random graphs, in their standard deviations; None if they all have one.
    """

    none: float
    once: float
    shared: float
    gini: float
    in_degree: float
    parts: float
    overlap: float
    overlap_z: float | None


def is_part(weights: Tensor) -> Tensor:
    """Which lower latents are parts of each upper one, bool [upper, lower]."""
    return (weights > IS_PART * weights.amax(1, keepdim=True)) & (weights > 0)


def is_edge(weights: Tensor) -> Tensor:
    """Which pairs are edges, bool [upper, lower]: in a tree all that have a weight, elsewhere the parts.

    The children of a tree's latent are its children however little one weighs beside another. Where lower latents have
    several candidates above them, training leaves most with next to no weight: those are no edges.
    """
    linked = weights > 0
    return linked if int(linked.sum(0).max()) <= 1 else is_part(weights)


def reuse_of(weights: Tensor, seed: int = 0) -> Reuse:
    """Of weights [upper, lower]; upper latents with no weight at all are left out of `parts`."""
    parts = is_part(weights)
    degree = parts.sum(0)
    share = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    effective = torch.exp(-torch.xlogy(share, share).sum(1))[weights.sum(1) > 0]
    overlap = mean_overlap(parts.numpy())
    others = np.array([mean_overlap(graph) for graph in graphs_of_equal_degree(parts.numpy(), seed)])
    spread = float(others.std())
    return Reuse(
        none=float((degree == 0).double().mean()),
        once=float((degree == 1).double().mean()),
        shared=float((degree >= 2).double().mean()),
        gini=gini(degree.double()),
        in_degree=float(parts.sum()) / max(int(parts.any(1).sum()), 1),
        parts=float(effective.mean()) if len(effective) else 0.0,
        overlap=overlap,
        overlap_z=(overlap - float(others.mean())) / spread if spread > 1e-12 else None,
    )


def mean_overlap(parts: np.ndarray) -> float:
    """Mean Jaccard index of the rows of a bool [upper, lower], over pairs of rows; 0 where neither has a part."""
    rows = sparse.csr_array(parts.astype(np.float64))
    both = sparse.coo_array(rows @ rows.T)  # pairs with nothing in common are not stored
    size = parts.sum(1)
    apart = both.row != both.col
    common = both.data[apart]
    either = size[both.row[apart]] + size[both.col[apart]] - common
    return float((common / either).sum()) / max(len(parts) * (len(parts) - 1), 1)


def graphs_of_equal_degree(parts: np.ndarray, seed: int) -> list[np.ndarray]:
    """Random graphs with the row and column sums of a bool [upper, lower]."""
    generator = np.random.default_rng(seed)
    sets = [set(np.flatnonzero(row).tolist()) for row in parts]
    graphs = []
    for number in range(GRAPHS):
        for _ in range((TRADES if number else FIRST_TRADES) * len(sets)):
            trade(sets, generator)
        graph = np.zeros_like(parts)
        for row, members in enumerate(sets):
            graph[row, list(members)] = True
        graphs.append(graph)
    return graphs


def trade(sets: list[set[int]], generator: np.random.Generator) -> None:
    """Two rows share out anew, at random, what only one of them has; each keeps its number."""
    first, second = generator.integers(len(sets), size=2)
    if first == second:
        return
    common, only = sets[first] & sets[second], len(sets[first] - sets[second])
    pool = generator.permutation(sorted(sets[first] ^ sets[second])).tolist()
    sets[first], sets[second] = common | set(pool[:only]), common | set(pool[only:])
