"""Stage 2: each chunk of tokens through the model, to activations, norms and partial moments per hook."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from common.console import Progress, say
from common.errors import Interrupted, StoreError
from common.files import canonical_json
from common.layout import DOCUMENTS, TOKENS, chunk_arrays
from common.places import url_of
from common.stopping import Stop
from common.store import Store
from harvest.chunks import Forward, chunk_tokens
from harvest.cluster import Cluster
from harvest.plan import Plan
from harvest.prepare import from_anywhere
from harvest.scales import keep_scales, sample_scales, sample_sequences, unscaled_hooks
from harvest.tally import Tally
from harvest.worker import ChunkTask, ModelRecipe, Pass, harvest_chunk, measure_scales
from harvest.writer import Job, Writers

COMPILING = "--compile: the model's blocks are compiled with the first batch, a quarter of a minute to some minutes"


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
            if chunk not in usable or any(store.check_size(array, chunk) for array in chunk_arrays(store.header, hook)):
                todo.setdefault(chunk, []).append(hook)
    return dict(sorted(todo.items()))


def forward(
    plan: Plan, store: Store, stop: Stop, todo: dict[int, list[str]], cluster: Cluster | None = None
) -> Harvested:
    """Run the model over the chunks in `todo` and commit each hook's activations, here or on a cluster.

    Raises:
        Interrupted: asked to stop; what had begun is committed first.
        StoreError: the disk is full, or non-finite activations under --on-nonfinite error.
    """
    total = sum(store.sequences_in(chunk) for chunk in todo) * store.context
    if todo:
        if plan.config.compile:
            say(COMPILING)
        settle_scales(plan, store, stop, cluster)
    tally = Tally(Progress("harvest", total))
    for hooks, chunks in group_by_hooks(todo):
        if cluster is None:
            forward_here(plan, store, stop, hooks, chunks, tally)
        else:
            forward_on(cluster, plan, store, stop, hooks, chunks, tally)
    if stop.asked and tally.tokens < total:
        raise Interrupted(
            f"stopped by {stop.signal_name} after {tally.tokens:,} of {total:,} tokens; the same command goes on."
        )
    tally.close()
    seconds = tally.elapsed
    store.write_summary()
    return Harvested(tally.tokens, seconds, tally.waited_s, tally.nonfinite)


def forward_here(plan: Plan, store: Store, stop: Stop, hooks: list[str], chunks: list[int], tally: Tally) -> None:
    """In this process: the model in this thread, writing in others."""
    runner = runner_of(plan, store, hooks)
    writers = Writers(store, finite_check(plan, store, tally), runner.new_buffer, plan.config.writers)
    waited, written = tally.waited_s - tally.read_s, tally.written_bytes
    with closing_quietly(writers):
        for chunk in chunks:
            if stop.asked:
                break
            buffer = writers.free_buffer()
            started = time.monotonic()
            tokens, trainable = chunk_tokens(store, chunk)
            tally.read_s += time.monotonic() - started
            if runner.run(tokens, trainable, buffer):
                remember_batch_size(store, runner.batch_size)
            writers.submit(Job(chunk, len(tokens), buffer))
            tally.waited_s = waited + writers.waited_s + tally.read_s
            tally.written_bytes = written + writers.written_bytes
            tally.add(tokens.size)
    tally.written_bytes = written + writers.written_bytes


def forward_on(
    cluster: Cluster, plan: Plan, store: Store, stop: Stop, hooks: list[str], chunks: list[int], tally: Tally
) -> None:
    """On a cluster: workers run chunks and write them aside, this process publishes them and keeps the journal."""
    check = finite_check(plan, store, tally)
    shared = pass_of(cluster, plan, store, hooks)
    tasks = (task_of(shared, store, chunk) for chunk in chunks)
    for done in cluster.each(harvest_chunk, tasks, stop):
        for staged in done.hooks:
            check(staged.hook, done.chunk, staged.facts)
            store.publish(staged.files)
        if done.batch_size and done.batch_size < store.header["settings"]["batch_size"]:
            remember_batch_size(store, done.batch_size)
        tally.add_remote(done, cluster.n_workers, store.sequences_in(done.chunk) * store.context)
    for leftover in store.leftovers():  # of workers that died, and of chunks that were computed twice
        leftover.unlink(missing_ok=True)


def settle_scales(plan: Plan, store: Store, stop: Stop, cluster: Cluster | None) -> None:
    """Measure the scales of int8 hooks that have none yet, where the chunks will be computed."""
    hooks = unscaled_hooks(store)
    if not hooks:
        return
    rows = sample_sequences(store)
    if cluster is None:
        keep_scales(store, sample_scales(runner_of(plan, store, hooks, "float32", rows), store))
        return
    shared = replace(pass_of(cluster, plan, store, hooks), dtype="float32", chunk_sequences=rows, scales=())
    for measured in cluster.each(measure_scales, [task_of(shared, store, 0)], stop):
        keep_scales(store, measured)


def runner_of(
    plan: Plan, store: Store, hooks: list[str], dtype: str | None = None, chunk_sequences: int | None = None
) -> Forward:
    """The model of this process over chunks at these hooks, stored as the store says unless told."""
    scales = {hook: store.hooks[hook].get("scales") for hook in hooks}
    return Forward(
        plan.model,
        {hook: store.d_model(hook) for hook in hooks},
        dtype or store.identity["dtype"],
        chunk_sequences or store.chunk_sequences,
        store.context,
        store.header["settings"]["batch_size"],
        {hook: values for hook, values in scales.items() if values},
    )


def pass_of(cluster: Cluster, plan: Plan, store: Store, hooks: list[str]) -> Pass:
    """The same, for the processes of a cluster."""
    source = plan.model.source
    return Pass(
        model=ModelRecipe(
            name=str(from_anywhere(plan.config.model)),
            revision=source.revision or plan.config.revision,
            tokenizer=from_anywhere(plan.config.tokenizer),
            device=cluster.device,
            dtype=plan.identity["model_dtype"],
            identity=canonical_json(source.identity()),
            compiled_for=tuple(store.hooks) if plan.config.compile else (),
        ),
        widths=tuple((hook, store.d_model(hook)) for hook in hooks),
        dtype=store.identity["dtype"],
        chunk_sequences=store.chunk_sequences,
        context=store.context,
        batch_size=store.header["settings"]["batch_size"],
        threads=cluster.threads,
        scales=tuple((hook, tuple(store.hooks[hook]["scales"])) for hook in hooks if store.hooks[hook].get("scales")),
    )


def task_of(shared: Pass, store: Store, chunk: int) -> ChunkTask:
    entries = tuple(store.journal.entries[array, chunk] for array in (TOKENS, DOCUMENTS))
    return ChunkTask(shared, url_of(store.path) or str(store.path.absolute()), store.header, chunk, entries)


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


def finite_check(plan: Plan, store: Store, tally: Tally) -> Any:
    """What a writer does with a chunk's count of non-finite values: refuse it, or report it and go on."""

    def check(hook: str, chunk: int, facts: dict[str, Any]) -> None:
        if not facts["nonfinite"]:
            return
        sequence = chunk * store.chunk_sequences + facts["first_nonfinite_sequence"]
        message = f"{store.name} {hook}: {facts['nonfinite']:,} values are not finite, first in sequence {sequence}"
        if plan.config.on_nonfinite == "error":
            raise StoreError(
                f"{message} ({store.identity['dtype']} storage). Say --on-nonfinite mask to store zeros there and "
                "leave those positions out of training, or store with --dtype bfloat16 or float32."
            )
        say(f"{message}: masked")
        tally.nonfinite += facts["nonfinite"]

    return check


def remember_batch_size(store: Store, batch_size: int) -> None:
    """Keep a halved batch for resume and repair: equal batches give equal bytes."""
    say(f"out of memory: going on with batches of {batch_size} sequences")
    store.header = store.header | {"settings": store.header["settings"] | {"batch_size": batch_size}}
    store.write_metadata()
