"""What the latents of a lower level tell of those of an upper one, in whether they are active (evaluation spec §5.1).

For each upper latent j, over the lower ones i: max_i NMI(i; j), NMI = MI / min(H_i, H_j). That is what a single latent
tells; `predictive_information` takes 32 together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_intervals
from train.evaluate.coactivity import together
from train.evaluate.codes import Codes, switched
from train.evaluate.information import entropy, mutual_information


@dataclass(frozen=True)
class LevelInformation:
    """Of U upper latents.

    Attributes:
        nmi: of the lower latent that tells most, float64 [U].
        partner: which it is [U].
        entropy: H_j in bits [U].
    """

    nmi: Tensor
    partner: Tensor
    entropy: Tensor

    @property
    def mean(self) -> float:
        """Every upper latent counts the same."""
        return float(self.nmi.mean())

    @property
    def weighted(self) -> float:
        """By entropy."""
        return float((self.nmi * self.entropy).sum() / self.entropy.sum())


def level_information(lower: sparse.csc_array, upper: sparse.csc_array) -> LevelInformation:
    """The best single lower latent for each upper one, over codes [n, lower] and [n, upper] of the same tokens."""
    n, width = lower.shape[0], upper.shape[1]
    ones, ups = (torch.from_numpy(np.diff(values.indptr).astype(np.float64)) for values in (lower, upper))
    best, partner = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.int64)
    for block, both in together(lower, upper):
        shared = normalised(torch.from_numpy(both), ones[:, None], ups[block], n)
        best[block], partner[block] = shared.max(0)
    return LevelInformation(best, partner, entropy(ups, n))


def normalised(both: Tensor, first: Tensor, second: Tensor, n: float | Tensor) -> Tensor:
    """NMI from counts; 0 where one of the two never varies."""
    least = torch.minimum(entropy(first, n), entropy(second, n))
    shared = mutual_information(both, first, second, n)
    return torch.where(least > 0, shared / least.clamp_min(1e-300), 0.0).clamp(max=1.0)


def information_intervals(
    codes: Codes, lower: np.ndarray, upper: np.ndarray, found: LevelInformation
) -> list[tuple[float, float] | None]:
    """Intervals of `mean` and `weighted` over documents, each upper latent's partner held fixed."""
    ups, partners = (switched(codes.values[:, chosen]) for chosen in (upper, lower[found.partner.numpy()]))
    counts = [codes.by_document(values) for values in (ups * partners, partners, ups)]
    tokens = np.bincount(codes.document, minlength=codes.n_documents)[:, None]
    sums = torch.from_numpy(np.concatenate([*counts, tokens], axis=1))

    def figures(total: Tensor) -> Tensor:
        both, first, second = total[:-1].view(3, -1)
        nmi, bits = normalised(both, first, second, total[-1]), entropy(second, total[-1])
        return torch.stack([nmi.mean(), (nmi * bits).sum() / bits.sum()])

    return bootstrap_intervals(sums, figures)
