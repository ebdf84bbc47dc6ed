"""Suite `interp`: how interpretable latents are, by proxies and, where somebody names one, by a judge.

The proxies look at the places where a latent is most active (`train/evaluate/proxies.py`), the judge explains passages
and recognises others by its explanation (`train/evaluate/detection.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.console import Progress
from common.errors import ConfigError
from train.evaluate.bootstrap import bootstrap_interval
from train.evaluate.detection import Exam, Verdict, examine_all, make_exam
from train.evaluate.judge import Judge, key_from_environment
from train.evaluate.latents import sample as choose
from train.evaluate.proxies import (
    PROXIES,
    Attributes,
    Neighbours,
    context_embeddings,
    figures_at,
    mean_cosine,
    random_places,
    top_places,
)
from train.evaluate.sample import Sample, read_sample
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.targets import targets_of
from train.evaluate.text import spell

MOST_LATENTS = 512
LEAST_ACTIVE = 15  # tokens, below which a latent is left out
NULLS = ("token_entropy", "previous_entropy", "next_entropy", "purity", "attribute_auc")
CACHE = "interp_judge.jsonl"

INTERP_METRICS = {
    "tokens": "held-out tokens looked at",
    "documents": "held-out documents that they are from",
    "latents": "latents looked at: a sample of those active on 15 tokens or more, at most 512",
    "contexts": "median number of top contexts: at most 100, at most one in each document",
    "token_entropy": "proxy: entropy of the token itself over a latent's top contexts, bits, median over latents",
    "previous_entropy": "proxy: the same of the token before",
    "next_entropy": "proxy: the same of the token after",
    "purity": "proxy: share of the commonest token, median over latents",
    "attribute_auc": "proxy: AUC of the best attribute for top contexts against all tokens, median over latents",
    "context_cosine": "proxy: mean cosine of pairs of context embeddings less that of random ones, median over latents",
    "token_entropy_random": "token_entropy of as many random tokens of the same documents",
    "previous_entropy_random": "previous_entropy of those",
    "next_entropy_random": "next_entropy of those",
    "purity_random": "purity of those",
    "attribute_auc_random": "attribute_auc of those",
    "judged": "latents that a judge explained and recognised",
    "judge_score": "share of passages that the judge told right by its own explanation, mean over judged latents",
}


@dataclass(frozen=True)
class Looked:
    """One latent.

    Attributes:
        figures: its proxies by name, None where one cannot be had, and the best `attribute`.
        random: the same of random tokens.
    """

    index: int
    group: str | None
    contexts: int
    figures: dict[str, Any]
    random: dict[str, Any]


def interp(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        ConfigError: the judge named cannot be used.
        DataError: no held-out token.
    """
    sample = read_sample(subject)
    groups = subject.sae.groups()
    counts = np.array([len(sample.column_of(latent)[0]) for latent in range(subject.sae.d_sae)])
    chosen = choose(torch.from_numpy(counts >= LEAST_ACTIVE), groups, MOST_LATENTS)
    looked, reasons = look(subject, sample, chosen)
    verdicts, judge_reasons = judged(subject, sample, chosen)
    metrics: dict[str, Any] = {
        "tokens": int(sample.valid.sum()),
        "documents": len(np.unique(sample.doc[sample.valid])),
        **medians(looked, verdicts),
    }
    assert list(metrics) == list(INTERP_METRICS)
    if not chosen:
        none = f"no latent is active on {LEAST_ACTIVE} of the held-out tokens looked at"
        reasons |= dict.fromkeys(("contexts", *PROXIES, *[f"{name}_random" for name in NULLS]), none)
    reasons |= judge_reasons
    more = {
        "groups": {
            name: medians([one for one in looked if one.group == name], within(verdicts, part))
            for name, part in groups.items()
        },
        "intervals": {"judge_score": score_interval(verdicts)},
        "judge": {"address": subject.config.judge, "model": subject.config.judge_model},
        "latents": [as_json(one, verdicts) for one in looked],
    }
    return Evaluation(metrics, {name: reasons[name] for name in metrics if name in reasons}, more)


# ---- proxies ---------------------------------------------------------------------------------------------------------


def look(subject: Subject, sample: Sample, chosen: list[int]) -> tuple[list[Looked], dict[str, str]]:
    """The proxies of every chosen latent, and why some cannot be had."""
    near, attributes = Neighbours.of(sample), None
    reasons: dict[str, str] = {}
    try:
        attributes = Attributes.of(targets_of(sample, subject.tokenizer()).targets, sample)
    except ConfigError as error:
        reasons |= dict.fromkeys(("attribute_auc", "attribute_auc_random"), str(error))
    generator = np.random.default_rng(0)
    places = [top_places(sample, latent) for latent in chosen]
    others = [random_places(sample, sample.doc[part], generator) for part in places]
    cosines, reason = context_cosines(subject, sample, places, others)
    if reason:
        reasons["context_cosine"] = reason
    group_of = {latent: name for name, part in subject.sae.groups().items() for latent in range(part.start, part.stop)}
    looked = []
    for number, latent in enumerate(chosen):
        figures = figures_at(sample, near, attributes, places[number]) | {"context_cosine": cosines[number]}
        null = figures_at(sample, near, attributes, others[number])
        looked.append(Looked(latent, group_of.get(latent), len(places[number]), figures, null))
    return looked, reasons


def context_cosines(
    subject: Subject, sample: Sample, places: Sequence[np.ndarray], others: Sequence[np.ndarray]
) -> tuple[list[float | None], str | None]:
    """Mean cosine of each latent's contexts less that of random ones; None, and why, where there is none."""
    nothing: list[float | None] = [None] * len(places)
    if all(len(part) < 2 for part in places):
        return nothing, "no latent has two contexts"
    try:
        model = subject.language_model()
    except ConfigError as error:
        return nothing, str(error)
    wanted = np.unique(np.concatenate([*places, *others]))
    embedded = context_embeddings(model, sample, wanted, subject.store.special_tokens)
    found = [[mean_cosine(embedded[np.searchsorted(wanted, part)]) for part in side] for side in (places, others)]
    null = float(np.nanmean(found[1]))
    return [None if np.isnan(value) else value - null for value in found[0]], None


# ---- the judge -------------------------------------------------------------------------------------------------------


def judged(subject: Subject, sample: Sample, chosen: list[int]) -> tuple[dict[int, Verdict], dict[str, str]]:
    """The verdicts by latent, and why there are none.

    Raises:
        ConfigError: the judge named cannot be used.
    """
    address, model = subject.config.judge, subject.config.judge_model
    if address is None or model is None:
        return {}, dict.fromkeys(("judged", "judge_score"), "no judge was named (--judge, --judge-model)")
    with Judge(address, model, key_from_environment(), lambda seconds: pause(subject, seconds)) as judge:
        try:
            exams = exams_of(subject, sample, chosen)
        except ConfigError as error:  # no tokenizer
            return {}, dict.fromkeys(("judged", "judge_score"), str(error))
        verdicts = {}
        progress = Progress(f"judge {subject.folder.name}", len(exams))
        for verdict in examine_all(judge, exams, subject.folder / "eval" / CACHE):
            verdicts[verdict.latent] = verdict
            progress.update(len(verdicts), f"{len(verdicts)} of {len(exams)} latents")
            subject.refuse_when_stopped()
    if not verdicts:
        return {}, dict.fromkeys(("judged", "judge_score"), "no latent has enough passages that do not overlap")
    if all(verdict.score is None for verdict in verdicts.values()):
        return verdicts, {"judge_score": "the judge gave no answer that can be read"}
    return verdicts, {}


def exams_of(subject: Subject, sample: Sample, chosen: list[int]) -> list[Exam]:
    """The exams of `--judge-latents` of the chosen latents, of every group its share.

    Raises:
        ConfigError: no tokenizer.
    """
    spelled = spell(subject.tokenizer(), np.unique(sample.token).tolist())
    exams = {latent: make_exam(sample, latent, spelled.__getitem__) for latent in chosen}
    able = torch.zeros(subject.sae.d_sae, dtype=torch.bool)
    able[[latent for latent, exam in exams.items() if exam is not None]] = True
    taken = choose(able, subject.sae.groups(), subject.config.judge_latents)
    return [exam for latent in taken if (exam := exams[latent]) is not None]


def pause(subject: Subject, seconds: float) -> None:
    """Wait, unless asked to stop.

    Raises:
        Interrupted: asked to stop.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        subject.refuse_when_stopped()
        time.sleep(min(left, 0.2))


def score_interval(verdicts: dict[int, Verdict]) -> list[float] | None:
    """95 % interval of the mean score over resampled latents."""
    rows = [[verdict.score, 1.0] for verdict in verdicts.values() if verdict.score is not None]
    interval = bootstrap_interval(torch.tensor(rows).view(-1, 2), lambda sums: sums[0] / sums[1])
    return list(interval) if interval else None


# ---- tables ----------------------------------------------------------------------------------------------------------


def within(verdicts: dict[int, Verdict], part: slice) -> dict[int, Verdict]:
    return {latent: verdict for latent, verdict in verdicts.items() if part.start <= latent < part.stop}


def medians(looked: Sequence[Looked], verdicts: dict[int, Verdict]) -> dict[str, Any]:
    """The figures over latents, named as in `INTERP_METRICS`."""
    scores = [verdict.score for verdict in verdicts.values() if verdict.score is not None]
    return {
        "latents": len(looked),
        "contexts": median([one.contexts for one in looked]),
        **{name: median([one.figures[name] for one in looked]) for name in PROXIES},
        **{f"{name}_random": median([one.random[name] for one in looked]) for name in NULLS},
        "judged": len(scores) if verdicts else None,
        "judge_score": float(np.mean(scores)) if scores else None,
    }


def median(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else None


def as_json(one: Looked, verdicts: dict[int, Verdict]) -> dict[str, Any]:
    found = {"index": one.index, "group": one.group, "contexts": one.contexts, **one.figures}
    verdict = verdicts.get(one.index)
    if verdict is not None:
        found["judge"] = {"explanation": verdict.explanation, "score": verdict.score, "problem": verdict.problem}
    return found
