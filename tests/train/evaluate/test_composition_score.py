"""Composition of made-up latents, where what is made of what is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.composition_score import Composition, composition_score, explained, of_like_density, pursuit

LOWER, UPPER = np.arange(32), np.arange(32, 40)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def sums_of_fours(values: np.ndarray | Tensor) -> list[np.ndarray | Tensor]:
    """Upper latent j is made of lower ones 4j to 4j + 3."""
    return [values[4 * j : 4 * j + 4].sum(0) for j in range(8)]


def example(codes_made: bool, rows_made: bool) -> tuple[np.ndarray, Tensor]:
    """32 lower latents and 8 upper ones: codes [4000, 40] and rows [40, 64]."""
    values = independent(4000, 40, 0.1)
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    if codes_made:
        values[:, 32:] = np.stack(sums_of_fours(values.T), axis=1)
    if rows_made:
        rows[32:] = torch.stack(sums_of_fours(unit(rows)))  # type: ignore[arg-type]
    return values, unit(rows)


def test_sums_of_codes_and_rows_score_one_and_random_parts_nothing() -> None:
    values, rows = example(codes_made=True, rows_made=True)
    found = composition_score(codes_of(values), rows, LOWER, UPPER)
    assert float(found.score(found.terms.sum(0))) == 1
    assert found.geometric.numpy() == pytest.approx(np.ones(8), abs=1e-4)
    assert found.functional.numpy() == pytest.approx(np.ones(8), abs=1e-4)
    assert float(found.null.double().mean()) == 0
    assert found.interval() == (1.0, 1.0)
    weights = found.weights.numpy()
    assert all(weights[j, 4 * j : 4 * j + 4] == pytest.approx(np.ones(4), abs=1e-3) for j in range(8))
    assert weights.sum() == pytest.approx(32, abs=0.1)


def test_each_test_fails_where_only_the_other_holds() -> None:
    values, rows = example(codes_made=False, rows_made=True)
    found = composition_score(codes_of(values), rows, LOWER, UPPER)
    assert found.made.all()
    assert not found.passing(found.terms.sum(0)).any()
    values, rows = example(codes_made=True, rows_made=False)
    found = composition_score(codes_of(values), rows, LOWER, UPPER)
    assert found.passing(found.terms.sum(0)).all()
    assert not found.made.any()
    assert float(found.score(found.terms.sum(0))) == 0


def test_rows_in_the_span_of_all_are_held_against_directions_like_them() -> None:
    # more atoms than dimensions: 8 of them explain much of any direction, so that half is no longer enough
    generator = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(300, 8, generator=generator))
    found = composition_score(codes_of(independent(2000, 300, 0.1)), rows, np.arange(290), np.arange(290, 300))
    assert found.threshold > 0.95


def test_score_at_another_level_asks_for_it_in_both_tests() -> None:
    y2, error2 = torch.ones(4, dtype=torch.float64), torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    terms = torch.stack([error2, y2, 0 * y2, y2], dim=-1)[None]  # R² .2, .4, .6, .8
    geometric = torch.tensor([0.9, 0.45, 0.9, 0.6], dtype=torch.float64)
    found = Composition(geometric, 0.4, terms, torch.zeros(4, dtype=torch.bool), torch.zeros(4, 4))
    assert [found.score_at(level) for level in (0.3, 0.5, 0.7)] == [0.75, 0.5, 0]
    assert found.score_at(0.5) == float(found.score(terms.sum(0)))
    assert Composition(geometric, 0.7, terms, found.null, found.weights).score_at(0.3) == 0.25  # chance counts too


def test_pursuit_takes_the_nearest_atom_first_and_fits_all_again() -> None:
    atoms = torch.eye(12, dtype=torch.float64)
    made = unit(torch.tensor([[3.0, 2.0, 1.0] + [0.0] * 9, [-1.0] + [0.0] * 11, [1.0] * 12], dtype=torch.float64))
    assert pursuit(made, atoms).tolist() == pytest.approx([1.0, 0.0, 8 / 12])  # weights ≥ 0; eight atoms


def test_pursuit_is_near_the_best_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(1)
    atoms, directions = (unit(torch.randn(n, 6, generator=generator).double()) for n in (10, 20))
    found = pursuit(directions, atoms)
    for direction, r2 in zip(directions, found, strict=True):
        best = min(
            nnls(atoms[list(chosen)].T.numpy(), direction.numpy())[1] ** 2 for chosen in combinations(range(10), 8)
        )
        assert r2 <= 1 - best + 1e-6
        assert r2 >= 1 - best - 0.1
    own = atoms[torch.tensor([[0, 1], [2, 3]])]
    by_hand = [1 - nnls(own[i].T.numpy(), directions[i].numpy())[1] ** 2 for i in range(2)]
    assert explained(directions[:2], own).numpy() == pytest.approx(np.array(by_hand), abs=1e-6)


def test_random_parts_have_the_density_of_the_chosen_ones() -> None:
    density = np.repeat([0.001, 0.01, 0.1, 0.9], 20)
    chosen = np.array([[0, 1, 25, 79], [41, 42, 43, 44]])
    drawn = of_like_density(chosen, density, np.random.default_rng(0))
    assert np.array_equal(density[drawn], density[chosen])
    for row, others in zip(chosen, drawn, strict=True):
        assert not set(row) & set(others)
        assert len(set(others)) == 4
    few = of_like_density(np.arange(8)[None], np.full(8, 0.1), np.random.default_rng(0))  # nobody else is there
    assert sorted(few[0].tolist()) == list(range(8))
