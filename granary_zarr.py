"""bfloat16 for zarr-python, which does not know it (3.1). The name is the one in the zarr-extensions registry.

zarr-python finds this module through entry points. `zarr.data_type` is the one meant for it, but no 3.1 release
ever loads that group (its registry's lazy load is never called); `zarr.buffer` is loaded before the first byte of
any store is read, so its entry hands zarr its own CPU buffer again and registers the type on the way.

Stands alone, so that a program that only reads zarr arrays loads nothing else of Granary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.buffer.cpu import Buffer
from zarr.dtype import DataTypeValidationError, Float16, data_type_registry

__all__ = ["BFloat16", "Buffer"]

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
            raise DataTypeValidationError(f"expected {_NUMPY}, got {dtype}")
        return cls()

    def to_native_dtype(self) -> Any:
        return _NUMPY


data_type_registry.register("bfloat16", BFloat16)
