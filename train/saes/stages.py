"""How far attention reads back as a run goes on: further at each stage, which temporal weights begin slowly."""

from __future__ import annotations

from train.schedule import Clock

STAGES = ((0.0, 16), (0.1, 8), (0.2, 4), (0.35, 2), (0.5, 1))  # from this share of the run: span / this
WARMUP = 0.05  # share of the run after a stage begins over which rates rise from half; at most …
MAX_WARMUP_STEPS = 500


def stage_of(progress: float) -> tuple[float, int]:
    """Where in the run the present stage began, and by what it divides the span."""
    return max(stage for stage in STAGES if stage[0] <= progress)


def warmth(clock: Clock) -> float:
    """Factor on the learning rate: half when a stage after the first begins, rising to 1."""
    began, _ = stage_of(clock.progress)
    if began == 0:
        return 1.0
    warmup = min(MAX_WARMUP_STEPS, WARMUP * clock.n_steps)
    return 0.5 + 0.5 * min((clock.progress - began) * clock.n_steps / warmup, 1.0)
