"""BatchTopK: k latents per token on average, chosen over the whole batch (Bussmann et al. 2412.06410).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k·N largest of u over the batch's N valid tokens
    x̂ = f W_dec + b_dec                      L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference is independent of the batch: f = u·1[u > θ]. θ is the running average of the smallest kept value, with a
window that scales with the run (spec §0.1), and is set anew on training tokens at the end, so that L0 = k on average.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from common.config import Count
from train.saes.base import SAE, Output, SAEConfig
from train.saes.parts import (
    aux_k_loss,
    batch_top_k,
    count_silence_,
    masked,
    pre_activations,
    reconstruction_loss,
    smallest_kept,
    threshold_for,
    update_average_,
)
from train.schedule import Clock, averaging, dead_after

THRESHOLD_FROM = 0.05  # share of the run before the average starts


class BatchTopKConfig(SAEConfig):
    """Settings of `batchtopk`."""

    k: Count = Field(32, gt=0, description="Latents kept per token, on average over the batch.")
    aux_alpha: float = Field(
        1 / 32, ge=0, description="Weight of AuxK, which revives dead latents; the TopK paper's value."
    )

    @model_validator(mode="after")
    def _fits(self) -> BatchTopKConfig:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        return self


@final
class BatchTopK(SAE):
    """See the module's formula.

    Attributes:
        threshold: θ, in scaled units until folded.
    """

    variant = "batchtopk"
    Config = BatchTopKConfig
    config: BatchTopKConfig
    tokens_silent: Tensor
    threshold: Tensor

    def __init__(self, config: BatchTopKConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.register_buffer("tokens_silent", torch.zeros(config.d_sae, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(()))

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))

    def codes(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        u = self.pre_activations(x)
        return u * (u > self.threshold)

    def training_pass(
        self, x: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"], n_valid: int, clock: Clock
    ) -> Output:
        u = masked(self.pre_activations(x), valid, n_valid)
        latents = batch_top_k(u, self.config.k * n_valid)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        dead = self.tokens_silent >= dead_after(clock.n_steps, clock.batch_tokens)
        aux = aux_k_loss(x - reconstruction, u, dead, self.W_dec, valid)
        count_silence_(self.tokens_silent, latents, n_valid)
        first = clock.progress <= THRESHOLD_FROM
        update_average_(self.threshold, smallest_kept(latents), averaging(clock.n_steps), first)
        parts = {
            "reconstruction": reconstruction_loss(x, reconstruction, valid, n_valid),
            "aux": self.config.aux_alpha * aux,
        }
        return Output(
            parts, latents, reconstruction, {"dead": dead.float().mean(), "threshold": self.threshold.clone()}
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "B T D"]]) -> dict[str, float]:
        before = float(self.threshold)
        after = threshold_for((self.pre_activations(x).flatten(0, 1) for x in batches), float(self.config.k))
        self.threshold.fill_(after)
        return {"threshold_average": before, "threshold": after}

    def fold_extra(self, scale: Tensor) -> None:
        self.threshold /= scale
