"""How much latents persist along a document (evaluation spec §5.5).

ρ_i(τ) is the Pearson correlation of (f_i,t, f_i,t+τ) over all pairs inside documents whose members are both valid. It
rises with density alone, so it is no evidence by itself: see `matching`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.information import entropy, mutual_information
from train.evaluate.pairs import A_ON, B_ON, BOTH, KINDS, LAGS, Kind, Pairs, correlation
from train.saes.base import SAE

Among = Tensor | slice | None
"""The latents meant: a mask, a slice, or None for all."""


@dataclass(frozen=True)
class Persistence:
    """Figures per latent, float64 on the CPU; L latents.

    Attributes:
        rho: by lag, ρ [L]; 0 where a latent does not vary. A lag with no pair inside a document is not there.
        null: by lag, the same with the later member from another document, at the same place of its sequence; a lag
            with no such pair is not there.
        null_elsewhere: by lag, the same from another place, half a sequence on.
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


def persistence_of(pairs: Pairs) -> Persistence:
    """The figures that these sums make.

    Raises:
        DataError: no token.
    """
    if not pairs.tokens.sum():
        raise DataError("there is no token to measure on.")
    found = {
        kind: {lag: correlation(*sums.whole()) for (one, lag), sums in pairs.by.items() if one == kind}
        for kind in KINDS
    }
    return Persistence(
        rho=found["inside"],
        null=found["same_place"],
        null_elsewhere=found["elsewhere"],
        n_pairs={lag: int(pairs.by["inside", lag].n.sum()) for lag in found["inside"]},
        density=pairs.fired.sum(0) / pairs.tokens.sum(),
        mass=shares(pairs.mass.sum(0)),
    )


def shares(mass: Tensor) -> Tensor:
    """Of each latent in all of the mass [L]; 0 where there is none."""
    return mass / mass.sum().clamp_min(1e-300)


def information(pairs: Pairs, kind: Kind, lag: int) -> Tensor | None:
    """I(b_t; b_t+lag) / H(b) of each latent's being active [L], 0 where H is 0; None where there is no pair."""
    found = pairs.whole(kind, lag)
    if found is None:
        return None
    sums, n = found
    bits = entropy(sums[A_ON], n)
    told = mutual_information(sums[BOTH], sums[A_ON], sums[B_ON], n)
    return torch.where(bits > 0, told / bits.clamp_min(1e-300), 0.0)


@torch.no_grad()
def measure_persistence(sae: SAE, batches: Iterable[Batch], lags: Sequence[int] = LAGS) -> Persistence:
    """ρ with its nulls, density and mass over the valid positions of `batches` (raw units), such as held-out ones.

    Give windows longer than the longest lag.

    Raises:
        DataError: no token.
    """
    pairs, device = Pairs(sae.d_sae, lags), sae.W_dec.device
    for batch in batches:
        on_device = batch.to(device)
        pairs.add(sae.encode(on_device), on_device)
    return persistence_of(pairs)


def mass_weighted(values: Tensor, mass: Tensor, among: Among = None) -> float:
    """Mean of figures per latent, weighted by activation mass; of the latents `among` only."""
    chosen = slice(None) if among is None else among
    return float((values[chosen] * mass[chosen]).sum() / mass[chosen].sum().clamp_min(1e-300))


@dataclass(frozen=True)
class CorrelationTime:
    """τ½ in tokens, or why there is none."""

    value: float | None
    reason: str = ""


def correlation_time(measured: Persistence, among: Among = None) -> CorrelationTime:
    """First lag at which mass-weighted ρ is below half of ρ at the shortest lag, interpolated.

    None where ρ at the shortest lag is within its null (no more than twice its size), or never falls that low:
    order groups by ρ(8) then.
    """
    lags = sorted(measured.rho)
    if not lags or lags[0] not in measured.null:
        return CorrelationTime(None, "no pairs of tokens, or none of different documents to hold ρ against")
    curve = [mass_weighted(measured.rho[lag], measured.mass, among) for lag in lags]
    if curve[0] <= 2 * abs(mass_weighted(measured.null[lags[0]], measured.mass, among)):
        return CorrelationTime(None, f"ρ({lags[0]}) is within its null: nothing persists whose time could be told")
    half = curve[0] / 2
    for (lag, value), (later, next_value) in pairwise(zip(lags, curve, strict=True)):
        if next_value < half:
            return CorrelationTime(lag + (later - lag) * (value - half) / (value - next_value))
    return CorrelationTime(None, f"ρ is still above half of ρ({lags[0]}) at the longest lag, {lags[-1]}")
