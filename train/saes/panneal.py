"""P-anneal: a penalty that turns from L1 towards L0 as training goes on (Karvonen et al. 2408.00113).

    f = ReLU((x − b_dec) W_enc + b_enc)      x̂ = f W_dec + b_dec      rows of W_dec have unit norm
    L = ⟨‖x − x̂‖²⟩ + λ·c(t)·γ·⟨Σ_i ((f_i + ε)^p − ε^p)⟩          c(t): 0 → 1 over the first tenth
    p: 1 until a fifth of the run, then down to `p_end` in 10 equal changes, the last one at four fifths

γ is 1 at first. At each change of p it is multiplied by ⟨Σ f^p_old⟩ / ⟨Σ f^p_new⟩ of that batch, so that the value of
the penalty does not jump. ε = 1e-3 (1e-3 of the input's norm) bounds the slope of f^p at 0, infinite otherwise. W_enc
starts at W_decᵀ times 2d/d_sae where that is below 1. With `target_l0` a controller moves λ, and at the end b_enc is
shifted by one number so that L0 is the target (`sparsity`).

What public implementations do: dictionary_learning anneals from a fixed step to a fixed step or the end of the run,
rescales by averages over the last 10 steps, has no ε, and in its first form the reconstruction loss was the norm, not
its square.
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
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss, relu_gain, threshold_for
from train.saes.sparsity import L0Controller
from train.schedule import Clock

N_CHANGES = 10
FROM, TO = (
    0.2,
    0.8,
)  # shares of the run between which p changes; the published 10,000 of 50,000 steps, and before the decay
EPSILON = 1e-3


class PAnnealConfig(LedConfig):
    """Settings of `panneal`."""

    l1: float = Field(0.02, ge=0, description="λ, at unit mean squared input norm; the usual grid is .006 to .025.")
    p_end: float = Field(0.2, gt=0, le=1, description="The last exponent; as published. 1 keeps L1 throughout.")


def n_changes(step: int, n_steps: int) -> int:
    """Changes of p before or at a step, 0 to 10."""
    share = (step / n_steps - FROM) / (TO - FROM)
    return min(max(int(share * (N_CHANGES - 1) + 1 + 1e-9), 0), N_CHANGES) if share >= 0 else 0


def exponent(changes: int, p_end: float) -> float:
    """p after so many changes."""
    return 1 - (1 - p_end) * changes / N_CHANGES


def size(latents: Float[Tensor, "B T L"], p: float, n_valid: int) -> Float[Tensor, ""]:
    """⟨Σ ((f + ε)^p − ε^p)⟩; Σ f for p = 1."""
    if p == 1:
        return all_sum(latents.sum()) / n_valid
    powers: Tensor = (latents + EPSILON) ** p - EPSILON**p
    return all_sum(powers.sum()) / n_valid


@final
class PAnneal(SAE):
    """See the module's formula.

    Attributes:
        gain: γ.
    """

    variant = "panneal"
    can_split = True
    Config = PAnnealConfig
    config: PAnnealConfig
    gain: Tensor

    def __init__(self, config: PAnnealConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_enc.mul_(relu_gain(d_in, config.d_sae))
        self.register_buffer("gain", torch.ones(()))
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
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "sparsity": self.controller.penalty(self.penalty(latents, batch.n_valid, clock), clock),
        }
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        self.controller.follow_(all_sum((latents > 0).sum()) / batch.n_valid, clock)
        dead = self.dead(clock).float().mean()
        return Output(parts, latents, reconstruction, {"dead": dead, "l1_weight": self.controller.weight.clone()})

    def penalty(self, latents: Float[Tensor, "B T L"], n_valid: int, clock: Clock) -> Float[Tensor, ""]:
        """γ·⟨Σ f^p⟩ of this step, γ first set anew where p changes."""
        changes = n_changes(clock.step, clock.n_steps)
        before = n_changes(clock.step - 1, clock.n_steps) if clock.step else 0
        now = size(latents, exponent(changes, self.config.p_end), n_valid)
        if changes != before:
            with torch.no_grad():
                old = size(latents, exponent(before, self.config.p_end), n_valid)
                self.gain *= torch.where(now > 0, old / now, 1.0)  # nothing active: γ stays
        return self.gain.clone() * now

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        settled = {"l1_weight": float(self.controller.weight)}
        if self.config.target_l0 is None:
            return settled
        theta = threshold_for((self.pre_activations(b.x)[b.valid] for b in batches()), self.config.target_l0)
        self.b_enc -= theta
        return settled | {"threshold": theta}
