"""Reading batches of 2,048 shuffled single tokens (d=512, bf16) against index_select over a resident tensor.

Of one pool alone, and pool after pool: then the whole cost is counted, mapping and indexing each pool, in its thread,
while the pool before it is read. Cold:
the files are dropped from the page cache first, against reading the same files from end to end.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

from common.dtypes import NUMPY, to_torch
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array, partial_array
from common.store import Store
from tests.benchmarks.measure import Row, Timing, interleaved, median_ratio
from train.data.reader import Batches

HOOK = "blocks.0.hook_resid_post"
D_MODEL = 512
CONTEXT = 128
CHUNK = 512
CHUNKS = 48  # 3.1 M tokens, 3.2 GB: three pools
BATCH = 2048
PEER_ROWS = 4096  # sequences of the peer's data set: half a million tokens
PEER_BUFFER = 64  # batches it mixes at once, its default


def make_store(path: Path, chunks: int = CHUNKS) -> Store:
    """A store of random activations; every position may be trained on but the first of each sequence."""
    identity = {
        "format": 1, "model": {"weights": "random"}, "model_dtype": "float32", "tokenizer": "none",
        "corpus": {"name": "random"}, "packing": "packed", "context": CONTEXT, "bos": True, "dtype": "bfloat16",
        "compression": None, "chunk_sequences": CHUNK, "seed": 0,
    }  # fmt: skip
    header = {
        "identity": identity, "n_sequences": CHUNK * chunks, "corpus_dry": False, "special_tokens": [0],
        "vocabulary": 1000, "n_layers": 1, "settings": {"model": "random", "batch_size": 32},
        "hooks": {HOOK: {"d_model": D_MODEL, "dtype": "bfloat16", "id": "", "summarised": False}},
    }  # fmt: skip
    store = Store.create(path, header)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((CHUNK, CONTEXT, D_MODEL), np.float32).astype(NUMPY["bfloat16"])
    sums = np.stack([np.zeros(D_MODEL), np.full(D_MODEL, CHUNK * (CONTEXT - 1.0))])[None]
    for chunk in range(chunks):
        tokens = generator.integers(1, 1000, (CHUNK, CONTEXT), np.int32)
        tokens[:, 0] = 0
        documents = np.repeat(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK, dtype=np.int32)[:, None], CONTEXT, 1)
        norms = np.full((CHUNK, CONTEXT), D_MODEL**0.5, np.float32)
        facts = {"count": CHUNK * (CONTEXT - 1), "max_abs": 5.0}
        store.commit(
            [(TOKENS, chunk, tokens, {}), (DOCUMENTS, chunk, documents, {}), (acts_array(HOOK), chunk, values, {}),
             (norms_array(HOOK), chunk, norms, {}), (partial_array(HOOK), chunk, sums, facts)]
        )  # fmt: skip
    return store


def drop_from_cache(files: list[Path]) -> None:
    """Ask the kernel to forget the files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(batches: Batches, start: int, stop: int) -> None:
    """Batches number `start` to `stop`, in order."""
    for step in range(start, stop):
        batches.batch(step, BATCH, reuse=True)


def read_pass(batches: Batches, number: int = 0) -> None:
    """Every batch of one pass, in order."""
    per_pass = batches.windows_per_pass() // BATCH
    read(batches, number * per_pass, (number + 1) * per_pass)


def warm_rows(store: Store, rounds: int) -> list[Row]:
    """One pool read over and over, and whole passes, with every pool mapped, indexed and shuffled as its turn comes."""
    batches = Batches.of(store)
    pool_rows = batches.plan.pool_chunks * CHUNK * CONTEXT
    files = [store.chunk_path(acts_array(HOOK), chunk) for chunk in range(batches.plan.pool_chunks)]
    resident = to_torch(np.concatenate([np.fromfile(file, np.uint8) for file in files]).view(NUMPY["bfloat16"]))
    resident = resident.view(pool_rows, D_MODEL)
    per_pass = batches.windows_per_pass() // BATCH
    per_pool = int(batches.plan.order(1).pool_starts(0)[1]) // BATCH
    indices = [torch.randint(0, pool_rows, (BATCH,)) for _ in range(64)]
    out = torch.empty(BATCH, D_MODEL, dtype=torch.bfloat16)

    def floor(steps: int) -> None:
        for step in range(steps):
            torch.index_select(resident, 0, indices[step % 64], out=out)

    def row(name: str, ours: Callable[[], None], steps: int) -> Row:
        times = interleaved({"ours": ours, "floor": lambda: floor(steps)}, rounds)
        tokens = steps * BATCH
        rate, best = tokens / times["ours"].median, tokens / times["floor"].median
        bytes_of_token = D_MODEL * 2 / 1e9
        return Row(f"{name} / index_select on a resident pool",
                   f"{rate / 1e6:.2f} M tok/s ({rate * bytes_of_token:.1f} GB/s)",
                   f"{best / 1e6:.2f} M tok/s ({best * bytes_of_token:.1f} GB/s)",
                   median_ratio(times["floor"], times["ours"]), 0.7)  # fmt: skip

    passes = itertools.count(1)
    rows = [
        row("batches of 2,048 tokens, page-cached, of one pool", lambda: read(batches, 0, per_pool), per_pool),
        row("the same, pool after pool", lambda: read_pass(batches, next(passes)), per_pass),
    ]
    batches.close()
    return rows


class PeerReader:
    """How the strongest peer reads its cache, with the library it uses for that.

    Rows of a memory-mapped `datasets` table become float32 tensors and fill a mixing buffer of 64 batches, which is
    shuffled whole; half of it is given out in batches of 2,048, then it is filled up again.
    """

    def __init__(self, folder: Path) -> None:
        features = datasets.Features({"acts": datasets.Array2D(shape=(CONTEXT, D_MODEL), dtype="float32")})
        generator = np.random.default_rng(0)
        rows = generator.standard_normal((256, CONTEXT, D_MODEL), np.float32)
        part = datasets.Dataset.from_dict({"acts": rows}, features=features)
        datasets.concatenate_datasets([part] * (PEER_ROWS // 256)).save_to_disk(str(folder))
        self.rows = datasets.load_from_disk(str(folder)).with_format("torch")

    def read_all(self) -> None:
        """Every batch of one pass."""
        half, rows_of_batch = PEER_BUFFER * BATCH // 2, BATCH // CONTEXT
        buffer = torch.empty(0, D_MODEL)
        for start in range(0, PEER_ROWS, half // CONTEXT):
            stop = min(start + half // CONTEXT, PEER_ROWS)
            slices = [self.rows[i : i + rows_of_batch]["acts"] for i in range(start, stop, rows_of_batch)]
            buffer = torch.cat([buffer, *(rows.reshape(-1, D_MODEL) for rows in slices)])
            buffer = buffer[torch.randperm(len(buffer))]
            given, buffer = buffer[:half], buffer[half:]
            for _ in given.split(BATCH):
                pass


def peer_row(store: Store, folder: Path, rounds: int) -> Row:
    datasets.disable_progress_bars()
    batches, peer, passes = Batches.of(store), PeerReader(folder), itertools.count(1)
    steps = batches.windows_per_pass() // BATCH
    things = {"ours": lambda: read_pass(batches, next(passes)), "peer": peer.read_all}
    times = interleaved(things, rounds)
    batches.close()
    rate, theirs = steps * BATCH / times["ours"].median, PEER_ROWS * CONTEXT / times["peer"].median
    return Row("the same / a peer's way: datasets rows and a mixing buffer", f"{rate / 1e6:.2f} M tok/s",
               f"{theirs / 1e6:.2f} M tok/s", rate / theirs, 5.0)  # fmt: skip


def cold_row(store: Store, rounds: int) -> Row:
    files = [store.chunk_path(acts_array(HOOK), chunk) for chunk in range(store.n_chunks)]
    ours, floor = [], []
    for _ in range(rounds):
        drop_from_cache(files)
        started = time.perf_counter()
        buffer = bytearray(1 << 22)
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        floor.append(time.perf_counter() - started)
        drop_from_cache(files)
        batches = Batches.of(store)
        started = time.perf_counter()
        read_pass(batches)
        ours.append(time.perf_counter() - started)
        batches.close()
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    a, b = Timing(ours), Timing(floor)
    return Row("batches from a cold cache / sequential read of the same files", f"{gigabytes / a.median:.2f} GB/s",
               f"{gigabytes / b.median:.2f} GB/s", median_ratio(b, a), 0.7)  # fmt: skip


def run(rounds: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "bench.zarr")
        peer = peer_row(store, Path(scratch) / "peer", rounds)
        return [*warm_rows(store, rounds), peer, cold_row(store, rounds)]
