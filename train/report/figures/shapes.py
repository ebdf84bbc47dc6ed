"""What panels are made of: numbers with what they are, bars and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A number of a figure.

    Attributes:
        panel: title of the panel.
        series: the group's label.
        learner: of a single learner's value; empty for what is drawn of the group: its mean.
        x: place on the horizontal axis, where there is one; a step, an L0, a lag.
        n: learners behind the value.
        note: why there is no value, or what else is to be said.
    """

    panel: str
    series: str
    learner: str = ""
    x: float | str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 1
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar of a panel.

    Attributes:
        each: single values, drawn as dots where there are several.
        mark: a value aimed at, drawn across the bar.
        text: what stands at its end beside the number, or why there is no number.
    """

    label: str
    colour: str
    value: float | None
    low: float | None = None
    high: float | None = None
    each: Sequence[float] = ()
    mark: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of a panel, with a band from the lowest to the highest, if there is one."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    dash: Any = "solid"
    marker: str = ""
    thin: bool = False
