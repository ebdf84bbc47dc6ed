"""Matryoshka BatchTopK: nested prefixes of one dictionary each reconstruct on their own (Bussmann et al. 2503.17547).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k·N largest of u over the batch's N valid tokens
    x̂_p = Σ_{i < m_p} f_i d_i + b_dec        m_p = d_sae · (fractions summed up to p), m_P = d_sae
    L = 1/P Σ_p ⟨‖x − x̂_p‖²⟩ + α·AuxK        AuxK on the full residual x − x̂_P

One BatchTopK over all latents: how many of the k a prefix gets is left to the loss. The prefixes' reconstructions are
running sums of one product per block, so that together they cost one product of full width.

What public implementations do: dictionary_learning has these fractions, weighs each prefix by 1/P and then also takes
the mean, so its α counts P times more beside the reconstruction; SAELens adds the inner losses to the full one (a
sum, not a mean) and selects anew by BatchTopK inside each prefix; the authors' first code averages over the prefixes
and the one of b_dec alone, with fractions 1/16, 1/16, 1/8, 1/4, 1/2. Here: the plain mean over the P prefixes, one
selection.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from train.data.batch import Batch
from train.saes.base import KeptConfig
from train.saes.kept import Codes, Kept
from train.saes.linear import BatchLinearSAE
from train.saes.parts import reconstruction_loss


class MatryoshkaConfig(KeptConfig):
    """Settings of `matryoshka`."""

    fractions: tuple[float, ...] = Field(
        (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32),
        min_length=1,
        description="Shares of the latents that each prefix adds to the one before; they sum to 1. As published.",
    )

    @model_validator(mode="after")
    def _nested(self) -> MatryoshkaConfig:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions sum to {sum(self.fractions):.4g}; 1 is needed")
        if min(self.blocks()) < 1:
            raise ValueError(f"fractions {self.fractions} of d_sae = {self.d_sae} leave a block without a latent")
        return self

    def blocks(self) -> list[int]:
        """Latents that each prefix adds."""
        ends = [round(share * self.d_sae) for share in accumulate(self.fractions)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@final
class Matryoshka(BatchLinearSAE):
    """See the module's formula."""

    variant = "matryoshka"
    Config = MatryoshkaConfig
    config: MatryoshkaConfig
    plain = {"fractions": (1.0,)}

    def __init__(self, config: MatryoshkaConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.blocks = config.blocks()

    def groups(self) -> dict[str, slice]:
        ends = list(accumulate(self.blocks))
        return {
            f"block {number}": slice(end - size, end)
            for number, (size, end) in enumerate(zip(self.blocks, ends, strict=True))
        }

    def links(self) -> dict[tuple[str, str], Tensor | None]:
        return dict.fromkeys(pairwise(self.groups()))

    def prefixes(self, latents: Codes) -> list[Float[Tensor, "B T D"]]:
        """The reconstruction by each prefix, the full one last."""
        if isinstance(latents, Kept):
            each = latents.times_by_block(self.W_dec, self.blocks).unbind(2)
        else:
            blocks = zip(latents.split(self.blocks, dim=-1), self.W_dec.split(self.blocks), strict=True)
            each = tuple((part @ rows).float() for part, rows in blocks)
        return [total + self.b_dec for total in accumulate(each)]

    def rebuild(self, latents: Codes, batch: Batch) -> tuple[Tensor, Float[Tensor, "B T D"], dict[str, Tensor]]:
        prefixes = self.prefixes(latents)
        losses = [reconstruction_loss(batch.x, prefix, batch.valid, batch.n_valid) for prefix in prefixes]
        return torch.stack(losses).mean(), prefixes[-1], {}
