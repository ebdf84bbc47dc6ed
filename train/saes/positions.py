"""Where a token stands in its document, in buckets, and gates that say which latents listen to it.

Hard-concrete gates: Louizos et al. 1712.01312, with their β = 2/3 and stretch [−.1, 1.1].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
