"""Score, area and front of sweeps worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from train.evaluate.unlearn.score import area, best, front, relative, score_interval

FORGET = torch.tensor([0.1, 0.4, 0.6, 0.2, -0.3])
RETAIN = torch.tensor([-0.01, 0.01, 0.03, 0.02, 0.0])


def test_best_is_the_largest_rise_that_is_allowed() -> None:
    assert best(FORGET, RETAIN) == pytest.approx(0.4)
    assert best(FORGET, RETAIN, 0.0) == pytest.approx(0.1)
    assert best(FORGET, RETAIN, 1.0) == pytest.approx(0.6)


def test_best_is_zero_where_nothing_rises_or_nothing_is_allowed() -> None:
    assert best(FORGET, RETAIN + 1) == 0
    assert best(-FORGET.abs(), RETAIN) == 0
    assert math.isnan(best(FORGET * torch.nan, RETAIN))


def test_area_is_the_mean_of_the_steps() -> None:
    # 0.1 up to 1 %, 0.4 up to 3 %, then 0.6 to 5 %
    assert area(FORGET, RETAIN) == pytest.approx((0.1 * 0.01 + 0.4 * 0.02 + 0.6 * 0.02) / 0.05)
    assert area(FORGET, RETAIN + 1) == 0


def test_front_holds_what_nothing_beats() -> None:
    assert front(FORGET.tolist(), RETAIN.tolist()) == [0, 1, 2]
    assert front([1.0, 1.0, 2.0], [0.5, 0.5, 0.5]) == [2]
    assert front([], []) == []


def test_relative_is_over_the_unchanged_model() -> None:
    assert relative(torch.tensor([2.0, 3.0, 1.0])).tolist() == [0.5, -0.5]


def test_interval_of_equal_documents_is_the_score_alone() -> None:
    forget = torch.tensor([[10.0, 12.0, 15.0]]).repeat(20, 1).double()
    retain = torch.tensor([[10.0, 10.0, 11.0]]).repeat(20, 1).double()
    assert score_interval(forget, retain) == pytest.approx((0.2, 0.2))


def test_interval_is_wider_than_a_point_when_documents_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = 10 + torch.rand(40, 1, generator=generator).double()
    forget = torch.cat([clean, clean * (1.2 + 0.2 * torch.rand(40, 1, generator=generator))], 1)
    interval = score_interval(forget, torch.cat([clean, clean], 1))
    assert interval is not None
    low, high = interval
    assert low < float(forget.sum(0)[1] / forget.sum(0)[0]) - 1 < high
    assert 0.005 < high - low < 0.1


def test_interval_resamples_each_text_by_itself() -> None:
    # two documents that rise by .1 and .3: one draw in four has twice the first, one in four twice the second
    forget = torch.tensor([[10.0, 11.0], [10.0, 13.0]]).double()
    many = torch.ones(50, 2).double()
    assert score_interval(forget, many) == pytest.approx((0.1, 0.3))
    assert score_interval(many * torch.tensor([1.0, 1.2]), torch.ones(2, 2).double()) == pytest.approx((0.2, 0.2))


def test_interval_needs_two_documents_of_each_text() -> None:
    one, two = torch.ones(1, 2).double(), torch.ones(2, 2).double()
    assert score_interval(one, two) is None
    assert score_interval(two, one) is None
