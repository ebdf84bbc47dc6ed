"""Sums over pairs of tokens, latent by latent: what persistence and its nulls are made of (evaluation spec §5.5).

Codes are sparse: sums run over active latents alone, some hundred times fewer than all. Nulls take the second member
of a pair from another document, half the batch's sequences away: at the same place of its sequence, which keeps what
places explain, and half a sequence on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.data.batch import Batch

LAGS = (1, 2, 4, 8, 16, 32, 64)
N_BLOCKS = 128  # of documents, for intervals
SUMS = 8
A, B, AA, BB, AB, A_ON, B_ON, BOTH = range(SUMS)

Kind = Literal["inside", "same_place", "elsewhere"]
KINDS: tuple[Kind, ...] = ("inside", "same_place", "elsewhere")


@dataclass(frozen=True)
class Active:
    """The latents above 0 at the valid places of a batch; places are counted over all its sequences.

    Attributes:
        place, latent, value: of each entry; value float64.
        dense: all codes [places, L].
    """

    place: Tensor
    latent: Tensor
    value: Tensor
    dense: Tensor

    @classmethod
    def of(cls, latents: Tensor, valid: Tensor) -> Active:
        dense = latents.flatten(0, 1)
        entries = ((dense > 0) & valid.flatten()[:, None]).nonzero()
        place, latent = entries[:, 0], entries[:, 1]
        return cls(place, latent, dense[place, latent].double(), dense)


class PairSums:
    """Running sums over pairs of tokens, latent by latent, in float64 on the CPU.

    Attributes:
        n: pairs [blocks].
        sums: Σ a, Σ b, Σ a², Σ b², Σ ab, and how often a, b and both are above 0 [8, blocks, L].
    """

    def __init__(self, n_latents: int, n_blocks: int = 1) -> None:
        self.n = torch.zeros(n_blocks, dtype=torch.float64)
        self.sums = torch.zeros(SUMS, n_blocks, n_latents, dtype=torch.float64)

    def add(self, active: Active, partner: Tensor, block: Tensor) -> None:
        """The pairs (place, partner[place]); `partner` [places] is −1 where there is none, and names none twice.

        `block` [places] is the one of a pair's first member.
        """
        there = (partner >= 0).nonzero()[:, 0]
        first_of = torch.full_like(partner, -1)
        first_of[partner[there]] = there
        self.n += torch.bincount(block[there], minlength=len(self.n)).double().cpu()
        chosen = partner[active.place] >= 0
        place, latent, a = active.place[chosen], active.latent[chosen], active.value[chosen]
        b = active.dense[partner[place], latent].double()
        ones = torch.ones_like(a)
        self._sum((A, AA, AB, A_ON, BOTH), block[place], latent, (a, a * a, a * b, ones, (b > 0).double()))
        first = first_of[active.place]
        chosen = first >= 0
        latent, b = active.latent[chosen], active.value[chosen]
        self._sum((B, BB, B_ON), block[first[chosen]], latent, (b, b * b, torch.ones_like(b)))

    def _sum(self, rows: Sequence[int], block: Tensor, latent: Tensor, values: Sequence[Tensor]) -> None:
        key = (block * self.sums.shape[-1] + latent).cpu()  # on the CPU: a GPU adds in no fixed order
        for row, value in zip(rows, values, strict=True):
            self.sums[row].view(-1).index_add_(0, key, value.cpu())

    def whole(self) -> tuple[Tensor, float]:
        """The sums over all blocks [8, L], and the pairs."""
        return self.sums.sum(1), float(self.n.sum())


def correlation(sums: Tensor, n: float | Tensor) -> Tensor:
    """Pearson's r [L] from sums [8, L]; 0 where either side does not vary."""
    a, b, aa, bb, ab = sums[:A_ON] / n
    spread = ((aa - a * a) * (bb - b * b)).clamp_min(0).sqrt()
    # sums of rounded numbers: a spread this small against the values themselves is none
    varies = spread > 1e-12 * (aa * bb).sqrt()
    return torch.where(varies, (ab - a * b) / spread.clamp_min(1e-300), 0.0)


class Pairs:
    """All pairs of a stretch of batches, by kind and lag, with what each latent does alone.

    Args:
        blocked: a lag whose pairs inside documents are also kept apart by block of documents.

    Attributes:
        by: sums by kind and lag; a lag with no pair at all is not there.
        fired, mass: how often each latent is active, and its sum [blocks, L].
        tokens: valid ones [blocks].
        documents: number of each document met, in order.
    """

    def __init__(self, n_latents: int, lags: Sequence[int] = LAGS, blocked: int | None = None) -> None:
        self.n_latents, self.lags, self.blocked = n_latents, lags, blocked
        self.n_blocks = N_BLOCKS if blocked is not None else 1
        self.by: dict[tuple[Kind, int], PairSums] = {}
        self.fired = torch.zeros(self.n_blocks, n_latents, dtype=torch.float64)
        self.mass, self.tokens = torch.zeros_like(self.fired), torch.zeros(self.n_blocks, dtype=torch.float64)
        self.documents: dict[int, int] = {}

    def add(self, latents: Tensor, batch: Batch) -> None:
        """Codes [B, T, L] of sequences; pairs with a member that is not valid do not count."""
        active = Active.of(latents, batch.valid)
        block = self.blocks(batch).flatten()
        key = (block[active.place] * self.n_latents + active.latent).cpu()
        self.fired.view(-1).index_add_(0, key, torch.ones(len(key), dtype=torch.float64))
        self.mass.view(-1).index_add_(0, key, active.value.cpu())
        self.tokens += torch.bincount(block[batch.valid.flatten()], minlength=self.n_blocks).double().cpu()
        for lag in self.lags:
            for kind in KINDS if lag < latents.shape[1] else ():
                partner = partners(batch, lag, kind)
                if bool((partner >= 0).any()):
                    apart = kind == "inside" and lag == self.blocked
                    sums = self.by.setdefault((kind, lag), PairSums(self.n_latents, N_BLOCKS if apart else 1))
                    sums.add(active, partner, block if apart else torch.zeros_like(block))

    def blocks(self, batch: Batch) -> Tensor:
        """The block of each place [B, T]: documents in turn, so that each has its own while there are few."""
        found, inverse = torch.unique(torch.where(batch.valid, batch.doc, -1), return_inverse=True)
        numbers = [self.documents.setdefault(doc, len(self.documents)) if doc >= 0 else 0 for doc in found.tolist()]
        return torch.tensor([number % self.n_blocks for number in numbers], device=inverse.device)[inverse]

    def whole(self, kind: Kind, lag: int) -> tuple[Tensor, float] | None:
        """The sums [8, L] and the pairs of a kind at a lag; None where there is no pair."""
        return self.by[kind, lag].whole() if (kind, lag) in self.by else None


def partners(batch: Batch, lag: int, kind: Kind) -> Tensor:
    """For each place of a batch the place of its pair's later member, −1 where there is none: int64 [B · T].

    All kinds have pairs inside documents for their first members.
    """
    rows, length = batch.valid.shape
    places = torch.arange(rows * length, device=batch.valid.device).view(rows, length)
    doc, valid = batch.doc, batch.valid
    inside = valid[:, :-lag] & valid[:, lag:] & (doc[:, :-lag] == doc[:, lag:])
    if kind == "inside":
        later = places[:, lag:]
    else:
        away = (max(rows // 2, 1), length // 2 if kind == "elsewhere" else 0)
        later = torch.roll(places, away, (0, 1))[:, lag:]
        inside = inside & valid.flatten()[later] & (doc.flatten()[later] != doc[:, :-lag])
    out = torch.full_like(places, -1)
    out[:, : length - lag] = torch.where(inside, later, -1)
    return out.flatten()
