"""Storage types between torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.dtypes import NUMPY, TORCH, to_numpy, to_torch


@pytest.mark.parametrize("name", list(TORCH))
def test_dtypes_go_both_ways_over_the_same_memory(name: str) -> None:
    dtype = TORCH[name]
    values = [[1.0, -2.5, 0.0], [3.140625, 65504.0, -0.0]] if dtype.is_floating_point else [[1, -127, 0], [3, 127, 0]]
    tensor = torch.tensor(values, dtype=dtype)
    array = to_numpy(tensor)
    assert array.dtype == NUMPY[name]
    assert array.astype(np.float32).tolist() == tensor.float().tolist()
    assert torch.equal(to_torch(array), tensor)
    assert to_torch(array).data_ptr() == tensor.data_ptr()
    array[0, 0] = 7
    assert tensor[0, 0] == 7


def test_dtypes_bfloat16_bits_are_the_upper_half_of_float32() -> None:
    # 1.0 is 0x3f800000 in float32
    assert to_numpy(torch.tensor([1.0], dtype=torch.bfloat16)).view(np.uint16).tolist() == [0x3F80]
