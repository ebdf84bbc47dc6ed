"""The layout, against readers that are not Granary."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from common.layout import SUMMARY, acts_array
from common.store import Store
from tests.conftest import HOOK
from tests.stores import filled

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


def read_elsewhere(path: Path, hook: str, hide_entry_points: bool = False) -> bytes:
    """The activations as zarr-python reads them in a process that imports nothing of Granary."""
    program = READ_ELSEWHERE.format(hide=hide_entry_points)
    command = [sys.executable, "-c", program, str(path), hook]
    done = subprocess.run(command, capture_output=True, cwd=path.parent, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


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
