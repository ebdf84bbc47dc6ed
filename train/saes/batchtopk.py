"""BatchTopK: k latents per token on average, chosen over the whole batch (Bussmann et al. 2412.06410).

    u = ReLU((x − b_dec) W_enc + b_enc)      f = the k·N largest of u over the batch's N valid tokens
    x̂ = f W_dec + b_dec                      L = ⟨‖x − x̂‖²⟩ + α·AuxK

Inference is independent of the batch: f = u·1[u > θ]; how θ is found is told in `sparsity`.
"""

from __future__ import annotations

from typing import final

from train.saes.base import KeptConfig
from train.saes.linear import BatchLinearSAE


class BatchTopKConfig(KeptConfig):
    """Settings of `batchtopk`."""


@final
class BatchTopK(BatchLinearSAE):
    """See the module's formula."""

    variant = "batchtopk"
    can_shard = True
    Config = BatchTopKConfig
    config: BatchTopKConfig
    plain = {}
