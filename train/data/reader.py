"""The reader: a mapped pool of chunks in, batches out, the next pool read ahead by a thread.

Holds no position. `batch(step)` may be called for any step in any order; calling it in order is fast.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.config import build
from common.dtypes import TORCH, to_torch
from common.layout import TOKENS, acts_array, token_scales_array
from common.quantise import dequantise
from common.store import Store
from train.config import DataConfig
from train.data.batch import Batch
from train.data.mapping import bring_in, can_map, map_side_by_side
from train.data.plan import DataPlan, plan_data
from train.data.shuffle import Piece
from train.data.split import (
    ChunkIndex,
    held_out_documents,
    index_chunk,
    positions_in_document,
    windows_in,
)


@dataclass
class Pool:
    """Chunks open at once: their activations as one array, and all that is known of each position.

    Attributes:
        acts: [positions, d_model], mapped or in memory, in the storage type.
        scales: of int8 activations: of each position [positions] and of each dimension [d_model], float32.
        wanted: bool [positions], the positions that count.
        windows: window length to starts, permuted: entry i is the i-th window of the pool's order.
        counts: window length to wanted positions of each window in that order, on the host.
        read_context: gives int32 [positions, 3]: document, position in it, token id; called when first wanted.
    """

    acts: torch.Tensor
    wanted: torch.Tensor
    windows: dict[int, torch.Tensor]
    counts: dict[int, np.ndarray]
    read_context: Callable[[], torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor] | None = None

    @functools.cached_property
    def context(self) -> torch.Tensor:
        return self.read_context()

    @functools.cached_property
    def always(self) -> torch.Tensor:
        """True [1, 1]: windows of one position lie at wanted ones only."""
        return torch.ones(1, 1, dtype=torch.bool, device=self.acts.device)

    def n_valid(self, window: int, start: int, stop: int) -> int:
        """Wanted positions in windows `start` to `stop` of the pool's order."""
        return stop - start if window == 1 else int(self.counts[window][start:stop].sum())

    def gather(self, window: int, start: int, stop: int, out: torch.Tensor | None = None) -> Batch:
        """Windows `start` to `stop` of the pool's order. All on the pool's device: nothing waits for a copy."""
        starts = self.windows[window][start:stop]
        device, shape = self.acts.device, (len(starts), window)
        rows = starts if window == 1 else (starts[:, None] + torch.arange(window, device=device)).view(-1)
        x = torch.index_select(self.acts, 0, rows, out=out)
        if self.scales is not None:
            x = dequantise(x, self.scales[0][rows], self.scales[1])
        return Batch(
            x=x.view(*shape, -1),
            valid=self.always.expand(shape) if window == 1 else self.wanted[rows].view(shape),
            n_valid=self.n_valid(window, start, stop),
            read_context=lambda: torch.index_select(self.context, 0, rows).view(*shape, 3),
        )


class Batches:
    """Batches of a store, by number.

    Args:
        plan: from `plan_data`.
        windows: the window lengths that will be asked for.
        device: where batches are wanted; a GPU takes the whole pool and gathers there.

    Attributes:
        waited_s: time spent waiting for a pool to be read.
        read_bytes: bytes of batches given out.
    """

    def __init__(self, store: Store, plan: DataPlan, device: torch.device | str = "cpu") -> None:
        self.store, self.plan, self.device = store.as_of(plan.n_sequences), plan, torch.device(device)
        self.waited_s, self.read_bytes = 0.0, 0
        self._orders = {window: plan.order(window) for window in plan.windows}
        self._any_order = next(iter(self._orders.values()))
        self._held_out = held_out_documents(plan.n_documents, plan.config.held_out)
        self._verified: set[tuple[str, int]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pool-reader")
        self._pools: dict[tuple[int, int], Future[Pool]] = {}
        self._recent: deque[list[tuple[int, int]]] = deque(maxlen=len(self._orders))  # pools of the latest batches
        self._out: dict[tuple[int, int], list[torch.Tensor]] = {}

    @classmethod
    def of(
        cls, store: Store, config: DataConfig | None = None, seed: int = 0, window: int = 1, device: str = "cpu"
    ) -> Batches:
        """Batches of one window length straight from a store."""
        return cls(store, plan_data(store, config or build(DataConfig, {}, "data"), seed, {window}), device)

    def windows_per_pass(self, window: int = 1) -> int:
        return self._orders[window].windows_per_pass

    def batch(self, step: int, n_windows: int, window: int = 1, reuse: bool = False) -> Batch:
        """Batch number `step` of `n_windows` windows.

        With `reuse` its `x` lies in a buffer that the next but one batch of the same size overwrites: no fresh
        memory per batch, for callers that convert it at once.

        Raises:
            StoreError: a chunk does not match its checksum (each is checked when it is first read).
        """
        return self._gather(self._open(step, n_windows, window), step, n_windows, window, reuse)

    def share(self, step: int, n_windows: int, window: int, rank: int, size: int, reuse: bool = False) -> Batch:
        """Of batch number `step` the rows of one of `size` ranks, as many for each; `n_valid` is the whole batch's."""
        whole = self._open(step, n_windows, window)
        own = list(self._orders[window].pieces(step * size + rank, n_windows // size))
        rows = self._gather(own, step, n_windows // size, window, reuse)
        return replace(rows, n_valid=sum(self._pool(p).n_valid(window, p.start, p.stop) for p in whole))

    def _open(self, step: int, n_windows: int, window: int) -> list[Piece]:
        """Where a batch lies. Its pools are read, and the next; those of no recent batch are let go.

        Recent are as many batches as there are window lengths, since learners with long windows may be far from those
        with short ones: with `within_document` a pass has fewer of theirs.
        """
        pieces = list(self._orders[window].pieces(step, n_windows))
        keys = [(piece.pass_number, piece.pool) for piece in pieces]
        pass_number, pool = keys[-1]
        last = pool + 1 == self._any_order.pools_per_pass
        keys.append((pass_number + 1, 0) if last else (pass_number, pool + 1))
        self._recent.append(keys)
        for gone in self._pools.keys() - {key for recent in self._recent for key in recent}:
            self._pools.pop(gone).cancel()
        for key in keys:
            if key not in self._pools:
                self._pools[key] = self._thread.submit(self.load_pool, *key)
        return pieces

    def _gather(self, pieces: list[Piece], step: int, n_windows: int, window: int, reuse: bool) -> Batch:
        out = self._buffer(n_windows, window, step) if reuse and len(pieces) == 1 else None
        parts = [self._pool(piece).gather(window, piece.start, piece.stop, out) for piece in pieces]
        batch = Batch.join(parts)
        self.read_bytes += batch.x.nbytes
        return batch

    def _pool(self, piece: Piece) -> Pool:
        started = time.monotonic()
        pool = self._pools[piece.pass_number, piece.pool].result()
        self.waited_s += time.monotonic() - started
        return pool

    def _buffer(self, n_windows: int, window: int, step: int) -> torch.Tensor:
        key = (n_windows, window)  # not the number of rows: batches of two window lengths are in use at once
        if key not in self._out:
            shape = (n_windows * window, self.store.d_model(self.plan.hook))
            dtype = TORCH[self.store.hooks[self.plan.hook]["dtype"]]
            self._out[key] = [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2)]
        return self._out[key][step % 2]

    def load_pool(self, pass_number: int, pool: int) -> Pool:
        """Map and index the chunks of one pool; checks each chunk's checksum the first time it is read."""
        members = self._any_order.pool_members(pass_number, pool)
        indexes = [self._index(chunk) for chunk in members]
        wanted = self._lay([index.train for index in indexes])
        windows = {
            window: order.shuffled(pass_number, pool, self._starts(indexes, wanted, window))
            for window, order in self._orders.items()
        }
        return self._make_pool(members, indexes, wanted, windows, self.device)

    def _index(self, chunk: int) -> ChunkIndex:
        verify = (TOKENS, chunk) not in self._verified
        index = index_chunk(self.store, self.plan.hook, chunk, self._held_out, self.plan.max_norm, verify)
        self._verified.add((TOKENS, chunk))
        return index

    @property
    def _chunk_positions(self) -> int:
        return self.store.chunk_sequences * self.store.context

    def _lay(self, values: list[np.ndarray]) -> np.ndarray:
        """One value per position of each chunk of a pool, as one array; 0 past the end of a short last chunk."""
        size = self._chunk_positions
        whole = np.zeros(size * len(values), values[0].dtype)
        for number, part in enumerate(values):
            whole[number * size :][: len(part)] = part
        return whole

    def _starts(self, indexes: list[ChunkIndex], wanted: np.ndarray, window: int, across: bool = False) -> np.ndarray:
        """Starts of a pool's windows that have a wanted position, rising."""
        if window == 1:
            return np.flatnonzero(wanted)
        size, within = self._chunk_positions, self.plan.config.within_document and not across
        parts = [
            number * size
            + windows_in(index, wanted[number * size :][: len(index.train)], self.store.context, window, within)
            for number, index in enumerate(indexes)
        ]
        return np.concatenate(parts)

    def _make_pool(
        self,
        members: list[int],
        indexes: list[ChunkIndex],
        wanted: np.ndarray,
        windows: dict[int, np.ndarray],
        device: torch.device,
        bring: bool = True,
    ) -> Pool:
        def read_context() -> torch.Tensor:
            documents = self._lay([index.documents for index in indexes])
            positions = positions_in_document(documents, self.store.context)
            tokens = self._lay([index.tokens for index in indexes])
            return torch.from_numpy(np.stack([documents, positions, tokens], axis=1)).to(device)

        before = np.concatenate([[0], np.cumsum(wanted)]) if any(window > 1 for window in windows) else wanted
        return Pool(
            acts=self._acts(members, bring).to(device),
            wanted=torch.from_numpy(wanted).to(device),
            windows={window: torch.from_numpy(starts).to(device) for window, starts in windows.items()},
            counts={window: before[s + window] - before[s] for window, s in windows.items() if window > 1},
            read_context=read_context,
            scales=self._scales(members, device),
        )

    def _scales(self, members: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        dimension = self.store.dimension_scales(self.plan.hook)
        if dimension is None:
            return None
        array = token_scales_array(self.plan.hook)
        token = np.concatenate([self.store.map_chunk(array, chunk, verify=True).reshape(-1) for chunk in members])
        return torch.from_numpy(token).to(device), torch.from_numpy(dimension).to(device)

    def _acts(self, members: list[int], bring: bool) -> torch.Tensor:
        """The chunks' activations as one tensor, mapped where they can be; `bring` reads all of it now."""
        array = acts_array(self.plan.hook)
        spec = self.store.spec(array)
        for chunk in members:
            wrong = self.store.check_size(array, chunk)
            if wrong is not None:
                raise self.store.damaged(array, chunk, wrong)
        if spec.compression is None and can_map(spec.chunk_bytes):
            memory = map_side_by_side([self.store.chunk_file(array, chunk) for chunk in members], spec.chunk_bytes)
            for number, chunk in enumerate(members):
                data = memory[number * spec.chunk_bytes :][: spec.chunk_bytes]
                if bring:  # a chunk at a time: it is checked while the disk reads the next
                    bring_in(data)
                self._verify(chunk, data)
            return to_torch(memory.view(spec.numpy_dtype).reshape(-1, spec.shape[-1]))
        rows = spec.chunk_rows * spec.shape[1]
        whole = torch.empty(len(members) * rows, spec.shape[-1], dtype=TORCH[spec.dtype])
        for number, chunk in enumerate(members):
            data = self.store.map_chunk(array, chunk, verify=(array, chunk) not in self._verified)
            self._verified.add((array, chunk))
            whole[number * rows :][:rows] = to_torch(data.reshape(rows, -1).copy())
        return whole

    def _verify(self, chunk: int, data: np.ndarray) -> None:
        key = acts_array(self.plan.hook), chunk
        if key not in self._verified:
            self.store.check_bytes(self.store.journal.entries[key], data)
            self._verified.add(key)

    def training_documents(self, max_chunks: int) -> np.ndarray:
        """The document of every training token of up to `max_chunks` chunks spread over the store."""
        picked = np.unique(np.linspace(0, len(self.plan.chunks) - 1, max_chunks).astype(int))
        indexes = [self._index(self.plan.chunks[number]) for number in picked]
        return np.concatenate([index.documents[index.train] for index in indexes])

    def held_out(
        self, window: int, max_tokens: int | None = None, batch_tokens: int = 8192, across: bool = False
    ) -> Iterator[Batch]:
        """Held-out documents in the order of the store, as windows; `valid` marks the held-out positions.

        With `across` windows may hold several documents whatever the data settings say.
        """
        left = max_tokens if max_tokens is not None else np.inf
        for chunk in self.plan.chunks:
            index = self._index(chunk)
            wanted = self._lay([index.held_out])
            starts = self._starts([index], wanted, window, across)
            pool: Pool | None = None
            step, start = max(batch_tokens // window, 1), 0
            while start < len(starts):
                if left <= 0:
                    return
                # gathered on the host: a whole chunk is not worth moving for its few held-out documents
                pool = pool or self._make_pool(
                    [chunk], [index], wanted, {window: starts}, torch.device("cpu"), bring=False
                )
                stop = min(start + step, len(starts), start + -(-int(min(left, 2**62)) // window))
                batch = pool.gather(window, start, stop)
                left, start = left - batch.n_valid, stop
                yield batch.to(self.device)

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()
