"""Files that are whole or absent: write aside, fsync, rename, fsync the folder. Canonical JSON and checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from common.errors import StoreError

CRC_SLICE = 1 << 22  # the extension holds the GIL while it works: 4 MiB is under a millisecond
ASIDE = ".aside"


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def difference(stored: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two identities, one `key: stored → asked` each, nested keys with dots."""
    lines = []
    for key in sorted(stored.keys() | asked.keys()):
        ours, theirs = stored.get(key), asked.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += difference(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            lines.append(f"{prefix}{key}: {_short(ours)} → {_short(theirs)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32c(data: bytes | memoryview | np.ndarray) -> str:
    """CRC-32C (Castagnoli) as 8 hex digits."""
    # the extension takes arrays of bytes only, and copies anything else
    view = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    value = 0
    for start in range(0, len(view), CRC_SLICE):
        value = google_crc32c.extend(value, view[start : start + CRC_SLICE])
    return f"{value:08x}"


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create `path` and the levels above it that are missing, durably: a new folder is a line in its parent."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_file(path: Path, data: bytes | memoryview, by: str = "") -> None:
    """Put `data` at `path`, durably and all at once; a reader sees the old file or the new one.

    Args:
        by: as of `write_aside`.

    Raises:
        StoreError: the disk is full (or a quota reached); the file aside is removed again.
    """
    aside = write_aside(path, data, by)
    try:
        put_in_place(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path, len(data)) from error


def write_aside(path: Path, data: bytes | memoryview, by: str = "") -> Path:
    """The first half of `write_file`: the bytes are safe beside `path`, under a name that counts for nothing.

    Args:
        by: tells several writers of one file apart, so that none touches the bytes of another.

    Raises:
        StoreError: the disk is full (or a quota reached); the file aside is removed again.
    """
    aside = path.with_name(path.name + by + ASIDE)
    try:
        make_folder(path.parent)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path, len(data)) from error
    return aside


def put_in_place(aside: Path, path: Path) -> None:
    """The second half: the file aside under its final name, durably."""
    os.replace(aside, path)
    sync_folder(path.parent)


def disk_error(error: OSError, path: Path, size: int) -> OSError:
    """A `StoreError` that says how much is missing when the disk is full; other errors as they are."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    there = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    return StoreError(
        f"{path}: no space left on the disk: {size:,} bytes to write, {free:,} free. "
        "What was committed is intact: free some space and run the same command again."
    )


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null, at any depth: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Human-readable JSON, written all at once; NaN and infinities become null."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A file of human-readable JSON; NaN and infinities become null."""
    return (json_text(finite(value)) + "\n").encode()


def json_text(value: Any) -> str:
    """JSON of two spaces a level; a list of objects at the top of an object has a line for each of them.

    Spread out, a thousand latents with their contexts were a million lines.
    """
    if not isinstance(value, dict):
        return json.dumps(value, indent=2, allow_nan=False)
    entries = [f"{json.dumps(key)}: {entry_text(inner)}" for key, inner in value.items()]
    return "{\n  " + ",\n  ".join(entries) + "\n}" if entries else "{}"


def entry_text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        lines = [json.dumps(item, separators=(",", ":"), allow_nan=False) for item in value]
        return "[\n    " + ",\n    ".join(lines) + "\n  ]"
    return json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")  # no text has a line break of its own


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        StoreError: missing, or not JSON.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file.") from None


def parse_json(data: bytes, path: Path) -> Any:
    """The parsed bytes of a file.

    Raises:
        StoreError: they are not JSON.
    """
    try:
        return json.loads(data.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}).") from None


@contextmanager
def exclusive(folder: Path, what: str, joining: bool = False, name: str | None = None) -> Iterator[Callable[[], None]]:
    """Hold `folder` for this process alone; the lock goes with the process, however it ends.

    Args:
        joining: hold it beside a process that lets others in.
        name: what people call it, if not by its path.

    Yields:
        what lets others in.

    Raises:
        StoreError: another process holds it.
    """
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if joining else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            held = f"{name or folder}: another process is writing this {what}. Wait for it, or stop it."
            raise StoreError(held) from None
        yield lambda: fcntl.flock(file, fcntl.LOCK_SH)
