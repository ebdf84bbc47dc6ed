"""Which latents carry a text: those that fire on it, and hardly ever on another (SAEBench's rule, from 2410.19278)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 20  # a control is drawn from so many latents of about the same density


@dataclass(frozen=True)
class Activity:
    """What each latent did on some text.

    Attributes:
        tokens: those that count.
        fired: float64 [d_sae], of them those on which it was above 0.
        total: float64 [d_sae], the sum of its activations, raw units.
    """

    tokens: int
    fired: Tensor
    total: Tensor

    @property
    def density(self) -> Tensor:
        """Share of the tokens on which each latent fires."""
        return self.fired / max(self.tokens, 1)

    def __add__(self, other: Activity) -> Activity:
        return Activity(self.tokens + other.tokens, self.fired + other.fired, self.total + other.total)

    @property
    def mean(self) -> Tensor:
        """Each latent's mean where it fires; 0 where it never does."""
        return self.total / self.fired.clamp_min(1)


def choose(forget: Tensor, retain: Tensor, threshold: float, n: int) -> tuple[int, ...]:
    """The n latents densest on the forget text, of those with a density below `threshold` on the retain text.

    Fewer where fewer fire. Of equals the first ones.

    Args:
        forget, retain: densities [d_sae].
    """
    score = torch.where(retain < threshold, forget, 0.0)
    order = torch.argsort(score, descending=True, stable=True)[:n]
    return tuple(int(i) for i in order if score[i] > 0)


def match(chosen: tuple[int, ...], density: Tensor, seed: int) -> tuple[int, ...]:
    """As many other latents, each drawn from the `NEAR` alive ones nearest in log density to one of the chosen.

    Fewer where there are not so many.
    """
    generator = torch.Generator().manual_seed(seed)
    free = density > 0
    free[list(chosen)] = False
    drawn = []
    for latent in chosen:
        candidates = torch.nonzero(free).flatten()
        if not len(candidates):
            break
        distance = (density[candidates].log() - density[latent].log()).abs()
        near = candidates[torch.argsort(distance, stable=True)[:NEAR]]
        picked = int(near[torch.randint(len(near), (1,), generator=generator)])
        free[picked] = False
        drawn.append(picked)
    return tuple(drawn)
