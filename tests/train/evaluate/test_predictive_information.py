"""What 32 lower latents foretell, on codes where that is known; logistic regression against a plain optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.codes import elsewhere
from train.evaluate.logistic import cross_entropy, fit_logistic
from train.evaluate.predictive_information import (
    MOST_SILENT,
    cases_of,
    drawn,
    predictive_information,
    terms_of,
)


def test_fit_is_that_of_a_plain_optimiser() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3))
    y = (x @ [1.0, -2.0, 0.0] + generator.normal(size=60) > 0.5).astype(float)
    weight = generator.integers(1, 4, 60).astype(float)

    def loss(found: np.ndarray) -> float:
        return float((weight * cross_entropy(x @ found[:-1] + found[-1], y)).sum() + 0.5 * (found[:-1] ** 2).sum())

    plain = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    assert fit_logistic(x, y, weight) == pytest.approx(plain.x, abs=1e-3)


def test_fit_of_separated_classes_ends() -> None:
    x = np.concatenate([np.full(50, -1.0), np.full(50, 1.0)])[:, None] * 100
    found = fit_logistic(x, (x[:, 0] > 0).astype(float), np.ones(100))
    assert np.isfinite(found).all()
    assert cross_entropy(x[:, 0] * found[0] + found[1], (x[:, 0] > 0).astype(float)).max() < 0.01


def example() -> np.ndarray:
    """Upper latent 10 is on with any of 0, 1 and 2; 11 with 3 in two of three cases; 12 by itself."""
    values = independent(6000, 13, 0.1)
    values[:, 3] = values[:, 3] > 0
    values[:, 10] = values[:, :3].sum(1)
    values[:, 11] = values[:, 3] * (np.random.default_rng(1).random(6000) < 2 / 3)
    return values


def test_sums_are_foretold_in_full_and_chance_not_at_all() -> None:
    codes, lower = codes_of(example()), np.arange(10)
    # not 1: the penalty holds the coefficients of 3,000 tokens back
    assert predictive_information(codes, lower, np.array([10])).share > 0.93
    assert predictive_information(codes, lower, np.array([12])).share < 0.01
    # b with 3 in 2/3 of cases: H(b | 3) = .1 · h(2/3), H(b) = h(.0667)
    share = 1 - 0.1 * 0.9183 / 0.3534
    found = predictive_information(codes, lower, np.array([11]))
    assert found.share == pytest.approx(share, abs=0.03)
    assert found.bits == pytest.approx(share * 0.3534, abs=0.02)
    bits, shares = found.intervals()
    assert bits is not None
    assert shares is not None
    assert shares[0] < found.share < shares[1]


def test_shuffled_tokens_foretell_nothing() -> None:
    codes = codes_of(example())
    found = predictive_information(codes, np.arange(10), np.array([10, 11]), order=elsewhere(codes.document, 0))
    assert found.share < 0.01


def test_few_of_many_upper_latents_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    values = example()
    codes = codes_of(np.concatenate([values, values[:, 10:11], values[:, 10:11]], axis=1))
    every = predictive_information(codes, np.arange(10), np.array([10, 13, 14]))
    monkeypatch.setattr("train.evaluate.predictive_information.MOST_UPPER", 1)
    one = predictive_information(codes, np.arange(10), np.array([10, 13, 14]))
    assert one.terms.shape[1] == 1
    assert one.bits == pytest.approx(every.bits, rel=0.01)  # all three are the same


def test_cases_stand_for_all_tokens() -> None:
    codes = codes_of(independent(500, 4, 0.05))
    active = codes.values[:, [3]].toarray()[:, 0] > 0
    cases = cases_of(codes.values, np.array([0, 2]), active, np.ones(500))
    dense = codes.values.toarray()
    rows = np.flatnonzero((dense[:, [0, 2]] > 0).any(1))
    assert cases.tokens.tolist() == rows.tolist()
    assert np.array_equal(cases.x, np.concatenate([dense[rows][:, [0, 2]], np.zeros((2, 2))]))
    assert cases.weight.sum() == 500
    assert (cases.weight * cases.y).sum() == active.sum()
    loss = np.random.default_rng(0).random(len(rows) + 2)
    every = np.array(
        [loss[list(rows).index(t)] if t in rows else loss[-1] if active[t] else loss[-2] for t in range(500)]
    )
    by_hand = [[every[codes.document == d].sum(), active[codes.document == d].sum(), 50] for d in range(10)]
    assert terms_of(loss, cases, active, codes.document) == pytest.approx(np.array(by_hand))


def test_drawn_tokens_have_the_weight_of_all() -> None:
    active = np.arange(20_000) % 40 == 0
    weight = drawn(active, np.random.default_rng(0))
    assert (weight[active] == 1).all()
    assert (weight[~active] > 0).sum() == MOST_SILENT
    assert weight.sum() == pytest.approx(20_000)
