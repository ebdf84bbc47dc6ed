"""Packing, by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from common.packing import Cursor, Packer, Sequences

BOS, PAD = 90, 90


@dataclass
class Letters:
    """A tokenizer: `a` is 1, `b` is 2, …"""

    bos: int | None = BOS
    special: tuple[int, ...] = (BOS,)
    size: int = 100
    memory_per_byte: int = 8

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(letter) - 96 for letter in text], np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 96) for i in ids)

    def identity(self) -> str:
        return "letters"


@dataclass
class Texts:
    """A corpus of a few strings."""

    texts: list[str]

    def identity(self) -> dict[str, Any]:
        return {}

    def documents(self, start: int = 0) -> Iterator[str]:
        yield from self.texts[start:]


def take(
    texts: list[str],
    n: int,
    context: int,
    packing: str = "packed",
    bos: int | None = BOS,
    cursor: Cursor | None = None,
) -> Sequences:
    words = Letters() if bos is not None else Letters(None, ())
    return Packer(Texts(texts), words, context, packing, bos, cursor or Cursor()).take(n)


def test_packed_puts_bos_first_and_between_and_goes_on_after_a_cut() -> None:
    found = take(["abc", "de", "fghijkl"], 3, 5)
    assert found.tokens.tolist() == [
        [BOS, 1, 2, 3, BOS],  # the second document's BOS is the last token
        [BOS, 4, 5, BOS, 6],
        [BOS, 7, 8, 9, 10],  # the third goes on after this sequence's own BOS
    ]
    assert found.documents.tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 2, 2], [2, 2, 2, 2, 2]]
    assert found.tokens.dtype == found.documents.dtype == np.int32
    assert found.cursor == Cursor(2, 5)
    assert not found.dry


def test_packed_document_that_ends_with_the_sequence_leaves_one_bos() -> None:
    found = take(["abcd", "efgh"], 2, 5)
    assert found.tokens.tolist() == [[BOS, 1, 2, 3, 4], [BOS, 5, 6, 7, 8]]
    assert found.documents.tolist() == [[0] * 5, [1] * 5]


def test_packed_never_has_two_bos_in_a_row() -> None:
    texts = ["abcdefghijklmnop"[: 1 + i % 9] for i in range(200)]
    for context in range(2, 9):
        rows = take(texts, 60, context).tokens
        assert (rows[:, 0] == BOS).all()
        assert not ((rows[:, :-1] == BOS) & (rows[:, 1:] == BOS)).any()


def test_packed_takes_a_bos_of_the_text_for_the_sequences_own() -> None:
    found = take([f"abc{chr(96 + BOS)}defg"], 2, 4)
    assert found.tokens.tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]
    assert found.cursor == Cursor(0, 7)


def test_packed_loses_no_token_and_keeps_their_order() -> None:
    texts = ["abc", "d", "efghijklm", "no", "pqrstuvwxyz"]
    found = take(texts, 20, 4)
    assert found.dry
    kept = found.tokens[found.tokens != BOS].tolist()
    assert kept == [ord(letter) - 96 for letter in "".join(texts)][: len(kept)]
    owners = found.documents[found.tokens != BOS].tolist()
    assert owners == [number for number, text in enumerate(texts) for _ in text][: len(kept)]
    # 26 letters in rows of three, two or (before a BOS in the last place) fewer: less than one row is left over
    assert len(kept) >= 24


def test_packed_without_bos_lays_documents_end_to_end() -> None:
    found = take(["abc", "de", "fgh"], 2, 4, bos=None)
    assert found.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert found.documents.tolist() == [[0, 0, 0, 1], [1, 2, 2, 2]]


def test_packed_leaves_an_unfinished_last_sequence_out() -> None:
    found = take(["abc", "de"], 5, 4)
    assert found.tokens.tolist() == [[BOS, 1, 2, 3]]
    assert found.dry


def test_packed_that_just_fits_is_not_dry() -> None:
    assert not take(["abc"], 1, 4).dry
    assert take([], 1, 4).dry


def test_document_packing_gives_each_its_sequence_cut_or_padded() -> None:
    found = take(["abcdefgh", "ij"], 3, 5, packing="document")
    assert found.tokens.tolist() == [[BOS, 1, 2, 3, 4], [BOS, 9, 10, PAD, PAD]]
    assert found.documents.tolist() == [[0] * 5, [1, 1, 1, -1, -1]]
    assert found.dry


def test_document_packing_without_bos_pads_with_zero() -> None:
    found = take(["abcdef", "ij"], 2, 4, packing="document", bos=None)
    assert found.tokens.tolist() == [[1, 2, 3, 4], [9, 10, 0, 0]]
    assert found.documents.tolist() == [[0] * 4, [1, 1, -1, -1]]


@pytest.mark.parametrize("packing", ["packed", "document"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_packer_from_any_cursor_equals_the_straight_run(packing: str, bos: int | None) -> None:
    texts = ["abcdefghijklmnopqrstuvwxyz"[i % 5 : i % 5 + 1 + i * 7 % 19] for i in range(200)]
    straight = take(texts, 100, 6, packing, bos)
    assert not straight.dry
    cursor, tokens, documents = Cursor(), [], []
    for n in (1, 2, 3, 5, 89):
        piece = take(texts, n, 6, packing, bos, cursor)
        tokens.append(piece.tokens)
        documents.append(piece.documents)
        cursor = Cursor(**piece.cursor.to_json())
    assert np.array_equal(np.concatenate(tokens), straight.tokens)
    assert np.array_equal(np.concatenate(documents), straight.documents)
    assert cursor == straight.cursor
