"""References that nothing is trained in: the mean, k principal components, the identity.

    u = ReLU((x − μ) [V_1 … V_K, −V_1 … −V_K])      x̂ = μ + Σ_i (u_i − u_{i+d}) V_i

A direction V_i is a pair of latents, one for each sign, so that latents are ≥ 0 and just one of a pair is active:
L0 is K. `mean` has K = 0, `pca` K = k, `identity` K = d_model. They go through a run like any learner, with a
learning rate of 0: what they need they take from training batches before step 0.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output, SAEConfig
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss
from train.schedule import Clock


class Reference(SAE):
    """d_model orthonormal directions as pairs of latents, of which the first `n_directions` are used.

    There are 2 × d_model latents, whatever `d_sae` says.
    """

    trained = False
    can_split = True
    unit_rows = ()  # they are, and nothing moves them

    def __init__(self, config: SAEConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config.model_copy(update={"d_sae": 2 * d_in}), d_in, seed)
        for parameter in (self.W_enc, self.W_dec, self.b_enc):
            parameter.requires_grad_(False)
        self.point_(torch.eye(d_in))

    @property
    @abstractmethod
    def n_directions(self) -> int:
        """How many directions are used."""

    @torch.no_grad()
    def point_(self, directions: Float[Tensor, "D D"]) -> None:
        """Take orthonormal rows as the directions, in this order."""
        self.W_dec.copy_(torch.cat([directions, -directions]))
        used = directions.clone()
        used[self.n_directions :] = 0
        self.W_enc.copy_(torch.cat([used, -used]).t())

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.relu(pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec))

    def as_affine(self) -> AffineForm:
        return AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "relu").raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        with torch.no_grad():
            latents = masked(self.codes(batch), batch.valid, batch.n_valid)
        reconstruction = (latents @ self.W_dec).float() + self.b_dec
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        loss = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
        return Output({"reconstruction": loss}, latents, reconstruction, {"dead": self.dead(clock).float().mean()})

    def rates(self, clock: Clock) -> tuple[float, float]:
        return 0.0, 0.0


@torch.no_grad()
def mean_and_covariance(
    batches: Batches, centre: Float[Tensor, " D"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Over the valid tokens of all batches, summed in float64; `centre` lies near the mean, so that little cancels."""
    count = 0
    first = torch.zeros(len(centre), dtype=torch.float64, device=centre.device)
    second = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)
    for batch in batches():
        rows = (batch.x[batch.valid] - centre).float()
        count += len(rows)
        first += rows.sum(0)
        second += rows.t() @ rows
    first, second = first / count, second / count
    return centre + first.float(), (second - torch.outer(first, first)).float()


class MeanConfig(SAEConfig):
    """Settings of `mean`."""


@final
class Mean(Reference):
    """x̂ = μ, the mean of up to 200,000 training tokens: no latent is ever active."""

    variant = "mean"
    Config = MeanConfig

    @property
    def n_directions(self) -> int:
        return 0

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        return (0,)

    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        self.b_dec.copy_(mean_and_covariance(batches, self.b_dec)[0])
        return {}


class PCAConfig(SAEConfig):
    """Settings of `pca`."""

    k: Count = Field(32, gt=0, description="Components, and with them the L0; all d_model where there are fewer.")


@final
class PCA(Reference):
    """The mean and the k leading principal components of up to 200,000 training tokens."""

    variant = "pca"
    Config = PCAConfig
    config: PCAConfig

    @property
    def n_directions(self) -> int:
        return min(self.config.k, self.d_in)

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        return (0,)

    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        mean, covariance = mean_and_covariance(batches, self.b_dec)
        self.b_dec.copy_(mean)
        self.point_(torch.linalg.eigh(covariance).eigenvectors.flip(-1).t())  # eigh gives columns, the smallest first
        return {}


class IdentityConfig(SAEConfig):
    """Settings of `identity`."""


@final
class Identity(Reference):
    """x̂ = x: every dimension is a pair of latents."""

    variant = "identity"
    Config = IdentityConfig

    @property
    def n_directions(self) -> int:
        return self.d_in
