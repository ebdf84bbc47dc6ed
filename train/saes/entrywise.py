"""Functions of the entries of a sparse matrix that have gradients, all of them at these entries alone.

Sums are made by sparse products, since on a GPU autograd's own would add in any order. Under autocast too they are in
float32: sparse operators know nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.saes.places import Places


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, dense)
        ctx.places = places
        with torch.autocast(values.device.type, enabled=False):
            return places.times(values, dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, dense = ctx.saved_tensors
        gradient, (of_values, of_dense, _) = gradients[0].contiguous(), ctx.needs_input_grad
        return (
            ctx.places.sampled(gradient, dense) if of_values else None,
            ctx.places.entries.transposed_times(values, gradient) if of_dense else None,
            None,
        )


def times(values: Float[Tensor, " K"], dense: Float[Tensor, "C D"], places: Places) -> Float[Tensor, "R D"]:
    """The sparse matrix with these values, times a dense one."""
    product: Tensor = _Times.apply(values, dense, places)  # type: ignore[no-untyped-call]
    return product


class _ProductsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.places = places
        with torch.autocast(left.device.type, enabled=False):
            return places.sampled(left, right)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (left, right), values = ctx.saved_tensors, gradients[0]
        return ctx.places.times(values, right), ctx.places.entries.transposed_times(values, left), None


def products_at(left: Float[Tensor, "R D"], right: Float[Tensor, "C D"], places: Places) -> Float[Tensor, " K"]:
    """left · rightᵀ at the entries."""
    values: Tensor = _ProductsAt.apply(left, right, places)  # type: ignore[no-untyped-call]
    return values


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Places) -> Tensor:
        ctx.places = places
        with torch.autocast(values.device.type, enabled=False):
            return places.row_sums(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.places.row], None


def row_sums(values: Float[Tensor, " K"], places: Places) -> Float[Tensor, " R"]:
    """The sum of each row."""
    sums: Tensor = _RowSums.apply(values, places)  # type: ignore[no-untyped-call]
    return sums


class _OfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return of_rows[places.row]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.places.row_sums(gradients[0]), None


def of_rows(values: Float[Tensor, " R"], places: Places) -> Float[Tensor, " K"]:
    """A value per row, at each of its entries."""
    spread: Tensor = _OfRows.apply(values, places)  # type: ignore[no-untyped-call]
    return spread
