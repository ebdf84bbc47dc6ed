"""When a learner is beyond hope, and when it is worth a look: pure functions of its metrics.

A verdict ends the learner with a reason, the others go on. An alarm is said once, kept in result.json, and ends nobody.
"""

from __future__ import annotations

import math
from typing import Any

GRACE_SHARE = 0.2  # of the run: levelled variants start far below zero and recover within 50 steps (spec §0.4)
MIN_GRACE_STEPS = 100
MAX_GRACE_STEPS = 1000
QUIET_STEPS = 200
QUIET_SHARE = 0.2
BLOWN_UP = -100.0  # explained variance that no run comes back from
ALARM_SHARE, ALARM_STEPS = 0.2, 2000  # alarms begin after a fifth of the run, at most 2,000 steps
# AuxK is near 1 with a handful of dead latents; gated's second reconstruction is as large as its first
NOT_AUXILIARY = ("loss_reconstruction", "loss_sparsity", "loss_aux", "loss_gate")


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
        way_out = "lower the sparsity penalty" if "loss_sparsity" in metrics else "lower lr"
        return f"L0 below 1 for {quiet_steps} steps in a row by step {step}: collapsed; {way_out}"
    return None


def alarms(metrics: dict[str, Any], k: int | None, n_steps: int) -> dict[str, str]:
    """What is odd about a learner, by kind (spec §3); nothing in the first fifth of the run (at most 2,000 steps).

    Dead latents above 20 %; an auxiliary loss above half of the reconstruction loss; explained variance below .5 in a
    variant that keeps 20 latents or more. The spec would end the last of these; a low learning rate alone can bring it
    about (.53 after a fifth of 500 steps, docs/log.md), so it is said and the run goes on.
    """
    if metrics["step"] <= min(ALARM_SHARE * n_steps, ALARM_STEPS):
        return {}
    found = {}
    if metrics.get("dead", 0.0) > 0.2:
        found["dead"] = f"{metrics['dead']:.0%} of the latents are dead"
    rec = metrics.get("loss_reconstruction", math.inf)
    for name, value in metrics.items():
        if name.startswith("loss_") and not name.startswith(NOT_AUXILIARY) and value > 0.5 * rec:
            found[name] = f"{name} {value:.3g} is more than half of the reconstruction loss {rec:.3g}"
    ev = metrics["explained_variance"]
    if k is not None and k >= 20 and ev is not None and ev < 0.5:
        found["explained_variance"] = f"explained variance {ev:.3g} with k = {k}: a higher lr, or more steps"
    return found


def dense_alarm(always_share: float) -> dict[str, str]:
    """The alarm of more than .5 % of the latents firing on over half of the held-out tokens (spec §3)."""
    if always_share <= 0.005:
        return {}
    return {"dense": f"{always_share:.1%} of the latents fire on more than half of the tokens"}
