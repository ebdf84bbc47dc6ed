"""Small relational SAEs, packed windows and learners for their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE
from train.saes.relational import Relational
from train.schedule import Clock

B, T, D, LATENTS, K = 3, 24, 6, 20, 4  # 5 temporal latents
CLOCK = Clock(90, 100, B * T)
SPAN = 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new(**options: Any) -> Relational:
    """With every temporal weight away from 0."""
    settings = {"d_sae": LATENTS, "k": K, "window": T, "span": SPAN} | options
    sae = make_sae("relational", settings, D, 0, "test")
    assert isinstance(sae, Relational)
    with torch.no_grad():
        for number, name in enumerate(("W_C", "V", "w_gate", "W_O", "b_dec", "W_B")):
            if hasattr(sae, name):
                getattr(sae, name).copy_(0.5 * randn(*getattr(sae, name).shape, seed=number + 10))
        sae.sparsity.threshold.copy_(torch.tensor([0.2, 0.3]))
    return sae.requires_grad_(False)


def packed(x: Tensor) -> Batch:
    """Documents change at 5 in the first window, at 2 and 9 in the second; one invalid place in each."""
    doc = torch.zeros(B, T, dtype=torch.int32)
    doc[0, 5:] = 1
    doc[1, 2:], doc[1, 9:] = 1, 2
    pos = torch.arange(T, dtype=torch.int32).repeat(B, 1)
    pos[0, 5:] -= 5
    pos[1, 2:9] -= 2
    pos[1, 9:] -= 9
    pos[2] += 30
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 6] = valid[1, 4] = valid[2, 0] = False
    return Batch.of(x, doc=doc, pos=pos, valid=valid)


def learner_of(sae: SAE, n_steps: int) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=1e-2)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32, "plain")  # sums in one order
