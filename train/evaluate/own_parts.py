"""Whether upper latents are made of the lower ones that a variant says they are made of: the own-part score.

The eight lower latents *best correlated* with an upper one say little: any two codings of one token are correlated,
and random hierarchies scored higher than learned ones. So each upper latent is regressed on its *own* parts, and on
those of another upper latent for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

N_PARTS = 8
MIN_ACTIVE = 20  # active tokens in each half below which an upper latent is left out
MAX_TOKENS = 5000  # of the active ones, and of the others, in each half
PASSES = 0.5


@dataclass(frozen=True)
class OwnPartScore:
    """R² on the second half of the tokens of regressions fitted on the first, means over upper latents.

    Attributes:
        n_scored: upper latents active often enough.
        active, active_null: over tokens where the upper latent is active: how much of it.
        balanced, balanced_null: over those and as many others: whether and how much.
        passing: share of upper latents with a balanced R² of at least .5.
        coverage, coverage_null: share of an upper latent's active tokens on which any of the parts is active.
    """

    n_scored: int
    active: float
    active_null: float
    balanced: float
    balanced_null: float
    passing: float
    coverage: float
    coverage_null: float


@torch.no_grad()
def own_part_score(lower: Tensor, upper: Tensor, weights: Tensor, seed: int = 0) -> OwnPartScore:
    """Regress each upper latent on its parts of largest weight, and on another's.

    Args:
        lower: codes [tokens, n_lower], of tokens unseen in training, whole documents in order.
        upper: codes [tokens, n_upper] of the same tokens.
        weights: [n_upper, n_lower], ≥ 0; the (at most) eight largest above 0 are the parts.
        seed: of the other upper latent chosen for each, and of the inactive tokens.

    Tensors may lie on any device.
    """
    lower, upper, weights = lower.cpu(), upper.cpu(), weights.cpu()  # least squares of any rank are there only there
    generator = torch.Generator().manual_seed(seed)
    middle = len(lower) // 2
    counts = torch.stack([(half > 0).sum(0) for half in (upper[:middle], upper[middle:])]).amin(0)
    scored = (counts >= MIN_ACTIVE).nonzero().flatten().tolist()
    if len(scored) < 2:
        nan = float("nan")
        return OwnPartScore(len(scored), nan, nan, nan, nan, nan, nan, nan)
    # a shift along a random order: nobody is their own other
    order = [scored[place] for place in torch.randperm(len(scored), generator=generator).tolist()]
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    rows = []
    for latent in scored:
        active, others = tokens_of(upper[:, latent] > 0, middle, generator)
        figures = []
        for owner in (latent, other[latent]):
            parts = parts_of(weights[owner])
            x, y = lower[:, parts].double(), upper[:, latent].double()
            both = [torch.cat(pair) for pair in zip(active, others, strict=True)]
            figures += [held_out_r2(x, y, active), held_out_r2(x, y, both)]
            figures.append(float((x[active[1]] > 0).any(1).double().mean()))
        rows.append(figures)
    table = torch.tensor(rows, dtype=torch.float64)
    own, other_r2, passing = table[:, :3].mean(0), table[:, 3:].mean(0), (table[:, 1] >= PASSES).double().mean()
    return OwnPartScore(
        n_scored=len(scored),
        active=float(own[0]),
        active_null=float(other_r2[0]),
        balanced=float(own[1]),
        balanced_null=float(other_r2[1]),
        passing=float(passing),
        coverage=float(own[2]),
        coverage_null=float(other_r2[2]),
    )


def parts_of(weights: Tensor) -> Tensor:
    """The lower latents of largest weight, at most eight, above 0."""
    found = torch.topk(weights, min(N_PARTS, len(weights)))
    return found.indices[found.values > 0]


def tokens_of(active: Tensor, middle: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Of each half: numbers of active tokens, and of as many others, drawn at random."""
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, half in ((0, active[:middle]), (middle, active[middle:])):
        firing, silent = half.nonzero().flatten() + start, (~half).nonzero().flatten() + start
        n_tokens = min(len(firing), MAX_TOKENS)
        for found, numbers in zip(chosen, (firing, silent), strict=True):
            found.append(numbers[torch.randperm(len(numbers), generator=generator)[:n_tokens]])
    return chosen


def held_out_r2(x: Tensor, y: Tensor, halves: list[Tensor]) -> float:
    """R² on the second half of least squares with intercept on the first; not below 0, 0 where y does not vary."""
    design = torch.cat([x, torch.ones_like(x[:, :1]) if x.shape[1] else x.new_ones(len(x), 1)], dim=1)
    fit, test = halves
    # parts that never fire make the design singular: the driver for any rank
    slopes = torch.linalg.lstsq(design[fit], y[fit, None], driver="gelsd").solution
    error = (y[test] - (design[test] @ slopes)[:, 0]).square().sum()
    spread = (y[test] - y[test].mean()).square().sum()
    return max(0.0, 1 - float(error / spread)) if float(spread) > 0 else 0.0
