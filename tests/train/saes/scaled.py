"""A small multi-scale SAE with weights everywhere, and a batch with every kind of border."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.data.batch import Batch
from train.saes import make_sae
from train.saes.multiscale import MultiScale
from train.schedule import Clock

B, T, D, LATENTS, K = 3, 12, 6, 18, 4  # 18 latents in groups of 5, 5, 4, 4
CLOCK = Clock(50, 100, B * T)  # no separation at this step


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new(**options: Any) -> MultiScale:
    sae = make_sae("multiscale", {"d_sae": LATENTS, "k": K, "window": T} | options, D, 0, "test")
    assert isinstance(sae, MultiScale)
    with torch.no_grad():
        sae.b_dec.copy_(randn(D, seed=1))
        if options.get("convolution") != "none":
            sae.omega.copy_(randn(*sae.omega.shape, seed=2))
        if options.get("convolution") == "mixture":
            sae.mixture.copy_(randn(*sae.mixture.shape, seed=3))
        if sae.omega_0 is not None:
            sae.omega_0.copy_(randn(*sae.omega_0.shape, seed=6))
    return sae


def packed(x: Tensor | None = None) -> Batch:
    """Windows whose documents change at 5, at 2 and 9, and not; one invalid place in each."""
    doc = torch.zeros(B, T, dtype=torch.int32)
    doc[0, 5:] = 1
    doc[1, 2:] = 1
    doc[1, 9:] = 2
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 6] = valid[1, 4] = valid[2, 0] = False
    return Batch.of(randn(B, T, D, seed=4) if x is None else x, doc=doc, valid=valid)


def group_of(latent: int) -> int:
    return [number for number, size in enumerate((5, 5, 4, 4)) for _ in range(size)][latent]
