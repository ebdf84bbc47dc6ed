"""Files that are whole or absent."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import files
from common.errors import StoreError
from common.files import (
    ASIDE,
    CRC_SLICE,
    canonical_json,
    crc32c,
    difference,
    disk_error,
    exclusive,
    fingerprint,
    finite,
    make_folder,
    read_json,
    write_file,
    write_json,
)
from tests.warm import ROOT, wait_for


def test_difference_names_every_key_with_both_values() -> None:
    stored = {"a": 1, "corpus": {"name": "x", "seed": 0}, "same": [1], "gone": "y", "hash": "0" * 64}
    asked = {"a": 2, "corpus": {"name": "x", "seed": 1}, "same": [1], "new": None, "hash": "1" * 64}
    assert difference(stored, asked) == [
        "a: 1 → 2",
        "corpus.seed: 0 → 1",
        "gone: y → None",
        "hash: 000000000000… → 111111111111…",
    ]
    assert difference(stored, stored) == []


def test_crc32c_equals_the_published_check_value() -> None:
    assert crc32c(b"123456789") == "e3069283"  # the check value of CRC-32C in every catalogue
    assert crc32c(b"") == "00000000"


def test_crc32c_of_an_array_equals_that_of_its_bytes_across_slices() -> None:
    array = np.random.default_rng(0).integers(0, 2**31, (CRC_SLICE // 4 + 5, 1), dtype=np.int32)  # over one slice
    assert crc32c(array) == crc32c(array.tobytes())
    assert crc32c(memoryview(array.tobytes())) == crc32c(array)
    array[-1, 0] ^= 1
    assert crc32c(array) != crc32c(array.tobytes()[:-4])


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)


def test_json_is_spread_out_but_for_lists_of_objects(tmp_path: Path) -> None:
    value = {"a": {"b": [1, 2]}, "text": "x\ny", "rows": [{"c": [1, 2]}, {"c": []}], "none": [], "empty": {}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    plain = {key: inner for key, inner in value.items() if key != "rows"}
    assert text.replace('  "rows": [\n    {"c":[1,2]},\n    {"c":[]}\n  ],\n', "") == json.dumps(plain, indent=2) + "\n"
    for other in ({}, [{"a": 1}], None, 1.5):
        write_json(tmp_path / "value.json", other)
        assert (tmp_path / "value.json").read_text() == json.dumps(other, indent=2) + "\n"


def test_write_file_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_write_file_keeps_the_old_file_when_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match=r"file: no space left on the disk: 3 bytes to write, [\d,]+ free\."):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert not path.with_name("file" + ASIDE).exists()


def test_write_file_tells_a_full_disk_when_the_folder_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StoreError, match="no space left on the disk: 4 bytes to write"):
        write_file(tmp_path / "not" / "there" / "file", b"data")


def test_disk_error_leaves_other_errors_as_they_are(tmp_path: Path) -> None:
    denied = OSError(errno.EACCES, "Permission denied")
    assert disk_error(denied, tmp_path / "x", 1) is denied
    quota = disk_error(OSError(errno.EDQUOT, "Quota exceeded"), tmp_path / "x", 1_000)
    assert isinstance(quota, StoreError)
    assert "1,000 bytes to write" in str(quota)
    assert "run the same command again" in str(quota)


def test_finite_turns_nan_and_infinities_to_null_at_any_depth() -> None:
    assert finite({"a": [1.5, math.nan, (math.inf,)], "b": -math.inf, "c": "nan"}) == {
        "a": [1.5, None, [None]],
        "b": None,
        "c": "nan",
    }


def test_write_json_reads_back_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": math.nan, "step": 3})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": None, "step": 3}
    assert read_json(tmp_path / "x.json") == {"loss": None, "step": 3}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_read_json_names_the_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_read_json_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")


HOLD = """
import granary, sys, time
from pathlib import Path
from common.files import exclusive
with exclusive(Path(sys.argv[1]), "store"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_exclusive_refuses_a_second_process_and_ends_with_the_first(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another process is writing this store"), exclusive(tmp_path, "store"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    def free() -> bool:
        try:
            with exclusive(tmp_path, "store"):
                return True
        except StoreError:
            return False

    wait_for(free, 10)


def test_make_folder_syncs_the_parent_of_each_new_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3
