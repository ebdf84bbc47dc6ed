"""What a sweep comes to: how much of the forget text is lost at how little of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from train.evaluate.bootstrap import percentiles, resampled_sums

SMALL = 0.01  # of the loss on the retain text: what the score allows it to rise
BUDGET = 0.05  # up to which `area` looks


def score_interval(forget: Tensor, retain: Tensor) -> tuple[float, float] | None:
    """95 % of `best` over resampled documents, each text's among themselves; None with fewer than two of either.

    Args:
        forget, retain: float64 [documents, 1 + settings], nats summed over tokens, the unchanged model first.
    """
    if min(len(forget), len(retain)) < 2:
        return None
    draws = zip(resampled_sums(forget, seed=0), resampled_sums(retain, seed=1), strict=True)
    scores = [best(relative(one), relative(other)) for one, other in draws]
    return percentiles(torch.tensor(scores, dtype=torch.float64))


def relative(sums: Tensor) -> Tensor:
    """Each setting's loss over the unchanged model's, less 1: [1 + settings] -> [settings]."""
    return sums[1:] / sums[0] - 1


def best(forget: Tensor, retain: Tensor, allowed: float = SMALL) -> float:
    """The largest relative rise on the forget text among settings with at most `allowed` on the other; at least 0.

    NaN where a rise is none.
    """
    if bool(torch.isnan(forget).any() or torch.isnan(retain).any()):
        return float("nan")
    admitted = forget[retain <= allowed]
    return max(float(admitted.max()), 0.0) if len(admitted) else 0.0


def area(forget: Tensor, retain: Tensor) -> float:
    """The mean of `best` over what is allowed, from 0 to `BUDGET`: the area under the curve over its width."""
    steps = [0.0, *sorted({float(rise) for rise in retain if 0 < rise < BUDGET}), BUDGET]
    heights = [best(forget, retain, start) for start in steps[:-1]]
    return sum(h * (stop - start) for h, start, stop in zip(heights, steps, steps[1:], strict=False)) / BUDGET


def front(forget: list[float], retain: list[float]) -> list[int]:
    """Settings that no other beats in both, more lost of the forget text and less of the other, by the latter.

    Of equals the first.
    """
    order = sorted(range(len(forget)), key=lambda i: (retain[i], -forget[i], i))
    found: list[int] = []
    for i in order:
        if not found or forget[i] > forget[found[-1]]:
            found.append(i)
    return found
