"""The store: one zarr v3 group that both tools agree on. `docs/store.md` is the law, this is its owner.

`common/header.py` reads its header, `common/layout.py` says which arrays there are, `common/arrays.py` what a chunk
file is, `common/journal.py` what is committed, `common/checks.py` what can be wrong.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.arrays import decode_chunk, encode_chunk
from common.errors import DataError, StoreError
from common.files import crc32c, fingerprint, json_bytes, parse_json
from common.header import Described
from common.journal import Entry, Journal
from common.layout import (
    DOCUMENTS,
    FORMAT,
    HEADER,
    PADDING,
    TOKENS,
    acts_array,
    chunk_arrays,
    nodes,
    partial_array,
    root,
    summary_array,
    token_scales_array,
)
from common.moments import Moments, in_order
from common.places import local_path, place_at, url_of
from common.quantise import dequantise

SMALL_CHUNK = 1 << 20  # bytes; chunk files up to this size are read, larger ones mapped

ChunkData = tuple[str, int, np.ndarray, dict[str, Any]]  # array, chunk, rows ≤ chunk_rows of it, facts for the journal


@dataclass(frozen=True)
class Staged:
    """A chunk file whose bytes are safe, under a name that counts for nothing.

    Attributes:
        entry: its line of the journal, once it is published.
        aside: that name, relative to the store.
    """

    entry: Entry
    aside: str


class Store(Described):
    """A store on disk, for reading and (under `common.files.exclusive`) for writing.

    Attributes:
        path: the `.zarr` folder.
        header: the `granary` attributes of the root group; `docs/store.md` lists them.
        journal: what is committed.
    """

    def __init__(self, path: Path, header: dict[str, Any], journal: Journal | None = None) -> None:
        super().__init__(path, header)
        self.place = place_at(path)
        self.journal = journal or Journal(path / "journal.jsonl")
        self._append = threading.Lock()

    # ---- opening and creating -------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open an existing store.

        Raises:
            StoreError: nothing there, not a Granary store, one of a newer format, or with an identity that was changed.
        """
        path = local_path(path)
        name, data = url_of(path) or path, place_at(path).read("zarr.json")
        if data is None:
            raise StoreError(f"{name}: no store here. 'harvest list' shows the stores there are.")
        metadata = parse_json(data, path / "zarr.json")
        attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
        header = attributes.get(HEADER) if isinstance(attributes, dict) else None
        if not isinstance(header, dict):
            raise StoreError(f"{name}: a zarr group, but not one that harvest wrote.")
        if header.get("format") != FORMAT:
            raise StoreError(
                f"{name}: store format {header.get('format')}, this version reads {FORMAT}. Install a newer Granary."
            )
        if header.get("id") != fingerprint(header.get("identity")):
            raise StoreError(f"{name}: zarr.json was changed: the id is not that of the identity. Harvest it again.")
        return cls(path, header)

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether a zarr group is there: a store, or somebody else's."""
        return place_at(path).read("zarr.json") is not None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Store:
        """A new, empty store; the group's metadata is the first thing on disk."""
        path.mkdir(parents=True, exist_ok=True)
        store = cls(path, {"format": FORMAT, "hooks": {}, **header, "id": fingerprint(header["identity"])})
        store.write_metadata()
        return store

    def write_metadata(self) -> None:
        """Write the group and array metadata for the header as it stands, arrays first."""
        for name, metadata in nodes(self.header).items():
            self.place.write(f"{name}/zarr.json", json_bytes(metadata))
        self.place.write("zarr.json", json_bytes(root(self.header)))

    def as_of(self, n_sequences: int) -> Store:
        """The store as it was at an earlier length: what a run that began then goes on reading.

        Extending a store fills up its short last chunk; the sequences that were in it keep their bytes.
        """
        return Store(self.path, self.header | {"n_sequences": min(n_sequences, self.n_sequences)}, self.journal)

    # ---- chunks ---------------------------------------------------------------------------------------------

    def chunk_name(self, array: str, chunk: int) -> str:
        """The chunk file, relative to the store."""
        axes = len(self.spec(array).shape)
        return "/".join([array, "c", str(chunk), *["0"] * (axes - 1)])

    def chunk_path(self, array: str, chunk: int) -> Path:
        """Where the chunk file lies; of a store behind a URL, where it will once `chunk_file` has fetched it."""
        return self.path / self.chunk_name(array, chunk)

    def chunk_file(self, array: str, chunk: int) -> Path:
        """A committed chunk's file, fetched if the store lies behind a URL."""
        return self.place.local(self.chunk_name(array, chunk), self.journal.entries[array, chunk].crc32c)

    def read_chunk(self, array: str, chunk: int) -> bytes | None:
        """The bytes of a chunk file as they are in the store now, or None."""
        return self.place.read(self.chunk_name(array, chunk))

    def committed(self, array: str) -> list[int]:
        """Numbers of the committed chunks of `array` that are up to date, in order."""
        return [
            chunk
            for chunk, entry in self.journal.of(array).items()
            if chunk < self.n_chunks and entry.sequences >= self.sequences_in(chunk)
        ]

    def held(self) -> list[Entry]:
        """Committed chunks, by array and number; tokens that a dry corpus left beyond the length are none of it."""
        known = set(self.array_names())
        return [
            entry
            for (array, chunk), entry in sorted(self.journal.entries.items())
            if array in known and chunk < self.n_chunks
        ]

    def usable_chunks(self, hook: str) -> list[int]:
        """Chunks whose tokens and activations at `hook` are all committed."""
        wanted = (TOKENS, DOCUMENTS, *chunk_arrays(self.header, hook))
        sets = [set(self.committed(array)) for array in wanted]
        return sorted(set.intersection(*sets))

    def commit(self, chunks: Sequence[ChunkData]) -> None:
        """Write chunk files, then one journal append for all. Threads may commit at once.

        Raises:
            StoreError: the disk is full; what was committed before is intact.
        """
        self.publish(self.stage(chunks))

    def stage(self, chunks: Sequence[ChunkData], by: str = "") -> list[Staged]:
        """The first half of a commit: the bytes are safe on disk, but nobody sees them yet.

        Any process may do it, without the lock. Short data is padded with zeros (`documents`: with -1) to the full
        chunk.

        Args:
            by: tells several processes apart that may stage the same chunk.

        Raises:
            StoreError: the disk is full; nothing is left aside.
        """
        staged: list[Staged] = []
        try:
            for array, chunk, data, extra in chunks:
                spec = self.spec(array)
                if len(data) < spec.chunk_rows:
                    padded = np.full(spec.chunk_shape, PADDING if array == DOCUMENTS else 0, spec.numpy_dtype)
                    padded[: len(data)] = data
                    data = padded
                encoded = encode_chunk(spec, data)
                aside = self.place.stage(self.chunk_name(array, chunk), encoded, by)
                crc, rows = crc32c(np.frombuffer(encoded, np.uint8)), self.sequences_in(chunk)
                entry = Entry(
                    array=array, chunk=chunk, crc32c=crc, size_bytes=len(encoded), sequences=rows, extra=extra
                )
                staged.append(Staged(entry, aside))
        except BaseException:
            for item in staged:
                self.place.discard(item.aside)
            raise
        return staged

    def publish(self, staged: Sequence[Staged]) -> None:
        """The second half: each file under its final name, then one journal append for all. Under the lock only."""
        for item in staged:
            self.place.publish(item.aside, self.chunk_name(item.entry.array, item.entry.chunk))
        with self._append:
            self.journal.append(item.entry for item in staged)

    def check_size(self, array: str, chunk: int) -> str | None:
        """What is wrong with a committed chunk file judging by its length alone, or None."""
        return self.wrong_size(array, chunk, self.place.size(self.chunk_name(array, chunk)))

    def wrong_size(self, array: str, chunk: int, size: int | None) -> str | None:
        entry = self.journal.entries[array, chunk]
        if size is None:
            return "the file is missing, but the journal has it"
        if size != entry.size_bytes:
            return f"{size:,} bytes, but the journal says {entry.size_bytes:,}"
        return None

    def map_chunk(self, array: str, chunk: int, verify: bool = False) -> np.ndarray:
        """A committed chunk as an array [chunk_rows, …]: the mapped file; its bytes if it is small or compressed.

        Raises:
            StoreError: not committed, missing, of the wrong length or (with `verify`) not matching its checksum.
        """
        entry = self.journal.entries.get((array, chunk))
        if entry is None:
            raise StoreError(f"{self.name} {array} chunk {chunk}: not harvested yet.")
        path = self.chunk_file(array, chunk)  # its own length, for that of an object costs a listing of the bucket
        wrong = self.wrong_size(array, chunk, path.stat().st_size if path.exists() else None)
        if wrong is not None:
            raise self.damaged(array, chunk, wrong)
        with path.open("rb") as file:
            # a copy of a few hundred kilobytes costs less than the page faults of a mapping
            small = entry.size_bytes <= SMALL_CHUNK
            data = file.read() if small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if verify:
            self.check_bytes(entry, np.frombuffer(data, np.uint8))
        return decode_chunk(self.spec(array), data)

    def check_bytes(self, entry: Entry, data: np.ndarray) -> None:
        """Compare a chunk's bytes with the journal.

        Raises:
            StoreError: they differ.
        """
        wrong = self.check_checksum(entry, data)
        if wrong is not None:
            raise self.damaged(entry.array, entry.chunk, wrong)

    def check_checksum(self, entry: Entry, data: bytes | np.ndarray) -> str | None:
        """What is wrong with a chunk's bytes judging by their checksum, or None."""
        found = crc32c(data)
        if found == entry.crc32c:
            return None
        # a harvest that extends the store may have rewritten the chunk since the journal was read
        fresh = Journal(self.journal.path).entries.get((entry.array, entry.chunk), entry)
        return None if found == fresh.crc32c else f"checksum {found} but the journal says {fresh.crc32c}"

    def damaged(self, array: str, chunk: int, what: str) -> StoreError:
        return StoreError(f"{self.name} {array} chunk {chunk}: {what}. Run: harvest verify {self.name} --repair")

    def rows(self, array: str, start: int, stop: int) -> np.ndarray:
        """Sequences `start` to `stop` of `array`, copied together from as many chunks as it takes.

        Raises:
            DataError: outside the store.
            StoreError: a chunk is not harvested or damaged.
        """
        if not 0 <= start < stop <= self.n_sequences:
            raise DataError(f"{self.name}: sequences {start} to {stop} asked for, there are {self.n_sequences:,}.")
        size = self.chunk_sequences
        pieces = []
        for chunk in range(start // size, (stop - 1) // size + 1):
            first = chunk * size
            pieces.append(self.map_chunk(array, chunk)[max(start - first, 0) : stop - first])
        return np.concatenate(pieces)

    def activations(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Activations of sequences `start` to `stop`, in the storage type; float32 where that is int8.

        Raises:
            DataError, StoreError: as `rows`.
        """
        stored, scales = self.rows(acts_array(hook), start, stop), self.dimension_scales(hook)
        if scales is None:
            return stored
        token = self.rows(token_scales_array(hook), start, stop)
        return dequantise(torch.from_numpy(stored), torch.from_numpy(token), torch.from_numpy(scales)).numpy()

    def moments(self, hook: str, chunks: Sequence[int] | None = None) -> Moments:
        """Moments at `hook` over all usable chunks or the ones named, merged in chunk order from partial sums."""
        array = partial_array(hook)
        numbers = self.usable_chunks(hook) if chunks is None else sorted(chunks)
        total = np.zeros((2, self.d_model(hook)))
        for sums in in_order(lambda chunk: self.map_chunk(array, chunk, verify=True)[0], numbers, self.place.few):
            total += sums
        facts = [self.journal.entries[array, chunk].extra for chunk in numbers]
        count = sum(fact["count"] for fact in facts)
        if count == 0:
            raise DataError(f"{self.name}: no token of {hook} may be trained on yet.")
        return Moments(count, total[0] / count, total[1] / count, max(fact["max_abs"] for fact in facts))

    def write_summary(self) -> None:
        """Write `moments/<hook>/{count,mean,second_moment,mean_squared_norm,max_abs}` for other readers."""
        self.header = self.header | {"hooks": {hook: info | {"summarised": True} for hook, info in self.hooks.items()}}
        for hook in self.hooks:
            for name, values in self.moments(hook).summary().items():
                array = summary_array(hook, name)
                self.place.write(self.chunk_name(array, 0), encode_chunk(self.spec(array), values))
        self.write_metadata()
        self.journal.fold()

    def leftovers(self) -> list[Path]:
        """Files aside that a kill left behind; they never count and may be deleted."""
        return self.place.leftovers()

    # ---- for people -----------------------------------------------------------------------------------------

    def sequences(self, start: int, stop: int, hook: str | None = None) -> dict[str, np.ndarray]:
        """Sequences `start` to `stop` with their context.

        Returns:
            tokens, documents int32 [n, context]; activations [n, context, d_model] in the storage type
            (`ml_dtypes.bfloat16` by default; `.astype("float32")` for arithmetic; float32 already where that is int8).
        """
        name = self.hook(hook)
        return {
            "tokens": self.rows(TOKENS, start, stop),
            "documents": self.rows(DOCUMENTS, start, stop),
            "activations": self.activations(name, start, stop),
        }

    def zarr(self) -> Any:
        """The store as a `zarr.Group`, for everything zarr-python can do."""
        import zarr

        return zarr.open_group(url_of(self.path) or self.path, mode="r")


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Raises:
        StoreError: nothing there, or not a Granary store.
    """
    return Store.open(path)
