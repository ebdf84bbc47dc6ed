"""Training steps with the kept codes alone, for variants with several groups of latents or a sum of several encoders.

Pre-activations u of all latents are found without gradients, one dense product per encoder. Each group keeps the
largest of its own; gradients then go from the kept entries to whatever u was made of, product by product (`through`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.data.batch import Batch
from train.saes.kept import Codes, Kept
from train.saes.parts import share_of_spread
from train.saes.parts import side_by_side as slices_of
from train.saes.places import Choice, Entries, Places, keep_batch_top_k, side_by_side
from train.saes.sparsity import Sparsity
from train.schedule import Clock


def one_budget(sparsity: Sparsity) -> bool:
    """Whether all groups compete for one budget, at the same price."""
    return sparsity.mode == "joint" and sparsity.floor is None and set(sparsity.weights) == {1.0}


def chooses_places(sparsity: Sparsity) -> bool:
    """Whether the codes of a step can be chosen without their gradients: with budgets, or one."""
    return sparsity.mode == "budgets" or one_budget(sparsity)


def choose_by_group(sparsity: Sparsity, n_valid: int, clock: Clock) -> Choice:
    """Places of what `Sparsity` keeps: the largest of each group, as many as its budget has, or of all together."""

    def choose(u: Float[Tensor, "N L"]) -> Places:
        if one_budget(sparsity):
            return keep_batch_top_k(u, round(sparsity.k_at(clock) * n_valid))
        groups = enumerate(u.split(sparsity.sizes, dim=-1))
        kept = [keep_batch_top_k(part, sparsity.n_kept(group, n_valid, clock)) for group, part in groups]
        return side_by_side(kept)[0]

    return choose


def note_by_group(sparsity: Sparsity, latents: Kept, clock: Clock) -> None:
    """Let the thresholds follow the codes of a step."""
    values, column, start = latents.values.detach(), latents.places.column, 0
    if one_budget(sparsity):
        sparsity.note(values, None, clock)
        return
    for group, size in enumerate(sparsity.sizes):
        inside = (column >= start) & (column < start + size)
        sparsity.note(torch.where(inside, values, 0.0), group, clock)
        start += size


@torch.no_grad()
def all_of_groups(
    y: Float[Tensor, "B T P D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"],
    sizes: Sequence[int],
    valid: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, "N L"]:
    """y W_enc + b_enc of all latents, each group's from the y of its own, 0 where not `valid`, for choosing."""
    u = b_enc.new_empty(y.shape[0] * y.shape[1], W_enc.shape[1])
    for group, place in enumerate(slices_of(sizes)):
        inputs = y[:, :, group].flatten(0, 1)
        if torch.is_autocast_enabled(y.device.type):
            torch.add((inputs @ W_enc[:, place]).float(), b_enc[place], out=u[:, place])
        else:
            torch.addmm(b_enc[place], inputs, W_enc[:, place], out=u[:, place])
    if valid is not None:
        u.masked_fill_(~valid.flatten()[:, None], 0.0)
    return u


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, places: Sequence[Places]
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.places = places
        return u

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (left, right), (gradient,), entries = ctx.saved_tensors, gradients, Entries.of(ctx.places)
        of_u, of_left, of_right, of_bias, _ = ctx.needs_input_grad
        d_left = None
        if of_left:
            columns = right.t().contiguous()
            parts = zip(ctx.places, gradient.split([len(each.column) for each in ctx.places]), strict=True)
            d_left = functools.reduce(torch.add, [each.times(part, columns) for each, part in parts])
        return (
            gradient if of_u else None,
            d_left,
            entries.transposed_times(gradient, left).t() if of_right else None,
            entries.column_sums(gradient) if of_bias else None,
            None,
        )


def through(
    u: Float[Tensor, " K"],
    left: Float[Tensor, "R D"],
    right: Float[Tensor, "D C"],
    places: Sequence[Places],
    bias: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, " K"]:
    """u at some places of [R, C], with the gradients of left @ right + bias, a part of it, from there alone."""
    values: Tensor = _Through.apply(u, left, right, bias, places)  # type: ignore[no-untyped-call]
    return values


def part_of(latents: Kept, place: slice) -> Kept:
    """The codes of neighbouring latents alone."""
    start, stop, _ = place.indices(latents.shape[-1])
    column = latents.places.column
    inside = (column >= start) & (column < stop)
    before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
    chosen = inside.nonzero().squeeze(-1)
    places = Places(before[latents.places.first], column[chosen] - start, stop - start)
    return Kept(latents.values.gather(0, chosen), places, (*latents.shape[:2], stop - start))


def columns_of(codes: Codes, place: slice) -> Codes:
    """The same of codes of either form."""
    return part_of(codes, place) if isinstance(codes, Kept) else codes[..., place]


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
