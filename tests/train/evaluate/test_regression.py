"""Regressions on parts, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.regression import (
    MAX_TOKENS,
    MIN_ACTIVE,
    nonnegative_least_squares,
    often_active,
    r2_of,
    regress,
    rows_for,
)


def test_nonnegative_weights_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 30, 6)), generator.normal(size=(40, 30))
    x[:, :, 5] = 0  # a part that never fires
    x[:20, :, 4] = x[:20, :, 3]  # two that are the same: the sum is known, its shares are not
    gram, cross = (
        torch.from_numpy(x.transpose(0, 2, 1) @ x),
        torch.from_numpy((x.transpose(0, 2, 1) @ y[..., None])[..., 0]),
    )
    found = nonnegative_least_squares(gram, cross).numpy()
    assert (found >= 0).all()
    assert (found[:, 5] == 0).all()
    for i in range(40):
        best = nnls(x[i], y[i])[1]
        assert np.linalg.norm(x[i] @ found[i] - y[i]) == pytest.approx(best, rel=1e-6)


def test_rows_are_active_tokens_and_as_many_others() -> None:
    values = independent(2000, 2, 0.2)
    values[:, 1] = 0
    values[:1600, 1] = 1
    codes = codes_of(values)
    on = codes.values.toarray() > 0
    active, balanced = rows_for(codes, 0, np.random.default_rng(0))
    for few, many, half in ((active.fit, balanced.fit, range(1000)), (active.test, balanced.test, range(1000, 2000))):
        assert few.tolist() == [token for token in half if on[token, 0]]
        assert set(few) <= set(many) <= set(half)
        assert len(many) == len(set(many)) == 2 * len(few)
        assert (np.diff(many) > 0).all()
    half = rows_for(codes, 1, np.random.default_rng(0))[1].fit  # fewer others than active ones
    assert len(half) == 1000


def test_rows_are_at_most_ten_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (MAX_TOKENS, MIN_ACTIVE) == (5000, 20)
    monkeypatch.setattr("train.evaluate.regression.MAX_TOKENS", 30)
    active, balanced = rows_for(codes_of(independent(2000, 1, 0.2)), 0, np.random.default_rng(0))
    assert (len(active.test), len(balanced.test)) == (30, 60)


def test_latents_are_regressed_if_they_fire_in_both_halves() -> None:
    values = np.zeros((1000, 3))
    values[::10, 0] = 1
    values[: 2 * MIN_ACTIVE, 1] = 1  # the first document, all in the first half
    values[::100, 2] = 1
    assert often_active(codes_of(values), np.array([0, 1, 2])).tolist() == [0]


@pytest.mark.parametrize("nonnegative", [False, True])
def test_r2_is_that_of_numpy_on_the_second_half(nonnegative: bool) -> None:
    values = independent(3000, 6, 0.3)
    values[:, 5] = (values[:, 0] * 0.7 + values[:, 1] * 0.4 + 0.3 * values[:, 4]) * (values[:, 3] == 0)
    codes = codes_of(values)
    dense = codes.values.toarray().astype(np.float64)
    rows = rows_for(codes, 5, np.random.default_rng(0))[1]
    parts = np.array([[0, 1, 2, -1]])
    weights, terms = regress(codes, np.array([5]), parts, [rows], nonnegative)
    x, y = dense[:, :3], dense[:, 5]
    if nonnegative:
        slopes, intercept = nnls(x[rows.fit], y[rows.fit])[0], 0.0
    else:
        design = np.concatenate([x[rows.fit], np.ones((len(rows.fit), 1))], axis=1)
        *slopes, intercept = np.linalg.lstsq(design, y[rows.fit])[0]
    errors = y[rows.test] - x[rows.test] @ slopes - intercept
    expected = 1 - (errors**2).sum() / ((y[rows.test] - y[rows.test].mean()) ** 2).sum()
    assert weights[0, :3].numpy() == pytest.approx(np.array(slopes), abs=1e-6)
    assert weights[0, 3] == 0
    assert terms.shape == (30, 1, 4)  # documents of the second half
    assert float(r2_of(terms.sum(0))[0]) == pytest.approx(expected, abs=1e-6)
    assert 0.1 < expected < 0.9


def test_r2_is_0_where_nothing_varies_or_the_fit_is_worse_than_the_mean() -> None:
    sums = torch.tensor([[0.0, 4.0, 4.0, 4.0], [9.0, 8.0, 4.0, 4.0], [1.0, 8.0, 4.0, 4.0]], dtype=torch.float64)
    assert r2_of(sums).tolist() == [0.0, 0.0, 0.75]
