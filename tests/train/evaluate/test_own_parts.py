"""The own-part score on codes whose composition is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.evaluate.own_parts import held_out_r2, own_part_score, parts_of


def codes(n: int = 4000, n_lower: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, n_lower, generator=generator) + 0.5
    return values * (torch.rand(n, n_lower, generator=generator) < 0.3)


def parts_by_threes(n_upper: int, n_lower: int) -> Tensor:
    weights = torch.zeros(n_upper, n_lower)
    for j in range(n_upper):
        weights[j, 3 * j : 3 * j + 3] = 1.0
    return weights


def test_sums_of_own_parts_score_one_and_others_nothing() -> None:
    lower, weights = codes(), parts_by_threes(8, 24)
    score = own_part_score(lower, lower @ weights.T, weights)
    assert score.n_scored == 8
    assert score.active == pytest.approx(1.0, abs=1e-6)
    assert score.balanced == pytest.approx(1.0, abs=1e-6)
    assert score.passing == 1.0
    assert score.coverage == 1.0
    # independent latents explain nothing; held-out noise of four coefficients on about 1,300 tokens is below .01
    assert score.active_null < 0.01
    assert score.balanced_null < 0.01
    # any of three parts, each on in 30 % of tokens: 1 − .7³ = .657
    assert score.coverage_null == pytest.approx(0.657, abs=0.05)


def test_codes_apart_from_their_parts_score_nothing() -> None:
    score = own_part_score(codes(), codes(n_lower=8, seed=1), parts_by_threes(8, 24))
    assert score.active < 0.01
    assert score.balanced < 0.01
    assert score.passing == 0.0


def test_only_latents_that_fire_in_both_halves_count() -> None:
    lower, weights = codes(), parts_by_threes(8, 24)
    upper = lower @ weights.T
    upper[2000:, 0] = 0.0
    assert own_part_score(lower, upper, weights).n_scored == 7
    assert own_part_score(lower, upper * 0, weights).n_scored == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_codes_may_lie_on_a_gpu() -> None:
    lower, weights = codes(), parts_by_threes(8, 24)
    there = own_part_score(lower.cuda(), (lower @ weights.T).cuda(), weights.cuda())
    assert there == own_part_score(lower, lower @ weights.T, weights)


def test_parts_are_the_eight_largest_above_zero() -> None:
    assert parts_of(torch.tensor([0.0, 0.3, 0.0, 0.9])).tolist() == [3, 1]
    assert parts_of(torch.arange(20.0)).tolist() == list(range(19, 11, -1))


def test_held_out_r2_bears_parts_that_never_fire() -> None:
    y = torch.arange(10.0, dtype=torch.float64)
    x = torch.stack([2 * y + 1, torch.zeros_like(y)], dim=1)
    halves = [torch.arange(5), torch.arange(5, 10)]
    assert held_out_r2(x, y, halves) == pytest.approx(1.0)
    assert held_out_r2(x[:, :0], y, halves) == 0.0  # no part: only the first half's mean
