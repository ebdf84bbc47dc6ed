"""K learners on one stream of batches against K runs one after the other, in tokens per second of all, with their data.

Each learner takes the same steps either way (losses equal to the bit: tests/train/test_trainer.py); what is shared is
reading: one gather, one conversion to float32 and one copy to the device per batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks.measure import Row, interleaved, median_ratio
from tests.benchmarks.read_speed import D_MODEL, make_store
from train.bench import learner_for
from train.data.batch import Batch
from train.data.reader import Batches
from train.learner import Learner

D_SAE, K, BATCH, STEPS = 4096, 32, 2048, 5
COUNTS = (1, 2, 4, 8)


def batch_of(batches: Batches, step: int) -> Batch:
    batch = batches.batch(step, BATCH, reuse=True)
    return batch.with_x(batch.x.float())


def run(rounds: int = 5) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "bench.zarr", chunks=24)
        batches, separate = Batches.of(store), Batches.of(store)
        device = torch.device("cpu")
        learners = [learner_for("topk", D_MODEL, D_SAE, K, device, torch.float32, "auto") for _ in range(max(COUNTS))]
        first = learners[0].step
        for count in COUNTS:
            together, apart = learners[:count], learners[:count]

            def one_stream(chosen: list[Learner] = together) -> None:
                for step in range(first, first + STEPS):
                    batch = batch_of(batches, step)
                    for learner in chosen:
                        learner.train_step(batch, BATCH)

            def many_runs(chosen: list[Learner] = apart) -> None:
                for learner in chosen:
                    for step in range(first, first + STEPS):
                        learner.train_step(batch_of(separate, step), BATCH)

            times = interleaved({"one": one_stream, "many": many_runs}, rounds)
            one, many = (f"{count * STEPS * BATCH / times[name].median:,.0f} tok/s" for name in ("one", "many"))
            name = f"{count} topk learners on one stream / {count} runs (d={D_MODEL}, d_sae={D_SAE})"
            rows.append(Row(name, one, many, median_ratio(times["many"], times["one"]), 1.0 if count > 1 else 0.0))
            for learner in learners:
                learner.step = first
        batches.close()
        separate.close()
    return rows
