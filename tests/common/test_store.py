"""The store against readers that are not Granary, and against numpy."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common.errors import ConfigError, DataError, StoreError
from common.store import (
    DOCUMENTS,
    SUMMARY,
    TOKENS,
    ArraySpec,
    Store,
    acts_array,
    decode_chunk,
    difference,
    encode_chunk,
    norms_array,
    open_store,
    partial_array,
    write_summary,
)
from tests.conftest import HOOK
from tests.stores import flip_bit

CONTEXT, CHUNK, D = 8, 4, 6

READ_ELSEWHERE = """
import sys, warnings
warnings.simplefilter("error")
import importlib.metadata
if {hide}:
    real = importlib.metadata.entry_points
    importlib.metadata.entry_points = lambda **_: real().select(group="none")
import zarr
group = zarr.open_group(sys.argv[1], mode="r")
assert "acts/" + sys.argv[2] in dict(group.members(max_depth=None))
sys.stdout.buffer.write(group["acts/" + sys.argv[2]][:].tobytes())
assert not {{"granary", "common", "harvest"}} & set(sys.modules)
"""


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
    write_summary(store)
    return store, values


def read_elsewhere(path: Path, hook: str, hide_entry_points: bool = False) -> bytes:
    """The activations as zarr-python reads them in a process that imports nothing of Granary."""
    program = READ_ELSEWHERE.format(hide=hide_entry_points)
    command = [sys.executable, "-c", program, str(path), hook]
    done = subprocess.run(command, capture_output=True, cwd=path.parent, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# ---- other readers --------------------------------------------------------------------------------------------


def test_store_bfloat16_reads_equal_through_zarr_in_a_process_without_granary(shared_store: Path) -> None:
    store = Store.open(shared_store)
    assert read_elsewhere(shared_store, HOOK) == store.rows(acts_array(HOOK), 0, store.n_sequences).tobytes()


def test_store_float16_needs_no_entry_point_and_only_core_types(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr", dtype="float16")
    metadata = json.loads((store.path / "acts/a/zarr.json").read_text())
    assert metadata["data_type"] == "float16"
    assert metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert read_elsewhere(store.path, "a", hide_entry_points=True) == values["acts/a"].tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_store_reads_equal_through_tensorstore(tmp_path: Path, dtype: str) -> None:
    import tensorstore

    store, values = filled(tmp_path / "x.zarr", dtype=dtype)
    for array, expected in values.items():
        place = {"driver": "file", "path": str(store.path / array)}
        read = tensorstore.open({"driver": "zarr3", "kvstore": place}).result().read().result()
        assert read.dtype == expected.dtype
        assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_store_compressed_reads_equal_through_zarr_and_map_chunk(tmp_path: Path, dtype: str) -> None:
    store, values = filled(tmp_path / "x.zarr", dtype=dtype, compression="zstd")
    acts = values["acts/a"]
    assert store.zarr()["acts/a"][:].tobytes() == acts.tobytes()
    assert store.map_chunk("acts/a", 1, verify=True).tobytes() == acts[4:8].tobytes()
    assert store.map_chunk("acts/a", 2)[:2].tobytes() == acts[8:].tobytes()
    assert store.chunk_path("acts/a", 0).read_bytes() != acts[:4].tobytes()


def test_store_compression_makes_plain_data_smaller(tmp_path: Path) -> None:
    spec = ArraySpec((64, 64), 64, "float32", "zstd")
    data = np.ones((64, 64), np.float32)
    assert len(encode_chunk(spec, data)) < data.nbytes // 10
    assert decode_chunk(spec, bytes(encode_chunk(spec, data))).tolist() == data.tolist()


def test_store_lists_its_members_without_a_warning(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(store.zarr().members(max_depth=None))
    assert set(store.array_names()) < set(members)
    assert members["tokens"].shape == (469, 64)


def test_store_consolidated_metadata_equals_that_of_each_node(store: Store) -> None:
    root = json.loads((store.path / "zarr.json").read_text())
    nodes = root["consolidated_metadata"]["metadata"]
    files = {
        file.parent.relative_to(store.path).as_posix(): json.loads(file.read_text())
        for file in store.path.rglob("zarr.json")
        if file.parent != store.path
    }
    assert nodes == files
    assert {name for name, node in nodes.items() if node["node_type"] == "array"} == set(store.array_names())


def test_store_summary_reads_through_zarr(store: Store) -> None:
    moments = store.moments(HOOK)
    group = store.zarr()["moments"][HOOK]
    for name in SUMMARY:
        assert np.array_equal(group[name][:], np.atleast_1d(np.asarray(getattr(moments, name), np.float64)))


# ---- reading --------------------------------------------------------------------------------------------------


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


def test_map_chunk_is_over_the_file_and_read_only(tmp_path: Path) -> None:
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


def test_moments_equal_numpy_over_the_tokens_that_may_be_trained_on(store: Store) -> None:
    n = store.n_sequences
    tokens, documents = store.rows(TOKENS, 0, n), store.rows(DOCUMENTS, 0, n)
    keep = (documents >= 0) & ~np.isin(tokens, store.special_tokens)
    acts = store.rows(acts_array(HOOK), 0, n)[keep].astype(np.float64)
    moments = store.moments(HOOK)
    assert moments.count == keep.sum() < tokens.size
    # float64 sums in another order: about 30,000 additions of 1e-16 relative error each
    assert np.allclose(moments.mean, acts.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(moments.second_moment, (acts**2).mean(0), rtol=1e-12)
    assert moments.max_abs == np.abs(acts).max()
    assert math.isclose(moments.mean_squared_norm, (acts**2).sum(1).mean(), rel_tol=1e-12)
    assert math.isclose(moments.variance, ((acts - acts.mean(0)) ** 2).sum(1).mean(), rel_tol=1e-9)


def test_moments_of_some_chunks_leave_the_others_out(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr")
    acts = values["acts/a"][[*range(4), 8, 9]].astype(np.float64).reshape(-1, D)
    moments = store.moments("a", [2, 0])
    assert moments.count == len(acts)
    assert np.allclose(moments.mean, acts.mean(0), rtol=0, atol=1e-13)


def test_moments_without_a_token_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token of a may be trained on yet"):
        Store.create(tmp_path / "x.zarr", header()).moments("a")


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


# ---- opening --------------------------------------------------------------------------------------------------


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


def test_hook_is_the_only_one_or_must_be_named(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    assert store.hook() == "a"
    assert store.hook("a") == "a"
    with pytest.raises(ConfigError, match=r"no hook 'b'\. Known: a\."):
        store.hook("b")
    store.header = store.header | {"hooks": store.hooks | {"b": store.hooks["a"]}}
    with pytest.raises(ConfigError, match=r"it holds 2 hooks; choose one with --hook\. Known: a, b\."):
        store.hook()


def test_id_follows_the_identity_alone(tmp_path: Path) -> None:
    one = Store.create(tmp_path / "1.zarr", header(n_sequences=10))
    two = Store.create(tmp_path / "2.zarr", header(n_sequences=20))
    three = Store.create(tmp_path / "3.zarr", header(dtype="float32"))
    assert one.id == two.id != three.id
    assert len(one.id) == 64


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


# ---- checking -------------------------------------------------------------------------------------------------


def test_problems_of_a_whole_store_are_none(store: Store, tmp_path: Path) -> None:
    assert list(store.problems()) == []
    compressed, _ = filled(tmp_path / "x.zarr", compression="zstd")
    assert list(compressed.problems()) == []


def test_problems_name_token_ids_out_of_range(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    tokens = np.full((CHUNK, CONTEXT), 50, np.int32)
    store.commit([(TOKENS, 1, tokens, {})])
    assert [str(problem) for problem in store.problems()] == [
        "tokens chunk 1: token ids 50 to 50, the vocabulary has 50"
    ]
    store.commit([(TOKENS, 1, -tokens, {})])
    assert [str(problem) for problem in store.problems()] == [
        "tokens chunk 1: token ids -50 to -50, the vocabulary has 50"
    ]


def test_problems_name_values_that_are_not_finite(tmp_path: Path) -> None:
    store, values = filled(tmp_path / "x.zarr")
    bad = values["acts/a"][:4].copy()
    bad[1, 2, :3] = np.nan
    store.commit([("acts/a", 0, bad, {})])
    assert [str(problem) for problem in store.problems()] == ["acts/a chunk 0: 3 values are not finite"]


def test_problems_name_altered_and_missing_files(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    flip_bit(store.chunk_path("acts/a", 0))
    store.chunk_path("norms/a", 1).unlink()
    assert sorted(problem.array for problem in store.problems()) == ["acts/a", "norms/a"]


def test_leftovers_are_files_aside_only(shared_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x.zarr"
    shutil.copytree(shared_store, copy)
    assert Store.open(copy).leftovers() == []
    (copy / "tokens" / "c" / "0" / "0.aside").write_bytes(b"half")
    assert [file.name for file in Store.open(copy).leftovers()] == ["0.aside"]
