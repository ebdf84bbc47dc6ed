"""Standard ReLU + L1 in its April 2024 form (Conerly et al., Transformer Circuits): the penalty sees decoder norms.

    f = ReLU((x − b_dec) W_enc + b_enc)      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + λ·c(t)·⟨Σ_i f_i ‖d_i‖⟩          c(t): 0 → 1 over the first tenth

Decoder rows are free in training (start norm 0.1, encoder their transpose) and folded to unit norm at the end, so
latents mean what they mean elsewhere. Differs from the post: b_dec is subtracted from the input, as in all variants.
With `target_l0` a controller moves λ, and at the end b_enc is shifted by one number so that L0 is the target on
training tokens; see `sparsity`.

What public implementations do: SAELens weighs the penalty by decoder norms as here; dictionary_learning has this form
as its April update trainer, which does not subtract b_dec, beside an older one with unit rows.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from train.collective import all_sum
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, LedConfig, Output
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss, threshold_for
from train.saes.sparsity import L0Controller
from train.schedule import Clock

START_NORM = 0.1


class StandardConfig(LedConfig):
    """Settings of `standard`."""

    l1: float = Field(0.03, ge=0, description="λ, at unit mean squared input norm; the usual grid is .012 to .06.")


@final
class Standard(SAE):
    """See the module's formula."""

    variant = "standard"
    can_split = True
    Config = StandardConfig
    unit_rows = ()
    config: StandardConfig

    def __init__(self, config: StandardConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_dec.mul_(START_NORM)
            self.W_enc.mul_(START_NORM)
        self.controller = L0Controller(config.l1, config.target_l0)

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return pre_activations(x, self.W_enc, self.b_enc, self.b_dec)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.relu(self.pre_activations(batch.x))

    def as_affine(self) -> AffineForm:
        return AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "relu").raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        latents = masked(self.codes(batch), batch.valid, batch.n_valid)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        sizes = (latents.sum((0, 1)) * self.W_dec.norm(dim=-1)).sum()  # no product: it stays float32
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "sparsity": self.controller.penalty(all_sum(sizes) / batch.n_valid, clock),
        }
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        self.controller.follow_(all_sum((latents > 0).sum()) / batch.n_valid, clock)
        dead = self.dead(clock).float().mean()
        return Output(parts, latents, reconstruction, {"dead": dead, "l1_weight": self.controller.weight.clone()})

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        """Fold the row norms into the encoder: unit rows, the same reconstruction. Then shift to the target, if any."""
        norms = self.W_dec.norm(dim=-1).clamp_min(1e-12)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        settled = {"l1_weight": float(self.controller.weight)}
        if self.config.target_l0 is None:
            return settled
        theta = threshold_for((self.pre_activations(b.x)[b.valid] for b in batches()), self.config.target_l0)
        self.b_enc -= theta
        return settled | {"threshold": theta}
