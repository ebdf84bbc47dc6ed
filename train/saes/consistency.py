"""Losses that ask a level's codes f to agree with an aggregate a of another level's codes (spec §5).

All are without dimension and look at active latents only, so that silence gains nothing: scaling f and a together
leaves them as they are. sg( ) holds a value constant; a fourth of the weight moves the aggregate.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BACK = 0.25  # weight of the gradient that moves the aggregate
FLOOR = 1e-3  # share of the aggregate's distribution that is spread evenly
TINY = 1e-30


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
