"""Steps played again from a recording: a CUDA graph of a step's kernels, launched at once.

A GPU is done with a small step sooner than the host has queued its kernels. Played again the same kernels run on the
same memory, so every value is what it would be otherwise, to the bit. A recording serves while nothing changes that
the host has a say in: the shape of the batch, `SAE.host_facts`, how many latents may be dead. Learners step on streams
of their own, so that small ones share a GPU; the caller's stream waits for all of them at the end of a step, and they
for it at the start of one, so that nobody else need know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from common.console import say
from train.data.batch import Batch

ALIKE = 32  # steps with the same facts before one is recorded: recording takes as long as some hundred steps
MOST_CODES = 2**26  # codes of a step, batch · latents, up to which queueing matters
STREAMS = 32  # that PyTorch deals out in turn: a recording that ends may take the cuBLAS memory of others of its stream
Taken = TypeVar("Taken")


class Tape(Protocol):
    """What records."""

    def aside(self) -> AbstractContextManager[None]:
        """The scope in which a learner's work is queued, after all that was queued before."""

    def join(self) -> None:
        """What is queued from here on comes after all that was queued aside."""

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        """What a function gives, with its tensors' values still to come, and what brings them."""


class CudaTape:
    """A stream of its own, and CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # the reading thread may bring a pool meanwhile: only this thread must not wait
            with torch.cuda.graph(graph, memory, self.stream, capture_error_mode="thread_local"):
                taken = function()
        except RuntimeError:
            self._let_go(graph, memory)
            raise
        return taken, graph.replay

    def _let_go(self, graph: torch.cuda.CUDAGraph, memory: Any) -> None:
        """End a recording that CUDA ended: PyTorch's allocator goes on with it, and would never free what is cached."""
        with contextlib.suppress(RuntimeError):
            graph.pool()  # only of one that was ended as it should be
            return
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.stream.device_index, memory)
            torch._C._cuda_releasePool(self.stream.device_index, memory)


class Recorder:
    """The recording of one learner's steps, while there is one.

    Attributes:
        replay: plays the recording; None while there is none.
        possible: until recording fails.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape, self.possible = tape, True
        self.forget()

    def forget(self) -> None:
        """Begin anew: something changed that a recording would not know of."""
        self._key: Hashable = None
        self._alike = 0
        self._input: Batch | None = None
        self._taken: Any = None
        self.replay: Callable[[], None] | None = None

    def step(self, take: Callable[[Batch], Taken], batch: Batch, facts: Hashable) -> Taken:
        """What `take` gives for a batch: taken, or played again.

        Args:
            take: must give the same for the same batch and facts, but for what it reads from tensors that stay.
            facts: None where the step cannot be recorded.
        """
        key = (facts, batch.n_valid, batch.x.shape) if self.possible and facts is not None else None
        if key != self._key:
            self.forget()
            self._key = key
        self._alike += 1
        if key is None or self._alike <= ALIKE:
            return take(batch)
        if self.replay is None:
            self._record(take, batch)
        if self.replay is None or self._input is None:
            return take(batch)
        self._input.x.copy_(batch.x)
        self._input.valid.copy_(batch.valid)
        self.replay()
        taken: Taken = self._taken
        return taken

    def _record(self, take: Callable[[Batch], Any], batch: Batch) -> None:
        here = Batch(batch.x.clone(), batch.valid.clone(), batch.n_valid, no_context)
        try:
            self._taken, self.replay = self.tape.record(lambda: take(here))
        except RuntimeError as error:  # nothing was computed: the step can still be taken
            first = error.__context__  # where it went wrong; to end such a recording is an error too, and says less
            reason = str(first if isinstance(first, RuntimeError) else error).partition("\n")[0]
            say(f"--graphs: this GPU does not record the step ({reason}); steps are taken one by one")
            self.possible = False
        self._input = here


def no_context() -> Tensor:
    """
    Raises:
        RuntimeError: always; documents and positions are not copied to where a recording reads.
    """
    raise RuntimeError("a recorded step looks at documents or positions: its variant's host_facts must be None")


def recorder_for(device: torch.device, codes: int, wanted: bool) -> Recorder | None:
    """A recorder for steps of so many codes, if it is wanted and of use."""
    return Recorder(CudaTape(device)) if wanted and device.type == "cuda" and codes <= MOST_CODES else None
