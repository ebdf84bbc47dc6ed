"""A model with an SAE at a hook: where latents fire, and next-token losses with the model as it is and with clamps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LanguageModel
from common.splice import logits_of
from train.evaluate.unlearn.clamp import Clamp, codes_of, intervene
from train.evaluate.unlearn.passages import Passages
from train.evaluate.unlearn.selection import Activity
from train.saes.base import SAE

MOST_VALUES = {"cpu": 2**23, "cuda": 2**27}  # logits or latents at once: 32 MiB stay in a CPU's cache, 1.7 times faster
Check = Callable[[], None]


@dataclass(frozen=True)
class Patient:
    """A model with an SAE at one of its hooks.

    Attributes:
        check: called before every forward; raises when asked to stop.
    """

    model: LanguageModel
    sae: SAE
    hook: str
    check: Check

    def rows_at_once(self, context: int) -> int:
        """Rows of a forward that keep logits and latents within bounds."""
        widest = max(self.model.vocabulary, self.sae.d_sae)
        return max(MOST_VALUES[self.model.device.type] // (context * widest), 1)

    def codes(self, rows: Passages) -> Tensor:
        """Latents [rows, context, d_sae], raw units, on rows that fit at once."""
        tokens = rows.tokens.to(self.model.device)
        return codes_of(self.sae, rows.batch(self.model.capture(tokens, [self.hook])[self.hook].flatten(2)))

    def logits(self, rows: Passages, clamp: Clamp | None = None) -> Tensor:
        """Logits [rows, context, vocabulary], with latents clamped."""
        tokens = rows.tokens.to(self.model.device)
        if clamp is None:
            return logits_of(self.model, tokens)
        return logits_of(self.model, tokens, self.hook, lambda x: intervene(self.sae, rows.batch(x), clamp))

    def batches(self, passages: Passages, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Passages]]:
        """Row numbers and the rows themselves, as many as go through the model at once."""
        for some in passages.batches(self.rows_at_once(passages.tokens.shape[1]), rows):
            self.check()
            yield some, passages.of(some)


@torch.no_grad()
def activity(patient: Patient, passages: Passages) -> Activity:
    """What each latent does on the tokens that count."""
    d_sae = patient.sae.d_sae
    fired, total, tokens = torch.zeros(d_sae).double(), torch.zeros(d_sae).double(), 0
    for _, rows in patient.batches(passages):
        counted = rows.counted
        latents = patient.codes(rows)[counted.to(patient.model.device)]
        fired += (latents > 0).sum(0).double().cpu()
        total += latents.clamp_min(0).sum(0, dtype=torch.float64).cpu()
        tokens += int(counted.sum())
    return Activity(tokens, fired, total)


@dataclass(frozen=True)
class Watched:
    """Where some latents fire.

    Attributes:
        latents: their indices.
        active: bool [rows, watched], whether each fires anywhere in the row.
        tokens: the distinct ids that count, ascending, int64 [distinct].
        mass: float64 [watched, distinct], activation of each on each of these ids, raw units.
    """

    latents: tuple[int, ...]
    active: Tensor
    tokens: Tensor
    mass: Tensor

    def touched(self, clamp: Clamp) -> Tensor:
        """Numbers of the rows that `clamp` changes."""
        columns = [self.latents.index(latent) for latent in clamp.latents]
        return torch.nonzero(self.active[:, columns].any(1)).flatten()


@torch.no_grad()
def watch(patient: Patient, passages: Passages, latents: tuple[int, ...]) -> Watched:
    """Where `latents` fire on passages."""
    which = torch.tensor(latents, dtype=torch.int64)
    active = torch.zeros(len(passages.tokens), len(latents), dtype=torch.bool)
    tokens = passages.tokens[passages.counted].unique()  # the whole vocabulary would be 2 MB a latent for Gemma
    mass = torch.zeros(len(latents), len(tokens), dtype=torch.float64)
    for numbers, rows in patient.batches(passages):
        codes = patient.codes(rows)[..., which.to(patient.model.device)].cpu()
        active[numbers] = (codes > 0).any(1)
        counted = rows.counted
        mass.index_add_(1, torch.searchsorted(tokens, rows.tokens[counted]), codes[counted].double().t())
    return Watched(latents, active, tokens, mass)


@torch.no_grad()
def clean_losses(patient: Patient, passages: Passages) -> Tensor:
    """The unchanged model's losses summed over each row's predicting tokens, float64 [rows], nats."""
    losses = torch.zeros(len(passages.tokens), dtype=torch.float64)
    for numbers, rows in patient.batches(passages):
        losses[numbers] = row_losses(patient, rows)
    return losses


@torch.no_grad()
def clamped_losses(
    patient: Patient,
    passages: Passages,
    clean: Tensor,
    watched: Watched,
    clamp: Clamp,
    done: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """As `clean_losses` with latents clamped. Rows where none of them fires have the clean loss, and are not run again.

    Args:
        watched: of these passages; holds the clamped latents.
        done: called with the number of rows dealt with.
    """
    touched, losses = watched.touched(clamp), clean.clone()
    for numbers, rows in patient.batches(passages, touched):
        losses[numbers] = row_losses(patient, rows, clamp)
        done(len(numbers))
    done(len(losses) - len(touched))
    return losses


def row_losses(patient: Patient, rows: Passages, clamp: Clamp | None = None) -> Tensor:
    """Cross-entropy summed over each row's predicting tokens, float64 [rows], nats."""
    logits = patient.logits(rows, clamp)[:, :-1].float()
    targets = rows.tokens[:, 1:].to(logits.device)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each.view(targets.shape).double() * rows.predicting.to(each.device)).sum(1).cpu()
