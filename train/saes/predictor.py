"""BatchTopK beside a low-rank linear predictor from past codes: the control that a temporal variant has to beat.

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k·N largest of u over the batch
    x̂_t = f_t W_dec + b_dec + Σ_{j=1…lags} (a_j ⊙ f_{t−j} P) Q          over places of the same document, valid ones
    L = ⟨‖x − x̂‖²⟩ + α·AuxK

P [d_sae, rank], Q [rank, d], one weight a_j per lag and rank. Q starts at 0, so the predictor starts as batchtopk.
Codes alone decide x̂, and it is linear in them; they are told only what the past does not say (spec §6, §11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import KeptConfig
from train.saes.idle import Idle
from train.saes.kept import Codes, product
from train.saes.linear import BatchLinearSAE
from train.saes.parts import reconstruction_loss
from train.saes.past import lagged
from train.schedule import Clock

OWN_DRAWS = 1_000_003  # added to the seed: the predictor's numbers are apart from the shared weights'


class PredictorConfig(KeptConfig):
    """Settings of `predictor`."""

    window: Count = Field(128, gt=1, description="Tokens of a training window; shorter where the store's context is.")
    rank: Count = Field(32, ge=0, description="Rank of the predictor; 0: none, which is batchtopk.")
    lags: Count = Field(16, gt=0, description="Past places it reads.")

    def idle(self) -> Iterator[Idle]:
        yield Idle(self.rank == 0, "rank = 0", "lags")


@final
class Predictor(BatchLinearSAE):
    """See the module's formula."""

    variant = "predictor"
    sees_past = True
    Config = PredictorConfig
    config: PredictorConfig
    plain = {"rank": 0}

    def __init__(self, config: PredictorConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        if config.rank:
            generator = torch.Generator().manual_seed(seed + OWN_DRAWS)
            start = torch.randn(config.d_sae, config.rank, generator=generator) / config.rank**0.5
            self.W_past = nn.Parameter(start)
            self.W_out = nn.Parameter(torch.zeros(config.rank, d_in))
            falling = 1 / torch.arange(1, config.lags + 1)
            self.lag_weights = nn.Parameter(falling[:, None].repeat(1, config.rank))

    def as_affine(self) -> AffineForm:
        lost = "what the decoder reads from past codes" if self.config.rank else ""
        return dataclasses.replace(super().as_affine(), lost=lost)

    def host_facts(self, clock: Clock) -> None:
        """None: each step looks at its documents."""

    def from_past(self, latents: Codes, batch: Batch) -> Float[Tensor, "B T D"]:
        """What the past codes say of x."""
        if not self.config.rank:
            return self.b_dec.new_zeros(*latents.shape[:-1], self.d_in)
        return (lagged(product(latents, self.W_past), self.lag_weights, batch) @ self.W_out).float()

    def reconstruct(self, latents: Float[Tensor, "B T L"], batch: Batch) -> Float[Tensor, "B T D"]:
        return product(latents, self.W_dec) + self.b_dec + self.from_past(latents, batch)

    def rebuild(self, latents: Codes, batch: Batch) -> tuple[Tensor, Float[Tensor, "B T D"], dict[str, Tensor]]:
        direct = product(latents, self.W_dec) + self.b_dec
        reconstruction = direct + self.from_past(latents, batch)
        without = reconstruction_loss(batch.x, direct.detach(), batch.valid, batch.n_valid)
        loss = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
        return loss, reconstruction, {"error_without_past": without}
