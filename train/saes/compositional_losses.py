"""The loss parts of `compositional` over its pairs of levels, those that are switched on, and figures of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from train.saes import composition
from train.saes.composition import HIGH, MID
from train.saes.compositional_config import CompositionalConfig
from train.saes.consistency import l2_loss
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.compositional import Compositional

NearestPart = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`composition.nearest_part`, or what gives the same."""

GROUP_RAMP = 0.2  # of the joint phase, over which Ω rises
COPY = 0.95  # cosine of an upper row and one of its parts above which it is a copy
AGREEMENT_RAMP = (0.2, 0.4)  # shares of the run between which the agreement loss rises


def structure_losses(
    sae: Compositional,
    u: list[Tensor],
    f: list[Tensor],
    compositions: tuple[Tensor, Tensor],
    W_dec: Float[Tensor, "L D"],
    n_valid: int,
    clock: Clock,
) -> dict[str, Float[Tensor, ""]]:
    """The weighted parts, by name; u and f from low to high, decoder rows as stored."""
    config, parts = sae.config, {}
    if config.agreement:
        source = f if config.agree_on == "codes" else u
        pairs = zip((MID, HIGH), compositions, strict=True)
        losses = [l2_loss(f[level], (source[level - 1] @ A.T).float()) for level, A in pairs]
        parts["agreement"] = agreement_weight(config, clock) * torch.stack(losses).sum()
    if config.group:
        parts["group"] = config.group * group_loss(sae, f, n_valid, clock)
    return parts | row_losses(sae, W_dec, composition.nearest_part)


def agreement_weight(config: CompositionalConfig, clock: Clock) -> float:
    """λ_a as it stands."""
    start, full = AGREEMENT_RAMP
    return config.agreement * min(max((clock.progress - start) / (full - start), 0.0), 1.0)


def row_losses(sae: Compositional, W_dec: Float[Tensor, "L D"], nearest: NearestPart) -> dict[str, Float[Tensor, ""]]:
    """The weighted parts that look at decoder rows alone."""
    config, parts = sae.config, {}
    if config.copies:
        cosines = [each.clamp_min(0) for each in nearest_parts(sae, W_dec, nearest)]
        losses = [(each.square() - config.copy_limit).clamp_min(0).mean() for each in cosines]
        parts["copies"] = config.copies * torch.stack(losses).sum()
    if config.decoder == "residual":
        parts["residual"] = config.residual_penalty * sae.residual.square().sum(-1).mean()
    return parts


def group_loss(sae: Compositional, f: list[Tensor], n_valid: int, clock: Clock) -> Float[Tensor, ""]:
    """Ω over both pairs of levels, times its ramp; τ falls from 1 to 0.1 over the joint phase."""
    joint = max((clock.progress - sae.config.pretrain) / (1 - sae.config.pretrain), 0.0)
    tau, ramp = 0.1**joint, min(joint / GROUP_RAMP, 1.0)
    losses = [
        composition.group_sparsity(f[level], f[level - 1], logits, candidates, tau, n_valid)
        for logits, candidates, level in sae.hierarchy()
    ]
    return ramp * torch.stack(losses).sum()


def nearest_parts(
    sae: Compositional, rows: Float[Tensor, "L D"], nearest: NearestPart = composition.nearest_part
) -> list[Float[Tensor, " U"]]:
    """Of mid and of high: the largest cosine of each row with a part of its own."""
    return [
        nearest(logits, candidates, rows[sae.places[level - 1]], rows[sae.places[level]])
        for logits, candidates, level in sae.hierarchy()
    ]


def part_figures(sae: Compositional) -> dict[str, Tensor]:
    """Of mid and high: effective number of parts, 1 / Σ share² on average, and which share of rows are copies."""
    figures = {}
    each = zip(("mid", "high"), sae.hierarchy(), nearest_parts(sae, sae.rows()), strict=True)
    for name, (logits, _, _), nearest in each:
        weights = softplus(logits)
        figures[f"parts_{name}"] = (weights.sum(1).square() / weights.square().sum(1)).mean()
        figures[f"copies_{name}"] = (nearest > COPY).float().mean()
    return figures
