"""Whether the paths with the largest attribution are those that matter: the model with nothing but them.

Of each token the m paths of largest |attribution| are kept, and b_dec + the latents' shares in them is put into the
model instead of x. Beside it: as many of the token's paths drawn at random. Cross-entropy of the next tokens, and the
divergence from the model's own predictions, against m. By size and not by sign, since the attribution knows the next
token: keeping what favours it would beat the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LanguageModel
from common.splice import fixed, logits_of
from train.evaluate.attribution import Text
from train.evaluate.paths import Paths
from train.saes.base import SAE


@dataclass(frozen=True)
class Losses:
    """Sums over `n` predicting positions: cross-entropy of the next token, KL(model ‖ changed), latents in use."""

    ce: float
    kl: float
    latents: float
    n: int

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.ce + other.ce, self.kl + other.kl, self.latents + other.latents, self.n + other.n)


def steps_to(most: int) -> list[int]:
    """0, 1, 2, 4, … below `most`, and `most`."""
    steps, step = [0], 1
    while step < most:
        steps.append(step)
        step *= 2
    return [*steps, most] if most else steps


def kept_counts(paths: Paths) -> list[int]:
    """How many paths of a token to keep: `steps_to` the most that a token has."""
    return steps_to(int(torch.bincount(paths.token).max()) if len(paths.token) else 0)


@torch.no_grad()
def measure(
    sae: SAE, model: LanguageModel, hook: str, text: Text, paths: Paths, ranks: Tensor, counts: list[int]
) -> Iterator[Losses]:
    """The losses with the first 0, 1, 2, … paths of every token, by `ranks` [paths].

    Args:
        paths: of the positions of `text` where the mask is true, in their order.
        counts: how many to keep, from `kept_counts`.
    """
    clean = logits_of(model, text.tokens).float().log_softmax(-1)
    latents = text.latents[text.mask]
    for count in counts:
        kept = latents * paths.kept(ranks < count, latents.cpu()).to(latents)
        put = text.x.clone()
        put[text.mask] = kept @ sae.W_dec + sae.b_dec / sae.scale
        yield losses(text, clean, logits_of(model, text.tokens, hook, fixed(put)), kept)


def losses(text: Text, clean: Tensor, logits: Tensor, latents: Tensor) -> Losses:
    """Of changed logits, against the model's own log-probabilities [rows, context, vocabulary].

    Args:
        latents: in use at the positions of the mask [positions, d_sae].
    """
    changed, where = logits.float().log_softmax(-1)[:, :-1], text.predicting
    ce = -changed.gather(-1, text.tokens[:, 1:, None])[..., 0]
    kl = (clean[:, :-1].exp() * (clean[:, :-1] - changed)).sum(-1)
    used = (latents > 0).sum(-1).double().mean() if len(latents) else latents.new_zeros(())
    n = int(where.sum())
    return Losses(float(ce[where].double().sum()), float(kl[where].double().sum()), float(used) * n, n)
