"""How well batches mix documents: the entropy of their sources against an ideal shuffle's."""

from __future__ import annotations

import numpy as np

from train.data.reader import Batches
from train.data.shuffle import key_of, permutation

SAMPLE_BATCHES = 4
SAMPLE_CHUNKS = 64


def mixing(batches: Batches, n_windows: int, window: int) -> float:
    """Mean entropy of the documents in a batch over that of as many tokens drawn from the whole store; 1 is ideal.

    Looks at the first four batches; the ideal draws from up to 64 chunks spread over the store.
    """
    found, ideal = [], []
    pool = batches.training_documents(SAMPLE_CHUNKS)
    for step in range(SAMPLE_BATCHES):
        batch = batches.batch(step, n_windows, window)
        found.append(entropy(batch.doc[batch.valid].cpu().numpy()))
        drawn = permutation(key_of("mixing", step), len(pool))[: batch.n_valid]
        ideal.append(entropy(pool[drawn]))
    best = float(np.mean(ideal))
    return float(np.mean(found)) / best if best > 0 else 1.0


def entropy(documents: np.ndarray) -> float:
    """Entropy in bits of how often each document occurs."""
    counts = np.unique(documents, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
