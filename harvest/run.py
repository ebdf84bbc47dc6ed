"""The harvest, told from top to bottom: plan, tokenise, forward. The one file to read.

    plan       what is asked, as an identity; the store it goes to (new, continued, extended, given more hooks)
    tokenise   corpus -> tokens, documents           one journal line per chunk, with the cursor after it
    forward    chunk of tokens -> model -> chunk of activations, norms and partial moments per hook

Both stages do only what the journal lacks, so the same command after any kill does the rest.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import build
from common.console import Progress, format_bytes, format_seconds, say
from common.corpus import TEXT_SUFFIXES, Corpus, open_corpus
from common.device import resolve_device
from common.dtypes import NUMPY
from common.errors import ConfigError, DataError, Interrupted, StoreError
from common.files import ASIDE, exclusive, fingerprint
from common.models import RESID_POST, LanguageModel, find_model, load_model
from common.stopping import Stop
from common.store import (
    DOCUMENTS,
    FORMAT,
    TOKENS,
    Store,
    acts_array,
    difference,
    norms_array,
    partial_array,
    write_summary,
)
from harvest.config import HarvestConfig
from harvest.forward import Forward
from harvest.tokenize import Cursor, Packer
from harvest.writer import Job, Writers

CHUNK_BYTES = 64 * 2**20
BUILT_IN = ("demo", "stdlib", "bytes")
CHUNK_MULTIPLE = 16  # sequences: keeps chunk files whole pages, so that several can be mapped as one


@dataclass(frozen=True)
class Plan:
    """A harvest made exact.

    Attributes:
        widths: hook name to d_model, for the hooks asked for.
        held: the same, for the hooks that the store on disk already has.
        identity: what decides the bytes; see docs/store.md.
        n_sequences: rows of the finished store.
    """

    config: HarvestConfig
    path: Path
    model: LanguageModel
    corpus: Corpus
    widths: dict[str, int]
    held: dict[str, int]
    identity: dict[str, Any]
    n_sequences: int

    @property
    def bos(self) -> int | None:
        return self.model.tokenizer.bos if self.config.bos else None

    @property
    def context(self) -> int:
        return int(self.identity["context"])

    @property
    def total_bytes(self) -> int:
        """Size of the finished store's chunk files, uncompressed."""
        chunk = int(self.identity["chunk_sequences"])
        rows = -(-self.n_sequences // chunk) * chunk
        widths = (self.held | self.widths).values()
        per_token = 8 + sum(4 + width * NUMPY[self.identity["dtype"]].itemsize for width in widths)
        return rows * self.context * per_token


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


def make_plan(config: HarvestConfig) -> Plan:
    """Load the model, find the texts, and settle every default.

    Raises:
        ConfigError: model, hook or corpus cannot be had.
        StoreError: a file lies where the store should be.
    """
    path = config.store_path()
    if path.is_file():
        raise StoreError(f"{path}: a file, not a store. Choose another --out.")
    existing = Store.open(path) if (path / "zarr.json").exists() else None
    if existing and "tokens" not in config.model_fields_set:
        config = config.model_copy(update={"tokens": existing.n_sequences * existing.context})
    corpus = open_corpus(config.corpus_options())
    texts = corpus.identity()  # before the model, which takes longer to load than texts take to be missed
    source = find_model(config.model, config.revision)
    device = resolve_device(config.device)
    model_dtype = config.model_dtype
    if model_dtype == "auto":
        model_dtype = (
            existing.identity["model_dtype"] if existing else ("float32" if device.type == "cpu" else "bfloat16")
        )
    model = load_model(source, str(device), model_dtype, config.tokenizer)
    limit = getattr(model.bridge.cfg, "n_ctx", None)
    if limit and config.context > limit:
        raise ConfigError(f"--context {config.context}: {config.model} takes at most {limit} tokens.")
    names = [RESID_POST.format(layer=layer) for layer in config.layer] + list(config.hook)
    hooks = [model.resolve_hook(name) for name in dict.fromkeys(names)]
    widths = measure_widths(model, hooks)
    chunk = config.chunk_sequences or (existing.chunk_sequences if existing else None)
    identity = {
        "format": FORMAT,
        "model": source.identity(),
        "model_dtype": model_dtype,
        "tokenizer": model.tokenizer.identity(),
        "corpus": texts,
        "packing": config.packing,
        "context": config.context,
        "bos": config.bos and model.tokenizer.bos is not None,
        "dtype": config.dtype,
        "compression": None if config.compression == "none" else config.compression,
        "chunk_sequences": chunk or default_chunk(config.context, max(widths.values()), config.dtype),
        "seed": config.seed,
    }
    held = {hook: existing.d_model(hook) for hook in existing.hooks} if existing else {}
    return Plan(config, path, model, corpus, widths, held, identity, -(-config.tokens // config.context))


def measure_widths(model: LanguageModel, hooks: list[str]) -> dict[str, int]:
    """d_model of each hook, seen in a pass over two tokens; heads and their dimensions are laid flat.

    Raises:
        ConfigError: a hook that never fires, or whose shape is not [batch, context, …].
    """
    probe = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    seen = model.capture(probe, hooks)
    widths = {}
    for hook in hooks:
        if hook not in seen:
            raise ConfigError(f"--hook {hook}: it exists in {model.source.name} but never fires in a forward pass.")
        shape = tuple(seen[hook].shape)
        if shape[:2] != (1, 2) or len(shape) < 3:
            raise ConfigError(f"--hook {hook}: gives {list(shape)}; harvest needs [batch, position, …].")
        widths[hook] = int(np.prod(shape[2:]))
    return widths


def default_chunk(context: int, d_model: int, dtype: str) -> int:
    """Sequences that make a chunk file of about 64 MiB."""
    row = context * d_model * NUMPY[dtype].itemsize
    return max(CHUNK_BYTES // row // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE


def harvest(config: HarvestConfig, stop: Stop) -> Outcome:
    """Run the harvest to its end, or as far as it gets; the same call goes on.

    Raises:
        Interrupted: a signal asked to stop; everything committed so far counts.
        GranaryError: see `common.errors`.
    """
    plan = make_plan(config)
    check_room(plan)
    with exclusive(plan.path, "store"):
        before = Store.open(plan.path).header if (plan.path / "zarr.json").exists() else None
        store = prepare_store(plan)
        started = time.monotonic()
        try:
            tokenise(plan, store, stop)
        except DataError:
            if not store.journal.entries:
                shutil.rmtree(plan.path)  # no text at all: leave nothing behind
            elif before is not None:
                store.header = before  # an extension that there is no text for: as long as it was
                store.write_metadata()
            raise
        tokenised = time.monotonic()
        return forward(plan, store, stop, missing_chunks(store), tokenised - started)


def check_room(plan: Plan) -> None:
    """Refuse a store over `--max-bytes`, or one that cannot fit on the disk.

    Raises:
        ConfigError: over --max-bytes.
        StoreError: more bytes to write than there is room.
    """
    size, limit = plan.total_bytes, plan.config.max_bytes
    if limit is not None and size > limit:
        raise ConfigError(f"--max-bytes {limit:,}: this store takes {size:,}. Ask for fewer --tokens or hooks.")
    there = sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file()) if plan.path.exists() else 0
    free = free_bytes(plan.path)
    if plan.identity["compression"] is None and size - there > free:
        raise StoreError(
            f"{plan.path}: {size - there:,} bytes to write, {free:,} free on the disk. "
            "Ask for fewer --tokens, or put the store elsewhere with --out."
        )


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
    if not (plan.path / "zarr.json").exists():
        refuse_other_files(plan.path)
        store = Store.create(plan.path, new_header(plan))
    else:
        store = Store.open(plan.path)
    refuse_other_identity(store, plan.identity)
    for leftover in store.leftovers():
        leftover.unlink()
    header = store.header | {"n_sequences": sequences_to_hold(plan, store)}
    header["hooks"] = header["hooks"] | {
        hook: hook_header(store, plan, hook) for hook in plan.widths if hook not in header["hooks"]
    }
    header["settings"] = header["settings"] | {"batch_size": header["settings"]["batch_size"] or plan.config.batch_size}
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
    if {file.name for file in path.iterdir()} - ours:
        raise StoreError(f"{path}: other files are here, and no store. Choose another --out.")


def sequences_to_hold(plan: Plan, store: Store) -> int:
    """Sequences the store is to hold: more when more are asked for, fewer only while they are not tokenised yet.

    Raises:
        DataError: the corpus is known to have fewer tokens than asked for, without --allow-fewer.
    """
    tokenised = len(store.committed(TOKENS))
    if plan.n_sequences > store.n_sequences and store.header["corpus_dry"] and not plan.config.allow_fewer:
        raise dry_error(plan, store.n_sequences * store.context)
    if plan.n_sequences > store.n_sequences and not store.header["corpus_dry"]:
        if tokenised == store.n_chunks:
            say(f"{plan.path}: extending from {store.n_sequences:,} to {plan.n_sequences:,} sequences")
        return plan.n_sequences
    if tokenised < store.n_chunks:
        return min(store.n_sequences, max(plan.n_sequences, tokenised * store.chunk_sequences))
    return store.n_sequences


def new_header(plan: Plan) -> dict[str, Any]:
    """The root attributes of a new store."""
    settings = plan.config.model_dump(mode="json", exclude={"layer", "hook", "tokens", "out", "batch_size"})
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
    }


def refuse_other_identity(store: Store, identity: dict[str, Any]) -> None:
    """Raise unless `identity` is the store's own.

    Raises:
        StoreError: with what differs, stored → asked.
    """
    lines = difference(store.identity, identity)
    if lines:
        raise StoreError(
            f"{store.path}: the store there is another one (stored → asked): {'; '.join(lines)}. "
            "Choose another --out, or give the same options."
        )


# ---- stage 1 ------------------------------------------------------------------------------------------------


def tokenise(plan: Plan, store: Store, stop: Stop, only: set[int] | None = None) -> None:
    """Write the tokens and documents of every chunk that lacks them, in order; `only` limits it to some (repair).

    Raises:
        DataError: the corpus ran dry before the tokens asked for, without --allow-fewer.
        Interrupted: asked to stop between two chunks.
    """
    both = set(store.committed(TOKENS)) & set(store.committed(DOCUMENTS))
    done = {chunk for chunk in both if not any(store.check_size(array, chunk) for array in (TOKENS, DOCUMENTS))}
    todo = [chunk for chunk in range(store.n_chunks) if chunk not in done and (only is None or chunk in only)]
    if not todo:
        return
    progress = Progress("tokenise", store.n_chunks, todo[0])
    packer, at = None, -1
    for chunk in todo:
        if stop.asked:
            raise Interrupted(f"stopped by {stop.signal_name} while tokenising; the same command goes on.")
        if packer is None or at != chunk:
            packer = packer_at(plan, store, chunk)
        wanted = store.sequences_in(chunk)
        taken = packer.take(wanted)
        if taken.dry:
            corpus_ran_dry(plan, store, chunk * store.chunk_sequences + len(taken.tokens))
        if len(taken.tokens):
            facts = {"cursor": taken.cursor.to_json()}
            store.commit([(TOKENS, chunk, taken.tokens, facts), (DOCUMENTS, chunk, taken.documents, {})])
        if taken.dry:
            break
        at = chunk + 1
        progress.update(at, f"{at * store.chunk_sequences * store.context:,} tokens")
    progress.total = store.n_chunks  # fewer when the corpus ran dry
    progress.close(store.n_chunks, f"{store.n_sequences * store.context:,} tokens")


def packer_at(plan: Plan, store: Store, chunk: int) -> Packer:
    """A packer that starts where chunk `chunk` starts, from the cursor that the chunk before it left."""
    cursor = Cursor()
    if chunk:
        cursor = Cursor(**store.journal.entries[TOKENS, chunk - 1].extra["cursor"])
    return Packer(plan.corpus, plan.model.tokenizer, store.context, plan.config.packing, plan.bos, cursor)


def corpus_ran_dry(plan: Plan, store: Store, sequences: int) -> None:
    """Shrink the store to what the corpus gave, if the user allows it.

    Raises:
        DataError: no text at all, or fewer tokens than asked for without --allow-fewer.
    """
    found, asked = sequences * store.context, plan.config.tokens
    if sequences == 0:
        raise DataError(
            f"--corpus {plan.config.corpus}: not even one sequence of {store.context} tokens of text in it."
        )
    if not plan.config.allow_fewer:
        raise dry_error(plan, found)
    say(f"the corpus ran dry at {found:,} of {asked:,} tokens: taking what there is")
    store.header = store.header | {"n_sequences": sequences, "corpus_dry": True}
    store.write_metadata()


def dry_error(plan: Plan, found: int) -> DataError:
    return DataError(
        f"--corpus {plan.config.corpus}: it ran dry at {found:,} tokens, --tokens asked for {plan.config.tokens:,}. "
        f"Say --allow-fewer, or --tokens {found}."
    )


# ---- stage 2 ------------------------------------------------------------------------------------------------


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


def forward(plan: Plan, store: Store, stop: Stop, todo: dict[int, list[str]], tokenise_s: float) -> Outcome:
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
    write_summary(store)
    return outcome(plan, store, harvested, {"tokenise": tokenise_s, "forward": seconds}, waited, nonfinite)


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


def outcome(
    plan: Plan, store: Store, harvested: int, seconds: dict[str, float], waited: float, nonfinite: int
) -> Outcome:
    tokens = store.n_sequences * store.context
    return Outcome(
        path=str(store.path),
        id=store.id,
        hooks=list(store.hooks),
        sequences=store.n_sequences,
        tokens=tokens,
        tokens_harvested_now=harvested,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        tokens_per_s=round(harvested / seconds["forward"], 1) if harvested else None,
        bytes=sum(entry.size_bytes for entry in store.journal.entries.values()),
        wait_share=round(waited / max(seconds["forward"], 1e-9), 4),
        nonfinite=nonfinite,
    )


def dry_run(config: HarvestConfig) -> dict[str, Any]:
    """What a harvest would take, with the model's speed measured on one batch; nothing is written.

    Raises:
        ConfigError: over --max-bytes.
        StoreError: it would not fit on the disk.
    """
    plan = make_plan(config)
    check_room(plan)
    batch = min(config.batch_size, plan.n_sequences)
    tokens = torch.zeros(batch, config.context, dtype=torch.int64, device=plan.model.device)
    plan.model.capture(tokens, list(plan.widths))
    started = time.monotonic()
    plan.model.capture(tokens, list(plan.widths))
    if plan.model.device.type == "cuda":
        torch.cuda.synchronize(plan.model.device)
    rate = batch * config.context / (time.monotonic() - started)
    total = plan.n_sequences * config.context
    return {
        "path": str(plan.path),
        "hooks": plan.widths,
        "sequences": plan.n_sequences,
        "tokens": total,
        "bytes": plan.total_bytes,
        "free_bytes": free_bytes(plan.path),
        "chunks": -(-plan.n_sequences // plan.identity["chunk_sequences"]),
        "tokens_per_s": round(rate, 1),
        "seconds": round(total / rate, 1),
    }


def describe_dry_run(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The dry run as rows for a table."""
    return [
        ("store", facts["path"]),
        ("hooks", ", ".join(f"{hook} [{width}]" for hook, width in facts["hooks"].items())),
        ("sequences", f"{facts['sequences']:,} in {facts['chunks']:,} chunks"),
        ("tokens", f"{facts['tokens']:,}"),
        ("size", f"{format_bytes(facts['bytes'])} ({format_bytes(facts['free_bytes'])} free)"),
        ("speed, one batch", f"{facts['tokens_per_s']:,.0f} tokens/s"),
        ("time", f"about {format_seconds(facts['seconds'])}"),
    ]


def plan_for_repair(store: Store) -> Plan:
    """The plan that made a store, from the settings it carries.

    Raises:
        StoreError: model or corpus are not what they were.
    """
    settings = {key: value for key, value in store.header["settings"].items() if key != "batch_size"}
    config = build(
        HarvestConfig,
        settings
        | {
            "hook": tuple(store.hooks),
            "tokens": store.n_sequences * store.context,
            "chunk_sequences": store.chunk_sequences,
            "allow_fewer": True,
            "out": store.path,
        },
        f"{store.path}",
    )
    plan = make_plan(config)
    refuse_other_identity(store, plan.identity)
    return plan
