"""Losses that ask a level's codes f to agree with an aggregate a of another level's codes (spec §5).

All are without dimension and look at active latents only, so that silence gains nothing: scaling f and a together
leaves them as they are. sg( ) holds a value constant; a fourth of the weight moves the aggregate.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from train.saes.forest import MID, TOP, Levels
from train.saes.tree_config import TreeConfig
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.tree import Tree

RISES = (0.2, 0.4)  # shares of the run between which the losses come to their weight
BACK = 0.25  # weight of the gradient that moves the aggregate
FLOOR = 1e-3  # share of the aggregate's distribution that is spread evenly
TINY = 1e-30


class Pair(ABC):
    """Codes f of a level with their aggregate a, over the latents that have edges to the other level."""

    @abstractmethod
    def l2(self) -> Float[Tensor, ""]:
        """`l2_loss` of both."""

    @abstractmethod
    def kl(self) -> Float[Tensor, ""]:
        """`kl_loss` of both."""

    @abstractmethod
    def coverage(self) -> Float[Tensor, ""]:
        """`coverage_loss` of both."""


@dataclass(frozen=True)
class WholePair(Pair):
    """All codes, zeros and all; `short` is what `coverage_loss` has it for."""

    f: Float[Tensor, "B T A"]
    a: Float[Tensor, "B T A"]
    short: Callable[[], Float[Tensor, "B T A"]]

    def l2(self) -> Float[Tensor, ""]:
        return l2_loss(self.f, self.a)

    def kl(self) -> Float[Tensor, ""]:
        return kl_loss(self.f, self.a)

    def coverage(self) -> Float[Tensor, ""]:
        return coverage_loss(self.f, self.a, self.short())


def rise(clock: Clock) -> float:
    """Share of their weight that the losses have come to."""
    return min(max((clock.progress - RISES[0]) / (RISES[1] - RISES[0]), 0.0), 1.0)


def agreement(config: TreeConfig, pairs: Sequence[Pair], clock: Clock) -> dict[str, Float[Tensor, ""]]:
    """The weighted losses that make a tree of its levels, those that are on; sums over both pairs of levels."""
    each = {
        "l2": (config.l2, [pair.l2 for pair in pairs]),
        "kl": (config.kl, [pair.kl for pair in pairs]),
        "coverage": (config.coverage, [pair.coverage for pair in pairs]),
    }
    return {
        name: weight * rise(clock) * torch.stack([loss() for loss in losses]).sum()
        for name, (weight, losses) in each.items()
        if weight > 0
    }


def n_linked(sae: Tree, level: int) -> int:
    """How many latents of a level have an aggregate: the first ones."""
    bottom_up = sae.config.orientation == "bottom_up"
    return sae.forest.sizes[level] if bottom_up else sae.forest.n_linked(level)


def whole_pairs(sae: Tree, levels: Levels) -> list[WholePair]:
    """Every level after the first with its aggregate, in the order of encoding; none where no loss looks at them."""
    pairs, config = [], sae.config
    for level in sae.order[1:] if config.l2 > 0 or config.kl > 0 or config.coverage > 0 else ():
        linked = n_linked(sae, level)
        f, a = levels.codes[level], sae.aggregate(levels.codes, level)
        pairs.append(WholePair(f[..., :linked], a[..., :linked], functools.partial(wanting, sae, levels, level)))
    return pairs


def family_losses(sae: Tree, codes: list[Tensor], rows: Float[Tensor, "L D"]) -> Float[Tensor, ""]:
    """The decoder constraint over both pairs of levels."""
    forest, losses = sae.forest, []
    for level in (TOP, MID):
        shares = forest.families(sae.shares(codes, level + 1), level)
        child_rows = forest.families(rows[forest.spans[level + 1]].t(), level).permute(1, 2, 0)
        losses.append(family_loss(codes[level], shares, rows[forest.spans[level]], child_rows))
    return torch.stack(losses).sum()


def wanting(sae: Tree, levels: Levels, level: int) -> Float[Tensor, "B T A"]:
    """How far the best of each latent's children (top down: its parent) is from being active, 0 where it is.

    θ − u, over the mean active code of that level.
    """
    place = sae.order.index(level) - 1
    source = sae.order[place]
    raw, codes = levels.raw[source], levels.codes[source]
    if sae.config.orientation == "bottom_up":
        best = sae.forest.families(raw, level).amax(-1)
    else:
        best = sae.forest.handed_down(raw, level)[..., : sae.forest.n_linked(level)]
    return shortfall(best, codes, sae.sparsity.threshold[place])


def shortfall(best: Tensor, codes: Tensor, threshold: Float[Tensor, ""]) -> Tensor:
    """max(0, θ − u) of the best u of a level, over the mean of the active ones among its codes."""
    codes = codes.detach()
    unit = codes.sum() / (codes > 0).sum().clamp_min(1)
    return torch.relu(threshold.clone() - best) / unit.clamp_min(TINY)


def l2_loss(f: Float[Tensor, "*A"], a: Float[Tensor, "*A"]) -> Float[Tensor, ""]:
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
    return (divergence(f, a, sum_f, sum_a, a.shape[-1]) * counted).sum() / counted.sum().clamp_min(1)


def divergence(f: Tensor, a: Tensor, sum_f: Tensor, sum_a: Tensor, n: int) -> Tensor:
    """What each latent of `n` adds to `kl_loss`; nothing where f is 0."""
    q = f / sum_f.clamp_min(TINY)
    q_aggregate = (1 - FLOOR) * a / sum_a.clamp_min(TINY) + FLOOR / n
    log_q, log_aggregate = q.clamp_min(TINY).log(), q_aggregate.log()
    forward = q * (log_q - log_aggregate.detach())
    backward = q.detach() * (log_q.detach() - log_aggregate)
    return forward + BACK * backward


def coverage_loss(f: Float[Tensor, "*A"], a: Float[Tensor, "*A"], short: Float[Tensor, "*A"]) -> Float[Tensor, ""]:
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
