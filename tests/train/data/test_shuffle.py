"""The order of batches against a slow plain reference."""

from __future__ import annotations

import random

import numpy as np
import pytest

from train.data.shuffle import BLOCK, Order, hashes, key_of, mix, permutation, shuffled

MASK = 2**64 - 1
PINNED = [2, 6, 0, 3, 1, 5, 7, 4]
PINNED_KEY = 9694555404852838367


def plain_mix(z: int) -> int:
    """splitmix64's finaliser in Python's whole numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unmix(z: int) -> int:
    """The inverse: multiply by the inverse factors, undo the shifts."""

    def unshift(value: int, by: int) -> int:
        result = value
        for _ in range(64 // by):
            result = value ^ (result >> by)
        return result

    z = (unshift(z, 31) * pow(0x94D049BB133111EB, -1, 2**64)) & MASK
    z = (unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & MASK
    return unshift(z, 30)


def test_mix_is_a_bijection_on_samples() -> None:
    values = [0, 1, 2, MASK, *(random.Random(0).getrandbits(64) for _ in range(200))]
    mixed = mix(np.array(values, np.uint64)).tolist()
    assert mixed == [plain_mix(value) for value in values]
    assert [unmix(value) for value in mixed] == values


def test_hashes_are_those_of_splitmix64() -> None:
    # the first outputs of splitmix64 seeded with 0, as published with its reference code
    assert hashes(0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutation_holds_every_number_once(n: int) -> None:
    for key in (0, 1, MASK):
        assert sorted(permutation(key, n).tolist()) == list(range(n))


def test_permutation_keeps_its_pinned_values() -> None:
    # a change here changes the order of every run that was ever begun
    assert permutation(12345, 8).tolist() == sorted(
        range(8), key=lambda i: plain_mix((12345 + (i + 1) * 0x9E3779B97F4A7C15) & MASK)
    )
    assert permutation(12345, 8).tolist() == PINNED
    assert key_of("store", "hook", {"a": 1}, 0) == PINNED_KEY


def test_permutation_differs_between_keys() -> None:
    orders = {tuple(permutation(key, 16).tolist()) for key in range(50)}
    assert len(orders) == 50  # 16! orders: a collision among 50 would be no accident


def test_key_depends_on_every_part() -> None:
    keys = {key_of("s", "h", {}, 0), key_of("s", "h", {}, 1), key_of("s", "i", {}, 0), key_of("t", "h", {}, 0)}
    assert len(keys) == 4
    assert all(0 <= key <= MASK for key in keys)


def slow_windows(order: Order, n_passes: int) -> list[tuple[int, int, int]]:
    """(pass, pool, entry) of every window in the order in which it must come, written out."""
    counts = dict(zip(order.chunks, order.counts, strict=True))
    out = []
    for pass_number in range(n_passes):
        chunks = [order.chunks[i] for i in permutation(key_of(order.key, "chunks", pass_number), len(order.chunks))]
        for pool, start in enumerate(range(0, len(chunks), order.pool_chunks)):
            members = chunks[start : start + order.pool_chunks]
            out += [(pass_number, pool, entry) for entry in range(sum(counts[chunk] for chunk in members))]
    return out


@pytest.mark.parametrize("seed", range(25))
def test_pieces_cover_every_window_once_per_pass(seed: int) -> None:
    draw = random.Random(seed)
    counts = (*(draw.choice([0, 1, 2, 5, 13]) for _ in range(draw.randint(1, 9))), 3)
    chunks = tuple(draw.sample(range(100), len(counts)))
    order = Order(draw.getrandbits(64), chunks, counts, draw.randint(1, 4), 1)
    n_windows = draw.randint(1, 2 * sum(counts))
    expected = slow_windows(order, 3)
    steps = len(expected) // n_windows
    got: list[tuple[int, int, int]] = []
    for step in range(steps):
        batch = [
            (piece.pass_number, piece.pool, entry)
            for piece in order.pieces(step, n_windows)
            for entry in range(piece.start, piece.stop)
        ]
        assert len(batch) == n_windows
        got += batch
    assert got == expected[: steps * n_windows]


def test_pools_hold_every_chunk_once_per_pass_and_passes_differ() -> None:
    order = Order(7, tuple(range(10, 20)), (1,) * 10, 3, 1)
    passes = []
    for pass_number in range(2):
        members = [order.pool_members(pass_number, pool) for pool in range(order.pools_per_pass)]
        assert [len(pool) for pool in members] == [3, 3, 3, 1]
        passes.append([chunk for pool in members for chunk in pool])
        assert sorted(passes[-1]) == list(range(10, 20))
    assert passes[0] != passes[1]


def test_window_lengths_share_pools_and_have_their_own_order() -> None:
    ones, eights = (Order(7, tuple(range(10)), (32,) * 10, 3, window) for window in (1, 8))
    assert ones.pool_members(0, 1) == eights.pool_members(0, 1)
    assert ones.shuffled(0, 1, np.arange(96)).tolist() != eights.shuffled(0, 1, np.arange(96)).tolist()


@pytest.mark.parametrize("n", [0, 1, 5, BLOCK, 2 * BLOCK + 3])
def test_shuffled_values_are_those_at_the_permuted_places(n: int) -> None:
    values = 2 * np.arange(n) + 7
    order = sorted(range(n), key=lambda i: plain_mix((99 + (i + 1) * 0x9E3779B97F4A7C15) & MASK) >> 33)
    assert permutation(99, n).tolist() == order
    assert shuffled(99, values).tolist() == values[order].tolist()
