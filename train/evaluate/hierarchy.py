"""Suite `hierarchy`: what the levels of an SAE have to do with each other (evaluation spec §5.1–5.4, sae.md §4–5).

Levels are the variant's own, or pseudo-levels by density; links its own, or a post-hoc tree (`ladder`). Everything is
measured on the same sample of held-out tokens; what is chosen or fitted is so on every second document and judged on
the others where the definition says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from train.evaluate.codes import halved
from train.evaluate.ladder import Ladder, ladder_of
from train.evaluate.level_pair import PAIR_METRICS, Figures, Pair, measure_pair
from train.evaluate.path_figures import PATH_METRICS, path_figures
from train.evaluate.sample import bounded, read_sample
from train.evaluate.structure import prefix_explained_variance
from train.evaluate.subject import Evaluation, Subject

PAIRS = ("1", "2")  # between the two most general levels, and between the second and the third
LEVEL_METRICS = {
    "level_ev_1": "explained variance by b_dec and the most general level alone",
    "level_ev_2": "by the two most general levels",
    "level_ev_all": "by all levels",
}
HIERARCHY_METRICS = {
    "tokens": "held-out tokens looked at",
    "documents": "held-out documents they are from",
    **LEVEL_METRICS,
    **{f"{name}_{pair}": text for name, text in PAIR_METRICS.items() for pair in PAIRS},
    **PATH_METRICS,
}


def hierarchy(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        ConfigError: `--levels` makes no levels.
        DataError: no held-out token.
        Interrupted: asked to stop.
    """
    sample = read_sample(subject)
    counted = np.flatnonzero(sample.valid)
    codes, order = halved(sample.codes[counted], sample.doc[counted])
    ladder = ladder_of(subject.sae, codes.density, subject.config.levels)
    x = sample.x[torch.from_numpy(counted[order])]
    rows = subject.sae.W_dec.detach().float().cpu()
    found = []
    for (above, below), weights in zip(ladder.pairs, ladder.links, strict=True):
        subject.refuse_when_stopped()
        pair = Pair.of(codes, ladder.levels[above], ladder.levels[below], weights, rows, x)
        found.append(measure_pair(pair))
    increments = level_increments(subject, ladder)
    paths = path_figures(subject, sample, ladder)
    metrics: dict[str, Any] = dict.fromkeys(HIERARCHY_METRICS)
    metrics |= {"tokens": codes.n, "documents": len(np.unique(sample.doc[counted])), **paths.values}
    metrics |= {"level_ev_1": increments[0], "level_ev_2": increments[1], "level_ev_all": increments[-1]}
    reasons, intervals = dict(paths.reasons), dict[str, list[float]]()
    for number, name in enumerate(PAIRS):
        figures = found[number] if number < len(found) else absent(ladder)
        metrics |= {f"{key}_{name}": value for key, value in figures.values.items()}
        reasons |= {f"{key}_{name}": reason for key, reason in figures.reasons.items()}
        intervals |= {f"{key}_{name}": ends for key, ends in figures.intervals.items()}
    levels = [
        described(name, latents, codes.density, codes.alive, share)
        for (name, latents), share in zip(ladder.levels.items(), increments, strict=True)
    ]
    pairs = [
        {"upper": above, "lower": below, **figures.values, **figures.more, "reasons": figures.reasons}
        for (above, below), figures in zip(ladder.pairs, found, strict=True)
    ]
    more = {"own_levels": ladder.own, "levels": levels, "pairs": pairs, "intervals": intervals, **paths.more}
    return Evaluation(metrics, reasons, more)


def absent(ladder: Ladder) -> Figures:
    """Of a pair that is not there."""
    found = Figures()
    found.leave("", f"there are {len(ladder.levels)} levels")
    return found


def level_increments(subject: Subject, ladder: Ladder) -> list[float]:
    """Explained variance of b_dec and the levels up to each, on the tokens of the sample."""
    order = torch.from_numpy(np.concatenate(list(ladder.levels.values())))
    ends = np.cumsum([len(latents) for latents in ladder.levels.values()]).tolist()
    return prefix_explained_variance(subject.sae, ends, bounded(subject).held_out, order)


def described(name: str, latents: np.ndarray, density: np.ndarray, alive: np.ndarray, share: float) -> dict[str, Any]:
    """One level, as JSON."""
    return {
        "name": name,
        "latents": len(latents),
        "alive": int(alive[latents].sum()),
        "l0": float(density[latents].sum()),
        "dense_share": float((density[latents] > 0.1).mean()),
        "explained_variance": share,
    }
