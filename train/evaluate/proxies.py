"""What stands in for a judge: how alike the places are where a latent is most active (evaluation spec §5.6).

These are proxies: a latent of one word scores best, whatever it means. The same figures of as many random tokens of the
same documents are given beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.models import RESID_POST, LanguageModel
from train.evaluate.sample import Sample
from train.evaluate.targets import Target

MOST_CONTEXTS = 100
AROUND = 10  # tokens on either side, of a context's embedding
ROWS_AT_ONCE = 16
NONE = -1  # no token before or after

PROXIES = ("token_entropy", "previous_entropy", "next_entropy", "purity", "attribute_auc", "context_cosine")


@dataclass(frozen=True)
class Neighbours:
    """The token before and after each token of a sample inside its document, int64 [n]; −1 where there is none."""

    previous: np.ndarray
    following: np.ndarray

    @classmethod
    def of(cls, sample: Sample) -> Neighbours:
        same = sample.doc[1:] == sample.doc[:-1]
        before, after = np.full((2, len(sample.token)), NONE, np.int64)
        before[1:][same], after[:-1][same] = sample.token[:-1][same], sample.token[1:][same]
        return cls(before, after)


@dataclass(frozen=True)
class Attributes:
    """Facts of tokens: `labels` where each holds, bool [attributes, n], `share` its mean over the tokens that count."""

    names: list[str]
    labels: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, targets: list[Target], sample: Sample) -> Attributes:
        labels = np.stack([target.labels == 1 for target in targets])
        return cls([target.name for target in targets], labels, labels[:, sample.valid].mean(1))


def top_places(sample: Sample, latent: int) -> np.ndarray:
    """Where a latent is most active: at most one token of each document, at most 100, the strongest first."""
    places, values = sample.column_of(latent)
    order = places[np.argsort(-values, kind="stable")]
    _, first = np.unique(sample.doc[order], return_index=True)
    return order[np.sort(first)][:MOST_CONTEXTS]


def random_places(sample: Sample, documents: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One token that counts of each of these documents, drawn at random."""
    numbers, first, counts = np.unique(sample.doc[sample.valid], return_index=True, return_counts=True)
    # tokens of a document lie side by side, also when only those that count are left
    which = np.searchsorted(numbers, documents)
    offsets = (generator.random(len(documents)) * counts[which]).astype(np.int64)
    places: np.ndarray = np.flatnonzero(sample.valid)[first[which] + offsets]
    return places


def entropy_bits(ids: np.ndarray) -> float:
    """Plug-in entropy of the ids; no more than log₂ of how many there are."""
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(share * np.log2(share)).sum()) + 0.0  # no −0


def purity(ids: np.ndarray) -> float:
    """Share of the commonest id."""
    return float(np.unique(ids, return_counts=True)[1].max() / len(ids))


def best_attribute(attributes: Attributes, places: np.ndarray) -> tuple[str, float]:
    """The attribute that sets these places apart from all tokens best, with its AUC.

    A yes-or-no attribute as a score has the AUC ½ + (its share here − its share everywhere) / 2.
    """
    auc = 0.5 + (attributes.labels[:, places].mean(1) - attributes.share) / 2
    best = int(np.argmax(auc))
    return attributes.names[best], float(auc[best])


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of pairs of unit rows [m, d]; NaN for fewer than two."""
    m = len(embeddings)
    return float((embeddings.sum(0).square().sum() - m) / (m * (m - 1))) if m > 1 else float("nan")


def figures_at(sample: Sample, near: Neighbours, attributes: Attributes | None, places: np.ndarray) -> dict[str, Any]:
    """The proxies of one set of places, but for the embeddings."""
    found: dict[str, Any] = {
        "token_entropy": entropy_bits(sample.token[places]),
        "previous_entropy": entropy_bits(near.previous[places]),
        "next_entropy": entropy_bits(near.following[places]),
        "purity": purity(sample.token[places]),
        "attribute_auc": None,
    }
    if attributes is not None:
        found["attribute"], found["attribute_auc"] = best_attribute(attributes, places)
    return found


@torch.no_grad()
def context_embeddings(model: LanguageModel, sample: Sample, places: np.ndarray, special: list[int]) -> Tensor:
    """Unit rows float32 [len(places), d]: the mean of the middle layer over ten tokens on either side.

    Those of other documents and special tokens, whose norm may be enormous, are left out.
    """
    hook = RESID_POST.format(layer=model.n_layers // 2)
    order = np.argsort(sample.row[places], kind="stable")
    rows = np.unique(sample.row[places])
    out: Tensor | None = None
    for start in range(0, len(rows), ROWS_AT_ONCE):
        members = rows[start : start + ROWS_AT_ONCE]
        tokens = torch.from_numpy(sample.rows[members]).to(model.device)
        acts = model.capture(tokens, [hook])[hook].float()
        weights = around(tokens, torch.from_numpy(sample.doc_rows[members]).to(model.device), special)
        embedded = torch.nn.functional.normalize(weights @ acts, dim=-1).cpu()
        mine = order[np.isin(sample.row[places[order]], members)]
        out = torch.empty(len(places), acts.shape[-1]) if out is None else out
        at = np.searchsorted(members, sample.row[places[mine]])
        out[mine] = embedded[at, sample.column[places[mine]]]
    return out if out is not None else torch.empty(0, model.d_model)


def around(tokens: Tensor, documents: Tensor, special: list[int]) -> Tensor:
    """Weights [rows, C, C] of the mean over a token's neighbours in its document."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    near = (place[:, None] - place).abs() <= AROUND
    same = documents[:, :, None] == documents[:, None, :]
    plain = ~torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype, device=tokens.device))
    weights = (near & same & plain[:, None, :]).float()
    return weights / weights.sum(-1, keepdim=True).clamp_min(1)
