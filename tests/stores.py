"""Stores of random values, and stores side by side for tests that say "the same bytes"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array, partial_array
from common.store import Store

CONTEXT, CHUNK, D = 8, 4, 6


def array_files(store: Path) -> dict[str, bytes]:
    """Every chunk file of a store: its path inside the store, and its bytes."""
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and "/c/" in file.as_posix()
    }


def metadata_files(store: Path) -> dict[str, bytes]:
    """Every `zarr.json` of a store."""
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in sorted(store.rglob("zarr.json"))}


def unequal(left: Path, right: Path) -> list[str]:
    """Names of the chunk files that one store lacks or that differ between the two."""
    ours, theirs = array_files(left), array_files(right)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def flip_bit(file: Path, offset: int = 0) -> None:
    """Change the lowest bit of one byte."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def header(n_sequences: int = 10, dtype: str = "bfloat16", compression: str | None = None) -> dict[str, Any]:
    return {
        "identity": {"context": CONTEXT, "chunk_sequences": CHUNK, "dtype": dtype, "compression": compression},
        "n_sequences": n_sequences,
        "special_tokens": [0],
        "vocabulary": 50,
        "hooks": {"a": {"d_model": D, "dtype": dtype, "summarised": False}},
    }


def filled(path: Path, **options: Any) -> tuple[Store, dict[str, np.ndarray]]:
    """A finished store of random values, and what was put in it."""
    store = Store.create(path, header(**options))
    generator = np.random.default_rng(0)
    n = store.n_sequences
    values = {
        TOKENS: generator.integers(0, 50, (n, CONTEXT), dtype=np.int32),
        DOCUMENTS: generator.integers(0, 9, (n, CONTEXT), dtype=np.int32),
        acts_array("a"): generator.normal(size=(n, CONTEXT, D)).astype(store.spec(acts_array("a")).numpy_dtype),
        norms_array("a"): generator.normal(size=(n, CONTEXT)).astype(np.float32),
    }
    for chunk in range(store.n_chunks):
        rows = slice(chunk * CHUNK, chunk * CHUNK + store.sequences_in(chunk))
        store.commit([(array, chunk, data[rows], {}) for array, data in values.items()])
        acts = values[acts_array("a")][rows].astype(np.float64).reshape(-1, D)
        sums = np.stack([acts.sum(0), (acts**2).sum(0)])[None]
        facts = {"count": len(acts), "max_abs": float(np.abs(acts).max())}
        store.commit([(partial_array("a"), chunk, sums, facts)])
    store.write_summary()
    return store, values
