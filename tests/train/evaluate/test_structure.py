"""Scores of edges, against numbers by hand and plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from train.data.batch import Batch
from train.evaluate.heldout import evaluate_heldout
from train.evaluate.structure import (
    Edges,
    density_bins,
    edges_of,
    hierarchy_scores,
    permuted,
    prefix_explained_variance,
    score_edges,
)
from train.saes import make_sae
from train.saes.batchtopk import BatchTopK
from train.saes.tree import Tree


def edges(n_parents: int, n_children: int, weight: Tensor | None = None) -> Edges:
    """Parents first; each has the next children in line."""
    count = n_parents * n_children
    parent = torch.arange(n_parents).repeat_interleave(n_children)
    weights = torch.ones(count) if weight is None else weight
    return Edges(slice(0, n_parents), slice(n_parents, n_parents + count), parent, torch.arange(count), weights)


def test_scores_of_one_parent_by_hand() -> None:
    # columns: parent, two children; the parent is on in 2 of 10 tokens, once with a child
    codes = torch.zeros(10, 3)
    codes[0] = torch.tensor([2.0, 1.0, 0.0])
    codes[1] = torch.tensor([1.0, 0.0, 0.0])
    codes[2] = torch.tensor([0.0, 1.0, 0.0])
    codes[3] = torch.tensor([0.0, 0.0, 5.0])
    scores = score_edges([codes[:4], codes[4:]], edges(1, 2))
    by_chance = 1 - 0.8 * 0.9  # densities of the children .2 and .1
    assert scores.coverage_up == pytest.approx((1 / 2 - by_chance) / (1 - by_chance))
    # child 1: once with the parent of 2; child 2: never of 1; chance .2; weights 2 and 1
    down = [(0.5 - 0.2) / 0.8, (0 - 0.2) / 0.8]
    assert scores.coverage_down == pytest.approx((2 * down[0] + down[1]) / 3)
    assert scores.r2 == pytest.approx(1.0)  # two points lie on a line
    assert scores.hcs() == pytest.approx(math.sqrt(scores.coverage_up))
    assert scores.hcs(top_down=True) == pytest.approx(math.sqrt(scores.coverage_down))
    assert (scores.n_parents, scores.dense_share) == (1, 0.0)


def test_r2_is_the_squared_correlation_over_active_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.relu(torch.randn(500, 12, generator=generator) - 0.8)
    codes[:, :3] += 0.5 * codes[:, 3:].view(500, 3, 3).sum(-1) * (codes[:, :3] > 0)
    weight = torch.rand(9, generator=generator) + 0.5
    r2, counts = [], []
    for p in range(3):
        on = codes[:, p] > 0
        a = (codes[:, 3 + 3 * p : 6 + 3 * p] * weight[3 * p : 3 * p + 3]).sum(-1)
        r2.append(np.corrcoef(codes[on, p].double(), a[on].double())[0, 1] ** 2)
        counts.append(int(on.sum()))
    scores = score_edges(codes.split(100), edges(3, 3, weight))
    assert scores.r2 == pytest.approx(float(np.average(r2, weights=counts)), rel=1e-5)


def test_a_dense_parent_counts_as_uncovered() -> None:
    codes = (torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    codes[:, 1] = codes[:, 0]
    assert score_edges([codes], edges(1, 1)).coverage_up == pytest.approx(1)
    codes[:300] = 1.0
    scores = score_edges([codes], edges(1, 1))
    assert scores.coverage_up == scores.coverage_down == 0
    assert scores.dense_share == 1


def test_children_without_a_parent_are_left_out() -> None:
    codes = torch.zeros(10, 3)
    codes[0] = 1.0
    codes[5:, 2] = 1.0
    (without,) = edges_of(torch.tensor([-1, 0, -1]), torch.ones(3), [slice(0, 1), slice(1, 3)])
    scores = score_edges([codes], without)
    assert scores.coverage_up == scores.coverage_down == pytest.approx(1)


def test_bins_hold_at_least_eight_and_everybody() -> None:
    density = torch.cat([torch.linspace(-9, -1, 37).exp(), torch.tensor([0.0, 0.9])])
    bins = density_bins(density)
    assert len(bins) > 2
    assert all(len(members) >= 8 for members in bins)
    assert torch.cat(bins).sort().values.tolist() == list(range(39))
    ends = [(float(density[members].min()), float(density[members].max())) for members in bins]
    assert all(left[1] < right[0] for left, right in pairwise(ends))


def test_latents_that_never_fire_leave_the_bins_of_the_others_as_they_are() -> None:
    density = torch.logspace(-3, -1, 40)
    sparsest, *others = density_bins(torch.cat([density, torch.zeros(8)]))
    assert set(range(40, 48)) < set(sparsest.tolist())
    assert len(others) == 4
    assert all(density[members].max() < 4.1 * density[members].min() for members in others)  # three bins at most
    (dead,) = density_bins(torch.zeros(9))
    assert dead.tolist() == list(range(9))


def test_permuted_children_stay_in_the_bin_but_leave_their_parent() -> None:
    density = torch.linspace(-9, -1, 40).exp()
    own = edges(40, 2)
    other = permuted(own, density, seed=0)
    bin_of = torch.zeros(40, dtype=torch.int64)
    for number, members in enumerate(density_bins(density)):
        bin_of[members] = number
    assert (own.parent != other.parent).all()
    assert torch.equal(bin_of[own.parent], bin_of[other.parent])
    assert torch.equal(other.parent.bincount(), own.parent.bincount())
    assert torch.equal(permuted(own, density, seed=0).parent, other.parent)


def test_a_true_hierarchy_scores_far_above_its_null() -> None:
    sae = make_sae("tree", {"d_sae": 64, "k": 8}, 64, 0, "test")
    assert isinstance(sae, Tree)
    assert sae.kappa is not None
    with torch.no_grad():  # latents read the axes
        sae.W_enc.copy_(torch.eye(64))
        sae.kappa.fill_(-50.0)
    generator = torch.Generator().manual_seed(0)
    leaves = torch.rand(2000, 1, 32, generator=generator) * (torch.rand(2000, 1, 32, generator=generator) < 0.05)
    middle = leaves.unflatten(-1, (16, 2)).sum(-1)
    batch = Batch.of(torch.cat([middle, middle, leaves], dim=-1))
    found = edges_of(sae.parent, torch.ones(64), [slice(0, 16), slice(16, 32), slice(32, 64)])
    for pair in found:
        own, null = hierarchy_scores(sae, pair, lambda: [batch])
        assert own.coverage_up == pytest.approx(1)
        assert own.r2 == pytest.approx(1, abs=1e-6)
        assert abs(null.coverage_up) < 0.05
        assert null.hcs() < 0.1


def test_prefixes_end_at_the_explained_variance_of_all() -> None:
    sae = make_sae("batchtopk", {"d_sae": 32, "k": 4}, 8, 0, "test")
    assert isinstance(sae, BatchTopK)
    with torch.no_grad():
        sae.sparsity.threshold.fill_(0.3)
    batch = Batch.of(torch.randn(100, 2, 8), valid=torch.rand(100, 2) < 0.8)
    shares = prefix_explained_variance(sae, [0, 16, 32], lambda: [batch])
    assert shares[2] == pytest.approx(evaluate_heldout(sae, [batch])["explained_variance"])
    assert shares[0] < 1e-9  # b_dec alone: at best the mean
    assert shares[1] != shares[2]
