"""What is committed: one JSON line per chunk, appended after the chunk's bytes are safe under their final name.

What is not in the journal does not exist. Every line carries its own checksum (`line`). A torn last line is
what a power cut leaves; it is dropped. A damaged line elsewhere is reported, and its chunk does not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import canonical_json, crc32c, disk_error, sync_folder, write_file
from common.places import Bucket, place_at
from common.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One committed chunk of one array.

    Attributes:
        array: path of the zarr array inside the store.
        chunk: number of the chunk along the sequence axis.
        crc32c: checksum of the chunk file.
        size_bytes: length of the chunk file.
        sequences: true sequences in it; rows beyond are padding.
        extra: facts that belong to this array (cursor, count, max_abs, …).
    """

    array: str
    chunk: int
    crc32c: str
    size_bytes: int
    sequences: int
    extra: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        record = {
            "array": self.array,
            "chunk": self.chunk,
            "crc32c": self.crc32c,
            "bytes": self.size_bytes,
            "sequences": self.sequences,
            **self.extra,
        }
        record["line"] = crc32c(canonical_json(record).encode())
        return canonical_json(record).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Entry | None:
        """The entry, or None when the line is damaged."""
        try:
            record = json.loads(line)
            check = record.pop("line")
            if crc32c(canonical_json(record).encode()) != check:
                return None
            return cls(
                array=record.pop("array"),
                chunk=record.pop("chunk"),
                crc32c=record.pop("crc32c"),
                size_bytes=record.pop("bytes"),
                sequences=record.pop("sequences"),
                extra=record,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Journal:
    """The journal file of one store; the last line about a chunk is the one that counts.

    Args:
        entries: take these for all there is, and do not read the file.

    Attributes:
        torn_bytes: length of an unfinished last line.
        damaged_lines: numbers (from 1) of whole lines that do not match their checksum.
    """

    def __init__(self, path: Path, entries: Iterable[Entry] | None = None) -> None:
        self.path = path
        self.entries = {(entry.array, entry.chunk): entry for entry in entries or ()}
        self.torn_bytes = 0
        self.damaged_lines: list[int] = []
        self._whole_bytes = 0
        place = place_at(path.parent)
        self._segments = Segments(place) if isinstance(place, Bucket) and entries is None else None
        if entries is None:
            self._load()

    def _load(self) -> None:
        data = self._read()
        lines = data.split(b"\n")
        self.torn_bytes = len(lines.pop())
        for number, line in enumerate(lines, 1):
            entry = Entry.from_line(line)
            if entry is None:
                self.damaged_lines.append(number)
            else:
                self.entries[entry.array, entry.chunk] = entry
        self._whole_bytes = len(data) - self.torn_bytes

    def _read(self) -> bytes:
        if self._segments is not None:
            return self._segments.read()
        return self.path.read_bytes() if self.path.exists() else b""

    def of(self, array: str) -> dict[int, Entry]:
        """The committed chunks of one array, by number."""
        return {chunk: entry for (name, chunk), entry in sorted(self.entries.items()) if name == array}

    def append(self, entries: Iterable[Entry]) -> None:
        """Commit `entries` together: one write, one fsync. A torn tail left by a power cut goes first.

        Raises:
            StoreError: the disk is full; nothing was committed.
        """
        entries = list(entries)
        data = b"".join(entry.to_line() for entry in entries)
        if self._segments is not None:
            self._segments.append(data)
        else:
            self._append_to_file(data)
        for entry in entries:
            self.entries[entry.array, entry.chunk] = entry

    def _append_to_file(self, data: bytes) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, self._whole_bytes)
                _write_all(descriptor, data, self._whole_bytes)
                os.fsync(descriptor)
                if not self._whole_bytes:
                    sync_folder(self.path.parent)  # the file itself is new
            except OSError:
                os.ftruncate(descriptor, self._whole_bytes)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error(error, self.path, len(data)) from error
        self._whole_bytes += len(data)
        self.torn_bytes = 0

    def fold(self) -> None:
        """One object, its lines in the order of chunks, when a harvest has come to its end: whoever was faster."""
        data = b"".join(entry.to_line() for entry in self._in_order())
        if self._segments is not None or self.path.read_bytes() != data:
            self.rewrite()

    def forget(self, keys: Iterable[tuple[str, int]]) -> None:
        """Take the named chunks for not committed; the file keeps their lines until newer ones or a `rewrite`."""
        for key in keys:
            self.entries.pop(key, None)

    def rewrite(self, drop: Iterable[tuple[str, int]] = ()) -> None:
        """Write the journal anew without the named chunks and without damaged or superseded lines."""
        self.forget(drop)
        data = b"".join(entry.to_line() for entry in self._in_order())
        if self._segments is not None:
            self._segments.replace(data)
        else:
            write_file(self.path, data)
        self._whole_bytes, self.torn_bytes, self.damaged_lines = len(data), 0, []

    def _in_order(self) -> Iterator[Entry]:
        for key in sorted(self.entries, key=lambda key: (key[1], key[0])):
            yield self.entries[key]


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
