"""Which documents stand for which text."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import build
from common.errors import DataError
from common.tokenizers import ByteTokenizer
from train.config import UnlearnConfig
from train.evaluate.unlearn.passages import Passages
from train.evaluate.unlearn.texts import Text, read_texts

TOKENIZER = ByteTokenizer(257)


def write(folder: Path, texts: list[str]) -> str:
    """A corpus of one file for each text."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return str(folder)


def read(folder: Path, **texts: list[str]) -> dict[str, Text]:
    named = {option: write(folder / option, of_one) for option, of_one in texts.items()}
    return read_texts(build(UnlearnConfig, named, "test"), TOKENIZER, 16, 256)


def documents(half: Passages) -> list[str]:
    return [TOKENIZER.decode(row[:length].tolist()) for row, length in zip(half.tokens, half.lengths, strict=True)]


def held(text: Text) -> list[str]:
    """The documents of both halves."""
    return sorted(documents(text.selection) + documents(text.evaluation))


def test_a_document_counts_once_in_the_first_text_that_has_it(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        forget=["f one", "f two", "f one", "f one"],
        retain=["r one", "f two", "r two", "r three", "r two"],
        also_retain=["a one", "r one", "r three", "a two", "f one"],
    )
    assert held(found["forget"]) == ["f one", "f two"]
    assert held(found["retain"]) == ["r one", "r three", "r two"]
    assert held(found["also_retain"]) == ["a one", "a two"]


def test_what_is_to_be_forgotten_is_nowhere_else_though_it_was_not_read(tmp_path: Path) -> None:
    many = [f"forget number {number}" for number in range(40)]
    named = {"forget": write(tmp_path / "f", many), "retain": write(tmp_path / "r", ["one", "two", *many])}
    found = read_texts(build(UnlearnConfig, named | {"max_tokens": 16}, "test"), TOKENIZER, 16, 256)
    assert len(held(found["forget"])) < 40
    assert held(found["retain"]) == ["one", "two"]


def test_text_that_adds_no_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--also-retain .*: 0 documents with text that no other text has; two are"):
        read(tmp_path, forget=["aa", "bb"], retain=["c d", "e f"], also_retain=["c d", "e f"])
