"""A least L0 for groups: what prices do by the rule, and that a level which would starve is kept."""

from __future__ import annotations

import math

import pytest
import torch

from train.saes.floor import CHEAPEST, LevelFloor
from train.saes.sparsity import Sparsity
from train.schedule import Clock


def follow(floor: LevelFloor, l0: list[float], steps: range) -> None:
    for step in steps:
        floor.follow_(torch.tensor(l0), Clock(step, 100, 64))


def test_prices_stand_still_at_first_and_then_fall_by_the_rule() -> None:
    floor = LevelFloor([2.0, 2.0])
    follow(floor, [1.0, 8.0], range(10))
    assert floor.factor.tolist() == [1.0, 1.0]
    follow(floor, [1.0, 8.0], range(10, 13))
    # 4 log(1 / 2) is clipped at −1: three steps of 10 / 100; what is above its floor stays at 1
    assert floor.factor.tolist() == pytest.approx([math.exp(-0.3), 1.0])


def test_a_small_lack_moves_the_price_a_little() -> None:
    floor = LevelFloor([2.0])
    follow(floor, [1.9], range(11))
    assert floor.factor.item() == pytest.approx(math.exp(0.1 * 4 * math.log(1.9 / 2)), rel=1e-5)


def test_a_silent_group_ends_at_the_least_price_and_one_that_recovers_at_its_own() -> None:
    floor = LevelFloor([2.0])
    follow(floor, [0.0], range(100))
    assert floor.factor.item() == pytest.approx(CHEAPEST)
    follow(floor, [50.0], range(50, 100))
    assert floor.factor.item() == 1.0


def starving(floor: float) -> tuple[Sparsity, list[float]]:
    """After 200 steps of `joint` on two groups of which the second is ten times weaker; L0 by group."""
    sparsity = Sparsity([20, 20], 8, 16, "joint", names=("loud", "quiet"), floor=floor)
    generator = torch.Generator().manual_seed(0)
    codes: list[torch.Tensor] = []
    for step in range(200):
        u = [scale * torch.rand(64, 1, 20, generator=generator) for scale in (1.0, 0.1)]
        codes = sparsity.settle(u, [], 64, Clock(step, 200, 64))
    return sparsity, [(values > 0).sum().item() / 64 for values in codes]


def test_a_group_that_starves_in_the_joint_budget_gets_its_floor() -> None:
    without, starved = starving(0.0)
    assert starved == [8.0, 0.0]
    assert without.floor is None
    kept, l0 = starving(0.5)  # half of 4
    assert sum(l0) == 8.0
    assert l0[1] == pytest.approx(2.0, abs=0.4)
    assert kept.prices()[1] < 0.2
    assert kept.logged()["price_quiet"] == kept.prices()[1]
    assert torch.allclose(kept.threshold / kept.threshold[0], kept.prices(), rtol=0.1)


def test_calibration_keeps_the_prices() -> None:
    sparsity = starving(0.5)[0]
    prices = sparsity.prices()
    sparsity.calibrate(lambda: [[torch.rand(64, 20, generator=torch.Generator().manual_seed(1))] * 2])
    assert torch.allclose(sparsity.threshold / sparsity.threshold[0], prices)


def test_own_budgets_need_no_floor() -> None:
    assert Sparsity([20, 20], 8, 16, "budgets", floor=0.5).floor is None
