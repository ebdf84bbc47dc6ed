"""Logistic probes on few latents: halves, labels, choice of latents, and judgement. The owner of the regressions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from train.evaluate.sample import Sample
from train.evaluate.targets import NOT_APPLICABLE, Target

KS = (1, 5, 20)
TRAINING_TOKENS = 4000  # half of them yes
MIN_TOKENS = 50  # of yes and of no, in each half
MIN_DOCUMENTS = 2  # that they are from


# ---- halves and labels -----------------------------------------------------------------------------------------------


def split_documents(doc: np.ndarray, topic: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which tokens are for training: half of the documents of every topic, drawn at random; bool [n]."""
    generator = np.random.default_rng(seed)
    numbers, first = np.unique(doc, return_index=True)
    chosen: list[int] = []
    seen = 0
    for number in np.unique(topic):
        members = generator.permutation(numbers[topic[first] == number])
        seen += len(members)
        half = seen // 2 - len(chosen)  # of all so far: odd ones do not all go to one side
        chosen += members[:half].tolist()
    return np.isin(doc, chosen)


def control_labels(target: Target, sample: Sample, training: np.ndarray, seed: int = 0) -> np.ndarray:
    """Random labels in the place of a target's, with as many yes as near as can be: int8 [n].

    All tokens of one kind have the same; where the target is one of documents, they change places in each half.
    """
    generator = np.random.default_rng(seed)
    asked = target.labels != NOT_APPLICABLE
    labels = np.full(len(asked), NOT_APPLICABLE, np.int8)
    if target.of_documents:
        for half in (asked & training, asked & ~training):
            _, first, places = np.unique(sample.doc[half], return_index=True, return_inverse=True)
            labels[half] = generator.permutation(target.labels[half][first])[places]
        return labels
    kinds, places, counts = np.unique(sample.token[asked], return_inverse=True, return_counts=True)
    left, drawn = int((target.labels == 1).sum()), np.zeros(len(kinds), np.int8)
    for kind in generator.permutation(len(kinds)):
        if counts[kind] <= left:
            drawn[kind] = 1
            left -= int(counts[kind])
    labels[asked] = drawn[places]
    return labels


# ---- one target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A probe on the tokens that it was not trained on.

    Attributes:
        sums: yes told right, yes, no told right, no, in each test document: float64 [documents, 4].
        auc: area under the receiver's curve.
        latents: what it looked at, the most telling first; none for a probe on x.
    """

    sums: np.ndarray
    auc: float
    latents: list[int]


@dataclass(frozen=True)
class Probed:
    """The probes of one target, or the reason why there are none.

    Attributes:
        share: of yes among the tokens that it is asked of.
        real, control: by k.
        x: on all of x.
    """

    target: Target
    share: float | None
    real: dict[int, Judged]
    control: dict[int, Judged]
    x: Judged | None
    reason: str | None = None


def probe_target(sample: Sample, target: Target, training: np.ndarray) -> Probed:
    """The probes of a target on the tokens that count; `training` [n] says on which they are trained."""
    asked = sample.valid & (target.labels != NOT_APPLICABLE)
    share = float((target.labels[asked] == 1).mean()) if asked.any() else None
    control = control_labels(target, sample, training)
    for labels, what in ((target.labels, "tokens"), (control, "tokens with random labels")):
        reason = too_few(labels, asked, training, sample.doc, what)
        if reason:
            return Probed(target, share, {}, {}, None, reason)
    real = probe_latents(sample, target.labels, asked, training)
    null = probe_latents(sample, control, asked, training)
    return Probed(target, share, real, null, probe_x(sample, target.labels, asked, training))


def too_few(labels: np.ndarray, asked: np.ndarray, training: np.ndarray, doc: np.ndarray, what: str) -> str | None:
    """Why a probe cannot be trained or judged on these, or None."""
    for half, name in ((training, "training"), (~training, "test")):
        for label, word in ((1, "yes"), (0, "no")):
            there = asked & half & (labels == label)
            n, documents = int(there.sum()), len(np.unique(doc[there]))
            if n < MIN_TOKENS or documents < MIN_DOCUMENTS:
                found = f"{n} {what} in {documents} {name} documents are a {word}"
                return f"{found}; {MIN_TOKENS} in {MIN_DOCUMENTS} are needed"
    return None


def balanced_sample(labels: np.ndarray, among: np.ndarray, seed: int = 0) -> np.ndarray:
    """Tokens to train on: as many yes as no, up to `TRAINING_TOKENS` in all, drawn at random; ascending."""
    generator = np.random.default_rng(seed)
    both = [np.flatnonzero(among & (labels == label)) for label in (0, 1)]
    n = min(TRAINING_TOKENS // 2, *(len(tokens) for tokens in both))
    return np.sort(np.concatenate([generator.choice(tokens, n, replace=False) for tokens in both]))


def probe_latents(sample: Sample, labels: np.ndarray, asked: np.ndarray, training: np.ndarray) -> dict[int, Judged]:
    """Probes by k, on the k latents whose means differ most over all training tokens."""
    ranked = most_telling(sample.codes, labels, asked & training, max(KS))
    fit, test = balanced_sample(labels, asked & training), np.flatnonzero(asked & ~training)
    columns = sample.codes[:, ranked]
    # in units of their root mean square: or the units of the activations would decide how strong C = 1 is
    scale = np.sqrt(columns[fit].power(2).mean(0)) if len(fit) else np.ones(len(ranked))
    values = columns.toarray() / np.where(scale > 0, scale, 1)
    found = {}
    for k in KS:
        model = fitted(values[fit, :k], labels[fit])
        found[k] = judge(model, values[test, :k], labels[test], places_of(sample, training, test), ranked[:k])
    return found


def most_telling(codes: sparse.csc_array, labels: np.ndarray, among: np.ndarray, n: int) -> np.ndarray:
    """The `n` latents with the largest |mean over yes − mean over no|, the largest first; of equals the earlier."""
    weights = np.zeros(len(labels))
    for label, sign in ((1, 1.0), (0, -1.0)):
        there = among & (labels == label)
        weights[there] = sign / there.sum()
    return np.argsort(-np.abs(codes.T @ weights), kind="stable")[:n]


def probe_x(sample: Sample, labels: np.ndarray, asked: np.ndarray, training: np.ndarray) -> Judged:
    """The probe on all of x, each dimension standardised: what a reader of everything can tell."""
    fit, test = balanced_sample(labels, asked & training), np.flatnonzero(asked & ~training)
    seen = sample.x[torch.from_numpy(fit)].float().numpy()
    mean, spread = seen.mean(0), seen.std(0)
    spread = np.where(spread > 0, spread, 1)
    model = fitted((seen - mean) / spread, labels[fit])
    unseen = (sample.x[torch.from_numpy(test)].float().numpy() - mean) / spread
    return judge(model, unseen, labels[test], places_of(sample, training, test), np.zeros(0, np.int64))


def places_of(sample: Sample, training: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, int]:
    """The place of each test token's document among all test documents, and how many there are."""
    numbers = np.unique(sample.doc[~training])
    return np.searchsorted(numbers, sample.doc[test]), len(numbers)


def fitted(values: np.ndarray, labels: np.ndarray) -> Any:
    """A logistic regression with L2 at C = 1, as in SAEBench."""
    from sklearn.exceptions import ConvergenceWarning  # a second to import, and every training run imports the suites
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that took 1,000 steps is judged as it is
        return LogisticRegression(C=1.0, max_iter=1000).fit(values, labels)


def judge(
    model: Any,
    values: np.ndarray,
    labels: np.ndarray,
    documents: tuple[np.ndarray, int],
    latents: np.ndarray,
) -> Judged:
    """The figures of a fitted probe on tokens that it has not seen."""
    from sklearn.metrics import roc_auc_score

    score = model.decision_function(values)
    yes, right = labels == 1, (score > 0) == (labels == 1)
    places, n = documents
    columns = [right & yes, yes, right & ~yes, ~yes]
    sums = np.stack([np.bincount(places, column, n) for column in columns], axis=1)
    return Judged(sums, float(roc_auc_score(yes, score)), latents.tolist())
