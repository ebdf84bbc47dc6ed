"""How unequal numbers are."""

from __future__ import annotations

import torch
from torch import Tensor


def gini(values: Tensor) -> float:
    """Gini coefficient of numbers ≥ 0: 0 when all are equal, near 1 when one has everything."""
    ordered = values.sort().values
    n, total = len(ordered), float(ordered.sum())
    places = torch.arange(1, n + 1, dtype=ordered.dtype)
    return float((2 * places - n - 1) @ ordered) / (n * total) if total > 0 else 0.0
