"""Losses that ask a level's codes f to agree with an aggregate a of another level's codes (spec §5).

All are without dimension and look at active latents only, so that silence gains nothing: scaling f and a together
leaves them as they are. sg( ) holds a value constant; a fourth of the weight moves the aggregate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from train.saes.forest import MID, TOP, Levels
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.tree import Tree

RISES = (0.2, 0.4)  # shares of the run between which the losses come to their weight
BACK = 0.25  # weight of the gradient that moves the aggregate
FLOOR = 1e-3  # share of the aggregate's distribution that is spread evenly
TINY = 1e-30


def agreement(sae: Tree, levels: Levels, rows: Float[Tensor, "L D"], clock: Clock) -> dict[str, Float[Tensor, ""]]:
    """The weighted losses that make a tree of its levels, those that are on; sums over both pairs of levels."""
    config, codes = sae.config, levels.codes
    rise = min(max((clock.progress - RISES[0]) / (RISES[1] - RISES[0]), 0.0), 1.0)
    pairs = {}
    for level in sae.order[1:] if config.l2 > 0 or config.kl > 0 or config.coverage > 0 else ():
        linked = sae.forest.sizes[level] if config.orientation == "bottom_up" else sae.forest.n_linked(level)
        pairs[level] = codes[level][..., :linked], sae.aggregate(codes, level)[..., :linked]
    parts = {}
    if config.l2 > 0:
        parts["l2"] = config.l2 * rise * torch.stack([l2_loss(f, a) for f, a in pairs.values()]).sum()
    if config.kl > 0:
        parts["kl"] = config.kl * rise * torch.stack([kl_loss(f, a) for f, a in pairs.values()]).sum()
    if config.coverage > 0:
        losses = [coverage_loss(f, a, wanting(sae, levels, level)) for level, (f, a) in pairs.items()]
        parts["coverage"] = config.coverage * rise * torch.stack(losses).sum()
    if config.rho > 0:
        losses = [_family_loss_of(sae, codes, rows, level) for level in (TOP, MID)]
        parts["family"] = config.rho * rise * torch.stack(losses).sum()
    return parts


def wanting(sae: Tree, levels: Levels, level: int) -> Float[Tensor, "B T A"]:
    """How far the best of each latent's children (top down: its parent) is from being active, 0 where it is.

    θ − u, over the mean active code of that level.
    """
    place = sae.order.index(level) - 1
    source = sae.order[place]
    raw, codes = levels.raw[source], levels.codes[source].detach()
    if sae.config.orientation == "bottom_up":
        best = sae.forest.families(raw, level).amax(-1)
    else:
        best = sae.forest.handed_down(raw, level)[..., : sae.forest.n_linked(level)]
    unit = codes.sum() / (codes > 0).sum().clamp_min(1)
    return torch.relu(sae.sparsity.threshold[place].clone() - best) / unit.clamp_min(TINY)


def _family_loss_of(sae: Tree, codes: list[Tensor], rows: Tensor, level: int) -> Float[Tensor, ""]:
    forest = sae.forest
    shares = forest.families(sae.shares(codes, level + 1), level)
    child_rows = forest.families(rows[forest.spans[level + 1]].t(), level).permute(1, 2, 0)
    return family_loss(codes[level], shares, rows[forest.spans[level]], child_rows)


def l2_loss(f: Float[Tensor, "B T A"], a: Float[Tensor, "B T A"]) -> Float[Tensor, ""]:
    """Σ(f − sg a)² / E + ¼·Σ(sg f − a)² / E over the pairs (token, latent) with f > 0; E = sg Σ(f² + a²) over them."""
    active = f > 0
    energy = ((f.square() + a.square()) * active).sum().detach().clamp_min(TINY)
    forward = ((f - a.detach()).square() * active).sum()
    backward = ((f.detach() - a).square() * active).sum()
    return (forward + BACK * backward) / energy


def kl_loss(f: Float[Tensor, "B T A"], a: Float[Tensor, "B T A"]) -> Float[Tensor, ""]:
    """KL(q ‖ sg q̃) + ¼·KL(sg q ‖ q̃) in nats, over tokens where f and a are both somewhere active.

    q = f / Σf; q̃ = a / Σa, of which a thousandth is spread evenly: an active latent whose aggregate is silent costs
    about −ln(1e-3 / A) times its share.
    """
    sum_f, sum_a = f.sum(-1, keepdim=True), a.sum(-1, keepdim=True)
    counted = (sum_f > 0) & (sum_a > 0)
    q = f / sum_f.clamp_min(TINY)
    q_aggregate = (1 - FLOOR) * a / sum_a.clamp_min(TINY) + FLOOR / a.shape[-1]
    log_q, log_aggregate = q.clamp_min(TINY).log(), q_aggregate.log()
    forward = q * (log_q - log_aggregate.detach())
    backward = q.detach() * (log_q.detach() - log_aggregate)
    return ((forward + BACK * backward) * counted).sum() / counted.sum().clamp_min(1)


def coverage_loss(
    f: Float[Tensor, "B T A"], a: Float[Tensor, "B T A"], short: Float[Tensor, "B T A"]
) -> Float[Tensor, ""]:
    """Σ f·1[a = 0] / Σ f + ¼·Σ sg(f·1[a = 0])·short / sg Σ f: the share of f whose aggregate is silent.

    What is silent has no gradient, so the quarter goes to what is `short` of it: how far the nearest of the aggregate's
    latents is from being active, ≥ 0, without dimension.
    """
    alone, total = f * (a == 0), f.sum().clamp_min(TINY)
    return alone.sum() / total + BACK * (alone.detach() * short).sum() / total.detach()


def family_loss(
    f: Float[Tensor, "B T P"],
    shares: Float[Tensor, "B T P C"],
    rows: Float[Tensor, "P D"],
    child_rows: Float[Tensor, "P C D"],
) -> Float[Tensor, ""]:
    """Σ ‖f_p d_p − Σ_c s_c d_c‖² / sg Σ(‖f_p d_p‖² + ‖Σ_c s_c d_c‖²) over f_p > 0 (HSAE, arXiv 2602.11881).

    Through the inner products of each family's rows, so that nothing of size B · T · P · D is made.
    """
    family = torch.cat([rows[:, None], -child_rows], dim=1)
    values = torch.cat([f[..., None], shares], dim=-1) * (f > 0)[..., None]
    with torch.autocast(f.device.type, enabled=False):  # differences of like numbers: bfloat16 would not do
        products = family @ family.transpose(-1, -2)
        apart = torch.einsum("btpi,pij,btpj->", values, products, values)
        children = torch.einsum("btpi,pij,btpj->", values[..., 1:], products[:, 1:, 1:], values[..., 1:])
    own = (values[..., 0].square() * products[:, 0, 0]).sum()
    return apart / (own + children).detach().clamp_min(TINY)
