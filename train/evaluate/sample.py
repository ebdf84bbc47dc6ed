"""A bounded sample of held-out tokens with their codes, in memory: for suites that look at tokens again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.sequences import MOST_VALUES, encode_sequences, rows_of
from train.evaluate.subject import Subject

SAMPLE_TOKENS = 50_000  # looked at without --max-tokens


@dataclass(frozen=True)
class Sample:
    """Every token of the held-out documents as they come in the store, special tokens left out; n of them.

    A document may be cut at either end; its tokens lie side by side.

    Attributes:
        token, doc: id and document's number, int64 [n].
        row, column: where in `rows`, int64 [n].
        valid: tokens that count, bool [n]; outliers in norm are text, and nothing else.
        codes: float32 [n, d_sae] in raw units, compressed by column.
        x: activations [n, d_model] in the storage type, on the CPU.
        rows: the whole sequences, special tokens and other documents too: int64 [rows, context].
        doc_rows: their documents, int64 [rows, context].
    """

    token: np.ndarray
    doc: np.ndarray
    row: np.ndarray
    column: np.ndarray
    valid: np.ndarray
    codes: sparse.csc_array
    x: Tensor
    rows: np.ndarray
    doc_rows: np.ndarray

    def documents(self) -> list[slice]:
        """The tokens of each document, in order."""
        return runs_of(self.doc)

    def column_of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that count on which a latent is active, ascending, and its values there."""
        start, stop = self.codes.indptr[latent : latent + 2]
        places, values = self.codes.indices[start:stop], self.codes.data[start:stop]
        counted = self.valid[places]
        return places[counted], values[counted]


def runs_of(values: np.ndarray) -> list[slice]:
    """Slices of equal neighbours."""
    cuts: list[int] = (np.flatnonzero(np.diff(values)) + 1).tolist()
    edges = [0, *cuts, len(values)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def read_sample(subject: Subject) -> Sample:
    """The first held-out tokens of the store, `--max-tokens` of them, else 50,000, in whole sequences.

    Memory is that of their activations and of the codes above 0; nothing [tokens, d_sae] stays.

    Raises:
        DataError: no held-out token.
        Interrupted: asked to stop.
    """
    special = torch.tensor(subject.store.special_tokens, dtype=torch.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    codes, acts, rows, doc_rows = [], [], [], []
    n_rows = 0
    for batch, latents in coded(bounded(subject)):
        doc, token, valid = (part.cpu() for part in (batch.doc.long(), batch.token.long(), batch.valid))
        kept = torch.isin(doc, doc[valid].unique()) & ~torch.isin(token, special)
        at_row, at_column = torch.nonzero(kept, as_tuple=True)
        found = (token[kept], doc[kept], at_row + n_rows, at_column, valid[kept])
        parts.append(tuple(part.numpy() for part in found))
        codes.append(compressed(latents[kept.to(latents.device)]))
        acts.append(batch.x[kept.to(batch.x.device)].cpu())
        rows.append(token.numpy())
        doc_rows.append(doc.numpy())
        n_rows += len(doc)
    if not any(part[-1].any() for part in parts):
        raise DataError("there is no held-out token to look at. Harvest more, or raise --held-out.")
    columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return Sample(
        token=columns[0],
        doc=columns[1],
        row=columns[2],
        column=columns[3],
        valid=columns[4],
        codes=sparse.csc_array(sparse.vstack(codes)),
        x=torch.cat(acts),
        rows=np.concatenate(rows),
        doc_rows=np.concatenate(doc_rows),
    )


def bounded(subject: Subject) -> Subject:
    """The same subject with a limit on its tokens."""
    limit = subject.config.max_tokens or SAMPLE_TOKENS
    return replace(subject, config=subject.config.model_copy(update={"max_tokens": limit}))


@torch.no_grad()
def coded(subject: Subject) -> Iterator[tuple[Batch, Tensor]]:
    """Whole held-out sequences, few at once, with their codes."""
    most = max(MOST_VALUES // (subject.store.context * subject.sae.d_sae), 1)
    for batch in subject.held_out(subject.store.context):
        for start in range(0, len(batch.x), most):
            subject.refuse_when_stopped()
            rows = slice(start, start + most)
            found = encode_sequences(subject.sae, batch, rows)
            yield rows_of(batch, rows, found.valid.shape[1]), found.latents


def compressed(latents: Tensor) -> sparse.csr_array:
    """The codes above 0 [n, d_sae], float32."""
    row, column = torch.nonzero(latents > 0, as_tuple=True)
    values = latents[row, column].float().cpu().numpy()
    starts = np.concatenate([[0], np.cumsum(torch.bincount(row, minlength=len(latents)).cpu().numpy())])
    return sparse.csr_array((values, column.cpu().numpy().astype(np.int32), starts), shape=tuple(latents.shape))
