"""Peak bytes of tensors against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.evaluate.tensor_memory import peak_bytes

CPU = torch.device("cpu")
SIZE = 4 * 64 * 32  # of a float32 [64, 32]
x, W = torch.randn(64, 16), torch.randn(16, 32)


def test_tensors_held_at_once_count() -> None:
    def compute() -> Tensor:
        u = x @ W
        return u * (u > 0)

    assert peak_bytes(compute, CPU) == SIZE + SIZE // 4 + SIZE  # u, the mask in bytes, the product


def test_freed_tensors_do_not_count_on() -> None:
    def compute() -> None:
        for _ in range(3):
            x @ W

    assert peak_bytes(compute, CPU) == SIZE


def test_views_and_changes_in_place_take_nothing() -> None:
    target = torch.zeros(64, 32)

    def compute() -> Tensor:
        target.add_(1.0)
        return target.t()[:5].reshape(-1, 64)

    assert peak_bytes(compute, CPU) == 0


def test_gradients_count() -> None:
    weight = torch.zeros(1000, requires_grad=True)

    def compute() -> None:
        weight.square().sum().backward()  # type: ignore[no-untyped-call]

    compute()  # Autograd's first call makes nothing that later ones lack
    weight.grad = None
    # the square, then in the backward pass 2·w and the gradient; the ones are two scalars
    assert 2 * 4000 <= peak_bytes(compute, CPU) <= 3 * 4000 + 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_counter_counts_the_same() -> None:
    device = torch.device("cuda")
    a, b = x.to(device), W.to(device)
    a @ b  # the library takes its workspace
    assert peak_bytes(lambda: torch.relu(a @ b), device) == 2 * SIZE
