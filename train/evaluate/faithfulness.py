"""Whether the paths with the largest attribution are those that matter: the model with nothing but them, and without.

    kept       b_dec + the latents' shares in the m paths of each token with the largest |attribution|, instead of x
    removed    x without these shares: the other latents, b_dec and the SAE's error stay

Beside both: as many of the token's paths drawn at random. Cross-entropy of the next tokens, and the divergence from
the model's own predictions, against m. By size and not by sign, since the attribution knows the next token: keeping
what favours it would beat the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.models import LanguageModel
from common.splice import fixed, logits_of
from train.evaluate.attribution import Text, copies_at_once
from train.evaluate.paths import Paths
from train.saes.base import SAE


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


def shares_of(text: Text, paths: Paths, chosen: Tensor) -> Tensor:
    """What the latents are in the chosen paths alone (bool [paths]): [positions of the mask, d_sae]."""
    latents = text.latents[text.mask]
    return latents * paths.kept(chosen, latents.cpu()).to(latents)


@torch.no_grad()
def only(sae: SAE, text: Text, shares: Tensor) -> Tensor:
    """Activations [rows, context, d] with b_dec and these shares of the latents at the positions of the mask."""
    put = text.x.clone()
    put[text.mask] = shares @ sae.W_dec + sae.b_dec / sae.scale
    return put


@torch.no_grad()
def without(sae: SAE, text: Text, shares: Tensor) -> Tensor:
    """Activations [rows, context, d] from which these shares of the latents are taken."""
    put = text.x.clone()
    put[text.mask] -= shares @ sae.W_dec
    return put


@torch.no_grad()
def log_chances(model: LanguageModel, hook: str, text: Text, puts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The model's log-probabilities [predicting positions, vocabulary] with each of these activations at the hook."""
    size = copies_at_once(model, text)
    for start in range(0, len(puts), size):
        some = puts[start : start + size]
        logits = logits_of(model, text.tokens.repeat(len(some), 1), hook, fixed(torch.cat(list(some))))
        for copy in logits.split(len(text.tokens)):
            yield copy[:, :-1][text.predicting].float().log_softmax(-1)


def cross_entropy(text: Text, chances: Tensor) -> float:
    """Of the next tokens, summed."""
    return -float(chances.gather(-1, text.tokens[:, 1:][text.predicting][:, None]).double().sum())


def divergence(clean: Tensor, chances: Tensor) -> float:
    """KL(clean ‖ changed), summed."""
    return float((clean.exp() * (clean - chances)).sum(-1).double().sum())
