"""Temporal contrastive SAE: a high group of latents that tokens near each other share (spec §7).

    u = ReLU((x − b_dec) W_enc + b_enc)      context-free; high = the first fifth of the latents
    f = BatchTopK of u, high and low with budgets of their own
    x̂ = f W_dec + b_dec                      x̂_high = f_high W_dec,high + b_dec
    z = f_high·m / ‖f_high·m‖                m = 0 for features active on more than a tenth of the tokens
    ℓ_w = −⟨log[e^{z_t·z_s/τ} / (e^{z_t·z_s/τ} + Σ_n e^{z_t·z_n/τ})]⟩      s uniform in {t−w, …, t−1}, same document
    L = .8⟨‖x − x̂‖²⟩ + .2⟨‖x − x̂_high‖²⟩ + α·AuxK + λ_c·c(t)·mean_w ℓ_w / log(1 + N_neg)

Negatives n are tokens of other documents: the drawn tokens of this batch, and those of earlier steps, held in a
circular buffer with their document ids. c(t) rises from the step at which the buffer is full.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, KeptConfig, Output
from train.saes.contrast import draw_one, draw_places, earlier_places, info_nce, log_sum_of_negatives
from train.saes.parts import (
    aux_k_loss,
    count_silence_,
    generator_of,
    masked,
    pre_activations,
    reconstruction_loss,
    side_by_side,
)
from train.saes.sparsity import Mode, Sparsity, check_led
from train.schedule import Clock

HEAD_WIDTH = 128
DENSITY_RATE = 0.05  # of the running average of densities


class ContrastiveConfig(KeptConfig):
    """Settings of `contrastive`."""

    window: Count = Field(128, gt=1, description="Tokens of a training window; positives lie inside it.")
    high_share: float = Field(0.2, gt=0, lt=1, description="Share of the latents in the high group.")
    k_high: Count | None = Field(
        None, gt=0, description="Latents kept in the high group per token; default max(4, k / 5), at most k / 2."
    )
    sparsity: Mode = Field(
        "budgets", description="`joint` lets both groups compete for k (the high one then takes nearly all); `l1`."
    )
    l1: float = Field(0.03, ge=0, description="λ of the L1 penalty at the start, for `sparsity = l1`.")
    high_weight: float = Field(
        0.2, ge=0, le=1, description="Weight of the high group's own reconstruction; the full one has the rest."
    )
    lambda_c: float = Field(0.1, ge=0, description="Weight of the contrastive loss; 0: none is computed.")
    ramp: float = Field(0.2, ge=0, le=1, description="Share of the run over which λ_c rises, the buffer being full.")
    contrast_windows: tuple[Count, ...] = Field(
        (8, 16, 32), min_length=1, description="How many tokens back a positive may lie; the loss is their mean."
    )
    positives: Literal["window", "adjacent", "multi", "earlier", "shuffled"] = Field(
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
    same_document: bool = Field(True, description="Tokens of the anchor's own document are no negatives.")
    density_limit: float = Field(
        0.1, gt=0, le=1, description="Features active on more tokens are left out of z, or they take it over; 1: none."
    )
    head: Literal["none", "random", "learned"] = Field(
        "none", description="z from 128 projections of the high pre-activations; a learned head may absorb the loss."
    )
    similarity: Literal["cosine", "dot"] = Field("cosine", description="`dot`: z is not normalised.")
    symmetric: bool = Field(False, description="Also tell the anchor from the negatives as seen from its positive.")
    scale_free: bool = Field(True, description="Divide by log(1 + N_neg): 1 when all embeddings are equal.")

    @model_validator(mode="after")
    def _consistent(self) -> ContrastiveConfig:
        if min(self.contrast_windows) < 1:
            raise ValueError(f"contrast_windows = {self.contrast_windows}: each must be at least 1")
        check_led("l1", self.l1, self.sparsity == "l1")
        if self.anchors > self.keys:
            raise ValueError(f"anchors = {self.anchors} are drawn from keys = {self.keys}: fewer are needed")
        if 0 < self.buffer < self.keys:
            raise ValueError(f"buffer = {self.buffer} is less than keys = {self.keys} of one step; 0 for none")
        if self.k_high is not None and self.k_high >= self.k:
            raise ValueError(f"k_high = {self.k_high} leaves nothing of k = {self.k} for the low group")
        if not 0 < self.n_high < self.d_sae:
            raise ValueError(f"high_share = {self.high_share} of d_sae = {self.d_sae} leaves an empty group")
        return self

    @property
    def n_high(self) -> int:
        """Latents of the high group."""
        return int(self.high_share * self.d_sae)

    def shares(self) -> tuple[float, float]:
        """What the two groups have of k."""
        high = self.k_high if self.k_high is not None else min(max(4, self.k / 5), self.k / 2)
        return high / self.k, 1 - high / self.k


@final
class Contrastive(SAE):
    """See the module's formula.

    Attributes:
        density: running share of tokens on which each high latent is active.
        negatives: embeddings of earlier steps [buffer, n_high or 128], gone after training; zero rows are empty.
        negative_docs: their documents.
    """

    variant = "contrastive"
    can_be_sparse = True
    Config = ContrastiveConfig
    config: ContrastiveConfig
    plain = {"lambda_c": 0.0, "high_weight": 0.0, "sparsity": "joint"}

    density: Tensor
    negatives: Tensor
    negative_docs: Tensor
    drawn: tuple[Tensor, Tensor]  # keys and documents of a step, from its loss until the step is taken

    def __init__(self, config: ContrastiveConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.seed, self.n_high = seed, config.n_high
        self.sizes = (config.n_high, config.d_sae - config.n_high)
        self.sparsity = Sparsity(
            self.sizes, config.k, d_in, config.sparsity, shares=config.shares(), k_anneal=config.k_anneal, l1=config.l1,
            names=("high", "low"),
        )  # fmt: skip
        width, kept = (self.n_high, config.buffer) if config.lambda_c > 0 else (0, 0)
        if config.head != "none":
            width = HEAD_WIDTH
            generator = generator_of(seed, -1, torch.device("cpu"))
            head = torch.randn(self.n_high, HEAD_WIDTH, generator=generator) / HEAD_WIDTH**0.5
            if config.head == "learned":
                self.head = nn.Parameter(head)
            else:
                self.register_buffer("head", head)
        self.register_buffer("density", torch.zeros(self.n_high))
        self.register_buffer("negatives", torch.zeros(kept, width))
        self.register_buffer("negative_docs", torch.zeros(kept, dtype=torch.int32))

    def groups(self) -> dict[str, slice]:
        return dict(zip(("high", "low"), side_by_side(self.sizes), strict=True))

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        groups = self.pre_activations(batch.x).split(self.sizes, dim=-1)
        return torch.cat([self.sparsity.active(u, g, batch.n_valid, None) for g, u in enumerate(groups)], dim=-1)

    def as_affine(self) -> AffineForm:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent()).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        u = masked(self.pre_activations(batch.x), batch.valid, batch.n_valid)
        groups = u.split(self.sizes, dim=-1)
        first = [self.sparsity.active(part, g, batch.n_valid, clock) for g, part in enumerate(groups)]
        codes = self.sparsity.settle(groups, first, batch.n_valid, clock)
        latents = torch.cat(codes, dim=-1)
        reconstruction = self.written(latents, self.W_dec) + self.b_dec
        dead = self.dead(clock)
        aux = aux_k_loss(batch.x - reconstruction, u, dead, self.W_dec, batch.valid)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        full = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
        parts = {"reconstruction": (1 - self.config.high_weight) * full, "aux": self.config.aux_alpha * aux}
        if self.config.high_weight > 0:
            alone = self.written(codes[0], self.W_dec[: self.n_high]) + self.b_dec
            loss = reconstruction_loss(batch.x, alone, batch.valid, batch.n_valid)
            parts["reconstruction_high"] = self.config.high_weight * loss
        parts |= self.sparsity.penalty(codes, batch.n_valid, clock)
        extra = {"dead": dead.float().mean()} | self.sparsity.logged()
        if self.config.lambda_c > 0:
            loss, told = self.contrast(codes[0] if self.config.head == "none" else groups[0], batch, clock)
            parts["contrastive"] = self.weight(clock) * loss
            extra |= told
            self.follow_density_(codes[0], batch.n_valid, clock)
        return Output(parts, latents, reconstruction, extra)

    # ---- the contrastive loss ------------------------------------------------------------------------------

    def weight(self, clock: Clock) -> float:
        """λ_c·c(t): 0 until the buffer is full, then rising."""
        begin = -(-self.config.buffer // self.config.keys)
        length = self.config.ramp * clock.n_steps
        risen = (clock.step - begin + 1) / max(length, 1.0)
        return self.config.lambda_c * min(max(risen, 0.0), 1.0)

    def contrast(
        self, high: Float[Tensor, "B T H"], batch: Batch, clock: Clock
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss without its weight, and what is worth a line."""
        generator = generator_of(self.seed, clock.step, high.device)
        places = draw_places(batch.valid, batch.n_valid, self.config.keys, generator)
        doc = batch.doc.flatten()[places]
        keys, anchors = self.embed(high, places), places[: self.config.anchors]
        z, n = keys[: len(anchors)], len(anchors)
        allowed = torch.cat([doc, self.negative_docs]) != doc[:n, None]
        if not self.config.same_document:
            allowed = torch.ones_like(allowed)
            allowed[:, : len(places)] = places != anchors[:, None]  # no token is its own negative
        live = torch.cat([keys, self.negatives]).detach().any(1)
        allowed = (allowed & live)[:, None]
        scores = self.similarity(z, keys)[:, None]
        negatives, losses = log_sum_of_negatives(scores, allowed), []
        for reach in (1,) if self.config.positives == "adjacent" else self.config.contrast_windows:
            positives, chosen = self.positives(batch, anchors, places, doc, reach, generator)
            theirs = self.embed(high, positives.flatten()).unflatten(0, positives.shape)
            chosen = chosen & live[:n, None] & (theirs != 0).any(-1)
            similarity = (z[:, None] * theirs).sum(-1) / self.config.tau
            others = allowed
            if self.config.positives == "shuffled" or not self.config.same_document:  # a positive may be among them
                others = allowed & pad(places != positives[..., None], (0, len(self.negatives)), value=True)
                negatives = log_sum_of_negatives(scores.expand_as(others), others)
            count = others.sum(-1)
            losses.append(info_nce(similarity, chosen, negatives, count, self.config.scale_free))
            if self.config.symmetric:
                back = self.similarity(theirs, keys)
                seen = log_sum_of_negatives(back, others.expand_as(back))
                losses.append(info_nce(similarity, chosen, seen, count, self.config.scale_free))
        self.drawn = keys.detach(), doc
        told = {
            "dropped_anchors": (~live[:n]).float().mean(),
            "masked_share": (self.density > self.config.density_limit).float().mean(),
        }
        return torch.stack(losses).mean(), told

    def positives(
        self,
        batch: Batch,
        anchors: Int[Tensor, " A"],
        places: Int[Tensor, " K"],
        doc: Int[Tensor, " K"],
        reach: int,
        generator: torch.Generator,
    ) -> tuple[Int[Tensor, "A P"], Bool[Tensor, "A P"]]:
        """The places of each anchor's positives within `reach`, and which of them count."""
        if self.config.positives == "shuffled":
            allowed = doc != doc[: len(anchors), None]
            chosen = draw_one(allowed, generator)
            return places[chosen], allowed.gather(1, chosen)
        reach = batch.valid.shape[1] - 1 if self.config.positives == "earlier" else reach
        before, there = earlier_places(batch, anchors, reach, self.config.distinct_tokens)
        if self.config.positives == "multi":
            return before, there
        one = draw_one(there, generator)
        return before.gather(1, one), there.gather(1, one)

    def embed(self, high: Float[Tensor, "B T H"], places: Int[Tensor, " K"]) -> Float[Tensor, "K Z"]:
        """z of some tokens; zero where no feature that counts is active."""
        z = high.flatten(0, 1)[places] * (self.density <= self.config.density_limit)
        if self.config.head != "none":
            with torch.autocast(z.device.type, enabled=False):  # cosines over τ: bfloat16 would be off by .04
                z = z @ self.head
        return normalize(z, dim=-1) if self.config.similarity == "cosine" else z

    def similarity(self, z: Float[Tensor, "*A Z"], keys: Float[Tensor, "K Z"]) -> Float[Tensor, "*A N"]:
        """z·z_n / τ with this step's keys and with the buffer."""
        scaled = z / self.config.tau
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([scaled @ keys.T, scaled @ self.negatives.T], dim=-1)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Put this step's embeddings over the oldest; their slots follow from the step, every step having as many."""
        if self.config.lambda_c > 0 and len(self.negatives):
            keys, doc = self.drawn
            slots = (clock.step * len(keys) + torch.arange(len(keys), device=keys.device)) % len(self.negatives)
            self.negatives[slots] = keys.to(self.negatives.dtype)
            self.negative_docs[slots] = doc.to(self.negative_docs.dtype)

    @torch.no_grad()
    def follow_density_(self, high: Float[Tensor, "B T H"], n_valid: int, clock: Clock) -> None:
        now = (high > 0).sum((0, 1)) / n_valid
        self.density.lerp_(now, 1.0 if clock.step == 0 else DENSITY_RATE)

    # ---- after training ------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        return self.sparsity.calibrate(
            lambda: (self.pre_activations(b.x)[b.valid].split(self.sizes, dim=-1) for b in batches())
        )

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
        self.negatives, self.negative_docs = self.negatives[:0], self.negative_docs[:0]  # only training needs them

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take the buffer in the size it has: a trained SAE has none."""
        size = len(state_dict[prefix + "negatives"]) if prefix + "negatives" in state_dict else len(self.negatives)
        if size != len(self.negatives):
            self.negatives = self.negatives.new_zeros(size, self.negatives.shape[1])
            self.negative_docs = self.negative_docs.new_zeros(size)
        super()._load_from_state_dict(state_dict, prefix, *rest)
