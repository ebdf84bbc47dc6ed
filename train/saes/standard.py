"""Standard ReLU + L1 in its April 2024 form (Conerly et al., Transformer Circuits): the penalty sees decoder norms.

    f = ReLU((x − b_dec) W_enc + b_enc)      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + λ·c(t)·⟨Σ_i f_i ‖d_i‖⟩          c(t): 0 → 1 over the first tenth

Decoder rows are free in training (start norm 0.1, encoder their transpose) and folded to unit norm at the end, so
latents mean what they mean elsewhere. Differs from the post: b_dec is subtracted from the input, as in all variants.
With `target_l0` a controller moves λ: λ ← λ·exp(η·clip(L0/L0* − 1, −1, 1)), after the warm-up, within [λ₀/30, 30 λ₀];
η = 1e-3, more in runs under 10,000 steps so that it can cross its range (spec §0.8).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from train.saes.base import SAE, Output, SAEConfig
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss, update_average_
from train.schedule import Clock, averaging, dead_after, ramp

START_NORM = 0.1
WARMUP = 0.1
RANGE = 30.0


class StandardConfig(SAEConfig):
    """Settings of `standard`."""

    l1: float = Field(0.03, ge=0, description="λ, at unit mean squared input norm; the usual grid is .012 to .06.")
    target_l0: float | None = Field(None, gt=0, description="Move λ towards this L0; default: λ stays.")


@final
class Standard(SAE):
    """See the module's formula.

    Attributes:
        l1_weight: λ as the controller has left it.
        l0_average: running average of L0.
    """

    variant = "standard"
    Config = StandardConfig
    unit_rows = False
    config: StandardConfig
    tokens_silent: Tensor
    l1_weight: Tensor
    l0_average: Tensor

    def __init__(self, config: StandardConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_dec.mul_(START_NORM)
            self.W_enc.mul_(START_NORM)
        self.register_buffer("tokens_silent", torch.zeros(config.d_sae, dtype=torch.int64))
        self.register_buffer("l1_weight", torch.tensor(config.l1))
        self.register_buffer("l0_average", torch.zeros(()))

    def codes(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))

    def training_pass(
        self, x: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"], n_valid: int, clock: Clock
    ) -> Output:
        latents = masked(self.codes(x), valid, n_valid)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        sizes = (latents.sum((0, 1)) * self.W_dec.norm(dim=-1)).sum() / n_valid  # no product: it stays float32
        parts = {
            "reconstruction": reconstruction_loss(x, reconstruction, valid, n_valid),
            "sparsity": self.l1_weight.clone() * ramp(clock, WARMUP) * sizes,
        }
        count_silence_(self.tokens_silent, latents, n_valid)
        self._control(latents, n_valid, clock)
        dead = self.tokens_silent >= dead_after(clock.n_steps, clock.batch_tokens)
        return Output(
            parts, latents, reconstruction, {"dead": dead.float().mean(), "l1_weight": self.l1_weight.clone()}
        )

    @torch.no_grad()
    def _control(self, latents: Float[Tensor, "B T L"], n_valid: int, clock: Clock) -> None:
        l0 = (latents > 0).sum() / n_valid
        update_average_(self.l0_average, l0, averaging(clock.n_steps), clock.step == 0)
        if self.config.target_l0 is None or clock.progress < WARMUP:
            return
        rate = max(1e-3, 10 / clock.n_steps)
        error = (self.l0_average / self.config.target_l0 - 1).clamp(-1, 1)
        self.l1_weight *= torch.exp(rate * error)
        self.l1_weight.clamp_(self.config.l1 / RANGE, self.config.l1 * RANGE)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "B T D"]]) -> dict[str, float]:
        """Fold the row norms into the encoder: unit rows, the same reconstruction."""
        norms = self.W_dec.norm(dim=-1).clamp_min(1e-12)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        return {"l1_weight": float(self.l1_weight)}
