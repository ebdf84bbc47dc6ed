"""What variants share that keep k latents of one linear encoder.

    u = ReLU((x − b_dec) W_enc + b_enc)      f = those of u that are kept      L = reconstruction + α·AuxK

A step goes one of two ways that agree up to the order of additions: with all codes, zeros and all, or with the kept
ones alone (`kept`), which saves four of its five large products.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.collective import counted_once, mean_over_latents, over_latents, over_ranks
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, KeptConfig, Output
from train.saes.kept import Codes, encode_kept, product
from train.saes.parts import (
    count_silence_,
    masked,
    pre_activations,
    reconstruction_loss,
    share_of_spread,
)
from train.saes.places import Choice, keep_batch_top_k
from train.saes.sparsity import Sparsity
from train.schedule import Clock

AuxK = Callable[[Tensor], Tensor]
"""AuxK's loss from the residual [batch, window, d_model] of a step."""


class LinearSAE(SAE):
    """A linear encoder, a way to keep k latents, reconstruction and AuxK."""

    can_split = True
    config: KeptConfig

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        """u of all latents."""
        return torch.relu(pre_activations(x, self.W_enc, self.b_enc, self.b_dec))

    @abstractmethod
    def keep(self, u: Float[Tensor, "B T L"], n_valid: int, clock: Clock) -> Float[Tensor, "B T L"]:
        """The codes of a step from u, which is 0 at invalid positions."""

    @abstractmethod
    def choice(self, n_valid: int, clock: Clock) -> Choice:
        """The same codes, as places to keep."""

    def note(self, values: Float[Tensor, " K"], clock: Clock) -> None:
        """Look at the kept codes of a sparse step."""

    def logged(self) -> dict[str, Tensor]:
        """What else is worth a place in the metrics."""
        return {}

    def rebuild(self, latents: Codes, batch: Batch) -> tuple[Tensor, Float[Tensor, "B T D"], dict[str, Tensor]]:
        """Loss and reconstruction from the codes of a step, and what of them is worth logging."""
        reconstruction = over_latents(product(latents, self.W_dec)) + counted_once(self.b_dec)
        return reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid), reconstruction, {}

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        dead = self.dead(clock)
        latents, aux_k = (self._keep_sparse if self.sparse else self._keep_plain)(batch, dead, clock)
        loss, reconstruction, told = self.rebuild(latents, batch)
        parts = {"reconstruction": loss, "aux": self.config.aux_alpha * aux_k(batch.x - reconstruction)}
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        return Output(
            parts, latents, reconstruction, {"dead": mean_over_latents(dead.float().mean())} | told | self.logged()
        )

    def _keep_plain(self, batch: Batch, dead: Bool[Tensor, " L"], clock: Clock) -> tuple[Codes, AuxK]:
        u = masked(self.pre_activations(batch.x), batch.valid, batch.n_valid)
        return self.keep(u, batch.n_valid, clock), lambda residual: self.aux_k(residual, u, dead, batch.valid)

    def _keep_sparse(self, batch: Batch, dead: Bool[Tensor, " L"], clock: Clock) -> tuple[Codes, AuxK]:
        valid = None if batch.n_valid == over_ranks(batch.valid.numel()) else batch.valid
        choice = self.choice(batch.n_valid, clock)
        latents, of_dead = encode_kept(
            batch.x, self.W_enc, self.b_enc, self.b_dec, valid, choice, self.maybe(dead), self.may_die
        )
        self.note(latents.values.detach(), clock)

        def aux_k(residual: Tensor) -> Tensor:
            if of_dead is None:
                return residual.new_zeros(())
            return dead.any() * share_of_spread(residual, of_dead.times(self.W_dec), batch.valid)

        return latents, aux_k


class BatchLinearSAE(LinearSAE):
    """The k·N largest of a batch are kept; inference is independent of it, with a threshold (see `sparsity`)."""

    def __init__(self, config: KeptConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.sparsity = Sparsity([config.d_sae], config.k, d_in, k_anneal=config.k_anneal)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return self.sparsity.active(self.pre_activations(batch.x), 0, batch.n_valid, None)

    def keep(self, u: Float[Tensor, "B T L"], n_valid: int, clock: Clock) -> Float[Tensor, "B T L"]:
        return self.sparsity.active(u, 0, n_valid, clock)

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...] | None:
        return self.sparsity.host_facts(clock)

    def choice(self, n_valid: int, clock: Clock) -> Choice:
        return functools.partial(keep_batch_top_k, n_kept=self.sparsity.n_kept(0, n_valid, clock))

    def note(self, values: Float[Tensor, " K"], clock: Clock) -> None:
        self.sparsity.note(values, 0, clock)

    def logged(self) -> dict[str, Tensor]:
        return self.sparsity.logged()

    def as_affine(self) -> AffineForm:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent()).raw(self.scale)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        return self.sparsity.calibrate(lambda: ([self.pre_activations(b.x)[b.valid]] for b in batches()))

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
