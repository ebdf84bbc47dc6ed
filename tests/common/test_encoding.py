"""Documents through the tokenizer within the memory there is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from common import encoding
from common.encoding import encoded, together
from common.errors import DataError
from common.sources import find_model
from common.tokenizers import ByteTokenizer, load_tokenizer

TEXTS = ["abc", "d" * 9, "ef", "g", "hi" * 3, "j"]


def test_documents_are_handed_over_by_number_and_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TOGETHER", 2)
    monkeypatch.setattr(encoding, "CHARACTERS_TOGETHER", 8)
    assert list(together(TEXTS)) == [["abc"], ["d" * 9], ["ef", "g"], ["hihihi", "j"]]
    assert list(together([])) == []


def test_ids_are_those_of_each_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHARACTERS_TOGETHER", 8)
    words = load_tokenizer(find_model("demo"), 10**6)
    found = list(encoded(TEXTS, words))
    assert len(found) == len(TEXTS)
    assert all(np.array_equal(ids, words.encode([text])[0]) for ids, text in zip(found, TEXTS, strict=True))


def test_long_documents_are_told_once_and_refused_where_memory_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "CHARACTERS_TOGETHER", 8)
    monkeypatch.setattr(encoding, "TOLD_FROM", 100)
    monkeypatch.setattr("common.encoding.psutil.virtual_memory", lambda: SimpleNamespace(available=200))
    documents = encoded(["a", "b" * 9, "ü" * 10, "d" * 12, "e" * 30], ByteTokenizer(256), first=3)
    assert [len(next(documents)) for _ in range(4)] == [1, 9, 20, 12]
    told = "document 5 of the corpus has 20 B of text, which the tokenizer takes whole, in about 200 B of memory"
    assert capsys.readouterr().err == f"{told}\n"
    with pytest.raises(
        DataError, match=r"^document 7 of .* 30 B .* about 300 B of memory, and 200 B are free\. Split it"
    ):
        next(documents)
