"""Writer threads: everything submitted is committed, and an error reaches the one who submits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.checks import problems
from common.errors import StoreError
from common.layout import acts_array
from common.store import Store
from harvest.chunks import ChunkBuffer, HookBuffer
from harvest.moments import PartialSums
from harvest.writer import Job, Writers

N, CHUNK, CONTEXT, D = 12, 4, 8, 6


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    """A store of twelve chunks, none committed."""
    identity = {"context": CONTEXT, "chunk_sequences": CHUNK, "dtype": "float32", "compression": None}
    header: dict[str, Any] = {"identity": identity, "n_sequences": N * CHUNK, "special_tokens": [], "vocabulary": 9}
    hooks = {"a": {"d_model": D, "dtype": "float32", "summarised": False}}
    return Store.create(tmp_path / "x.zarr", header | {"hooks": hooks})


def new_buffer() -> ChunkBuffer:
    sums = PartialSums(D, torch.device("cpu"))
    return ChunkBuffer({"a": HookBuffer(torch.empty(CHUNK, CONTEXT, D), torch.empty(CHUNK, CONTEXT), sums)})


def fill(buffer: ChunkBuffer, value: int) -> None:
    hook = buffer.hooks["a"]
    hook.acts.fill_(value)
    hook.partial = PartialSums(D, torch.device("cpu"))
    hook.norms.copy_(hook.partial.add(hook.acts, torch.ones(CHUNK, CONTEXT, dtype=torch.bool))[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_writers_commit_every_chunk_with_few_buffers(empty: Store, threads: int) -> None:
    made: list[ChunkBuffer] = []

    def counted() -> ChunkBuffer:
        made.append(new_buffer())
        return made[-1]

    writers = Writers(empty, lambda *_: None, counted, threads)
    for chunk in range(N):
        buffer = writers.free_buffer()
        fill(buffer, chunk)
        writers.submit(Job(chunk, CHUNK, buffer))
    writers.close()
    assert len(made) <= threads + 1
    assert writers.done_chunks == N
    assert writers.written_bytes == N * CHUNK * CONTEXT * D * 4
    store = Store.open(empty.path)
    assert [float(store.map_chunk(acts_array("a"), chunk, verify=True)[0, 0, 0]) for chunk in range(N)] == list(
        range(N)
    )
    assert list(problems(store)) == []


def test_writers_raise_the_first_error_and_write_nothing_after_it(empty: Store) -> None:
    def refuse(hook: str, chunk: int, facts: dict[str, Any]) -> None:
        if chunk == 3:
            raise StoreError("chunk 3 is bad")

    writers = Writers(empty, refuse, new_buffer, 1)

    def submit_all() -> None:
        for chunk in range(N):
            buffer = writers.free_buffer()
            fill(buffer, chunk)
            writers.submit(Job(chunk, CHUNK, buffer))

    with pytest.raises(StoreError, match="chunk 3 is bad"):
        submit_all()
    with pytest.raises(StoreError, match="chunk 3 is bad"):
        writers.close()
    assert Store.open(empty.path).committed(acts_array("a")) == [0, 1, 2]
