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


def test_sparse_tensors_count_with_their_indices() -> None:
    values, columns, rows = torch.ones(64), torch.arange(64) % 16, torch.arange(65)
    target = torch.zeros(64, 32)

    def compute() -> Tensor:
        sparse = torch.sparse_csr_tensor(rows, columns, values, (64, 16), check_invariants=False)
        return torch.addmm(target, sparse, W)

    made = {layout: x.to_sparse(layout=layout) for layout in (torch.sparse_csr, torch.sparse_coo)}
    assert peak_bytes(compute, CPU) == SIZE
    n = int((x != 0).sum())
    assert peak_bytes(lambda: made[torch.sparse_csr].clone(), CPU) == 8 * 65 + (8 + 4) * n
    assert peak_bytes(lambda: made[torch.sparse_coo].clone(), CPU) == (2 * 8 + 4) * n


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
