"""A training step of every variant against one of `batchtopk`, same width, same tokens, same process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.benchmarks.measure import Row, interleaved, median_ratio
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import REGISTRY, make_sae

D_MODEL, D_SAE, K, BATCH, WINDOW = 512, 4096, 32, 2048, 128
N_STEPS, STEP = 10_000, 9_000  # where everything that ramps up is at work, and no landmark is near
WANTED = {
    "topk": 1.0, "standard": 0.7, "jumprelu": 0.7, "gated": 0.7, "matryoshka": 0.8, "contrastive": 0.65,
    "relational": 0.6, "multiscale": 0.55, "tree": 0.55, "compositional": 0.45,
}  # fmt: skip
BASELINE = "batchtopk"


def sentences() -> Batch:
    """A batch of windows, each one document, whose neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    n = BATCH // WINDOW
    slow = torch.randn(n, WINDOW // 16, D_MODEL, generator=generator).repeat_interleave(16, dim=1)
    x = (slow + torch.randn(n, WINDOW, D_MODEL, generator=generator)) / (2 * D_MODEL) ** 0.5
    return Batch.of(x, pos=torch.arange(WINDOW, dtype=torch.int32).expand(n, WINDOW))


def step_of(variant: str, batch: Batch) -> Callable[[], None]:
    """One step of a learner late in its run; its four ways of using a step's batch come around in turn."""
    fields = REGISTRY[variant].Config.model_fields
    options = {"d_sae": D_SAE, "window": WINDOW} | ({"k": K} if "k" in fields else {})
    sae = make_sae(variant, options, D_MODEL, 0, "benchmark")
    learner = Learner(
        LearnerConfig(name="x", variant=variant, lr=1e-4), sae, N_STEPS, torch.device("cpu"), torch.float32
    )
    sae.start(1.0, torch.zeros(D_MODEL))
    learner.step = STEP

    def steps() -> None:
        for _ in range(4):  # multiscale's separation is taken at every fourth
            learner.train_step(batch, BATCH)

    return steps


def run(rounds: int = 5) -> list[Row]:
    batch = sentences()
    rows = []
    for variant, cls in REGISTRY.items():
        if variant == BASELINE or not cls.trained:
            continue  # pair by pair: sixteen learners at once would not share the caches as two do
        times = interleaved({BASELINE: step_of(BASELINE, batch), variant: step_of(variant, batch)}, rounds)
        ours, flat = (4 * BATCH / times[name].median for name in (variant, BASELINE))
        ratio = median_ratio(times[BASELINE], times[variant])
        name = f"{variant} / {BASELINE} step (d={D_MODEL}, d_sae={D_SAE}, k={K})"
        rows.append(Row(name, f"{ours:,.0f} tok/s", f"{flat:,.0f} tok/s", ratio, WANTED.get(variant, 0.0)))
    return rows
