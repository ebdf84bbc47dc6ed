"""Reuse of parts, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from train.evaluate.gini import gini
from train.evaluate.reuse import graphs_of_equal_degree, is_edge, is_part, mean_overlap, reuse_of


def test_figures_of_a_small_graph_by_hand() -> None:
    weights = torch.tensor(
        [
            [1.0, 1.0, 0.0, 0.05, 0.0],
            [0.0, 2.0, 2.0, 0.0, 0.0],
            [0.0, 0.0, 0.3, 0.3, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )
    # .05 is under a tenth of 1; parts: {0, 1}, {1, 2}, {2, 3}, none
    assert is_part(weights).int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0] * 5]
    found = reuse_of(weights)
    assert (found.none, found.once, found.shared) == (0.2, 0.4, 0.4)
    assert found.gini == pytest.approx(1 / 3)  # out-degrees 0 1 1 2 2: Σ|a − b| / (2 n² mean) = 20 / 60
    assert found.in_degree == 2
    first = math.exp(-2 * (1 / 2.05) * math.log(1 / 2.05) - (0.05 / 2.05) * math.log(0.05 / 2.05))
    assert found.parts == pytest.approx((first + 2 + 2) / 3)
    assert found.overlap == pytest.approx((1 / 3 + 1 / 3) / 6)


def test_edges_of_a_tree_are_all_of_them_and_of_candidates_the_parts() -> None:
    tree = torch.tensor([[1.0, 0.01, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    assert torch.equal(is_edge(tree), tree > 0)
    candidates = torch.tensor([[1.0, 0.01, 0.0, 0.0], [0.0, 2.0, 0.0, 3.0]])
    assert is_edge(candidates).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]
    assert not is_edge(torch.zeros(2, 3)).any()


def test_gini_is_0_for_equals_and_near_1_for_one() -> None:
    assert gini(torch.full((7,), 3.0)) == pytest.approx(0)
    assert gini(torch.tensor([0.0] * 9 + [5.0])) == pytest.approx(0.9)
    assert gini(torch.zeros(4)) == 0


def test_random_graphs_keep_both_degrees() -> None:
    parts = np.random.default_rng(0).random((12, 20)) < 0.2
    graphs = graphs_of_equal_degree(parts, 0)
    assert len(graphs) == 30
    for graph in graphs:
        assert np.array_equal(graph.sum(0), parts.sum(0))
        assert np.array_equal(graph.sum(1), parts.sum(1))
    assert sum(np.array_equal(graph, parts) for graph in graphs) == 0
    assert sum(np.array_equal(graphs[0], graph) for graph in graphs[1:]) == 0


def test_latents_in_families_overlap_more_than_by_chance_and_random_ones_do_not() -> None:
    families = torch.zeros(20, 50)
    for row in range(20):
        families[row, 10 * (row // 4) : 10 * (row // 4) + 10] = (
            torch.rand(10, generator=torch.Generator().manual_seed(row)) + 0.5
        )
    z = reuse_of(families).overlap_z
    assert z is not None
    assert z > 10
    drawn = (torch.rand(20, 50, generator=torch.Generator().manual_seed(0)) < 0.2).double()
    z = reuse_of(drawn).overlap_z
    assert z is not None
    assert abs(z) < 4


def test_parts_of_a_tree_cannot_overlap() -> None:
    tree = torch.eye(6).repeat_interleave(3, dim=1)
    found = reuse_of(tree)
    assert (found.none, found.once, found.shared, found.overlap) == (0, 1, 0, 0)
    assert found.overlap_z is None
    assert found.parts == pytest.approx(3)


def test_overlap_is_that_of_plain_sets() -> None:
    parts = np.random.default_rng(1).random((9, 15)) < 0.3
    sets = [set(np.flatnonzero(row)) for row in parts]
    pairs = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    assert mean_overlap(parts) == pytest.approx(sum(pairs) / len(pairs))
