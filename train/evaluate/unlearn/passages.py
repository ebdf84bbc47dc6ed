"""Texts as rows of tokens: each row a piece of one document, in halves to choose latents on and to be judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.encoding import encoded
from common.tokenizers import Tokenizer
from train.data.batch import Batch

LEAST_DOCUMENTS = 32  # in a half, if there are so many: intervals are over documents


@dataclass(frozen=True)
class Passages:
    """Rows for the model.

    Attributes:
        tokens: int64 [rows, context], padded at the right.
        lengths: int64 [rows], tokens in each row.
        document: int64 [rows], the row's document, from 0.
        special: token ids that count nowhere.
        mixed: a row holds several documents, each begun by a special token.
    """

    tokens: Tensor
    lengths: Tensor
    document: Tensor
    special: tuple[int, ...]
    mixed: bool = False

    @property
    def n_documents(self) -> int:
        return int(self.document[-1]) + 1 if len(self.document) else 0

    @property
    def counted(self) -> Tensor:
        """bool [rows, context]: neither padding nor special."""
        inside = torch.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return inside & ~self._is_special()

    def _is_special(self) -> Tensor:
        return torch.isin(self.tokens, torch.tensor(self.special, dtype=torch.int64))

    @property
    def predicting(self) -> Tensor:
        """bool [rows, context − 1]: counted, and with a next token in the row, whose loss it is."""
        has_next = torch.arange(1, self.tokens.shape[1]) < self.lengths[:, None]
        return self.counted[:, :-1] & has_next

    def of(self, rows: Tensor) -> Passages:
        """Some of the rows, cut to the longest of them."""
        longest = int(self.lengths[rows].max())
        return Passages(self.tokens[rows, :longest], self.lengths[rows], self.document[rows], self.special, self.mixed)

    def batches(self, size: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Row numbers, `size` at a time, rows of like length together; all of them or those in `rows`."""
        rows = torch.arange(len(self.tokens)) if rows is None else rows
        if len(rows):
            yield from rows[torch.argsort(self.lengths[rows], stable=True)].split(size)

    def batch(self, x: Tensor) -> Batch:
        """The rows as an SAE takes them, with activations x [rows, context, d]."""
        places = torch.arange(self.tokens.shape[1]).expand(self.tokens.shape)
        begins = self._is_special() if self.mixed else torch.zeros_like(self.tokens, dtype=torch.bool)
        document = self.document[:, None] * places.shape[1] + begins.cumsum(1)
        since = places - torch.where(begins, places, 0).cummax(1).values
        doc, pos = (values.to(x.device, torch.int32) for values in (document, since))
        return Batch.of(x, doc=doc, pos=pos, valid=self.counted.to(x.device))


def split_halves(
    texts: Iterator[str], tokenizer: Tokenizer, context: int, bos: int | None, max_tokens: int
) -> tuple[Passages, Passages]:
    """Every other document for the choice of latents, the rest to judge them on, about `max_tokens` each.

    Of at least `LEAST_DOCUMENTS` documents a half, where there are so many; rows of a long one are spread over it.
    """
    most = max(max_tokens // LEAST_DOCUMENTS, context)
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    filled = [0, 0]
    for number, tokens in enumerate(encoded(texts, tokenizer)):
        half = number % 2
        if filled[half] < max_tokens:
            halves[half].append(tokens)
            filled[half] += min(len(tokens), most)
        if min(filled) >= max_tokens:
            break
    selection, evaluation = (rows_of(documents, context, bos, tokenizer.special, max_tokens) for documents in halves)
    return selection, evaluation


def rows_of(
    documents: list[np.ndarray], context: int, bos: int | None, special: tuple[int, ...], max_tokens: int
) -> Passages:
    """Documents' tokens as rows, each begun with BOS if there is one, about `max_tokens` in all.

    Where there are more, every document gives up to the same number of rows. A piece in which nothing is predicted is
    left out.
    """
    first = [] if bos is None else [bos]
    size = context - len(first)
    pieces = [
        [tokens[start : start + size] for start in range(0, len(tokens) - 1, size)]  # not a last token alone
        for tokens in documents
        if len(tokens) > 1
    ]
    each = rows_each([len(of_one) for of_one in pieces], -(-max_tokens // size))
    rows = [[*first, *piece.tolist()] for of_one in pieces for piece in spread(of_one, each)]
    owners = [number for number, of_one in enumerate(pieces) for _ in spread(of_one, each)]
    padded = torch.zeros(len(rows), context, dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return Passages(padded, lengths, torch.tensor(owners, dtype=torch.int64), special)


def rows_each(counts: list[int], wanted: int) -> int:
    """The least number n so that documents of `counts` rows, giving up to n each, come to `wanted`; else the most."""
    most = max(counts, default=1)
    return next((n for n in range(1, most) if sum(min(count, n) for count in counts) >= wanted), most)


def spread(pieces: list[np.ndarray], n: int) -> list[np.ndarray]:
    """At most `n` of a document's pieces, evenly from first to last."""
    if len(pieces) <= n:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, n).astype(int)]
