"""A fixed tree over latents by an index rule: levels top, mid, leaf, and sums along its edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

TOP, MID, LEAF = range(3)
N_CHILDREN = {"halves": (1, 2), "fanout": (4, 4)}  # of a latent of the top, of the middle
LEAST = {"halves": 4, "fanout": 21}  # latents


@dataclass(frozen=True)
class Levels:
    """What the encoder gives, each a list [top, mid, leaf] of [B, T, latents of the level].

    Attributes:
        raw: pre-activations.
        u: the same rectified, 0 at invalid positions.
        codes: those of them that are kept.
    """

    raw: list[Tensor]
    u: list[Tensor]
    codes: list[Tensor]


@dataclass(frozen=True)
class Forest:
    """Trees over `n` latents that lie top, mid, leaf; children of one parent lie together, in the parents' order.

    `halves`: a quarter, a quarter and half of the latents; each top latent has one child, each middle one two.
    `fanout`: in proportion 1 : 4 : 16, four children each. What is left over are leaves without a parent, at the end.
    """

    n: int
    shape: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Latents of each level."""
        top = self.n // LEAST[self.shape]
        mid = top * N_CHILDREN[self.shape][TOP]
        return top, mid, self.n - top - mid

    @property
    def spans(self) -> tuple[slice, slice, slice]:
        """Where each level lies."""
        top, mid, _ = self.sizes
        return slice(0, top), slice(top, top + mid), slice(top + mid, self.n)

    def n_children(self, level: int) -> int:
        """Of each latent of the top or the middle."""
        return N_CHILDREN[self.shape][level]

    def n_linked(self, level: int) -> int:
        """How many latents of the middle or of the leaves have a parent: the first ones."""
        return self.sizes[level - 1] * self.n_children(level - 1)

    def parent(self) -> Int[Tensor, " L"]:
        """Number of each latent's parent among all latents, -1 for none."""
        parent = torch.full((self.n,), -1, dtype=torch.int64)
        for level in (MID, LEAF):
            above, first = self.spans[level - 1], self.spans[level].start
            numbers = torch.arange(above.start, above.stop).repeat_interleave(self.n_children(level - 1))
            parent[first : first + self.n_linked(level)] = numbers
        return parent

    def n_siblings(self) -> Float[Tensor, " L"]:
        """Children of each latent's parent, itself among them; 1 where there is no parent."""
        counts = torch.ones(self.n)
        for level in (MID, LEAF):
            counts[self.spans[level]] = self.n_children(level - 1)
        return counts

    def as_matrix(self, weights: Float[Tensor, " C"], level: int) -> Float[Tensor, "P C"]:
        """Weights of the edges above the latents of `level`, by parent and child, 0 where there is no edge."""
        children = torch.arange(self.n_linked(level), device=weights.device)
        edges = weights.new_zeros(self.sizes[level - 1], self.sizes[level])
        edges[children // self.n_children(level - 1), children] = weights[children]
        return edges

    def families(self, children: Shaped[Tensor, "*_ C"], level: int) -> Shaped[Tensor, "*_ P F"]:
        """Values of the latents below `level` that have a parent, by parent of that level."""
        linked = children[..., : self.n_linked(level + 1)]
        families: Tensor = linked.unflatten(-1, (self.sizes[level], -1))
        return families

    def gathered(self, children: Float[Tensor, "*_ C"], level: int) -> Float[Tensor, "*_ P"]:
        """Sums over the children of each latent of `level`."""
        sums: Tensor = self.families(children, level).sum(-1)
        return sums

    def handed_down(self, parents: Float[Tensor, "*_ P"], level: int) -> Float[Tensor, "*_ C"]:
        """Its parent's value for each latent of `level`, 0 where there is none."""
        values = parents[..., None].expand(*parents.shape, self.n_children(level - 1)).flatten(-2)
        return pad(values, (0, self.sizes[level] - self.n_linked(level)))
