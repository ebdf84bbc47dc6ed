"""Rows by number: values, gradients, and the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from train.saes.rows import rows_at


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_rows_that_come_often_have_the_sum_of_their_gradients() -> None:
    matrix = torch.arange(12.0).view(4, 3).requires_grad_()
    number = torch.tensor([[1, 3], [1, 1]])
    rows = rows_at(matrix, number)
    assert torch.equal(rows, matrix[number])
    (rows * torch.tensor([[[1.0], [2.0]], [[4.0], [8.0]]])).sum().backward()
    assert matrix.grad is not None
    assert matrix.grad[:, 0].tolist() == [0.0, 13.0, 0.0, 2.0]


def test_gradients_have_the_same_bits_each_time(two_threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.zeros(200, 512, requires_grad=True)
    number = torch.randint(200, (4096,), generator=generator)
    back = torch.randn(4096, 512, generator=generator)
    sums = {torch.autograd.grad(rows_at(matrix, number), matrix, back)[0].numpy().tobytes() for _ in range(8)}
    assert len(sums) == 1  # by plain indexing all eight differ
