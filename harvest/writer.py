"""Writer threads: checksum, write and commit chunks while the model goes on with the next ones.

A fixed ring of chunk buffers bounds the memory and tells who waits for whom: when the model finds no free
buffer, the disk is what binds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.store import Store
from harvest.chunks import ChunkBuffer, files_of


@dataclass(frozen=True)
class Job:
    """One chunk ready to be written."""

    chunk: int
    rows: int
    buffer: ChunkBuffer


class Writers:
    """A pool of writer threads over one store.

    Attributes:
        waited_s: how long the model has waited for a free buffer.
        written_bytes: bytes of committed activations.
    """

    def __init__(
        self,
        store: Store,
        check: Callable[[str, int, dict[str, Any]], None],
        new_buffer: Callable[[], ChunkBuffer],
        threads: int,
    ) -> None:
        self.store, self.check = store, check
        self.waited_s = 0.0
        self.written_bytes = 0
        self.done_chunks = 0
        self._error: BaseException | None = None
        self._count = threading.Lock()
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._free: queue.Queue[ChunkBuffer | None] = queue.Queue()
        self._unmade = threads + 1  # one being filled while the others are written
        self._new_buffer = new_buffer
        self._threads = [threading.Thread(target=self._work, name=f"writer-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def free_buffer(self) -> ChunkBuffer:
        """A buffer to fill, waiting for one if all are being written.

        Raises:
            StoreError: a writer failed (disk full, …).
        """
        self._raise()
        if self._unmade and self._free.empty():
            self._unmade -= 1
            return self._new_buffer()
        started = time.monotonic()
        buffer = self._free.get()
        self.waited_s += time.monotonic() - started
        self._raise()
        assert buffer is not None
        return buffer

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Write what was submitted, then end the threads.

        Raises:
            StoreError: a writer failed.
        """
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    self._write(job)
                except BaseException as error:
                    self._error = error
            self._free.put(job.buffer)

    def _write(self, job: Job) -> None:
        job.buffer.wait()
        for hook, filled in job.buffer.hooks.items():
            chunks, facts = files_of(hook, job.chunk, job.rows, filled)
            self.check(hook, job.chunk, facts)
            self.store.commit(chunks)
            with self._count:
                self.written_bytes += chunks[0][2].nbytes
        with self._count:
            self.done_chunks += 1
