"""What becomes of the model's predictions as paths are kept, or taken out, one after the other, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LanguageModel
from train.evaluate.attribution import Attribution, Text
from train.evaluate.faithfulness import (
    cross_entropy,
    divergence,
    kept_counts,
    log_chances,
    only,
    shares_of,
    steps_to,
    without,
)
from train.evaluate.paths import Paths
from train.saes.base import SAE

REMOVED = (1, 2, 5, 10, 20)  # strongest paths of each token
ABLATED = 8  # paths of a sequence that are taken out one by one


@dataclass(frozen=True)
class Traced:
    """One sequence: its text, the paths at the positions of its mask, and the attribution of its log-probability."""

    text: Text
    paths: Paths
    found: Attribution

    @property
    def scores(self) -> Tensor:
        """Of the paths."""
        return self.paths.attribution(self.found.latents[self.text.mask].cpu())

    @property
    def n(self) -> int:
        """Predicting positions."""
        return int(self.text.predicting.sum())


@dataclass(frozen=True)
class Spliced:
    """A model with an SAE at a hook; `check` is called before every sequence, and raises when asked to stop."""

    sae: SAE
    model: LanguageModel
    hook: str
    check: Callable[[], None]

    def chances(self, text: Text, puts: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `log_chances`."""
        return log_chances(self.model, self.hook, text, puts)

    def without(self, one: Traced, chosen: Tensor) -> Tensor:
        """Activations from which the chosen paths (bool) are taken."""
        return without(self.sae, one.text, shares_of(one.text, one.paths, chosen))

    def losses(self, text: Text, puts: Sequence[Tensor]) -> Tensor:
        """Cross-entropy with each of these activations, summed over predicting positions, float64 [puts]."""
        return torch.tensor([cross_entropy(text, found) for found in self.chances(text, puts)], dtype=torch.float64)


def rankings(traced: Sequence[Traced], check: Callable[[], None], seed: int) -> Iterator[tuple[Traced, list[Tensor]]]:
    """Each sequence with the ranks of its paths: by |attribution|, and drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for one in traced:
        check()
        drawn = torch.rand(len(one.paths.token), generator=generator)
        yield one, [one.paths.ranks(scores) for scores in (one.scores.abs(), drawn)]


def kept_curve(spliced: Spliced, traced: Sequence[Traced], seed: int) -> list[dict[str, float]]:
    """Over all sequences: paths kept per token, latents in use, and the losses, beside those of paths at random."""
    counts = steps_to(max(kept_counts(one.paths)[-1] for one in traced))
    n = sum(one.n for one in traced)
    sums = torch.zeros(2, len(counts), 3, dtype=torch.float64)  # by ranking and count: CE, KL, latents in use
    for one, orders in rankings(traced, spliced.check, seed):
        (clean,) = spliced.chances(one.text, [one.text.x])
        puts, used = [], []
        for kept in (ranks < count for ranks in orders for count in counts):
            shares = shares_of(one.text, one.paths, kept)  # as wide as the SAE: one at a time
            puts.append(only(spliced.sae, one.text, shares))
            used.append(one.n * float((shares > 0).sum(-1).double().mean()))
        losses = [(cross_entropy(one.text, p), divergence(clean, p)) for p in spliced.chances(one.text, puts)]
        rows = [(*pair, latents) for pair, latents in zip(losses, used, strict=True)]
        sums += torch.tensor(rows, dtype=torch.float64).view_as(sums) / n
    return [
        {"kept": count, "latents": latents, "ce": ce, "kl": kl, "random_ce": random_ce, "random_kl": random_kl}
        for count, (ce, kl, latents), (random_ce, random_kl, _) in zip(counts, *sums.tolist(), strict=True)
    ]


def removal_curve(spliced: Spliced, traced: Sequence[Traced], seed: int) -> list[dict[str, float]]:
    """Over all sequences: how much the cross-entropy rises when paths of each token are taken out of x."""
    n = sum(one.n for one in traced)
    rises = torch.zeros(2, len(REMOVED), dtype=torch.float64)
    for one, orders in rankings(traced, spliced.check, seed):
        gone = (ranks < count for ranks in orders for count in REMOVED)
        ce = spliced.losses(one.text, [one.text.x, *(spliced.without(one, paths) for paths in gone)])
        rises += (ce[1:] - ce[0]).view_as(rises) / n
    return [
        {"removed": count, "ce_rise": rise, "random_ce_rise": random_rise}
        for count, rise, random_rise in zip(REMOVED, *rises.tolist(), strict=True)
    ]


def single_effects(spliced: Spliced, traced: Sequence[Traced], seed: int) -> Tensor:
    """Attribution of paths drawn at random, and by how much the log-probability falls without each: [paths, 2]."""
    generator, found = torch.Generator().manual_seed(seed), []
    for one in traced:
        spliced.check()
        drawn = torch.randperm(len(one.paths.token), generator=generator)[:ABLATED]
        chosen = torch.arange(len(one.paths.token)) == drawn[:, None]
        ce = spliced.losses(one.text, [one.text.x, *(spliced.without(one, path) for path in chosen)])
        found.append(torch.stack([one.scores[drawn], ce[1:] - ce[0]], dim=1))
    return torch.cat(found)


def correlation(pairs: Tensor) -> float:
    """Pearson's of two columns; NaN where one does not vary."""
    return float(torch.corrcoef(pairs.T)[0, 1]) if len(pairs) > 1 else float("nan")
