"""Recovery of a toy's features: decoder rows against the true directions, by |cos| (truth: `common.truth.read_truth`).

from common.truth import read_truth
recovery(granary.load_sae("runs/toy-h/batchtopk"), read_truth("cache/toy-h.zarr"))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.truth import Truth
from train.saes.base import SAE

MATCHED_ABOVE = 0.8  # |cos| (spec §4)


@dataclass(frozen=True)
class Matching:
    """The one-to-one pairing of features with latents that has the largest sum of |cos| (Hungarian algorithm).

    Attributes:
        latent: of each feature, -1 where there are fewer latents than features.
        cosine: |cos| of each pair; 0 without a latent.
    """

    latent: np.ndarray
    cosine: np.ndarray

    def matched(self, above: float = MATCHED_ABOVE) -> np.ndarray:
        """Which features are found, bool [features]."""
        return self.cosine > above


def cosines(W_dec: Tensor, directions: np.ndarray) -> np.ndarray:
    """|cos| of every feature with every decoder row, float64 [features, latents]; 0 for rows of zeros."""
    rows = W_dec.detach().double().cpu().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    true = directions.astype(np.float64)
    true = true / np.linalg.norm(true, axis=1, keepdims=True)
    return np.asarray(np.abs(true @ rows.T))


def mmcs(cosine: np.ndarray) -> float:
    """Mean over features of the largest |cos| to any latent, one latent allowed for several features."""
    return float(cosine.max(axis=1).mean())


def match(cosine: np.ndarray) -> Matching:
    """The best one-to-one pairing for |cos| [features, latents]."""
    features, latents = linear_sum_assignment(cosine, maximize=True)
    latent, found = np.full(len(cosine), -1), np.zeros(len(cosine))
    latent[features], found[features] = latents, cosine[features, latents]
    return Matching(latent, found)


def recovery(
    sae: SAE, truth: Truth, groups: Mapping[str, slice] | None = None, above: float = MATCHED_ABOVE
) -> dict[str, Any]:
    """How much of a toy an SAE found.

    Args:
        groups: name to latents of the SAE's groups (levels, scales), where it has any.
        above: |cos| above which a pair counts as matched.

    Returns:
        mmcs, matched_cosine (mean |cos| of the pairs), matched (share), and for each true group `matched_<group>`;
        with `groups` also `placed`: true group to latent group to the share of its features matched there.
    """
    cosine = cosines(sae.W_dec, truth.directions)
    matching = match(cosine)
    found = matching.matched(above)
    result: dict[str, Any] = {
        "mmcs": mmcs(cosine),
        "matched_cosine": float(matching.cosine.mean()),
        "matched": float(found.mean()),
    }
    for group in truth.groups:
        result[f"matched_{group}"] = float(found[truth.members(group)].mean())
    if groups is not None:
        numbers = {name: np.arange(sae.d_sae)[members] for name, members in groups.items()}
        result["placed"] = {
            group: {
                name: float((found & np.isin(matching.latent, latents))[truth.members(group)].mean())
                for name, latents in numbers.items()
            }
            for group in truth.groups
        }
    return result


def edge_f1(
    predicted: Iterable[tuple[int, int]],
    true: np.ndarray,
    matching: Matching,
    above: float = MATCHED_ABOVE,
) -> dict[str, float]:
    """Precision, recall and F1 of edges between latents (parent, child), or relations (source, target).

    Latents stand for the features they are matched with. A predicted edge with an end that no feature is matched with
    is not counted; a true edge with a feature that was not found is missed.

    Args:
        true: pairs of features [edges, ≥ 2]; columns beyond the second are not looked at.
    """
    features = {int(matching.latent[feature]): int(feature) for feature in np.flatnonzero(matching.matched(above))}
    said = {(features[parent], features[child]) for parent, child in predicted if {parent, child} <= features.keys()}
    wanted = {(int(edge[0]), int(edge[1])) for edge in true}
    hits = len(said & wanted)
    precision, recall = hits / max(len(said), 1), hits / max(len(wanted), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(len(said) + len(wanted), 1)}


def edges_of(weights: Tensor, first_parent: int = 0, first_child: int = 0, per_parent: int = 3) -> set[tuple[int, int]]:
    """The strongest `per_parent` children of every parent as edges between latents.

    Args:
        weights: [children, parents]; entries of 0 are no edges.
        first_parent, first_child: number of the latent that is the first parent, the first child.
    """
    values, children = torch.topk(weights.detach(), min(per_parent, len(weights)), dim=0)
    return {
        (first_parent + parent, first_child + int(child))
        for parent in range(weights.shape[1])
        for value, child in zip(values[:, parent], children[:, parent], strict=True)
        if value > 0
    }
