"""TopK: the k largest latents of each token (Gao et al. 2406.04093).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k largest of u per token      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference keeps the top k per token too, so L0 is at most k and no threshold is needed.
Differs from the paper: Adam's eps and the weight average (off) are the project's common recipe (spec §0.1).
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, KeptConfig, Output
from train.saes.parts import annealed_k, aux_k_loss, count_silence_, masked, pre_activations, reconstruction_loss, top_k
from train.schedule import Clock


class TopKConfig(KeptConfig):
    """Settings of `topk`."""

    k: Count = Field(32, gt=0, description="Latents kept per token.")


@final
class TopK(SAE):
    """See the module's formula."""

    variant = "topk"
    Config = TopKConfig
    config: TopKConfig

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return top_k(torch.relu(pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec)), self.config.k)

    def as_affine(self) -> AffineForm:
        return AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "topk", k=self.config.k).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        u = torch.relu(pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec))
        k = round(annealed_k(self.config.k, self.d_in, self.config.k_anneal, clock.progress))
        latents = top_k(u, min(k, self.d_sae))
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        dead = self.dead(clock)
        aux = aux_k_loss(batch.x - reconstruction, u, dead, self.W_dec, batch.valid)
        count_silence_(self.tokens_silent, masked(latents, batch.valid, batch.n_valid), batch.n_valid)
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "aux": self.config.aux_alpha * aux,
        }
        return Output(parts, latents, reconstruction, {"dead": dead.float().mean()})
