"""What can be said of a store without a model."""

from __future__ import annotations

from typing import Any

from common.console import format_bytes
from common.errors import GranaryError
from common.layout import TOKENS, acts_array
from common.moments import Moments
from common.sources import find_model
from common.store import Store
from common.tokenizers import load_tokenizer

MEASURED = ("mean_squared_norm", "variance_share", "max_abs", "storage_error")


def describe(store: Store) -> dict[str, Any]:
    """Identity, progress, hooks with their moments, and size."""
    hooks = [describe_hook(store, hook) for hook in store.hooks]
    done = sum(hook["chunks"] for hook in hooks)
    share = done / (store.n_chunks * len(hooks)) if hooks and store.n_chunks else 0.0
    return {
        "path": store.name,
        "id": store.id,
        "model": store.header["settings"]["model"],
        "sequences": store.n_sequences,
        "context": store.context,
        "tokens": store.n_sequences * store.context,
        "chunk_sequences": store.chunk_sequences,
        "chunks": store.n_chunks,
        "harvested": f"{int(100 * share)} %",  # rounded down: 100 % is all of it
        "size": format_bytes(sum(entry.size_bytes for entry in store.held())),
        "special_tokens": store.special_tokens,
        "batch_size": store.header["settings"].get("batch_size"),  # the store keeps to these two, for the last bits
        "compile": bool(store.header["settings"].get("compile")),
        "hooks": hooks,
        "identity": store.identity,
    }


def describe_hook(store: Store, hook: str) -> dict[str, Any]:
    """One hook: width, committed chunks, and its moments as far as they go."""
    chunks = store.usable_chunks(hook)
    facts: dict[str, Any] = {"hook": hook, "d_model": store.d_model(hook), "chunks": len(chunks)}
    if not chunks:
        return facts | {"trainable_tokens": 0} | dict.fromkeys(MEASURED)
    moments = store.moments(hook)
    return facts | {
        "trainable_tokens": moments.count,
        "mean_squared_norm": moments.mean_squared_norm,
        "variance_share": moments.variance / max(moments.mean_squared_norm, 1e-300),
        "max_abs": moments.max_abs,
        "storage_error": storage_error(store, hook, moments),
    }


def storage_error(store: Store, hook: str, moments: Moments) -> float | None:
    """Σ ‖x − x̂‖² / Σ ‖x̂‖² that storing as int8 made, over trainable tokens; None for types that only round."""
    if store.hooks[hook]["dtype"] != "int8":
        return None
    entries = [store.journal.entries[acts_array(hook), chunk] for chunk in store.usable_chunks(hook)]
    total = float(sum(entry.extra["squared_error"] for entry in entries))
    return total / max(moments.count * moments.mean_squared_norm, 1e-300)


def first_texts(store: Store, n: int) -> list[str]:
    """The first sequences as text, where the tokenizer can be had; otherwise their ids."""
    n = min(n, store.n_sequences if 0 in store.committed(TOKENS) else 0)
    if n <= 0:
        return []
    rows = store.rows(TOKENS, 0, n)
    settings = store.header["settings"]
    try:
        source = find_model(settings["model"], settings["revision"])
        tokenizer = load_tokenizer(source, int(store.header["vocabulary"]), settings["tokenizer"])
    except GranaryError:
        return [" ".join(str(token) for token in row) for row in rows]
    return [tokenizer.decode([int(token) for token in row]) for row in rows]
