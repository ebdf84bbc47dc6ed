"""Gated SAE: one decision which latents are active, another how much (Rajamanoharan et al. 2404.16014).

    π = (x − b_dec) W_enc      u = π + b_enc      m = ReLU(e^r ⊙ π + b_mag)
    f = 1[u > 0] ⊙ m           x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + λ·c(t)·⟨Σ ReLU(u)⟩ + ⟨‖x − (ReLU(u)·sg(W_dec) + sg(b_dec))‖²⟩

The gate's bias is `b_enc`. The step 1[u > 0] has no gradient: the gate learns from the penalty and from the last
term, a reconstruction by the gate through a frozen decoder; magnitudes are not shrunk, as the penalty does not see
them. W_enc starts at W_decᵀ times 2d/d_sae where that is below 1, since half of all latents are active then. Rows of
W_dec have unit norm, r, b_enc and b_mag start at 0, all as in the paper, except Adam's β1: .9, not 0. L0
is that of f. With `target_l0` a controller moves λ, and at the end b_enc is shifted by one number so that L0 is the
target on training tokens (`sparsity`).

What public implementations do: dictionary_learning has the formula above, without a warm-up of λ (`gdm`); SAELens
does not freeze the decoder in the last term and multiplies the penalty by decoder norms.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from train.collective import all_sum
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import Batches, LedConfig, Output
from train.saes.kept import Codes, Kept, at, product, taken
from train.saes.parts import masked, pre_activations, reconstruction_loss, relu_gain, threshold_for
from train.saes.penalised import PenalisedSAE, few_above, values_of
from train.saes.places import Places
from train.schedule import Clock


class GatedConfig(LedConfig):
    """Settings of `gated`."""

    l1: float = Field(0.04, ge=0, description="λ, at unit mean squared input norm; the usual grid is .012 to .08.")


@final
class Gated(PenalisedSAE):
    """See the module's formula."""

    variant = "gated"
    Config = GatedConfig
    config: GatedConfig

    def __init__(self, config: GatedConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_enc.mul_(relu_gain(d_in, config.d_sae))
        self.r = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def gate_and_magnitude(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T L"], Float[Tensor, "B T L"]]:
        """u and m."""
        shared = pre_activations(x, self.W_enc, torch.zeros_like(self.b_enc), self.b_dec)
        return shared + self.b_enc, torch.relu(torch.exp(self.r) * shared + self.b_mag)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        gate, magnitude = self.gate_and_magnitude(batch.x)
        return magnitude * (gate > 0)

    def as_affine(self) -> AffineForm:
        form = AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "gated", r_mag=self.r, b_mag=self.b_mag)
        return form.raw(self.scale)

    def active(self, batch: Batch) -> tuple[Codes, Codes]:
        """f and ReLU(u) of a step: at open gates alone where they are few."""
        if self.sparse:
            with torch.no_grad():
                W_enc = self.W_enc.detach()  # else older autocast keeps a copy without gradient, for the whole step
                shared = pre_activations(batch.x, W_enc, torch.zeros_like(self.b_enc), self.b_dec)
            places = few_above(shared + self.b_enc, 0.0, batch.valid, batch.n_valid)
            if places is not None:
                return self._at_open_gates(batch.x, shared, places)
        gate, magnitude = self.gate_and_magnitude(batch.x)
        latents = masked(magnitude * (gate > 0), batch.valid, batch.n_valid)
        return latents, masked(torch.relu(gate), batch.valid, batch.n_valid)

    def _at_open_gates(
        self, x: Float[Tensor, "B T D"], shared: Float[Tensor, "B T L"], places: Places
    ) -> tuple[Kept, Kept]:
        centred = (x - self.b_dec).detach().flatten(0, 1)
        kept = taken(shared.flatten(0, 1), centred, self.W_enc, None, self.b_dec, [places])
        magnitude = torch.relu(torch.exp(at(self.r, places)) * kept + at(self.b_mag, places))
        shape = (x.shape[0], x.shape[1], self.d_sae)
        return Kept(magnitude, places, shape), Kept(torch.relu(kept + at(self.b_enc, places)), places, shape)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        latents, opened = self.active(batch)
        reconstruction = product(latents, self.W_dec) + self.b_dec
        by_gate = product(opened, self.W_dec.detach()) + self.b_dec.detach()
        size = all_sum(values_of(opened).sum()) / batch.n_valid
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "sparsity": self.controller.penalty(size, clock),
            "gate": reconstruction_loss(batch.x, by_gate, batch.valid, batch.n_valid),
        }
        return self.output(parts, latents, reconstruction, batch, clock)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        """Shift the gate's bias to the target L0, the magnitudes left as they are."""
        settled = {"l1_weight": float(self.controller.weight)}
        if self.config.target_l0 is None:
            return settled
        theta = threshold_for((self.scores(b)[b.valid] for b in batches()), self.config.target_l0)
        if not math.isfinite(theta):  # fewer latents have a magnitude than are wanted: no gate can open them
            theta = 0.0
        self.b_enc -= theta
        return settled | {"threshold": theta}

    def scores(self, batch: Batch) -> Float[Tensor, "B T L"]:
        """What an open gate needs above 0: u, −inf where the magnitude is 0 anyway."""
        gate, magnitude = self.gate_and_magnitude(batch.x)
        return torch.where(magnitude > 0, gate, -torch.inf)

    def fold_extra(self, scale: Tensor) -> None:
        self.b_mag.div_(scale)
