"""Comparison at equal density, by hand."""

from __future__ import annotations

import pytest
import torch

from train.evaluate.matching import dense_mass, density_matched, mass_by_bin
from train.evaluate.persistence import Persistence, mass_weighted


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
