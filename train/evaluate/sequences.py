"""Held-out sequences with their codes: what suites need that look at a token's neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batch import Batch
from train.evaluate.subject import Subject
from train.saes.base import SAE

MOST_VALUES = 2**24  # of codes at once: 64 MiB


@dataclass(frozen=True)
class Sequences:
    """Whole sequences of the store in its order, each with a held-out position.

    Attributes:
        latents: [sequences, context, d_sae] in raw units; of special tokens and other documents too.
        valid: the held-out positions, bool [sequences, context].
        doc, token: document and token id of each position, [sequences, context].
    """

    latents: Tensor
    valid: Tensor
    doc: Tensor
    token: Tensor


@torch.no_grad()
def encoded_sequences(subject: Subject) -> Iterator[Sequences]:
    """The held-out sequences, `--max-tokens` of them, encoded in windows of the SAE's own length.

    Positions at the end of a sequence that fill no window are left out, as they are in training.

    Raises:
        Interrupted: asked to stop.
    """
    rows = max(MOST_VALUES // (subject.store.context * subject.sae.d_sae), 1)
    for batch in subject.held_out(subject.store.context):
        for start in range(0, len(batch.x), rows):
            subject.refuse_when_stopped()
            yield encode_sequences(subject.sae, batch, slice(start, start + rows))


def encode_sequences(sae: SAE, batch: Batch, rows: slice) -> Sequences:
    """Sequences `rows` of a batch of whole ones."""
    length = batch.x.shape[1] // sae.window * sae.window
    whole = rows_of(batch, rows, length)

    def windows(values: Tensor) -> Tensor:
        return values.reshape(-1, sae.window, *values.shape[2:])

    cut = Batch(windows(whole.x), windows(whole.valid), whole.n_valid, lambda: windows(whole.context))
    return Sequences(sae.encode(cut).view(*whole.valid.shape, -1), whole.valid, whole.doc, whole.token)


def rows_of(batch: Batch, rows: slice, length: int | None = None) -> Batch:
    """Some sequences of a batch, their first `length` positions."""
    valid = batch.valid[rows, :length]
    return Batch(batch.x[rows, :length], valid, int(valid.sum()), lambda: batch.context[rows, :length])
