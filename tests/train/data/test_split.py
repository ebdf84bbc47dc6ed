"""Who is held out, what may be trained on, where windows lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.store import Store
from train.data.split import (
    ChunkIndex,
    held_out_documents,
    index_chunk,
    median_norm,
    positions_in_document,
    windows_in,
)

HOOK = "h"
BOS = 9


def small_store(
    path: Path, tokens: list[list[int]], documents: list[list[int]], norms: list[list[float]] | None = None
) -> Store:
    """A store of one-dimensional activations with these tokens and documents, 2 sequences per chunk."""
    context = len(tokens[0])
    header = {
        "identity": {"context": context, "chunk_sequences": 2, "compression": None},
        "n_sequences": len(tokens),
        "special_tokens": [BOS],
        "vocabulary": 10,
        "hooks": {HOOK: {"d_model": 1, "dtype": "float32", "id": "x", "summarised": False}},
    }
    store = Store.create(path, header)
    for chunk in range(store.n_chunks):
        rows = slice(2 * chunk, 2 * chunk + 2)
        size = np.array(norms[rows] if norms else np.ones((len(tokens[rows]), context)), np.float32)
        store.commit(
            [
                ("tokens", chunk, np.array(tokens[rows], np.int32), {}),
                ("documents", chunk, np.array(documents[rows], np.int32), {}),
                (f"norms/{HOOK}", chunk, size, {}),
                (f"acts/{HOOK}", chunk, size[..., None], {}),
                (f"moments/{HOOK}/partial", chunk, np.zeros((1, 2, 1)), {"count": 1, "max_abs": 1.0}),
            ]
        )
    return store


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_held_out_share_is_near_what_was_asked(share: float) -> None:
    chosen = held_out_documents(20_000, share)
    # a binomial's standard deviation is at most .0036 here; five of them
    assert abs(chosen.mean() - share) < 0.018


def test_held_out_documents_stay_held_out_when_the_store_grows() -> None:
    few, many = held_out_documents(1000, 0.1), held_out_documents(5000, 0.1)
    assert (few == many[:1000]).all()


@pytest.mark.parametrize("n", [2, 3, 10])
def test_held_out_is_never_empty(n: int) -> None:
    chosen = held_out_documents(n, 1e-9)
    assert chosen.sum() == 1


def test_held_out_of_a_single_document_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"one document.*--separator.*--held-out 0"):
        held_out_documents(1, 0.02)
    assert held_out_documents(1, 0.0).tolist() == [False]


def test_index_leaves_out_special_tokens_padding_and_outliers(tmp_path: Path) -> None:
    store = small_store(
        tmp_path / "s.zarr",
        tokens=[[BOS, 1, 2, 3], [4, 5, BOS, 6]],
        documents=[[0, 0, 0, 1], [1, -1, 1, 1]],
        norms=[[1, 1, 50, 1], [1, 1, 1, np.nan]],
    )
    index = index_chunk(store, HOOK, 0, np.array([False, True]), max_norm=10.0)
    # BOS, document 0, outlier, held out | held out, padding, BOS, NaN norm
    assert index.train.tolist() == [False, True, False, False, False, False, False, False]
    assert index.held_out.tolist() == [False, False, False, True, True, False, False, False]
    assert index.tokens.tolist() == [BOS, 1, 2, 3, 4, 5, BOS, 6]


def test_index_has_only_the_true_sequences_of_the_last_chunk(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr", [[1, 2]] * 3, [[0, 0], [0, 0], [1, 1]])
    index = index_chunk(store, HOOK, 1, np.array([False, False]), max_norm=np.inf)
    assert len(index.train) == 2
    assert index.train.all()


def test_median_norm_counts_text_positions_only(tmp_path: Path) -> None:
    store = small_store(
        tmp_path / "s.zarr",
        tokens=[[BOS, 1, 2], [3, 4, 5]],
        documents=[[0, 0, 0], [-1, 1, 1]],
        norms=[[99, 1, 2], [99, 3, np.nan]],
    )
    assert median_norm(store, HOOK, [0]) == 2.0  # of 1, 2, 3


def test_median_norm_of_no_usable_position_is_refused(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr", [[BOS, BOS]], [[0, 0]])
    with pytest.raises(DataError, match="no position of h may be trained on"):
        median_norm(store, HOOK, [0])


def index_of(documents: list[list[int]], wanted: list[list[int]]) -> tuple[ChunkIndex, np.ndarray]:
    docs = np.array(documents, np.int32).reshape(-1)
    mask = np.array(wanted, bool).reshape(-1)
    return ChunkIndex(docs, docs, np.ones(len(docs), np.float32), mask, ~mask), mask


def test_windows_of_one_are_the_wanted_positions() -> None:
    index, wanted = index_of([[0, 0, 0], [0, 0, 0]], [[0, 1, 1], [1, 0, 0]])
    assert windows_in(index, wanted, 3, 1, False).tolist() == [1, 2, 3]


def test_long_windows_lie_side_by_side_in_one_sequence() -> None:
    # context 10, windows of 4: starts 0 and 4 in each row, positions 8 and 9 belong to none
    index, wanted = index_of([[0] * 10, [0] * 10], [[0] * 8 + [1, 1], [1] + [0] * 9])
    assert windows_in(index, wanted, 10, 4, False).tolist() == [10]
    index, wanted = index_of([[0] * 10, [0] * 10], [[1] * 10, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]])
    assert windows_in(index, wanted, 10, 4, False).tolist() == [0, 4, 14]


def test_windows_within_a_document_leave_out_those_across() -> None:
    documents = [[0, 0, 0, 0, 1, 1, 1, 2]]
    index, wanted = index_of(documents, [[1] * 8])
    assert windows_in(index, wanted, 8, 4, True).tolist() == [0]
    assert windows_in(index, wanted, 8, 4, False).tolist() == [0, 4]
    assert windows_in(index, wanted, 8, 2, True).tolist() == [0, 2, 4]


def test_windows_of_eight_agree_with_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    documents = np.sort(draw.integers(0, 6, (5, 27)), axis=1).astype(np.int32)
    wanted = draw.random((5, 27)) < 0.1
    flat = documents.reshape(-1)
    index = ChunkIndex(flat, flat, np.ones(len(flat), np.float32), wanted.reshape(-1), ~wanted.reshape(-1))
    for within in (False, True):
        expected = [
            row * 27 + start
            for row in range(5)
            for start in range(0, 27 - 7, 8)
            if wanted[row, start : start + 8].any()
            and (not within or len(set(documents[row, start : start + 8].tolist())) == 1)
        ]
        assert windows_in(index, wanted.reshape(-1), 27, 8, within).tolist() == expected


def test_positions_in_document_start_anew_with_each_piece() -> None:
    documents = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 0, 2, 3, 3]], np.int32)
    # the second row begins at 0 again although its document goes on
    expected = [0, 1, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1]
    assert positions_in_document(documents.reshape(-1), 6).tolist() == expected
