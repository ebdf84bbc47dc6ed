"""What lies some places before or after each token, for convolutions over the tokens of a document."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.data.batch import Batch

Past = dict[int, tuple[Tensor, Tensor]]
"""Of each lag the values that many places before each token [batch, window, d], 0 where none is, and whether one is."""


def lags_of(dilation: int, kernel: int, causal: bool) -> list[int]:
    """How far the taps of a dilation look back, the nearest first, without the token itself; below 0: ahead."""
    taps = range(1, kernel)
    return [tap * dilation if causal else two_sided(tap) * dilation for tap in taps]


def past_of(h: Float[Tensor, "B T D"], batch: Batch, lags: Iterable[int]) -> Past:
    """h at these lags, and at 0."""
    seen = {0: (h, torch.ones_like(h[..., :1]))}
    for lag in sorted(set(lags)):
        there = linked(batch, lag)[..., None].to(h.dtype)
        seen[lag] = (shifted(h, lag) * there, there)
    return seen


def two_sided(tap: int) -> int:
    """Dilations that tap 1, 2, 3, 4, … looks back with `causal` off: 1, −1, 2, −2, …"""
    return (tap + 1) // 2 * (1 if tap % 2 else -1)


def shifted(values: Float[Tensor, "B T D"], lag: int) -> Float[Tensor, "B T D"]:
    """At each place the value `lag` places before it (after it, for a lag below 0), 0 beyond the window's ends."""
    n = values.shape[1]
    lag = max(min(lag, n), -n)
    return torch.nn.functional.pad(values[:, max(-lag, 0) : n - max(lag, 0)], (0, 0, max(lag, 0), max(-lag, 0)))


def linked(batch: Batch, lag: int) -> Bool[Tensor, "B T"]:
    """Whether the place that `shifted` takes from is in the window, valid and in the same document."""
    places = torch.arange(batch.valid.shape[1], device=batch.valid.device)
    other = (places - lag).clamp(0, len(places) - 1)
    inside = other == places - lag
    return inside & batch.valid[:, other] & (batch.doc[:, other] == batch.doc)
