"""What a run reads of a store, and stores it refuses to read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, StoreError
from common.layout import acts_array
from common.store import Store
from tests.conftest import HOOK
from tests.stores import flip_bit
from tests.train.data.settings import data_config
from train.data.plan import plan_data
from train.data.reader import Batches


def test_a_growing_store_gives_its_committed_chunks_only(own_store: Path) -> None:
    store = Store.open(own_store)
    store.journal.rewrite(drop=[(acts_array(HOOK), chunk) for chunk in (2, 5, 6)])
    growing = Store.open(own_store)
    plan = plan_data(growing, data_config(held_out=0.0), 0, {1})
    assert plan.chunks == (0, 1, 3, 4, 7)
    reader = Batches(growing, plan)
    seen = reader.batch(0, reader.windows_per_pass())
    documents, tokens = (growing.rows(name, 0, growing.n_sequences) for name in ("documents", "tokens"))
    rows = [row for row in range(growing.n_sequences) if row // growing.chunk_sequences in plan.chunks]
    text = ~np.isin(tokens[rows], growing.special_tokens)
    assert np.array_equal(np.sort(seen.doc.flatten().numpy()), np.sort(documents[rows][text]))
    reader.close()


def test_a_store_with_nothing_committed_is_refused(own_store: Path) -> None:
    store = Store.open(own_store)
    store.journal.rewrite(drop=[(acts_array(HOOK), chunk) for chunk in range(8)])
    with pytest.raises(StoreError, match=r"no chunk of .* is harvested yet"):
        plan_data(Store.open(own_store), data_config(), 0, {1})


def test_a_window_longer_than_the_sequences_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="a window of 65 does not fit sequences of 64 tokens"):
        plan_data(store, data_config(), 0, {65})


@pytest.mark.parametrize("array", ["tokens", "documents", f"norms/{HOOK}"])
def test_a_flipped_byte_beside_the_activations_is_named(own_store: Path, array: str) -> None:
    store = Store.open(own_store)
    flip_bit(store.chunk_path(array, 2), 1000)
    with pytest.raises(StoreError, match=f"{array} chunk 2: checksum"):
        plan_data(store, data_config(), 0, {1})


def test_a_missing_chunk_is_named(own_store: Path) -> None:
    store = Store.open(own_store)
    store.chunk_path(acts_array(HOOK), 3).unlink()
    with pytest.raises(StoreError, match=r"chunk 3: the file is missing"):
        plan_data(store, data_config(), 0, {1})


def test_a_truncated_chunk_is_named(own_store: Path) -> None:
    store = Store.open(own_store)
    os.truncate(store.chunk_path(acts_array(HOOK), 3), 1000)
    with pytest.raises(StoreError, match=r"chunk 3: 1,000 bytes, but the journal says 131,072"):
        plan_data(store, data_config(), 0, {1})
