"""Where dead latents may begin again: directions in what is left over on the tokens of their family."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

REPAIR_EVERY = 3000  # steps, in long runs
REPAIR_UNTIL = 0.7  # share of the run
LOOKED_AT = 16_384  # tokens: each landmark then costs a few steps' work
ROUNDS = 10  # of power iteration; a direction good enough to begin with, not an eigenvector


def repair_landmarks(n_steps: int) -> tuple[int, ...]:
    """Steps before which to repair: every 3000, or every tenth of a shorter run, up to 70 %."""
    interval = max(min(REPAIR_EVERY, n_steps // 10), 1)
    return tuple(range(interval, int(REPAIR_UNTIL * n_steps) + 1, interval))


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
