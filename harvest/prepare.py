"""The store a plan goes to: room for it, then created, continued, extended or given more hooks, or refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from common.console import say
from common.corpus import TEXT_SUFFIXES
from common.errors import ConfigError, StoreError
from common.files import ASIDE, fingerprint
from common.layout import DOCUMENTS, TOKENS
from common.places import place_at, url_of
from common.store import Store
from harvest.plan import Plan, dry_error, refuse_other_identity, stored_bytes

BUILT_IN = ("demo", "stdlib", "bytes")
# of `HarvestConfig`: kept elsewhere in the header, or nothing that a repair needs
NO_SETTINGS = {"layer", "hook", "tokens", "out", "batch_size", "workers", "dask"}


def check_room(plan: Plan) -> None:
    """Refuse a store over `--max-bytes`, chunks over the memory, or what cannot fit on the disk.

    Raises:
        ConfigError: over --max-bytes, or a chunk over the memory of this machine.
        StoreError: more bytes to write than there is room.
    """
    size, limit = plan.total_bytes, plan.config.max_bytes
    if limit is not None and size > limit:
        raise ConfigError(f"--max-bytes {limit:,}: this store takes {size:,}. Ask for fewer --tokens or hooks.")
    chunk, memory = stored_bytes(1, plan.identity, plan.widths.values()), machine_bytes()
    if chunk > memory:
        raise ConfigError(
            f"--chunk-sequences {plan.identity['chunk_sequences']:,}: a chunk takes {chunk:,} bytes, this machine has "
            f"{memory:,}. Ask for smaller chunks."
        )
    if plan.identity["compression"] is None and url_of(plan.path) is None:
        refuse_full_disk(plan.path, size)


def refuse_full_disk(path: Path, size: int) -> None:
    """Refuse a store of `size` bytes that cannot fit, beside what is there of it already.

    Raises:
        StoreError: more bytes to write than there is room.
    """
    entries = Store.open(path).journal.entries.values() if Store.exists(path) else ()
    there = sum(entry.size_bytes for entry in entries)
    free = free_bytes(path)
    if size - there > free:
        raise StoreError(
            f"{path}: {size - there:,} bytes to write, {free:,} free on the disk. "
            "Ask for fewer --tokens, or put the store elsewhere with --out."
        )


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path` is or will be on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def prepare_store(plan: Plan) -> Store:
    """The store on disk: created, continued, extended or given more hooks.

    Raises:
        StoreError: a store of another identity lies there; the message is the difference.
    """
    if not Store.exists(plan.path):
        refuse_other_files(plan.path)
        store = Store.create(plan.path, new_header(plan))
    else:
        store = Store.open(plan.path)
    refuse_other_identity(store, plan.identity)
    for leftover in store.leftovers():
        leftover.unlink(missing_ok=True)  # a worker that outlived its harvest may take one back
    header = store.header | {"n_sequences": sequences_to_hold(plan, store)}
    header["hooks"] = header["hooks"] | {
        hook: hook_header(store, plan, hook) for hook in plan.widths if hook not in header["hooks"]
    }
    header["settings"] = header["settings"] | {"batch_size": header["settings"]["batch_size"] or plan.batch_size}
    if header != store.header:
        store.header = header
        store.write_metadata()
    return store


def refuse_other_files(path: Path) -> None:
    """Raise unless `path` holds at most what a harvest killed in its first moment leaves.

    Raises:
        StoreError: somebody else's files, which a harvest that finds no text would remove with its own.
    """
    ours = {".lock", "zarr.json" + ASIDE, TOKENS, DOCUMENTS}
    if place_at(path).names() - ours:
        raise StoreError(f"{url_of(path) or path}: other files are here, and no store. Choose another --out.")


def sequences_to_hold(plan: Plan, store: Store) -> int:
    """Sequences the store is to hold: more when more are asked for, fewer only while they are not tokenised yet.

    Raises:
        DataError: the corpus is known to have fewer tokens than asked for, without --allow-fewer.
    """
    tokenised = max(store.committed(TOKENS), default=-1) + 1
    if plan.n_sequences > store.n_sequences and store.header["corpus_dry"] and not plan.config.allow_fewer:
        raise dry_error(plan, store.n_sequences * store.context)
    if plan.n_sequences > store.n_sequences and not store.header["corpus_dry"]:
        if tokenised == store.n_chunks:
            say(f"{store.name}: extending from {store.n_sequences:,} to {plan.n_sequences:,} sequences")
        return plan.n_sequences
    if tokenised < store.n_chunks:
        return min(store.n_sequences, max(plan.n_sequences, tokenised * store.chunk_sequences))
    return store.n_sequences


def new_header(plan: Plan) -> dict[str, Any]:
    """The root attributes of a new store."""
    settings = plan.config.model_dump(mode="json", exclude=NO_SETTINGS)
    settings |= {key: from_anywhere(settings[key]) for key in ("model", "corpus", "tokenizer")}
    return {
        "identity": plan.identity,
        "n_sequences": plan.n_sequences,
        "corpus_dry": False,
        "special_tokens": list(plan.model.tokenizer.special),
        "vocabulary": plan.model.vocabulary,
        "n_layers": plan.model.n_layers,
        "settings": settings | {"batch_size": None},
    }


def from_anywhere(name: str | None) -> str | None:
    """A local path as one that holds in any folder; hub and built-in names as they are."""
    if name is None or name in BUILT_IN:
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() or path.suffix in TEXT_SUFFIXES else name


def hook_header(store: Store, plan: Plan, hook: str) -> dict[str, Any]:
    return {
        "d_model": plan.widths[hook],
        "dtype": plan.identity["dtype"],
        "id": fingerprint({"store": store.id, "hook": hook}),
        "summarised": False,
    } | ({"scales": None} if plan.identity["dtype"] == "int8" else {})
