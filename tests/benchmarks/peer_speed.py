"""A training step of `topk` and `batchtopk` against SAELens's, its own trainer's step, on one resident batch.

Needs `pip install -e .[bench]`; without SAELens there is nothing to hold these figures against. Both are in float32
with their defaults; ours is also shown in bfloat16, which SAELens leaves to the user.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from common.console import say
from tests.benchmarks.measure import Row
from train.bench import in_turn, learner_for, median_ratio, sentences, step_of

D_MODEL, K, BATCH = 512, 32, 2048
WANTED = {4096: 3.5, 16384: 5.0}
LR = 1e-4
LONG = 10**9  # tokens of a run that never ends


def peer_step(
    variant: str, d_model: int, d_sae: int, k: int, x: torch.Tensor, autocast: bool = False
) -> Callable[[], object]:
    """SAELens's step, on the device of x; with `autocast` in bfloat16. Raises ImportError where it is not installed."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": d_model, "d_sae": d_sae, "k": k, "device": str(x.device)}
    sae: Any = (
        TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
        if variant == "topk"
        else BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
    )

    def same() -> Iterator[torch.Tensor]:
        while True:
            yield x

    config = SAETrainerConfig(
        total_training_samples=LONG, train_batch_size_samples=len(x), lr=LR, lr_end=LR, device=str(x.device),
        autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, same())

    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def run(rounds: int = 5) -> list[Row]:
    batch, device = sentences(BATCH, D_MODEL), torch.device("cpu")
    rows = []
    for d_sae, wanted in WANTED.items():
        for variant in ("topk", "batchtopk"):
            try:
                things = {"SAELens": peer_step(variant, D_MODEL, d_sae, K, batch.x.flatten(0, 1))}
            except ImportError:
                say("peers: SAELens is not installed (pip install -e .[bench]); its steps are left out.")
                return []
            for precision in (torch.float32, torch.bfloat16):
                learner = learner_for(variant, D_MODEL, d_sae, K, device, precision, "auto")
                things[str(precision).removeprefix("torch.")] = step_of(learner, batch)
            times = in_turn(things, rounds, device, None)
            rates = {name: f"{BATCH / statistics.median(seconds):,.0f} tok/s" for name, seconds in times.items()}
            for name in ("float32", "bfloat16"):
                rows.append(
                    Row(f"{variant} step in {name} / SAELens in float32 (d={D_MODEL}, d_sae={d_sae}, k={K})",
                        rates[name], rates["SAELens"], median_ratio(times["SAELens"], times[name]), wanted)
                )  # fmt: skip
    return rows
