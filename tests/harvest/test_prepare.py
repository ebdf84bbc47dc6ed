"""The store a plan goes to: room for it, what is there already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.errors import ConfigError, StoreError
from common.store import Store
from harvest import prepare
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import unequal


def test_harvest_over_max_bytes_is_refused_before_it_begins(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    # 64 padded sequences of 32 tokens at 8 + 4 + 16 * 2 bytes
    size = 64 * 32 * (8 + 4 + 32)
    with pytest.raises(ConfigError, match=rf"--max-bytes {size - 1:,}: this store takes {size:,}\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr", max_bytes=size - 1))
    assert not (tmp_path / "x.zarr").exists()
    outcome = go(small(tiny_model, texts, tmp_path / "x.zarr", max_bytes=size))
    assert outcome.bytes == size + 4 * 2 * 16 * 8  # and the partial sums, which depend on no token


def test_harvest_without_room_is_refused_before_it_begins(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 1000)
    with pytest.raises(StoreError, match=r"90,112 bytes to write, 1,000 free on the disk\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_harvest_of_chunks_that_memory_cannot_hold_is_refused(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    chunk = 16 * 32 * (8 + 4 + 32)
    monkeypatch.setattr(prepare, "machine_bytes", lambda: chunk - 1)
    pattern = rf"--chunk-sequences 16: a chunk takes {chunk:,} bytes, this machine has {chunk - 1:,}\."
    with pytest.raises(ConfigError, match=pattern):
        go(small(tiny_model, texts, tmp_path / "x.zarr", compression=compression))
    assert not (tmp_path / "x.zarr").exists()


def test_room_counts_what_is_committed_and_no_file_that_may_go(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    (tmp_path / "x.zarr" / "tokens" / "c" / "0" / "0.aside").write_bytes(bytes(100_000))
    held = sum(entry.size_bytes for entry in Store.open(finished).journal.entries.values())
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 50_000)
    prepare.refuse_full_disk(tmp_path / "x.zarr", held + 50_000)
    with pytest.raises(StoreError, match="50,001 bytes to write, 50,000 free"):
        prepare.refuse_full_disk(tmp_path / "x.zarr", held + 50_001)


def test_harvest_of_another_hook_counts_the_hooks_that_are_there(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    config = small(tiny_model, texts, tmp_path / "x.zarr", layer=(2,))
    both = 64 * 32 * (8 + 2 * (4 + 32))
    with pytest.raises(ConfigError, match=rf"--max-bytes {both - 1:,}: this store takes {both:,}\."):
        go(config.model_copy(update={"max_bytes": both - 1}))
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 50_000)  # the new hook takes 73,728
    with pytest.raises(StoreError, match=r"bytes to write, 50,000 free on the disk"):
        go(config)
    assert list(Store.open(tmp_path / "x.zarr").hooks) == [HOOK]


def test_harvest_never_writes_into_a_folder_of_other_things(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / ".zgroup").write_text("a zarr of somebody else")
    with pytest.raises(StoreError, match=r"x\.zarr: other files are here, and no store\. Choose another --out\."):
        go(small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr"))
    assert (tmp_path / "x.zarr" / ".zgroup").read_text() == "a zarr of somebody else"


def test_harvest_with_fewer_tokens_leaves_the_store_as_it_is(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    assert go(small(tiny_model, texts, tmp_path / "x.zarr", tokens=320)).tokens == 1600
    assert unequal(finished, tmp_path / "x.zarr") == []
    Store.open(tmp_path / "x.zarr").journal.rewrite(drop=[("tokens", 1)])  # its line was damaged
    assert go(small(tiny_model, texts, tmp_path / "x.zarr", tokens=320)).tokens == 1600
    assert unequal(finished, tmp_path / "x.zarr") == []


def test_from_anywhere_keeps_names_that_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["gpt2", "a/b", "demo", "stdlib", "bytes", None]
    assert [prepare.from_anywhere(name) for name in names] == names
    assert prepare.from_anywhere("books") == str(tmp_path / "books")
    assert prepare.from_anywhere("books/x.txt") == str(tmp_path / "books" / "x.txt")
