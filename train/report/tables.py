"""`train compare`: learners of one or more runs at equal L0, with intervals over seeds.

A *kind* is what learners have in common that differ only in seed and in k (or the L0 aimed at). For each seed of a kind
its learners are points (L0, figure) of a curve; figures at a wanted L0 are read off it, linear in log L0. So kinds are
compared at the same L0 although none has exactly the L0 it was asked for. Beyond its ends a curve is not continued:
the figure of the end stands there, with its own L0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from common.console import say
from common.errors import ConfigError
from train.report.curves import EQUAL, at_l0, each_seed
from train.report.kinds import kinds_by_name, numbered, why_no_baseline
from train.report.points import FIGURES, Point


@dataclass(frozen=True)
class Row:
    """A kind at one L0.

    Attributes:
        l0: the L0 compared at; None where a kind has none of its own (mean, identity).
        measured_l0: the L0 that the figures are of: `l0` itself within a curve, else that of its end; mean over seeds.
        explained_variance, nmse, dead_share, dense_share: means over seeds.
        interval: half the 95 % interval of the explained variance over seeds (Student's t); None for one seed.
        difference: explained variance less the baseline's, seed by seed; with `difference_interval`.
        paired_seeds: seeds of that difference: those that the baseline has as well.
        verdict: "above", "below" or "level" with the baseline: whether that interval leaves 0 out; None for one
            seed, or where the two measured L0s differ by more than 2 %.
        speed: tokens per second over the baseline's, over the same seeds.
    """

    name: str
    l0: float | None
    measured_l0: float
    seeds: int
    explained_variance: float
    interval: float | None
    nmse: float
    dead_share: float
    dense_share: float
    difference: float | None
    difference_interval: float | None
    paired_seeds: int
    verdict: str | None
    speed: float | None


def compare(points: Sequence[Point], l0s: Sequence[float] | None = None, baseline: str = "batchtopk") -> list[Row]:
    """One row for each kind and L0, sorted by L0 and then by explained variance, the best first.

    Seeds that do not come near an L0 are left out there, and named on stderr.

    Args:
        l0s: where to compare; default: every L0 that was aimed at.
        baseline: name of the kind that differences and speeds are taken from, if it is there.

    Raises:
        ConfigError: no such baseline among several kinds, or several that are called so; an L0 that none comes near.
    """
    same_name = kinds_by_name(points)
    kinds = numbered(same_name)
    if baseline not in kinds and len(kinds) > 1:
        raise ConfigError(f"--baseline {baseline}: {why_no_baseline(baseline, same_name, kinds)}")
    aiming = {name: members for name, members in kinds.items() if has_aim(members)}
    aimless = {name: each_seed(members) for name, members in kinds.items() if not has_aim(members)}
    wanted = sorted(l0s) if l0s else sorted({point.aim for point in points if point.aim is not None})
    rows = []
    for l0 in wanted:
        table = {name: at_l0(members, l0) for name, members in aiming.items()}
        found = make_rows({name: seeds for name, seeds in table.items() if seeds}, l0, baseline)
        if l0s and not found:
            raise ConfigError(no_l0([l0], aiming))
        say_left_out(table, aiming, l0)
        rows += found
    if not rows and not aimless:
        raise ConfigError(no_l0(wanted, aiming))
    return rows + make_rows(aimless, None, "")


def say_left_out(table: dict[str, dict[int, dict[str, float]]], kinds: dict[str, list[Point]], l0: float) -> None:
    """Name the seeds that have no figures at this L0, a line for each kind."""
    for name, members in kinds.items():
        missed = sorted({point.seed for point in members} - table[name].keys())
        if missed:
            say(f"{name}: left out at L0 {l0:g}: seed {', '.join(map(str, missed))} ({reach(members)})")


def has_aim(members: Sequence[Point]) -> bool:
    return any(point.aim is not None for point in members)


def reach(members: Sequence[Point]) -> str:
    """`measured L0 15.8 to 64.2`."""
    l0s = [point.l0 for point in members]
    return f"measured L0 {min(l0s):.3g} to {max(l0s):.3g}"


def no_l0(wanted: Sequence[float], kinds: dict[str, list[Point]]) -> str:
    """The message where no learner has an L0 wanted."""
    measured = "; ".join(f"{name}: {reach(members)}" for name, members in kinds.items())
    l0s = ", ".join(f"{l0:g}" for l0 in wanted)
    return f"L0 {l0s}: no learner comes within a tenth ({measured or 'none aims at an L0'}). Choose others with --l0."


def make_rows(table: dict[str, dict[int, dict[str, float]]], l0: float | None, baseline: str) -> list[Row]:
    """Rows of one L0."""
    base = table.get(baseline, {})
    rows = []
    for name, seeds in table.items():
        shared = sorted(seeds.keys() & base.keys())
        paired = shared if name != baseline else []
        gains = [seeds[seed]["explained_variance"] - base[seed]["explained_variance"] for seed in paired]
        speeds = [seeds[seed]["tokens_per_s"] / base[seed]["tokens_per_s"] for seed in shared]
        gain, spread = (float(np.mean(gains)), half_interval(gains)) if gains else (None, None)
        ours, theirs = (sum(values[seed]["l0"] for seed in paired) for values in (seeds, base))
        rows.append(
            Row(
                name=name,
                l0=l0,
                measured_l0=float(np.mean([values["l0"] for values in seeds.values()])),
                seeds=len(seeds),
                interval=half_interval([values["explained_variance"] for values in seeds.values()]),
                difference=gain,
                difference_interval=spread,
                paired_seeds=len(paired),
                verdict=verdict(gain, spread) if max(ours, theirs) <= EQUAL * min(ours, theirs) else None,
                speed=float(np.median(speeds)) if speeds else None,
                **{figure: float(np.mean([values[figure] for values in seeds.values()])) for figure in FIGURES},
            )
        )
    return sorted(rows, key=lambda row: -row.explained_variance)


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean: t(n − 1) · s / √n."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def verdict(difference: float | None, interval: float | None) -> str | None:
    """Whether a difference is more than chance over seeds; None where that cannot be said."""
    if difference is None or interval is None:
        return None
    return "level" if abs(difference) <= interval else ("above" if difference > 0 else "below")
