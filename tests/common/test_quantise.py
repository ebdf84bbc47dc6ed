"""int8 with two scales, against numbers worked by hand and the error they may leave."""

from __future__ import annotations

import torch

from common.quantise import LEVELS, dequantise, dimension_scales, quantise


def test_quantise_by_hand() -> None:
    # scaled by dimension: [1, -0.5], so a token scale of 1/127, and q = 127, -63.5 rounded to even
    q, token = quantise(torch.tensor([[2.0, -50.0], [0.0, 0.0]]), torch.tensor([2.0, 100.0]))
    assert q.dtype == torch.int8
    assert q.tolist() == [[127, -64], [0, 0]]
    assert torch.allclose(token, torch.tensor([1 / 127, 0.0]))
    back = dequantise(q, token, torch.tensor([2.0, 100.0]))
    assert torch.allclose(back, torch.tensor([[2.0, -100 * 64 / 127], [0.0, 0.0]]))


def test_quantise_of_a_token_that_is_not_finite_is_zero_and_spares_the_others() -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [1.0, 1.0]])
    q, token = quantise(x, torch.ones(2))
    assert q.tolist() == [[0, 0], [0, 0], [127, 127]]
    assert token[:2].tolist() == [0.0, 0.0]


def test_dimension_scales_are_root_mean_squares_with_a_floor() -> None:
    scales = dimension_scales(torch.tensor([4.0, 10000.0, 0.0], dtype=torch.float64))
    floor = 1e-2 * (10004 / 3) ** 0.5
    assert torch.allclose(scales, torch.tensor([2.0, 100.0, floor]))
    assert dimension_scales(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_quantise_error_stays_small_where_two_dimensions_are_thirty_times_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 256, generator=generator)
    x[:, :2] *= 30
    scales = dimension_scales(x.double().square().mean(0))

    def error(dimension: torch.Tensor) -> float:
        q, token = quantise(x, dimension)
        assert q.abs().max() == LEVELS
        small = (dequantise(q, token, dimension) - x)[:, 2:]
        return float(small.square().sum() / x[:, 2:].square().sum())

    assert error(scales) < 1.2e-4  # the step is 1/127 of about 3 standard deviations: 3² / 127² / 12 = 4.7e-5
    assert error(torch.ones(256)) > 5e-3  # one scale per token: what the two dimensions do to the others
