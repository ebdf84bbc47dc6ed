"""A TopK training step with its data against a bare loop on one resident batch.

The plain step has the loop's arithmetic and shows what everything around it costs; the sparse one shows what is saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.measure import Row, interleaved, median_ratio
from tests.benchmarks.read_speed import D_MODEL, make_store
from train.config import Kernels, LearnerConfig
from train.data.reader import Batches
from train.learner import Learner
from train.saes import make_sae

D_SAE = 4096
K = 32
BATCH = 2048
STEPS = 10


def bare_loop() -> Callable[[], None]:
    """The plain TopK step in stock torch: five products, top-k, fused Adam, unit rows. Returns the closure."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, D_MODEL, generator=generator) / D_MODEL**0.5
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1).requires_grad_()
    W_enc = W_dec.detach().t().clone().requires_grad_()
    b_enc, b_dec = torch.zeros(D_SAE, requires_grad=True), torch.zeros(D_MODEL, requires_grad=True)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        for _ in range(STEPS):
            through = (b_dec - b_dec.detach()) @ W_enc.detach()
            u = torch.relu((x - b_dec.detach()) @ W_enc + (b_enc - through))
            values, indices = torch.topk(u, K, dim=-1, sorted=False)
            latents = torch.zeros_like(u).scatter(-1, indices, values)
            loss = (x - (latents @ W_dec + b_dec)).square().sum() / BATCH
            adam.zero_grad()
            loss.backward()
            with torch.no_grad():
                assert W_dec.grad is not None
                W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            with torch.no_grad():
                W_dec.div_(W_dec.norm(dim=-1, keepdim=True))

    return step


def steps_with_data(batches: Batches, kernels: Kernels) -> Callable[[], None]:
    """Ten steps of a learner on a store's batches."""
    sae = make_sae("topk", {"d_sae": D_SAE, "k": K}, D_MODEL, 0, "benchmark")
    sae.start(D_MODEL**-0.5, torch.zeros(D_MODEL))
    config = LearnerConfig(name="topk", variant="topk")
    learner = Learner(config, sae, 100_000, torch.device("cpu"), torch.float32, kernels)

    def steps() -> None:
        for _ in range(STEPS):
            batch = batches.batch(learner.step, BATCH, reuse=True)
            learner.train_step(batch.with_x(batch.x.float()), BATCH)

    return steps


def run(rounds: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "bench.zarr", chunks=24)
        batches = Batches.of(store)
        things = {"plain": steps_with_data(batches, "plain"), "sparse": steps_with_data(batches, "sparse")}
        times = interleaved(things | {"bare": bare_loop()}, rounds)
        batches.close()
    rates = {name: f"{STEPS * BATCH / timing.median:,.0f} tok/s" for name, timing in times.items()}
    return [
        Row(f"{name} TopK step with data / bare dense loop (d={D_MODEL}, d_sae={D_SAE}, k={K})",
            rates[name], rates["bare"], median_ratio(times["bare"], times[name]), wanted)
        for name, wanted in (("plain", 1 / 1.10), ("sparse", 1.0))
    ]  # fmt: skip
