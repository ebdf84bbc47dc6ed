"""The storage types of a store, between torch, numpy and zarr, with no copy.

bfloat16 has no numpy type of its own: ml_dtypes lends one, and torch is reached through the bits (int16).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

NUMPY: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),  # with the scales of common/quantise.py
}
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory, bfloat16 included."""
    if array.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An array over the same memory of a CPU tensor, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(NUMPY["bfloat16"])
    return tensor.numpy()
