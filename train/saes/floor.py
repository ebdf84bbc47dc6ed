"""A least L0 for each of several groups of latents that share one budget or one penalty, where a group may starve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.saes.parts import update_average_
from train.schedule import Clock, averaging

FLOOR_FROM = 0.1  # share of the run before prices move: a penalty has risen by then, and levels have been clustered
CHEAPEST = 1 / 30  # times the price given, as far as λ itself may be moved


class LevelFloor(nn.Module):
    """Factors on the prices of groups that keep each at a least L0: below it a group becomes cheaper, above it dearer.

        log m ← log m + η·clip(4 log(L0 / least), −1, 1)      within [−log 30, 0]

    η = 1e-3, and 10 / steps in runs under 10,000 steps; L0 averaged; from a tenth of the run on. A group that never
    comes below its least L0 keeps m = 1.

    Args:
        least: L0 of each group.
    """

    factor: Tensor
    l0_average: Tensor

    def __init__(self, least: Sequence[float]) -> None:
        super().__init__()
        self.least = tuple(least)
        self.register_buffer("factor", torch.ones(len(self.least)))
        self.register_buffer("l0_average", torch.full((len(self.least),), torch.inf))

    @torch.no_grad()
    def follow_(self, l0: Float[Tensor, " groups"], clock: Clock) -> None:
        """Note the L0 of each group in a batch, and move the factors."""
        for average, value in zip(self.l0_average, l0, strict=True):
            update_average_(average, value, averaging(clock.n_steps), clock.step == 0)
        if clock.progress < FLOOR_FROM:
            return
        error = torch.log(self.l0_average / self.l0_average.new_tensor(self.least))
        self.factor *= torch.exp(max(1e-3, 10 / clock.n_steps) * (4 * error).clamp(-1, 1))
        self.factor.clamp_(CHEAPEST, 1.0)
