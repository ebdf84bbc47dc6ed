"""Persistence of latents against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.temporal import (
    Persistence,
    correlation_time,
    dense_mass,
    density_matched,
    mass_by_bin,
    mass_weighted,
    measure_persistence,
)
from train.saes import make_sae
from train.saes.base import SAE


def sae_of() -> SAE:
    sae = make_sae("topk", {"d_sae": 12, "k": 5}, 6, 0, "test")
    with torch.no_grad():
        sae.W_enc[:, 11] = 0.0  # never active
    return sae


def batches_of(n: int = 2) -> list[Batch]:
    """Windows of 10 with a document border at place 4 and a few places not valid."""
    out = []
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)
        slow = torch.randn(5, 1, 6, generator=generator)
        x = slow + torch.randn(5, 10, 6, generator=generator)
        doc = torch.stack([torch.tensor([2 * row] * 4 + [2 * row + 1] * 6) for row in range(5)]).int()
        valid = torch.rand(5, 10, generator=generator) > 0.15
        out.append(Batch.of(x, doc=doc, valid=valid))
    return out


def slow_pairs(batches: list[Batch], lag: int, shift: int | None) -> list[tuple[int, int, int, int, int]]:
    """(batch, row, t, other row, other place) of each pair; `shift` None: inside a document."""
    found = []
    for number, batch in enumerate(batches):
        rows, window = batch.valid.shape
        for row in range(rows):
            for t in range(window - lag):
                s = t + lag
                inside = batch.valid[row, t] and batch.valid[row, s] and batch.doc[row, t] == batch.doc[row, s]
                if not inside:
                    continue
                if shift is None:
                    found.append((number, row, t, row, s))
                    continue
                other, place = (row - 1) % rows, (s - shift) % window
                if batch.valid[other, place] and batch.doc[other, place] != batch.doc[row, t]:
                    found.append((number, row, t, other, place))
    return found


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize(("kind", "shift"), [("rho", None), ("null", 0), ("null_elsewhere", 5)])
def test_correlation_is_pearsons_over_the_pairs_of_a_loop(lag: int, kind: str, shift: int | None) -> None:
    sae, batches = sae_of(), batches_of()
    codes = [sae.encode(batch).detach().double().numpy() for batch in batches]
    measured = measure_persistence(sae, batches, (lag, 20))
    pairs = slow_pairs(batches, lag, shift)
    first = np.array([codes[n][row, t] for n, row, t, _, _ in pairs])
    second = np.array([codes[n][row, t] for n, _, _, row, t in pairs])
    figures = getattr(measured, kind)
    assert list(figures) == [lag]  # a lag of 20 does not fit into windows of 10
    for latent in range(11):
        expected = np.corrcoef(first[:, latent], second[:, latent])[0, 1]
        # products of float32 numbers summed in float64
        assert figures[lag][latent].item() == pytest.approx(expected, abs=1e-5)
    assert figures[lag][11].item() == 0.0
    if kind == "rho":
        assert measured.n_pairs[lag] == len(pairs)


def test_density_and_mass_count_valid_tokens() -> None:
    sae, batches = sae_of(), batches_of()
    measured = measure_persistence(sae, batches, (1,))
    rows = torch.cat([sae.encode(batch)[batch.valid] for batch in batches]).detach().double()
    assert torch.allclose(measured.density, (rows > 0).double().mean(0))
    assert torch.allclose(measured.mass, rows.sum(0) / rows.sum(), atol=1e-6)


def test_batches_without_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="no token"):
        measure_persistence(sae_of(), [])
    with pytest.raises(DataError, match="no pair of tokens this far apart"):
        measure_persistence(sae_of(), [Batch.of(torch.randn(1, 10, 6))], (1,))  # one document: no null


def made(density: list[float], mass: list[float], rho: list[float], null: float = 0.0) -> Persistence:
    values = {8: torch.tensor(rho, dtype=torch.float64)}
    nulls = {8: torch.full((len(rho),), null, dtype=torch.float64)}
    weights = torch.tensor(mass, dtype=torch.float64)
    return Persistence(values, nulls, nulls, {8: 1}, torch.tensor(density, dtype=torch.float64), weights)


def test_matching_takes_the_references_weights() -> None:
    # bins end at .063, .158 and .398: the latents lie in the seventh, the eighth, and the last
    reference = made([0.03, 0.1], [0.75, 0.25], [0.1, 0.3])
    ours = made([0.03, 0.04, 0.1, 0.9], [0.1, 0.1, 0.2, 0.6], [0.1, 0.3, 0.6, 0.95])
    matched = density_matched(ours, reference, 8)
    assert matched.value == pytest.approx(0.75 * 0.2 + 0.25 * 0.6)
    assert matched.reference == pytest.approx(0.75 * 0.1 + 0.25 * 0.3)
    assert matched.covered == pytest.approx(1.0)
    assert matched.by_bin[[6, 7, 9]].tolist() == pytest.approx([0.2, 0.6, 0.95])
    assert matched.by_bin.isnan().sum() == 7
    plain = mass_weighted(reference.rho[8], reference.mass)
    assert density_matched(reference, reference, 8).value == pytest.approx(plain)


def test_matching_tells_what_it_does_not_cover() -> None:
    reference = made([0.03, 0.5], [0.4, 0.6], [0.1, 0.3])
    matched = density_matched(made([0.03, 0.1], [0.5, 0.5], [0.2, 0.9]), reference, 8)
    assert matched.value == pytest.approx(0.2)
    assert matched.reference == pytest.approx(0.1)  # not .22, its mean over all bins
    assert matched.covered == pytest.approx(0.4)


def test_matching_among_some_latents() -> None:
    reference = made([0.03, 0.1], [0.75, 0.25], [0.1, 0.3])
    ours = made([0.03, 0.03, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.2])
    assert density_matched(ours, reference, 8, slice(0, 1)).value == pytest.approx(0.5)
    assert density_matched(ours, reference, 8, reference_among=slice(1, 2)).value == pytest.approx(0.2)


def test_masses_by_density() -> None:
    measured = made([1e-6, 0.03, 0.45, 1.0], [0.1, 0.2, 0.3, 0.4], [0.0] * 4)
    assert dense_mass(measured) == pytest.approx(0.7)
    assert dense_mass(measured, 0.9) == pytest.approx(0.4)
    assert mass_by_bin(measured)[[0, 6, 9]].tolist() == pytest.approx([0.1, 0.2, 0.7])
    assert mass_by_bin(measured, slice(0, 2)).sum().item() == pytest.approx(1.0)


def test_mass_weighted_mean_by_hand() -> None:
    measured = made([0.1] * 3, [0.5, 0.25, 0.25], [0.2, 0.4, 0.8])
    assert mass_weighted(measured.rho[8], measured.mass) == pytest.approx(0.4)
    assert mass_weighted(measured.rho[8], measured.mass, slice(1, None)) == pytest.approx(0.6)


def curve(values: dict[int, float], null: float) -> Persistence:
    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    rho, nulls = {lag: one(value) for lag, value in values.items()}, {lag: one(null) for lag in values}
    return Persistence(rho, nulls, nulls, dict.fromkeys(values, 1), one(0.1), one(1.0))


def test_correlation_time_is_interpolated() -> None:
    # half of .8 lies between .5 at 2 and .3 at 4, in the middle
    assert correlation_time(curve({1: 0.8, 2: 0.5, 4: 0.3}, 0.0)) == pytest.approx(3.0)
    assert correlation_time(curve({1: 0.8, 2: 0.7, 4: 0.6}, 0.0)) is None
    assert correlation_time(curve({1: 0.1, 2: 0.01}, 0.06)) is None
