"""How far axes go, and how numbers and names are written in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.console import format_cell

LONGEST = 26  # characters of a learner's name in a figure; the CSV has all of it
LARGE = 1e7  # from which on a number is written with an exponent
FAR = 1000.0  # times the median: what lies beyond, the losses of a run that blew up, is cut off


def limit_of(values: Sequence[float]) -> float:
    """How far from 0 values may lie to be shown: a multiple of their median size."""
    sizes = sorted(abs(value) for value in values)
    limit = FAR * sizes[len(sizes) // 2] if sizes else math.inf
    return limit if limit > 0 else math.inf


def ends_of(values: Sequence[float], scale: str) -> tuple[float, float]:
    """Ends of an axis that shows these values and little more."""
    least, most = min(values), max(values)
    if scale == "log":
        return least / 1.3, most * 1.3
    room = 0.05 * ((most - least) or 1.0)
    return least - room, most + room


def number(value: float, half: float = 0.0) -> str:
    """A number to four digits, with half its interval to the places that this leaves: `0.8359 ± 0.0031`."""
    if not half:
        return format_cell(value) if abs(value) < LARGE else f"{value:.3g}"
    places = min(max(1 - math.floor(math.log10(half)), 0), 4)
    return f"{value:,.{places}f} ± {half:,.{places}f}"


def shortened(text: str, longest: int) -> str:
    """A text without its middle where it is too long: `contrastive-…-seed2`."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 3
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"
