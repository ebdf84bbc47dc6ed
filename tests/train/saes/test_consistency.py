"""Losses that ask two levels to agree, against hand-worked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.saes.trees import D
from train.saes.consistency import family_loss, kl_loss, l2_loss


def test_l2_looks_at_active_pairs_and_moves_the_aggregate_a_quarter() -> None:
    f = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    a = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    loss = l2_loss(f, a)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * (2 - 1) ** 2 / (2**2 + 1**2))
    assert f.grad is not None
    assert a.grad is not None
    assert f.grad.flatten().tolist() == pytest.approx([2 * (2 - 1) / 5, 0])
    assert a.grad.flatten().tolist() == pytest.approx([0.25 * 2 * (1 - 2) / 5, 0])


def test_kl_is_that_of_the_shares_over_tokens_with_both() -> None:
    f = torch.tensor([[[3.0, 1.0]], [[5.0, 0.0]], [[0.0, 0.0]]])
    a = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    only = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_loss(f, a).item() == pytest.approx(1.25 * only, rel=1e-5)


def test_kl_of_a_latent_whose_aggregate_is_silent_is_the_floor() -> None:
    f, a = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert kl_loss(f, a).item() == pytest.approx(1.25 * -math.log(1e-3 / 2), rel=1e-5)


@pytest.mark.parametrize("loss", [l2_loss, kl_loss])
def test_consistency_gains_nothing_by_size_or_silence(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    f, a = torch.relu(torch.randn(2, 30, 1, 8)).unbind()
    assert torch.allclose(loss(7 * f, 7 * a), loss(f, a), rtol=1e-4)
    silent = torch.zeros_like(f, requires_grad=True)
    value = loss(silent, a)
    value.backward()
    assert value.item() == 0
    assert silent.grad is not None
    assert torch.isfinite(silent.grad).all()


def test_family_loss_equals_the_distance_in_activation_space() -> None:
    f = torch.relu(torch.randn(10, 1, 3))
    shares = torch.relu(torch.randn(10, 1, 3, 2))
    rows, child_rows = torch.randn(3, D), torch.randn(3, 2, D)
    own = f[..., None] * rows
    children = torch.einsum("btpc,pcd->btpd", shares, child_rows)
    on = (f > 0)[..., None]
    apart = ((own - children).square() * on).sum()
    energy = ((own.square() + children.square()) * on).sum()
    assert family_loss(f, shares, rows, child_rows).item() == pytest.approx(float(apart / energy), rel=1e-4)


def test_family_loss_is_float32_under_autocast() -> None:
    values = (torch.rand(50, 1, 3), torch.rand(50, 1, 3, 2), torch.randn(3, D), torch.randn(3, 2, D))
    exact = family_loss(*values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family_loss(*values), exact)
