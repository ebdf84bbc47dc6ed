"""Train and held-out documents, and which positions may be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.layout import DOCUMENTS, TOKENS, norms_array
from common.store import Store
from train.data.shuffle import hashes, key_of

NORM_SAMPLE_CHUNKS = 32


def held_out_documents(n_documents: int, share: float) -> np.ndarray:
    """Which documents are held out: bool [n_documents], by a hash of the document's number.

    Not by seed: runs with other seeds are judged on the same documents. At least one document is held out when
    `share` is above 0.

    Raises:
        DataError: a single document cannot be split.
    """
    if share == 0:
        return np.zeros(n_documents, bool)
    if n_documents < 2:
        raise DataError(
            "the store holds one document, so none can be held out. Harvest with more documents "
            "(--separator splits a .txt file), or train with --held-out 0."
        )
    values = hashes(key_of("held-out"), n_documents)
    chosen = values < np.uint64(min(int(share * 2**64), 2**64 - 1))
    chosen[np.argmin(values)] = True
    return chosen


def median_norm(store: Store, hook: str, chunks: list[int]) -> float:
    """Median norm of the activations, over a fixed sample of chunks spread over the store."""
    picked = [chunks[i] for i in np.unique(np.linspace(0, len(chunks) - 1, NORM_SAMPLE_CHUNKS).astype(int))]
    norms = [
        store.map_chunk(norms_array(hook), chunk)[: store.sequences_in(chunk)][basic_mask(store, chunk)]
        for chunk in picked
    ]
    everything = np.concatenate(norms)
    finite = everything[np.isfinite(everything)]
    if not len(finite):
        raise DataError(f"{store.name}: no position of {hook} may be trained on.")
    return float(np.median(finite))


def basic_mask(store: Store, chunk: int) -> np.ndarray:
    """Positions that are text: not padding, not a special token. bool [sequences, context]."""
    rows = store.sequences_in(chunk)
    tokens = store.map_chunk(TOKENS, chunk)[:rows]
    documents = store.map_chunk(DOCUMENTS, chunk)[:rows]
    return (documents >= 0) & ~np.isin(tokens, store.special_tokens)


@dataclass(frozen=True)
class ChunkIndex:
    """What is known of every position of one chunk, flat over its true sequences.

    Attributes:
        documents: int32 [positions].
        tokens: int32 [positions].
        norms: float32 [positions], NaN where a value was masked at harvest.
        train, held_out: bool [positions]; neither where nothing may be trained on.
    """

    documents: np.ndarray
    tokens: np.ndarray
    norms: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def index_chunk(
    store: Store, hook: str, chunk: int, held_out: np.ndarray, max_norm: float, verify: bool = True
) -> ChunkIndex:
    """Masks of one chunk: special tokens, padding, outlier norms (attention sinks) and masked values are neither.

    Raises:
        StoreError: tokens, documents or norms of the chunk are not all there or (with `verify`) do not match their
            checksums.
    """
    rows = store.sequences_in(chunk)
    arrays = (TOKENS, DOCUMENTS, norms_array(hook))
    tokens, documents, norms = (store.map_chunk(array, chunk, verify)[:rows].reshape(-1) for array in arrays)
    usable = (documents >= 0) & ~np.isin(tokens, store.special_tokens) & (norms <= max_norm)
    out = held_out.take(documents, mode="wrap")  # -1 reads the last entry, and is not usable anyway
    return ChunkIndex(documents, tokens, norms, usable & ~out, usable & out)


def windows_in(index: ChunkIndex, wanted: np.ndarray, context: int, window: int, within_document: bool) -> np.ndarray:
    """Starts (flat positions) of the windows with at least one wanted position, int64, in order.

    Windows lie side by side from position 0 of each sequence; what is left at its end belongs to none.
    """
    if window == 1:
        return np.flatnonzero(wanted)
    per_row = context // window
    shape = (-1, context)
    cut = slice(0, per_row * window)
    any_wanted = wanted.reshape(shape)[:, cut].reshape(-1, per_row, window).any(-1)
    if within_document:
        documents = index.documents.reshape(shape)[:, cut].reshape(-1, per_row, window)
        any_wanted &= (documents == documents[..., :1]).all(-1)
    row, number = np.nonzero(any_wanted)
    return row * context + number * window


def positions_in_document(documents: np.ndarray, context: int) -> np.ndarray:
    """Position of each token within its document's part of the sequence: int32 [positions], from 0."""
    rows = documents.reshape(-1, context)
    here = np.arange(context, dtype=np.int32)
    starts = np.ones_like(rows, bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    latest = np.maximum.accumulate(np.where(starts, here, 0), axis=1)
    return (here - latest).reshape(-1).astype(np.int32)
