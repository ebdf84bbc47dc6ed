"""Whether upper latents are made of the lower ones that a variant says they are made of: the own-part score.

The eight lower latents *best correlated* with an upper one say little: any two codings of one token are correlated,
and random hierarchies scored higher than learned ones. So each upper latent is regressed on its *own* parts, and on
those of another upper latent of like density for comparison. Parts are those of `reuse`, the eight largest at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_intervals
from train.evaluate.codes import Codes
from train.evaluate.regression import often_active, r2_of, regress, rows_for
from train.evaluate.reuse import is_part
from train.evaluate.structure import others_of_like_density

N_PARTS = 8
PASSES = 0.5


@dataclass(frozen=True)
class OwnPartScore:
    """R² on the second half of the tokens of regressions fitted on the first, means over upper latents.

    Attributes:
        n_scored: upper latents active often enough; with fewer than two of them all figures are NaN.
        active, active_null: over tokens where the upper latent is active: how much of it.
        balanced, balanced_null: over those and as many others: whether and how much.
        passing, passing_null: share of upper latents with a balanced R² of at least .5.
        terms: of the balanced regressions on their own parts [documents, scored, 4]; see `regression`.
    """

    n_scored: int
    active: float
    active_null: float
    balanced: float
    balanced_null: float
    passing: float
    passing_null: float
    terms: Tensor = field(compare=False)

    def passing_at(self, level: float) -> float:
        """`passing` with another R² than .5 asked for."""
        return float((r2_of(self.terms.sum(0)) >= level).double().mean())

    def intervals(self) -> list[tuple[float, float] | None]:
        """Of `passing` and `balanced`, over documents."""
        return bootstrap_intervals(self.terms, lambda sums: figures(r2_of(sums)))


def own_part_score(lower: Tensor, upper: Tensor, weights: Tensor, seed: int = 0) -> OwnPartScore:
    """Regress each upper latent on its parts of largest weight, and on another's.

    Args:
        lower: codes [tokens, n_lower], of tokens unseen in training, whole documents in order.
        upper: codes [tokens, n_upper] of the same tokens.
        weights: [n_upper, n_lower], ≥ 0; parts are the (at most) eight largest above a tenth of the largest.
        seed: of the other upper latent chosen for each, and of the inactive tokens.

    Tensors may lie on any device.
    """
    both = torch.cat([upper, lower], dim=1).detach().cpu().numpy()
    middle = len(both) // 2
    halves = np.repeat([0, 1], [middle, len(both) - middle])
    n_upper = upper.shape[1]
    codes = Codes(sparse.csc_array(both), halves, middle)
    return own_parts(codes, np.arange(n_upper, both.shape[1]), np.arange(n_upper), weights.detach().cpu(), seed)


def own_parts(codes: Codes, lower: np.ndarray, upper: np.ndarray, weights: Tensor, seed: int = 0) -> OwnPartScore:
    """The same for the latents `upper` and `lower` (numbers) of one set of codes; weights [upper, lower]."""
    places = np.flatnonzero(np.isin(upper, often_active(codes, upper)))
    if len(places) < 2:
        nan = float("nan")
        return OwnPartScore(len(places), nan, nan, nan, nan, nan, nan, torch.zeros(0, 0, 4))
    scored, parts = upper[places], parts_of(weights[torch.from_numpy(places)], lower)
    others = others_of_like_density(torch.from_numpy(codes.density[scored]), seed).numpy()
    generator = np.random.default_rng(seed)
    pairs = [rows_for(codes, latent, generator) for latent in scored.tolist()]

    def terms(balanced: bool, chosen: np.ndarray) -> Tensor:
        return regress(codes, scored, chosen, [rows[balanced] for rows in pairs])[1]

    own, null = terms(True, parts), terms(True, parts[others])
    passing, mean = figures(r2_of(own.sum(0))).tolist()
    passing_null, mean_null = figures(r2_of(null.sum(0))).tolist()
    return OwnPartScore(
        n_scored=len(places),
        active=float(r2_of(terms(False, parts).sum(0)).mean()),
        active_null=float(r2_of(terms(False, parts[others]).sum(0)).mean()),
        balanced=mean,
        balanced_null=mean_null,
        passing=passing,
        passing_null=passing_null,
        terms=own,
    )


def figures(r2: Tensor) -> Tensor:
    """Share of R² that pass, and their mean."""
    return torch.stack([(r2 >= PASSES).double().mean(), r2.mean()])


def parts_of(weights: Tensor, lower: np.ndarray) -> np.ndarray:
    """Numbers of each upper latent's parts, at most the 8 of largest weight: [upper, 8 at most], -1 for none."""
    found = torch.topk(weights * is_part(weights), min(N_PARTS, weights.shape[1]))
    numbers: np.ndarray = np.where(found.values.numpy() > 0, lower[found.indices.numpy()], -1)
    return numbers
