"""What is wrong with a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.arrays import decode_chunk
from common.errors import GranaryError
from common.journal import Entry
from common.layout import HEADER, TOKENS, nodes, root, summary_array
from common.store import Store


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a store, named so that a person can find it."""

    array: str
    chunk: int | None
    what: str

    def __str__(self) -> str:
        where = self.array if self.chunk is None else f"{self.array} chunk {self.chunk}"
        return f"{where}: {self.what}"


def problems(store: Store, before_each: Callable[[], None] = lambda: None) -> Iterator[Problem]:
    """Everything wrong: metadata, journal, missing, short and altered chunks, non-finite values, tokens, summaries.

    Chunks that are simply not harvested yet are no problem. `before_each` is called before every chunk.
    """
    yield from check_metadata(store)
    for number in store.journal.damaged_lines:
        yield Problem("journal.jsonl", None, f"line {number} does not match its checksum")
    if store.journal.torn_bytes:
        yield Problem("journal.jsonl", None, f"unfinished last line ({store.journal.torn_bytes} bytes)")
    for entry in store.held():
        before_each()
        wrong = store.check_size(entry.array, entry.chunk)
        if wrong is None:
            wrong = check_content(store, entry)
        if wrong is not None:
            yield Problem(entry.array, entry.chunk, wrong)
    for hook in store.hooks:
        before_each()
        yield from check_summary(store, hook)


def check_metadata(store: Store) -> Iterator[Problem]:
    """The `zarr.json` files that do not say what the header does, which is read anew: a harvest may have changed it."""
    own = parsed(store.place.read("zarr.json"))
    header = own["attributes"][HEADER] if own else store.header
    if own != root(header):
        yield Problem("zarr.json", None, "it is not what its header says")
    for name, expected in nodes(header).items():
        if but_for_length(parsed(store.place.read(f"{name}/zarr.json"))) != but_for_length(expected):
            yield Problem(f"{name}/zarr.json", None, "it is missing, or not what the header says")


def parsed(data: bytes | None) -> dict[str, Any]:
    """An object in JSON; of no file or of anything else an empty one."""
    try:
        value = json.loads(data or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def but_for_length(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without the first axis of an array: a harvest that extends a store writes it before the header."""
    return metadata | {"shape": metadata["shape"][1:]} if metadata.get("shape") else metadata


def check_content(store: Store, entry: Entry) -> str | None:
    """What is wrong with a chunk file of the right length, or None."""
    data = store.read_chunk(entry.array, entry.chunk) or b""
    wrong = store.check_checksum(entry, data)
    if wrong is not None:
        return wrong
    values = decode_chunk(store.spec(entry.array), data)[: entry.sequences]
    if entry.array == TOKENS:
        low, high, size = int(values.min()), int(values.max()), int(store.header["vocabulary"])
        return None if low >= 0 and high < size else f"token ids {low} to {high}, the vocabulary has {size:,}"
    if entry.array.startswith("acts/"):
        bad = int(np.count_nonzero(~np.isfinite(values.astype(np.float32, copy=False))))
        return f"{bad:,} values are not finite" if bad else None
    return None


def check_summary(store: Store, hook: str) -> Iterator[Problem]:
    """The summary arrays that do not hold the merged partial sums.

    They have no line in the journal. While a hook lacks chunks its summaries, if any, are those of an earlier length.
    """
    if not store.hooks[hook]["summarised"] or len(store.usable_chunks(hook)) < store.n_chunks:
        return
    try:
        merged = store.moments(hook).summary()
    except GranaryError:
        return  # damaged partial sums: a problem of their own
    for name, expected in merged.items():
        array = summary_array(hook, name)
        data, spec = store.read_chunk(array, 0), store.spec(array)
        if data is None:
            yield Problem(array, None, "the file is missing")
        elif len(data) != spec.chunk_bytes:
            yield Problem(array, None, f"{len(data):,} bytes, expected {spec.chunk_bytes:,}")
        # sums over dimensions may be taken in another order on another machine
        elif not np.allclose(decode_chunk(spec, data), expected, rtol=1e-12, atol=0):
            yield Problem(array, None, "it does not hold the merged partial sums")
