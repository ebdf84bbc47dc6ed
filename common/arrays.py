"""One zarr array of a store: its shape and type, its metadata, and the bytes of a chunk file.

A chunk file without compression *is* the C-order array, so it is written whole and mapped back, past
zarr-python (which writes at about 0.5 GB/s).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.dtypes import NUMPY

COMPRESSION: dict[str, dict[str, Any]] = {
    "zstd": {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
}


@dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one zarr array, chunked along its first axis only."""

    shape: tuple[int, ...]
    chunk_rows: int
    dtype: str
    compression: str | None = None
    dimensions: tuple[str, ...] = ()

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return NUMPY.get(self.dtype) or np.dtype(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.numpy_dtype.itemsize

    def metadata(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.compression is not None:
            settings = COMPRESSION[self.compression] | {"typesize": self.numpy_dtype.itemsize}
            codecs.append({"name": "blosc", "configuration": settings})
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if self.dtype.startswith("int") else 0.0,
            "codecs": codecs,
            "dimension_names": list(self.dimensions),
            "attributes": {},
        }


def encode_chunk(spec: ArraySpec, data: np.ndarray) -> memoryview:
    """The bytes of one chunk file."""
    data = np.ascontiguousarray(data)
    if spec.compression is None:
        return data.reshape(-1).view(np.uint8).data
    from numcodecs import blosc

    settings = COMPRESSION[spec.compression]
    encoded = blosc.compress(
        data.view(f"i{data.dtype.itemsize}"), settings["cname"].encode(), settings["clevel"], blosc.BITSHUFFLE
    )
    return memoryview(encoded)


def decode_chunk(spec: ArraySpec, data: bytes | mmap.mmap) -> np.ndarray:
    """The array [chunk_rows, …] in one chunk file; over the same memory when it is not compressed."""
    if spec.compression is None:
        return np.frombuffer(data, spec.numpy_dtype).reshape(spec.chunk_shape)
    from numcodecs import blosc

    return np.frombuffer(blosc.decompress(bytes(data)), spec.numpy_dtype).reshape(spec.chunk_shape)
