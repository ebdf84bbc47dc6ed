"""Keeping groups of latents apart: by the directions of their decoder rows, or by when they are active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.saes.kept import Codes, Kept
from train.saes.parts import masked, side_by_side
from train.saes.rows import rows_at


def separation(groups: Sequence[Float[Tensor, "_ D"]]) -> Float[Tensor, ""]:
    """L_sep of groups of unit rows: the squared cosine to the nearest row of other groups, and half that to its own's.

    Which row is nearest is found first; gradients then go through those pairs alone, not through all cosines.
    """
    rows = torch.cat(list(groups))
    across, within = nearest([group.detach() for group in groups])
    return across.squares(rows).mean() + within.squares(rows).mean() / 2


@dataclass
class Nearest:
    """Of each row the nearest one so far.

    Attributes:
        cosine: with it; not above 0 where all point away, or there is none.
        number: which of all rows it is.
    """

    cosine: Float[Tensor, " R"]
    number: Int[Tensor, " R"]

    @classmethod
    def none(cls, n: int, like: Tensor) -> Nearest:
        return cls(like.new_full((n,), -1.0), torch.zeros(n, dtype=torch.int64, device=like.device))

    def look_(self, place: slice, cosines: Float[Tensor, "P Q"], first: int) -> None:
        """Let the rows of a place look at others, numbered from `first` on."""
        found, number = cosines.max(1)
        nearer = ~(found <= self.cosine[place])
        self.cosine[place] = torch.where(nearer, found, self.cosine[place])
        self.number[place] = torch.where(nearer, number + first, self.number[place])

    def squares(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
        """The squared cosine with it, 0 where it is not above 0."""
        return torch.where(self.cosine <= 0, 0.0, (rows * rows_at(rows, self.number)).sum(-1).square())


@torch.no_grad()
def nearest(groups: Sequence[Float[Tensor, "_ D"]]) -> tuple[Nearest, Nearest]:
    """Of every row of the groups, one after the other, the nearest of the other groups, and of its own."""
    places = side_by_side([len(group) for group in groups])
    across, within = (Nearest.none(places[-1].stop, groups[0]) for _ in range(2))
    with torch.autocast(groups[0].device.type, enabled=False):
        for n, (place, rows) in enumerate(zip(places, groups, strict=True)):
            within.look_(place, (rows @ rows.t()).fill_diagonal_(-1.0), place.start)
            for other, others in zip(places[n + 1 :], groups[n + 1 :], strict=True):
                cosines = rows @ others.t()  # once for both sides
                across.look_(place, cosines, other.start)
                across.look_(other, cosines.t().contiguous(), place.start)
    return across, within


def energies_of(latents: Codes, sizes: list[int]) -> Float[Tensor, "B T G"]:
    """Σ f² of each group."""
    if isinstance(latents, Kept):
        squares = Kept(latents.values.square(), latents.places, latents.shape)
        return squares.times_by_block(latents.values.new_ones(latents.shape[-1], 1), sizes).squeeze(-1)
    return torch.stack([part.square().sum(-1) for part in latents.split(sizes, dim=-1)], dim=-1)


def correlation(energies: Float[Tensor, "B T G"], valid: Bool[Tensor, "B T"], n_valid: int) -> Float[Tensor, ""]:
    """Mean squared correlation between different groups over valid tokens; 0 where a group does not vary."""
    centred = masked(energies - masked(energies, valid, n_valid).sum((0, 1)) / n_valid, valid, n_valid).flatten(0, 1)
    unit = centred / centred.norm(dim=0).clamp_min(1e-12)
    with torch.autocast(unit.device.type, enabled=False):
        squares: Tensor = (unit.t() @ unit).square()
    n = len(squares)
    return (squares.sum() - squares.diagonal().sum()) / max(n * (n - 1), 1)
