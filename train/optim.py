"""Adam, and keeping decoder rows at unit norm: project the gradient, step, renormalise (spec §0.4)."""

from __future__ import annotations

import torch

from train.config import LearnerConfig
from train.saes.base import SAE


def make_optimizer(sae: SAE, config: LearnerConfig) -> torch.optim.Adam:
    """Fused Adam without weight decay; two groups, the second with a rate of its own where the variant has one.

    The learning rates are set anew at every step.
    """
    own = [parameter for name, parameter in sae.named_parameters() if name in sae.own_rate]
    common = [parameter for name, parameter in sae.named_parameters() if name not in sae.own_rate]
    fused = common[0].device.type in ("cpu", "cuda")
    groups = [{"params": group} for group in (common, own) if group]
    return torch.optim.Adam(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=fused)


@torch.no_grad()
def project_gradient_(weight: torch.Tensor) -> None:
    """Remove from the gradient of each unit row [L, d] its component along the row."""
    assert weight.grad is not None
    along = (weight.grad * weight).sum(-1, keepdim=True)
    weight.grad -= along * weight


@torch.no_grad()
def normalise_rows_(weight: torch.Tensor) -> None:
    """Give every row [L, d] unit norm."""
    weight /= weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)
