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
from train.saes.base import Batches, LedConfig
from train.saes.kept import Codes, Kept
from train.saes.penalised import RectifiedSAE
from train.schedule import Clock

START_NORM = 0.1


class StandardConfig(LedConfig):
    """Settings of `standard`."""

    l1: float = Field(0.03, ge=0, description="λ, at unit mean squared input norm; the usual grid is .012 to .06.")


@final
class Standard(RectifiedSAE):
    """See the module's formula."""

    variant = "standard"
    Config = StandardConfig
    unit_rows = ()
    config: StandardConfig

    def __init__(self, config: StandardConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_dec.mul_(START_NORM)
            self.W_enc.mul_(START_NORM)

    def size(self, latents: Codes, n_valid: int, clock: Clock) -> Float[Tensor, ""]:
        norms = self.W_dec.norm(dim=-1)
        if isinstance(latents, Kept):
            return all_sum(latents.times(norms[:, None]).sum()) / n_valid
        return all_sum((latents.sum((0, 1)) * norms).sum()) / n_valid  # no product: it stays float32

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        """Fold the row norms into the encoder: unit rows, the same reconstruction. Then shift to the target, if any."""
        norms = self.W_dec.norm(dim=-1).clamp_min(1e-12)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        return super().calibrate(batches)
