"""Targets of small texts, labelled by hand."""

from __future__ import annotations

import numpy as np
import pytest

from common.tokenizers import ByteTokenizer
from tests.train.evaluate.samples import sample_of
from train.evaluate.targets import FAST, SLOW, targets_of
from train.evaluate.text import Document
from train.evaluate.topics import topics_of

ONE_ROW = np.zeros(100, np.int64)


def chosen(name: str, pieces: list[str], row: np.ndarray = ONE_ROW) -> tuple[list[str], list[str]]:
    """The pieces where a target says yes, and those it is not asked of."""
    labels = (FAST | SLOW)[name](Document.of(pieces), row[: len(pieces)]).astype(int).tolist()
    assert set(labels) <= {-1, 0, 1}
    pairs = list(zip(pieces, labels, strict=True))
    return [piece for piece, label in pairs if label == 1], [piece for piece, label in pairs if label == -1]


PROSE = [
    "The",
    " barn",
    "s",
    ",",
    " in",
    "\n",
    "19",
    ".5",
    "  ",
    "(",
    "a",
    "[",
    " b",
    "]",
    " c",
    ")",
    " Do",
    "zen",
    ".",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("punctuation", [",", "(", "[", "]", ")", "."]),
        ("number", ["19"]),
        ("capitalised", ["The", " Do"]),
        ("newline", ["\n"]),
        ("space", ["  "]),
        ("continuation", ["s", "zen"]),
        ("function_word", ["The", " in", "a"]),
        ("bracket", ["a", "[", " b", "]", " c", ")"]),
        ("deep_bracket", [" b", "]"]),
        ("next_punctuation", ["s", "  ", "a", " b", " c", "zen"]),
        ("next_newline", [" in"]),
        ("next_word", ["The", ",", "[", "]", ")"]),
    ],
)
def test_fast_targets_of_prose(name: str, expected: list[str]) -> None:
    yes, unasked = chosen(name, PROSE)
    assert yes == expected
    assert unasked == (["."] if name.startswith("next_") else [])


CODE = [
    "class", " Ba", "rn", ":\n", "   ", ' """', "Holds", " the", " grain", ".", '"""', "\n   ", " def", " fill", "(",
    "self", "):", "\n       ", " return", " self", ".", "sa", "cks", ' + "', "if", '"', " ", " #", " for", " now", "\n",
]  # fmt: skip


def test_function_words_are_so_in_any_case() -> None:
    document = Document.of(["Keep", " OFF", " THE", " Grass", " And", " the", " MUD"])
    assert FAST["function_word"](document, np.zeros(7)).tolist() == [False, False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keyword", ["class", " def", " return"]),
        ("definition", [" Ba", "rn", " fill"]),
        ("attribute", ["sa", "cks"]),
        ("string", ["if", '"']),
        ("comment", [" #", " for", " now"]),
        ("docstring", [' """', "Holds", " the", " grain", ".", '"""']),
        ("function_word", [" the", "if", " for"]),
        ("sentence_start", [' """', "Holds", " the", " grain", " #", " for", " now"]),
    ],
)
def test_targets_of_python(name: str, expected: list[str]) -> None:
    yes, unasked = chosen(name, CODE)
    assert yes == expected
    docstring, comment = [' """', "Holds", " the", " grain", ".", '"""'], [" #", " for", " now"]
    if name in ("keyword", "definition", "attribute"):
        assert unasked == [*docstring, "if", '"', *comment]
    elif name == "sentence_start":
        assert unasked == [*CODE[:5], *CODE[11:27], *CODE[30:]]  # all but those two
    else:
        assert unasked == []


def test_code_targets_are_not_asked_of_prose() -> None:
    for name in ("keyword", "definition", "attribute", "string", "comment", "docstring"):
        assert chosen(name, PROSE) == ([], PROSE)


def test_indentation_is_of_eight_columns() -> None:
    assert chosen("indented", ["a", "\n", "        ", "b", "\n", "    ", " c"]) == (["        ", "b", "\n"], [])


def test_first_third_and_distance_from_the_line_break() -> None:
    pieces = [f" w{number}" for number in range(30)]
    pieces[15] = "\n"
    assert chosen("first_third", pieces)[0] == pieces[:10]
    assert chosen("far_in_line", pieces)[0] == [*pieces[12:15], *pieces[27:]]


def test_given_words_were_in_the_sequence_before() -> None:
    pieces = ["Gra", "in", " and", " grain", " barn", " grai", "n", " barn"]
    yes, unasked = chosen("given", pieces)
    assert yes == [" grain", "n", " barn"]
    assert unasked == ["Gra", " and", " grai"]  # only the token that ends the word is asked, and short words are not
    row = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    assert chosen("given", pieces, row)[0] == [" grain"]  # a new sequence has seen nothing


def test_targets_lie_on_the_tokens_of_the_sample() -> None:
    texts = ["The barn. " * 3, "x = 1\nimport os\nclass A:\n    pass\n"]
    token = [byte for text in texts for byte in text.encode()]
    doc = [number for number, text in enumerate(texts) for _ in text]
    found = targets_of(sample_of(token, doc, np.zeros((len(token), 1))), ByteTokenizer(256))
    by_name = {target.name: target for target in found.targets}
    assert list(by_name) == [*FAST, *SLOW]
    assert {target.family for target in found.targets} == {"fast", "slow"}
    capitals = [number for number, byte in enumerate(token) if chr(byte).isupper()]
    assert np.flatnonzero(by_name["capitalised"].labels == 1).tolist() == capitals
    assert (by_name["keyword"].labels[: len(texts[0])] == -1).all()
    assert by_name["keyword"].labels[len(texts[0]) :].tolist().count(1) == len("importclasspass")
    assert list(found.missing) == ["topic"]
    assert "topics need 16 documents, there are 2" in found.missing["topic"]
    assert not found.topic.any()


def test_topics_are_found_and_are_targets_of_documents() -> None:
    words = [["grain", "wheat", "barley"], ["engine", "piston", "wheel"]]
    texts = [" ".join(words[number % 2][(number + step) % 3] for step in range(6)) for number in range(16)]
    topic, reason = topics_of(texts)
    assert reason is None
    assert topic[0] != topic[1]
    assert (topic == np.where(np.arange(16) % 2, topic[1], topic[0])).all()
    token = [byte for text in texts for byte in text.encode()]
    doc = [number for number, text in enumerate(texts) for _ in text]
    found = targets_of(sample_of(token, doc, np.zeros((len(token), 1))), ByteTokenizer(256))
    classes = [target for target in found.targets if target.name.startswith("topic/")]
    assert [target.of_documents for target in classes] == [True, True]
    assert sum(target.labels.astype(int) for target in classes).tolist() == [1] * len(token)  # type: ignore[union-attr]


def test_documents_without_words_or_all_alike_have_topics_that_do_not_fail() -> None:
    assert "three letters" in str(topics_of(["1 2"] * 20)[1])
    assert topics_of(["grain"] * 20)[1] is None
