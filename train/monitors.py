"""When a learner is beyond hope: pure functions of its metrics. The learner ends with the reason; others go on."""

from __future__ import annotations

import math
from typing import Any

GRACE_SHARE = 0.2  # of the run: levelled variants start far below zero and recover within 50 steps (spec §0.4)
MIN_GRACE_STEPS = 100
MAX_GRACE_STEPS = 1000
QUIET_STEPS = 200
QUIET_SHARE = 0.2
BLOWN_UP = -100.0  # explained variance that no run comes back from


def verdict(metrics: dict[str, Any], judged_ev: float | None, quiet_steps: int, n_steps: int) -> str | None:
    """Why the learner should end, or None (spec §3).

    A loss or gradient that is not finite at any time; explained variance below −100 after 50 steps, or below 0 after
    the first fifth of the run (100 to 1,000 steps); L0 below 1 for 200 steps in a row, or a fifth of a shorter run.

    Args:
        judged_ev: explained variance over several steps, however often metrics are written.
        quiet_steps: the most steps in a row with L0 below 1, so far.
    """
    step, ev = metrics["step"], metrics["explained_variance"]
    numbers = [metrics["loss"], metrics["grad_norm_max"], *([] if ev is None else [ev])]
    if not all(math.isfinite(number) for number in numbers):
        return f"loss or gradient not finite by step {step}"
    grace = min(max(GRACE_SHARE * n_steps, MIN_GRACE_STEPS), MAX_GRACE_STEPS)
    if judged_ev is not None and step > 50 and judged_ev < BLOWN_UP:
        return f"explained variance {judged_ev:.3g} at step {step}: the loss has blown up; lower lr"
    if judged_ev is not None and step > grace and judged_ev < 0:
        return f"explained variance {judged_ev:.3g} below 0 at step {step}: worse than the mean; lower lr"
    if quiet_steps >= max(min(QUIET_STEPS, QUIET_SHARE * n_steps), 1):
        return f"L0 below 1 for {quiet_steps} steps in a row by step {step}: collapsed; lower the sparsity penalty"
    return None
