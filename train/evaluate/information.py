"""What two binary variables tell of each other, from counts (evaluation spec §5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(count: Tensor, n: float | Tensor) -> Tensor:
    """Entropy in bits of variables that are 1 in `count` of `n` cases."""
    share = count / n
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)


def mutual_information(both: Tensor, first: Tensor, second: Tensor, n: float | Tensor) -> Tensor:
    """Mutual information in bits, from how often both, the first and the second are 1 in `n` cases.

    Plug-in, less its bias 1 / (2 n ln 2) under independence, at least 0.
    """
    a, b = first / n, second / n
    cells = (
        (both / n, a * b),
        (a - both / n, a * (1 - b)),
        (b - both / n, (1 - a) * b),
        (1 - a - b + both / n, (1 - a) * (1 - b)),
    )
    # an expected share of 0 means an observed one of 0, up to rounding
    parts = [torch.xlogy(seen.clamp_min(0), seen.clamp_min(0) / due.clamp_min(1e-300)) for seen, due in cells]
    bias = 1 / (2 * n * math.log(2))
    return (torch.stack(parts).sum(0) / math.log(2) - bias).clamp_min(0)
