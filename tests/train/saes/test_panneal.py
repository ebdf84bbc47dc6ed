"""P-anneal: when p changes, that the penalty does not jump, and its slope at zero."""

from __future__ import annotations

import pytest
import torch

from train.data.batch import Batch
from train.saes import make_sae
from train.saes.panneal import PAnneal, exponent, n_changes, size
from train.schedule import Clock


def new(**options: object) -> PAnneal:
    sae = make_sae("panneal", {"d_sae": 64} | options, 16, 0, "test")
    assert isinstance(sae, PAnneal)
    return sae


def batch() -> Batch:
    return Batch.of(torch.randn(50, 1, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n_steps", [10, 500, 50_000])
def test_p_changes_ten_times_between_a_fifth_and_four_fifths(n_steps: int) -> None:
    counts = [n_changes(step, n_steps) for step in range(n_steps)]
    assert counts[0] == counts[int(0.2 * n_steps) - 1] == 0
    assert counts[-1] == counts[int(0.8 * n_steps)] == 10
    assert counts == sorted(counts)
    if n_steps > 100:
        assert set(counts) == set(range(11))
        assert counts[n_steps // 5] == 1


def test_p_goes_down_in_equal_parts() -> None:
    assert [round(exponent(changes, 0.2), 6) for changes in (0, 1, 5, 10)] == [1.0, 0.92, 0.6, 0.2]


def test_size_is_the_sum_of_powers_less_that_of_epsilon() -> None:
    latents = torch.tensor([[[0.0, 0.25, 1.0]]])
    assert float(size(latents, 1.0, 1)) == 1.25
    expected = (0.251**0.5 - 0.001**0.5) + (1.001**0.5 - 0.001**0.5)
    assert float(size(latents, 0.5, 1)) == pytest.approx(expected, rel=1e-5)


def test_penalty_does_not_jump_where_p_changes() -> None:
    sae, x = new(l1=0.02), batch()
    values = [float(sae.training_pass(x, Clock(step, 100, 50)).parts["sparsity"].detach()) for step in range(15, 100)]
    # the same batch and weights throughout: ten changes of p, one value
    assert values == pytest.approx([values[0]] * len(values), rel=1e-4)
    assert float(sae.gain) != 1.0


def test_penalty_of_small_latents_grows_against_that_of_large_ones() -> None:
    slopes = []
    for p in (1.0, 0.2):
        latents = torch.tensor([[[0.01, 0.5]]], requires_grad=True)
        size(latents, p, 1).backward()
        assert latents.grad is not None
        slopes.append(float(latents.grad[0, 0, 0] / latents.grad[0, 0, 1]))
    assert slopes[0] == 1.0
    assert slopes[1] == pytest.approx((0.011 / 0.501) ** -0.8, rel=1e-4)


def test_gradient_is_finite_at_zero() -> None:
    sae, x = new(), batch()
    sae.training_pass(x, Clock(90, 100, 50)).total.backward()
    assert sae.W_enc.grad is not None
    assert torch.isfinite(sae.W_enc.grad).all()


def test_calibration_meets_the_target_from_both_sides() -> None:
    for target in (3.0, 40.0):  # about half of the 64 are active at the start
        sae, x = new(target_l0=target), batch()
        sae.calibrate(lambda x=x: [x])
        assert float((sae.codes(x) > 0).sum()) / 50 == pytest.approx(target, abs=0.03)
