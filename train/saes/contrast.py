"""What a contrastive loss is made of: which tokens are compared, InfoNCE (van den Oord et al. 1807.03748), and L1.

Tokens of a batch are numbered row by row: place = row · window + position. All draws come from the generator of a step.
A anchors, P positives of one anchor, K keys (possible negatives).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from train.data.batch import Batch

Positives = Literal["window", "adjacent", "multi", "earlier", "shuffled"]
NEVER = -1e30  # a similarity that counts for nothing; -inf would make the gradient of an empty sum NaN


@dataclass(frozen=True)
class Drawn:
    """The tokens that one step compares.

    Attributes:
        places: of the keys [K]; the first of them are the anchors.
        doc: their documents [K].
        positives: for each window the places of every anchor's positives [A, P], and which of them count [A, P].
    """

    places: Int[Tensor, " K"]
    doc: Int[Tensor, " K"]
    positives: tuple[tuple[Int[Tensor, "A _"], Bool[Tensor, "A _"]], ...]

    @property
    def anchors(self) -> Int[Tensor, " A"]:
        """The anchors' places."""
        return self.places[: len(self.positives[0][0])]


def draw(
    batch: Batch,
    n_keys: int,
    n_anchors: int,
    kind: Positives,
    windows: Sequence[int],
    distinct_tokens: bool,
    generator: torch.Generator,
) -> Drawn:
    """Keys, anchors and positives of a step; `adjacent` has one window whatever `windows` are."""
    places = draw_places(batch.valid, batch.n_valid, n_keys, generator)
    doc, anchors = batch.doc.flatten()[places], places[:n_anchors]

    def positives(reach: int) -> tuple[Int[Tensor, "A P"], Bool[Tensor, "A P"]]:
        if kind == "shuffled":
            elsewhere = doc != doc[:n_anchors, None]
            chosen = draw_one(elsewhere, generator)
            return places[chosen], elsewhere.gather(1, chosen)
        reach = batch.valid.shape[1] - 1 if kind == "earlier" else reach
        before, there = earlier_places(batch, anchors, reach, distinct_tokens)
        if kind == "multi":
            return before, there
        one = draw_one(there, generator)
        return before.gather(1, one), there.gather(1, one)

    return Drawn(places, doc, tuple(positives(reach) for reach in ((1,) if kind == "adjacent" else windows)))


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


class _LogSumExp(torch.autograd.Function):
    """By softmax, which is quick where most exponents underflow, and whose result is the gradient too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        shares = values.softmax(-1)
        ctx.save_for_backward(shares)
        return values.amax(-1) - shares.amax(-1).log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shares: Tensor = ctx.saved_tensors[0]
        return shares * gradients[0][..., None]


def log_sum_of_negatives(similarity: Float[Tensor, "A *P K"], allowed: Bool[Tensor, "A *P K"]) -> Float[Tensor, "A *P"]:
    """log Σ exp over the allowed keys; very small where there is none."""
    total: Tensor = _LogSumExp.apply(torch.where(allowed, similarity, NEVER))  # type: ignore[no-untyped-call]
    return total


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
    return mean_over_anchors(losses, counts)


def difference(
    first: Float[Tensor, "A #P Z"],
    second: Float[Tensor, "A P Z"],
    alike: Float[Tensor, "A P"],
    chosen: Bool[Tensor, "A P"],
) -> Float[Tensor, ""]:
    """max(0, cos)·‖f − f'‖₁, the mean over each anchor's chosen positives, then over anchors that have any.

    A cosine below 0 would reward codes for being apart without bound.

    Args:
        first, second: codes of the anchor and of its positives.
        alike: cosine of the two tokens' inputs.
        chosen: positives that count.
    """
    return mean_over_anchors(torch.where(chosen, alike.clamp_min(0) * (first - second).abs().sum(-1), 0.0), chosen)


def mean_over_anchors(losses: Float[Tensor, "A P"], counts: Bool[Tensor, "A P"]) -> Float[Tensor, ""]:
    """The mean of losses, 0 where they do not count, over each anchor's positives, then over anchors that have any."""
    each = losses.sum(1) / counts.sum(1).clamp_min(1)
    return each.sum() / counts.any(1).sum().clamp_min(1)


def density_excess(high: Float[Tensor, "B T H"], n_valid: int, cap: float) -> Float[Tensor, ""]:
    """Σ_i max(0, π_i − cap)², π_i the share of the batch's tokens on which a feature is active.

    A count has no gradient: each active code stands for its share of one, f / ⟨f over the tokens where it is active⟩,
    so that those of too dense features fall and are no longer kept. The density of the batch and not the running one:
    what lags by twenty steps goes on pushing until the feature is dead.
    """
    active = (high > 0).sum((0, 1))
    typical = high.detach().sum((0, 1)) / active.clamp_min(1)
    density = high.sum((0, 1)) / typical.clamp_min(1e-12) / n_valid
    return (density - cap).clamp_min(0).square().sum()
