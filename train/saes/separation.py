"""Keeping groups of latents apart: by the directions of their decoder rows, or by when they are active."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.saes.parts import masked


def separation(rows: Float[Tensor, "R D"], group: Int[Tensor, " R"]) -> Float[Tensor, ""]:
    """L_sep of unit rows: the squared cosine to the nearest row of other groups, and half that to its own group's."""
    with torch.autocast(rows.device.type, enabled=False):
        cosines = (rows @ rows.t()).clamp_min(0)
    same = group[:, None] == group
    across = cosines.masked_fill(same, 0).amax(1)
    within = cosines.masked_fill(~same, 0).fill_diagonal_(0).amax(1)
    return across.square().mean() + within.square().mean() / 2


def correlation(energies: Float[Tensor, "B T G"], valid: Bool[Tensor, "B T"], n_valid: int) -> Float[Tensor, ""]:
    """Mean squared correlation between different groups over valid tokens; 0 where a group does not vary."""
    centred = masked(energies - masked(energies, valid, n_valid).sum((0, 1)) / n_valid, valid, n_valid).flatten(0, 1)
    unit = centred / centred.norm(dim=0).clamp_min(1e-12)
    with torch.autocast(unit.device.type, enabled=False):
        squares: Tensor = (unit.t() @ unit).square()
    n = len(squares)
    return (squares.sum() - squares.diagonal().sum()) / max(n * (n - 1), 1)
