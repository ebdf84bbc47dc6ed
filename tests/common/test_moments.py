"""Moments against numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.layout import DOCUMENTS, TOKENS, acts_array
from common.store import Store
from tests.conftest import HOOK
from tests.stores import D, filled, header


def test_moments_equal_numpy_over_the_tokens_that_may_be_trained_on(store: Store) -> None:
    n = store.n_sequences
    tokens, documents = store.rows(TOKENS, 0, n), store.rows(DOCUMENTS, 0, n)
    keep = (documents >= 0) & ~np.isin(tokens, store.special_tokens)
    acts = store.rows(acts_array(HOOK), 0, n)[keep].astype(np.float64)
    moments = store.moments(HOOK)
    assert moments.count == keep.sum() < tokens.size
    # float64 sums in another order: about 30,000 additions of 1e-16 relative error each
    assert np.allclose(moments.mean, acts.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(moments.second_moment, (acts**2).mean(0), rtol=1e-12)
    assert moments.max_abs == np.abs(acts).max()
    assert math.isclose(moments.mean_squared_norm, (acts**2).sum(1).mean(), rel_tol=1e-12)
    assert math.isclose(moments.variance, ((acts - acts.mean(0)) ** 2).sum(1).mean(), rel_tol=1e-9)


def test_moments_of_some_chunks_leave_the_others_out(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr")
    acts = values["acts/a"][[*range(4), 8, 9]].astype(np.float64).reshape(-1, D)
    moments = store.moments("a", [2, 0])
    assert moments.count == len(acts)
    assert np.allclose(moments.mean, acts.mean(0), rtol=0, atol=1e-13)


def test_moments_without_a_token_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token of a may be trained on yet"):
        Store.create(tmp_path / "x.zarr", header()).moments("a")
