"""The store, against numpy."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from common.errors import DataError, StoreError
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array
from common.store import Store, open_store
from tests.conftest import HOOK
from tests.stores import CHUNK, CONTEXT, D, filled, flip_bit, header


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 5), (4, 8), (0, 1), (9, 10), (1, 10)])
def test_rows_equal_the_slice_across_chunks(tmp_path: Path, start: int, stop: int) -> None:
    store, values = filled(tmp_path / "x.zarr")
    for array, expected in values.items():
        assert store.rows(array, start, stop).tobytes() == expected[start:stop].tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 5), (0, 11)])
def test_rows_outside_the_store_are_an_error(tmp_path: Path, start: int, stop: int) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    with pytest.raises(DataError, match=rf"sequences {start} to {stop} asked for, there are 10\."):
        store.rows(TOKENS, start, stop)


def test_last_chunk_is_padded_to_full_size(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    assert store.n_chunks == 3
    assert store.sequences_in(2) == 2
    assert (store.map_chunk(DOCUMENTS, 2)[2:] == -1).all()
    assert (store.map_chunk(TOKENS, 2)[2:] == 0).all()
    assert (store.map_chunk("acts/a", 2)[2:] == 0).all()
    assert store.chunk_path("acts/a", 2).stat().st_size == CHUNK * CONTEXT * D * 2


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_map_chunk_is_read_only_mapped_or_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr("common.store.SMALL_CHUNK", small)
    store, values = filled(tmp_path / "x.zarr")
    mapped = store.map_chunk("acts/a", 0)
    assert mapped.dtype == ml_dtypes.bfloat16
    assert mapped.tobytes() == values["acts/a"][:4].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        mapped[0, 0, 0] = 1


def test_map_chunk_names_what_is_wrong(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    file = store.chunk_path("acts/a", 1)
    whole = file.read_bytes()
    flip_bit(file, 5)
    store.map_chunk("acts/a", 1)  # the length is right: only a checksum sees it
    pattern = r"acts/a chunk 1: checksum [0-9a-f]{8} but the journal says [0-9a-f]{8}\. Run: harvest verify .* --repair"
    with pytest.raises(StoreError, match=pattern):
        store.map_chunk("acts/a", 1, verify=True)
    file.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"acts/a chunk 1: 383 bytes, but the journal says 384\."):
        store.map_chunk("acts/a", 1)
    file.unlink()
    with pytest.raises(StoreError, match="acts/a chunk 1: the file is missing, but the journal has it"):
        store.map_chunk("acts/a", 1)
    with pytest.raises(StoreError, match="acts/a chunk 3: not harvested yet"):
        store.map_chunk("acts/a", 3)


def test_sequences_give_tokens_documents_and_activations(store: Store) -> None:
    found = store.sequences(63, 66)
    assert {name: array.shape for name, array in found.items()} == {
        "tokens": (3, 64),
        "documents": (3, 64),
        "activations": (3, 64, 16),
    }
    assert found["activations"].tobytes() == store.rows(acts_array(HOOK), 63, 66).tobytes()


def test_usable_chunks_need_every_array(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    assert store.usable_chunks("a") == [0, 1, 2]
    store.journal.rewrite(drop=[(norms_array("a"), 1)])
    assert store.usable_chunks("a") == [0, 2]
    assert Store.open(store.path).usable_chunks("a") == [0, 2]


def test_committed_leaves_out_a_chunk_that_has_grown(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    store.header = store.header | {"n_sequences": 12}
    assert store.committed(TOKENS) == [0, 1]
    store.header = store.header | {"n_sequences": 8}
    assert store.committed(TOKENS) == [0, 1]


def test_commit_from_threads_loses_no_line(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x.zarr", header(n_sequences=CHUNK * 40))
    data = np.zeros((CHUNK, CONTEXT), np.int32)

    def work(first: int) -> None:
        for chunk in range(first, 40, 4):
            store.commit([(TOKENS, chunk, data + chunk, {})])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Store.open(store.path)
    assert again.committed(TOKENS) == list(range(40))
    assert all((again.map_chunk(TOKENS, chunk, verify=True) == chunk).all() for chunk in range(40))


def test_open_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.zarr: no store here\. 'harvest list' shows the stores there are\."):
        open_store(tmp_path / "x.zarr")
    path = tmp_path / "x.zarr"
    path.mkdir()
    for text in ('{"zarr_format": 3, "node_type": "group"}', '{"attributes": {"granary": 5}}'):
        (path / "zarr.json").write_text(text)
        with pytest.raises(StoreError, match="a zarr group, but not one that harvest wrote"):
            open_store(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"zarr\.json: not valid JSON"):
        open_store(path)
    (path / "zarr.json").write_text('{"attributes": {"granary": {"format": 2}}}')
    with pytest.raises(StoreError, match=r"store format 2, this version reads 1\. Install a newer Granary\."):
        open_store(path)


def test_leftovers_are_files_aside_only(shared_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x.zarr"
    shutil.copytree(shared_store, copy)
    assert Store.open(copy).leftovers() == []
    (copy / "tokens" / "c" / "0" / "0.aside").write_bytes(b"half")
    assert [file.name for file in Store.open(copy).leftovers()] == ["0.aside"]
