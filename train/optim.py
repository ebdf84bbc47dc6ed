"""Adam, and keeping decoder rows at unit norm: project the gradient, step, renormalise (spec §0.4)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.collective import clip_gradients_
from train.config import LearnerConfig
from train.saes.base import SAE


def make_optimizer(sae: SAE, config: LearnerConfig) -> torch.optim.Adam:
    """Fused Adam without weight decay; two groups, the second with a rate of its own where the variant has one.

    The learning rates are set anew at every step (`set_lr`). On a GPU they are there, for steps that are recorded.
    """
    own = [parameter for name, parameter in sae.named_parameters() if name in sae.own_rate]
    common = [parameter for name, parameter in sae.named_parameters() if name not in sae.own_rate]
    fused = common[0].device.type in ("cpu", "cuda")
    groups: list[dict[str, Any]] = [{"params": group} for group in (common, own) if group]
    for group in groups if common[0].is_cuda else ():
        group |= {"lr": torch.zeros((), device=common[0].device), "capturable": True}
    return torch.optim.Adam(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=fused)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a parameter group, where it is kept."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


@torch.no_grad()
def project_gradient_(weight: Tensor) -> None:
    """Remove from the gradient of each unit row [L, d] its component along the row."""
    assert weight.grad is not None
    along = (weight.grad * weight).sum(-1, keepdim=True)
    weight.grad -= along * weight


@torch.no_grad()
def normalise_rows_(weight: Tensor) -> None:
    """Give every row [L, d] unit norm."""
    weight /= weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def plain_update_(
    optimizer: torch.optim.Adam, rows: Sequence[Tensor], everywhere: list[Tensor], largest: float
) -> Tensor:
    """Adam's step on all parameters with the norm of their gradients bounded, unit `rows` kept; the norm before.

    Args:
        everywhere: the parameters that all ranks have, where each has latents of its own.
    """
    for weight in rows:
        if weight.grad is not None:
            project_gradient_(weight)
    norm = clip_gradients_(parameters_of(optimizer), everywhere, largest)
    optimizer.step()
    for weight in rows:
        normalise_rows_(weight)
    return norm


def parameters_of(optimizer: torch.optim.Adam) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def can_fuse(rows: Sequence[Tensor]) -> bool:
    """Whether the kernels of `train.row_adam` can step these: on a GPU, in float32, rows not too wide, and Triton."""
    if not rows or not all(weight.is_cuda for weight in rows) or importlib.util.find_spec("triton") is None:
        return False
    widest = importlib.import_module("train.row_adam").WIDEST
    return all(
        weight.dtype == torch.float32 and weight.is_contiguous() and weight.dim() == 2 and weight.shape[1] <= widest
        for weight in rows
    )


@torch.no_grad()
def fused_update_(optimizer: torch.optim.Adam, rows: Sequence[Tensor], largest: float) -> Tensor:
    """`plain_update_` with one pass over each of the `rows`, up to rounding the same; their gradients are gone then.

    Adam's state is its own, so that checkpoints of one way go on the other way. Nothing waits for the device.
    """
    kernels = importlib.import_module("train.row_adam")
    taken = [(weight, weight.grad) for weight in rows if weight.grad is not None]
    for weight, _ in taken:
        weight.grad = None  # the optimizer passes them over
    others = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in others]
    norms += [kernels.projected_squares(weight, gradient).sum().sqrt() for weight, gradient in taken]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in others:
        gradient.mul_(scale)
    optimizer.step()
    for weight, gradient in taken:
        state, group = state_of(optimizer, weight), group_of(optimizer, weight)
        state["step"] += 1
        corrections = [1 - beta ** state["step"].double() for beta in group["betas"]]
        lr = group["lr"] if isinstance(group["lr"], Tensor) else weight.new_full((), group["lr"])
        factors = torch.stack([*corrections, lr]).float()
        averages = (state["exp_avg"], state["exp_avg_sq"])
        kernels.step_rows_(weight, gradient, averages, scale, factors, group["betas"], group["eps"])
    return norm


def state_of(optimizer: torch.optim.Adam, weight: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter, made as fused Adam makes it in its first step."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    return state


def group_of(optimizer: torch.optim.Adam, weight: Tensor) -> dict[str, Any]:
    """The parameter group that a parameter is in: its rate, betas and epsilon."""
    return next(group for group in optimizer.param_groups if any(weight is one for one in group["params"]))
