"""The plan: what is asked made exact, as an identity, with the model loaded and the texts found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import build
from common.corpus import Corpus, HubCorpus, LocalCorpus, StdlibCorpus, open_corpus
from common.device import resolve_device
from common.dtypes import NUMPY
from common.errors import ConfigError, DataError, StoreError
from common.files import difference
from common.layout import FORMAT
from common.models import RESID_POST, LanguageModel, load_model
from common.sources import ModelSource, find_model
from common.store import Store
from harvest.compiled import compile_blocks
from harvest.config import HarvestConfig

CHUNK_BYTES = 64 * 2**20
CHUNK_MULTIPLE = 16  # sequences: keeps chunk files whole pages, so that several can be mapped as one
PAGE_BYTES = 4096
UNREAD: dict[type, tuple[str, ...]] = {  # options that are nothing to a kind of corpus
    StdlibCorpus: ("corpus_config", "corpus_revision", "column", "separator"),
    LocalCorpus: ("corpus_config", "corpus_revision", "split"),
    HubCorpus: ("separator",),
}
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # per forward pass: enough to fill the device


@dataclass(frozen=True)
class Plan:
    """A harvest made exact.

    Attributes:
        widths: hook name to d_model, for the hooks asked for.
        held: the same, for the hooks that the store on disk already has.
        identity: what decides the bytes; see docs/store.md.
        n_sequences: rows of the finished store.
        device: kind of the device that chunks are computed on.
    """

    config: HarvestConfig
    path: Path
    model: LanguageModel
    corpus: Corpus
    widths: dict[str, int]
    held: dict[str, int]
    identity: dict[str, Any]
    n_sequences: int
    device: str

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass: as asked, or a function of the kind of device, so that equal machines agree."""
        return self.config.batch_size or max(BATCH_TOKENS[self.device] // self.context, 1)

    @property
    def bos(self) -> int | None:
        return self.model.tokenizer.bos if self.config.bos else None

    @property
    def context(self) -> int:
        return int(self.identity["context"])

    @property
    def total_bytes(self) -> int:
        """Size of the finished store's chunk files, uncompressed."""
        return stored_bytes(self.n_sequences, self.identity, (self.held | self.widths).values())


def stored_bytes(n_sequences: int, identity: dict[str, Any], widths: Iterable[int]) -> int:
    """Size of a store's chunk files, uncompressed, with hooks of these widths."""
    chunk = int(identity["chunk_sequences"])
    rows = -(-n_sequences // chunk) * chunk
    beside = 8 if identity["dtype"] == "int8" else 4  # norms, and the scales of tokens
    per_token = 8 + sum(beside + width * NUMPY[identity["dtype"]].itemsize for width in widths)
    return rows * int(identity["context"]) * per_token


def make_plan(config: HarvestConfig, elsewhere: str | None = None) -> Plan:
    """Load the model, find the texts, and settle every default.

    Args:
        elsewhere: the kind of device that workers run the chunks on; the model is loaded here on the CPU then, only to
            be asked about its hooks.

    Raises:
        ConfigError: model, hook or corpus cannot be had.
        StoreError: a file lies where the store should be.
    """
    path = config.store_path()
    if path.is_file():
        raise StoreError(f"{path}: a file, not a store. Choose another --out.")
    existing = Store.open(path) if Store.exists(path) else None
    if existing and "tokens" not in config.model_fields_set:
        config = config.model_copy(update={"tokens": existing.n_sequences * existing.context})
    config = config.model_copy(update={"compile": whether_compiled(config, existing)})
    corpus = open_corpus(config.corpus_options())
    texts = corpus.identity()  # before the model, which takes longer to load than texts take to be missed
    source = find_model(config.model, config.revision)
    if existing is None:
        refuse_idle(config, corpus, source)
    device = resolve_device("cpu" if elsewhere else config.device)
    kind = elsewhere or device.type
    model_dtype = model_dtype_of(config, existing, kind)
    model = load_model(source, str(device), model_dtype, config.tokenizer)
    if model.context is not None and config.context > model.context:
        raise ConfigError(f"--context {config.context}: {config.model} takes at most {model.context} tokens.")
    for layer in config.layer:
        if not 0 <= layer < model.n_layers:
            raise ConfigError(f"--layer {layer}: {config.model} has layers 0 to {model.n_layers - 1}.")
    names = [RESID_POST.format(layer=layer) for layer in config.layer] + list(config.hook)
    hooks = [model.resolve_hook(name) for name in dict.fromkeys(names)]
    widths = measure_widths(model, hooks)
    if config.compile:
        compile_blocks(model, hooks)
    n_sequences = -(-config.tokens // config.context)
    chunk = config.chunk_sequences or (existing.chunk_sequences if existing else None)
    identity = identity_of(config, model, model_dtype) | {
        "corpus": texts,
        "chunk_sequences": chunk or default_chunk(n_sequences, config.context, widths.values(), config.dtype),
    }
    held = {hook: existing.d_model(hook) for hook in existing.hooks} if existing else {}
    return Plan(config, path, model, corpus, widths, held, identity, n_sequences, kind)


def refuse_idle(config: HarvestConfig, corpus: Corpus, source: ModelSource) -> None:
    """
    Raises:
        ConfigError: an option was given that this kind of corpus or model does not look at.
    """
    unread = [(name, f"--corpus {config.corpus}") for name in UNREAD[type(corpus)]]
    unread += [("revision", f"--model {config.model}, a folder")] * bool(source.files)
    for name, where in unread:
        if getattr(config, name) != HarvestConfig.model_fields[name].default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with {where}: leave it out.")


def model_dtype_of(config: HarvestConfig, existing: Store | None, kind: str) -> str:
    """The type to compute in: as asked, that of the store on disk, or what suits the kind of device."""
    if config.model_dtype != "auto":
        return config.model_dtype
    if existing is not None:
        return str(existing.identity["model_dtype"])
    return "float32" if kind == "cpu" else "bfloat16"


def identity_of(config: HarvestConfig, model: LanguageModel, model_dtype: str) -> dict[str, Any]:
    """What decides the bytes, but for the texts and how they are cut into chunks."""
    return {
        "format": FORMAT,
        "model": model.source.identity(),
        "model_dtype": model_dtype,
        "tokenizer": model.tokenizer.identity(),
        "packing": config.packing,
        "context": config.context,
        "bos": config.bos and model.tokenizer.bos is not None,
        "dtype": config.dtype,
        "compression": None if config.compression == "none" else config.compression,
        "seed": config.seed,
    }


def whether_compiled(config: HarvestConfig, existing: Store | None) -> bool:
    """As asked; by default as the store on disk began, and not for a new one.

    Raises:
        StoreError: it began the other way, and its chunks would differ in their last bits.
    """
    if existing is None:
        return bool(config.compile)
    began = bool(existing.header["settings"].get("compile"))
    if config.compile not in (None, began):
        words = ("with --compile", "without it") if began else ("without --compile", "with it")
        raise StoreError(
            f"{existing.name}: begun {words[0]}, asked for {words[1]}; the last bits of its activations would differ "
            f"from chunk to chunk. Leave out --{'no-' if began else ''}compile, or choose another --out."
        )
    return began


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


def default_chunk(n_sequences: int, context: int, widths: Iterable[int], dtype: str) -> int:
    """Sequences that make a chunk file of about 64 MiB at the widest hook, but no more than the store needs.

    What it needs is rounded up to whole pages at every hook, where so many fit in a chunk.
    """
    rows = [context * width * NUMPY[dtype].itemsize for width in widths]
    full = max(CHUNK_BYTES // max(rows) // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE
    step = max(PAGE_BYTES // math.gcd(PAGE_BYTES, row) for row in rows)
    if step > full:
        return min(full, n_sequences)
    return min(full, -(-n_sequences // step) * step)


def plan_for_repair(store: Store) -> Plan:
    """The plan that made a store, from the settings it carries; at the revisions of then, masking what was masked.

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
            "revision": store.identity["model"].get("revision"),
            "corpus_revision": store.identity["corpus"].get("revision"),
            "device": device_here(settings["device"]),
            "allow_fewer": True,
            "on_nonfinite": "mask",
            "out": store.path,
        },
        f"{store.name}",
    )
    plan = make_plan(config)
    refuse_other_identity(store, plan.identity)
    return plan


def device_here(asked: str) -> str:
    """`asked`, or `auto` on a machine without it: a repair cannot be told another."""
    try:
        resolve_device(asked)
    except ConfigError:
        return "auto"
    return asked


def refuse_other_identity(store: Store, identity: dict[str, Any]) -> None:
    """Raise unless `identity` is the store's own.

    Raises:
        StoreError: with what differs, stored → asked.
    """
    lines = difference(store.identity, identity)
    if lines:
        raise StoreError(
            f"{store.name}: the store there is another one (stored → asked): {'; '.join(lines)}. "
            "Choose another --out, or give the same options."
        )


def dry_error(plan: Plan, found: int) -> DataError:
    return DataError(
        f"--corpus {plan.config.corpus}: it ran dry at {found:,} tokens, --tokens asked for {plan.config.tokens:,}. "
        f"Say --allow-fewer, or --tokens {found}."
    )
