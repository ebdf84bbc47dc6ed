"""Sums over a learner's steps between two metrics lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DENSE = 0.1  # share of tokens, as in suite heldout


class Sums:
    """Running sums over the steps since the last metrics line, kept on the device: nothing waits for the host.

    They are added to in place, so that a step that was recorded finds them where they were.

    Args:
        values: from `tensors()`.

    Attributes:
        values: float64, by name; those not `seen` are 0.
        seen: the names that were added to.
        steps, tokens: how many steps were added up, and their valid tokens.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        self.steps, self.tokens = (int(self.values.pop(name, 0)) for name in ("steps", "tokens"))
        self.seen = set(self.values)

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

    def count(self, n_valid: int, names: Iterable[str]) -> None:
        """One more step, which added to these."""
        self.steps, self.tokens = self.steps + 1, self.tokens + n_valid
        self.seen.update(names)

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Hold some values to the next restart."""
        self.values |= values
        self.seen |= values.keys()

    def tensors(self) -> dict[str, Tensor]:
        """All there is to know of them."""
        counts = {"steps": self.steps, "tokens": self.tokens}
        known = {name: value for name, value in self.values.items() if name in self.seen}
        return known | {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}

    def read(self) -> dict[str, Tensor]:
        """Copies of all of them on the host."""
        return {name: value.to("cpu", copy=True) for name, value in self.tensors().items()}

    def restart(self) -> None:
        """Begin at 0."""
        self.steps = self.tokens = 0
        self.seen.clear()
        for value in self.values.values():
            value.zero_()


def explained_variance(sums: Mapping[str, Tensor]) -> float | None:
    """From sums over steps; None where nothing varies."""
    variance = float(sums["x2"]) - float(sums["x"].square().sum()) / float(sums["tokens"])
    return 1 - float(sums["error2"]) / variance if variance > 0 else None


def dense_share(sums: Mapping[str, Tensor]) -> float | None:
    """Share of latents active on more than a tenth of the tokens sampled; None where none of these was valid."""
    if "firing" not in sums or not sums["sampled"]:  # a checkpoint of before they were counted has none
        return None
    return float((sums["firing"] > DENSE * sums["sampled"]).double().mean())
