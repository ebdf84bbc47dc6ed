"""Whether upper latents are made of lower ones, in direction and in code (evaluation spec §5.4).

    geometric     nonnegative matching pursuit of the unit row d_j on rows of the lower level, 8 atoms at most:
                  R²_g = 1 − ‖d_j − Σ a_i d_i‖² ≥ max(½, the 95th percentile of 500 random directions that have the
                  second moments of the upper rows)
    functional    f_j by nonnegative least squares on the 8 lower latents of largest |φ|, found and fitted on the first
                  half of the documents, over its active tokens and as many others: R² ≥ ½ on the second half
    score         share of upper latents that pass both
    null          the same tests with 8 lower latents drawn at random, of the densities of those 8

Rows that a model *composes* of lower rows pass the geometric test by construction, and any two codings of one token are
correlated: the functional part with a latent's own parts (`own_parts`) says more about a learned hierarchy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_interval
from train.evaluate.coactivity import strongest
from train.evaluate.codes import Codes
from train.evaluate.regression import nonnegative_least_squares, r2_of, regress, rows_for
from train.evaluate.structure import density_bins

ATOMS = 8
PASSES = 0.5
NULL_DIRECTIONS, NULL_QUANTILE = 500, 0.95


@dataclass(frozen=True)
class Composition:
    """Of U upper latents.

    Attributes:
        geometric: R²_g [U].
        chance: the 95th percentile of R²_g of random directions.
        terms: of the functional test, [documents of the second half, U, 4]; see `regression`.
        null: which pass both tests with random lower latents, bool [U].
        weights: of the functional regression [U, lower], most of them 0.
    """

    geometric: Tensor
    chance: float
    terms: Tensor
    null: Tensor
    weights: Tensor

    @property
    def functional(self) -> Tensor:
        """R² on the second half [U]."""
        return r2_of(self.terms.sum(0))

    @property
    def threshold(self) -> float:
        """What R²_g must reach."""
        return max(PASSES, self.chance)

    @property
    def made(self) -> Tensor:
        """Which pass the geometric test."""
        return self.geometric >= self.threshold

    def score_at(self, level: float) -> float:
        """The score with another R² than ½ asked for in both tests."""
        made, coded = self.geometric >= max(level, self.chance), self.functional >= level
        return float((made & coded).double().mean())

    def passing(self, sums: Tensor) -> Tensor:
        """Which pass the functional test, from sums over documents [U, 4]."""
        return r2_of(sums) >= PASSES

    def score(self, sums: Tensor) -> Tensor:
        """Share that passes both."""
        return (self.made & self.passing(sums)).double().mean()

    def interval(self) -> tuple[float, float] | None:
        """Of the score."""
        return bootstrap_interval(self.terms, self.score)


def composition_score(codes: Codes, rows: Tensor, lower: np.ndarray, upper: np.ndarray, seed: int = 0) -> Composition:
    """Both tests for the latents `upper` (numbers, active on 20 tokens of each half) on the latents `lower`.

    Args:
        rows: unit decoder rows [latents, d].
    """
    generator = np.random.default_rng(seed)
    lower_rows, upper_rows = rows[lower].double(), rows[upper].double()
    geometric = pursuit(upper_rows, lower_rows)
    directions = torch.from_numpy(generator.standard_normal((NULL_DIRECTIONS, len(upper)))) @ upper_rows
    random = pursuit(directions / directions.norm(dim=-1, keepdim=True), lower_rows)
    chance = float(torch.quantile(random, NULL_QUANTILE))
    fit = slice(0, codes.middle)
    below, above = (sparse.csc_array(codes.values[:, chosen].tocsr()[fit]) for chosen in (lower, upper))
    best = strongest(below, above, np.ones(len(lower), dtype=bool), ATOMS)
    drawn = of_like_density(best, codes.density[lower], generator)
    rows_of = [rows_for(codes, latent, generator)[1] for latent in upper.tolist()]
    found, terms = regress(codes, upper, lower[best], rows_of, nonnegative=True)
    weights = torch.zeros(len(upper), len(lower)).scatter_(1, torch.from_numpy(best), found.float())
    null_r2 = r2_of(regress(codes, upper, lower[drawn], rows_of, nonnegative=True)[1].sum(0))
    null = (null_r2 >= PASSES) & (explained(upper_rows, lower_rows[torch.from_numpy(drawn)]) >= max(PASSES, chance))
    return Composition(geometric, chance, terms, null, weights)


def pursuit(directions: Tensor, atoms: Tensor) -> Tensor:
    """R² of unit directions [N, d] as sums, with weights ≥ 0, of at most 8 of the unit atoms [A, d].

    Nonnegative orthogonal matching pursuit: the atom nearest to what is left over joins, then all weights are fitted.
    """
    chosen = torch.zeros(len(directions), 0, dtype=torch.int64)
    left = directions
    for _ in range(min(ATOMS, len(atoms))):
        nearness = (left @ atoms.T).scatter(1, chosen, -torch.inf)
        best = nearness.max(1)
        # one that only points away joins as well, and gets no weight
        chosen = torch.cat([chosen, best.indices[:, None]], dim=1)
        left = directions - fitted(directions, atoms[chosen])
    return 1 - left.square().sum(-1)


def explained(directions: Tensor, atoms: Tensor) -> Tensor:
    """R² of unit directions [N, d] as nonnegative sums of their own atoms [N, k, d]."""
    return 1 - (directions - fitted(directions, atoms)).square().sum(-1)


def fitted(directions: Tensor, atoms: Tensor) -> Tensor:
    """Nonnegative least squares of each direction [N, d] on its atoms [N, k, d]."""
    weights = nonnegative_least_squares(atoms @ atoms.mT, (atoms @ directions[..., None])[..., 0])
    sums: Tensor = (weights[:, None] @ atoms)[:, 0]
    return sums


def of_like_density(chosen: np.ndarray, density: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each of `chosen` [N, k] another latent of its bin of density, different ones in a row where possible."""
    drawn = chosen.copy()
    for members in density_bins(torch.from_numpy(density)):
        inside = np.isin(chosen, members.numpy())
        for row in np.flatnonzero(inside.any(1)):
            count = int(inside[row].sum())
            pool = np.setdiff1d(members.numpy(), chosen[row]) if len(members) >= 2 * count else members.numpy()
            drawn[row, inside[row]] = generator.choice(pool, count, replace=len(pool) < count)
    return drawn
