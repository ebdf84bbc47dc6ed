"""The most memory that tensors hold at once while something is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that `compute` made, at most at once, on the device it works on.

    On a GPU the allocator's own counter; on the CPU, whose allocators keep none and whose resident memory depends on
    what was freed before, the tensors that operations give out: not what a kernel uses inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        compute()
        torch.cuda.synchronize(device)
        most = int(torch.cuda.max_memory_allocated(device))
        return most - before
    made = Allocations()
    with made:
        compute()
    return made.peak


class Allocations(TorchDispatchMode):
    """Counts the storages that operations inside it make, until they are freed.

    Attributes:
        held, peak: bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: int = 0
        self.peak: int = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._alive:
                self._watch(storage)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), int(storage.nbytes())

        def freed(_: object) -> None:
            self._alive.pop(key)
            self.held -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


def tensors(values: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts; of sparse ones, which have no storage, what they are made of."""
    return [part for value in tree_leaves(values) if isinstance(value, Tensor) for part in parts_of(value)]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Indices and values of a sparse tensor; any other one is its own part."""
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout == torch.sparse_csc:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor]
