"""Dead leaves of a `tree` begin again: at directions in what is left over on the tokens of their family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.saes.base import Batches
from train.saes.forest import LEAF, MID
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.tree import Tree

REPAIR_EVERY = 3000  # steps, in long runs
REPAIR_UNTIL = 0.7  # share of the run
REPAIRED_SHARE = 0.05  # of the leaves, at most, at one landmark
REPAIR_GAIN = 0.2  # encoder column of a repaired leaf over its decoder row
LOOKED_AT = 16_384  # tokens: each landmark then costs a few steps' work
ROUNDS = 10  # of power iteration; a direction good enough to begin with, not an eigenvector


def repair_landmarks(n_steps: int) -> tuple[int, ...]:
    """Steps before which to repair: every 3000, or every tenth of a shorter run, up to 70 %."""
    interval = max(min(REPAIR_EVERY, n_steps // 10), 1)
    return tuple(range(interval, int(REPAIR_UNTIL * n_steps) + 1, interval))


def reset_dead_leaves(sae: Tree, batches: Batches, clock: Clock) -> dict[str, Tensor]:
    """Reset dead leaves: the decoder row becomes what is most left over where their family is active.

    Returns:
        as `SAE.revise`, whose work it does.
    """
    forest, leaves = sae.forest, sae.forest.spans[LEAF]
    at_most = int(REPAIRED_SHARE * forest.sizes[LEAF])
    dead = forest.families(sae.dead(clock)[leaves], MID)
    wanted = dead.any(-1)  # one leaf of a family at a time: two would get the same direction
    if at_most == 0 or not bool(wanted.any()):
        return {}
    families, directions = residual_directions(left_over(sae, batches), wanted, at_most)
    chosen = leaves.start + families * forest.n_children(MID) + dead[families].int().argmax(-1)
    reset = torch.zeros_like(sae.tokens_silent, dtype=torch.bool)
    reset[chosen] = True
    sae.W_dec[chosen] = directions
    sae.W_enc[:, chosen] = REPAIR_GAIN * directions.t()
    sae.b_enc[chosen] = 0.0
    sae.tokens_silent[chosen] = 0
    sae.write_rows()
    edges = [name for name in ("up", "down", "kappa") if getattr(sae, name) is not None]
    return {"W_dec": reset[:, None]} | dict.fromkeys(["W_enc", "b_enc", *edges], reset)


def left_over(sae: Tree, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch: x − x̂ of valid tokens, and which middle latents or children of theirs are active."""
    for batch in batches():
        codes = sae.encoded(batch, None).codes
        error = batch.x - sae.reconstruct(torch.cat(codes, dim=-1), batch)
        family = (codes[MID] > 0) | (sae.forest.gathered(codes[LEAF], MID) > 0)
        yield error[batch.valid].float(), family[batch.valid]


@torch.no_grad()
def residual_directions(
    left_over: Iterable[tuple[Float[Tensor, "_ D"], Bool[Tensor, "_ F"]]], wanted: Bool[Tensor, " F"], at_most: int
) -> tuple[Int[Tensor, " N"], Float[Tensor, "N D"]]:
    """The wanted families with the largest error on their active tokens, and the direction in which most of it lies.

    Args:
        left_over: batch by batch, x − x̂ of tokens and which families are active on them; read until enough is seen.
        wanted: families that have something to repair.
        at_most: how many to return; families that are never active are not among them.

    Returns:
        numbers of the families, and unit directions whose sign gives the errors a positive mean along them.
    """
    errors, active, seen = [], [], 0
    for error, family in left_over:
        errors.append(error)
        active.append(family & wanted)
        seen += len(error)
        if seen >= LOOKED_AT:
            break
    error = torch.cat(errors)
    energy = error.square().sum(-1) @ torch.cat(active).to(error.dtype)
    families = torch.topk(energy, min(at_most, len(energy))).indices
    families = families[energy[families] > 0]
    mask = torch.cat([part[:, families] for part in active]).to(error.dtype)
    mean = mask.t() @ error
    direction = mean
    for _ in range(ROUNDS):
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        direction = (error @ direction.t() * mask).t() @ error
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return families, torch.where((direction * mean).sum(-1, keepdim=True) < 0, -direction, direction)
