"""Batches against a slow reference that reads the store row by row."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import StoreError
from common.layout import acts_array
from common.stopping import Stop
from common.store import Store
from harvest.run import harvest
from tests.conftest import HOOK, harvest_config
from tests.stores import flip_bit
from tests.train.data.settings import data_config
from train.data.batch import Batch
from train.data.plan import plan_data
from train.data.reader import Batches, Pool
from train.data.shuffle import key_of, permutation
from train.data.split import held_out_documents

FIELDS = ("x", "doc", "pos", "token", "valid")


@pytest.fixture
def batches(store: Store) -> Iterator[Batches]:
    reader = Batches.of(store, data_config())
    yield reader
    reader.close()


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS) and (
        one.n_valid == other.n_valid
    )


def float_rows(store: Store) -> np.ndarray:
    return store.rows(acts_array(HOOK), 0, store.n_sequences).astype(np.float32)


def plain_order(store: Store, reader: Batches, window: int, pass_number: int) -> list[tuple[int, int]]:
    """(sequence, first position) of every window of a pass, from the store's rows and the bare arithmetic."""
    plan = reader.plan
    order = plan.order(window)
    tokens = store.rows("tokens", 0, store.n_sequences)
    documents = store.rows("documents", 0, store.n_sequences)
    norms = np.linalg.norm(float_rows(store), axis=-1)
    held_out = held_out_documents(plan.n_documents, plan.config.held_out)
    usable = (documents >= 0) & (norms <= plan.max_norm)
    for token in store.special_tokens:
        usable &= tokens != token
    usable &= ~held_out[documents]
    out = []
    for pool in range(order.pools_per_pass):
        windows = []
        for chunk in order.pool_members(pass_number, pool):
            for row in range(chunk * store.chunk_sequences, min((chunk + 1) * store.chunk_sequences, len(tokens))):
                for start in range(0, store.context - window + 1, window):
                    if usable[row, start : start + window].any():
                        windows.append((row, start))
        out += [windows[i] for i in permutation(key_of(order.key, "windows", window, pass_number, pool), len(windows))]
    return out


@pytest.mark.parametrize("window", [1, 8])
def test_batches_equal_a_slow_reference(store: Store, window: int) -> None:
    reader = Batches.of(store, data_config(), seed=3, window=window)
    order = [*plain_order(store, reader, window, 0), *plain_order(store, reader, window, 1)]
    acts = store.rows(acts_array(HOOK), 0, store.n_sequences).astype(np.float32)
    tokens, documents = (store.rows(name, 0, store.n_sequences) for name in ("tokens", "documents"))
    n_windows = 2000 // window  # does not divide a pass: batches straddle pools and passes
    for step in range(len(order) // n_windows):
        batch = reader.batch(step, n_windows, window)
        chosen = order[step * n_windows : (step + 1) * n_windows]
        rows = np.array([[row] * window for row, _ in chosen])
        columns = np.array([range(start, start + window) for _, start in chosen])
        assert np.array_equal(batch.x.float().numpy(), acts[rows, columns])
        assert np.array_equal(batch.token.numpy(), tokens[rows, columns])
        assert np.array_equal(batch.doc.numpy(), documents[rows, columns])
    reader.close()


def test_windows_carry_position_and_validity(store: Store) -> None:
    reader = Batches.of(store, data_config(), window=16)
    documents = store.rows("documents", 0, store.n_sequences)
    held_out = held_out_documents(reader.plan.n_documents, 0.1)
    order = plain_order(store, reader, 16, 0)
    batch = reader.batch(0, 200, 16)
    assert batch.x.shape == (200, 16, 16)
    for number, (row, start) in enumerate(order[:200]):
        for offset in range(16):
            column = start + offset
            first = column
            while first and documents[row, first - 1] == documents[row, column]:
                first -= 1
            assert batch.pos[number, offset] == column - first
            wanted = not held_out[documents[row, column]] and int(batch.token[number, offset]) != 256  # BOS
            assert bool(batch.valid[number, offset]) == wanted
    assert batch.n_valid == int(batch.valid.sum())
    assert batch.n_valid < 200 * 16  # each sequence begins with BOS
    reader.close()


def test_a_pass_gives_every_training_token_once(batches: Batches, store: Store) -> None:
    n = batches.windows_per_pass()
    seen = batches.batch(0, n)
    acts = float_rows(store)
    expected = [acts[row, start] for row, start in plain_order(store, batches, 1, 0)]
    assert bool(seen.valid.all())
    assert np.array_equal(np.sort(seen.x[:, 0].float().numpy(), axis=0), np.sort(np.stack(expected), axis=0))


def test_batches_do_not_depend_on_the_order_of_calls(store: Store, batches: Batches) -> None:
    in_order = [batches.batch(step, 700) for step in range(60)]
    other = Batches.of(store, data_config())
    steps = list(range(60))
    random.Random(0).shuffle(steps)
    assert all(same(other.batch(step, 700), in_order[step]) for step in steps)
    other.close()


def test_seeds_and_passes_give_different_orders(store: Store, batches: Batches) -> None:
    other = Batches.of(store, data_config(), seed=1)
    assert not torch.equal(batches.batch(0, 256).x, other.batch(0, 256).x)
    other.close()
    n = batches.windows_per_pass()
    assert not torch.equal(batches.batch(0, n).x, batches.batch(1, n).x)


def test_reused_buffers_hold_the_same_batches(store: Store, batches: Batches) -> None:
    for step in range(40):
        kept = batches.batch(step, 700)
        assert same(batches.batch(step, 700, reuse=True), kept)


def test_reused_buffers_of_different_windows_do_not_overlap(store: Store) -> None:
    plan = plan_data(store, data_config(), 0, {1, 8})
    reader = Batches(store, plan)
    flat = reader.batch(0, 512, 1, reuse=True)
    before = flat.x.clone()
    reader.batch(0, 64, 8, reuse=True)  # as many rows, at the same step
    assert torch.equal(flat.x, before)
    reader.close()


def test_training_batches_never_hold_a_held_out_token(store: Store, batches: Batches) -> None:
    held_out = torch.from_numpy(held_out_documents(batches.plan.n_documents, 0.1))
    assert held_out.any()
    everything = batches.batch(0, batches.windows_per_pass())
    assert not held_out[everything.doc.flatten().long()].any()
    assert not torch.isin(everything.token, torch.tensor(store.special_tokens)).any()


@pytest.mark.parametrize("window", [1, 8])
def test_held_out_gives_every_held_out_token_and_no_other(store: Store, window: int) -> None:
    reader = Batches.of(store, data_config(), window=window)
    held_out = held_out_documents(reader.plan.n_documents, 0.1)
    documents = store.rows("documents", 0, store.n_sequences)
    tokens = store.rows("tokens", 0, store.n_sequences)
    n_expected = int((held_out[documents] & ~np.isin(tokens, store.special_tokens)).sum())
    given = list(reader.held_out(window, batch_tokens=512))
    assert sum(batch.n_valid for batch in given) == n_expected
    assert all(held_out[batch.doc[batch.valid].numpy()].all() for batch in given)
    reader.close()


def test_held_out_stops_at_the_tokens_asked_for(batches: Batches) -> None:
    assert sum(batch.n_valid for batch in batches.held_out(1, max_tokens=100)) == 100
    assert sum(batch.n_valid for batch in batches.held_out(1, max_tokens=1000, batch_tokens=64)) == 1000


def test_held_out_windows_leave_none_out_before_they_stop(store: Store) -> None:
    reader = Batches.of(store, data_config(held_out=0.5))
    everything = torch.cat([batch.context for batch in reader.held_out(store.context)])
    batches = list(reader.held_out(store.context, max_tokens=1500))
    some = torch.cat([batch.context for batch in batches])
    assert 1500 <= sum(batch.n_valid for batch in batches) < 1500 + store.context
    assert len(some) > -(-1500 // store.context)  # sequences that hold other documents too count for less
    assert torch.equal(some, everything[: len(some)])
    reader.close()


def test_next_pool_is_read_ahead(batches: Batches) -> None:
    batches.batch(0, 10)
    assert (0, 1) in batches._pools
    batches._pools[0, 1].result()
    last = batches.plan.order(1).pools_per_pass - 1
    n = batches.windows_per_pass()
    batches.batch(n - 1, 1)
    assert set(batches._pools) == {(0, last), (1, 0)}


def test_window_lengths_far_apart_keep_their_pools(store: Store) -> None:
    """One at the end of its pass, the other at the start: no pool is read twice."""
    reader = Batches(store, plan_data(store, data_config(), 0, {1, 8}))
    read: list[tuple[int, int]] = []
    load_pool = reader.load_pool

    def noted(pass_number: int, pool: int) -> Pool:
        read.append((pass_number, pool))
        return load_pool(pass_number, pool)

    reader.load_pool = noted  # type: ignore[method-assign]
    far = reader.windows_per_pass(8) // 8 - 5
    for step in range(4):
        reader.batch(step, 64)
        reader.batch(far + step, 8, window=8)
    reader.close()
    assert len(read) == len(set(read))
    assert len(read) >= 4


def test_pools_of_a_window_length_that_is_asked_for_no_more_are_let_go(store: Store) -> None:
    reader = Batches(store, plan_data(store, data_config(), 0, {1, 8}))
    last = reader.plan.order(1).pools_per_pass - 1
    reader.batch(0, 8, window=8)
    for step in (1, 2):
        reader.batch(reader.windows_per_pass() - step, 1)
    assert set(reader._pools) == {(0, last), (1, 0)}
    reader.close()


def test_ranks_that_share_a_batch_read_each_pool_once(store: Store) -> None:
    """The second rank's rows lie behind the first's, and both count those of the whole batch."""
    for rank in (0, 1):
        reader = Batches(store, plan_data(store, data_config(), 0, {8}))
        read: list[tuple[int, int]] = []
        load_pool = reader.load_pool

        def noted(pass_number: int, pool: int, read: list[tuple[int, int]] = read, load_pool: Any = load_pool) -> Pool:
            read.append((pass_number, pool))
            return load_pool(pass_number, pool)  # type: ignore[no-any-return]

        reader.load_pool = noted  # type: ignore[method-assign]
        for step in range(reader.windows_per_pass(8) // 20):
            reader.share(step, 20, 8, rank, 2)
        reader.close()
        assert len(read) == len(set(read))


def test_no_more_than_three_pools_are_open(batches: Batches) -> None:
    for step in range(100):
        batches.batch(step, 700)
        assert len(batches._pools) <= 3


def read_all(reader: Batches) -> None:
    try:
        reader.batch(0, reader.windows_per_pass())
    finally:
        reader.close()


def test_a_flipped_byte_is_named(own_store: Path) -> None:
    store = Store.open(own_store)
    flip_bit(store.chunk_path(acts_array(HOOK), 5), 1000)
    expected = rf"acts/{HOOK} chunk 5: checksum \w+ but the journal says \w+\. Run: harvest verify .* --repair"
    with pytest.raises(StoreError, match=expected):
        read_all(Batches.of(store, data_config()))


@pytest.mark.parametrize("array", ["tokens", "documents", f"norms/{HOOK}", f"acts/{HOOK}"])
def test_a_byte_flipped_after_the_plan_is_named_each_time(own_store: Path, array: str) -> None:
    reader = Batches.of(Store.open(own_store), data_config())
    flip_bit(reader.store.chunk_path(array, 2), 1000)
    pool = next(n for n in range(9) if 2 in reader.plan.order(1).pool_members(0, n))
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{array} chunk 2: checksum"):
            reader.load_pool(0, pool)
    reader.close()


def test_a_chunk_cut_short_after_the_plan_is_named(own_store: Path) -> None:
    reader = Batches.of(Store.open(own_store), data_config())
    os.truncate(reader.store.chunk_path(acts_array(HOOK), 3), 4096)
    with pytest.raises(StoreError, match="chunk 3: 4,096 bytes"):
        read_all(reader)


@pytest.mark.parametrize(
    "how", [{"compression": "zstd"}, {"chunk_sequences": 33}], ids=["compressed", "unaligned chunks"]
)
def test_other_layouts_hold_the_same_tokens(
    how: dict[str, object], tiny_model: Path, texts: Path, tmp_path: Path, store: Store, batches: Batches
) -> None:
    harvest(harvest_config(tiny_model, texts, tmp_path / "other.zarr", tokens=12_000, **how), Stop())
    other = Store.open(tmp_path / "other.zarr")
    reader = Batches.of(other, data_config(held_out=0.0))
    n = reader.windows_per_pass()
    batch = reader.batch(0, n)
    order = plain_order(other, reader, 1, 0)
    acts = float_rows(other)
    assert np.array_equal(batch.x[:, 0].float().numpy(), np.stack([acts[row, start] for row, start in order]))
    # and what the store holds is what the plain layout holds
    assert np.array_equal(acts, float_rows(store)[: len(acts)])
    reader.close()


def test_closing_ends_the_reading_thread(store: Store) -> None:
    reader = Batches.of(store, data_config())
    reader.batch(0, 10)
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 5
    with pytest.raises(RuntimeError, match="after shutdown"):
        reader.batch(0, 10)


def test_pools_hold_the_windows_of_the_key_of_their_pass(store: Store, batches: Batches) -> None:
    order = batches.plan.order(1)
    pool = batches.load_pool(0, 1)
    starts = np.sort(pool.windows[1].numpy())
    of_pool, of_next = (permutation(key_of(order.key, "windows", 1, 0, number), len(starts)) for number in (1, 2))
    assert np.array_equal(pool.windows[1], starts[of_pool])
    assert not np.array_equal(of_pool, of_next)
