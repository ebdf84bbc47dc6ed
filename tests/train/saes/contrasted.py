"""Small contrastive SAEs and batches for the tests of the variant and of its loss."""

from __future__ import annotations

import torch

from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE
from train.saes.contrastive import Contrastive
from train.schedule import Clock

D, N_LATENTS, WINDOW = 8, 40, 6
SMALL = {"d_sae": N_LATENTS, "k": 10, "window": WINDOW, "keys": 20, "anchors": 7, "buffer": 40, "density_limit": 1.0}
CLOCK = Clock(50, 100, 64)


def new(variant: str = "contrastive", **options: object) -> SAE:
    return make_sae(variant, SMALL | options if variant == "contrastive" else options, D, 0, "test")


def contrastive(**options: object) -> Contrastive:
    sae = new(**options)
    assert isinstance(sae, Contrastive)
    return sae


def batch_of(n: int = 8, seed: int = 0) -> Batch:
    """Windows of two documents each, a few places not valid."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WINDOW, D, generator=generator) / D**0.5
    doc = torch.stack([torch.tensor([2 * row] * 2 + [2 * row + 1] * (WINDOW - 2)) for row in range(n)]).int()
    valid = torch.rand(n, WINDOW, generator=generator) > 0.2
    return Batch.of(x, doc=doc, valid=valid)


def learner_of(sae: SAE, n_steps: int, lr: float = 3e-3) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=lr)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32, "plain")  # sums in one order
