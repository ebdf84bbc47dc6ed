"""Moments of the activations at one hook."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.layout import SUMMARY


@dataclass(frozen=True)
class Moments:
    """Moments of the activations at one hook over the tokens that may be trained on.

    Attributes:
        count: tokens.
        mean: E x, float64 [d_model].
        second_moment: E x², float64 [d_model].
        max_abs: largest |x| of any element.
    """

    count: int
    mean: np.ndarray
    second_moment: np.ndarray
    max_abs: float

    @property
    def mean_squared_norm(self) -> float:
        """E ‖x‖²."""
        return float(self.second_moment.sum())

    @property
    def variance(self) -> float:
        """E ‖x − E x‖², summed over dimensions."""
        return float(self.second_moment.sum() - (self.mean**2).sum())

    def summary(self) -> dict[str, np.ndarray]:
        """What a store keeps of them for other readers: float64 [d_model] or [1], by name."""
        return {name: np.atleast_1d(np.asarray(getattr(self, name), np.float64)) for name in SUMMARY}
