"""Aggregates along the edges of a tree from kept codes: values of the few latents whose relatives are active.

Which these are follows from where codes are kept, and is found once a step; values are made from it with or without
gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.saes.kept import at
from train.saes.places import Places


class Aggregate(ABC):
    """An aggregate of kept codes.

    Attributes:
        places: where it may be above 0, [tokens, latents of its level].
    """

    places: Places

    @abstractmethod
    def of(self, codes: Float[Tensor, " K"], weights: Float[Tensor, " C"]) -> Float[Tensor, " A"]:
        """Its values there, from the kept codes and the weights of the edges above the lower level's latents."""


@dataclass(frozen=True)
class Gathered(Aggregate):
    """Σ w_c f_c over the kept children of each parent.

    Attributes:
        children: kept codes that have a parent, and which of all kept ones they are.
        family: number of each one's parent among `places`.
    """

    places: Places
    children: Places
    numbers: Int[Tensor, " K"]
    family: Int[Tensor, " K"]
    n_children: int

    @classmethod
    def from_children(cls, kept: Places, n_parents: int, n_children: int) -> Gathered:
        """That of codes kept at these places, of which the first n_parents · n_children latents have a parent."""
        numbers = (kept.column < n_parents * n_children).nonzero().squeeze(-1)
        children = Places.numbered(kept.number[numbers], kept.n_rows, kept.n_columns)
        parents = children.row * n_parents + children.column // n_children
        found, family = torch.unique_consecutive(parents, return_inverse=True)
        return cls(Places.numbered(found, kept.n_rows, n_parents), children, numbers, family, n_children)

    def of(self, codes: Float[Tensor, " K"], weights: Float[Tensor, " C"]) -> Float[Tensor, " A"]:
        values = codes.gather(0, self.numbers) * at(weights, self.children)
        # a column per child, since sums by index_add_ would be in any order on a GPU
        families = values.new_zeros(len(self.places.column), self.n_children)
        return families.index_put((self.family, self.children.column % self.n_children), values).sum(-1)


@dataclass(frozen=True)
class HandedDown(Aggregate):
    """w_c f_p for every child c of each kept parent p."""

    places: Places
    n_children: int

    @classmethod
    def from_parents(cls, kept: Places, n_children: int, n_latents: int) -> HandedDown:
        """That of parents whose codes are kept at these places, for a level of so many latents."""
        own = torch.arange(n_children, device=kept.column.device)
        columns = kept.column[:, None] * n_children + own
        return cls(Places(kept.first * n_children, columns.flatten(), n_latents), n_children)

    def of(self, codes: Float[Tensor, " K"], weights: Float[Tensor, " C"]) -> Float[Tensor, " A"]:
        return codes[:, None].expand(-1, self.n_children).flatten() * at(weights, self.places)
