"""Training steps with the kept codes alone, for variants with several groups of latents or a sum of several encoders.

Pre-activations u of all latents are found without gradients, one dense product per encoder. Each group keeps the
largest of its own; gradients then go from the kept entries to whatever u was made of, product by product (`through`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.data.batch import Batch
from train.saes.kept import Kept
from train.saes.parts import share_of_spread
from train.saes.places import Choice, Places, keep_batch_top_k, side_by_side
from train.saes.sparsity import Sparsity
from train.schedule import Clock


def choose_by_group(sparsity: Sparsity, n_valid: int, clock: Clock) -> Choice:
    """The largest of each group, as many as its budget has: places of what `Sparsity.active` keeps."""

    def choose(u: Float[Tensor, "N L"]) -> Places:
        groups = enumerate(u.split(sparsity.sizes, dim=-1))
        kept = [keep_batch_top_k(part, sparsity.n_kept(group, n_valid, clock)) for group, part in groups]
        return side_by_side(kept)[0]

    return choose


def note_by_group(sparsity: Sparsity, latents: Kept, clock: Clock) -> None:
    """Let the thresholds follow the codes of a step."""
    values, column, start = latents.values.detach(), latents.places.column, 0
    for group, size in enumerate(sparsity.sizes):
        inside = (column >= start) & (column < start + size)
        sparsity.note(torch.where(inside, values, 0.0), group, clock)
        start += size


def part_of(latents: Kept, place: slice) -> Kept:
    """The codes of neighbouring latents alone."""
    start, stop, _ = place.indices(latents.shape[-1])
    column = latents.places.column
    inside = (column >= start) & (column < stop)
    before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
    chosen = inside.nonzero().squeeze(-1)
    places = Places(before[latents.places.first], column[chosen] - start, stop - start)
    return Kept(latents.values.gather(0, chosen), places, (*latents.shape[:2], stop - start))


def only_some(batch: Batch) -> Bool[Tensor, "B T"] | None:
    """Which positions count; None where the host knows that all do."""
    return None if batch.n_valid == batch.valid.numel() else batch.valid


def aux_k_kept(
    residual: Float[Tensor, "B T D"],
    of_dead: Kept | None,
    dead: Bool[Tensor, " L"],
    W_dec: Float[Tensor, "L D"],
    valid: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """AuxK's loss from the largest codes of dead latents; None: nothing is dead."""
    if of_dead is None:
        return residual.new_zeros(())
    return dead.any() * share_of_spread(residual, of_dead.times(W_dec), valid)
