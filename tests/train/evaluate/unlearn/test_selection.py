"""The choice of latents and of their controls, by hand."""

from __future__ import annotations

import torch

from train.evaluate.unlearn.selection import Activity, choose, match

FORGET = torch.tensor([0.50, 0.10, 0.30, 0.00, 0.30, 0.20])
RETAIN = torch.tensor([0.40, 0.005, 0.009, 0.00, 0.001, 0.01])


def test_choose_takes_the_densest_below_the_threshold() -> None:
    assert choose(FORGET, RETAIN, 0.01, 2) == (2, 4)  # 0 and 5 fire too often on the other; 5 has just the threshold
    assert choose(FORGET, RETAIN, 0.009, 2) == (4, 1)
    assert choose(FORGET, RETAIN, 1.0, 3) == (0, 2, 4)


def test_choose_gives_fewer_where_fewer_fire() -> None:
    assert choose(FORGET, RETAIN, 0.01, 50) == (2, 4, 1)  # 3 never fires on the forget text
    assert choose(FORGET, RETAIN, 0.001, 50) == ()


def test_activity_adds_up() -> None:
    one = Activity(10, torch.tensor([1.0, 0.0]).double(), torch.tensor([4.0, 0.0]).double())
    other = Activity(30, torch.tensor([3.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double())
    both = one + other
    assert both.density.tolist() == [0.1, 0.0]
    assert both.mean.tolist() == [1.5, 0.0]


def test_match_draws_others_of_about_the_same_density() -> None:
    density = torch.logspace(-4, -0.5, 400)
    chosen = (30, 31, 200, 390)
    drawn = match(chosen, density, seed=0)
    assert len(set(drawn)) == 4
    assert not set(drawn) & set(chosen)
    ratios = density[list(drawn)] / density[list(chosen)]
    assert ratios.log().abs().max() < 0.5  # twenty neighbours on a grid of 400 in 8 e-foldings lie within 0.44
    assert drawn == match(chosen, density, seed=0)
    assert drawn != match(chosen, density, seed=1)


def test_match_leaves_out_the_dead_and_gives_fewer_where_there_are_few() -> None:
    assert sorted(match((0, 1), torch.tensor([0.1, 0.1, 0.0, 0.3]), seed=0)) == [3]
