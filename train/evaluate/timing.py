"""How long something takes, beside something else measured in turn with it: a machine that drifts moves both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.evaluate.subject import Subject

WARM_UPS, REPEATS, MOST_REPEATS = 2, 5, 25
ENOUGH_S = 1.0  # of repeats, once there are five


@dataclass(frozen=True)
class Timing:
    """Seconds of something and of the flat SAE's like, measured in turn [repeats]."""

    ours: Tensor
    flat: Tensor

    @property
    def ms(self) -> float:
        return quartiles(1000 * self.ours)[1]

    @property
    def ratio(self) -> float:
        return quartiles(self.ours / self.flat)[1]

    def described(self) -> dict[str, Any]:
        """Quartiles, the median in the middle, in ms."""
        ours, flat = (quartiles(1000 * times) for times in (self.ours, self.flat))
        ratio = quartiles(self.ours / self.flat)
        return {"quartiles_ms": ours, "flat_quartiles_ms": flat, "ratio_quartiles": ratio, "repeats": len(self.ours)}


def quartiles(values: Tensor) -> list[float]:
    """The first, the median and the third."""
    found: list[float] = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return found


def in_turn(ours: Callable[[], object], flat: Callable[[], object], subject: Subject) -> Timing:
    """Both timed in turn, at least five times after a warm-up; up to 25 times where that takes less than a second."""
    for _ in range(WARM_UPS):
        for compute in (ours, flat):
            compute()
    times: list[list[float]] = []
    while len(times) < REPEATS or (len(times) < MOST_REPEATS and sum(map(sum, times)) < ENOUGH_S):
        subject.refuse_when_stopped()
        times.append([seconds(compute, subject.device) for compute in (ours, flat)])
    table = torch.tensor(times, dtype=torch.float64)
    return Timing(table[:, 0], table[:, 1])


def seconds(compute: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, on a GPU until it is done."""
    wait(device)
    start = time.perf_counter()
    compute()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
