"""What variants with a penalty on their codes share: their steps with the codes above 0 alone.

How many there are is up to the weights, half of all at first. So each step looks: up to `MOST` of all codes it takes
those alone, and computes all of them otherwise. Both ways agree up to the order of additions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.collective import all_sum
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, LedConfig, Output
from train.saes.kept import MOST, Codes, Kept, product, taken
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss, threshold_for
from train.saes.places import Places, places_of
from train.saes.sparsity import L0Controller
from train.schedule import Clock


@torch.no_grad()
def few_above(
    u: Float[Tensor, "B T L"], least: Tensor | float, valid: Bool[Tensor, "B T"], n_valid: int
) -> Places | None:
    """Where u is above `least` at valid positions (NaN is, so that the loss shows it); None where that is often."""
    above = masked(~(u <= least), valid, n_valid)
    if int(torch.count_nonzero(above)) > MOST * u.numel():  # counted first: a list of half of all codes is dear
        return None
    return places_of(above.flatten().nonzero().squeeze(-1), u.flatten(0, 1))


def values_of(codes: Codes) -> Tensor:
    """The codes, without their places."""
    return codes.values if isinstance(codes, Kept) else codes


class PenalisedSAE(SAE):
    """A penalty whose weight a controller may lead to an L0.

    Attributes:
        controller: λ.
    """

    can_split = True
    config: LedConfig

    def __init__(self, config: LedConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.controller = L0Controller(config.l1, config.target_l0)

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...] | None:
        return None if self.sparse else self.controller.host_facts(clock)  # sparse steps count codes, and wait

    def output(
        self,
        parts: dict[str, Float[Tensor, ""]],
        latents: Codes,
        reconstruction: Float[Tensor, "B T D"],
        batch: Batch,
        clock: Clock,
    ) -> Output:
        """What a pass gives, with silence counted and the controller moved by its L0."""
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        self.controller.follow_(all_sum((values_of(latents) > 0).sum()) / batch.n_valid, clock)
        dead = self.dead(clock).float().mean()
        return Output(parts, latents, reconstruction, {"dead": dead, "l1_weight": self.controller.weight.clone()})


class RectifiedSAE(PenalisedSAE):
    """f = ReLU((x − b_dec) W_enc + b_enc), and a penalty on f."""

    @abstractmethod
    def size(self, latents: Codes, n_valid: int, clock: Clock) -> Float[Tensor, ""]:
        """What is penalised, per valid token."""

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return pre_activations(x, self.W_enc, self.b_enc, self.b_dec)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.relu(self.pre_activations(batch.x))

    def as_affine(self) -> AffineForm:
        return AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "relu").raw(self.scale)

    def active(self, batch: Batch) -> Codes:
        """The codes of a step, those above 0 alone where they are few."""
        u = self.pre_activations(batch.x)
        places = few_above(u, 0.0, batch.valid, batch.n_valid) if self.sparse else None
        if places is None:
            return masked(torch.relu(u), batch.valid, batch.n_valid)
        centred = (batch.x - self.b_dec).detach().flatten(0, 1)
        values = taken(u.detach().flatten(0, 1), centred, self.W_enc, self.b_enc, self.b_dec, [places])
        return Kept(values, places, (u.shape[0], u.shape[1], u.shape[2]))

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        latents = self.active(batch)
        reconstruction = product(latents, self.W_dec) + self.b_dec
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "sparsity": self.controller.penalty(self.size(latents, batch.n_valid, clock), clock),
        }
        return self.output(parts, latents, reconstruction, batch, clock)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        """Shift b_enc to the target L0 on training tokens, if there is one."""
        settled = {"l1_weight": float(self.controller.weight)}
        if self.config.target_l0 is None:
            return settled
        theta = threshold_for((self.pre_activations(b.x)[b.valid] for b in batches()), self.config.target_l0)
        self.b_enc -= theta
        return settled | {"threshold": theta}
