"""BatchTopK: k latents per token on average, chosen over the whole batch (Bussmann et al. 2412.06410).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k·N largest of u over the batch's N valid tokens
    x̂ = f W_dec + b_dec                      L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference is independent of the batch: f = u·1[u > θ]; how θ is found is told in `sparsity`.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, KeptConfig, Output
from train.saes.parts import aux_k_loss, count_silence_, masked, pre_activations, reconstruction_loss
from train.saes.sparsity import Sparsity
from train.schedule import Clock


class BatchTopKConfig(KeptConfig):
    """Settings of `batchtopk`."""


@final
class BatchTopK(SAE):
    """See the module's formula."""

    variant = "batchtopk"
    Config = BatchTopKConfig
    config: BatchTopKConfig
    plain = {}

    def __init__(self, config: BatchTopKConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.sparsity = Sparsity([config.d_sae], config.k, d_in, k_anneal=config.k_anneal)

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return self.sparsity.active(self.pre_activations(batch.x), 0, batch.n_valid, None)

    def as_affine(self) -> AffineForm:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent()).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        u = masked(self.pre_activations(batch.x), batch.valid, batch.n_valid)
        latents = self.sparsity.active(u, 0, batch.n_valid, clock)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        dead = self.dead(clock)
        aux = aux_k_loss(batch.x - reconstruction, u, dead, self.W_dec, batch.valid)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "aux": self.config.aux_alpha * aux,
        }
        return Output(parts, latents, reconstruction, {"dead": dead.float().mean()} | self.sparsity.logged())

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        return self.sparsity.calibrate(lambda: ([self.pre_activations(b.x)[b.valid]] for b in batches()))

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
