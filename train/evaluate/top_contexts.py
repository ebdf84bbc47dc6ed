"""The places where latents are most active, at most one in each document, with the tokens around."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BEFORE, AFTER = 24, 8  # tokens of a context on either side of its peak
OUTSIDE = -1  # token id beyond the document or the sequence


@dataclass(frozen=True)
class Context:
    """One document's strongest activation of a latent.

    Attributes:
        peak: index into `tokens` where the activation is.
        tokens: ids around it, of the same document and sequence.
        values: the latent's activation on each of them; 0 where the position does not count.
    """

    document: int
    activation: float
    peak: int
    tokens: list[int]
    values: list[float]


class TopContexts:
    """The `n` documents with the strongest activations of each latent, gathered from sequences in passing.

    Memory is n × latents × 33 tokens and values, whatever the number of sequences.
    """

    def __init__(self, n: int, latents: int, device: torch.device) -> None:
        width = BEFORE + 1 + AFTER
        self.activations = torch.zeros(n, latents, device=device)
        self.documents = torch.full((n, latents), OUTSIDE, dtype=torch.int64, device=device)
        self.places = torch.full((n, latents), OUTSIDE, dtype=torch.int64, device=device)
        self.tokens = torch.full((n, latents, width), OUTSIDE, dtype=torch.int64, device=device)
        self.values = torch.zeros(n, latents, width, device=device)
        self.seen = 0  # positions so far

    def add(self, latents: Tensor, valid: Tensor, doc: Tensor, token: Tensor) -> None:
        """Look at further sequences, [S, C, latents] and [S, C] each; a document may go on from earlier ones."""
        counted = latents.masked_fill(~valid[..., None], 0).flatten(0, 1)
        held_out = valid.flatten().cpu()
        documents, lengths = torch.unique_consecutive(doc.flatten(), return_counts=True)
        start = 0
        for document, length in zip(documents.tolist(), lengths.tolist(), strict=True):
            stop = start + length
            if held_out[start:stop].any():
                values, places = counted[start:stop].max(0)
                self._offer(document, values, places + start + self.seen)
            start = stop
        self._keep_surroundings(counted, doc, token)
        self.seen += len(counted)

    def _offer(self, document: int, values: Tensor, places: Tensor) -> None:
        """Take a document's strongest activations, over its own earlier ones or over the weakest document's."""
        own = self.documents == document
        weakest = self.activations == self.activations.amin(0)  # of equals the last goes, so that the first stay
        last = self.places.masked_fill(~weakest, OUTSIDE - 1).argmax(0)
        slot = torch.where(own.any(0), own.int().argmax(0), last)[None]
        better = values > self.activations.gather(0, slot)[0]

        def put(table: Tensor, new: Tensor) -> None:
            table.scatter_(0, slot, torch.where(better, new, table.gather(0, slot)[0])[None])

        put(self.activations, values)
        put(self.places, places)
        put(self.documents, torch.full_like(places, document))

    def _keep_surroundings(self, counted: Tensor, doc: Tensor, token: Tensor) -> None:
        """Tokens and values around the places that were taken from these sequences."""
        slot, latent = torch.nonzero(self.places >= self.seen, as_tuple=True)
        peak = (self.places[slot, latent] - self.seen)[:, None]
        around = peak + torch.arange(-BEFORE, AFTER + 1, device=peak.device)
        within = around.clamp(0, len(counted) - 1)
        length, documents = doc.shape[1], doc.flatten()
        same = (around == within) & (around // length == peak // length) & (documents[within] == documents[peak])
        self.tokens[slot, latent] = torch.where(same, token.flatten()[within].long(), OUTSIDE)
        self.values[slot, latent] = torch.where(same, counted[within, latent[:, None]], 0.0)

    def of(self, latent: int) -> list[Context]:
        """The contexts of one latent, the strongest first; of equals the earlier."""
        found = [slot for slot, value in enumerate(self.activations[:, latent].tolist()) if value > 0]
        contexts = [(self.places[slot, latent].item(), self._context(slot, latent)) for slot in found]
        return [context for _, context in sorted(contexts, key=lambda pair: (-pair[1].activation, pair[0]))]

    def _context(self, slot: int, latent: int) -> Context:
        tokens, values = self.tokens[slot, latent].tolist(), self.values[slot, latent].tolist()
        inside = [place for place, token in enumerate(tokens) if token != OUTSIDE]
        return Context(
            document=int(self.documents[slot, latent]),
            activation=float(self.activations[slot, latent]),
            peak=inside.index(BEFORE),
            tokens=[tokens[place] for place in inside],
            values=[values[place] for place in inside],
        )
