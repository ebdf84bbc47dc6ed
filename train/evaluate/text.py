"""Tokens as text: what every token spells, and what it lies in: a word, a string, a bracket, a line.

Python is recognised, not parsed: documents are cut where a sample ends, and a scanner is the same under every version
of Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from common.tokenizers import Tokenizer

CODE, STRING, DOCSTRING, COMMENT = range(4)  # what a character lies in; a docstring is any triple-quoted string
LEXED = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<docstring>"{3}(?:\\.|[^\\])*?(?:"{3}|\Z)|'{3}(?:\\.|[^\\])*?(?:'{3}|\Z))
    |(?P<string>"(?:\\.|[^\\"\n])*(?:"|$)|'(?:\\.|[^\\'\n])*(?:'|$))""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
KINDS = {"string": STRING, "docstring": DOCSTRING, "comment": COMMENT}
PYTHON_LINE = re.compile(  # of a line without the spaces around it; no part of it is read twice, however long a line is
    r"def \w+\(.*|class \w.*:|import [\w. ,]+|from [\w.]+ import .*|return .*[\w)\]}\"']|@\w.*"
    r"|(?:if|elif|while|for|with|except)\b.*:|(?:else|try|finally):|self\.\w.*=.*"
)
PYTHON_SHARE = 0.05  # of the lines that hold something
WORD = re.compile(r"\w+")
NAMED = re.compile(r"\b(?:def|class)[ \t]+(\w+)")
ATTRIBUTE = re.compile(r"(?<=[\w)\]}])\.([A-Za-z_]\w*)")
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|\n[ \t]*\n")
TAB = 8


def spell(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """What each token adds to a text that goes on: with the space before it, which a token decoded alone may lose."""
    anchor = [int(token) for token in tokenizer.encode(["a"])[0]]
    before = tokenizer.decode(anchor)
    return {token: tokenizer.decode([*anchor, token]).removeprefix(before) for token in ids}


@dataclass(frozen=True)
class Document:
    """One document's text with what is known of each of its tokens [n] and characters [m].

    Attributes:
        pieces: the tokens' texts.
        text: all of them together.
        start: the character with which each token begins, int64 [n]; m for an empty one at the end.
        anchor: its first character that is no space, else `start`.
        python: whether it looks like Python; if not, everything is `CODE`.
        kind: of each character, int8 [m].
    """

    pieces: list[str]
    text: str
    start: np.ndarray
    anchor: np.ndarray
    python: bool
    kind: np.ndarray

    @classmethod
    def of(cls, pieces: list[str]) -> Document:
        text = "".join(pieces)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        start = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        spaces = np.array([len(piece) - len(piece.lstrip()) for piece in pieces], np.int64)
        anchor = start + np.where(spaces < lengths, spaces, 0)
        python = is_python(text)
        return cls(pieces, text, start, anchor, python, kinds_of(text) if python else np.zeros(len(text), np.int8))

    def at(self, values: np.ndarray) -> np.ndarray:
        """A figure of each character [m] as one of each token [n]: that of its anchor; 0 where there is none."""
        found: np.ndarray = np.append(values, np.zeros(1, values.dtype))[np.minimum(self.anchor, len(values))]
        return found


def is_python(text: str) -> bool:
    """Whether at least one line in twenty is one that only Python has."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return sum(PYTHON_LINE.fullmatch(line) is not None for line in lines) > PYTHON_SHARE * len(lines)


def kinds_of(text: str) -> np.ndarray:
    """What each character of Python lies in, int8 [m]; quotes and # belong to what they open."""
    kind = np.zeros(len(text), np.int8)
    for found in LEXED.finditer(text):
        kind[found.start() : found.end()] = KINDS[str(found.lastgroup)]
    return kind


def inside(text: str, pattern: re.Pattern[str], group: int = 0) -> np.ndarray:
    """Which characters lie in a match: the number of the match, from 1, else 0; int64 [m]."""
    found = np.zeros(len(text), np.int64)
    for number, match in enumerate(pattern.finditer(text), 1):
        found[match.start(group) : match.end(group)] = number
    return found


def bracket_depth(text: str, kind: np.ndarray) -> np.ndarray:
    """Brackets open before each character, int64 [m]; those in strings and comments are text like any other."""
    steps = np.zeros(len(text) + 1, np.int64)
    depth = 0
    for place, character in enumerate(text):
        if kind[place] == CODE and character in "([{":
            depth += 1
        elif kind[place] == CODE and character in ")]}":
            depth = max(depth - 1, 0)
        steps[place + 1] = depth
    return steps[:-1]


def indentation(text: str) -> np.ndarray:
    """Columns before the first letter of each character's line, int64 [m]; 0 in empty lines."""
    found = np.zeros(len(text), np.int64)
    start = 0
    for line in text.splitlines(keepends=True):
        plain = line.expandtabs(TAB)
        found[start : start + len(line)] = len(plain) - len(plain.lstrip()) if plain.strip() else 0
        start += len(line)
    return found


def words_into_sentence(text: str, kind: np.ndarray) -> np.ndarray:
    """Whole words between the beginning of its sentence and each character, int64 [m].

    Sentences begin after others, after empty lines, and with docstrings and comments.
    """
    ended = np.zeros(len(text) + 1, np.int64)
    for word in WORD.finditer(text):
        ended[word.end()] += 1
    before = np.cumsum(ended)
    base = np.zeros(len(text) + 1, np.int64)
    for place in [*(end.end() for end in SENTENCE_END.finditer(text)), *prose_starts(text, kind)]:
        base[place] = before[place]
    return (before - np.maximum.accumulate(base))[:-1]


def prose_starts(text: str, kind: np.ndarray) -> list[int]:
    """Where docstrings and comments begin; a comment on the line after another goes on with it."""
    prose = np.isin(kind, (DOCSTRING, COMMENT)).astype(np.int8)
    edges = np.flatnonzero(np.diff(prose, prepend=0, append=0)).tolist()
    starts, stops = edges[::2], [0, *edges[1::2]]
    goes_on = [
        kind[start] == COMMENT and start > stop > 0 and not text[stop:start].strip() and kind[stop - 1] == COMMENT
        for start, stop in zip(starts, stops, strict=False)
    ]
    return [start for start, on in zip(starts, goes_on, strict=True) if not on]
