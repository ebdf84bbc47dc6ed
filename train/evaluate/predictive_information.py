"""How much of an upper latent's activity the lower level foretells: U_j = 1 − CE(b_j | lower) / H(b_j), at least 0.

b_j is whether j is active. The 32 lower latents of largest |φ| on the first half of the documents, scaled by their
root mean square where active, go into a logistic regression (L2, C = 1) fitted there, on the tokens where j is active
and 5,000 others that stand for the rest; CE and H are of the second half.
Σ_j U_j H_j is a lower bound, in bits per token, of what the levels share if upper latents are independent (spec §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_intervals
from train.evaluate.coactivity import strongest
from train.evaluate.codes import Codes, active_on, dense_columns
from train.evaluate.information import entropy
from train.evaluate.logistic import cross_entropy, fit_logistic

N_LOWER = 32
MOST_UPPER = 256  # upper latents regressed, drawn at random; the sum is scaled to all of them
MOST_CASES = 50_000  # tokens of each half
MOST_SILENT = 5000  # tokens to fit on where the upper latent is silent

CE, ACTIVE, TOKENS = range(3)


@dataclass(frozen=True)
class Foretold:
    """Sums over the second half of the tokens.

    Attributes:
        terms: cross-entropy in bits, active tokens and tokens, float64 [documents, regressed latents, 3].
        scale: all upper latents over the regressed ones.
    """

    terms: Tensor
    scale: float

    def figures(self, sums: Tensor) -> Tensor:
        """Bits per token and the share of the entropy, from sums over documents [latents, 3]."""
        bits = entropy(sums[:, ACTIVE], sums[:, TOKENS])
        told = (bits - sums[:, CE] / sums[:, TOKENS]).clamp_min(0)  # U H, as U = 1 − CE / H
        return torch.stack([told.sum() * self.scale, told.sum() / bits.sum()])

    @property
    def bits(self) -> float:
        """Σ_j U_j H_j."""
        return float(self.figures(self.terms.sum(0))[0])

    @property
    def share(self) -> float:
        """Σ_j U_j H_j / Σ_j H_j."""
        return float(self.figures(self.terms.sum(0))[1])

    def intervals(self) -> list[tuple[float, float] | None]:
        """Of `bits` and `share`."""
        return bootstrap_intervals(self.terms, self.figures)


def predictive_information(
    codes: Codes, lower: np.ndarray, upper: np.ndarray, seed: int = 0, order: np.ndarray | None = None
) -> Foretold:
    """What the latents `lower` (numbers) foretell of the latents `upper`; with `order` [n], of the tokens it names."""
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(upper)[:MOST_UPPER])
    below, above = codes.values[:, lower], codes.values[:, chosen]
    if order is not None:
        below = sparse.csc_array(below.tocsr()[order])
    first = slice(0, min(codes.middle, MOST_CASES))
    second = slice(codes.middle, min(codes.n, codes.middle + MOST_CASES))
    fit_below, fit_above, test_below, test_above = (
        sparse.csc_array(values.tocsr()[half]) for half in (first, second) for values in (below, above)
    )
    best = strongest(fit_below, fit_above, np.diff(fit_below.indptr) > 0, N_LOWER)
    documents = codes.document[second] - codes.document[second.start]
    rows = []
    for number, parts in enumerate(best):
        scale = root_mean_square(fit_below, parts)
        active = active_on(fit_above, number)
        fit = cases_of(fit_below, parts, active, drawn(active, generator))
        found = fit_logistic(fit.x / scale, fit.y, fit.weight)
        active = active_on(test_above, number)
        test = cases_of(test_below, parts, active, np.ones(len(active)))
        loss = cross_entropy(test.x / scale @ found[:-1] + found[-1], test.y) / np.log(2)
        rows.append(terms_of(loss, test, active, documents))
    return Foretold(torch.from_numpy(np.stack(rows, axis=1)), len(upper) / len(chosen))


def root_mean_square(values: sparse.csc_array, latents: np.ndarray) -> np.ndarray:
    """Of each latent over the tokens where it is active."""
    columns = [values.data[values.indptr[i] : values.indptr[i + 1]] for i in latents]
    return np.array([np.sqrt(np.mean(np.square(column, dtype=np.float64))) for column in columns])


@dataclass(frozen=True)
class Cases:
    """What a regression needs: a row for each token on which any part is active, and one each for all others by y.

    Attributes:
        x: parts [rows, parts], 0 in the last two rows.
        y: whether the upper latent is active; 0 and 1 in the last two rows.
        weight: how many tokens a row stands for.
        tokens: the tokens of the rows, those of the last two left out.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    tokens: np.ndarray


def cases_of(lower: sparse.csc_array, parts: np.ndarray, active: np.ndarray, weight: np.ndarray) -> Cases:
    """The cases of tokens with a weight above 0.

    Args:
        lower: codes [n, lower].
        active: whether the upper latent is, bool [n].
        weight: of each token [n].
    """
    any_part = np.zeros(lower.shape[0], dtype=bool)
    for part in parts:
        any_part[lower.indices[lower.indptr[part] : lower.indptr[part + 1]]] = True
    tokens = np.flatnonzero(any_part & (weight > 0))
    x = np.concatenate([dense_columns(lower, tokens, parts), np.zeros((2, len(parts)))])
    rest = [weight[~any_part & ~active].sum(), weight[~any_part & active].sum()]
    return Cases(x, np.append(active[tokens], [0.0, 1.0]), np.append(weight[tokens], rest), tokens)


def drawn(active: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Weights of tokens to fit on: 1 where active, and 5,000 of the others at random that stand for all of them."""
    silent = np.flatnonzero(~active)
    weight = active.astype(np.float64)
    chosen = generator.choice(silent, min(MOST_SILENT, len(silent)), replace=False, shuffle=False)
    weight[chosen] = len(silent) / max(len(chosen), 1)
    return weight


def terms_of(loss: np.ndarray, cases: Cases, active: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cross-entropy, active tokens and tokens of each document [documents, 3], from the loss of each case."""
    every = np.where(active, loss[-1], loss[-2])
    every[cases.tokens] = loss[:-2]
    sums = [np.bincount(documents, values) for values in (every, active, np.ones(len(active)))]
    return np.stack(sums, axis=1)
