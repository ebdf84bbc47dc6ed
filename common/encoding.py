"""Documents through the tokenizer, a few at a time, within the memory there is.

A document goes through in one piece: where it could be cut without another id coming out depends on the tokenizer, and
of those without a fixed rule for words (SentencePiece's BPE) nobody can say. So a long one takes memory, which is told
or refused before it is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import psutil

from common.console import format_bytes, say
from common.errors import DataError
from common.tokenizers import Tokenizer

TOGETHER = 64  # documents handed to the tokenizer at once: its threads share them
CHARACTERS_TOGETHER = 2**22  # but no more text than this, unless one document has it
TOLD_FROM = 10**9  # bytes of memory


def encoded(texts: Iterable[str], tokenizer: Tokenizer, first: int = 0) -> Iterator[np.ndarray]:
    """Ids of each document, int64.

    Args:
        first: number of the first document, for messages.

    Raises:
        DataError: a document takes more memory than there is.
    """
    told = False
    for some in together(texts):
        if len(some[0]) > CHARACTERS_TOGETHER:
            told = warn_of_length(some[0], tokenizer, first, told)
        yield from tokenizer.encode(some)
        first += len(some)


def together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents to encode at once; one longer than `CHARACTERS_TOGETHER` is alone."""
    some: list[str] = []
    size = 0
    for text in texts:
        if some and (len(some) == TOGETHER or size + len(text) > CHARACTERS_TOGETHER):
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def warn_of_length(text: str, tokenizer: Tokenizer, number: int, told: bool) -> bool:
    """Say once what memory a long document takes; gives whether it is told now.

    Raises:
        DataError: more than is free.
    """
    size, free = len(text.encode(errors="replace")), psutil.virtual_memory().available
    needed = size * tokenizer.memory_per_byte
    long = f"document {number:,} of the corpus has {format_bytes(size)} of text"
    takes = f"which the tokenizer takes whole, in about {format_bytes(needed)} of memory"
    if needed > free:
        raise DataError(
            f"{long}, {takes}, and {format_bytes(free)} are free. Split it: --separator cuts .txt files into documents."
        )
    if needed > TOLD_FROM and not told:
        say(f"{long}, {takes}")
        return True
    return told
