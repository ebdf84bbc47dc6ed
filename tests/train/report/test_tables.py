"""Learners at equal L0: curves, intervals, names, formats."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from common.errors import ConfigError, StoreError
from train.report.tables import (
    Point,
    at_l0,
    compare,
    half_interval,
    numbers,
    read_points,
    stem_of,
    to_csv,
    to_markdown,
    verdict,
)


def point(name: str, seed: int, aim: float | None, l0: float, ev: float, speed: float = 100.0) -> Point:
    kind = json.dumps({"variant": stem_of(name)})
    figures = {"explained_variance": ev, "nmse": 1 - ev, "dead_share": 0.0, "dense_share": 0.1}
    return Point(name, kind, seed, aim, l0, figures, speed)


def test_figures_are_read_off_the_curve_in_log_l0() -> None:
    curve = [point("a-k16", 0, 16, 16.0, 0.8), point("a-k64", 0, 64, 64.0, 0.9)]
    assert at_l0(curve, 32)[0]["explained_variance"] == pytest.approx(0.85)  # 32 is halfway in log
    assert at_l0(curve, 16)[0]["explained_variance"] == pytest.approx(0.8)
    assert at_l0(curve, 68)[0]["explained_variance"] == pytest.approx(0.9 + 0.1 * math.log(68 / 64) / math.log(4))
    assert at_l0(curve, 80) == {}  # more than a tenth beyond what was measured


def test_interval_is_students_t_over_seeds() -> None:
    # three values 1, 2, 3: s = 1, t(2) = 4.3027, so 4.3027 / √3
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert half_interval([1.0]) is None


def test_rows_are_sorted_and_paired_with_the_baseline_by_seed() -> None:
    points = [point("batchtopk-k8", seed, 8, 8.0, ev) for seed, ev in ((0, 0.90), (1, 0.92), (2, 0.94))]
    points += [point("other-k8", seed, 8, 8.0, ev, 50.0) for seed, ev in ((0, 0.91), (1, 0.93), (2, 0.951))]
    points += [point("mean", seed, None, 0.0, 0.0) for seed in (0, 1, 2)]
    rows = compare(points)
    assert [(row.name, row.l0) for row in rows] == [("other", 8), ("batchtopk", 8), ("mean", None)]
    best = rows[0]
    assert best.difference == pytest.approx(0.031 / 3)
    assert best.verdict == "above"  # by .010, .010, .011: seeds move both alike
    assert best.speed == pytest.approx(0.5)
    assert rows[1].difference is None
    assert rows[1].interval == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-4)


def test_verdict_needs_an_interval_that_leaves_0_out() -> None:
    assert verdict(0.01, 0.02) == "level"
    assert verdict(-0.03, 0.02) == "below"
    assert verdict(0.03, None) is None


def test_an_unknown_baseline_is_told_the_nearest() -> None:
    points = [point("batchtopk-k8", 0, 8, 8.0, 0.9), point("topk-k8", 0, 8, 8.0, 0.9)]
    with pytest.raises(ConfigError, match=r"--baseline topq: none of the learners is called so\. Did you mean 'topk'"):
        compare(points, baseline="topq")


@pytest.mark.parametrize(
    ("name", "stem"), [("topk-k16-seed0", "topk"), ("kernel-k2", "kernel"), ("a-agree-hierarchylearned", None)]
)
def test_stem_leaves_out_k_and_seed_alone(name: str, stem: str | None) -> None:
    assert stem_of(name) == (stem or name)


def test_l0s_are_numbers_above_0() -> None:
    assert numbers("16,32.5") == [16.0, 32.5]
    for text in ("", "a", "16,-1", "inf"):
        with pytest.raises(ConfigError, match="numbers above 0 are needed"):
            numbers(text)


def test_formats_hold_every_row() -> None:
    records = [vars(row) for row in compare([point("batchtopk-k8", 0, 8, 8.2, 0.9), point("topk-k8", 0, 8, 7.9, 0.8)])]
    read = list(csv.DictReader(io.StringIO(to_csv(records))))
    assert [row["name"] for row in read] == ["batchtopk", "topk"]
    assert float(read[1]["explained_variance"]) == 0.8
    lines = to_markdown(records).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| `topk` | 8 | 1 | 0.8000 | -0.1000 | – |")


def test_a_folder_without_a_finished_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished learner here"):
        read_points([tmp_path])
