"""How much latents persist along a document, and at what density (evaluation spec §5.5).

ρ_i(τ) is the Pearson correlation of (f_i,t, f_i,t+τ) over all pairs inside documents whose members are both valid. It
rises with density alone, so it is no evidence by itself: compare within bins of density, and look at where the
activation mass went. Nulls take the second member from another document of the batch: at the same place of its window,
which keeps what positions explain, and at another place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.saes.base import SAE

LAGS = (1, 2, 4, 8, 16, 32, 64)
BIN_EDGES = tuple(10 ** (-4 + 0.4 * number) for number in range(11))  # ten bins from 1e-4 to 1
DENSE = 0.4


@dataclass(frozen=True)
class Persistence:
    """Figures per latent, float64 on the CPU; L latents.

    Attributes:
        rho: by lag, ρ [L]; 0 where a latent does not vary.
        null: by lag, the same with the later member from another document, at the same place of its window.
        null_elsewhere: by lag, the same from another place, half a window on.
        n_pairs: by lag, how many pairs ρ comes from.
        density: share of tokens on which each latent is active [L].
        mass: sum of each latent over the tokens, as a share of all [L].
    """

    rho: dict[int, Tensor]
    null: dict[int, Tensor]
    null_elsewhere: dict[int, Tensor]
    n_pairs: dict[int, int]
    density: Tensor
    mass: Tensor


class PairSums:
    """Running sums for the Pearson correlation of pairs, latent by latent, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: Tensor | None = None

    def add(self, first: Tensor, second: Tensor, counts: Tensor) -> None:
        """Pairs [B, T, L]; `counts` [B, T] says which are meant."""
        weight = counts[..., None].to(first.dtype)
        a, b = first * weight, second * weight
        rows = [a, b, a * a, b * b, a * b]
        sums = torch.stack([row.sum((0, 1), dtype=torch.float64) for row in rows]).cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.n += int(counts.sum())

    def correlation(self) -> Tensor:
        """Pearson's r; 0 where either side does not vary, or there is no pair."""
        if self.sums is None or self.n == 0:
            raise DataError("no pair of tokens this far apart inside a document. Harvest more, or take shorter lags.")
        a, b, aa, bb, ab = self.sums / self.n
        spread = ((aa - a * a) * (bb - b * b)).clamp_min(0).sqrt()
        # sums of rounded numbers: a spread this small against the values themselves is none
        varies = spread > 1e-12 * (aa * bb).sqrt()
        return torch.where(varies, (ab - a * b) / spread.clamp_min(1e-300), 0.0)


def pair_sums(latents: Tensor, batch: Batch, lag: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Pairs `lag` apart: inside a document; with another document, same place; with another document, elsewhere."""
    first, second = latents[:, :-lag], latents[:, lag:]
    doc, valid = batch.doc, batch.valid
    inside = valid[:, :-lag] & valid[:, lag:] & (doc[:, :-lag] == doc[:, lag:])
    out = [(first, second, inside)]
    for shift in (0, latents.shape[1] // 2):
        moved = [torch.roll(values, (1, shift), (0, 1))[:, lag:] for values in (latents, doc, valid)]
        other = inside & moved[2] & (moved[1] != doc[:, :-lag])  # the same first members as the pairs inside
        out.append((first, moved[0], other))
    return tuple(out)


@torch.no_grad()
def measure_persistence(sae: SAE, batches: Iterable[Batch], lags: Sequence[int] = LAGS) -> Persistence:
    """ρ with its nulls, density and mass over the valid positions of `batches` (raw units), such as held-out ones.

    Lags that do not fit into a window are left out. Give windows longer than the longest lag.

    Raises:
        DataError: no pair at a lag, or at a lag no pair of different documents (one document per batch).
    """
    sums: dict[tuple[str, int], PairSums] = {}
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    mass, tokens = torch.zeros_like(fired), 0
    device = sae.W_dec.device
    for batch in batches:
        batch = batch.to(device)
        latents = sae.encode(batch)
        counted = latents * batch.valid[..., None]
        fired += (counted > 0).sum((0, 1)).double().cpu()
        mass += counted.sum((0, 1), dtype=torch.float64).cpu()
        tokens += batch.n_valid
        for lag in lags:
            if lag < latents.shape[1]:
                for kind, pairs in zip(("rho", "null", "elsewhere"), pair_sums(latents, batch, lag), strict=True):
                    sums.setdefault((kind, lag), PairSums()).add(*pairs)
    if not tokens:
        raise DataError("there is no token to measure on.")
    found: dict[str, dict[int, Tensor]] = {"rho": {}, "null": {}, "elsewhere": {}}
    for (kind, lag), pairs_of in sums.items():
        found[kind][lag] = pairs_of.correlation()
    n_pairs = {lag: sums["rho", lag].n for lag in found["rho"]}
    share = mass / mass.sum().clamp_min(1e-300)
    return Persistence(found["rho"], found["null"], found["elsewhere"], n_pairs, fired / tokens, share)


def mass_weighted(values: Tensor, mass: Tensor, among: Tensor | slice | None = None) -> float:
    """Mean of figures per latent, weighted by activation mass; of the latents `among` only."""
    chosen = slice(None) if among is None else among
    return float((values[chosen] * mass[chosen]).sum() / mass[chosen].sum().clamp_min(1e-300))


def dense_mass(measured: Persistence, above: float = DENSE) -> float:
    """Share of the activation mass in latents active on more than `above` of the tokens."""
    return float(measured.mass[measured.density > above].sum())


def bin_of(density: Tensor) -> Tensor:
    """The bin of each density: ten, equal in log density from 1e-4 to 1; what is rarer is in the first."""
    return torch.bucketize(density, torch.tensor(BIN_EDGES[1:-1], dtype=density.dtype), right=True)


def mass_by_bin(measured: Persistence, among: Tensor | slice | None = None) -> Tensor:
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
    among: Tensor | slice | None = None,
    reference_among: Tensor | slice | None = None,
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


def rho_by_bin(measured: Persistence, lag: int, among: Tensor | slice | None = None) -> Tensor:
    """Mass-weighted ρ(lag) in each bin of density [10], NaN where a bin has no mass."""
    chosen = slice(None) if among is None else among
    mass, rho, bins = measured.mass[chosen], measured.rho[lag][chosen], bin_of(measured.density[chosen])
    empty = torch.zeros(len(BIN_EDGES) - 1, dtype=mass.dtype)
    return empty.index_add(0, bins, mass * rho) / empty.index_add(0, bins, mass)


def correlation_time(measured: Persistence, among: Tensor | slice | None = None) -> float | None:
    """First lag at which mass-weighted ρ is below half of ρ at the shortest lag, interpolated.

    None where ρ at the shortest lag is within its null (no more than twice its size), or never falls that low:
    order groups by ρ(8) then.
    """
    lags = sorted(measured.rho)
    curve = [mass_weighted(measured.rho[lag], measured.mass, among) for lag in lags]
    null = abs(mass_weighted(measured.null[lags[0]], measured.mass, among))
    if curve[0] <= 2 * null:
        return None
    half = curve[0] / 2
    for (lag, value), (later, next_value) in zip(
        zip(lags, curve, strict=True), zip(lags[1:], curve[1:], strict=True), strict=False
    ):
        if next_value < half:
            return lag + (later - lag) * (value - half) / (value - next_value)
    return None
