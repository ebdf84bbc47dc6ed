"""Small trees and tokens for their tests."""

from __future__ import annotations

import torch
from torch import Tensor

from train.saes import make_sae
from train.saes.tree import Tree
from train.schedule import Clock

D = 12
MIDDLE = Clock(50, 100, 64)


def tree(d_sae: int = 16, k: int = 6, **options: object) -> Tree:
    sae = make_sae("tree", {"d_sae": d_sae, "k": k} | options, D, 0, "test")
    assert isinstance(sae, Tree)
    return sae


def tokens(n: int = 64, seed: int = 0) -> Tensor:
    x = torch.randn(n, 1, D, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x / x.square().sum(-1).mean().sqrt()


def uneven(sae: Tree) -> None:
    """Edge weights, κ and b_enc that are all different, and thresholds that let some pass."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (sae.up, sae.down, sae.kappa, sae.b_enc):
            if parameter is not None:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        sae.sparsity.threshold.copy_(torch.tensor([0.1, 0.2, 0.3]))
