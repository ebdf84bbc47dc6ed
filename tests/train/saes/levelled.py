"""Small levelled SAEs and inputs for their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.saes import make_sae
from train.saes.compositional import Compositional

D, N_LATENTS, K = 16, 70, 14  # levels of 40, 20, 10 latents with budgets of 8, 4, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new(**options: Any) -> Compositional:
    sae = make_sae("compositional", {"d_sae": N_LATENTS, "k": K} | options, D, 0, "test")
    assert isinstance(sae, Compositional)
    return sae
