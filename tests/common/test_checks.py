"""Every kind of damage has its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.checks import Problem, problems
from common.layout import TOKENS, partial_array, summary_array
from common.places import Bucket, Folder
from common.store import Store
from tests.stores import CHUNK, CONTEXT, filled, flip_bit


def test_problems_of_a_whole_store_are_none(store: Store, tmp_path: Path) -> None:
    assert list(problems(store)) == []
    compressed, _ = filled(tmp_path / "x.zarr", compression="zstd")
    assert list(problems(compressed)) == []


def test_problems_name_token_ids_out_of_range(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    tokens = np.full((CHUNK, CONTEXT), 50, np.int32)
    store.commit([(TOKENS, 1, tokens, {})])
    assert [str(problem) for problem in problems(store)] == [
        "tokens chunk 1: token ids 50 to 50, the vocabulary has 50"
    ]
    store.commit([(TOKENS, 1, -tokens, {})])
    assert [str(problem) for problem in problems(store)] == [
        "tokens chunk 1: token ids -50 to -50, the vocabulary has 50"
    ]


def test_problems_name_values_that_are_not_finite(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr")
    bad = values["acts/a"][:4].copy()
    bad[1, 2, :3] = np.nan
    store.commit([("acts/a", 0, bad, {})])
    assert [str(problem) for problem in problems(store)] == ["acts/a chunk 0: 3 values are not finite"]


def test_problems_name_summaries_that_do_not_hold_the_partial_sums(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    second = store.chunk_path(summary_array("a", "second_moment"), 0)
    values = np.frombuffer(second.read_bytes(), np.float64)
    second.write_bytes((values * (1 + 1e-15)).tobytes())  # summed in another order
    assert list(problems(store)) == []
    second.write_bytes((values * (1 + 1e-9)).tobytes())
    assert [str(problem) for problem in problems(store)] == [
        "moments/a/second_moment: it does not hold the merged partial sums"
    ]
    store.journal.rewrite(drop=[(partial_array("a"), 1)])  # not complete: of an earlier length, perhaps
    assert list(problems(store)) == []


def test_problems_name_altered_and_missing_files(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    flip_bit(store.chunk_path("acts/a", 0))
    store.chunk_path("norms/a", 1).unlink()
    assert sorted(problem.array for problem in problems(store)) == ["acts/a", "norms/a"]


def test_problems_are_none_where_a_harvest_rewrote_a_chunk_meanwhile(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr")
    Store.open(store.path).commit([("norms/a", 1, values["norms/a"][:4] + 1, {})])
    assert list(problems(store)) == []


def test_problems_are_none_while_a_harvest_extends_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    growing = Store.open(store.path)
    growing.header = growing.header | {"n_sequences": 20}
    place = PlaceSeen(growing.place, lambda: list(problems(Store.open(store.path))))
    monkeypatch.setattr(growing, "place", place)
    growing.write_metadata()
    assert place.seen == [[]] * (10 + 4 + 1)  # arrays, groups, the root
    assert list(problems(store)) == []  # opened before


class PlaceSeen:
    """A place that is looked at after each file that is written to it."""

    def __init__(self, place: Folder | Bucket, look: Callable[[], list[Problem]]) -> None:
        self.place, self.look = place, look
        self.seen: list[list[Problem]] = []

    def write(self, name: str, data: bytes) -> None:
        self.place.write(name, data)
        self.seen.append(self.look())
