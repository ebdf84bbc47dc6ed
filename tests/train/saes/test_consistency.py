"""Losses that ask two levels to agree, against hand-worked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.saes.trees import MIDDLE, D, tokens, tree, uneven
from train.data.batch import Batch
from train.saes.consistency import coverage_loss, family_loss, kl_loss, l2_loss, wanting
from train.saes.forest import LEAF, MID, TOP


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


def test_coverage_is_the_share_of_what_has_no_aggregate() -> None:
    f = torch.tensor([[[3.0, 1.0]], [[0.0, 4.0]]], requires_grad=True)
    a = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]])
    short = torch.tensor([[[0.5, 9.0]], [[9.0, 0.25]]], requires_grad=True)
    loss = coverage_loss(f, a, short)
    loss.backward()
    # 3 and 4 of 8 are alone; they are .5 and .25 short, weighted by themselves
    assert loss.item() == pytest.approx(7 / 8 + 0.25 * (3 * 0.5 + 4 * 0.25) / 8)
    assert f.grad is not None
    assert short.grad is not None
    # of 7 / 8: by what is alone (8 − 7) / 64, by the rest −7 / 64; in all f · gradient = 0, so size gains nothing
    assert f.grad.flatten().tolist() == pytest.approx([1 / 64, -7 / 64, 1 / 64, 1 / 64])
    assert float((f.detach() * f.grad).sum()) == pytest.approx(0, abs=1e-7)
    assert short.grad.flatten().tolist() == pytest.approx([0.25 * 3 / 8, 0, 0, 0.25 * 4 / 8])


def test_coverage_of_silence_is_nothing_and_of_covered_codes_too() -> None:
    f, short = torch.relu(torch.randn(30, 1, 8)), torch.ones(30, 1, 8)
    silent = torch.zeros_like(f, requires_grad=True)
    value = coverage_loss(silent, f, short)
    value.backward()
    assert value.item() == 0
    assert silent.grad is not None
    assert torch.isfinite(silent.grad).all()
    assert coverage_loss(f, torch.ones_like(f), short).item() == 0
    assert coverage_loss(f, torch.zeros_like(f), 0 * short).item() == pytest.approx(1)


@pytest.mark.parametrize("orientation", ["bottom_up", "top_down"])
def test_what_is_wanting_is_how_far_the_best_of_the_others_is_from_active(orientation: str) -> None:
    sae, batch = tree(16, orientation=orientation, coverage=0.03), Batch.of(tokens(20))
    uneven(sae)
    levels = sae.encoded(batch, MIDDLE)
    for place, level in enumerate(sae.order[1:]):
        source = sae.order[place]
        active = levels.codes[source][levels.codes[source] > 0].mean()
        first, theirs = sae.forest.spans[level].start, sae.forest.spans[source].start
        for latent in range(sae.forest.sizes[level]):
            if orientation == "bottom_up":
                others = [c - theirs for c in range(16) if int(sae.parent[c]) == first + latent]
            else:
                others = [int(sae.parent[first + latent]) - theirs]
            best = levels.raw[source][..., others].amax(-1)
            expected = (sae.sparsity.threshold[place] - best).clamp_min(0) / active
            assert torch.allclose(wanting(sae, levels, level)[..., latent], expected, atol=1e-6)


def test_coverage_raises_children_that_are_below_zero() -> None:
    sae = tree(16, coverage=1.0, l2=0.0, kl=0.0)
    spans = sae.forest.spans
    with torch.no_grad():
        sae.sparsity.threshold.fill_(0.1)
        sae.b_enc[spans[LEAF]] = -9.0
        sae.b_enc[spans[LEAF].start] = 9.0  # what the leaves have to give is given by one
        sae.b_enc[spans[TOP]] = -9.0
    sae.training_pass(Batch.of(tokens()), MIDDLE).parts["coverage"].backward()
    assert sae.b_enc.grad is not None
    raised = sae.b_enc.grad[spans[LEAF]] < 0
    assert raised[2:].sum() >= 3  # of the two leaves of each middle latent that fires the better one, token by token
    assert not raised[1]  # its sibling is active
    assert (sae.b_enc.grad[spans[MID]][1:] > 0).all()


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
