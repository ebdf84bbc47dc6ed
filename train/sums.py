"""What a learner counts over its steps between two metrics lines."""

from __future__ import annotations

import torch
from torch import Tensor

DENSE = 0.1  # share of tokens, as in suite heldout
FIRING = ("firing", "sampled")  # not of every step


class Sums:
    """Running sums over the steps since the last metrics line, kept on the device: nothing waits for the host.

    They are added to in place, so that a step that was recorded finds them where they were.

    Args:
        values: from `tensors()`.

    Attributes:
        values: float64, by name.
        steps, tokens: how many steps were added up, and their valid tokens.
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        self.steps, self.tokens = (int(self.values.pop(name, 0)) for name in ("steps", "tokens"))

    def count(self, n_valid: int) -> None:
        """One more step."""
        self.steps, self.tokens = self.steps + 1, self.tokens + n_valid

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        if name in self.values:
            self.values[name].add_(value)
        else:
            self.values[name] = value.clone()

    def largest(self, name: str, value: Tensor) -> None:
        """The largest of values that are never below 0."""
        value = value.detach().double()
        if name in self.values:
            torch.maximum(self.values[name], value, out=self.values[name])
        else:
            self.values[name] = value.clone()

    def tensors(self) -> dict[str, Tensor]:
        """All there is to know of them."""
        counts = {"steps": self.steps, "tokens": self.tokens}
        return self.values | {name: torch.tensor(float(count)).double() for name, count in counts.items()}

    def read(self) -> dict[str, Tensor]:
        """Copies of all of them on the host."""
        return {name: value.to("cpu", copy=True) for name, value in self.tensors().items()}

    def restart(self) -> None:
        """Begin at 0."""
        self.steps = self.tokens = 0
        for name in FIRING:
            self.values.pop(name, None)
        for value in self.values.values():
            value.zero_()


def explained_variance(sums: dict[str, Tensor]) -> float | None:
    """From sums over steps; None where nothing varies."""
    variance = float(sums["x2"]) - float(sums["x"].square().sum()) / float(sums["tokens"])
    return 1 - float(sums["error2"]) / variance if variance > 0 else None


def dense_share(sums: dict[str, Tensor]) -> float | None:
    """Share of latents active on more than a tenth of the tokens sampled; None where none of these was valid."""
    if "firing" not in sums or not sums["sampled"]:  # a checkpoint of before they were counted has none
        return None
    return float((sums["firing"] > DENSE * sums["sampled"]).double().mean())
