"""One colour per learner, the same in every figure and page: Okabe and Ito's, which colour-blind people tell apart.

A hue stands for a family, learners that differ in k and seed alone; its shades for their k. Where there are more
families than hues, line styles and markers go on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Okabe and Ito, Color Universal Design (2008), without yellow, which is too pale on white
BLACK = "#000000"
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", BLACK)
DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LIGHTEST, DARKEST = 0.5, 0.5  # how far shades go towards white and towards black
NEUTRAL = "#767676"  # what is no learner: targets, limits, remarks; 4.5 to 1 on white


@dataclass(frozen=True)
class Style:
    """How a line is drawn beside its colour, in matplotlib's words."""

    dash: str
    marker: str


def colours(families: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A colour `#rrggbb` for each family's name and its members', by the natural order of the families."""
    found: dict[str, str] = {}
    for place, family in enumerate(sorted(families, key=natural)):
        hue, members = HUES[place % len(HUES)], families[family]
        found |= {family: hue} | {name: shade(hue, number, len(members)) for number, name in enumerate(members)}
    return found


def styles(families: Mapping[str, Sequence[str]]) -> dict[str, Style]:
    """A line style and a marker for each name, so that families of one hue are told apart."""
    found: dict[str, Style] = {}
    for place, family in enumerate(sorted(families, key=natural)):
        style = Style(DASHES[place // len(HUES) % len(DASHES)], MARKERS[place % len(MARKERS)])
        found |= dict.fromkeys([family, *families[family]], style)
    return found


def natural(name: str) -> list[tuple[str, int]]:
    """A key that puts `topk-k8` before `topk-k16`."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def shade(hue: str, place: int, n: int) -> str:
    """The hue itself for one name, else shades of it from light to dark; of black only lighter ones."""
    darkest = DARKEST if hue != BLACK else 0.0
    towards_black = 0.0 if n == 1 else (LIGHTEST + darkest) * place / (n - 1) - LIGHTEST
    end = 255 if towards_black < 0 else 0
    parts = (int(hue[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part + (end - part) * abs(towards_black)):02X}" for part in parts)
