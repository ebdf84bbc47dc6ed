"""Mutual information of two binary variables against joint distributions worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from train.evaluate.information import entropy, mutual_information


def counts(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_entropy_in_bits() -> None:
    # a quarter: ¼·2 + ¾·log2(4/3)
    expected = [0.0, 0.25 * 2 + 0.75 * math.log2(4 / 3), 1.0, 0.0]
    assert entropy(counts(0, 25, 50, 100), 100).tolist() == pytest.approx(expected)


def test_information_of_a_known_joint() -> None:
    # cells of 100: both 30, first alone 10, second alone 20, neither 40; marginals .4 and .5
    cells = ((0.3, 0.4 * 0.5), (0.1, 0.4 * 0.5), (0.2, 0.6 * 0.5), (0.4, 0.6 * 0.5))
    by_hand = sum(seen * math.log2(seen / due) for seen, due in cells)
    bias = 1 / (2 * 100 * math.log(2))
    assert float(mutual_information(counts(30), counts(40), counts(50), 100)) == pytest.approx(by_hand - bias)


def test_equal_variables_tell_their_entropy() -> None:
    told = mutual_information(counts(2500), counts(2500), counts(2500), 10_000)
    assert float(told) == pytest.approx(float(entropy(counts(2500), 10_000)), abs=1e-3)


def test_opposite_variables_tell_as_much() -> None:
    assert float(mutual_information(counts(0), counts(500), counts(500), 1000)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("both", "first", "second"), [(0, 0, 0), (100, 100, 100), (40, 100, 40), (20, 40, 50)])
def test_constant_and_independent_variables_tell_nothing(both: int, first: int, second: int) -> None:
    assert float(mutual_information(counts(both), counts(first), counts(second), 100)) == 0.0


def test_bias_of_independent_draws_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(200, 4000, generator=generator) < share for share in (0.3, 0.5))
    both, first, second = ((values.sum(0)).double() for values in (a & b, a, b))
    told = mutual_information(both, first, second, 200)
    # uncorrected its mean is .0036 bits; less it and clipped at 0, about half of that is left
    assert float(told.mean()) < 0.0025
