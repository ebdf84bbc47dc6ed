"""Documents packed into sequences of exactly `context` tokens, with the document of every position.

Packing as SAEBench does it (`docs/store.md`): BOS first in each sequence; a BOS between documents, never two in
a row; a document cut by the end of a sequence goes on in the next one, after that one's own BOS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.corpus import Corpus
from common.encoding import encoded
from common.layout import PADDING
from common.tokenizers import Tokenizer


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus the next token comes from.

    Attributes:
        document: number of the document.
        offset: tokens of it already used; 0 means that it has not begun.
    """

    document: int = 0
    offset: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"document": self.document, "offset": self.offset}


@dataclass(frozen=True)
class Sequences:
    """Finished sequences.

    Attributes:
        tokens: int32 [n, context].
        documents: int32 [n, context], the document of each position, -1 for padding.
        cursor: where the next sequence starts.
        dry: the corpus has no more tokens.
    """

    tokens: np.ndarray
    documents: np.ndarray
    cursor: Cursor
    dry: bool


class Packer:
    """Sequences from a corpus, from a cursor on.

    Args:
        bos: id of the separator, or None for models without one.
        pad: id that fills the rest of a sequence in `document` packing; never trained on.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        context: int,
        packing: str,
        bos: int | None,
        cursor: Cursor,
    ) -> None:
        self.context, self.packing, self.bos = context, packing, bos
        self.pad = tokenizer.special[0] if tokenizer.special else 0
        self.cursor = cursor
        self.documents = encoded(corpus.documents(cursor.document), tokenizer, cursor.document)
        self.current: np.ndarray | None = None

    def take(self, n: int) -> Sequences:
        """The next `n` sequences, fewer when the corpus runs dry."""
        tokens = np.full((n, self.context), self.pad, np.int32)
        documents = np.full((n, self.context), PADDING, np.int32)
        fill = self._fill_packed if self.packing == "packed" else self._fill_document
        for row in range(n):
            if not fill(tokens[row], documents[row]):
                return Sequences(tokens[:row], documents[:row], self.cursor, dry=True)
        return Sequences(tokens, documents, self.cursor, dry=False)

    def _load(self) -> bool:
        """Make `current` the document under the cursor; False when the corpus is dry."""
        while self.current is None or self.cursor.offset >= len(self.current):
            if self.current is not None:
                self.cursor = Cursor(self.cursor.document + 1)
            try:
                self.current = next(self.documents)
            except StopIteration:
                self.current = None
                return False
        return True

    def _fill_packed(self, tokens: np.ndarray, documents: np.ndarray) -> bool:
        position = 0
        while position < self.context:
            if not self._load():
                return False  # an unfinished last sequence is left out, as a shorter one would be
            assert self.current is not None
            starts = self.cursor.offset == 0
            due = position == 0 or (starts and tokens[position - 1] != self.bos)
            brings_its_own = self.current[self.cursor.offset] == self.bos
            if self.bos is not None and due and not brings_its_own:
                tokens[position], documents[position] = self.bos, self.cursor.document
                position += 1
            piece = self.current[self.cursor.offset :][: self.context - position]
            tokens[position : position + len(piece)] = piece
            documents[position : position + len(piece)] = self.cursor.document
            position += len(piece)
            self.cursor = Cursor(self.cursor.document, self.cursor.offset + len(piece))
        return True

    def _fill_document(self, tokens: np.ndarray, documents: np.ndarray) -> bool:
        if not self._load():
            return False
        assert self.current is not None
        text = self.current if self.bos is None else np.concatenate([[self.bos], self.current])
        text = text[: self.context]
        tokens[: len(text)], documents[: len(text)] = text, self.cursor.document
        self.cursor = Cursor(self.cursor.document, len(self.current))
        return True
