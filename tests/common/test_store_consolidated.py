"""The consolidated metadata of a store with several hooks names every array to zarr-python."""

from __future__ import annotations

from pathlib import Path

from common.store import Store


def test_zarr_store_of_two_hooks_reads_every_array(tmp_path: Path) -> None:
    info = {"d_model": 4, "dtype": "float32", "id": "", "summarised": True}
    store = Store.create(
        tmp_path / "two.zarr",
        {
            "identity": {"context": 4, "chunk_sequences": 2, "compression": None},
            "n_sequences": 2,
            "hooks": {"blocks.2.hook_resid_post": info, "blocks.1.hook_mlp_out": info},
        },
    )
    group = store.zarr()
    # zarr-python groups the flat names by runs of one parent: unsorted names lose all but the last run
    assert sorted(group["acts"].array_keys()) == ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
    assert {name: group[name].shape for name in store.array_names()} == {
        name: store.spec(name).shape for name in store.array_names()
    }
