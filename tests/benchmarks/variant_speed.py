"""A training step of every variant against one of `batchtopk`, same width, same tokens, same process.

Every step is computed the plain way, with all codes, so that the figures say what a variant adds to a flat one.
"""

from __future__ import annotations

import statistics

import torch

from tests.benchmarks.measure import Row
from train.bench import in_turn, learner_for, median_ratio, sentences, step_of
from train.saes import REGISTRY

D_MODEL, D_SAE, K, BATCH = 512, 4096, 32, 2048
WANTED = {
    "topk": 1.0, "standard": 0.7, "jumprelu": 0.7, "gated": 0.7, "matryoshka": 0.8, "contrastive": 0.65,
    "relational": 0.6, "multiscale": 0.55, "tree": 0.55, "compositional": 0.45,
}  # fmt: skip
BASELINE = "batchtopk"


def run(rounds: int = 5) -> list[Row]:
    batch, device = sentences(BATCH, D_MODEL), torch.device("cpu")
    rows = []
    for variant, cls in REGISTRY.items():
        if variant == BASELINE or not cls.trained:
            continue  # pair by pair: sixteen learners at once would not share the caches as two do
        pair = (BASELINE, variant)
        learners = {name: learner_for(name, D_MODEL, D_SAE, K, device, torch.float32, "plain") for name in pair}
        times = in_turn({name: step_of(learner, batch) for name, learner in learners.items()}, rounds, device, None)
        ours, flat = (f"{BATCH / statistics.median(times[name]):,.0f} tok/s" for name in (variant, BASELINE))
        ratio = median_ratio(times[BASELINE], times[variant])
        name = f"{variant} / {BASELINE} step (d={D_MODEL}, d_sae={D_SAE}, k={K})"
        rows.append(Row(name, ours, flat, ratio, WANTED.get(variant, 0.0)))
    return rows
