"""Upper latents made of lower ones: which parts each has, how they are found, and losses over them.

Upper latent j has P candidates among the lower ones, with weights A_ij = softplus(logit_jp) ≥ 0, and 0 for all others.
A is kept as logits [U, P] beside the candidates' numbers [U, P]; a lower latent may be part of several upper ones.
U upper, W lower latents, P candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from train.saes.entrywise import products_at
from train.saes.kept import Kept
from train.saes.places import Places
from train.saes.rows import rows_at

LOW, MID, HIGH = range(3)  # order of computing; stored order is high, mid, low, so that prefixes are coarse to fine
N_PARTS = 4  # a seed and its three strongest neighbours
OTHER_WEIGHT = 0.01  # of candidates that are no part, against 1/4 of a part
NO_PART = math.log(math.expm1(OTHER_WEIGHT))  # the logit of that weight
NEIGHBOURS = 64  # affinities kept per latent; weaker ones are noise
UNASSIGNED = -20.0  # logit: a weight of 2e-9, whose gradient is as small
NORM_EPSILON = 1e-3  # ε of the group norm


@dataclass(frozen=True)
class Hierarchy:
    """Candidates [U, P] with their weights, those of each upper latent summing to 1."""

    candidates: Int[Tensor, "U P"]
    weights: Float[Tensor, "U P"]

    def logits(self) -> Float[Tensor, "U P"]:
        """What softplus gives the weights from."""
        return torch.log(torch.expm1(self.weights))

    def members(self, n_lower: int) -> Float[Tensor, "U W"]:
        """The weights as a dense matrix."""
        return dense(self.weights, self.candidates, n_lower)


def dense(weights: Float[Tensor, "U P"], candidates: Int[Tensor, "U P"], n_lower: int) -> Float[Tensor, "U W"]:
    """A transposed: one row per upper latent, 0 where a lower one is no candidate."""
    return weights.new_zeros(len(weights), n_lower).scatter(1, candidates, weights)


def kept(weights: Float[Tensor, "U P"], candidates: Int[Tensor, "U P"], n_lower: int) -> Kept:
    """A transposed, of which only the candidates are there."""
    return Kept(weights.flatten(), _rows_of(candidates, n_lower), (1, len(weights), n_lower))


def _rows_of(columns: Int[Tensor, "U P"], n_columns: int) -> Places:
    first = torch.arange(0, columns.numel() + 1, columns.shape[1], device=columns.device)
    return Places(first, columns.flatten(), n_columns)


def composed_rows(A: Float[Tensor, "U W"] | Kept, rows: Float[Tensor, "W D"]) -> Float[Tensor, "U D"]:
    """norm(Σ_i A_ij d_i): unit decoder rows of upper latents."""
    return unit(A.times(rows)[0] if isinstance(A, Kept) else (A @ rows).float())


def nearest_part(
    logits: Float[Tensor, "U P"],
    candidates: Int[Tensor, "U P"],
    lower: Float[Tensor, "W D"],
    upper: Float[Tensor, "U D"],
) -> Float[Tensor, " U"]:
    """The largest cosine of each upper row with one of its four heaviest parts; rows have unit norm.

    All candidates would cost as much as making the rows; a row that is a copy is one of its heaviest part.
    """
    parts = heaviest(logits, candidates)
    with torch.autocast(logits.device.type, enabled=False):
        cosines = torch.einsum("upd,ud->up", rows_at(lower, parts).float(), upper.float())
    return cosines.amax(1)


def nearest_part_kept(
    logits: Float[Tensor, "U P"],
    candidates: Int[Tensor, "U P"],
    lower: Float[Tensor, "W D"],
    upper: Float[Tensor, "U D"],
) -> Float[Tensor, " U"]:
    """The same from sampled products: no row is copied for the parts, and none of their gradients is of its size."""
    parts = heaviest(logits, candidates)
    return products_at(upper, lower, _rows_of(parts, len(lower))).view_as(parts).amax(1)


def heaviest(logits: Float[Tensor, "U P"], candidates: Int[Tensor, "U P"]) -> Int[Tensor, "U _"]:
    """The four heaviest parts of each upper latent."""
    return candidates.gather(1, logits.topk(min(N_PARTS, logits.shape[1]), dim=1).indices)


def unit(rows: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
    """Rows of norm 1."""
    scaled: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return scaled


# ---- finding parts -----------------------------------------------------------------------------------------------


class CoActivity:
    """Counts of which latents fire together, over any number of batches."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.together = self.lower = self.upper = self.mass = torch.zeros(())

    def add(self, lower: Float[Tensor, "N W"], upper: Float[Tensor, "N U"]) -> None:
        """Count a batch of codes."""
        fired_lower, fired_upper = (lower > 0).float(), (upper > 0).float()
        self.n_tokens += len(lower)
        self.together = self.together.to(lower) + fired_lower.T @ fired_upper
        self.lower = self.lower.to(lower) + fired_lower.sum(0)
        self.upper = self.upper.to(lower) + fired_upper.sum(0)
        self.mass = self.mass.to(lower) + lower.sum(0)

    def correlation(self) -> Float[Tensor, "W U"]:
        """φ_ij of the events "i fires" and "j fires"; 0 where one of them never varies."""
        p, q = self.lower / self.n_tokens, self.upper / self.n_tokens
        covariance = self.together / self.n_tokens - p[:, None] * q
        spread = ((p * (1 - p))[:, None] * (q * (1 - q))).sqrt()
        return torch.where(spread > 0, covariance / spread.clamp_min(1e-12), 0.0)


def affinity(
    lower: Float[Tensor, "W D"], upper: Float[Tensor, "U D"], correlation: Float[Tensor, "W U"] | None
) -> Float[Tensor, "W U"]:
    """½ max(0, cos(d_i, d_j)) + ½ max(0, φ_ij); rows have unit norm. Without φ, the first half."""
    direction = (lower @ upper.T).clamp_min(0) / 2
    return direction if correlation is None else direction + correlation.clamp_min(0) / 2


def strongest(values: Float[Tensor, "W W"]) -> Float[Tensor, "W W"]:
    """Only the 64 largest of each row, its own included."""
    kept = torch.topk(values, min(NEIGHBOURS, len(values)), dim=1)
    return torch.zeros_like(values).scatter(1, kept.indices, kept.values)


def seeds_with_overlap(
    affinities: Float[Tensor, "W W"],
    mass: Float[Tensor, " W"],
    n_upper: int,
    n_candidates: int,
    generator: torch.Generator,
) -> tuple[Hierarchy, Float[Tensor, "U W"]]:
    """Upper latents from seeds drawn ∝ activation mass: a seed's 3 nearest are its parts, its 32 nearest candidates.

    Parts may overlap. A partition leaves most clusters with one member when the levels' sizes are 4:2:1 (spec §4).

    Returns:
        the hierarchy, and membership of its parts alone, each row summing to 1.
    """
    share = (mass / mass.sum().clamp_min(1e-12) + 1e-6 / len(mass)).cpu()
    seeds = torch.multinomial(share, n_upper, generator=generator).to(affinities.device)
    rows = affinities[seeds].scatter(1, seeds[:, None], torch.inf)  # a seed is its own first part
    candidates = torch.topk(rows, min(n_candidates, len(mass)), dim=1).indices
    weights = torch.full(candidates.shape, OTHER_WEIGHT, device=affinities.device)
    weights[:, :N_PARTS] = 1 / N_PARTS
    hierarchy = Hierarchy(candidates, weights / weights.sum(1, keepdim=True))
    parts = candidates[:, :N_PARTS]
    return hierarchy, dense(torch.ones_like(weights[:, :N_PARTS]) / parts.shape[1], parts, len(mass))


def from_clusters(
    affinities: Float[Tensor, "W W"], cluster: Int[Tensor, " W"], n_upper: int, n_candidates: int
) -> tuple[Hierarchy, Float[Tensor, "U W"]]:
    """Upper latents from a partition: the members of a cluster are the parts, latents near to them other candidates.

    Of more members than candidates the nearest are taken.

    Returns:
        as `seeds_with_overlap`; a cluster without members has candidates of one weight, and no membership.
    """
    inside = affinities.new_zeros(n_upper, len(cluster)).scatter(0, cluster[None], 1.0)
    member = inside / inside.sum(1, keepdim=True).clamp_min(1)
    nearness = member @ affinities + inside * (affinities.max() + 1)
    candidates = torch.topk(nearness, min(n_candidates, len(cluster)), dim=1).indices
    weights = torch.where(inside.gather(1, candidates) > 0, member.gather(1, candidates), OTHER_WEIGHT)
    return Hierarchy(candidates, weights / weights.sum(1, keepdim=True)), member


def random_hierarchy(n_lower: int, n_upper: int, n_parts: int, generator: torch.Generator) -> Hierarchy:
    """Each upper latent with `n_parts` different lower ones drawn at random, all of one weight."""
    candidates = torch.rand(n_upper, n_lower, generator=generator).topk(min(n_parts, n_lower), dim=1).indices
    return Hierarchy(candidates, torch.full(candidates.shape, 1 / candidates.shape[1]))


def any_hierarchy(n_lower: int, n_upper: int, n_candidates: int) -> Hierarchy:
    """Candidates side by side, all of one weight: what stands there until the low level has been clustered."""
    width = min(n_candidates, n_lower)
    candidates = (torch.arange(n_upper)[:, None] + torch.arange(width)) % n_lower
    return Hierarchy(candidates, torch.full(candidates.shape, 1 / width))


def reassigned(
    affinities: Float[Tensor, "W U"],
    candidates: Int[Tensor, "U P"],
    logits: Float[Tensor, "U P"],
    left_out: float = 0.2,
) -> tuple[Int[Tensor, "U P"], Float[Tensor, "U P"], Bool[Tensor, "U P"]]:
    """New candidates by affinity, with their logits: old weights stay, new ones start small, the weakest are shut off.

    Args:
        left_out: share of all (upper, candidate) pairs, those of the lowest affinity, that get no weight.

    Returns:
        candidates, those that stay in their old place; logits; which of them are not what they were.
    """
    found = torch.topk(affinities.T, candidates.shape[1], dim=1).indices
    same = candidates[:, :, None] == found[:, None]
    stays, known = same.any(2), same.any(1)
    # of the places that come free and the candidates that are new there are as many: the n-th takes the n-th
    places = stays.int().argsort(dim=1, stable=True)
    arrivals = found.gather(1, known.int().argsort(dim=1, stable=True))
    moved = torch.where(stays, candidates, torch.zeros_like(found).scatter(1, places, arrivals))
    strength = affinities.T.gather(1, moved).flatten()
    weak = torch.topk(strength, int(left_out * len(strength)), largest=False).indices
    shut = torch.zeros_like(stays).flatten().scatter(0, weak, True).view_as(stays)
    return moved, torch.where(stays, logits, NO_PART).masked_fill(shut, UNASSIGNED), ~stays | shut


def fitted_gains(
    written: Float[Tensor, "3 N"], wanted: Float[Tensor, " N"], omega: tuple[float, ...]
) -> Float[Tensor, " 3"]:
    """Factors on what the low, mid and high level write for which Σ_p ω_p ‖wanted − Σ over prefix p‖² is least.

    1 for a level that wrote nothing. Upper rows are much alike and a token takes several of them: with factors of 1
    explained variance is −10 or below.
    """
    # prefixes {high}, {high, mid}, all: low is in the last only, and two levels are together where the lower one is
    inside = written.new_tensor([sum(omega[2 - level :]) for level in range(3)])
    products = (written @ written.T) * torch.minimum(inside[:, None], inside)
    ridge = 1e-6 * products.diagonal().mean() * torch.eye(3, device=written.device)
    gains: Tensor = torch.linalg.solve(products + ridge, (written @ wanted) * inside)
    return torch.where(products.diagonal() > 0, gains.clamp(0.01, 2.0), 1.0)


# ---- loss -------------------------------------------------------------------------------------------------------


def group_sparsity(
    upper: Float[Tensor, "B T U"],
    lower: Float[Tensor, "B T W"],
    logits: Float[Tensor, "U P"],
    candidates: Int[Tensor, "U P"],
    tau: float,
    n_valid: int,
) -> Float[Tensor, ""]:
    """Ω: ⟨Σ_j √(ε² + f_j² + Σ_i P_ij f_i²) − ε⟩, a tree-group norm with soft membership P_ij = softmax_j(log A_ij / τ).

    It is least when active latents share few parents. A lower latent that is nobody's candidate does not count.
    """
    log_weights = torch.log(softplus(logits)) / tau
    scores = log_weights.new_full((len(logits), lower.shape[-1]), -torch.inf).scatter(1, candidates, log_weights)
    orphans = torch.isinf(scores).all(0)
    P = torch.softmax(scores.masked_fill(orphans, 0.0), dim=0).masked_fill(orphans, 0.0)
    with torch.autocast(P.device.type, enabled=False):
        energy = upper.square() + lower.square() @ P.T
    return ((energy + NORM_EPSILON**2).sqrt() - NORM_EPSILON).sum() / n_valid
