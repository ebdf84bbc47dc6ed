"""The tokens that suite `core` looks at: packed from a corpus, or the store's own held-out sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.corpus import CorpusOptions, open_corpus
from common.errors import ConfigError, DataError
from common.models import LanguageModel
from common.packing import Cursor, Packer
from train.config import EvalConfig
from train.data.batch import Batch
from train.data.split import held_out_documents, positions_in_document
from train.evaluate.subject import Subject
from train.saes.base import SAE

CORPUS_CONTEXT = 128
SEQUENCES = 16  # of a batch; SAEBench's command line takes as many, and some of its figures depend on it
BATCHES = (10, 1)
CORPUS_SEED = 42  # of the order of a hub data set's shards, as in SAEBench


@dataclass(frozen=True)
class Contexts:
    """Sequences of tokens, and what is known of each position. All [sequences, context].

    Attributes:
        tokens: int64.
        documents: int32, -1 for padding.
        positions: int32, in the document's part of its sequence, from 0.
        special: bool, special tokens and padding.
        counted: bool, the positions that figures are taken over.
    """

    tokens: Tensor
    documents: Tensor
    positions: Tensor
    special: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Contexts:
        return Contexts(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> Contexts:
        return Contexts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def pieces(self, size: int) -> Iterator[Contexts]:
        """`size` sequences at a time, the last piece with what is left."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def separators(self) -> Tensor:
        """Where a document begins inside a sequence, bool [sequences, context]."""
        begins = torch.zeros_like(self.counted)
        begins[:, 1:] = (self.documents[:, 1:] != self.documents[:, :-1]) & (self.documents[:, 1:] >= 0)
        return begins

    def coded(self, sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and reconstruction of activations [sequences, context, d] at these places, special ones too.

        An SAE that looks at the past is told where documents begin and which tokens are special; any other one gets
        the bare tensor, as from SAEBench.
        """
        if not sae.sees_past:
            latents = sae.encode(x)
            return latents, sae.decode(latents)
        batch = Batch.of(x, self.documents, self.positions, ~self.special)
        latents = sae.encode(batch)
        return latents, sae.decode(latents, batch)


@dataclass(frozen=True)
class Text:
    """What is evaluated: `n_reconstruction` batches for the downstream figures, the next `n_sparsity` for all others.

    Attributes:
        size: sequences of a batch: 16, fewer where the text fills no two batches.
        source: where it is from, as JSON values.
    """

    contexts: Contexts
    n_reconstruction: int
    n_sparsity: int
    size: int
    source: dict[str, Any]

    @property
    def reconstruction(self) -> Contexts:
        return self.contexts[: self.n_reconstruction * self.size]

    @property
    def sparsity(self) -> Contexts:
        return self.contexts[self.n_reconstruction * self.size :]


def text_of(subject: Subject, model: LanguageModel | None) -> Text:
    """The text that the settings ask for; `model` is needed for a corpus only.

    Raises:
        DataError: too little of it.
        ConfigError: no such corpus, or one that the model cannot read in sequences of 128.
    """
    wanted = SEQUENCES * sum(subject.config.core_batches() or BATCHES)
    if subject.config.corpus is None:
        contexts, source = held_out_contexts(subject, wanted, stored=model is None)
        limit = "" if subject.config.max_tokens is None else f" (--max-tokens {subject.config.max_tokens})"
        where = f"the held-out documents of {subject.store.name}{limit} fill"
    else:
        assert model is not None
        contexts, source = packed_contexts(subject, model, wanted)
        where = f"--corpus {subject.config.corpus} fills"
    n_reconstruction, n_sparsity, size = settle_batches(subject.config, contexts, where)
    return Text(contexts[: size * (n_reconstruction + n_sparsity)], n_reconstruction, n_sparsity, size, source)


def settle_batches(config: EvalConfig, contexts: Contexts, where: str) -> tuple[int, int, int]:
    """Reconstruction and sparsity batches, and the sequences of each.

    Those asked for, of 16; else ten and one, or as many as there are; of fewer sequences where two batches are more
    than there is.

    Raises:
        DataError: too few sequences.
    """
    asked, n = config.core_batches() or BATCHES, len(contexts)
    if n >= SEQUENCES * sum(asked):
        return *asked, SEQUENCES
    if config.batches is None and n >= 2:
        return max(n // SEQUENCES - 1, 1), 1, min(n // 2, SEQUENCES)
    needed = SEQUENCES * sum(asked) if config.batches is not None else 2
    what = "one of each kind of batch" if config.batches is None else f"--batches {config.batches}"
    raise DataError(
        f"suite core: {where} {n} sequences of {contexts.tokens.shape[1]} tokens; {what} needs {needed}. "
        "Ask for fewer batches, name a longer text with --corpus, or hold out more documents (train fit --held-out)."
    )


def held_out_contexts(subject: Subject, wanted: int, stored: bool) -> tuple[Contexts, dict[str, Any]]:
    """Up to `wanted` sequences of the store with a held-out token in them; counted are the held-out documents.

    With `stored`, for the store's own activations, positions masked at harvest do not count: they are 0 there.
    """
    store, plan = subject.store, subject.plan
    tokens, documents, kept, n = [], [], [], 0
    for batch in subject.held_out(window=store.context):
        tokens.append(batch.token.cpu())
        documents.append(batch.doc.cpu())
        kept.append((batch.x != 0).any(-1).cpu() if stored else torch.ones_like(tokens[-1], dtype=torch.bool))
        n += len(batch.x)
        if n >= wanted:
            break
    shape = (-1, store.context)
    nothing = torch.zeros(0, store.context, dtype=torch.int32)
    held_out = torch.from_numpy(held_out_documents(plan.n_documents, plan.config.held_out))
    contexts = contexts_of(
        torch.cat([nothing, *tokens]).view(shape)[:wanted],
        torch.cat([nothing, *documents]).view(shape)[:wanted],
        store.special_tokens,
    )
    counted = contexts.counted & held_out[contexts.documents.long()]  # -1 reads the last entry; it is special anyway
    if kept:
        counted &= torch.cat(kept).view(shape)[:wanted]
    return replace(contexts, counted=counted), {"store": store.id, "held_out": plan.config.held_out}


def packed_contexts(subject: Subject, model: LanguageModel, wanted: int) -> tuple[Contexts, dict[str, Any]]:
    """Up to `wanted` sequences of 128 tokens of a corpus; all but special tokens are counted."""
    config = subject.config
    if model.context is not None and model.context < CORPUS_CONTEXT:
        raise ConfigError(f"--corpus packs {CORPUS_CONTEXT} tokens, {model.source.name} takes at most {model.context}.")
    assert config.corpus is not None
    corpus = open_corpus(CorpusOptions(name=config.corpus, column=config.column, split=config.split, seed=CORPUS_SEED))
    bos = model.tokenizer.bos if subject.store.identity.get("bos", True) else None
    packer = Packer(corpus, model.tokenizer, CORPUS_CONTEXT, "packed", bos, Cursor())
    packed = packer.take(wanted)
    tokens, documents = torch.from_numpy(packed.tokens), torch.from_numpy(packed.documents)
    return contexts_of(tokens, documents, list(model.tokenizer.special)), {"corpus": corpus.identity()}


def contexts_of(tokens: Tensor, documents: Tensor, special_tokens: list[int]) -> Contexts:
    """All that follows from the tokens and documents [sequences, context]; everything but special tokens is counted."""
    special = torch.isin(tokens, torch.tensor(special_tokens, dtype=tokens.dtype)) | (documents < 0)
    positions = positions_in_document(documents.numpy().reshape(-1), tokens.shape[1])
    return Contexts(tokens.long(), documents, torch.from_numpy(positions).view_as(documents), special, ~special)


def stored_activations(subject: Subject, text: Text) -> Iterator[Tensor]:
    """The sparsity batches' activations from the store, each [sequences, context, d] float32.

    In the order of `held_out_contexts`.
    """
    batches = (batch.x for batch in subject.held_out(window=subject.store.context))
    first = text.n_reconstruction
    for x in itertools.islice(recut(batches, text.size), first, first + text.n_sparsity):
        yield x.float()


def recut(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of all parts in order, `size` at a time; what is left over is dropped."""
    rest: Tensor | None = None
    for part in parts:
        rest = part if rest is None else torch.cat([rest, part])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]


def as_arrays(text: Text) -> dict[str, np.ndarray]:
    """What is kept beside the result, so that anyone can evaluate the same tokens."""
    return {"tokens": text.contexts.tokens.int().numpy(), "mask": text.contexts.counted.numpy()}
