"""Adam, and keeping decoder rows at unit norm: project the gradient, step, renormalise (spec §0.4)."""

from __future__ import annotations

import torch

from train.config import LearnerConfig


def make_optimizer(parameters: list[torch.nn.Parameter], config: LearnerConfig) -> torch.optim.Adam:
    """Fused Adam without weight decay; the learning rate is set anew at every step."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(parameters, lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=fused)


@torch.no_grad()
def project_gradient_(weight: torch.nn.Parameter) -> None:
    """Remove from the gradient of each unit row [L, d] its component along the row."""
    assert weight.grad is not None
    along = (weight.grad * weight).sum(-1, keepdim=True)
    weight.grad -= along * weight


@torch.no_grad()
def normalise_rows_(weight: torch.Tensor) -> None:
    """Give every row [L, d] unit norm."""
    weight /= weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)
