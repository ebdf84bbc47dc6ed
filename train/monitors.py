"""When a learner is beyond hope: pure functions of its metrics. The learner ends with the reason; others go on."""

from __future__ import annotations

import math
from typing import Any

GRACE_SHARE = 0.2  # of the run: levelled variants start far below zero and recover within 50 steps (spec §0.4)
MIN_GRACE_STEPS = 100
MAX_GRACE_STEPS = 1000
BLOWN_UP = -100.0  # explained variance that no run comes back from


def verdict(metrics: dict[str, Any], n_steps: int) -> str | None:
    """Why the learner should end, or None (spec §3).

    A loss or gradient that is not finite at any time; explained variance below −100 after 50 steps; explained
    variance below 0 or L0 below 1, averaged over a logging interval, after the first fifth of the run (100 to
    1,000 steps).
    """
    step, ev = metrics["step"], metrics["explained_variance"]
    numbers = [metrics["loss"], metrics["grad_norm_max"], *([] if ev is None else [ev])]
    if not all(math.isfinite(number) for number in numbers):
        return f"loss or gradient not finite by step {step}"
    grace = min(max(GRACE_SHARE * n_steps, MIN_GRACE_STEPS), MAX_GRACE_STEPS)
    if ev is not None and step > 50 and ev < BLOWN_UP:
        return f"explained variance {ev:.3g} at step {step}: the loss has blown up; lower lr"
    if step <= grace:
        return None
    if ev is not None and ev < 0:
        return f"explained variance {ev:.3g} below 0 at step {step}: worse than the mean; lower lr"
    if metrics["l0"] < 1:
        return f"L0 {metrics['l0']:.3g} below 1 at step {step}: collapsed; lower the sparsity penalty"
    return None
