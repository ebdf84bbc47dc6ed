"""Training steps on a GPU: each variant and each way of stepping, against what the chip cannot go below, and SAELens.

    floor of a step, per token:  2·d·L / F  +  4·k·d / W  +  16·2·d·L / (tokens · W)

One product of full width, rows of the decoder gathered and scattered in bfloat16, and an optimizer that moves 16 bytes
per weight (spec performance §4, "lean"); F and W are measured here, on a product of [8192, 8192] in bfloat16 and on a
copy. Steps are in bfloat16. Ways: plain or sparse kernels, each step by step or played again as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch

from common.console import say
from tests.benchmarks.measure import Row
from tests.benchmarks.peer_speed import peer_step
from train.bench import in_turn, learner_for, median_ratio, play_in, sentences, step_of
from train.config import Kernels
from train.recording import recorder_for
from train.saes import REGISTRY

SHAPES = tuple((d_model, d_sae) for d_model in (512, 768, 2304) for d_sae in (4096, 16384, 65536))
K, BATCH, ROUNDS = 64, 4096, 5
WANTED, WANTED_OF_PEER = 0.6, 2.0
SIDE = 8192
WAYS: tuple[tuple[Kernels, bool], ...] = (("plain", False), ("plain", True), ("sparse", False), ("sparse", True))


def run() -> list[Row]:
    if not torch.cuda.is_available():
        say("gpu: there is none; its steps are left out.")
        return []
    return measure(torch.device("cuda"), SHAPES, K, BATCH)


def measure(device: torch.device, shapes: tuple[tuple[int, int], ...], k: int, n_tokens: int) -> list[Row]:
    flops, bandwidth = limits(device)
    say(f"gpu: {flops / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s read and written")
    variants = [variant for variant, cls in REGISTRY.items() if cls.trained]
    rows = []
    for d_model, d_sae in shapes:
        floor = floor_of(d_model, d_sae, k, n_tokens, flops, bandwidth)
        for variant in variants:
            try:
                rows += list(rows_of(variant, d_model, d_sae, k, n_tokens, device, floor))
            except RuntimeError as error:  # too large for this chip, most likely: the others are measured all the same
                say(f"gpu: {variant}, d={d_model}, d_sae={d_sae}: {str(error).splitlines()[0]}")
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # a recording that CUDA spoilt may leave the cache as it is
                    torch.cuda.empty_cache()
    return rows


def limits(device: torch.device, side: int = SIDE) -> tuple[float, float]:
    """Operations and bytes per second, medians."""
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copy = torch.empty_like(square)
    things = {"product": lambda: square @ square, "copy": lambda: copy.copy_(square)}
    times = {name: statistics.median(each) for name, each in in_turn(things, ROUNDS, device, None).items()}
    return 2 * side**3 / times["product"], 2 * square.nbytes / times["copy"]


def floor_of(d_model: int, d_sae: int, k: int, n_tokens: int, flops: float, bandwidth: float) -> float:
    """Seconds of a step at least."""
    weights = 2 * d_model * d_sae
    return n_tokens * weights / flops + (n_tokens * 4 * k * d_model + 16 * weights) / bandwidth


def rows_of(
    variant: str, d_model: int, d_sae: int, k: int, n_tokens: int, device: torch.device, floor: float
) -> Iterator[Row]:
    batch = sentences(n_tokens, d_model).to(device)
    things: dict[str, Callable[[], object]] = {}
    for kernels, graphs in WAYS:
        learner = learner_for(variant, d_model, d_sae, k, device, torch.bfloat16, kernels)
        learner.recorder = recorder_for(device, n_tokens * d_sae, graphs)
        step = step_of(learner, batch)
        play_in(learner, step)
        if not graphs or (learner.recorder is not None and learner.recorder.replay is not None):
            things[f"{kernels}{', graph' if graphs else ''}"] = step
    ways = list(things)
    peer = variant in ("topk", "batchtopk")
    if peer:
        try:
            things["SAELens"] = peer_step(variant, d_model, d_sae, k, batch.x.flatten(0, 1), autocast=True)
        except ImportError:
            peer = False
    times = in_turn(things, ROUNDS, device, None)
    rates = {name: f"{n_tokens / statistics.median(seconds):,.0f} tok/s" for name, seconds in times.items()}
    shape = f"(d={d_model}, d_sae={d_sae}, k={k})"
    for way in ways:
        share = statistics.median(floor / seconds for seconds in times[way])
        yield Row(f"{variant} {way} / floor {shape}", rates[way], f"{n_tokens / floor:,.0f} tok/s", share, 0.0)
    best = min(ways, key=lambda way: statistics.median(times[way]))
    share = statistics.median(floor / seconds for seconds in times[best])
    yield Row(
        f"{variant} at best ({best}) / floor {shape}", rates[best], f"{n_tokens / floor:,.0f} tok/s", share, WANTED
    )
    if peer:
        ratio = median_ratio(times["SAELens"], times[best])
        yield Row(f"{variant} at best / SAELens {shape}", rates[best], rates["SAELens"], ratio, WANTED_OF_PEER)
