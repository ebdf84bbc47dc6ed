"""How far axes go, and how numbers and names are written in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.console import format_cell
from train.report.figures.shapes import Curve

LONGEST = 26  # characters of a learner's name in a figure; the CSV has all of it
LEAST_HALF = 5e-5  # from which on an interval is seen in four places
LARGE = 1e7  # from which on a number is written with an exponent
FAR = 1000.0  # times the median, or this part of it: what lies beyond does not set the scale


def median_size(values: Sequence[float]) -> float:
    """The middle one of their distances from 0; 0 without any."""
    sizes = sorted(abs(value) for value in values)
    return sizes[len(sizes) // 2] if sizes else 0.0


def not_beyond(values: Sequence[float]) -> list[float]:
    """The values without what blew up."""
    size = median_size(values)
    return [value for value in values if not size or abs(value) <= size * FAR]


def near(values: Sequence[float]) -> list[float]:
    """What logarithms are taken of: neither what blew up nor what is 0 but for rounding, as the identity's loss is."""
    size = median_size(values)
    return [value for value in not_beyond(values) if abs(value) >= size / FAR]


def near_of_curves(curves: Sequence[Curve]) -> list[float]:
    """The same of lines: a line is near or not by its middle, so that none loses its start."""
    finite = [[value for value in curve.y if math.isfinite(value)] for curve in curves]
    least = median_size([median_size(values) for values in finite if values]) / FAR
    return not_beyond([value for values in finite if median_size(values) >= least for value in values])


def spans(values: Sequence[float], orders: float) -> bool:
    """Whether values, all positive, differ by more than this factor."""
    return bool(values) and min(values) > 0 and max(values) > orders * min(values)


def ends_of(values: Sequence[float], scale: str) -> tuple[float, float]:
    """Ends of an axis that shows these values and little more."""
    least, most = min(values), max(values)
    if scale == "log":
        return least / 1.3, most * 1.3
    room = 0.05 * ((most - least) or 1.0)
    return least - room, most + room


def number(value: float, half: float = 0.0) -> str:
    """A number to four digits, with half its interval to the places that this leaves: `0.8359 ± 0.0031`."""
    if half < LEAST_HALF:
        return format_cell(value) if abs(value) < LARGE else f"{value:.3g}"
    places = min(max(1 - math.floor(math.log10(half)), 0), 4)
    return f"{value:,.{places}f} ± {half:,.{places}f}"


def shortened(text: str, longest: int) -> str:
    """A text without its middle where it is too long: `contrastive-…-seed2`."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 3
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"
