"""Codes of one latent regressed on those of others: fitted on the first half of the documents, judged on the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.evaluate.codes import Codes, dense_columns

MIN_ACTIVE = 20  # active tokens in each half below which a latent is left out
MAX_TOKENS = 5000  # of the active ones, and of the others, in each half
SWEEPS, SETTLED = 100, 1e-6

ERROR2, Y2, Y, CASES = range(4)


@dataclass(frozen=True)
class Rows:
    """Ascending tokens to fit on, of the first half, and to test on, of the second."""

    fit: np.ndarray
    test: np.ndarray


def often_active(codes: Codes, latents: np.ndarray) -> np.ndarray:
    """Those active on at least 20 tokens of each half."""
    values = codes.values
    halves = [
        int((values.indices[values.indptr[i] : values.indptr[i + 1]] < codes.middle).sum()) for i in latents.tolist()
    ]
    first = np.array(halves, dtype=np.int64)
    second = np.diff(values.indptr)[latents] - first
    chosen: np.ndarray = latents[(first >= MIN_ACTIVE) & (second >= MIN_ACTIVE)]
    return chosen


def rows_for(codes: Codes, latent: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
    """Tokens on which a latent is active, 5,000 of each half at most; and these with as many others."""
    values = codes.values
    active = values.indices[values.indptr[latent] : values.indptr[latent + 1]]
    halves = []
    for start, stop in ((0, codes.middle), (codes.middle, codes.n)):
        on = active[(active >= start) & (active < stop)]
        firing = np.sort(generator.choice(on, min(len(on), MAX_TOKENS), replace=False, shuffle=False))
        count = min(len(firing), stop - start - len(on))
        others = generator.choice(stop - start - len(on), count, replace=False, shuffle=False)
        # the r-th token that is not active: r and as many as the active ones before it
        silent = start + others + np.searchsorted(on - start - np.arange(len(on)), others, side="right")
        halves.append((firing, np.sort(np.concatenate([firing, silent]))))
    (fit_on, fit_all), (test_on, test_all) = halves
    return Rows(fit_on, test_on), Rows(fit_all, test_all)


def regress(
    codes: Codes, latents: np.ndarray, parts: np.ndarray, rows: Sequence[Rows], nonnegative: bool = False
) -> tuple[Tensor, Tensor]:
    """Least squares of each of U latents on its own parts.

    Args:
        parts: numbers of the latents that each is regressed on [U, k], -1 for none.
        rows: tokens of each.
        nonnegative: weights at least 0 and no intercept; otherwise any weights and an intercept.

    Returns:
        weights [U, k]; terms on the tokens to test on: squared error, y², y and cases, each as
        [documents of the second half, U], last axis the term.
    """
    systems = [moments(codes, latents[i], parts[i], rows[i].fit, centred=not nonnegative) for i in range(len(latents))]
    means, gram, cross = (torch.from_numpy(np.stack(part)) for part in zip(*systems, strict=True))
    if nonnegative:
        weights = nonnegative_least_squares(gram, cross)
    else:
        # parts that never fire make a matrix singular: the pseudo-inverse leaves them out
        weights = (torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ cross[..., None])[..., 0]
    intercepts = means[:, -1] - (means[:, :-1] * weights).sum(1)
    terms = [
        tested(codes, latents[i], parts[i], rows[i].test, weights[i].numpy(), float(intercepts[i]))
        for i in range(len(latents))
    ]
    return weights, torch.from_numpy(np.stack(terms, axis=1))


def moments(
    codes: Codes, latent: int, parts: np.ndarray, rows: np.ndarray, centred: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of parts and latent [k + 1], and the second moments of the parts [k, k] and with the latent [k].

    With `centred` about the means; otherwise means count as 0.
    """
    values = dense_columns(codes.values, rows, np.append(parts, latent))
    means = values.mean(0) if centred else np.zeros(values.shape[1])
    values -= means
    products = values.T @ values
    return means, products[:-1, :-1], products[:-1, -1]


def tested(
    codes: Codes, latent: int, parts: np.ndarray, rows: np.ndarray, weights: np.ndarray, intercept: float
) -> np.ndarray:
    """Squared error, y², y and cases by document of the second half [documents, 4]."""
    values = dense_columns(codes.values, rows, np.append(parts, latent))
    y = values[:, -1]
    error2 = np.square(y - values[:, :-1] @ weights - intercept)
    documents, count = codes.document[rows] - codes.first_documents, codes.n_documents - codes.first_documents
    sums = [np.bincount(documents, each, minlength=count) for each in (error2, y * y, y, np.ones_like(y))]
    return np.stack(sums, axis=1)


def r2_of(sums: Tensor) -> Tensor:
    """R² from sums over documents [latents, 4] as `regress` gives them; not below 0, 0 where y does not vary."""
    spread = sums[:, Y2] - sums[:, Y].square() / sums[:, CASES].clamp_min(1)
    varies = spread > 1e-12 * sums[:, Y2]
    return torch.where(varies, 1 - sums[:, ERROR2] / spread.clamp_min(1e-300), 0.0).clamp_min(0)


def nonnegative_least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """The a ≥ 0 for which aᵀ G a − 2 aᵀ c is least, for many small problems at once: G [N, k, k], c [N, k].

    By descent along one coordinate after the other, which needs no G of full rank; a column of zeros gets 0.
    """
    weights = torch.zeros_like(cross)
    for _ in range(SWEEPS):
        before = weights.clone()
        for column in range(cross.shape[1]):
            own = gram[:, column, column]
            left = cross[:, column] - (gram[:, column] * weights).sum(-1)
            moved = weights[:, column] + torch.where(own > 0, left / own.clamp_min(1e-300), 0.0)
            weights[:, column] = moved.clamp_min(0)
        if float((weights - before).abs().max()) <= SETTLED * float(weights.abs().max()):
            break
    return weights
