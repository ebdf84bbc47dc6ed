"""The intervention of SAEBench's unlearning: chosen latents, where they fire, are set to a negative value.

    f = encode(X), f[:, 0] = 0      f'_i = −c_i where i is chosen and f_i > 0, else f_i
    X ← X + decode(f') − decode(f)

The error X − decode(f) stays in. The first position of a row stays as it is, unless a variant's decoder carries what
was clamped elsewhere, which a causal one cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batch import Batch
from train.saes.base import SAE


@dataclass(frozen=True)
class Clamp:
    """Latents and the values c ≥ 0, raw units, that are subtracted from nothing in their place."""

    latents: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """What tells it from others, exactly."""
        return " ".join(f"{latent}:{value!r}" for latent, value in zip(self.latents, self.values, strict=True))

    def __call__(self, latents: Tensor) -> Tensor:
        """f' from f [..., d_sae]."""
        which = torch.tensor(self.latents, dtype=torch.int64, device=latents.device)
        values = torch.tensor(self.values, dtype=latents.dtype, device=latents.device)
        chosen = latents[..., which]
        clamped = latents.clone()
        clamped[..., which] = torch.where(chosen > 0, -values, chosen)
        return clamped


@torch.no_grad()
def codes_of(sae: SAE, batch: Batch) -> Tensor:
    """Latents [rows, context, d_sae], raw units, none at the first position."""
    latents = sae.encode(batch)
    latents[:, 0] = 0
    return latents


@torch.no_grad()
def intervene(sae: SAE, batch: Batch, clamp: Clamp) -> Tensor:
    """The activations of `batch` with latents clamped, in their own type."""
    latents = codes_of(sae, batch)
    change = sae.decode(clamp(latents), batch) - sae.decode(latents, batch)
    return (batch.x + change).to(batch.x.dtype)
