"""What variant `relational` adds to the pre-activations of its temporal group: gated products of low rank.

t_t = g_t·(l_t R)      attention: l = c, R = W_C      position: l_t = V_{·,β(p_t)}, R = Uᵀ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Terms:
    """The terms of a batch.

    Attributes:
        gate: g.
        factors: l and R of each term, by name.
    """

    gate: Float[Tensor, "B T 1"]
    factors: Mapping[str, tuple[Float[Tensor, "B T R"], Float[Tensor, "R G"]]]

    def dense(self) -> dict[str, Float[Tensor, "B T G"]]:
        """Each term at every latent of the group."""
        return {name: self.gate * (left @ right).float() for name, (left, right) in self.factors.items()}

    def joined(
        self, valid: Bool[Tensor, "B T"] | None, n_latents: int
    ) -> tuple[Float[Tensor, "N R"], Float[Tensor, "R L"]]:
        """The sum of all terms as one product: of rows that are 0 where not `valid`, and columns of all latents."""
        gate = self.gate if valid is None else self.gate * valid[..., None]
        lefts, rights = zip(*self.factors.values(), strict=True)
        left, right = (gate * torch.cat(lefts, dim=-1).float()).flatten(0, 1), torch.cat(rights).float()
        return left, pad(right, (0, n_latents - right.shape[1]))

    @torch.no_grad()
    def norms(self, valid: Bool[Tensor, "B T"] | None) -> dict[str, Float[Tensor, ""]]:
        """The Frobenius norm of each term over the batch: of L R it is √⟨LᵀL, R Rᵀ⟩."""
        gate = self.gate if valid is None else self.gate * valid[..., None]
        found = {}
        for name, (left, right) in self.factors.items():
            rows, columns = (gate * left).flatten(0, 1).double(), right.double()
            found[name] = ((rows.t() @ rows) * (columns @ columns.t())).sum().clamp_min(0).sqrt().float()
        return found
