"""Learners at equal L0: curves, intervals, names, formats."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from common.errors import ConfigError
from train.report.curves import at_l0
from train.report.formats import numbers, to_csv, to_markdown
from train.report.kinds import stem_of
from train.report.points import Point
from train.report.tables import compare, half_interval, verdict


def point(
    name: str, seed: int, aim: float | None, l0: float, ev: float, speed: float = 100.0, **settings: int
) -> Point:
    kind = json.dumps({"variant": stem_of(name)} | settings)
    figures = {"explained_variance": ev, "nmse": 1 - ev, "dead_share": 0.0, "dense_share": 0.1}
    return Point(name, kind, seed, aim, l0, figures, speed)


def test_figures_are_read_off_the_curve_in_log_l0() -> None:
    curve = [point("a-k16", 0, 16, 16.0, 0.8), point("a-k64", 0, 64, 64.0, 0.9)]
    assert at_l0(curve, 32)[0]["explained_variance"] == pytest.approx(0.85)  # 32 is halfway in log
    assert at_l0(curve, 16)[0]["explained_variance"] == pytest.approx(0.8)
    assert at_l0(curve, 32)[0]["l0"] == 32
    assert at_l0(curve, 80) == {}  # more than a tenth beyond what was measured


def test_figures_beyond_a_curve_are_those_of_its_end() -> None:
    curve = [point("a-k16", 0, 16, 16.0, 0.8), point("a-k64", 0, 64, 64.0, 0.9)]
    beyond = at_l0(curve, 68)[0]
    assert beyond["explained_variance"] == pytest.approx(0.9)
    assert beyond["l0"] == 64


def test_points_of_practically_one_l0_are_merged() -> None:
    curve = [point("a-k2", 0, 2, 3.0, 0.5), point("a-k3", 0, 3, 3.01, 0.6), point("a-k12", 0, 12, 12.0, 0.8)]
    below = at_l0(curve, 2.8)[0]  # the line through the lower two would give -1.5 here
    assert below["explained_variance"] == pytest.approx(0.55)
    assert below["l0"] == pytest.approx(3.005)
    halfway = at_l0(curve, math.sqrt(3.005 * 12))[0]
    assert halfway["explained_variance"] == pytest.approx((0.55 + 0.8) / 2)


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
    said = r"--baseline topq: none of the learners is called so; give one of them with --baseline\. Did you mean 'topk'"
    with pytest.raises(ConfigError, match=said):
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
    assert lines[3].startswith("| `topk` | 8 | 7.9 | 1 | 0.8000 | -0.1000 | 1 | – |")


def seeds_of(name: str, aim: float, l0: float, ev: float, **settings: int) -> list[Point]:
    return [point(name, seed, aim, l0, ev + 0.001 * seed, 100.0, **settings) for seed in (0, 1)]


@pytest.mark.parametrize(("l0", "expected"), [(3.05, "above"), (3.13, None)])
def test_single_points_get_a_verdict_only_at_equal_l0(l0: float, expected: str | None) -> None:
    best, base = compare(seeds_of("other-k3", 3, l0, 0.9) + seeds_of("batchtopk-k3", 3, 3.0, 0.8))
    assert (best.l0, best.measured_l0, best.verdict) == (3, l0, expected)
    assert (base.l0, base.measured_l0, base.verdict) == (3, 3.0, None)
    assert best.difference == pytest.approx(0.1)


def test_interpolated_figures_get_a_verdict_against_a_point_at_that_l0() -> None:
    points = seeds_of("other-k2", 2, 2.5, 0.8) + seeds_of("other-k4", 4, 4.5, 0.9)
    rows = compare(points + seeds_of("batchtopk-k3", 3, 3.0, 0.7), [3])
    assert [(row.name, row.measured_l0, row.verdict) for row in rows] == [
        ("other", 3, "above"),
        ("batchtopk", 3, None),
    ]


def test_seeds_of_the_difference_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    points = seeds_of("other-k8", 8, 8.0, 0.9) + seeds_of("batchtopk-k8", 8, 8.0, 0.8)
    points += [point("batchtopk-k8", 2, 8, 5.0, 0.7)]
    other, base = compare(points)
    assert (other.seeds, other.paired_seeds, base.seeds, base.paired_seeds) == (2, 2, 2, 0)
    assert "batchtopk: left out at L0 8: seed 2 (measured L0 5 to 8)" in capsys.readouterr().err
    alone = compare([point for point in points if point.name == "batchtopk-k8" or point.seed == 0])[0]
    assert (alone.name, alone.seeds, alone.paired_seeds) == ("other", 1, 1)


def test_an_l0_that_no_learner_comes_near_is_refused_with_those_measured() -> None:
    points = seeds_of("batchtopk-k8", 8, 8.2, 0.9) + seeds_of("batchtopk-k16", 16, 16.5, 0.9)
    with pytest.raises(ConfigError, match=r"L0 500: no learner .*\(batchtopk: measured L0 8\.2 to 16\.5\)"):
        compare(points, [8, 500])
    with pytest.raises(ConfigError, match=r"L0 8: no learner .*measured L0 3 to 3"):
        compare(seeds_of("batchtopk-k8", 8, 3.0, 0.9))


def test_an_ambiguous_baseline_is_refused_with_what_differs() -> None:
    points = seeds_of("batchtopk-k8", 8, 8.0, 0.9, batch_size=256) + seeds_of(
        "batchtopk-k8", 8, 8.0, 0.8, batch_size=512
    )
    with pytest.raises(ConfigError, match=r"batchtopk-1 → batchtopk-2: batch_size: 256 → 512\. Choose one"):
        compare(points)
    rows = compare(points, baseline="batchtopk-2")
    assert [(row.name, row.difference) for row in rows] == [("batchtopk-1", pytest.approx(0.1)), ("batchtopk-2", None)]
