"""How smoothly codes move along a document (evaluation spec §5.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.data.batch import Batch

WINDOW = 32  # places of a stretch whose spectrum is taken: shorter ones tell fast from slow badly, longer ones are rare
HAAR_LEVELS = 3
DOCUMENT_WINDOW = 128


class Smoothness:
    """Running sums over consecutive tokens of a document, float64 on the CPU.

    Attributes:
        pairs: consecutive tokens, both valid; `moved`: those whose x differs.
        runs: stretches of consecutive valid tokens of a document.
        windows: stretches of `WINDOW` tokens, side by side from the beginning of each run.
    """

    def __init__(self, n_latents: int) -> None:
        self.pairs = self.moved = self.runs = self.windows = 0
        self.change = self.size = self.per_distance = 0.0
        self.steepest = torch.zeros(n_latents, dtype=torch.float64)
        self.low = self.high = self.approximation = 0.0
        self.details = [0.0] * HAAR_LEVELS

    def add(self, latents: Tensor, batch: Batch) -> None:
        """Codes [B, T, L] of sequences, and their x."""
        offset, length = runs_of(batch)
        self.runs += int((offset == 0).sum())
        self._add_changes(latents, batch.x.float(), offset[:, 1:] > 0)
        starts = ((offset >= 0) & (offset % WINDOW == 0) & (offset + WINDOW <= length)).flatten().nonzero()
        if len(starts):
            places = starts + torch.arange(WINDOW, device=starts.device)
            windows = latents.flatten(0, 1)[places]
            self.windows += len(windows)
            self._add_spectrum(windows)
            self._add_haar(windows)

    def _add_changes(self, latents: Tensor, x: Tensor, follows: Tensor) -> None:
        """`follows` [B, T − 1]: whether a token and the one before it are such a pair."""
        change = (latents[:, 1:] - latents[:, :-1])[follows].abs()
        distance = (x[:, 1:] - x[:, :-1])[follows].norm(dim=-1)
        self.pairs += len(change)
        self.change += float(change.sum(dtype=torch.float64))
        self.size += float(latents[:, 1:][follows].abs().sum(dtype=torch.float64))
        moved = distance > 0
        ratio = change[moved] / distance[moved, None]
        self.moved += len(ratio)
        self.per_distance += float(ratio.sum(dtype=torch.float64))
        if len(ratio):
            self.steepest = torch.maximum(self.steepest, ratio.amax(0).double().cpu())

    def _add_spectrum(self, windows: Tensor) -> None:
        power = torch.fft.rfft(windows, dim=1).abs().square().sum((0, 2), dtype=torch.float64).cpu()
        power[1:-1] *= 2  # of each pair ± of frequencies one is given; 0 and the highest have no twin
        self.low += float(power[1 : WINDOW // 4 + 1].sum())  # without the mean
        self.high += float(power[WINDOW // 4 + 1 :].sum())

    def _add_haar(self, windows: Tensor) -> None:
        rest = windows
        for level in range(HAAR_LEVELS):
            even, odd = rest[:, ::2], rest[:, 1::2]
            self.details[level] += float(((even - odd) / math.sqrt(2)).square().sum(dtype=torch.float64))
            rest = (even + odd) / math.sqrt(2)
        self.approximation += float(rest.square().sum(dtype=torch.float64))


def runs_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Stretches of consecutive valid tokens of one document: each token's place in its own from 0, and its length.

    int64 [B, T]; −1 and 0 where a token is not valid.
    """
    valid, doc = batch.valid, batch.doc
    goes_on = torch.zeros_like(valid)
    goes_on[:, 1:] = valid[:, 1:] & valid[:, :-1] & (doc[:, 1:] == doc[:, :-1])
    places = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    begins = valid & ~goes_on
    offset = places - torch.where(begins, places, 0).cummax(-1).values
    number = begins.flatten().cumsum(0) - 1
    lengths = torch.bincount(number[valid.flatten()], minlength=1)
    length = torch.where(valid, lengths[number.clamp_min(0)].view(valid.shape), 0)
    return torch.where(valid, offset, -1), length


class DistinctLatents:
    """Distinct latents in stretches of 128 valid tokens of a document, side by side, across its sequences.

    Attributes:
        windows: how many there are; `total`: distinct latents, summed over them.
    """

    def __init__(self, n_latents: int, window: int = DOCUMENT_WINDOW) -> None:
        self.window, self.windows, self.total = window, 0, 0
        self._doc, self._count, self._seen = -1, 0, torch.zeros(n_latents, dtype=torch.bool)

    def add(self, latents: Tensor, batch: Batch) -> None:
        """Codes [B, T, L] of sequences in the order of the store."""
        active = latents[batch.valid] > 0
        documents, counts = torch.unique_consecutive(batch.doc[batch.valid], return_counts=True)
        for doc, rows in zip(documents.tolist(), active.split(counts.tolist()), strict=True):
            if doc != self._doc:
                self._begin(doc)
            while len(rows):
                taken, rows = rows[: self.window - self._count], rows[self.window - self._count :]
                self._seen |= taken.any(0).cpu()
                self._count += len(taken)
                if self._count == self.window:
                    self.windows += 1
                    self.total += int(self._seen.sum())
                    self._begin(doc)

    def _begin(self, doc: int) -> None:
        self._doc, self._count = doc, 0
        self._seen = torch.zeros_like(self._seen)
