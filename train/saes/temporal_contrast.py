"""The contrastive loss of variant `contrastive`: settings, and what it keeps from step to step (spec §7).

    z = f·m / ‖f·m‖                          m = 0 for features active on more than a tenth of the tokens
    ℓ_w = −⟨log[e^{z_t·z_s/τ} / (e^{z_t·z_s/τ} + Σ_n e^{z_t·z_n/τ})]⟩      s uniform in {t−w, …, t−1}, same document
    L_c = mean_w ℓ_w / log(1 + N_neg)        or, as `difference`, mean_w ⟨max(0, cos(x_t, x_s))·‖f_t − f_s‖₁⟩

Negatives n are tokens of other documents: the drawn tokens of this batch, and those of earlier steps, held in a
circular buffer with their document ids.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, pad

from common.config import Count
from train.data.batch import Batch
from train.saes.base import KeptConfig
from train.saes.contrast import Drawn, Positives, difference, draw, info_nce, log_sum_of_negatives
from train.saes.kept import FEW, Codes, Kept
from train.saes.momentum import SlowEncoder, take_sizes
from train.saes.parts import generator_of
from train.saes.rows import rows_at
from train.schedule import Clock

HEAD_WIDTH = 128
RATE = 0.05  # of the running averages of densities and of the mean
OF_EMBEDDINGS = ("key_momentum", "centred", "head", "similarity", "symmetric")


class ContrastConfig(KeptConfig):
    """Settings of the loss."""

    lambda_c: float = Field(0.1, ge=0, description="Weight of the contrastive loss; 0: none is computed.")
    ramp: float = Field(0.2, ge=0, le=1, description="Share of the run over which λ_c rises, the buffer being full.")
    contrast_windows: tuple[Count, ...] = Field(
        (8, 16, 32), min_length=1, description="How many tokens back a positive may lie; the loss is their mean."
    )
    loss: Literal["info_nce", "difference"] = Field(
        "info_nce",
        description="`difference`: codes' L1 distance by the inputs' cosine, without negatives; as published.",
    )
    positives: Positives = Field(
        "window",
        description="One of the window; the token before; all of the window; any earlier one of the document; "
        "one of another document (a control that must gain nothing).",
    )
    distinct_tokens: bool = Field(False, description="No positives with the anchor's own token id.")
    tau: float = Field(0.1, gt=0, description="τ, by which similarities are divided; usual for cosines.")
    anchors: Count = Field(128, gt=0, description="Tokens per step that the loss is taken at; 128 to 512 are usual.")
    keys: Count = Field(
        1024,
        gt=0,
        description="Tokens drawn per step: anchors are the first; all are negatives and go into the buffer.",
    )
    buffer: Count = Field(16_384, ge=0, description="Embeddings of earlier steps kept as negatives; 0: none.")
    key_momentum: float = Field(
        0.0, ge=0, lt=1, description="m of an encoder of its own for the keys, following slowly; .99 is usual; 0: none."
    )
    same_document: bool = Field(True, description="Tokens of the anchor's own document are no negatives.")
    density_limit: float = Field(
        0.1, gt=0, le=1, description="Features active on more tokens are left out of z, or they take it over; 1: none."
    )
    centred: bool = Field(False, description="z less its running mean; with budgets it may do without `density_limit`.")
    head: Literal["none", "random", "learned"] = Field(
        "none", description="z from 128 projections of the high pre-activations; a learned head may absorb the loss."
    )
    similarity: Literal["cosine", "dot"] = Field("cosine", description="`dot`: z is not normalised.")
    symmetric: bool = Field(False, description="Also tell the anchor from the negatives as seen from its positive.")
    scale_free: bool = Field(True, description="Divide by log(1 + N_neg): 1 when all embeddings are equal.")

    @model_validator(mode="after")
    def _comparable(self) -> ContrastConfig:
        if min(self.contrast_windows) < 1:
            raise ValueError(f"contrast_windows = {self.contrast_windows}: each must be at least 1")
        if self.anchors > self.keys:
            raise ValueError(f"anchors = {self.anchors} are drawn from keys = {self.keys}: fewer are needed")
        if 0 < self.buffer < self.keys:
            raise ValueError(f"buffer = {self.buffer} is less than keys = {self.keys} of one step; 0 for none")
        for name in OF_EMBEDDINGS if self.loss == "difference" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of embeddings, and loss = difference compares the codes: leave it out")
        return self

    @property
    def n_stored(self) -> int:
        """Embeddings of earlier steps that the loss asks for."""
        return self.buffer if self.lambda_c > 0 and self.loss == "info_nce" else 0


class TemporalContrast(nn.Module):
    """See the module's formula.

    Args:
        n_features: H, latents compared.
        encoder: what encodes them, for keys that have an encoder of their own.

    Attributes:
        density: running share of tokens on which each is active [H].
        negatives: embeddings of earlier steps [buffer, H or 128], gone after training; zero rows are empty.
        negative_docs: their documents.
        mean: running mean [H] of what z is made from; None unless it is taken off.
        slow: the encoder of the keys; None unless they have one.
    """

    density: Tensor
    negatives: Tensor
    negative_docs: Tensor
    mean: Tensor | None
    drawn: tuple[Tensor, Tensor]  # keys and documents of a step, from its loss until the step is taken

    def __init__(self, config: ContrastConfig, n_features: int, encoder: dict[str, Tensor], seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        width = n_features if config.lambda_c > 0 else 0
        if config.head != "none":
            width = HEAD_WIDTH
            generator = generator_of(seed, -1, torch.device("cpu"))
            head = torch.randn(n_features, HEAD_WIDTH, generator=generator) / HEAD_WIDTH**0.5
            if config.head == "learned":
                self.head = nn.Parameter(head)
            else:
                self.register_buffer("head", head)
        self.register_buffer("density", torch.zeros(n_features))
        self.register_buffer("negatives", torch.zeros(config.n_stored, width))
        self.register_buffer("negative_docs", torch.zeros(config.n_stored, dtype=torch.int32))
        self.register_buffer("mean", torch.zeros(n_features) if config.centred else None)
        self.slow = SlowEncoder(encoder, config.key_momentum) if config.key_momentum > 0 else None

    def weight(self, clock: Clock) -> float:
        """λ_c·c(t): 0 until the buffer is full, then rising."""
        begin = -(-self.config.n_stored // self.config.keys)
        length = self.config.ramp * clock.n_steps
        risen = (clock.step - begin + 1) / max(length, 1.0)
        return self.config.lambda_c * min(max(risen, 0.0), 1.0)

    def forward(
        self,
        high: Float[Tensor, "B T H"],
        batch: Batch,
        clock: Clock,
        threshold: Float[Tensor, ""],
        sparse: bool = False,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss without its weight, and what is worth a line.

        Args:
            high: codes of the features, or their rectified pre-activations where a head follows.
            threshold: the running one above which codes are kept, for keys with an encoder of their own.
            sparse: of the buffer take what is not 0, if it is little.
        """
        config, rows = self.config, high.flatten(0, 1)
        drawn = draw(
            batch, config.keys, config.anchors, config.positives, config.contrast_windows, config.distinct_tokens,
            generator_of(self.seed, clock.step, high.device),
        )  # fmt: skip
        if config.loss == "difference":
            losses, live = self.differences(rows, batch, drawn)
        else:
            losses, live = self.info_nce(rows, batch, drawn, threshold, sparse)
        if self.mean is not None:
            self.mean.lerp_(high.detach().sum((0, 1)) / batch.n_valid, RATE)
        told = {
            "dropped_anchors": (~live).float().mean(),
            "masked_share": (self.density > config.density_limit).float().mean(),
        }
        return torch.stack(losses).mean(), told

    def differences(
        self, rows: Float[Tensor, "N H"], batch: Batch, drawn: Drawn
    ) -> tuple[list[Float[Tensor, ""]], Bool[Tensor, " A"]]:
        """The L1 form of each window, and which anchors have an active feature that counts."""
        counted, x, anchors = self.density <= self.config.density_limit, batch.x.flatten(0, 1), drawn.anchors
        own, losses = rows_at(rows, anchors) * counted, []
        for positives, chosen in drawn.positives:
            alike = cosine_similarity(x[anchors][:, None], x[positives], dim=-1)
            losses.append(difference(own[:, None], rows_at(rows, positives) * counted, alike, chosen))
        return losses, own.detach().any(1)

    def info_nce(
        self, rows: Float[Tensor, "N H"], batch: Batch, drawn: Drawn, threshold: Float[Tensor, ""], sparse: bool
    ) -> tuple[list[Float[Tensor, ""]], Bool[Tensor, " A"]]:
        """InfoNCE of each window, from both sides if `symmetric`, and which anchors have an embedding."""
        config, places, n = self.config, drawn.places, len(drawn.anchors)
        if self.slow is None:
            keys = self.embed(rows_at(rows, places))
            z = keys[:n]
        else:
            keys = self.slow_keys(self.slow, batch, places, threshold)
            z = self.embed(rows_at(rows, drawn.anchors))
        allowed = torch.cat([drawn.doc, self.negative_docs]) != drawn.doc[:n, None]
        if not config.same_document:
            allowed = torch.ones_like(allowed)
            allowed[:, : len(places)] = places != drawn.anchors[:, None]  # no token is its own negative
        live, held = z.detach().any(1), self.held(sparse)
        there = held.places.first.diff() > 0 if isinstance(held, Kept) else held.any(1)
        allowed = (allowed & torch.cat([keys.detach().any(1), there]))[:, None]
        scores = self.similarity(z, keys, held)[:, None]
        negatives, count, losses = log_sum_of_negatives(scores, allowed), allowed.sum(-1), []
        for positives, counts in drawn.positives:
            theirs = self.embed(rows_at(rows, positives.flatten())).unflatten(0, positives.shape)
            chosen = counts & live[:, None] & (theirs != 0).any(-1)
            similarity = (z[:, None] * theirs).sum(-1) / config.tau
            others = allowed
            if config.positives == "shuffled" or not config.same_document:  # a positive may be among them
                others = allowed & pad(places != positives[..., None], (0, len(self.negatives)), value=True)
                negatives, count = log_sum_of_negatives(scores.expand_as(others), others), others.sum(-1)
            losses.append(info_nce(similarity, chosen, negatives, count, config.scale_free))
            if config.symmetric:
                back = self.similarity(theirs, keys, held)
                seen = log_sum_of_negatives(back, others.expand_as(back))
                losses.append(info_nce(similarity, chosen, seen, count, config.scale_free))
        self.drawn = keys.detach(), drawn.doc
        return losses, live

    def embed(self, rows: Float[Tensor, "K H"]) -> Float[Tensor, "K Z"]:
        """z of some tokens; zero where no feature that counts is active."""
        counted = self.density <= self.config.density_limit
        z = rows * counted
        if self.mean is not None:
            z = torch.where(z.any(-1, keepdim=True), z - self.mean * counted, 0.0)
        if self.config.head != "none":
            with torch.autocast(z.device.type, enabled=False):  # cosines over τ: bfloat16 would be off by .04
                z = z @ self.head
        return normalize(z, dim=-1) if self.config.similarity == "cosine" else z

    @torch.no_grad()
    def slow_keys(
        self, slow: SlowEncoder, batch: Batch, places: Int[Tensor, " K"], threshold: Float[Tensor, ""]
    ) -> Float[Tensor, "K Z"]:
        """z of some tokens by the keys' own encoder."""
        u = slow(batch.x.flatten(0, 1)[places])
        return self.embed(u * (u > threshold) if self.config.head == "none" else u)

    @torch.no_grad()
    def held(self, sparse: bool) -> Codes:
        """The buffer, [buffer, Z], or [1, buffer, Z] of which only what is not 0 is there, where that is little."""
        if sparse and len(self.negatives) and self.config.head == "none" and self.mean is None:
            chosen = self.negatives.flatten().nonzero().squeeze(-1)
            if len(chosen) <= FEW * self.negatives.numel():
                return Kept.of(self.negatives[None], chosen)
        return self.negatives

    def similarity(self, z: Float[Tensor, "*A Z"], keys: Float[Tensor, "K Z"], held: Codes) -> Float[Tensor, "*A N"]:
        """z·z_n / τ with this step's keys and with the buffer."""
        scaled = z / self.config.tau
        with torch.autocast(z.device.type, enabled=False):
            if isinstance(held, Kept):
                old = held.times(scaled.flatten(0, -2).t())[0].t().reshape(*z.shape[:-1], -1)
            else:
                old = scaled @ held.T
            return torch.cat([scaled @ keys.T, old], dim=-1)

    @torch.no_grad()
    def after_step_(self, clock: Clock, encoder: dict[str, Tensor]) -> None:
        """Put this step's embeddings over the oldest; their slots follow from the step, every step having as many."""
        if len(self.negatives):
            keys, doc = self.drawn
            slots = (clock.step * len(keys) + torch.arange(len(keys), device=keys.device)) % len(self.negatives)
            self.negatives[slots] = keys.to(self.negatives.dtype)
            self.negative_docs[slots] = doc.to(self.negative_docs.dtype)
        if self.slow is not None:
            self.slow.follow_(encoder)

    @torch.no_grad()
    def follow_density_(self, codes: Float[Tensor, "B T H"], n_valid: int, clock: Clock) -> None:
        now = (codes > 0).sum((0, 1)) / n_valid
        self.density.lerp_(now, 1.0 if clock.step == 0 else RATE)

    def end(self) -> None:
        """Let go of what only training needs."""
        self.negatives, self.negative_docs = self.negatives[:0], self.negative_docs[:0]
        if self.slow is not None:
            self.slow.end()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        take_sizes(self, ("negatives", "negative_docs"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
