"""How parts are found and composed, and losses over them, against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.train.saes.levelled import randn
from train.saes import composition
from train.saes.composition import CoActivity
from train.saes.compositional_losses import NearestPart


def test_dense_weights_stand_at_their_candidates() -> None:
    weights, candidates = torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]])
    assert composition.dense(weights, candidates, 4).tolist() == [[0.25, 0.0, 0.75, 0.0]]


def test_composed_rows_are_normalised_sums() -> None:
    # 3·(1,0) + 4·(0,1) = (3,4), of norm 5
    rows = composition.composed_rows(torch.tensor([[3.0, 4.0]]), torch.eye(2))
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8]]))


def test_co_activity_is_the_correlation_of_firing() -> None:
    lower, upper = randn(50, 4).relu(), randn(50, 3, seed=1).relu()
    lower[:, 3] = 0.0  # never fires
    counts = CoActivity()
    counts.add(lower[:20], upper[:20])
    counts.add(lower[20:], upper[20:])
    got = counts.correlation()
    for i in range(3):
        for j in range(3):
            expected = np.corrcoef((lower[:, i] > 0).numpy(), (upper[:, j] > 0).numpy())[0, 1]
            assert got[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert got[3].tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(counts.mass, lower.sum(0))


def test_seeds_have_their_nearest_as_parts() -> None:
    # five families of four: inside one the affinity is near 1, elsewhere near 0
    family = torch.arange(20) // 4
    affinity = (family[:, None] == family).float() + 0.01 * randn(20, 20).abs()
    generator = torch.Generator().manual_seed(0)
    found, member = composition.seeds_with_overlap(affinity, torch.ones(20), 6, 8, generator)
    assert found.candidates.shape == (6, 8)
    for row, weights in zip(found.candidates, found.weights, strict=True):
        assert len(set(row.tolist())) == 8
        assert len(set(family[row[:4]].tolist())) == 1
        # 4 · 1/4 + 4 · 0.01 = 1.04 before they are scaled to sum 1
        assert weights.tolist() == pytest.approx([0.25 / 1.04] * 4 + [0.01 / 1.04] * 4, rel=1e-5)
    assert member.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert torch.allclose(softplus(found.logits()), found.weights, rtol=1e-4)


def test_seeds_are_drawn_by_mass() -> None:
    mass = torch.zeros(50)
    mass[[7, 11, 13]] = 1.0
    found, _ = composition.seeds_with_overlap(torch.eye(50), mass, 3, 4, torch.Generator().manual_seed(0))
    assert sorted(found.candidates[:, 0].tolist()) == [7, 11, 13]


def test_clusters_have_their_members_as_parts_and_their_nearest_as_candidates() -> None:
    # clusters {0, 1}, {2}, {3, 4, 5} and none
    cluster = torch.tensor([0, 0, 1, 2, 2, 2])
    affinity = torch.eye(6) + 0.1 * randn(6, 6).abs()
    found, member = composition.from_clusters(affinity, cluster, 4, 3)
    assert torch.allclose(member[0], torch.tensor([0.5, 0.5, 0, 0, 0, 0]))
    assert torch.allclose(member[2], torch.tensor([0, 0, 0, 1, 1, 1]) / 3)
    assert member[3].tolist() == [0.0] * 6
    assert set(found.candidates[0, :2].tolist()) == {0, 1}
    assert found.candidates[0, 2].item() == 2 + int((affinity[0] + affinity[1])[2:].argmax())
    assert found.weights[0].tolist() == pytest.approx([0.5 / 1.01, 0.5 / 1.01, 0.01 / 1.01])
    assert found.candidates[1, 0].item() == 2
    assert found.weights[1].tolist() == pytest.approx([1 / 1.02, 0.01 / 1.02, 0.01 / 1.02])
    assert found.weights[3].tolist() == pytest.approx([1 / 3] * 3)


def test_a_cluster_with_too_many_members_keeps_the_nearest() -> None:
    # 0 is near to all of its cluster, 3 to none but itself
    affinity = torch.eye(4)
    affinity[:3, :3] = 1.0
    found, member = composition.from_clusters(affinity, torch.zeros(4, dtype=torch.long), 1, 3)
    assert set(found.candidates[0].tolist()) == {0, 1, 2}
    assert found.weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert member[0].tolist() == [0.25] * 4


@pytest.mark.parametrize("nearest", [composition.nearest_part, composition.nearest_part_kept])
def test_the_nearest_part_is_one_of_the_four_heaviest(nearest: NearestPart) -> None:
    lower = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, -1.0], [-1.0, 0.0], [0.8, 0.6]])
    upper = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    candidates = torch.tensor([[0, 1, 3, 4, 2], [0, 2, 3, 4, 1]])
    logits = torch.tensor([[1.0, 0.5, 0.0, 0.0, -9.0], [1.0, 0.5, 0.0, 0.0, -9.0]])
    # the first has 2, which it equals, for a candidate that weighs nothing
    assert nearest(logits, candidates, lower, upper).tolist() == pytest.approx([0.8, 1.0])
    one = nearest(logits[:, :1], candidates[:, :1], lower, upper)
    assert one.tolist() == pytest.approx([0.6, 0.6])


def test_the_nearest_part_has_the_same_gradient_at_every_call() -> None:
    logits, lower, upper = randn(1500, 8), randn(50, 256).requires_grad_(), randn(1500, 256)
    candidates = torch.rand(1500, 50, generator=torch.Generator().manual_seed(0)).topk(8).indices
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # which must not add in any order
    try:
        gradients = []
        for _ in range(20):
            nearest = composition.nearest_part(logits, candidates, lower, upper)
            gradients += torch.autograd.grad(nearest.square().sum(), lower)
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_group_sparsity_agrees_with_a_slow_reference() -> None:
    upper, lower = randn(5, 1, 3).relu(), randn(5, 1, 6, seed=1).relu()
    candidates = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 4, 0]])  # nobody has 5
    logits, tau = randn(3, 3, seed=2), 0.5
    A = composition.dense(softplus(logits), candidates, 6)
    total = 0.0
    for token in range(5):
        for j in range(3):
            energy = upper[token, 0, j].item() ** 2
            for i in range(5):
                powers = [A[m, i].item() ** (1 / tau) for m in range(3)]
                energy += powers[j] / sum(powers) * lower[token, 0, i].item() ** 2
            total += math.sqrt(1e-6 + energy) - 1e-3
    got = composition.group_sparsity(upper, lower, logits, candidates, tau, 5).item()
    assert got == pytest.approx(total / 5, rel=1e-5)


def test_reassigned_keeps_old_weights_and_shuts_off_the_weakest() -> None:
    # upper 0 is nearest to 4, 3, 2; its old candidates were 0, 3, 4
    affinities = torch.tensor([[0.0, 0.9], [0.0, 0.8], [0.1, 0.7], [0.5, 0.0], [0.6, 0.0]])
    candidates, logits = torch.tensor([[0, 3, 4], [0, 1, 2]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found, values, changed = composition.reassigned(affinities, candidates, logits, left_out=0.2)
    # 3 and 4 stay where they were, since the optimizer's averages do; 2 takes the place of 0
    assert found.tolist() == [[2, 3, 4], [0, 1, 2]]
    # of six pairs one, the weakest (.1), gets no weight
    assert values.tolist() == [[composition.UNASSIGNED, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert changed.tolist() == [[True, False, False], [False, False, False]]


def test_reassigned_candidates_are_the_nearest_whatever_stood_there() -> None:
    affinities, logits = randn(12, 5), randn(5, 6, seed=1)
    candidates = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(j))[:6] for j in range(5)])
    found, values, changed = composition.reassigned(affinities, candidates, logits, left_out=0.0)
    for j in range(5):
        nearest = set(affinities[:, j].topk(6).indices.tolist())
        assert set(found[j].tolist()) == nearest
        for old, new, weight, value, moved in zip(
            candidates[j].tolist(), found[j].tolist(), logits[j].tolist(), values[j].tolist(), changed[j], strict=True
        ):
            assert bool(moved) == (old not in nearest)
            assert (new, value) == (
                (old, weight) if old in nearest else (new, pytest.approx(composition.NO_PART, rel=1e-5))
            )


def test_fitted_gains_are_the_least_squares_of_the_nested_loss() -> None:
    written, omega = randn(3, 200).abs(), (0.2, 0.3, 0.5)
    wanted = written.T @ torch.tensor([0.5, 0.3, 0.4])

    def loss(gains: Tensor) -> float:
        low, mid, high = (gains[:, None] * written).unbind()
        prefixes = (high, high + mid, high + mid + low)
        return sum(w * (wanted - p).square().sum().item() for w, p in zip(omega, prefixes, strict=True))

    best = composition.fitted_gains(written, wanted, omega)
    for level in range(3):
        for step in (-0.01, 0.01):
            moved = best.clone()
            moved[level] += step
            assert loss(moved) > loss(best)


def test_a_level_that_wrote_nothing_has_a_gain_of_one() -> None:
    written = randn(3, 200).abs()
    written[1] = 0.0
    gains = composition.fitted_gains(written, 0.5 * (written[0] + written[2]), (0.0, 0.0, 1.0))
    assert gains[1].item() == 1.0
    assert gains[[0, 2]].tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
