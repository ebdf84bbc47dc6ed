"""The levels of an SAE from general to specific, and controls for SAEs that have none, or no links between them.

A variant says which of its groups are levels and how they are linked (`SAE.links`). An SAE without gets pseudo-levels:
its latents by density, the densest first, cut into shares. Levels without links get a post-hoc tree: a lower latent's
parent is the upper one of largest φ > 0 on the first half of the documents, with φ as the edge's weight. Whatever a
hierarchy scores above these has not come from density and correlation alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from common.errors import ConfigError
from train.evaluate.coactivity import correlations
from train.evaluate.codes import Codes
from train.saes.base import SAE
from train.saes.parts import side_by_side


@dataclass(frozen=True)
class Ladder:
    """Levels, the most general first.

    Attributes:
        levels: name to numbers of latents, int64.
        links: weights [upper, lower] of each pair of neighbours, on the CPU; None where there are none.
        own: whether the levels are the variant's, or pseudo-levels.
    """

    levels: dict[str, np.ndarray]
    links: list[Tensor | None]
    own: bool

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(pairwise(self.levels))


@torch.no_grad()
def ladder_of(sae: SAE, density: np.ndarray, shares: str) -> Ladder:
    """The levels of an SAE; pseudo-levels of these shares where it has none.

    Args:
        density: share of tokens on which each latent is active [latents].
        shares: as in `--levels`.

    Raises:
        ConfigError: shares that are no numbers above 0, or one level only.
    """
    found = sae.links()
    if found:
        names = list(dict.fromkeys(name for pair in found for name in pair))
        groups, every = sae.groups(), np.arange(sae.d_sae)
        links = [None if weights is None else weights.detach().cpu().float() for weights in found.values()]
        return Ladder({name: every[groups[name]] for name in names}, links, own=True)
    order = np.argsort(-density, kind="stable")
    places = side_by_side(sizes_of(shares, sae.d_sae))
    levels = {f"pseudo {number}": np.sort(order[place]) for number, place in enumerate(places, start=1)}
    return Ladder(levels, [None] * (len(levels) - 1), own=False)


def sizes_of(shares: str, d_sae: int) -> list[int]:
    """Latents of each level; raises as `ladder_of`."""
    try:
        weights = [float(part) for part in shares.split(",")]
    except ValueError:
        weights = []
    if len(weights) < 2 or min(weights) <= 0:
        raise ConfigError(f"--levels {shares}: at least two numbers above 0 are needed, such as 1,1,2")
    ends = [round(d_sae * sum(weights[: number + 1]) / sum(weights)) for number in range(len(weights))]
    return [stop - start for start, stop in pairwise([0, *ends])]


def post_hoc_tree(codes: Codes, lower: np.ndarray, upper: np.ndarray) -> Tensor:
    """φ of each of the latents `lower` (numbers) with its parent among `upper`, 0 elsewhere: [upper, lower]."""
    first = slice(0, codes.middle)
    below, above = (sparse.csc_array(codes.values[:, chosen].tocsr()[first]) for chosen in (lower, upper))
    best, parent = np.zeros(len(lower)), np.zeros(len(lower), dtype=np.int64)
    for block, phi in correlations(below, above):
        strongest = phi.argmax(1)
        values = phi[np.arange(len(lower)), strongest]
        parent = np.where(values > best, block.start + strongest, parent)
        best = np.maximum(best, values)
    weights = torch.zeros(len(upper), len(lower))
    weights[torch.from_numpy(parent), torch.arange(len(lower))] = torch.from_numpy(best).float()
    return weights
