"""Stores side by side, for tests that say "the same bytes"."""

from __future__ import annotations

from pathlib import Path


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
