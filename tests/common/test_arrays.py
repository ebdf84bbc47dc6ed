"""Chunk files and their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.arrays import ArraySpec, decode_chunk, encode_chunk
from tests.stores import filled


def test_store_compression_makes_plain_data_smaller(tmp_path: Path) -> None:
    spec = ArraySpec((64, 64), 64, "float32", "zstd")
    data = np.ones((64, 64), np.float32)
    assert len(encode_chunk(spec, data)) < data.nbytes // 10
    assert decode_chunk(spec, bytes(encode_chunk(spec, data))).tolist() == data.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_store_compressed_reads_equal_through_zarr_and_map_chunk(tmp_path: Path, dtype: str) -> None:
    store, values = filled(tmp_path / "x.zarr", dtype=dtype, compression="zstd")
    acts = values["acts/a"]
    assert store.zarr()["acts/a"][:].tobytes() == acts.tobytes()
    assert store.map_chunk("acts/a", 1, verify=True).tobytes() == acts[4:8].tobytes()
    assert store.map_chunk("acts/a", 2)[:2].tobytes() == acts[8:].tobytes()
    assert store.chunk_path("acts/a", 0).read_bytes() != acts[:4].tobytes()
