"""Sums over the ranks that share one batch, each with its own rows.

In the scope of `shared_batch` these functions see the whole batch; elsewhere there is but one rank, and they give back
what they get. A step's loss is then a function of sums over the whole batch, the same number on every rank. What a
rank's own rows do to it is what its own backward pass finds, since a sum hands its gradient on as it is; so the
gradients of all ranks add up to that of the whole batch, and `sum_gradients_` adds them up.

Hence one rule: what is summed here is summed last. A parameter that meets a number after it was summed over ranks would
get that part of its gradient once for every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.ranks import losing


@dataclass(frozen=True)
class Shared:
    """How a batch is shared: by `size` ranks with equal numbers of rows, of which this one is number `rank`."""

    rank: int
    size: int
    group: Any


_SHARED: ContextVar[Shared | None] = ContextVar("shared", default=None)


@contextlib.contextmanager
def shared_batch(shared: Shared | None) -> Iterator[None]:
    """The scope in which this rank's rows are part of a batch; None: they are all of it."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def over_ranks(n: int) -> int:
    """How many there are on all ranks, of what every rank has `n` of."""
    shared = _SHARED.get()
    return n if shared is None else n * shared.size


def before_this_rank(n: int) -> int:
    """How many there are on the ranks before this one, of what every rank has `n` of."""
    shared = _SHARED.get()
    return 0 if shared is None else n * shared.rank


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shared: Shared) -> Tensor:
        total = value.detach().clone()
        with losing():
            dist.all_reduce(total, group=shared.group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks."""
    shared = _SHARED.get()
    if shared is None:
        return value
    total: Tensor = _AllSum.apply(value, shared)  # type: ignore[no-untyped-call]
    return total


def all_sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over ranks of several tensors, in float64 and in one go, without gradients."""
    if _SHARED.get() is None:
        return values
    flat = all_sum(torch.cat([value.detach().double().flatten() for value in values.values()]))
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def all_min(value: Tensor) -> Tensor:
    """The least over ranks, entry by entry, without gradients."""
    shared = _SHARED.get()
    if shared is None:
        return value
    least = value.detach().clone()
    with losing():
        dist.all_reduce(least, dist.ReduceOp.MIN, group=shared.group)
    return least


def among_largest(values: Tensor, n: int) -> Tensor | None:
    """Which of this rank's values, of which every rank has as many, are among the `n` largest of all: bool.

    None: all of them are, since there is but one rank.
    """
    shared = _SHARED.get()
    if shared is None:
        return None
    everybody = [torch.empty_like(values) for _ in range(shared.size)]
    with losing():
        dist.all_gather(everybody, values.detach().contiguous(), group=shared.group)
    together = torch.cat(everybody)
    chosen = torch.topk(together, min(n, len(together)), sorted=False).indices  # on every rank the same, ties too
    taken = torch.zeros_like(together, dtype=torch.bool).scatter(0, chosen, True)
    return taken[shared.rank * len(values) :][: len(values)]


def largest_of_all(values: Tensor, n: int) -> Tensor:
    """Which of this rank's values, of which ranks may have unlike numbers, are among the `n` largest of all."""
    if _SHARED.get() is None:
        return torch.topk(values, n, sorted=False).indices
    most = -int(all_min(torch.tensor(-len(values), device=values.device)))
    taken = among_largest(torch.nn.functional.pad(values, (0, most - len(values)), value=-torch.inf), n)
    assert taken is not None
    return taken[: len(values)].nonzero().squeeze(-1)


def count_over_ranks(n: int, device: torch.device) -> int:
    """The sum over ranks of a number on the host."""
    return n if _SHARED.get() is None else int(all_sum(torch.tensor(n, device=device)))


def sum_gradients_(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all ranks."""
    shared = _SHARED.get()
    if shared is None:
        return
    with losing():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, group=shared.group, async_op=True) for gradient in gradients]:
            work.wait()


def copy_from_first_(tensors: Iterable[Tensor]) -> None:
    """Make tensors those of rank 0."""
    shared = _SHARED.get()
    if shared is None:
        return
    with losing():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0, group=shared.group)
