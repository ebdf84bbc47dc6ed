"""Stage 2: each chunk of tokens through the model, to activations, norms and partial moments per hook."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.console import Progress, say
from common.errors import Interrupted, StoreError
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array, partial_array
from common.stopping import Stop
from common.store import Store
from harvest.chunks import Forward
from harvest.plan import Plan
from harvest.writer import Job, Writers


@dataclass(frozen=True)
class Harvested:
    """What the forward stage did.

    Attributes:
        waited_s: how long the model waited for the disk.
        nonfinite: NaN or infinite values met.
    """

    tokens: int
    seconds: float
    waited_s: float
    nonfinite: int


def missing_chunks(store: Store) -> dict[int, list[str]]:
    """Chunk number to the hooks it still lacks: not committed, or a file of it is gone or cut short.

    Over all hooks of the store, also those this command did not name: extending a store leaves none behind.
    """
    todo: dict[int, list[str]] = {}
    for hook in store.hooks:
        usable = set(store.usable_chunks(hook))
        for chunk in range(store.n_chunks):
            arrays = (acts_array(hook), norms_array(hook), partial_array(hook))
            if chunk not in usable or any(store.check_size(array, chunk) for array in arrays):
                todo.setdefault(chunk, []).append(hook)
    return dict(sorted(todo.items()))


def forward(plan: Plan, store: Store, stop: Stop, todo: dict[int, list[str]]) -> Harvested:
    """Run the model over the chunks in `todo` and commit each hook's activations.

    Raises:
        Interrupted: asked to stop; what was submitted is committed first.
        StoreError: the disk is full, or non-finite activations under --on-nonfinite error.
    """
    started = time.monotonic()
    waited, bound, harvested, nonfinite = 0.0, 0, 0, 0
    total = sum(store.sequences_in(chunk) for chunk in todo) * store.context
    progress = Progress("harvest", total)
    for hooks, chunks in group_by_hooks(todo):
        runner = Forward(
            plan.model,
            {hook: store.d_model(hook) for hook in hooks},
            store.identity["dtype"],
            store.chunk_sequences,
            store.context,
            store.header["settings"]["batch_size"],
        )
        nonfinite_seen: list[int] = []
        writers = Writers(store, finite_check(plan, store, nonfinite_seen), runner.new_buffer, plan.config.writers)
        with closing_quietly(writers):
            for chunk in chunks:
                if stop.asked:
                    break
                rows = store.sequences_in(chunk)
                buffer = writers.free_buffer()
                tokens = store.map_chunk(TOKENS, chunk, verify=True)[:rows]
                documents = store.map_chunk(DOCUMENTS, chunk, verify=True)[:rows]
                trainable = (documents >= 0) & ~np.isin(tokens, store.special_tokens)
                if runner.run(tokens, trainable, buffer):
                    remember_batch_size(store, runner.batch_size)
                writers.submit(Job(chunk, rows, buffer))
                harvested += rows * store.context
                bound = writers.written_bytes
                elapsed = time.monotonic() - started
                progress.update(harvested, describe(harvested, bound, writers.waited_s, elapsed))
        waited += writers.waited_s
        nonfinite += sum(nonfinite_seen)
        bound = writers.written_bytes
    seconds = time.monotonic() - started
    if stop.asked and harvested < total:
        raise Interrupted(
            f"stopped by {stop.signal_name} after {harvested:,} of {total:,} tokens; the same command goes on."
        )
    if todo:
        progress.close(harvested, describe(harvested, bound, waited, seconds))
    store.write_summary()
    return Harvested(harvested, seconds, waited, nonfinite)


def group_by_hooks(todo: dict[int, list[str]]) -> list[tuple[list[str], list[int]]]:
    """Chunks that lack the same hooks, together: one pass over the model each."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for chunk, hooks in todo.items():
        groups.setdefault(tuple(hooks), []).append(chunk)
    return [(list(hooks), chunks) for hooks, chunks in groups.items()]


@contextlib.contextmanager
def closing_quietly(writers: Writers) -> Iterator[None]:
    """Close the writers on the way out; an error of theirs is raised only if none is under way."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            writers.close()
        raise
    writers.close()


def finite_check(plan: Plan, store: Store, seen: list[int]) -> Any:
    """What a writer does with a chunk's count of non-finite values: refuse it, or report it and go on."""

    def check(hook: str, chunk: int, facts: dict[str, Any]) -> None:
        if not facts["nonfinite"]:
            return
        sequence = chunk * store.chunk_sequences + facts["first_nonfinite_sequence"]
        message = f"{store.path} {hook}: {facts['nonfinite']:,} values are not finite, first in sequence {sequence}"
        if plan.config.on_nonfinite == "error":
            raise StoreError(
                f"{message} ({store.identity['dtype']} storage). Say --on-nonfinite mask to store zeros there and "
                "leave those positions out of training, or store with --dtype bfloat16 or float32."
            )
        say(f"{message}: masked")
        seen.append(facts["nonfinite"])

    return check


def remember_batch_size(store: Store, batch_size: int) -> None:
    """Keep a halved batch for resume and repair: equal batches give equal bytes."""
    say(f"out of memory: going on with batches of {batch_size} sequences")
    store.header = store.header | {"settings": store.header["settings"] | {"batch_size": batch_size}}
    store.write_metadata()


def describe(tokens: int, size: int, waited: float, elapsed: float) -> str:
    """`412,000 tokens · 9,120 tok/s · 0.02 GB/s · waited 0 % (model binds)`."""
    share = waited / max(elapsed, 1e-9)
    binds = "disk binds" if share > 0.1 else "model binds"
    rate = f"{tokens / max(elapsed, 1e-9):,.0f} tok/s · {size / max(elapsed, 1e-9) / 1e9:.3f} GB/s"
    return f"{tokens:,} tokens · {rate} · waited {share:.0%} ({binds})"
