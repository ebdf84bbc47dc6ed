"""Persistence of latents against slow references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.pairs import Pairs
from train.evaluate.persistence import (
    Persistence,
    correlation_time,
    information,
    mass_weighted,
    measure_persistence,
    persistence_of,
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
                other, place = (row - rows // 2) % rows, (s - shift) % window
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


def test_one_document_has_no_null() -> None:
    measured = measure_persistence(sae_of(), [Batch.of(torch.randn(1, 10, 6))], (1, 20))
    assert (list(measured.rho), measured.null, measured.null_elsewhere) == ([1], {}, {})


def codes_of(values: Tensor) -> tuple[Tensor, Batch]:
    """One latent [rows, places] as codes of sequences that are a document each."""
    return values[..., None].float(), Batch.of(torch.zeros(*values.shape, 1))


def test_an_autoregression_has_the_rho_it_was_made_with() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, length, phi = 40, 600, 0.8
    noise = torch.randn(rows, length, generator=generator) * (1 - phi**2) ** 0.5
    values = torch.randn(rows, length, generator=generator)
    for t in range(1, length):
        values[:, t] = phi * values[:, t - 1] + noise[:, t]
    pairs = Pairs(1, (1, 2, 4, 8))
    pairs.add(*codes_of(values + 10))  # above 0 everywhere
    measured = persistence_of(pairs)
    for lag, rho in measured.rho.items():
        # standard error of ρ over 24,000 pairs of which some ten go on together: .02
        assert rho.item() == pytest.approx(phi**lag, abs=0.04)
        assert measured.null[lag].item() == pytest.approx(0, abs=0.06)
        assert measured.null_elsewhere[lag].item() == pytest.approx(0, abs=0.06)
    # half of .8 lies just beyond .8⁴ = .41 at lag 4
    assert correlation_time(measured).value == pytest.approx(4.2, abs=0.5)


def test_information_of_two_tokens_by_hand() -> None:
    # on, on, off, off, … from 16 places: pairs 2 apart are always opposite, which tells everything
    pattern = torch.tensor([1, 1, 0, 0] * 4).repeat(50, 1)
    pairs = Pairs(1, (1, 2))
    pairs.add(*codes_of(pattern))
    told = information(pairs, "inside", 2)
    assert told is not None
    # 700 pairs; less the bias of 1 / (2·700·ln 2) bits
    assert told.item() == pytest.approx(1 - 1 / (2 * 700 * np.log(2)), abs=1e-3)
    # the same place of another document says the same
    beside = information(pairs, "same_place", 2)
    assert beside is not None
    assert beside.item() == pytest.approx(told.item())
    assert information(pairs, "inside", 16) is None


def test_information_of_a_constant_latent_is_nothing() -> None:
    pairs = Pairs(1, (1,))
    pairs.add(*codes_of(torch.ones(2, 8)))
    told = information(pairs, "inside", 1)
    assert told is not None
    assert told.item() == 0.0


def test_pairs_of_blocks_add_up_and_keep_documents_apart() -> None:
    sae, batches = sae_of(), batches_of()
    pairs, plain = Pairs(12, (1, 3), blocked=3), Pairs(12, (1, 3))
    for batch in batches:
        pairs.add(sae.encode(batch).detach(), batch)
        plain.add(sae.encode(batch).detach(), batch)
    apart = pairs.by["inside", 3]
    whole, n = plain.by["inside", 3].whole()
    assert torch.allclose(apart.sums.sum(1), whole)
    assert float(apart.n.sum()) == n
    first = batches[0].doc[0, 4]  # the longer document of the first row
    block = pairs.documents[int(first)]
    rows = torch.cat([sae.encode(batch).detach()[batch.valid & (batch.doc == first)] for batch in batches]).double()
    assert torch.allclose(pairs.mass[block], rows.sum(0))
    assert pairs.tokens[block] == len(rows)


def test_mass_weighted_mean_by_hand() -> None:
    rho, mass = (torch.tensor(values, dtype=torch.float64) for values in ([0.2, 0.4, 0.8], [0.5, 0.25, 0.25]))
    assert mass_weighted(rho, mass) == pytest.approx(0.4)
    assert mass_weighted(rho, mass, slice(1, None)) == pytest.approx(0.6)


def curve(values: dict[int, float], null: float) -> Persistence:
    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    rho, nulls = {lag: one(value) for lag, value in values.items()}, {lag: one(null) for lag in values}
    return Persistence(rho, nulls, nulls, dict.fromkeys(values, 1), one(0.1), one(1.0))


def test_correlation_time_is_interpolated() -> None:
    # half of .8 lies between .5 at 2 and .3 at 4, in the middle
    assert correlation_time(curve({1: 0.8, 2: 0.5, 4: 0.3}, 0.0)).value == pytest.approx(3.0)


def test_correlation_time_says_why_there_is_none() -> None:
    long, noise = correlation_time(curve({1: 0.8, 2: 0.7, 4: 0.6}, 0.0)), correlation_time(curve({1: 0.1, 2: 0}, 0.06))
    assert (long.value, noise.value) == (None, None)
    assert long.reason == "ρ is still above half of ρ(1) at the longest lag, 4"
    assert "ρ(1) is within its null" in noise.reason
    alone = curve({1: 0.8, 2: 0.1}, 0.0)
    assert "none of different documents" in correlation_time(dataclasses.replace(alone, null={})).reason
