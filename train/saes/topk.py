"""TopK: the k largest latents of each token (Gao et al. 2406.04093).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k largest of u per token      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference keeps the top k per token too, so L0 is at most k and no threshold is needed.
Differs from the paper: Adam's eps and the weight average (off) are the project's common recipe (spec §0.1).
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from common.config import Count
from train.saes.base import SAE, Output, SAEConfig
from train.saes.parts import aux_k_loss, count_silence_, masked, pre_activations, reconstruction_loss, top_k
from train.schedule import Clock, dead_after


class TopKConfig(SAEConfig):
    """Settings of `topk`."""

    k: Count = Field(32, gt=0, description="Latents kept per token.")
    aux_alpha: float = Field(1 / 32, ge=0, description="Weight of AuxK, which revives dead latents; the paper's value.")

    @model_validator(mode="after")
    def _fits(self) -> TopKConfig:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        return self


@final
class TopK(SAE):
    """See the module's formula."""

    variant = "topk"
    Config = TopKConfig
    config: TopKConfig
    tokens_silent: Tensor

    def __init__(self, config: TopKConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.register_buffer("tokens_silent", torch.zeros(config.d_sae, dtype=torch.int64))

    def codes(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return top_k(torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec)), self.config.k)

    def training_pass(
        self, x: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"], n_valid: int, clock: Clock
    ) -> Output:
        u = torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))
        latents = top_k(u, self.config.k)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        dead = self.tokens_silent >= dead_after(clock.n_steps, clock.batch_tokens)
        aux = aux_k_loss(x - reconstruction, u, dead, self.W_dec, valid)
        count_silence_(self.tokens_silent, masked(latents, valid, n_valid), n_valid)
        parts = {
            "reconstruction": reconstruction_loss(x, reconstruction, valid, n_valid),
            "aux": self.config.aux_alpha * aux,
        }
        return Output(parts, latents, reconstruction, {"dead": dead.float().mean()})
