"""Moments against numpy."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest

from common import moments as merging
from common.errors import DataError, StoreError
from common.layout import DOCUMENTS, TOKENS, acts_array
from common.moments import in_order
from common.places import Bucket, local_path
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


def test_sums_are_read_side_by_side_and_given_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "READERS", 4)
    monkeypatch.setattr(merging, "TOGETHER", 8)
    met = threading.Barrier(4, timeout=30)  # broken unless four are read at once

    def read(chunk: int) -> np.ndarray:
        met.wait()
        return np.array([chunk])

    assert [int(sums[0]) for sums in in_order(read, range(20), few=3)] == list(range(20))


def test_few_sums_are_read_one_after_another() -> None:
    here = threading.get_ident()

    def read(chunk: int) -> np.ndarray:
        assert threading.get_ident() == here
        return np.array([chunk])

    assert [int(sums[0]) for sums in in_order(read, [5, 2, 9], few=3)] == [5, 2, 9]


def test_chunk_that_cannot_be_read_beside_others_is_its_own_error() -> None:
    def read(chunk: int) -> np.ndarray:
        if chunk == 7:
            raise StoreError("chunk 7: damaged")
        return np.zeros(1)

    with pytest.raises(StoreError, match=r"^chunk 7: damaged$"):
        list(in_order(read, range(9), few=0))


def test_moments_behind_a_url_have_the_bits_of_those_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_MIRRORS", str(tmp_path / "mirrors"))
    threads: set[int] = set()
    fetch = Bucket.local

    def local(self: Bucket, name: str, crc: str) -> Path:
        threads.add(threading.get_ident())
        return fetch(self, name, crc)

    folder, _ = filled(tmp_path / "x.zarr", n_sequences=50)  # 13 chunks
    bucket, _ = filled(local_path("memory://moments/x.zarr"), n_sequences=50)
    monkeypatch.setattr(Bucket, "local", local)
    here, there = folder.moments("a"), Store.open(bucket.path).moments("a")
    assert threads
    assert threading.get_ident() not in threads
    assert there.count == here.count
    assert there.max_abs == here.max_abs
    assert np.array_equal(there.mean, here.mean)
    assert np.array_equal(there.second_moment, here.second_moment)
