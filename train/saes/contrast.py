"""What a contrastive loss is made of: which tokens are compared, and InfoNCE (van den Oord et al. 1807.03748).

Tokens of a batch are numbered row by row: place = row · window + position. All draws come from the generator of a step.
A anchors, P positives of one anchor, K keys (possible negatives).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from train.data.batch import Batch

NEVER = -1e30  # a similarity that counts for nothing; -inf would make the gradient of an empty sum NaN


def draw_places(valid: Bool[Tensor, "B T"], n_valid: int, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """`n` valid places in random order: each once before any comes twice."""
    scores = torch.rand(valid.numel(), generator=generator, device=valid.device)
    order = torch.where(valid.flatten(), scores, 2.0).argsort(stable=True)  # the valid ones first
    return order[torch.arange(n, device=valid.device) % n_valid]


def earlier_places(
    batch: Batch, places: Int[Tensor, " A"], reach: int, distinct_tokens: bool = False
) -> tuple[Int[Tensor, "A P"], Bool[Tensor, "A P"]]:
    """The `reach` places before each, nearest first, and which of them are there: same row and document, valid.

    With `distinct_tokens` those with the same token id do not count either.
    """
    back = torch.arange(1, reach + 1, device=places.device)
    there = (places % batch.valid.shape[1])[:, None] >= back
    before = (places[:, None] - back).clamp_min(0)
    doc = batch.doc.flatten()
    there = there & batch.valid.flatten()[before] & (doc[before] == doc[places][:, None])
    if distinct_tokens:
        token = batch.token.flatten()
        there = there & (token[before] != token[places][:, None])
    return before, there


def draw_one(allowed: Bool[Tensor, "A P"], generator: torch.Generator) -> Int[Tensor, "A 1"]:
    """For each row the column of one allowed entry, all equally likely; any column where none is allowed."""
    scores = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    return torch.where(allowed, scores, -1.0).argmax(dim=1, keepdim=True)


def log_sum_of_negatives(similarity: Float[Tensor, "A *P K"], allowed: Bool[Tensor, "A *P K"]) -> Float[Tensor, "A *P"]:
    """log Σ exp over the allowed keys; very small where there is none."""
    return torch.where(allowed, similarity, NEVER).logsumexp(dim=-1)


def info_nce(
    positive: Float[Tensor, "A P"],
    chosen: Bool[Tensor, "A P"],
    negatives: Float[Tensor, "A _"],
    n_negatives: Int[Tensor, "A _"],
    scale_free: bool,
) -> Float[Tensor, ""]:
    """−log[e^p / (e^p + Σ_n e^n)], the mean over each anchor's chosen positives, then over anchors that have any.

    Args:
        positive: similarities with positives, divided by τ.
        chosen: positives that count; an anchor with no negative does not.
        negatives: `log_sum_of_negatives` of the anchor [A, 1], or of each pair [A, P].
        n_negatives: how many there are, of the anchor [A, 1] or of each pair [A, P].
        scale_free: divide by log(1 + n_negatives), so that embeddings which are all equal give 1.
    """
    counts = chosen & (n_negatives > 0)
    losses = torch.where(counts, softplus(negatives - positive), 0.0)
    if scale_free:
        losses = losses / n_negatives.clamp_min(1).float().log1p()
    each = losses.sum(1) / counts.sum(1).clamp_min(1)
    return each.sum() / counts.any(1).sum().clamp_min(1)
