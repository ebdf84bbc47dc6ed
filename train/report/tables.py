"""`train compare`: learners of one or more runs at equal L0, with intervals over seeds.

A *kind* is what learners have in common that differ only in seed and in k (or the L0 aimed at). For each seed of a kind
its learners are points (L0, figure) of a curve; figures at a wanted L0 are read off it, linear in log L0. So kinds are
compared at the same L0 although none has exactly the L0 it was asked for.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common.config import read_toml
from common.console import format_cell
from common.errors import ConfigError, StoreError, nearest
from common.files import read_json

FIGURES = ("explained_variance", "nmse", "dead_share", "dense_share")
BEYOND = 1.1  # how far outside of a curve's L0 figures are still read off its end
AIMS = ("k", "target_l0")


@dataclass(frozen=True)
class Point:
    """One finished learner.

    Attributes:
        kind: its settings without name, seed and L0 aimed at, as canonical JSON.
        l0: on held-out documents.
        figures: held-out figures by name.
        tokens_per_s: of its own steps.
    """

    name: str
    kind: str
    seed: int
    aim: float | None
    l0: float
    figures: dict[str, float]
    tokens_per_s: float | None


@dataclass(frozen=True)
class Row:
    """A kind at one L0.

    Attributes:
        l0: the L0 compared at; None where a kind has none of its own (mean, identity).
        explained_variance, nmse, dead_share, dense_share: means over seeds.
        interval: half the 95 % interval of the explained variance over seeds (Student's t); None for one seed.
        difference: explained variance less the baseline's, seed by seed; with `difference_interval`.
        verdict: "above", "below" or "level" with the baseline: whether that interval leaves 0 out.
        speed: tokens per second over the baseline's.
    """

    name: str
    l0: float | None
    seeds: int
    explained_variance: float
    interval: float | None
    nmse: float
    dead_share: float
    dense_share: float
    difference: float | None
    difference_interval: float | None
    verdict: str | None
    speed: float | None


def read_points(runs: Iterable[Path]) -> list[Point]:
    """Every finished learner of these runs (run or learner folders).

    Raises:
        StoreError: a folder without any.
    """
    points = []
    for run in runs:
        files = [run / "result.json"] if (run / "result.json").exists() else sorted(run.glob("*/result.json"))
        results = [(file.parent, read_json(file)) for file in files]
        finished = [(folder, result) for folder, result in results if result["state"] == "finished"]
        if not finished:
            raise StoreError(f"{run}: no finished learner here. If the run was stopped: train resume {run}")
        points += [point_of(folder, result) for folder, result in finished if result["metrics"]]
    return points


def point_of(folder: Path, result: dict[str, Any]) -> Point:
    """A learner's point, from its config.json and result.json."""
    config = read_json(folder / "config.json")
    aim = next((config["options"][key] for key in AIMS if config["options"].get(key) is not None), None)
    settings = {key: value for key, value in config.items() if key not in ("name", "seed", "d_in")}
    settings["options"] = {key: value for key, value in config["options"].items() if key not in AIMS}
    settings["steps"] = result["training_steps"]
    seed = config["seed"]
    metrics = result["metrics"]
    return Point(
        name=result["name"],
        kind=json.dumps(settings, sort_keys=True),
        seed=seed if seed is not None else int(read_toml(folder.parent / "run.toml").get("seed", 0)),
        aim=aim,
        l0=metrics["l0"],
        figures={name: metrics[name] for name in FIGURES},
        tokens_per_s=result["tokens_seen"] / result["seconds"] if result["seconds"] else None,
    )


def compare(points: Sequence[Point], l0s: Sequence[float] | None = None, baseline: str = "batchtopk") -> list[Row]:
    """One row for each kind and L0, sorted by L0 and then by explained variance, the best first.

    Args:
        l0s: where to compare; default: every L0 that was aimed at.
        baseline: name of the kind that differences and speeds are taken from, if it is there.

    Raises:
        ConfigError: no such baseline among several kinds.
    """
    by_kind: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_kind[point.kind].append(point)
    kinds = {name: by_kind[kind] for name, kind in names_of(by_kind).items()}
    if baseline not in kinds and len(kinds) > 1:
        raise ConfigError(f"--baseline {baseline}: none of the learners is called so.{nearest(baseline, kinds)}")
    wanted = sorted(l0s) if l0s else sorted({point.aim for point in points if point.aim is not None})
    rows = []
    for l0 in wanted:
        table = {name: at_l0(members, l0) for name, members in kinds.items() if has_aim(members)}
        rows += make_rows({name: seeds for name, seeds in table.items() if seeds}, l0, baseline)
    rows += make_rows({name: each_seed(members) for name, members in kinds.items() if not has_aim(members)}, None, "")
    return rows


def names_of(by_kind: dict[str, list[Point]]) -> dict[str, str]:
    """A short name for each kind: its learners' own without k and seed, or the variant where these differ."""
    names: dict[str, str] = {}
    for kind, members in by_kind.items():
        stems = {stem_of(point.name) for point in members}
        name = stems.pop() if len(stems) == 1 else str(json.loads(kind)["variant"])
        taken, number = name, 1
        while taken in names:
            number += 1
            taken = f"{name}-{number}"
        names[taken] = kind
    return names


def stem_of(name: str) -> str:
    """A learner's name without the parts that a grid adds for k and seed: `topk` of `topk-k16-seed0`."""
    return re.sub(r"-(?:k|seed)\d+(?=-|$)", "", name)


def has_aim(members: Sequence[Point]) -> bool:
    return any(point.aim is not None for point in members)


def each_seed(members: Sequence[Point]) -> dict[int, dict[str, float]]:
    """Figures by seed of a kind with no L0 of its own to aim at."""
    return {point.seed: point.figures | {"tokens_per_s": point.tokens_per_s or math.nan} for point in members}


def at_l0(members: Sequence[Point], l0: float) -> dict[int, dict[str, float]]:
    """Figures at this L0 by seed; a seed whose curve does not come near it is left out."""
    curves: dict[int, list[Point]] = defaultdict(list)
    for point in members:
        curves[point.seed].append(point)
    found = {}
    for seed, curve in curves.items():
        if not min(point.l0 for point in curve) / BEYOND <= l0 <= max(point.l0 for point in curve) * BEYOND:
            continue
        curve = sorted(curve, key=lambda point: point.l0)
        where = np.log([max(point.l0, 1e-9) for point in curve])
        values = {name: interpolate(where, [point.figures[name] for point in curve], math.log(l0)) for name in FIGURES}
        speeds = [point.tokens_per_s or math.nan for point in curve]
        found[seed] = values | {"tokens_per_s": float(np.median(speeds))}
    return found


def interpolate(where: np.ndarray, values: Sequence[float], at: float) -> float:
    """Linear between points, and along the nearest piece just outside of them."""
    if len(values) == 1:
        return float(values[0])
    piece = min(max(int(np.searchsorted(where, at)) - 1, 0), len(values) - 2)
    width = where[piece + 1] - where[piece]
    share = (at - where[piece]) / width if width > 0 else 0.0
    return float(values[piece] + share * (values[piece + 1] - values[piece]))


def make_rows(table: dict[str, dict[int, dict[str, float]]], l0: float | None, baseline: str) -> list[Row]:
    """Rows of one L0."""
    base = table.get(baseline, {})
    rows = []
    for name, seeds in table.items():
        evs = [values["explained_variance"] for values in seeds.values()]
        paired = sorted(seeds.keys() & base.keys()) if name != baseline else []
        gains = [seeds[seed]["explained_variance"] - base[seed]["explained_variance"] for seed in paired]
        speeds = [seeds[seed]["tokens_per_s"] / base[seed]["tokens_per_s"] for seed in seeds.keys() & base.keys()]
        gain, spread = (float(np.mean(gains)), half_interval(gains)) if gains else (None, None)
        means = {figure: float(np.mean([values[figure] for values in seeds.values()])) for figure in FIGURES}
        rows.append(
            Row(
                name=name,
                l0=l0,
                seeds=len(seeds),
                interval=half_interval(evs),
                difference=gain,
                difference_interval=spread,
                verdict=verdict(gain, spread),
                speed=float(np.median(speeds)) if speeds else None,
                **means,
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


def numbers(text: str) -> list[float]:
    """`16,32` as numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        raise ConfigError(f"--l0 {text}: numbers above 0 are needed, such as 16,32,64.")
    return values


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """Comma-separated values with a heading; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def to_markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table for a page: intervals beside their means."""
    lines = [
        "| learners | L0 | seeds | EV | EV − baseline | verdict | NMSE | dead | dense | speed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in records:
        cells = [
            f"`{row['name']}`",
            format_cell(row["l0"]),
            str(row["seeds"]),
            with_interval(row["explained_variance"], row["interval"], sign=""),
            with_interval(row["difference"], row["difference_interval"], sign="+"),
            row["verdict"] or "–",
            f"{row['nmse']:.4f}",
            f"{row['dead_share']:.3f}",
            f"{row['dense_share']:.3f}",
            "–" if row["speed"] is None else f"{row['speed']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_interval(value: float | None, interval: float | None, sign: str) -> str:
    """`.941 ± .002`, to four digits."""
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + (f" ± {interval:.4f}" if interval is not None else "")
