"""What probes and proxies look for in tokens: facts of the text alone, for every token yes, no or not applicable.

`fast` targets are syntax: what a token is, what follows it, what it lies in. `slow` ones are discourse: what has to be
remembered from further back. Nothing is learned here but the topics, from the held-out documents themselves.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.tokenizers import Tokenizer
from train.evaluate.sample import Sample, runs_of
from train.evaluate.text import (
    ATTRIBUTE,
    CODE,
    COMMENT,
    DOCSTRING,
    NAMED,
    STRING,
    WORD,
    Document,
    bracket_depth,
    indentation,
    inside,
    spell,
    words_into_sentence,
)
from train.evaluate.topics import topics_of

NOT_APPLICABLE = -1
FIRST_WORDS = 3
INDENTED = 8  # columns
FAR = 12  # tokens since the line began
GIVEN_LETTERS = 4
FUNCTION_WORDS = """
    a an the this that these those and or but nor if then than as at by for from in into of on to with without is are
    was were be been being am do does did has have had will would can could may might shall should must not no it its
    he she they we you i his her their our your who which what when where while there so such
"""
Family = Literal["fast", "slow"]


@dataclass(frozen=True)
class Target:
    """One question about tokens.

    Attributes:
        name: with its class after a slash where there are several.
        labels: 1 yes, 0 no, −1 not applicable: int8 [n].
        of_documents: whether all tokens of a document have one label.
    """

    name: str
    family: Family
    labels: np.ndarray
    of_documents: bool = False


@dataclass(frozen=True)
class Targets:
    """All targets of a sample.

    Attributes:
        topic: of each token, int64 [n]; all 0 where there are too few documents for topics.
        missing: why there are no such targets, by name.
    """

    targets: list[Target]
    topic: np.ndarray
    missing: dict[str, str]


def targets_of(sample: Sample, tokenizer: Tokenizer) -> Targets:
    """Every target on every token of `sample`, in the order of `FAST` and `SLOW`, topics last."""
    spelled = spell(tokenizer, np.unique(sample.token).tolist())
    documents = [Document.of([spelled[int(token)] for token in sample.token[part]]) for part in sample.documents()]
    rows = [sample.row[part] for part in sample.documents()]
    found = []
    for family, questions in (("fast", FAST), ("slow", SLOW)):
        for name, question in questions.items():
            labels = [question(document, row) for document, row in zip(documents, rows, strict=True)]
            found.append(Target(name, family, np.concatenate(labels).astype(np.int8)))  # type: ignore[arg-type]
    topics, reason = topics_of([document.text for document in documents])
    topic = np.repeat(topics, [len(row) for row in rows])
    if reason:
        return Targets(found, topic, {"topic": reason})
    found += [Target(f"topic/{n}", "slow", (topic == n).astype(np.int8), True) for n in np.unique(topics)]
    return Targets(found, topic, {})


# ---- fast ------------------------------------------------------------------------------------------------------------


def stripped(document: Document, test: Callable[[str], bool]) -> np.ndarray:
    """Whether each token, spaces around it taken away, passes; empty ones do not."""
    return np.array([bool(word) and test(word) for word in (piece.strip() for piece in document.pieces)], bool)


def is_punctuation(word: str) -> bool:
    return not any(character.isalnum() or character == "_" for character in word)


def is_number(word: str) -> bool:
    return word[0].isdigit() and all(character.isdigit() or character in "._" for character in word)


def has_newline(document: Document) -> np.ndarray:
    return np.array(["\n" in piece for piece in document.pieces], bool)


def begins_word(document: Document) -> np.ndarray:
    """A space and then a letter."""
    return np.array([piece[:1] == " " and piece[1:2].isalpha() for piece in document.pieces], bool)


def continues_word(document: Document) -> np.ndarray:
    """A token in the middle of a word, which began in an earlier one."""
    text = document.text
    begins = [
        bool(piece) and WORD.match(piece) is not None and start > 0 and WORD.match(text[start - 1]) is not None
        for piece, start in zip(document.pieces, document.start.tolist(), strict=True)
    ]
    return np.array(begins, bool)


def in_word_of(document: Document, words: frozenset[str]) -> np.ndarray:
    """A token whose whole word, of which it may be a part, is one of `words`."""
    found = np.zeros(len(document.text), bool)
    for word in WORD.finditer(document.text):
        if word[0] in words:
            found[word.start() : word.end()] = True
    return document.at(found)


def function_word(document: Document) -> np.ndarray:
    """English, in any case; Python has its own words outside strings and comments."""
    words = frozenset((FUNCTION_WORDS + FUNCTION_WORDS.title() + FUNCTION_WORDS.upper()).split())
    return np.array(in_word_of(document, words) & ~in_code(document))


def in_code(document: Document) -> np.ndarray:
    """Python outside strings and comments."""
    return np.array(document.at(document.kind == CODE) & document.python)


def only_in_code(document: Document, labels: np.ndarray) -> np.ndarray:
    """The labels in Python code, not applicable elsewhere."""
    return np.where(in_code(document), labels, NOT_APPLICABLE)


def only_in_python(document: Document, labels: np.ndarray) -> np.ndarray:
    return labels if document.python else np.full(len(document.pieces), NOT_APPLICABLE)


def in_code_match(document: Document, labels: np.ndarray) -> np.ndarray:
    return only_in_code(document, document.at(labels) > 0)


def in_sentence(document: Document) -> np.ndarray:
    """Among the first three words of a sentence; in Python, of those in docstrings and comments."""
    early = document.at(words_into_sentence(document.text, document.kind)) < FIRST_WORDS
    prose = np.isin(document.at(document.kind), (DOCSTRING, COMMENT)) | (not document.python)
    return np.where(prose, early, NOT_APPLICABLE)


def of_next(labels: np.ndarray) -> np.ndarray:
    """The label of the following token; not applicable to the last."""
    return np.append(labels[1:].astype(np.int8), np.int8(NOT_APPLICABLE))


Question = Callable[[Document, np.ndarray], np.ndarray]  # (document, sequence of each token) -> labels [n]
FAST: dict[str, Question] = {
    "punctuation": lambda d, _: stripped(d, is_punctuation),
    "number": lambda d, _: stripped(d, is_number),
    "capitalised": lambda d, _: stripped(d, lambda word: word[0].isupper()),
    "newline": lambda d, _: has_newline(d),
    "space": lambda d, _: np.array([piece.isspace() and "\n" not in piece for piece in d.pieces], bool),
    "continuation": lambda d, _: continues_word(d),
    "function_word": lambda d, _: function_word(d),
    "keyword": lambda d, _: only_in_code(d, in_word_of(d, frozenset(keyword.kwlist))),
    "definition": lambda d, _: in_code_match(d, inside(d.text, NAMED, 1)),
    "attribute": lambda d, _: in_code_match(d, inside(d.text, ATTRIBUTE, 1)),
    "string": lambda d, _: only_in_python(d, d.at(d.kind) == STRING),
    "comment": lambda d, _: only_in_python(d, d.at(d.kind) == COMMENT),
    "bracket": lambda d, _: d.at(bracket_depth(d.text, d.kind)) >= 1,
    "deep_bracket": lambda d, _: d.at(bracket_depth(d.text, d.kind)) >= 2,
    "indented": lambda d, _: d.at(indentation(d.text)) >= INDENTED,
    "sentence_start": lambda d, _: in_sentence(d),
    "next_punctuation": lambda d, _: of_next(stripped(d, is_punctuation)),
    "next_newline": lambda d, _: of_next(has_newline(d)),
    "next_word": lambda d, _: of_next(begins_word(d)),
}


# ---- slow ------------------------------------------------------------------------------------------------------------


def first_third(document: Document) -> np.ndarray:
    """In the first third of what the sample has of its document."""
    n = len(document.pieces)
    return np.arange(n) * 3 < n


def since_newline(document: Document) -> np.ndarray:
    """Tokens since the last one with a newline, int64 [n]."""
    here = np.arange(len(document.pieces))
    return here - np.maximum.accumulate(np.where(has_newline(document), here, 0))


def given(document: Document, row: np.ndarray) -> np.ndarray:
    """Whether a word of 4 letters or more has been in this sequence before; asked of the tokens that end one."""
    labels = np.full(len(document.pieces), NOT_APPLICABLE, np.int8)
    for part in runs_of(row):
        seen: set[str] = set()
        first = int(document.start[part.start])
        last = int(document.start[part.stop - 1]) + len(document.pieces[part.stop - 1])
        for word in WORD.finditer(document.text, first, last):
            if len(word[0]) < GIVEN_LETTERS or not word[0].isalpha():
                continue
            end = int(np.searchsorted(document.start, word.end() - 1, side="right")) - 1
            labels[end] = word[0].lower() in seen
            seen.add(word[0].lower())
    return labels


SLOW: dict[str, Question] = {
    "docstring": lambda d, _: only_in_python(d, d.at(d.kind) == DOCSTRING),
    "first_third": lambda d, _: first_third(d),
    "far_in_line": lambda d, _: since_newline(d) >= FAR,
    "given": given,
}
ATTRIBUTES = (*FAST, *SLOW)  # topics are not among them: their number depends on the documents
