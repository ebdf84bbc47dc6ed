"""Codes in halves, against plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.codes import LEAST_DENSITY, MOST_DOCUMENTS, dense_columns, elsewhere, halved, switched


def test_halves_hold_every_second_document_in_order() -> None:
    doc = np.repeat([7, 3, 9, 4, 20], [3, 2, 4, 1, 2])
    values = np.arange(12, dtype=np.float32)[:, None] + 1
    codes, order = halved(sparse.csc_array(values), doc)
    # in the order of their numbers: 3, 4, 7, 9, 20; the first, third and fifth make the first half
    assert doc[order].tolist() == [3, 3, 7, 7, 7, 20, 20, 4, 9, 9, 9, 9]
    assert codes.document.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4]
    assert (codes.middle, codes.n, codes.n_documents, codes.first_documents) == (7, 12, 5, 3)
    assert codes.values.toarray()[:, 0].tolist() == (order + 1).tolist()


def test_many_documents_are_counted_in_blocks_within_their_half(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_DOCUMENTS == 128
    monkeypatch.setattr("train.evaluate.codes.MOST_DOCUMENTS", 3)
    doc = np.repeat(np.arange(11), 2)  # 0, 2, … 10 and 1, 3, … 9: six and five
    codes, order = halved(sparse.csc_array(np.ones((22, 1), np.float32)), doc)
    assert doc[order].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    assert codes.document.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2
    assert (codes.n_documents, codes.first_documents) == (6, 3)


def test_alive_latents_fire_on_ten_tokens_and_one_in_a_hundred_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((40, 3))
    values[:10, 0] = values[:9, 1] = 1
    codes = codes_of(values)
    assert codes.alive.tolist() == [True, False, False]
    assert codes.density.tolist() == [0.25, 0.225, 0.0]
    assert (LEAST_DENSITY, codes_of(np.ones((9, 1))).alive.tolist()) == (1e-5, [False])
    monkeypatch.setattr("train.evaluate.codes.LEAST_DENSITY", 0.251)  # as many of more tokens
    assert codes.alive.tolist() == [False, False, False]


def test_sums_by_document_and_columns_are_those_of_the_dense_array() -> None:
    values = independent(400, 5)
    codes = codes_of(values)
    dense = codes.values.toarray().astype(np.float64)
    by_hand = np.stack([dense[codes.document == number].sum(0) for number in range(8)])
    assert codes.by_document(codes.values) == pytest.approx(by_hand)
    rows = np.array([3, 17, 18, 250, 399])
    expected = np.stack([dense[rows, 4], dense[rows, 0], np.zeros(5)], axis=1)
    assert np.array_equal(dense_columns(codes.values, rows, np.array([4, 0, -1])), expected)
    assert np.array_equal(switched(codes.values).toarray(), dense > 0)
    assert np.array_equal(codes.of(np.array([2, 1])).values.toarray(), dense[:, [2, 1]])


def test_elsewhere_is_in_another_document() -> None:
    document = np.repeat(np.arange(6), [30, 5, 1, 20, 8, 2])
    order = elsewhere(document, 0)
    assert sorted(order.tolist()) == list(range(66))
    assert (document[order] != document).all()
    assert np.array_equal(elsewhere(document, 0), order)
    assert not np.array_equal(elsewhere(document, 1), order)
    assert sorted(elsewhere(np.zeros(4, dtype=int), 0).tolist()) == [0, 1, 2, 3]  # nowhere else to go
