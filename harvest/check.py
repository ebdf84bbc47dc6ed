"""What a store says of its data, computed again from the data by another road: zarr-python reads, dask and numpy sum.

Nothing here uses the code that wrote the figures, so that a mistake in one of the two shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.checks import Problem
from common.errors import DataError
from common.layout import (
    DOCUMENTS,
    SUMMARY,
    TOKENS,
    acts_array,
    chunk_arrays,
    norms_array,
    partial_array,
    summary_array,
    token_scales_array,
)
from common.store import Store

SUMS_AGREE = 1e-9  # both roads add float32 values in float64
NORMS_AGREE = 1e-5  # a norm is kept in float32
COUNT, MAX_ABS, NORM_ERROR = 0, 1, 2  # places in what `figures` gives, before the sums
THREADS = 4  # each holds a chunk in float32


def recompute(store: Store) -> Iterator[Problem]:
    """Where the figures in a store are not those of its data: per chunk, and merged."""
    for hook in store.hooks:
        chunks = []
        for chunk in store.usable_chunks(hook):
            arrays = (TOKENS, DOCUMENTS, *chunk_arrays(store.header, hook))
            sizes = {array: store.check_size(array, chunk) for array in arrays}
            wrong = [Problem(array, chunk, what) for array, what in sizes.items() if what]
            yield from wrong
            if not wrong:
                chunks.append(chunk)
        if chunks:
            try:
                found = figures_of(store, hook, chunks)
            except RuntimeError as error:  # of numcodecs
                yield Problem(acts_array(hook), None, f"it cannot be read ({error})")
                continue
            yield from compare_chunks(store, hook, chunks, found)
            yield from compare_merged(store, hook, chunks, found)


def figures_of(store: Store, hook: str, chunks: list[int]) -> np.ndarray:
    """`figures` of each of these chunks, float64 [len(chunks), 3 + 2 * d_model], computed by dask."""
    import dask.array as da

    group = store.zarr()
    arrays = [group[acts_array(hook)], *(group[name] for name in (TOKENS, DOCUMENTS, norms_array(hook)))]
    scales = store.dimension_scales(hook)
    if scales is not None:
        arrays.append(group[token_scales_array(hook)])
    blocks = [da.from_array(array, chunks=array.chunks).blocks[chunks] for array in arrays]
    blocks = [blocks[0], *(block[..., None] for block in blocks[1:])]  # the same axes for all
    width = 3 + 2 * store.d_model(hook)
    found = da.map_blocks(
        figures,
        *blocks,
        special=store.special_tokens,
        scales=scales,
        chunks=((1,) * len(chunks), (1,), (width,)),
        dtype=np.float64,
        meta=np.empty((0, 0, 0)),
    )
    result: np.ndarray = found.compute(scheduler="threads", num_workers=THREADS)
    return result[:, 0]


def figures(
    acts: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray,
    norms: np.ndarray,
    token_scales: np.ndarray | None = None,
    *,
    special: list[int],
    scales: np.ndarray | None,
) -> np.ndarray:
    """Of one chunk, [1, 1, 3 + 2 d]: trainable positions, largest |x|, largest relative error of a norm, Σx, Σx².

    Args:
        acts: [rows, context, d]; the others [rows, context, 1].
    """
    x = acts.astype(np.float32)
    if scales is not None and token_scales is not None:
        x = x * token_scales * scales
    finite = np.isfinite(norms)
    true = np.sqrt(np.einsum("rcd,rcd->rc", x, x, dtype=np.float64))[..., None]
    error = np.where(finite, np.abs(norms - true) / np.maximum(true, 1e-30), true)  # masked: zeros are stored
    kept = x[((documents >= 0) & ~np.isin(tokens, special) & finite)[..., 0]]
    largest = float(np.abs(kept).max(initial=0.0))
    sums = [kept.sum(0, dtype=np.float64), np.einsum("nd,nd->d", kept, kept, dtype=np.float64)]
    return np.concatenate([[len(kept), largest, error.max(initial=0.0)], *sums])[None, None]


def compare_chunks(store: Store, hook: str, chunks: list[int], found: np.ndarray) -> Iterator[Problem]:
    """Each chunk's partial sums, count, largest value and norms."""
    d_model = store.d_model(hook)
    stored = store.zarr()[partial_array(hook)]
    for chunk, row in zip(chunks, found, strict=True):
        facts = store.journal.entries[partial_array(hook), chunk].extra
        for name, says, is_ in (("count", facts["count"], row[COUNT]), ("max_abs", facts["max_abs"], row[MAX_ABS])):
            if not np.isclose(says, is_, rtol=1e-6, atol=0):
                yield Problem(partial_array(hook), chunk, f"{name} {says:,}, but the data gives {is_:,.7g}")
        if not row[NORM_ERROR] <= NORMS_AGREE:
            yield Problem(norms_array(hook), chunk, f"a norm is off by {row[NORM_ERROR]:.1e} of the data's")
        first, second = row[3:].reshape(2, d_model)
        off = sums_apart(stored[chunk], first, second, row[COUNT])
        if not off <= SUMS_AGREE:
            yield Problem(partial_array(hook), chunk, f"the sums are off by {off:.1e} of the data's")


def sums_apart(stored: np.ndarray, first: np.ndarray, second: np.ndarray, count: float) -> float:
    """How far stored sums [2, d] are from Σx and Σx², relative to what a sum of so many values can be."""
    most = np.sqrt(count * second) + 1e-300  # |Σx| ≤ √(n Σx²)
    return float(max((np.abs(stored[0] - first) / most).max(), (np.abs(stored[1] - second) / (second + 1e-300)).max()))


def compare_merged(store: Store, hook: str, chunks: list[int], found: np.ndarray) -> Iterator[Problem]:
    """The summaries of a hook that is complete."""
    if not store.hooks[hook]["summarised"] or len(chunks) < store.n_chunks:
        return
    count = found[:, COUNT].sum()
    if not count:
        raise DataError(f"{store.name}: no token of {hook} may be trained on.")
    first, second = found[:, 3:].sum(0).reshape(2, -1)
    expected: dict[str, Any] = {
        "count": count,
        "mean": first / count,
        "second_moment": second / count,
        "mean_squared_norm": second.sum() / count,
        "max_abs": found[:, MAX_ABS].max(),
    }
    group = store.zarr()
    spread = np.sqrt(second / count)
    for name in SUMMARY:
        says = group[summary_array(hook, name)][:]
        scale = spread if name == "mean" else np.abs(expected[name])
        if not (np.abs(says - expected[name]) <= 1e-6 * scale + 1e-300).all():
            yield Problem(summary_array(hook, name), None, "it is not what the data gives")
