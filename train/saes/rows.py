"""Rows of a matrix by their numbers, of which some may come often, with gradients that are the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _RowsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(number)
        ctx.shape = matrix.shape
        return matrix[number]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (number,), gradient = ctx.saved_tensors, gradients[0]
        total = gradient.new_zeros(ctx.shape)
        if gradient.is_cuda:  # index_add_ adds in any order there, on a CPU index_put_ does
            return total.index_put_((number,), gradient, accumulate=True), None
        return total.index_add_(0, number.flatten(), gradient.flatten(0, -2)), None


def rows_at(matrix: Float[Tensor, "R D"], number: Int[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
    """matrix[number], for runs that are to repeat to the bit."""
    rows: Tensor = _RowsAt.apply(matrix, number)  # type: ignore[no-untyped-call]
    return rows
