"""Tokens as text: spelling, and what characters lie in, marked by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from common.sources import find_model
from common.tokenizers import ByteTokenizer, HfTokenizer, Tokenizer, load_tokenizer
from train.evaluate.text import (
    COMMENT,
    DOCSTRING,
    STRING,
    WORD,
    Document,
    bracket_depth,
    indentation,
    inside,
    is_python,
    kinds_of,
    spell,
    words_into_sentence,
)

PYTHON = '''class Barn(Base):
    """Holds "grain", and isn't # full.

    Much of it."""

    def fill(self, sacks=("a#b", 2)):
        # it's done
        return f'{self.sacks}'
'''


def sentencepiece_like(folder: Path) -> Tokenizer:
    """A tokenizer whose decoder takes the space before the first word away, as Llama's does."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁a": 1, "▁the": 2, "▁barn": 3, "s": 4, ".": 5}
    raw = Raw(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


def test_pieces_add_up_to_the_text() -> None:
    tokenizer = load_tokenizer(find_model("demo"), 4096)
    ids = tokenizer.encode([PYTHON])[0].tolist()
    spelled = spell(tokenizer, ids)
    assert "".join(spelled[token] for token in ids) == PYTHON
    assert spell(ByteTokenizer(256), [10, 65]) == {10: "\n", 65: "A"}


def test_a_space_that_decoding_alone_takes_away_is_kept(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    assert tokenizer.decode([2]) == "the"
    assert spell(tokenizer, [2, 4]) == {2: " the", 4: "s"}


def groups(kind: np.ndarray, which: int, text: str) -> list[str]:
    """The pieces of text of one kind."""
    marks = "".join("1" if k == which else "0" for k in kind)
    return [text[found.start() : found.end()] for found in re.finditer("1+", marks)]


def test_strings_docstrings_and_comments_are_told_apart() -> None:
    kind = kinds_of(PYTHON)
    assert groups(kind, DOCSTRING, PYTHON) == ['"""Holds "grain", and isn\'t # full.\n\n    Much of it."""']
    assert groups(kind, STRING, PYTHON) == ['"a#b"', "'{self.sacks}'"]
    assert groups(kind, COMMENT, PYTHON) == ["# it's done"]


@pytest.mark.parametrize(
    ("text", "which", "expected"),
    [
        ("x = '''cut here", DOCSTRING, ["'''cut here"]),
        ("x = 'open\ny = 2", STRING, ["'open"]),
        (r"x = 'a\'b' + c", STRING, [r"'a\'b'"]),
        ('x = """a\\"""b""" + c', DOCSTRING, ['"""a\\"""b"""']),
        ('x = "" + d', STRING, ['""']),
    ],
)
def test_quotes_that_are_odd(text: str, which: int, expected: list[str]) -> None:
    assert groups(kinds_of(text), which, text) == expected


def test_python_is_told_from_prose() -> None:
    assert is_python(PYTHON)
    assert not is_python("It isn't Python.\nIf you import grain, class matters.\n" * 5)
    assert not is_python("")
    for line in (
        "def of(self):",
        "class Grain:",
        "\t@cached",
        "  import a.b, c ",
        "self.x += 1",
        "else:",
        "return (1)\r",
    ):
        assert is_python(line)
    for line in ("define of(", "class of 1984", "a@b", "import a; grain", "self.x", "return to sender."):
        assert not is_python(line)
    prose = Document.of(["It ", "isn't"])
    assert not prose.python
    assert not prose.kind.any()


def test_tokens_begin_at_their_first_letter() -> None:
    document = Document.of(["ab", "  cd", "\n ", "", "e"])
    assert document.start.tolist() == [0, 2, 6, 8, 8]
    assert document.anchor.tolist() == [0, 4, 6, 8, 8]
    assert document.at(np.arange(1, 10)).tolist() == [1, 5, 7, 9, 9]
    assert Document.of(["a", ""]).at(np.array([7])).tolist() == [7, 0]  # nothing is there


def test_brackets_in_strings_do_not_count() -> None:
    text = "f(a[1], '(', {}) )x"
    depth = "0011221111111121000"  # open before each character: the closing one is still inside
    assert "".join(str(value) for value in bracket_depth(text, kinds_of(text))) == depth


def test_indentation_is_that_of_the_line() -> None:
    assert indentation("a\n  b\n\n\tc").tolist() == [0, 0, 2, 2, 2, 2, 0, 8, 8]


def test_words_are_counted_from_the_beginning_of_the_sentence() -> None:
    text = "One two.\nThree (4.5) five\n\nSix"
    begins = [match.start() for match in WORD.finditer(text)]
    assert words_into_sentence(text, np.zeros(len(text)))[begins].tolist() == [0, 1, 0, 1, 2, 3, 0]


def test_docstrings_and_comments_begin_sentences_and_comments_go_on() -> None:
    text = 'x\n"""One two. Three"""\ny # Four\n# five\nz\n# Six'
    begins = [match.start() for match in WORD.finditer(text)]
    words = [0, 0, 1, 0, 1, 0, 1, 2, 0]  # of x, One, two, Three, y, Four, five, z, Six
    assert words_into_sentence(text, kinds_of(text))[begins].tolist() == words


def test_matches_are_numbered() -> None:
    assert inside("ab ab", re.compile("a(b)"), 1).tolist() == [0, 1, 0, 0, 2]
