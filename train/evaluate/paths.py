"""Paths through the active latents of a token, from general to specific, and how latents are shared out among them.

A path is a longest chain of active latents of neighbouring levels that are linked, such as (top, mid, leaf); where a
level's latent is silent it begins or ends there. With w_uv the weight of the link from u down to v and f the codes,

    down(u → v) = w_uv f_v / Σ over u's active children      up(v → u) = w_uv f_u / Σ over v's active parents

A latent belongs to a path by the product of `up` along the path above it and of `down` below it. Over all paths
through it these shares sum to 1, so whatever is given to latents is given to paths in full. In a tree each latent has
one parent and `up` is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """The paths of N tokens.

    Attributes:
        token: whose path it is, ascending, int64 [paths].
        latents: numbers level by level, -1 where the path has none, int64 [paths, levels].
        shares: how much of each latent belongs to it, float64 [paths, levels]; 0 where there is none.
    """

    token: Tensor
    latents: Tensor
    shares: Tensor

    def attribution(self, of_latents: Tensor) -> Tensor:
        """What paths get of figures of the latents of each token [N, latents]: float64 [paths]."""
        values = of_latents.double()[self.token[:, None], self.latents.clamp_min(0)]
        return (values * self.shares).sum(1)

    def kept(self, chosen: Tensor, like: Tensor) -> Tensor:
        """How much of each latent the chosen paths (bool) hold together, like `like` [N, latents]."""
        flat = torch.zeros(like.numel(), dtype=torch.float64)
        places = self.token[chosen, None] * like.shape[1] + self.latents[chosen].clamp_min(0)
        flat.index_add_(0, places.flatten(), self.shares[chosen].flatten())
        return flat.view_as(like).to(like)

    def ranks(self, scores: Tensor) -> Tensor:
        """The place of each path among those of its token, the largest score first, from 0."""
        order = np.lexsort((-scores.numpy(), self.token.numpy()))
        first = np.searchsorted(self.token.numpy(), self.token.numpy())
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order)) - first[order]
        return torch.from_numpy(ranks)


def find_paths(codes: Tensor, levels: Sequence[np.ndarray], links: Sequence[Tensor]) -> Paths:
    """The paths of every token of codes [N, latents] over levels (numbers of latents), the most general first.

    Args:
        links: weights ≥ 0 [upper, lower] between neighbours, 0 for no link. Of one level every latent is a path.
    """
    values = codes.detach().cpu().double().numpy()
    weights = [link.float().numpy() for link in links]
    found = [token_paths([row[level] for level in levels], weights) for row in values]
    counts = [len(places) for places, _ in found]
    places = np.concatenate([places for places, _ in found])
    latents = [np.where(places[:, i] >= 0, level[places[:, i]], -1) for i, level in enumerate(levels)]
    return Paths(
        token=torch.repeat_interleave(torch.arange(len(values)), torch.tensor(counts)),
        latents=torch.from_numpy(np.stack(latents, axis=1)),
        shares=torch.from_numpy(np.concatenate([shares for _, shares in found])),
    )


def token_paths(values: Sequence[np.ndarray], links: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places within the levels and shares, [paths, levels] each, from one token's codes level by level."""
    depth = len(values)
    active = [np.flatnonzero(codes > 0) for codes in values]
    ended_places, ended_shares = [], []
    places, shares, ups = begin(active[0], 0, depth)
    for level in range(depth - 1):
        above, below = active[level], active[level + 1]
        linked = links[level][np.ix_(above, below)]
        down, up = linked * values[level + 1][below], (linked * values[level][above][:, None]).T
        down = down / np.maximum(down.sum(1, keepdims=True), 1e-300)
        up = up / np.maximum(up.sum(1, keepdims=True), 1e-300)
        at = np.searchsorted(above, places[:, level])
        childless = ~np.asarray((linked > 0).any(1))[at]
        ended_places.append(places[childless])
        ended_shares.append(shares[childless])
        chain, child = np.nonzero(linked[at] > 0)
        next_shares = shares[chain] * down[at[chain], child][:, None]
        next_ups = ups[chain] * up[child, at[chain]]
        next_places = places[chain]
        next_places[:, level + 1], next_shares[:, level + 1] = below[child], next_ups
        new = begin(below[~np.asarray((linked > 0).any(0))], level + 1, depth)
        places, shares, ups = (
            np.concatenate(pair) for pair in zip((next_places, next_shares, next_ups), new, strict=True)
        )
    return np.concatenate([*ended_places, places]), np.concatenate([*ended_shares, shares])


def begin(latents: np.ndarray, level: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chains of one latent each: places and shares [chains, depth], and the product of `up` so far."""
    places = np.full((len(latents), depth), -1, dtype=np.int64)
    shares = np.zeros((len(latents), depth))
    places[:, level], shares[:, level] = latents, 1.0
    return places, shares, np.ones(len(latents))
