"""The own-part score on codes whose composition is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from train.evaluate.own_parts import OwnPartScore, own_part_score, parts_of


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
    assert score.passing_null == 0.0
    # independent latents explain nothing; held-out noise of four coefficients on about 1,300 tokens is below .01
    assert score.active_null < 0.01
    assert score.balanced_null < 0.01


def test_share_that_passes_another_level() -> None:
    y2, error2 = torch.ones(4, dtype=torch.float64), torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    terms = torch.stack([error2, y2, 0 * y2, y2], dim=-1)[None]  # R² .2, .4, .6, .8
    score = OwnPartScore(4, 0, 0, 0, 0, 0, 0, terms)
    assert [score.passing_at(level) for level in (0.3, 0.5, 0.7)] == [0.75, 0.5, 0.25]


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


def test_parts_are_the_eight_largest_of_those_above_a_tenth_of_the_largest() -> None:
    lower = np.arange(100, 120)
    assert parts_of(torch.tensor([[0.2, 0.3, 0.05, 0.9]]), lower[:4]).tolist() == [[103, 101, 100, -1]]
    assert parts_of(torch.tensor([[0.0, 0.3, 0.0, 0.9]]), lower[:4]).tolist() == [[103, 101, -1, -1]]
    assert parts_of(torch.arange(20.0)[None], lower).tolist() == [list(range(119, 111, -1))]
