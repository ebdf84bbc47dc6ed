"""Paths through an SAE's levels in held-out texts: what they add up to, whether they matter, and examples of them.

The figure attributed is the log-probability of the next tokens, summed over a sequence, for completeness and
faithfulness; in the examples it is one token's logit less that of the strongest other. Without links between levels
every active latent is a path of its own, so that flat SAEs stand beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from common.models import LanguageModel
from common.splice import logits_of
from train.evaluate.attribution import Text, attribute, read_text
from train.evaluate.ladder import Ladder
from train.evaluate.path_curves import Spliced, Traced, correlation, kept_curve, removal_curve, single_effects
from train.evaluate.paths import find_paths
from train.evaluate.reuse import is_edge
from train.evaluate.sample import Sample
from train.evaluate.subject import Subject
from train.evaluate.text import spell
from train.saes.base import SAE

TOKENS, MOST_ROWS = 1024, 16  # in whole sequences, one at least
LEAST_PREDICTING = 2  # positions of a sequence that is looked at
TOP_PATHS = 10  # of an example
SHOWN_REMOVED = 5  # of the numbers of paths taken out, the one that is a metric
BEFORE = 24  # tokens of context in an example

PATH_METRICS = {
    "path_completeness_error": "Σ |m(x) − m(b_dec) − Σ paths − error term| / Σ |m(x) − m(b_dec)| over sequences",
    "path_split_error": "largest |Σ paths − Σ latents| / Σ |latents| of a sequence",
    "path_recovered": "share of the SAE's cross-entropy gain that the strongest paths keep, mean over the curve",
    "path_recovered_random": "the same with paths drawn at random",
    "path_removed": "rise of the cross-entropy when the five strongest paths of each token are taken out of x, nats",
    "path_removed_random": "the same with five paths drawn at random",
    "path_correlation": "correlation of a path's attribution with the fall of log-probability when it is taken out",
}


@dataclass(frozen=True)
class PathFigures:
    """Figures of `PATH_METRICS`, reasons for those that are None, examples and the curve, as JSON."""

    values: dict[str, float | None]
    reasons: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def none(cls, reason: str) -> PathFigures:
        return cls(dict.fromkeys(PATH_METRICS), dict.fromkeys(PATH_METRICS, reason))


def path_figures(subject: Subject, sample: Sample, ladder: Ladder, seed: int = 0) -> PathFigures:
    """All of it; None with a reason where the language model is not there or x̂ is not b_dec + f W_dec.

    Raises:
        Interrupted: asked to stop.
    """
    sae = subject.sae
    if type(sae).reconstruct is not SAE.reconstruct:
        return PathFigures.none(f"{sae.variant}: x̂ depends on other positions, so it is no sum of this one's latents")
    try:
        model = subject.spliced_model()
        hook = model.resolve_hook(subject.plan.hook)
    except ConfigError as error:
        return PathFigures.none(str(error))
    rows = rows_of(sample, seed)
    if not len(rows):
        return PathFigures.none("no held-out sequence has two positions with a next token")
    traced = [trace(subject, model, hook, text, ladder) for text in texts_of(subject, model, hook, sample, rows)]
    spliced = Spliced(sae, model, hook, subject.refuse_when_stopped)
    curve, removal = (curve(spliced, traced, seed) for curve in (kept_curve, removal_curve))
    values, reasons = scalars(traced, curve)
    put_removal(values, reasons, removal, single_effects(spliced, traced, seed))
    names = list(ladder.levels) if with_links(ladder) else ["latent"]
    examples = [example(subject, model, hook, one, names, seed + i) for i, one in enumerate(traced)]
    model_ce = -sum(one.found.start + one.found.total for one in traced) / sum(one.n for one in traced)
    more = {"paths": examples, "faithfulness": curve, "faithfulness_model": {"ce": model_ce}, "removal": removal}
    return PathFigures(values, reasons, more)


def with_links(ladder: Ladder) -> bool:
    """Whether paths run through several levels."""
    return ladder.own and all(weights is not None for weights in ladder.links)


def rows_of(sample: Sample, seed: int) -> np.ndarray:
    """Sequences to look at, spread over the sample: those with two predicting positions, 1,024 tokens of them."""
    mask = mask_of(sample)
    predicting = (mask[:, :-1] & (sample.doc_rows[:, :-1] == sample.doc_rows[:, 1:])).sum(1)
    rows = np.flatnonzero(predicting >= LEAST_PREDICTING)
    count = min(len(rows), MOST_ROWS, max(TOKENS // sample.rows.shape[1], 1))
    picked: np.ndarray = rows[np.linspace(0, len(rows) - 1, count).astype(int)] if count else rows
    return picked


def mask_of(sample: Sample) -> np.ndarray:
    """Held-out tokens that count, bool [rows, context]."""
    mask = np.zeros(sample.rows.shape, dtype=bool)
    mask[sample.row[sample.valid], sample.column[sample.valid]] = True
    return mask


def texts_of(subject: Subject, model: LanguageModel, hook: str, sample: Sample, rows: np.ndarray) -> Iterator[Text]:
    """One sequence after the other."""
    mask = mask_of(sample)
    for row in rows:
        subject.refuse_when_stopped()
        parts = (torch.from_numpy(values[row : row + 1]) for values in (sample.rows, sample.doc_rows, mask))
        yield read_text(subject.sae, model, hook, *parts)


def trace(subject: Subject, model: LanguageModel, hook: str, text: Text, ladder: Ladder) -> Traced:
    """Paths of a sequence, and what its log-probability owes to latents."""
    if with_links(ladder):
        links = [weights * is_edge(weights) for weights in ladder.links if weights is not None]
        levels: Sequence[np.ndarray] = list(ladder.levels.values())
    else:
        links, levels = [], [np.arange(subject.sae.d_sae)]
    paths = find_paths(text.latents[text.mask], levels, links)
    return Traced(text, paths, attribute(subject.sae, model, hook, text, log_probability(text)))


def log_probability(text: Text) -> Callable[[Tensor], Tensor]:
    """Σ log p of the next tokens at predicting positions, as a function of the logits."""

    def figure(logits: Tensor) -> Tensor:
        chances = logits[:, :-1].float().log_softmax(-1).gather(-1, text.tokens[:, 1:, None])[..., 0]
        return chances[text.predicting].sum()

    return figure


def scalars(
    traced: Sequence[Traced], curve: Sequence[dict[str, float]]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The metrics, and why some are None."""
    values: dict[str, float | None] = dict.fromkeys(PATH_METRICS)
    reasons = {}
    totals = sum(abs(one.found.total) for one in traced)
    if totals > 0:
        values["path_completeness_error"] = sum(abs(one.found.missing) for one in traced) / totals
    else:
        reasons["path_completeness_error"] = "b_dec alone gives the same log-probabilities"
    values["path_split_error"] = max(split_error(one) for one in traced)
    gain = curve[0]["ce"] - curve[-1]["ce"]
    for name, key in (("path_recovered", "ce"), ("path_recovered_random", "random_ce")):
        if len(curve) < 3:
            reasons[name] = "no token has more than one path"
        elif gain <= 0:
            reasons[name] = "the SAE's cross-entropy is no better than that of b_dec alone"
        else:
            values[name] = float(np.mean([(curve[0][key] - point[key]) / gain for point in curve[1:-1]]))
    return values, reasons


def put_removal(
    values: dict[str, float | None],
    reasons: dict[str, str],
    removal: Sequence[dict[str, float]],
    effects: Tensor,
) -> None:
    """The metrics of paths that are taken out."""
    five = next(point for point in removal if point["removed"] == SHOWN_REMOVED)
    values |= {"path_removed": five["ce_rise"], "path_removed_random": five["random_ce_rise"]}
    found = correlation(effects)
    if math.isfinite(found):
        values["path_correlation"] = found
    else:
        reasons["path_correlation"] = "no two paths, or none that changes anything"


def split_error(one: Traced) -> float:
    """How far the paths' sum is from that of the latents, over the sum of their sizes: rounding alone."""
    latents = one.found.latents.double()
    return abs(float(one.scores.sum()) - float(latents.sum())) / max(float(latents.abs().sum()), 1e-300)


def example(
    subject: Subject, model: LanguageModel, hook: str, one: Traced, names: Sequence[str], seed: int
) -> dict[str, Any]:
    """The strongest paths of one prediction, drawn at random from a sequence."""
    text = one.text
    places = text.predicting[0].nonzero()[:, 0]
    place = int(places[torch.randint(len(places), (1,), generator=torch.Generator().manual_seed(seed))])
    target = int(text.tokens[0, place + 1])
    logits = logits_of(model, text.tokens)[0, place].clone()
    logits[target] = -torch.inf
    other = int(logits.argmax())

    def difference(out: Tensor) -> Tensor:
        return (out[0, place, target] - out[0, place, other]).float()

    found = attribute(subject.sae, model, hook, text, difference)
    scores = one.paths.attribution(found.latents[text.mask].cpu())
    strongest = torch.topk(scores.abs(), min(TOP_PATHS, len(scores))).indices.tolist()
    positions = text.mask[0].nonzero()[:, 0].tolist()
    ids = text.tokens[0].tolist()
    words = spell(model.tokenizer, {*ids, other})
    start = max(0, place + 1 - BEFORE)
    rows = [
        {
            "position": positions[int(one.paths.token[path])],
            "token": words[ids[positions[int(one.paths.token[path])]]],
            "latents": {
                name: None if latent < 0 else latent
                for name, latent in zip(names, one.paths.latents[path].tolist(), strict=True)
            },
            "attribution": float(scores[path]),
        }
        for path in strongest
    ]
    return {
        "document": int(text.doc[0, place]),
        "position": place,
        "context": [words[token] for token in ids[start : place + 1]],
        "target": words[target],
        "against": words[other],
        "logit_difference": found.start + found.total,
        "from_b_dec_alone": found.start,
        "from_paths": float(scores.sum()),
        "from_error": found.error,
        "paths": rows,
    }
