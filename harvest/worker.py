"""What runs in a worker process of a cluster: one chunk through the model, its files written aside, ready to publish.

The process that holds the store's lock publishes them and keeps the journal, so a worker that dies leaves nothing that
counts, and a chunk that two workers computed is published once. The model is loaded once per process. A worker with
two threads writes one chunk while the next is in the model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import ConfigError, GranaryError, StoreError
from common.files import canonical_json
from common.journal import Entry, Journal
from common.models import LanguageModel, load_model
from common.places import local_path
from common.sources import find_model
from common.store import Staged, Store
from harvest.chunks import ChunkBuffer, Forward, chunk_tokens, files_of
from harvest.compiled import compile_blocks
from harvest.scales import sample_scales

LOADING = threading.Lock()  # the threads of a process share one model: the second waits for the first to load it


@dataclass(frozen=True)
class ModelRecipe:
    """What a process needs to load the model that the harvest was planned with.

    Attributes:
        identity: what stands in the store's identity, as canonical JSON: another model is refused.
        compiled_for: the hooks at which a model with compiled blocks is looked at; none: it is not compiled.
    """

    name: str
    revision: str | None
    tokenizer: str | None
    device: str
    dtype: str
    identity: str
    compiled_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """What all chunks of one pass over the model share; hashable, so that a process keeps what it made for one.

    Attributes:
        threads: of PyTorch; None leaves them as they are.
        scales: of the dimensions of int8 hooks.
    """

    model: ModelRecipe
    widths: tuple[tuple[str, int], ...]
    dtype: str
    chunk_sequences: int
    context: int
    batch_size: int
    threads: int | None
    scales: tuple[tuple[str, tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class ChunkTask:
    """One chunk to harvest.

    Attributes:
        location: the store, as every worker sees it: a path or a URL.
        entries: the journal's lines of the chunk's tokens and documents.
    """

    shared: Pass
    location: str
    header: dict[str, Any]
    chunk: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class StagedHook:
    """One hook of a chunk, written aside, and what its moments say (`harvest.chunks.files_of`)."""

    hook: str
    files: list[Staged]
    facts: dict[str, Any]


@dataclass(frozen=True)
class ChunkDone:
    """A chunk of which only the publishing is left.

    Attributes:
        batch_size: sequences per forward pass from now on if memory ran out, else None.
        forward_s, write_s: time in the model, and time writing.
        size_bytes: of the activations.
    """

    chunk: int
    hooks: list[StagedHook]
    batch_size: int | None
    forward_s: float
    write_s: float
    size_bytes: int


class Bench:
    """The model in this process, and memory for its chunks: one chunk is in the model, others are being written."""

    def __init__(self, shared: Pass) -> None:
        self.runner = Forward(
            model_of(shared.model),
            dict(shared.widths),
            shared.dtype,
            shared.chunk_sequences,
            shared.context,
            shared.batch_size,
            {hook: list(scales) for hook, scales in shared.scales},
        )
        self.threads = shared.threads
        self.turn = threading.Lock()
        self.free: list[ChunkBuffer] = []

    def run(self, store: Store, chunk: int) -> ChunkDone:
        tokens, trainable = chunk_tokens(store, chunk)
        with self.turn:
            buffer = self.free.pop() if self.free else self.runner.new_buffer()
            if self.threads:
                torch.set_num_threads(self.threads)  # of this thread
            started = time.monotonic()
            halved = self.runner.run(tokens, trainable, buffer)
            batch_size, forward_s = self.runner.batch_size if halved else None, time.monotonic() - started
        started = time.monotonic()
        buffer.wait()
        hooks, size = [], 0
        for hook, filled in buffer.hooks.items():
            files, facts = files_of(hook, chunk, len(tokens), filled)
            hooks.append(StagedHook(hook, store.stage(files, by=f".{uuid.uuid4().hex[:8]}"), facts))
            size += files[0][2].nbytes
        self.free.append(buffer)
        return ChunkDone(chunk, hooks, batch_size, forward_s, time.monotonic() - started, size)


def harvest_chunk(task: ChunkTask) -> ChunkDone:
    """Run one chunk.

    Raises:
        GranaryError: naming this worker: no model or no store here, out of memory, disk full.
    """
    with named_errors():
        return bench_for(task.shared).run(store_of(task), task.chunk)


def measure_scales(task: ChunkTask) -> dict[str, list[float]]:
    """Scales of int8 hooks; the chunk is the first one.

    Raises:
        GranaryError: as `harvest_chunk`.
    """
    with named_errors():
        return sample_scales(bench_for(task.shared).runner, store_of(task))


def store_of(task: ChunkTask) -> Store:
    """The store of a task, with the lines of its journal that came with it.

    Raises:
        StoreError: it is not there on this machine.
    """
    path = local_path(task.location)
    store = Store(path, task.header, Journal(path / "journal.jsonl", task.entries))
    if not Store.exists(path):
        raise StoreError(f"{store.name}: no store here. It must lie where all workers see it under this path.")
    return store


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Errors say which worker they come from."""
    try:
        yield
    except GranaryError as error:
        raise type(error)(f"worker on {socket.gethostname()}, process {os.getpid()}: {error}") from None


def bench_for(shared: Pass) -> Bench:
    with LOADING:
        return _bench(shared)


@functools.lru_cache(maxsize=1)
def _bench(shared: Pass) -> Bench:
    return Bench(shared)


@functools.lru_cache(maxsize=1)
def model_of(recipe: ModelRecipe) -> LanguageModel:
    """The model, loaded once per process.

    Raises:
        ConfigError: it cannot be had here, or is another one than the harvest was planned with, or cannot be compiled.
    """
    source = find_model(recipe.name, recipe.revision)
    if canonical_json(source.identity()) != recipe.identity:
        raise ConfigError(
            f"--model {recipe.name}: another model lies there than on the machine that planned the harvest."
        )
    model = load_model(source, recipe.device, recipe.dtype, recipe.tokenizer)
    if recipe.compiled_for:
        compile_blocks(model, recipe.compiled_for)
    return model


def dask_setup(worker: Any) -> None:
    """For workers that belong to one command: Ctrl-C reaches them too, but it is the command that ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
