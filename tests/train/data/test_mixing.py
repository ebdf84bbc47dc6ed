"""Mixing: entropies by hand, and a whole-store pool against one-chunk pools."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import build
from common.store import Store
from train.config import DataConfig
from train.data.mixing import entropy, mixing
from train.data.reader import Batches


def test_entropy_of_equal_and_unequal_shares() -> None:
    assert entropy(np.array([1, 1, 2, 2, 3, 3, 4, 4])) == pytest.approx(2.0)
    assert entropy(np.array([7, 7, 7])) == 0.0
    assert entropy(np.array([0, 0, 0, 1])) == pytest.approx(0.811278, abs=1e-6)  # −¾ log₂ ¾ − ¼ log₂ ¼


def test_a_pool_of_the_whole_store_mixes_better_than_single_chunks(store: Store) -> None:
    whole = Batches.of(store, build(DataConfig, {"pool_tokens": 2**20}, "test"))
    single = Batches.of(store, build(DataConfig, {"pool_tokens": 1}, "test"))
    assert mixing(whole, 256, 1) == pytest.approx(1.0, abs=0.03)
    assert mixing(single, 256, 1) < 0.8
    whole.close()
    single.close()
