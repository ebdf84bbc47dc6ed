"""f A of kept codes f, over pairs of a code and an upper latent that it is a candidate of: some fifteen for each code.

Their number is that of tokens × kept codes × parents of a latent, whatever the size of the dictionary: hundreds of
thousands, of which `gather` fetches values in a third of the time that indexing takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.saes.entrywise import row_sums
from train.saes.kept import at
from train.saes.places import Places, add_at_


@dataclass(frozen=True)
class Found:
    """Pairs that come together at some places, place by place.

    Attributes:
        codes, members: of each pair, as entries [places, kept codes] and [places, weights of A].
    """

    codes: Places
    members: Places

    def sums(self, codes: Float[Tensor, " K"], weights: Float[Tensor, " E"]) -> Float[Tensor, " A"]:
        """Σ_i A_ij f_i at these places."""
        return row_sums(at(codes, self.codes) * at(weights, self.members), self.members)


@dataclass(frozen=True)
class Reach:
    """All pairs.

    Attributes:
        code: number of the kept code.
        member: number of the weight among those of A.
        row, upper: token and upper latent.
        n_codes, n_members: how many there are.
    """

    code: Int[Tensor, " R"]
    member: Int[Tensor, " R"]
    row: Int[Tensor, " R"]
    upper: Int[Tensor, " R"]
    n_codes: int
    n_members: int

    @classmethod
    def of(cls, kept: Places, A: Places) -> Reach:
        """Those of codes kept at these places, and of A where it is not 0, [upper, lower]."""
        order, parents = A.entries.by_column
        n_parents = parents.first.diff().gather(0, kept.column)
        ends = n_parents.cumsum(0)
        n_codes, n_pairs = len(ends), int(ends[-1]) if len(ends) else 0
        code = torch.arange(n_codes, device=ends.device).repeat_interleave(n_parents, output_size=n_pairs)
        # the pairs of a code follow each other, as its parents do
        shift = parents.first.gather(0, kept.column) - (ends - n_parents)
        place = torch.arange(n_pairs, device=ends.device) + shift.gather(0, code)
        member, upper = order.gather(0, place), parents.column.gather(0, place)
        return cls(code, member, kept.row.gather(0, code), upper, n_codes, len(order))

    def add_to_(
        self, u: Float[Tensor, "N L"], start: int, codes: Float[Tensor, " K"], weights: Float[Tensor, " E"]
    ) -> None:
        """Add f A to the pre-activations of upper latents, the first of which has number `start`; no gradients."""
        values = codes.gather(0, self.code) * weights.gather(0, self.member)
        add_at_(u.view(-1), self.row * u.shape[1] + (start + self.upper), values)

    def at(self, places: Places) -> Found:
        """The pairs of some places [tokens, upper], in any order, each named once."""
        n_places = len(places.column)
        numbers = torch.arange(n_places, device=self.code.device, dtype=torch.int32)
        which = torch.full((places.n_rows * places.n_columns,), -1, device=self.code.device, dtype=torch.int32)
        which[places.number] = numbers
        of_pair = which.gather(0, self.row * places.n_columns + self.upper)
        pairs = (of_pair >= 0).nonzero().squeeze(-1)
        found, order = torch.sort(of_pair.gather(0, pairs), stable=True)
        first = torch.searchsorted(found, torch.arange(n_places + 1, device=found.device, dtype=torch.int32))
        pairs = pairs.gather(0, order)
        code, member = self.code.gather(0, pairs), self.member.gather(0, pairs)
        return Found(Places(first, code, self.n_codes), Places(first, member, self.n_members))
