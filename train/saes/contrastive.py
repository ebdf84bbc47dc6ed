"""Temporal contrastive SAE: a high group of latents that tokens near each other share (spec §7).

    u = ReLU((x − b_dec) W_enc + b_enc)      context-free; high = the first fifth of the latents
    f = BatchTopK of u, high and low with budgets of their own
    x̂ = f W_dec + b_dec                      x̂_high = f_high W_dec,high + b_dec
    z = f_high·m / ‖f_high·m‖                m = 0 for features active on more than a tenth of the tokens
    ℓ_w = −⟨log[e^{z_t·z_s/τ} / (e^{z_t·z_s/τ} + Σ_n e^{z_t·z_n/τ})]⟩      s uniform in {t−w, …, t−1}, same document
    L = .8⟨‖x − x̂‖²⟩ + .2⟨‖x − x̂_high‖²⟩ + α·AuxK + λ_c·c(t)·mean_w ℓ_w / log(1 + N_neg)

Negatives n are tokens of other documents: the drawn tokens of this batch, and those of earlier steps, held in a
circular buffer with their document ids. c(t) rises from the step at which the buffer is full.

Options: keys of a slowly following encoder (`key_momentum`), z less its mean, ⟨max(0, cos(x_t, x_s))·‖f_t − f_s‖₁⟩ in
the place of ℓ, a penalty λ_π·Σ_i max(0, π_i − cap)² of densities π, and a b_dec that stays from some step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output
from train.saes.contrast import density_excess
from train.saes.grouped import aux_k_kept, choose_by_group, chooses_places, note_by_group, only_some, part_of
from train.saes.idle import Idle
from train.saes.kept import Codes, Kept, encode_kept, product
from train.saes.parts import (
    count_silence_,
    masked,
    pre_activations,
    reconstruction_loss,
    side_by_side,
)
from train.saes.sparsity import Mode, Sparsity, check_led
from train.saes.temporal_contrast import ContrastConfig, TemporalContrast
from train.schedule import Clock


class ContrastiveConfig(ContrastConfig):
    """Settings of `contrastive`: those of its loss besides."""

    window: Count = Field(128, gt=1, description="Tokens of a training window; positives lie inside it.")
    high_share: float = Field(0.2, gt=0, lt=1, description="Share of the latents in the high group.")
    k_high: Count | None = Field(
        None, gt=0, description="Latents kept in the high group per token; default max(4, k / 5), or k / 2 if less."
    )
    sparsity: Mode = Field(
        "budgets", description="`joint` lets both groups compete for k (the high one then takes nearly all); `l1`."
    )
    l1: float = Field(0.03, ge=0, description="λ of the L1 penalty at the start, for `sparsity = l1`.")
    high_weight: float = Field(
        0.2, ge=0, le=1, description="Weight of the high group's own reconstruction; the full one has the rest."
    )
    density_penalty: float = Field(
        0.0, ge=0, description="Weight of Σ max(0, π_i − density_cap)² over the high group's densities; 1 is strong."
    )
    density_cap: float = Field(0.1, gt=0, le=1, description="Share of tokens above which that penalty begins.")
    freeze_b_dec: float = Field(
        1.0, ge=0, le=1, description="Share of the run after which b_dec stays; it may drift to cancel dense features."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ContrastiveConfig:
        check_led("l1", self.l1, self.sparsity == "l1")
        if self.k_high is not None and self.k_high >= self.k:
            raise ValueError(f"k_high = {self.k_high} leaves nothing of k = {self.k} for the low group")
        if not 0 < self.n_high < self.d_sae:
            raise ValueError(f"high_share = {self.high_share} of d_sae = {self.d_sae} leaves an empty group")
        return self

    def idle(self) -> Iterator[Idle]:
        yield Idle(self.sparsity != "l1", f"sparsity = {self.sparsity}", "l1")
        yield Idle(self.sparsity == "l1", "sparsity = l1", "k_anneal")
        yield Idle(self.sparsity != "budgets", f"sparsity = {self.sparsity}", "k_high")
        yield Idle(self.density_penalty == 0, "density_penalty = 0", "density_cap")
        yield Idle(self.lambda_c == 0, "lambda_c = 0", "key_momentum")
        yield Idle(self.positives == "adjacent", "positives = adjacent", "contrast_windows")
        yield Idle(self.loss == "difference", "loss = difference", "tau", "same_document", "scale_free")

    @property
    def n_high(self) -> int:
        """Latents of the high group."""
        return int(self.high_share * self.d_sae)

    def shares(self) -> tuple[float, float]:
        """What the two groups have of k."""
        high = self.k_high if self.k_high is not None else min(max(4, self.k / 5), self.k / 2)
        return high / self.k, 1 - high / self.k


@dataclass(frozen=True)
class Coded:
    """What a training step is made from.

    Attributes:
        latents: [batch, window, latents], all or the kept ones.
        high: [batch, window, high group], all of them.
        compared: what the contrastive loss compares: those, or their rectified pre-activations where a head follows.
        aux_k: AuxK's loss from the residual.
        penalty: the loss part of an L1 penalty, if there is one.
    """

    latents: Codes
    high: Float[Tensor, "B T H"]
    compared: Float[Tensor, "B T H"]
    aux_k: Callable[[Tensor], Tensor]
    penalty: Mapping[str, Tensor] = field(default_factory=dict)


@final
class Contrastive(SAE):
    """See the module's formula."""

    variant = "contrastive"
    Config = ContrastiveConfig
    config: ContrastiveConfig
    plain = {"lambda_c": 0.0, "high_weight": 0.0, "sparsity": "joint"}

    def __init__(self, config: ContrastiveConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.n_high = config.n_high
        self.sizes = (config.n_high, config.d_sae - config.n_high)
        self.sparsity = Sparsity(
            self.sizes, config.k, d_in, config.sparsity, shares=config.shares(), k_anneal=config.k_anneal, l1=config.l1,
            names=("high", "low"),
        )  # fmt: skip
        self.contrast = TemporalContrast(config, self.n_high, self.high_encoder(), seed)

    def groups(self) -> dict[str, slice]:
        return dict(zip(("high", "low"), side_by_side(self.sizes), strict=True))

    def high_encoder(self) -> dict[str, Tensor]:
        """What encodes the high group."""
        return {"W_enc": self.W_enc[:, : self.n_high], "b_enc": self.b_enc[: self.n_high], "b_dec": self.b_dec}

    def start(self, scale: float, b_dec: Tensor) -> None:
        super().start(scale, b_dec)
        if self.contrast.slow is not None:
            self.contrast.slow.follow_(self.high_encoder(), rate=1.0)

    def pre_activations(self, x: Float[Tensor, "B T D"], b_dec: Tensor | None = None) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec if b_dec is None else b_dec))

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        groups = self.pre_activations(batch.x).split(self.sizes, dim=-1)
        return torch.cat([self.sparsity.active(u, g, batch.n_valid, None) for g, u in enumerate(groups)], dim=-1)

    def as_affine(self) -> AffineForm:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent()).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        config = self.config
        b_dec = self.b_dec if clock.progress < config.freeze_b_dec else self.b_dec.detach()
        dead = self.dead(clock)
        coded = (self.coded_sparse if self.keeps_few else self.coded_plain)(batch, b_dec, dead, clock)
        reconstruction, alone = self.rebuild(coded, b_dec)
        aux = coded.aux_k(batch.x - reconstruction)
        count_silence_(self.tokens_silent, coded.latents, batch.n_valid)
        full = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
        parts = {"reconstruction": (1 - config.high_weight) * full, "aux": config.aux_alpha * aux}
        if alone is not None:
            loss = reconstruction_loss(batch.x, alone, batch.valid, batch.n_valid)
            parts["reconstruction_high"] = config.high_weight * loss
        parts |= coded.penalty
        extra = {"dead": dead.float().mean(), "b_dec_offset": self.b_dec_offset(batch)} | self.sparsity.logged()
        if config.lambda_c > 0:
            loss, told = self.contrast(coded.compared, batch, clock, self.sparsity.threshold[0], self.sparse)
            parts["contrastive"] = self.contrast.weight(clock) * loss
            extra |= told
            self.contrast.follow_density_(coded.high, batch.n_valid, clock)
        if config.density_penalty > 0:
            parts["density"] = config.density_penalty * density_excess(coded.high, batch.n_valid, config.density_cap)
        return Output(parts, coded.latents, reconstruction, extra)

    @property
    def keeps_few(self) -> bool:
        """Whether a step does with the kept codes alone from selection on: a head would need all of u."""
        return self.sparse and chooses_places(self.sparsity) and self.config.head == "none"

    def coded_plain(self, batch: Batch, b_dec: Tensor, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
        u = masked(self.pre_activations(batch.x, b_dec), batch.valid, batch.n_valid)
        groups = u.split(self.sizes, dim=-1)
        first = [self.sparsity.active(part, g, batch.n_valid, clock) for g, part in enumerate(groups)]
        codes = self.sparsity.settle(groups, first, batch.n_valid, clock)
        compared = codes[0] if self.config.head == "none" else groups[0]
        penalty = self.sparsity.penalty(codes, batch.n_valid, clock)
        latents = torch.cat(codes, dim=-1)
        return Coded(latents, codes[0], compared, lambda r: self.aux_k(r, u, dead, batch.valid), penalty)

    def coded_sparse(self, batch: Batch, b_dec: Tensor, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
        choose = choose_by_group(self.sparsity, batch.n_valid, clock)
        latents, of_dead = encode_kept(
            batch.x, self.W_enc, self.b_enc, b_dec, only_some(batch), choose, self.maybe(dead), self.may_die
        )
        note_by_group(self.sparsity, latents, clock)
        high = part_of(latents, slice(0, self.n_high)).dense()
        return Coded(latents, high, high, lambda r: aux_k_kept(r, of_dead, dead, self.W_dec, batch.valid))

    def rebuild(self, coded: Coded, b_dec: Tensor) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"] | None]:
        """x̂, and x̂_high if it has a weight."""
        if self.config.high_weight == 0:
            return product(coded.latents, self.W_dec, self.sparse) + b_dec, None
        if isinstance(coded.latents, Kept):  # both from one product
            high, low = coded.latents.times_by_block(self.W_dec, list(self.sizes)).unbind(2)
            return high + low + b_dec, high + b_dec
        full = self.written(coded.latents, self.W_dec) + b_dec
        return full, self.written(coded.high, self.W_dec[: self.n_high]) + b_dec

    @torch.no_grad()
    def b_dec_offset(self, batch: Batch) -> Float[Tensor, ""]:
        """‖b_dec − ⟨x⟩‖ over the batch: well above its usual .2, b_dec cancels something dense."""
        mean = masked(batch.x, batch.valid, batch.n_valid).sum((0, 1)) / batch.n_valid
        return (self.b_dec - mean).square().sum().sqrt()

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.contrast.after_step_(clock, self.high_encoder())

    # ---- after training ------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        return self.sparsity.calibrate(
            lambda: (self.pre_activations(b.x)[b.valid].split(self.sizes, dim=-1) for b in batches())
        )

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
        self.contrast.end()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Files of before the loss was a module of its own have its tensors beside the weights."""
        for name in ("density", "head", "negatives", "negative_docs"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}contrast.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)
