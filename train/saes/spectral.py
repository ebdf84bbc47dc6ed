"""A partition of latents by their affinities: spectral embedding, then k-means++ (Ng, Jordan & Weiss, 2001).

Every latent is in one cluster. With levels of 4:2:1 a cluster has two members on average, and many have one: upper
latents that can only be copies. It is here to be compared with parts that overlap.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

DIMENSIONS = 64  # of the embedding at most: one per cluster, as in the paper, is thousands of eigenvectors
LEAST = 1e-6  # affinity of any two latents, so that the graph hangs together


def partition(affinity: Float[Tensor, "W W"], n_clusters: int, seed: int) -> Int[Tensor, " W"]:
    """The cluster of each latent, 0 … n_clusters − 1; a cluster may be empty where latents are alike to the bit.

    Args:
        affinity: ≥ 0; made symmetric by the larger of both directions.
    """
    from sklearn.cluster import KMeans  # a second to import, and every training run imports the variants
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.manifold import spectral_embedding

    graph = torch.maximum(affinity, affinity.T).double().cpu().clamp_min(LEAST).numpy()
    n_dimensions = min(DIMENSIONS, n_clusters, len(graph) - 2)
    if n_dimensions < 1:  # two latents or one: nothing to embed
        return torch.arange(len(graph), device=affinity.device) % n_clusters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different latents than clusters
        places = spectral_embedding(graph, n_components=n_dimensions, random_state=seed, drop_first=False)
        found = KMeans(n_clusters, init="k-means++", n_init=1, random_state=seed).fit_predict(places)
    return torch.from_numpy(found).long().to(affinity.device)
