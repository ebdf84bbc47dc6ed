"""bfloat16 for zarr-python, which does not know it (3.1): found through the `zarr.data_type` entry point.

Stands alone, so that a program that only reads zarr arrays loads nothing else of Granary. The name is the one
in the zarr-extensions registry, the numpy side is ml_dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import Float16

_NUMPY = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """The zarr v3 data type `bfloat16`; little-endian like every chunk Granary writes."""

    dtype_cls: ClassVar[Any] = type(_NUMPY)
    _zarr_v3_name: ClassVar[Any] = "bfloat16"
    _zarr_v2_names: ClassVar[Any] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if dtype != _NUMPY:
            raise TypeError(f"expected {_NUMPY}, got {dtype}")
        return cls()

    def to_native_dtype(self) -> Any:
        return _NUMPY
