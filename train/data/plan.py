"""What of a store a run reads, made exact before its first step: chunks, windows, thresholds, a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from common.errors import ConfigError, DataError, StoreError
from common.files import crc32c, fingerprint
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array, token_scales_array
from common.store import Store
from train.config import DataConfig
from train.data.shuffle import Order, key_of
from train.data.split import held_out_documents, index_chunk, median_norm, windows_in


@dataclass(frozen=True)
class DataPlan:
    """The data settings made exact, once per run; a resumed run takes them from its folder.

    Attributes:
        chunks: chunk numbers trained on: those committed when the run began.
        n_sequences: length of the store when the run began; what it grew by since is not read.
        digest: fingerprint of the chunks' bytes up to there.
        mean_squared_norm: E ‖x‖² over the training tokens.
        max_norm: positions with a larger norm are left out.
        pool_chunks: chunks open at once.
        n_documents: documents in these chunks.
        windows: window length to windows per chunk, in the order of `chunks`.
    """

    store_id: str
    hook: str
    chunks: tuple[int, ...]
    n_sequences: int
    digest: str
    mean_squared_norm: float
    max_norm: float
    pool_chunks: int
    n_documents: int
    windows: dict[int, tuple[int, ...]]
    config: DataConfig
    seed: int

    def order(self, window: int) -> Order:
        """The order of windows of this length."""
        settings = self.config.model_dump(mode="json") | {"max_norm": self.max_norm, "pool_chunks": self.pool_chunks}
        key = key_of(self.store_id, self.hook, settings, self.seed)
        return Order(key, self.chunks, self.windows[window], self.pool_chunks, window)


def digest_of(store: Store, hook: str, chunks: tuple[int, ...]) -> str:
    """A fingerprint of everything a run reads: checksums of full chunks, and of the true rows of a short last one.

    So it stays the same when the store is extended and the short chunk is filled up.
    """

    def checksum(array: str, chunk: int) -> str:
        rows = store.sequences_in(chunk)
        if rows == store.chunk_sequences:
            return store.journal.entries[array, chunk].crc32c
        return crc32c(np.ascontiguousarray(store.map_chunk(array, chunk, verify=True)[:rows]))

    arrays = [TOKENS, DOCUMENTS, acts_array(hook), norms_array(hook)]
    scales = store.dimension_scales(hook)
    if scales is not None:
        arrays.append(token_scales_array(hook))
    found = [[checksum(array, chunk) for array in arrays] for chunk in chunks]
    return fingerprint(found if scales is None else [found, scales.tolist()])


def plan_data(store: Store, config: DataConfig, seed: int, windows: set[int]) -> DataPlan:
    """Count the windows of every committed chunk.

    Raises:
        StoreError: no chunk is there yet, or one is missing, cut short, or its tokens do not match their checksum.
        DataError: nothing may be trained on, or nothing can be held out.
    """
    hook = store.hook(config.hook)
    chunks = store.usable_chunks(hook)
    if not chunks:
        raise StoreError(f"{store.name}: no chunk of {hook} is harvested yet. Run: harvest info {store.name}")
    for chunk in chunks:
        wrong = store.check_size(acts_array(hook), chunk)
        if wrong is not None:
            raise store.damaged(acts_array(hook), chunk, wrong)
    max_norm = config.max_norm_ratio * median_norm(store, hook, chunks) if config.max_norm_ratio else np.inf
    plan = DataPlan(
        store_id=store.id,
        hook=hook,
        chunks=tuple(chunks),
        n_sequences=store.n_sequences,
        digest=digest_of(store, hook, tuple(chunks)),
        mean_squared_norm=0.0,
        max_norm=min(float(max_norm), float(np.finfo(np.float32).max)),
        pool_chunks=max(config.pool_tokens // (store.chunk_sequences * store.context), 1),
        n_documents=1 + max(int(store.map_chunk(DOCUMENTS, chunk).max()) for chunk in chunks),
        windows={},
        config=config,
        seed=seed,
    )
    return with_windows(store, plan, windows)


def with_windows(store: Store, plan: DataPlan, windows: set[int]) -> DataPlan:
    """The plan with the windows of every chunk counted for these lengths too; those known already are kept.

    Raises:
        ConfigError: a window longer than a sequence.
        DataError: no token may be trained on.
    """
    new = sorted(windows - set(plan.windows))
    if not new:
        return plan
    if new[-1] > store.context:
        raise ConfigError(f"a window of {new[-1]} does not fit sequences of {store.context} tokens.")
    store = store.as_of(plan.n_sequences)
    held_out = held_out_documents(plan.n_documents, plan.config.held_out)
    counts: dict[int, list[int]] = {window: [] for window in new}
    squared, tokens = 0.0, 0
    for chunk in plan.chunks:
        index = index_chunk(store, plan.hook, chunk, held_out, plan.max_norm)
        squared += float(np.square(index.norms[index.train], dtype=np.float64).sum())
        tokens += int(index.train.sum())
        for window in new:
            starts = windows_in(index, index.train, store.context, window, plan.config.within_document)
            counts[window].append(len(starts))
    if not tokens:
        raise DataError(f"{store.name}: no token of {plan.hook} may be trained on. Harvest more, or lower --held-out.")
    windows_of = plan.windows | {window: tuple(numbers) for window, numbers in counts.items()}
    return replace(plan, windows=windows_of, mean_squared_norm=squared / tokens)
