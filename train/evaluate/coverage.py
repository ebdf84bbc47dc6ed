"""Scores of edges with intervals over documents, and what coverage hides: dense parents, and edges between directions.

The scores are those of `structure`; here their sums are kept by document. Coverage is gamed by dense parents, so the
density of parents stands beside it. A single edge is judged by its direction too (the criterion of Tree SAE): with
d* the mean activation where the child is active, less that where the parent is active and the child silent,

    S_res = min(cos(d*, d_child), cos(d*, d_parent))      rank test: both are among the 5 rows nearest to d*
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_intervals
from train.evaluate.codes import LEAST_ACTIVE, Codes, switched
from train.evaluate.structure import DENSE_PARENT, Edges, EdgeScores, scores_from

COPY = 0.95  # cosine above which a row is called a copy of another
NEAREST = 5
MOST_EDGES = 2000  # edges whose directions are compared, drawn at random
AT_ONCE = 8192  # tokens whose activations are held in float64
BY_PARENT = ("p", "any", "pairs", "f", "a", "ff", "aa", "fa")


@dataclass(frozen=True)
class EdgeSums:
    """`structure.edge_sums` by document: [documents, all of them side by side]."""

    by_document: Tensor
    edges: Edges

    def named(self, sums: Tensor) -> dict[str, Tensor]:
        """One row taken apart."""
        n_parents = self.edges.parents.stop - self.edges.parents.start
        n_children = self.edges.children.stop - self.edges.children.start
        parts = sums.split([n_parents] * len(BY_PARENT) + [n_children, 1])
        return dict(zip((*BY_PARENT, "c", "tokens"), parts, strict=True))

    def scores(self, sums: Tensor | None = None) -> EdgeScores:
        """Of all documents, or of these sums."""
        return scores_from(self.named(self.by_document.sum(0) if sums is None else sums), self.edges)

    def intervals(self, figures: Callable[[EdgeScores], list[float]]) -> list[tuple[float, float] | None]:
        """Of figures of the scores."""
        return bootstrap_intervals(self.by_document, lambda sums: torch.tensor(figures(self.scores(sums))))


def edge_sums_by_document(codes: Codes, edges: Edges) -> EdgeSums:
    """Sums over all tokens; parents and children lie among the latents of `codes`."""
    upper, lower = codes.values[:, edges.parents].astype(np.float64), codes.values[:, edges.children]
    ends = (edges.child.numpy(), edges.parent.numpy())
    shape = (lower.shape[1], upper.shape[1])
    on, lower_on = switched(upper), switched(lower)
    a = (lower.astype(np.float64) @ sparse.csc_array((edges.weight.double().numpy(), ends), shape=shape)) * on
    n_children = (lower_on @ sparse.csc_array((np.ones(len(ends[0])), ends), shape=shape)) * on
    by_token = [on, n_children.astype(bool), n_children, upper, a, upper * upper, a * a, upper * a, lower_on]
    tokens = np.bincount(codes.document, minlength=codes.n_documents)[:, None]
    sums = [codes.by_document(values) for values in by_token]
    return EdgeSums(torch.from_numpy(np.concatenate([*sums, tokens], axis=1)), edges)


def parent_densities(codes: Codes, edges: Edges) -> tuple[float, float]:
    """Mean density of the parents, edge by edge, and the share of edges whose parent is active on over a fifth."""
    density = torch.from_numpy(codes.density[edges.parents])[edges.parent]
    return float(density.mean()), float((density > DENSE_PARENT).double().mean())


def copied_share(rows: Tensor, edges: Edges, alive: np.ndarray) -> float:
    """Share of the alive parents (numbers) whose row is nearly that of one of their children; NaN where none has any.

    Args:
        rows: unit decoder rows of the latents that the edges are between.
    """
    counted = torch.isin(edges.parent, torch.from_numpy(alive))
    parent, child = edges.parent[counted], edges.child[counted]
    cosine = (rows[parent + edges.parents.start] * rows[child + edges.children.start]).sum(-1)
    n = len(parent.unique())
    return len(parent[cosine > COPY].unique()) / n if n else float("nan")


@dataclass(frozen=True)
class Directions:
    """Of the edges that could be judged: S_res, and which pass the rank test."""

    residual: Tensor
    ranked: Tensor


def edge_directions(codes: Codes, edges: Edges, x: Tensor, own: Tensor, rows: Tensor, seed: int = 0) -> Directions:
    """Whether the direction that a child adds to its parent's tokens is that of both.

    An edge is judged where the child is active on ten tokens, and the parent on ten without it.

    Args:
        x: activations of the tokens of `codes` [n, d].
        own: decoder rows of the latents of `codes`; rows: those of all latents.
    """
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(edges.parent))[:MOST_EDGES]))
    parent, child = edges.parent[chosen] + edges.parents.start, edges.child[chosen] + edges.children.start
    p, c = (switched(codes.values[:, ends.numpy()]) for ends in (parent, child))
    both = p * c
    n_p, n_c, n_both = (torch.from_numpy(np.asarray(on.sum(0)).astype(np.float64))[:, None] for on in (p, c, both))
    sum_p, sum_c, sum_both = (summed(on, x) for on in (p, c, both))
    judged = ((n_c >= LEAST_ACTIVE) & (n_p - n_both >= LEAST_ACTIVE))[:, 0]
    added = sum_c / n_c.clamp_min(1) - (sum_p - sum_both) / (n_p - n_both).clamp_min(1)
    added = added[judged] / added[judged].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    cosines = [(added * own[ends[judged]].double()).sum(-1) for ends in (parent, child)]
    nearest = torch.topk(added @ rows.double().T, min(NEAREST, len(rows)), dim=1).values[:, -1]
    least = torch.minimum(*cosines)
    return Directions(least, least >= nearest - 1e-12)


def summed(on: sparse.csc_array, x: Tensor) -> Tensor:
    """Sums of activations [n, d] over the tokens of each column of `on` [n, columns], float64 [columns, d]."""
    by_token = on.tocsr()
    sums = np.zeros((on.shape[1], x.shape[1]))
    for start in range(0, len(x), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        sums += by_token[rows].T @ x[rows].double().numpy()
    return torch.from_numpy(sums)
