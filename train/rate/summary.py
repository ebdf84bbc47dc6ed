"""Ratings by learner, and how far raters agree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import stats

from train.rate.answers import Answer

CLEAR = 4


@dataclass(frozen=True)
class Rated:
    """Ratings of one learner.

    Attributes:
        latents: how many have a score.
        raters: how many people gave one.
        score: mean over latents of the mean over raters, 1 to 5; None where nothing is scored.
        interval: half its 95 % interval over latents (Student's t); None for fewer than two.
        clear_share: share of the latents whose mean score is at least 4.
        skipped: answers without a score.
        agreement: Krippendorff's alpha over latents scored by two or more; None where there is none.
    """

    learner: str
    latents: int
    raters: int
    score: float | None
    interval: float | None
    clear_share: float | None
    skipped: int
    agreement: float | None


def summarise(answers: Iterable[Answer], learners: Sequence[str]) -> list[Rated]:
    """One row for each of these learners, the best score first, and `all` as the last one."""
    known = [answer for answer in answers if answer.learner in learners]
    rows = [rated(name, [answer for answer in known if answer.learner == name]) for name in learners]
    rows.sort(key=lambda row: -(row.score or 0.0))
    return [*rows, rated("all", known)]


def rated(name: str, answers: Sequence[Answer]) -> Rated:
    """The row of one learner."""
    scores: dict[tuple[str, int], list[int]] = defaultdict(list)
    for answer in answers:
        if answer.score is not None:
            scores[answer.learner, answer.latent].append(answer.score)
    means = [float(np.mean(given)) for given in scores.values()]
    n = len(means)
    interval = float(stats.t.ppf(0.975, n - 1) * np.std(means, ddof=1) / math.sqrt(n)) if n > 1 else None
    return Rated(
        learner=name,
        latents=n,
        raters=len({answer.rater for answer in answers if answer.score is not None}),
        score=float(np.mean(means)) if means else None,
        interval=interval,
        clear_share=float(np.mean([mean >= CLEAR for mean in means])) if means else None,
        skipped=sum(answer.score is None for answer in answers),
        agreement=krippendorff_alpha(list(scores.values())),
    )


def krippendorff_alpha(scores: Iterable[Sequence[int]]) -> float | None:
    """Agreement of raters on an interval scale: 1 is full, 0 is what chance gives (Krippendorff 2011).

    1 − (mean squared difference of scores of one latent) / (the same over all pairs of scores), over latents that two
    or more have scored. None where there is none; 1 where every score is the same.
    """
    several = [given for given in scores if len(given) > 1]
    if not several:
        return None
    within = sum(sum((a - b) ** 2 for a, b in permutations(given, 2)) / (len(given) - 1) for given in several)
    everything = np.array([score for given in several for score in given], dtype=float)
    n = len(everything)
    between = 2 * float(n * (everything**2).sum() - everything.sum() ** 2) / (n - 1)
    return 1.0 if between == 0 else 1 - within / between
