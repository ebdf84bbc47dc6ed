"""Where a token stands in its document, in buckets; which latents listen to it, by gates or by pruning after training.

Hard-concrete gates: Louizos et al. 1712.01312, with their β = 2/3 and stretch [−.1, 1.1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.saes.base import Batches

if TYPE_CHECKING:  # which imports this module
    from train.saes.relational import Relational

PRUNED_ON = 65_536  # tokens: differences of .001 in explained variance are on the very same ones
TINY = 1e-30
BUCKETS = 32
CLOSED, OPEN, HEAT = -0.1, 1.1, 2 / 3


def position_bucket(position: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """0 … 15 each, then half octaves to 31 (from 2,897 on); −1 where the position is unknown."""
    octaves = 2 * torch.log2(position.clamp_min(16) / 16)
    later = 16 + octaves.floor().clamp_max(BUCKETS - 17).to(position.dtype)
    return torch.where(position < 16, position, later)


def one_of_buckets(position: Int[Tensor, "B T"], like: Tensor) -> Float[Tensor, "B T P"]:
    """1 in each place's bucket, all 0 where the position is unknown."""
    bucket = position_bucket(position)[..., None]
    return (bucket == torch.arange(BUCKETS, device=bucket.device)).to(like.dtype)


def hard_concrete(log_alpha: Float[Tensor, " G"], generator: torch.Generator | None) -> Float[Tensor, " G"]:
    """Gates in [0, 1]: drawn by the generator of a training step, their median without one."""
    if generator is None:
        drawn = torch.sigmoid(log_alpha)
    else:
        noise = torch.rand(len(log_alpha), generator=generator, device=log_alpha.device).clamp(1e-6, 1 - 1e-6)
        drawn = torch.sigmoid((log_alpha + noise.logit()) / HEAT)
    return (drawn * (OPEN - CLOSED) + CLOSED).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """P(gate > 0), the penalty's differentiable count."""
    return torch.sigmoid(log_alpha - HEAT * math.log(-CLOSED / OPEN))


@torch.no_grad()
def prune_rows(sae: Relational, batches: Batches, tolerance: float) -> dict[str, float]:
    """Set the position rows with the smallest norms to 0, as many as cost `tolerance` of explained variance together.

    Returns:
        the share of rows that are left, and what those that went cost.
    """
    rows = sae.U.clone()
    order = sae.position_rows().norm(dim=-1).argsort()

    def cost(n_dropped: int) -> float:
        sae.U.copy_(rows.index_fill(0, order[:n_dropped], 0.0))
        return whole - explained(sae, batches)

    whole = explained(sae, batches)
    n_dropped = largest_within(cost, len(rows), tolerance)
    return {"position_rows_cost": cost(n_dropped), "position_rows": 1 - n_dropped / len(rows)}


def largest_within(cost: Callable[[int], float], most: int, tolerance: float) -> int:
    """The largest n from 0 to `most` whose cost is within `tolerance`, by bisection: costs should rise with n."""
    fits, above = 0, most + 1
    while above - fits > 1:
        middle = (fits + above) // 2
        if cost(middle) <= tolerance:
            fits = middle
        else:
            above = middle
    return fits


def explained(sae: Relational, batches: Batches) -> float:
    """Explained variance of the first `PRUNED_ON` valid tokens, with the thresholds as they stand."""
    tokens, error, square = 0, 0.0, 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=sae.W_dec.device)
    for batch in batches():
        x = batch.x[batch.valid].double()
        error += float((x - sae.reconstruct(sae.codes(batch), batch)[batch.valid]).square().sum())
        square, total, tokens = square + float(x.square().sum()), total + x.sum(0), tokens + len(x)
        if tokens >= PRUNED_ON:
            break
    return 1 - error / max(square - float(total.square().sum()) / tokens, TINY)
