"""A CUDA graph played on a CPU: operations are noted with their tensors, and done again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Taken = TypeVar("Taken")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "masked_select", "unique")
"""Operations for which the host would wait for a GPU, or bring it something of its own."""


class Noting(TorchDispatchMode):
    """Notes operations, and puts every tensor back that they changed: a recording computes nothing.

    Raises:
        AssertionError: an operation that cannot be recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{name}: the host waits for the device inside a recorded step"
        for tensor in written(func, args, kwargs):
            memory = tensor.untyped_storage().data_ptr()
            if memory not in self.made and memory not in self.before:
                self.before[memory] = (tensor, tensor.detach().clone())
        here = tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # shapes as they are now: some change in place
        result = func(*args, **kwargs)
        fresh = [] if aliases(func) else [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.made |= {tensor.untyped_storage().data_ptr() for tensor in fresh}
        if torch.Tag.inplace_view not in func.tags:
            self.done.append((func, *here, fresh))
        return result

    def put_back(self) -> None:
        for tensor, value in self.before.values():
            tensor.detach().copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self.done:
                result = func(*args, **kwargs)
                if fresh:
                    again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                    for place, value in zip(fresh, again, strict=True):
                        place.copy_(value)


def aliases(func: Any) -> bool:
    """Whether what an operation gives lies where its arguments do."""
    return any(each.alias_info is not None for each in func._schema.returns) or not func._schema.returns


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operation changes."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class CpuTape:
    """Records on a CPU as `train.recording.CudaTape` does on a GPU.

    Attributes:
        recorded: how many steps were.
    """

    def __init__(self) -> None:
        self.recorded, self.is_aside, self.joined = 0, False, True

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.is_aside, self.joined = True, False
        yield
        self.is_aside = False

    def join(self) -> None:
        self.joined = True

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        assert self.is_aside
        self.recorded += 1
        with Noting() as notes:
            taken = function()
        notes.put_back()
        return taken, notes.replay
