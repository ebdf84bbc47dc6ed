"""TopK: the k largest latents of each token (Gao et al. 2406.04093).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k largest of u per token      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference keeps the top k per token too, so L0 is at most k and no threshold is needed.
Differs from the paper: Adam's eps and the weight average (off) are the project's common recipe (spec §0.1).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.config import Count
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import KeptConfig
from train.saes.linear import LinearSAE
from train.saes.parts import annealed_k, top_k
from train.saes.places import Choice, keep_top_k
from train.schedule import Clock


class TopKConfig(KeptConfig):
    """Settings of `topk`."""

    k: Count = Field(32, gt=0, description="Latents kept per token.")


@final
class TopK(LinearSAE):
    """See the module's formula."""

    variant = "topk"
    can_shard = True
    Config = TopKConfig
    config: TopKConfig

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return top_k(self.pre_activations(batch.x), self.config.k)

    def as_affine(self) -> AffineForm:
        return AffineForm(self.W_enc, self.b_enc, self.W_dec, self.b_dec, "topk", k=self.config.k).raw(self.scale)

    def k_at(self, clock: Clock) -> int:
        """k of this step."""
        k = round(annealed_k(self.config.k, self.d_in, self.config.k_anneal, clock.progress))
        return min(k, self.d_sae)

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...]:
        return (self.k_at(clock),)

    def keep(self, u: Float[Tensor, "B T L"], n_valid: int, clock: Clock) -> Float[Tensor, "B T L"]:
        return top_k(u, self.k_at(clock))

    def choice(self, n_valid: int, clock: Clock) -> Choice:
        return functools.partial(keep_top_k, k=self.k_at(clock))
