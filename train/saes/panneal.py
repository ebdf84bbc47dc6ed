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

from collections.abc import Hashable
from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from train.collective import all_sum
from train.saes.base import LedConfig
from train.saes.kept import Codes
from train.saes.parts import relu_gain
from train.saes.penalised import RectifiedSAE, values_of
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


def size(codes: Float[Tensor, "..."], p: float, n_valid: int) -> Float[Tensor, ""]:
    """⟨Σ ((f + ε)^p − ε^p)⟩; Σ f for p = 1."""
    if p == 1:
        return all_sum(codes.sum()) / n_valid
    powers: Tensor = (codes + EPSILON) ** p - EPSILON**p
    return all_sum(powers.sum()) / n_valid


@final
class PAnneal(RectifiedSAE):
    """See the module's formula.

    Attributes:
        gain: γ.
    """

    variant = "panneal"
    Config = PAnnealConfig
    config: PAnnealConfig
    gain: Tensor

    def __init__(self, config: PAnnealConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_enc.mul_(relu_gain(d_in, config.d_sae))
        self.register_buffer("gain", torch.ones(()))

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...] | None:
        facts, changes = super().host_facts(clock), self.changes(clock)
        return None if facts is None else (*facts, changes)

    @staticmethod
    def changes(clock: Clock) -> tuple[int, int]:
        """Changes of p before or at a step, and before it."""
        return n_changes(clock.step, clock.n_steps), n_changes(clock.step - 1, clock.n_steps) if clock.step else 0

    def size(self, latents: Codes, n_valid: int, clock: Clock) -> Float[Tensor, ""]:
        """γ·⟨Σ f^p⟩ of this step, γ first set anew where p changes."""
        codes = values_of(latents)
        changes, before = self.changes(clock)
        now = size(codes, exponent(changes, self.config.p_end), n_valid)
        if changes != before:
            with torch.no_grad():
                old = size(codes, exponent(before, self.config.p_end), n_valid)
                self.gain *= torch.where(now > 0, old / now, 1.0)  # nothing active: γ stays
        return self.gain.clone() * now
