"""Packing, by hand; too little text, and tokens that are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checks import problems
from common.errors import DataError
from common.layout import DOCUMENTS, TOKENS, acts_array
from common.stopping import Stop
from common.store import Store
from harvest.run import harvest
from harvest.tokenize import Cursor, Packer, Sequences
from tests.conftest import HOOK, harvest_config
from tests.harvest.conftest import go, small
from tests.stores import metadata_files, unequal
from tests.warm import WarmServer

BOS, PAD = 90, 90


@dataclass
class Letters:
    """A tokenizer: `a` is 1, `b` is 2, …"""

    bos: int | None = BOS
    special: tuple[int, ...] = (BOS,)
    size: int = 100

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


# ---- the stage --------------------------------------------------------------------------------------------------


def test_harvest_of_a_dry_corpus_says_both_numbers(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)  # with a BOS in each sequence of 32: 32 whole ones
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr")
    message = r"it ran dry at 1,024 tokens, --tokens asked for 1,600\. Say --allow-fewer, or --tokens 1024\."
    with pytest.raises(DataError, match=message):
        go(config)
    with pytest.raises(DataError, match=message):  # what was tokenised stays, and still is not enough
        go(config)
    assert go(config.model_copy(update={"tokens": 1024})).tokens == 1024
    outcome = go(small(tiny_model, tmp_path / "x.txt", tmp_path / "y.zarr", allow_fewer=True))
    assert (outcome.tokens, outcome.sequences) == (1024, 32)
    assert unequal(tmp_path / "x.zarr", tmp_path / "y.zarr") == []


def test_harvest_that_took_fewer_still_refuses_more_unless_allowed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr", allow_fewer=True)
    go(config)
    assert go(config).tokens_harvested_now == 0
    with pytest.raises(DataError, match="it ran dry at 1,024 tokens, --tokens asked for 1,600"):
        go(config.model_copy(update={"allow_fewer": False}))


def test_harvest_of_an_empty_text_leaves_nothing_behind(warm: WarmServer, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n")
    ended = warm.run(
        ["harvest", "run", "--model", str(tiny_model), "--layer", "1", "--corpus", "x.txt", "--out", "out/x.zarr"],
        tmp_path,
    )
    assert ended.code == 4
    assert "not even one sequence of 128 tokens of text in it" in ended.err
    assert not (tmp_path / "out" / "x.zarr").exists()


def test_harvest_extension_that_the_corpus_cannot_fill_leaves_the_store_as_it_was(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)  # 32 sequences of 32
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr", tokens=640)  # 20: the second chunk has 4
    go(config)
    store, metadata = Store.open(config.store_path()), metadata_files(config.store_path())
    before = {array: store.rows(array, 0, 20).tobytes() for array in (TOKENS, DOCUMENTS, acts_array(HOOK))}
    with pytest.raises(DataError, match="it ran dry at 1,024 tokens, --tokens asked for 1,600"):
        go(config.model_copy(update={"tokens": 1600, "layer": (1, 2)}))
    after = metadata_files(config.store_path())
    assert {name: after[name] for name in metadata} == metadata
    store = Store.open(config.store_path())
    assert {array: store.rows(array, 0, 20).tobytes() for array in before} == before
    assert store.usable_chunks(HOOK) == [0, 1]
    assert list(problems(store)) == []
    assert go(config).tokens_harvested_now == 0


def test_the_same_command_restores_a_tokens_file_that_is_gone(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    harvest(harvest_config(tiny_model, texts, out), Stop())
    path = Store.open(out).chunk_path("tokens", 2)
    data = path.read_bytes()
    path.unlink()
    harvest(harvest_config(tiny_model, texts, out), Stop())
    assert path.read_bytes() == data
