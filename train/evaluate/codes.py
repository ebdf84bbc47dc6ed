"""Codes of held-out tokens laid out for questions about structure: documents in two halves, latents by level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

LEAST_DENSITY, LEAST_ACTIVE = 1e-5, 10  # what an alive latent has, whichever is more
MOST_DOCUMENTS = 128  # of a half; more are counted in so many blocks, which bounds every sum that is kept by document
EXCHANGES = 50


@dataclass(frozen=True)
class Codes:
    """n tokens that count; the first half holds every second document, so that the halves are alike.

    Attributes:
        values: float32 [n, latents], compressed by column.
        document: int64 [n], numbered from 0 in the order they lie here; where a half has more than 128 of them, a
            block of neighbouring ones counts as one.
        middle: the first token of the second half.
    """

    values: sparse.csc_array
    document: np.ndarray
    middle: int

    def of(self, latents: np.ndarray) -> Codes:
        """The same tokens with these latents only."""
        return replace(self, values=sparse.csc_array(self.values[:, latents]))

    @property
    def n(self) -> int:
        return len(self.document)

    @property
    def n_documents(self) -> int:
        return int(self.document[-1]) + 1 if self.n else 0

    @property
    def first_documents(self) -> int:
        """Documents in the first half."""
        return int(self.document[self.middle - 1]) + 1 if self.middle else 0

    @property
    def alive(self) -> np.ndarray:
        """Latents active on at least 1e-5 of the tokens, and on ten of them."""
        return np.asarray(np.diff(self.values.indptr) >= max(LEAST_DENSITY * self.n, LEAST_ACTIVE))

    @property
    def density(self) -> np.ndarray:
        """Share of the tokens on which each latent is active [latents]."""
        return np.asarray(np.diff(self.values.indptr) / max(self.n, 1))

    @property
    def second_half(self) -> Codes:
        """The tokens of the second half alone."""
        values = sparse.csc_array(self.values.tocsr()[self.middle :])
        return Codes(values, self.document[self.middle :] - self.first_documents, 0)

    def by_document(self, values: sparse.sparray) -> np.ndarray:
        """Sums over the tokens of each document: [n, columns] -> [documents, columns], float64."""
        ones = np.ones(self.n)
        member = sparse.csr_array((ones, (self.document, np.arange(self.n))), shape=(self.n_documents, self.n))
        sums: np.ndarray = (member @ values.astype(np.float64)).toarray()
        return sums


def halved(values: sparse.csc_array, doc: np.ndarray) -> tuple[Codes, np.ndarray]:
    """Codes [n, latents] laid out in halves, and the order in which their tokens lie now.

    Args:
        doc: the document of each token [n].
    """
    names, ranks = np.unique(doc, return_inverse=True)
    half, place = ranks % 2, ranks // 2  # a document's place in its half
    order = np.lexsort((np.arange(len(doc)), place, half))
    sizes = np.array([(len(names) + 1) // 2, len(names) // 2])
    blocks = np.minimum(sizes, MOST_DOCUMENTS)
    numbers = half * blocks[0] + place * blocks[half] // np.maximum(sizes[half], 1)
    return Codes(sparse.csc_array(values.tocsr()[order]), numbers[order], int((half == 0).sum())), order


def switched(values: sparse.csc_array) -> sparse.csc_array:
    """1 where a code is above 0, float64: for counting."""
    return sparse.csc_array((np.ones(values.nnz), values.indices, values.indptr), shape=values.shape)


def dense_columns(values: sparse.csc_array, rows: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Codes of `latents` on `rows`, float64 [rows, latents]; 0 where a latent's number is -1."""
    place = np.full(values.shape[0], -1, dtype=np.int32)  # of each token among the rows: no search, which took a third
    place[rows] = np.arange(len(rows))
    out = np.zeros((len(rows), len(latents)))
    for column, latent in enumerate(latents):
        if latent < 0:
            continue
        start, stop = values.indptr[latent : latent + 2]
        places = place[values.indices[start:stop]]
        found = places >= 0
        out[places[found], column] = values.data[start:stop][found]
    return out


def active_on(values: sparse.csc_array, latent: int) -> np.ndarray:
    """Whether a latent is active on each token, bool [n]."""
    active = np.zeros(values.shape[0], dtype=bool)
    active[values.indices[values.indptr[latent] : values.indptr[latent + 1]]] = True
    return active


def elsewhere(document: np.ndarray, seed: int) -> np.ndarray:
    """An order of the tokens in which each meets one of another document, where there are enough of them.

    It breaks every dependence between two sets of codes and keeps what each of them is.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(document))
    for _ in range(EXCHANGES):
        same = np.flatnonzero(document[order] == document)
        if not len(same):
            break
        for place, other in zip(same, generator.integers(len(document), size=len(same)), strict=True):
            order[place], order[other] = order[other], order[place]
    return order
