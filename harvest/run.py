"""The harvest, told from top to bottom: plan, tokenise, forward. The one file to read.

    plan.py       what is asked, as an identity
    prepare.py    the store it goes to: new, continued, extended, given more hooks, or refused
    tokenize.py   corpus -> tokens, documents           one journal line per chunk, with the cursor after it
    forward.py    chunk of tokens -> model -> chunk of activations, norms and partial moments per hook, here or on
                  the workers of cluster.py, each of which does what worker.py says

Both stages do only what the journal lacks, so the same command after any kill does the rest.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch

from common.console import format_bytes, format_seconds, say
from common.device import resolve_device
from common.errors import DataError
from common.files import exclusive
from common.places import url_of
from common.stopping import Stop
from common.store import Store
from harvest.cluster import local, remote
from harvest.config import HarvestConfig
from harvest.forward import COMPILING, Harvested, forward, missing_chunks
from harvest.plan import Plan, make_plan
from harvest.prepare import check_room, free_bytes, prepare_store
from harvest.tokenize import tokenise


@dataclass(frozen=True)
class Outcome:
    """What a harvest did, for `--json` and for tests.

    Attributes:
        tokens: positions in the finished store.
        seconds: wall time per stage: tokenise, forward.
        tokens_per_s: positions per second through the forward stage, this time; None if nothing was left to do.
        bytes: size of all chunk files.
        wait_share: share of the forward stage in which the model waited for the disk.
    """

    path: str
    id: str
    hooks: list[str]
    sequences: int
    tokens: int
    tokens_harvested_now: int
    seconds: dict[str, float]
    tokens_per_s: float | None
    bytes: int
    wait_share: float
    nonfinite: int


def harvest(config: HarvestConfig, stop: Stop) -> Outcome:
    """Run the harvest to its end, or as far as it gets; the same call goes on.

    Raises:
        Interrupted: a signal asked to stop; everything committed so far counts.
        GranaryError: see `common.errors`.
    """
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(remote(config.dask, config.device)) if config.dask else None
        elsewhere = cluster.device if cluster else resolve_device(config.device).type if config.workers else None
        plan = make_plan(config, elsewhere)
        check_room(plan)
        stack.enter_context(exclusive(plan.path, "store", name=url_of(plan.path)))
        store, tokenise_s = tokenised(plan, stop)
        todo = missing_chunks(store)
        if config.workers and todo:
            cluster = stack.enter_context(local(config.workers, str(elsewhere)))
        return outcome(store, tokenise_s, forward(plan, store, stop, todo, cluster))


def tokenised(plan: Plan, stop: Stop) -> tuple[Store, float]:
    """The store with all its tokens, and how long that took in seconds.

    Raises:
        DataError: too few tokens. A store is as long as it was; a new one keeps what there was, or is gone if nothing.
    """
    before = Store.open(plan.path).header if Store.exists(plan.path) else None
    store = prepare_store(plan)
    started = time.monotonic()
    try:
        tokenise(plan, store, stop)
    except DataError:
        if not store.journal.entries:
            store.place.remove()  # no text at all: leave nothing behind
        elif before is not None:
            store.header = before  # an extension that there is no text for: as long as it was
            store.write_metadata()
        raise
    return store, time.monotonic() - started


def outcome(store: Store, tokenise_s: float, done: Harvested) -> Outcome:
    return Outcome(
        path=store.name,
        id=store.id,
        hooks=list(store.hooks),
        sequences=store.n_sequences,
        tokens=store.n_sequences * store.context,
        tokens_harvested_now=done.tokens,
        seconds={"tokenise": round(tokenise_s, 3), "forward": round(done.seconds, 3)},
        tokens_per_s=round(done.tokens / done.seconds, 1) if done.tokens else None,
        bytes=sum(entry.size_bytes for entry in store.held()),
        wait_share=round(done.waited_s / max(done.seconds, 1e-9), 4),
        nonfinite=done.nonfinite,
    )


def dry_run(config: HarvestConfig) -> dict[str, Any]:
    """What a harvest would take, with the model's speed measured on one batch; nothing is written.

    Raises:
        ConfigError: over --max-bytes, or a chunk over the memory.
        StoreError: it would not fit on the disk.
    """
    plan = make_plan(config)
    check_room(plan)
    if plan.config.compile:
        say(COMPILING)
    batch = min(plan.batch_size, plan.n_sequences)
    tokens = torch.zeros(batch, config.context, dtype=torch.int64, device=plan.model.device)
    plan.model.capture(tokens, list(plan.widths))
    started = time.monotonic()
    plan.model.capture(tokens, list(plan.widths))
    if plan.model.device.type == "cuda":
        torch.cuda.synchronize(plan.model.device)
    rate = batch * config.context / (time.monotonic() - started)
    total = plan.n_sequences * config.context
    return {
        "path": url_of(plan.path) or str(plan.path),
        "hooks": plan.widths,
        "sequences": plan.n_sequences,
        "tokens": total,
        "bytes": plan.total_bytes,
        "free_bytes": None if url_of(plan.path) else free_bytes(plan.path),
        "chunks": -(-plan.n_sequences // plan.identity["chunk_sequences"]),
        "tokens_per_s": round(rate, 1),
        "seconds": round(total / rate, 1),
    }


def describe_dry_run(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The dry run as rows for a table."""
    free = "" if facts["free_bytes"] is None else f" ({format_bytes(facts['free_bytes'])} free)"
    return [
        ("store", facts["path"]),
        ("hooks", ", ".join(f"{hook} [{width}]" for hook, width in facts["hooks"].items())),
        ("sequences", f"{facts['sequences']:,} in {facts['chunks']:,} chunks"),
        ("tokens", f"{facts['tokens']:,}"),
        ("size", f"{format_bytes(facts['bytes'])}{free}"),
        ("speed, one batch", f"{facts['tokens_per_s']:,.0f} tokens/s"),
        ("time", f"about {format_seconds(facts['seconds'])}"),
    ]
