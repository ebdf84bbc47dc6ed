"""Figures of which some cannot be had, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from train.evaluate.subject import Evaluation


@dataclass(frozen=True)
class Missing:
    """Why there is no figure."""

    reason: str


Figures = dict[str, float | Missing]


def evaluation(names: Iterable[str], figures: Figures, more: Mapping[str, Any]) -> Evaluation:
    """The result of a suite: its figures in the order of `names`, None with a reason where one is missing."""
    ordered = {name: figures[name] for name in names}
    return Evaluation(
        {name: None if isinstance(value, Missing) else value for name, value in ordered.items()},
        {name: value.reason for name, value in ordered.items() if isinstance(value, Missing)},
        more,
    )
