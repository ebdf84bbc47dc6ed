"""A toy store: what `harvest run` writes, with a toy in the place of model and corpus, and its truth beside it.

A chunk is a function of (toy, seed, number): the same command after any kill does what the journal lacks, and with
more tokens it extends the store.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from common.checks import Problem
from common.console import Progress
from common.dtypes import TORCH, to_numpy
from common.errors import ConfigError, Interrupted, StoreError
from common.files import exclusive, fingerprint
from common.layout import DOCUMENTS, FORMAT, TOKENS, acts_array, norms_array, partial_array
from common.places import url_of
from common.stopping import Stop
from common.store import Store
from common.truth import TRUTH_FILE, read_truth, write_truth
from harvest.config import ToyConfig
from harvest.forward import Harvested, missing_chunks
from harvest.moments import PartialSums
from harvest.plan import default_chunk, refuse_other_identity, stored_bytes
from harvest.prepare import refuse_full_disk, refuse_other_files
from harvest.run import Outcome, outcome
from harvest.toys import D_MODEL, LEAST, LONGEST, MOST, NOISE, SHORTEST, TokenStream, Toy, make_toy

HOOK = "toy"
GENERATOR = 1  # counts the changes of `toys.py` that change its numbers


def synthesise(config: ToyConfig, stop: Stop) -> Outcome:
    """Write the toy store that `config` describes, or what is missing of it.

    Raises:
        StoreError: another store or other files lie there, another process writes it, or the disk is too full.
        Interrupted: asked to stop; the same call goes on.
    """
    path, toy = config.store_path(), make_toy(config.name, config.seed)
    if url_of(path) is not None:
        raise ConfigError(f"--out {url_of(path)}: a toy store lies in a folder, with its truth beside it.")
    if path.is_file():
        raise StoreError(f"{path}: a file, not a store. Choose another --out.")
    existing = Store.open(path) if (path / "zarr.json").exists() else None
    identity = identity_of(config, toy, existing)
    if existing is not None:
        refuse_other_identity(existing, identity)
    refuse_full_disk(path, stored_bytes(sequences_to_hold(config, existing), identity, [D_MODEL]))
    with exclusive(path, "store"):
        store = prepare(config, toy)
        write_truth(path, toy.truth)
        done = write_chunks(store, stop)
        store.write_summary()
        return outcome(store, 0.0, done)


def is_toy(store: Store) -> bool:
    """Whether `harvest toy` made the store."""
    return "toy" in store.identity["model"]


def prepare(config: ToyConfig, toy: Toy) -> Store:
    """The store on disk: new, continued or extended.

    Raises:
        StoreError: a store of another identity lies there; the message is the difference.
    """
    path = config.store_path()
    if not (path / "zarr.json").exists():
        refuse_other_files(path)
        return Store.create(path, new_header(config, toy))
    store = Store.open(path)
    refuse_other_identity(store, identity_of(config, toy, store))
    for leftover in store.leftovers():
        leftover.unlink()
    held = sequences_to_hold(config, store)
    if held != store.n_sequences:
        store.header = store.header | {"n_sequences": held}
        store.write_metadata()
    return store


def sequences_to_hold(config: ToyConfig, existing: Store | None) -> int:
    """Sequences asked for; of an existing store fewer than it has only while they are not written yet."""
    asked = -(-config.tokens // config.context)
    if existing is None:
        return asked
    written = len(existing.usable_chunks(HOOK)) * existing.chunk_sequences
    asked = asked if "tokens" in config.model_fields_set else existing.n_sequences
    return max(asked, min(existing.n_sequences, written))


def identity_of(config: ToyConfig, toy: Toy, existing: Store | None = None) -> dict[str, Any]:
    """What decides the bytes, under the keys of every store; an existing one keeps its chunks."""
    chunk = config.chunk_sequences or (existing.chunk_sequences if existing else None)
    made_of = {"noise": NOISE, "amplitude": [LEAST, MOST], "document": [SHORTEST, LONGEST]} | toy.parameters
    return {
        "format": FORMAT,
        "model": {"toy": config.name, "generator": GENERATOR} | made_of,
        "model_dtype": "float32",
        "tokenizer": None,
        "corpus": None,
        "packing": "packed",
        "context": config.context,
        "bos": False,
        "dtype": config.dtype,
        "compression": None,
        "chunk_sequences": chunk
        or default_chunk(sequences_to_hold(config, None), config.context, [D_MODEL], config.dtype),
        "seed": config.seed,
    }


def new_header(config: ToyConfig, toy: Toy) -> dict[str, Any]:
    """The root attributes of a new toy store."""
    identity = identity_of(config, toy)
    hook = {
        "d_model": D_MODEL,
        "dtype": config.dtype,
        "id": fingerprint({"store": fingerprint(identity), "hook": HOOK}),
        "summarised": False,
    }
    return {
        "identity": identity,
        "hooks": {HOOK: hook},
        "n_sequences": sequences_to_hold(config, None),
        "corpus_dry": False,
        "special_tokens": [],
        "vocabulary": len(toy.truth.directions) + 1,  # the last id: no feature is active
        "n_layers": 0,
        "settings": {"model": config.name, "revision": None, "tokenizer": None, "batch_size": None},
    }


def check_truth(store: Store) -> list[Problem]:
    """What is wrong with the truth of a toy store; nothing for other stores."""
    if not is_toy(store):
        return []
    try:
        read_truth(store.path)
    except StoreError:
        there = (store.path / TRUTH_FILE).exists()
        return [Problem(TRUTH_FILE, None, "it cannot be read" if there else "the file is missing")]
    return []


def write_truth_again(store: Store) -> None:
    """Put the truth that made a toy store beside it once more."""
    write_truth(store.path, make_toy(store.identity["model"]["toy"], store.identity["seed"]).truth)


def write_chunks(store: Store, stop: Stop, only: set[int] | None = None) -> Harvested:
    """Write the chunks that are not committed or whose files are gone; `only` limits it to some (repair).

    Raises:
        Interrupted: asked to stop between two chunks.
    """
    name, seed = store.identity["model"]["toy"], store.identity["seed"]
    stream = TokenStream(make_toy(name, seed), seed)
    todo = [chunk for chunk in chunks_to_write(store) if only is None or chunk in only]
    total = sum(map(store.sequences_in, todo)) * store.context
    started, done = time.monotonic(), 0
    progress = Progress("toy", total)
    for chunk in todo:
        if stop.asked:
            raise Interrupted(
                f"stopped by {stop.signal_name} after {done:,} of {total:,} tokens; the same command goes on."
            )
        write_chunk(store, stream, chunk)
        done += store.sequences_in(chunk) * store.context
        progress.update(done, f"{done:,} tokens")
    if todo:
        progress.close(done, f"{done:,} tokens")
    return Harvested(done, time.monotonic() - started, waited_s=0.0, nonfinite=0)


def chunks_to_write(store: Store) -> list[int]:
    """Chunks that lack something, tokens and documents included."""
    lacking = set(missing_chunks(store))
    for array in (TOKENS, DOCUMENTS):
        lacking |= {chunk for chunk in store.committed(array) if store.check_size(array, chunk)}
    return sorted(lacking)


def write_chunk(store: Store, stream: TokenStream, chunk: int) -> None:
    """Make one chunk and commit its five arrays together."""
    rows, context = store.sequences_in(chunk), store.context
    start = chunk * store.chunk_sequences * context
    made = stream.take(start, start + rows * context)
    stored = torch.from_numpy(made.activations).view(rows, context, -1).to(TORCH[store.identity["dtype"]])
    partial = PartialSums(D_MODEL, torch.device("cpu"))
    _, norms = partial.add(stored, torch.ones(rows, context, dtype=torch.bool))
    sums, facts = partial.result()
    written: list[tuple[str, int, np.ndarray, dict[str, Any]]] = [
        (TOKENS, chunk, made.tokens.reshape(rows, context), {}),
        (DOCUMENTS, chunk, made.documents.reshape(rows, context), {}),
        (acts_array(HOOK), chunk, to_numpy(stored), {"nonfinite": facts["nonfinite"], "max_abs": facts["max_abs"]}),
        (norms_array(HOOK), chunk, norms.numpy(), {}),
        (partial_array(HOOK), chunk, sums, {"count": facts["count"], "max_abs": facts["max_abs"]}),
    ]
    store.commit(written)
