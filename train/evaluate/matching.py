"""Persistence at equal density: ρ rises with density alone, so it is compared within bins of density (spec §5.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.evaluate.persistence import Among, Persistence

BIN_EDGES = tuple(10 ** (-4 + 0.4 * number) for number in range(11))  # ten bins from 1e-4 to 1
DENSE = 0.4


def dense_mass(measured: Persistence, above: float = DENSE) -> float:
    """Share of the activation mass in latents active on more than `above` of the tokens."""
    return float(measured.mass[measured.density > above].sum())


def bin_of(density: Tensor) -> Tensor:
    """The bin of each density: ten, equal in log density from 1e-4 to 1; what is rarer is in the first."""
    return torch.bucketize(density, torch.tensor(BIN_EDGES[1:-1], dtype=density.dtype), right=True)


def mass_by_bin(measured: Persistence, among: Among = None) -> Tensor:
    """Share of the activation mass in each bin of density [10]; of the latents `among` only, of their mass."""
    chosen = slice(None) if among is None else among
    mass = measured.mass[chosen]
    bins = torch.zeros(len(BIN_EDGES) - 1, dtype=mass.dtype)
    return bins.index_add(0, bin_of(measured.density[chosen]), mass) / mass.sum().clamp_min(1e-300)


@dataclass(frozen=True)
class Matched:
    """A mean over bins of density with the weights of a reference.

    Attributes:
        value: the mean over the bins that both have.
        reference: the reference's own mean over the same bins, which `value` is to be held against.
        covered: the reference's mass in those bins; where it is well below 1, `value` says little.
        by_bin: the mass-weighted mean in each bin [10], NaN where a bin has no mass.
    """

    value: float
    reference: float
    covered: float
    by_bin: Tensor


def density_matched(
    measured: Persistence,
    reference: Persistence,
    lag: int,
    among: Among = None,
    reference_among: Among = None,
) -> Matched:
    """Mass-weighted ρ(lag) within bins of density, averaged with the reference's mass per bin.

    Two SAEs of equal ρ within each bin come out equal, however their mass lies over the bins.
    """
    by_bin, theirs = rho_by_bin(measured, lag, among), rho_by_bin(reference, lag, reference_among)
    weights = mass_by_bin(reference, reference_among)
    both = ~by_bin.isnan() & (weights > 0)
    covered = float(weights[both].sum())
    if covered == 0:
        return Matched(float("nan"), float("nan"), 0.0, by_bin)
    means = [float((values[both] * weights[both]).sum()) / covered for values in (by_bin, theirs)]
    return Matched(means[0], means[1], covered, by_bin)


def rho_by_bin(measured: Persistence, lag: int, among: Among = None) -> Tensor:
    """Mass-weighted ρ(lag) in each bin of density [10], NaN where a bin has no mass."""
    chosen = slice(None) if among is None else among
    mass, rho, bins = measured.mass[chosen], measured.rho[lag][chosen], bin_of(measured.density[chosen])
    empty = torch.zeros(len(BIN_EDGES) - 1, dtype=mass.dtype)
    return empty.index_add(0, bins, mass * rho) / empty.index_add(0, bins, mass)
