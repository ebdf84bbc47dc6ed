"""What several figures draw: bars of groups, curves over steps, the key of learners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.report.figures.scales import LONGEST
from train.report.figures.shapes import Bar, Curve, Row
from train.report.figures.sheet import KEY_LINE, Axes, Sheet, title_of
from train.report.figures.study import Group, Read, Study, Summary, summary
from train.report.palette import NEUTRAL

Line = dict[str, Any]
LEVEL_DASHES = ("dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
SEVERAL = "Bars: mean over {} seeds, line: 95 % interval (Student's t), dots: seeds."
ONE = "One seed each; lines: 95 % intervals over documents, where the evaluation has them."
RANGE = "Lines: mean over seeds; bands: from the lowest to the highest."
MOST_REASONS = 6  # bars without a value in a figure
NO_LINES = "nothing was logged: no step was taken, or metrics.jsonl is gone"


def seeds_remark(study: Study) -> str:
    """What bars show."""
    seeds = sorted({len(group.records) for group in study.groups})
    if seeds[-1] == 1:
        return ONE
    return SEVERAL.format(seeds[-1] if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}")


def range_remark(study: Study) -> str:
    """What lines show."""
    return RANGE if any(len(group.records) > 1 for group in study.groups) else ""


def bars_height(n: int) -> float:
    """Inches of a panel of n bars."""
    return max(0.9 + 0.25 * n, 1.5)


def curves_height(study: Study) -> float:
    """Inches of a panel of curves: room for the key beside it, in two columns at most."""
    return max(3.0, KEY_LINE * (len(study.groups) + 4) / 2)  # some for levels


def worth_a_bar(study: Study, reads: Iterable[Read]) -> tuple[Group, ...]:
    """Groups with any of these figures; with them those without one, if their reasons are few enough to be read."""
    reads = list(reads)
    filled = tuple(group for group in study.groups if any(summary(group, read).value is not None for read in reads))
    return study.groups if len(study.groups) - len(filled) <= MOST_REASONS else filled


def left_out_remark(study: Study, shown: Sequence[Group]) -> str:
    """That some groups are not shown."""
    n = len(study.groups) - len(shown)
    return f"{n} more have none, see the CSV. " if n else ""


def group_bars(
    sheet: Sheet,
    axes: Axes,
    study: Study,
    read: Read,
    unit: str,
    *,
    suite: str = "",
    name: str = "",
    mark: Callable[[Group], float | None] = lambda group: None,
    names: bool = True,
    linear: bool = False,
    shown: Sequence[Group] = (),
) -> None:
    """A bar for each group, or those `shown`: the mean over its seeds with its interval; the rows are of all."""
    bars = []
    for group in study.groups:
        found = summary(group, read, suite, name)
        sheet.rows += rows_of(title_of(axes), group, found, mark(group))
        if shown and group not in shown:
            continue
        text = f"({len(found.each)} of {len(group.records)} seeds)" if len(found.each) < len(group.records) else ""
        bars.append(
            Bar(
                group.label, study.colours[group.label], found.value, found.low, found.high,
                tuple(found.each.values()), mark(group), found.reason if found.value is None else text,
            )
        )  # fmt: skip
    sheet.bars(axes, bars, unit, LONGEST if names else 0, linear)


def rows_of(panel: str, group: Group, found: Summary, mark: float | None = None) -> list[Row]:
    """The mean of a group, and each learner's own value."""
    note = "; ".join(filter(None, [f"aimed at {mark:g}" if mark is not None else "", found.reason]))
    mean = Row(panel, group.label, "", None, found.value, found.low, found.high, len(found.each), note)
    return [mean, *(Row(panel, group.label, name, None, value) for name, value in found.each.items())]


@dataclass(frozen=True)
class Averaged:
    """A figure over a group's seeds, place by place; `n` is how many have one there."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: list[int]


def averaged(group: Group, read: Callable[[Line], float | None]) -> Averaged:
    """Mean, lowest and highest over the seeds that logged a number at a step."""
    return averaged_points(
        [
            [(float(line["step"]), value) for line in record.lines if (value := read(line)) is not None]
            for record in group.records
        ]
    )


def averaged_points(curves: Iterable[Iterable[tuple[float, float]]]) -> Averaged:
    """The same of any curves (x, y): at each x those that have a point there."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            at.setdefault(x, []).append(y)
    places = sorted(at)
    values = [at[x] for x in places]
    means = [float(np.mean(v)) for v in values]
    return Averaged(places, means, [*map(min, values)], [*map(max, values)], [*map(len, values)])


def step_curve(
    sheet: Sheet,
    axes: Axes,
    study: Study,
    group: Group,
    read: Callable[[Line], float | None],
    *,
    series: str = "",
    dash: Any = None,
    thin: bool = False,
) -> Curve:
    """A group's line over the steps, a band where it has several seeds, and the rows behind it."""
    found = averaged(group, read)
    name = f"{group.label} {series}".strip()
    several = len(group.records) > 1
    for x, mean, least, most, n in zip(found.x, found.mean, found.low, found.high, found.n, strict=True):
        low, high = (least, most) if several else (None, None)
        sheet.rows.append(Row(title_of(axes), name, "", x, mean, low, high, n))
    dash = dash if dash is not None else study.styles[group.label].dash
    ends = (found.low, found.high) if several and not thin else None
    return Curve(name, study.colours[group.label], found.x, found.mean, ends, dash, thin=thin)


def step_curves(sheet: Sheet, axes: Axes, study: Study, *keys: str) -> list[Curve]:
    """A line for each group that logged any of these keys: their sum."""
    curves = [step_curve(sheet, axes, study, group, value_of(*keys)) for group in study.groups]
    return [curve for curve in curves if curve.x]


def value_of(*names: str) -> Callable[[Line], float | None]:
    """Reads the sum of some figures of a metrics line; None where none is there."""

    def read(line: Line) -> float | None:
        found = [line[name] for name in names if isinstance(line.get(name), int | float)]
        return sum(found) if found else None

    return read


def keys_of(groups: Iterable[Group], opening: str = "") -> list[str]:
    """Names in the metrics lines of some groups that begin so, in order of their first appearance."""
    lines = (line for group in groups for record in group.records for line in record.lines)
    return [key for key in dict.fromkeys(key for line in lines for key in line) if key.startswith(opening)]


def learners_key(sheet: Sheet, study: Study, levels: Sequence[str] = ()) -> None:
    """The key of a figure of curves: groups that any is of, and what the line styles of levels stand for."""
    drawn = {row.series for row in sheet.rows if row.value is not None}
    labels = [group.label for group in study.groups if group.label in drawn]
    own = [(label, study.colours[label], study.styles[label].dash, "") for label in labels]
    sheet.legend([*own, *((level, NEUTRAL, dash, "") for level, dash in level_dashes(levels).items())])


def kinds_key(sheet: Sheet, study: Study, kinds: Iterable[str]) -> None:
    """The key of a figure of fronts: each of these kinds, its line and its marker."""
    styles = {kind: study.styles[kind] for kind in study.kinds() if kind in set(kinds)}
    sheet.legend([(kind, study.colours[kind], style.dash, style.marker) for kind, style in styles.items()])


def level_dashes(levels: Sequence[str]) -> dict[str, Any]:
    """A line style for each level."""
    return {level: LEVEL_DASHES[place % len(LEVEL_DASHES)] for place, level in enumerate(levels)}
