"""Sums over the ranks that share one step: the rows of its batch, or the latents of its dictionary.

In the scope of `shared_step` these functions see the whole; elsewhere there is but one rank, and they give back what
they get. `all_sum` and its kind are for ranks with rows of their own, `over_latents` and its kind for ranks with
latents of their own, the rest is for both.

A step's loss is then a function of sums over the whole, the same number on every rank. What a rank's own part does to
it is what its own backward pass finds, since a sum hands its gradient on as it is; so the gradients of all ranks add up
to the whole one, and `sum_gradients_` adds them up. Hence one rule: what is summed here is summed last. A parameter
that every rank has and that meets a number after it was summed would get that part of its gradient once for every rank;
`counted_once` divides it among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from train.ranks import losing


@dataclass(frozen=True)
class Shared:
    """How a step is shared: by `size` ranks with equal parts, of which this one is number `rank`."""

    rank: int
    size: int
    group: Any
    of: Literal["rows", "latents"] = "rows"


_SHARED: ContextVar[Shared | None] = ContextVar("shared", default=None)


def _sharing(of: str) -> Shared | None:
    shared = _SHARED.get()
    return shared if shared is not None and shared.of == of else None


@contextlib.contextmanager
def shared_step(shared: Shared | None) -> Iterator[None]:
    """The scope in which this rank has part of a step; None: it has all of it."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def over_ranks(n: int) -> int:
    """How many rows, or places in rows, there are on all ranks, of which every rank has `n`."""
    shared = _sharing("rows")
    return n if shared is None else n * shared.size


def before_this_rank(n: int) -> int:
    """How many of them there are on the ranks before this one."""
    shared = _sharing("rows")
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
    """The sum over all rows, from that over this rank's."""
    shared = _sharing("rows")
    return value if shared is None else _sum(value, shared)


def over_latents(value: Tensor) -> Tensor:
    """The sum over all latents, from that over this rank's."""
    shared = _sharing("latents")
    return value if shared is None else _sum(value, shared)


def latents_over_ranks(n: int) -> int:
    """How many latents there are on all ranks, of which this one has `n`."""
    shared = _sharing("latents")
    return n if shared is None else n * shared.size


def mean_over_latents(value: Tensor) -> Tensor:
    """The mean over all latents, from that over this rank's."""
    return over_latents(value) / latents_over_ranks(1)


def all_latents(values: Tensor) -> Tensor:
    """One value for each latent, from those of this rank's [own latents]."""
    shared = _sharing("latents")
    return values if shared is None else torch.cat(_gather(values, shared))


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, size: int) -> Tensor:
        ctx.size = size
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


def counted_once(value: Tensor) -> Tensor:
    """What every rank has alike, where it meets all latents: its gradient is divided among ranks."""
    shared = _sharing("latents")
    if shared is None:
        return value
    counted: Tensor = _CountedOnce.apply(value, shared.size)  # type: ignore[no-untyped-call]
    return counted


def _sum(value: Tensor, shared: Shared) -> Tensor:
    total: Tensor = _AllSum.apply(value, shared)  # type: ignore[no-untyped-call]
    return total


def _gather(values: Tensor, shared: Shared) -> list[Tensor]:
    everybody = [torch.empty_like(values) for _ in range(shared.size)]
    with losing():
        dist.all_gather(everybody, values.detach().contiguous(), group=shared.group)
    return everybody


def all_sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all rows of several tensors, in float64 and in one go, without gradients."""
    if _sharing("rows") is None:
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
    return _mine_of(torch.cat(_gather(values, shared)), n, shared)


def among_largest_latents(values: Tensor, k: int) -> Tensor | None:
    """Which of this rank's values [..., own candidates] are among the `k` largest of all ranks' in their row: bool.

    None: all of them are, since there is but one rank.
    """
    shared = _sharing("latents")
    return None if shared is None else _mine_of(torch.cat(_gather(values, shared), dim=-1), k, shared)


def _mine_of(together: Tensor, n: int, shared: Shared) -> Tensor:
    """Of all ranks' values, side by side, which of this rank's are among the `n` largest of each row."""
    chosen = torch.topk(
        together, min(n, together.shape[-1]), dim=-1, sorted=False
    ).indices  # alike everywhere, ties too
    taken = torch.zeros_like(together, dtype=torch.bool).scatter(-1, chosen, True)
    return taken.chunk(shared.size, dim=-1)[shared.rank]


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
    shared = _SHARED.get()
    return n if shared is None else int(_sum(torch.tensor(n, device=device), shared))


def sum_gradients_(parameters: Iterable[Tensor], everywhere: Iterable[Tensor]) -> None:
    """Add up the gradients of all ranks: of all parameters, or of those that are `everywhere` if ranks have latents."""
    shared = _SHARED.get()
    if shared is None:
        return
    summed = parameters if shared.of == "rows" else everywhere
    with losing():
        gradients = [parameter.grad for parameter in summed if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, group=shared.group, async_op=True) for gradient in gradients]:
            work.wait()


def clip_gradients_(parameters: list[Tensor], everywhere: list[Tensor], largest: float) -> Tensor:
    """Bound the norm of all gradients together; the norm before."""
    if _sharing("latents") is None:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    alike = {id(parameter) for parameter in everywhere}
    own: list[Tensor] = []
    common: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (common if id(parameter) in alike else own).append(parameter.grad)
    norm = (over_latents(_squares(own, like=parameters[0])) + _squares(common, like=parameters[0])).sqrt()
    for gradient in own + common:
        gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([like.new_zeros(()), *(tensor.square().sum() for tensor in tensors)]).sum().detach()


def copy_from_first_(tensors: Iterable[Tensor]) -> None:
    """Make tensors those of rank 0."""
    shared = _SHARED.get()
    if shared is None:
        return
    with losing():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0, group=shared.group)
