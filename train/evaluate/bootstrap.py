"""95 % intervals by resampling documents, since tokens of one document are alike (evaluation spec §5).

Figures are functions of sums over tokens; with these kept by document nothing is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RESAMPLES = 1000
AT_ONCE = 64  # resamples whose sums are held together
MIN_DEFINED = 0.95  # share of the resamples in which a figure must be a number


def bootstrap_interval(
    per_document_sums: Tensor, statistic: Callable[[Tensor], float | Tensor], n: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of a figure over resampled documents.

    Args:
        per_document_sums: [documents, …], the document's share of every sum that the figure is made of.
        statistic: from the sums over all documents […] (float64, CPU) to the figure.
        n: resamples, each of as many documents as there are, drawn with replacement.

    Returns:
        low and high; None with fewer than two documents, or where the figure is no number in more than a twentieth of
        the resamples.
    """
    return bootstrap_intervals(per_document_sums, lambda sums: torch.as_tensor(statistic(sums)).view(1), n, seed)[0]


def bootstrap_intervals(
    per_document_sums: Tensor, statistics: Callable[[Tensor], Tensor], n: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float] | None]:
    """`bootstrap_interval` of several figures of the same sums: `statistics` gives them as [figures]."""
    if len(per_document_sums) < 2:
        return [None] * len(statistics(per_document_sums.cpu().double().sum(0)))
    drawn = [statistics(sums).double() for sums in resampled_sums(per_document_sums, n, seed)]
    return [percentiles(figures) for figures in torch.stack(drawn, dim=1)]


def percentiles(figures: Tensor) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of those that are numbers; None where more than a twentieth are not."""
    defined = figures[figures.isfinite()]
    if len(defined) < MIN_DEFINED * len(figures):
        return None
    low, high = torch.quantile(defined, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled_sums(per_document_sums: Tensor, n: int = RESAMPLES, seed: int = 0) -> Iterator[Tensor]:
    """The sums […] over each of `n` draws of documents, float64 on the CPU."""
    n_documents, shape = len(per_document_sums), per_document_sums.shape[1:]
    rows = per_document_sums.reshape(n_documents, -1).cpu().double()
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, AT_ONCE):
        drawn = torch.randint(n_documents, (min(AT_ONCE, n - start), n_documents), generator=generator)
        times = rows.new_zeros(drawn.shape).scatter_add_(1, drawn, rows.new_ones(drawn.shape))
        yield from (times @ rows).reshape(-1, *shape)
