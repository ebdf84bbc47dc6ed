"""Scores of edges by document, against dense sums and plain loops; directions of edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.codes import Codes
from train.evaluate.coverage import copied_share, edge_directions, edge_sums_by_document, parent_densities
from train.evaluate.structure import Edges, edge_sums, permuted, score_edges

N_UPPER, N_LOWER = 12, 30


def shared_parts(weights: Tensor) -> Edges:
    """Edges of weights [upper, lower] above 0: a lower latent may have several parents."""
    parent, child = weights.nonzero().T
    return Edges(slice(0, N_UPPER), slice(N_UPPER, N_UPPER + N_LOWER), parent, child, weights[parent, child])


def random_weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(N_UPPER, N_LOWER, generator=generator, dtype=torch.float64)
    return values * (torch.rand(N_UPPER, N_LOWER, generator=generator) < 0.2)


def example() -> Codes:
    """Upper latents follow their parts in half of the cases."""
    values = independent(2000, N_UPPER + N_LOWER, 0.06)
    sums = values[:, N_UPPER:] @ random_weights().numpy().T
    values[:, :N_UPPER] += sums * (np.random.default_rng(1).random(sums.shape) < 0.5)
    return codes_of(values)


def test_sums_by_document_add_up_to_those_of_the_dense_codes() -> None:
    codes, edges = example(), shared_parts(random_weights())
    found = edge_sums_by_document(codes, edges)
    dense = torch.from_numpy(codes.values.toarray())
    assert len(found.by_document) == 40
    for name, values in edge_sums(dense, edges).items():
        assert found.named(found.by_document.sum(0))[name].numpy() == pytest.approx(values.numpy()), name
    one = edge_sums(dense[codes.document == 7], edges)
    assert found.named(found.by_document[7])["fa"].numpy() == pytest.approx(one["fa"].numpy())
    assert vars(found.scores()) == pytest.approx(vars(score_edges([dense], edges)))


def test_scores_of_shared_parts_are_those_of_plain_loops() -> None:
    codes, weights = example(), random_weights()
    scores = edge_sums_by_document(codes, shared_parts(weights)).scores()
    f = codes.values.toarray().astype(np.float64)
    on, density = f > 0, (f > 0).mean(0)
    ups, downs, plain_up = [], [], []
    for p in range(N_UPPER):
        children = np.flatnonzero(weights[p]) + N_UPPER
        valid = density[p] <= 0.2
        chance = 1 - np.prod(1 - density[children])
        covered = on[on[:, p]][:, children].any(1).mean()
        ups.append(((covered - chance) / (1 - chance) * valid, on[:, p].sum()))
        plain_up.append(ups[-1][0])
        for c in children:
            downs.append(((on[on[:, c], p].mean() - density[p]) / (1 - density[p]) * valid, on[:, c].sum()))
    assert scores.coverage_up == pytest.approx(weighted(ups))
    assert scores.coverage_down == pytest.approx(weighted(downs))
    assert scores.plain_up == pytest.approx(np.mean(plain_up))
    assert 0.05 < scores.coverage_up < 0.9


def weighted(pairs: list[tuple[float, float]]) -> float:
    """Mean of values with weights."""
    return float(sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs))


def test_intervals_hold_the_score_and_the_null_is_below() -> None:
    codes, edges = example(), shared_parts(random_weights())
    found = edge_sums_by_document(codes, edges)
    up, r2 = found.intervals(lambda scores: [scores.coverage_up, scores.r2])
    assert up is not None
    assert r2 is not None
    assert up[0] < found.scores().coverage_up < up[1]
    assert r2[0] < found.scores().r2 < r2[1]
    null = edge_sums_by_document(codes, permuted(edges, torch.from_numpy(codes.density[:N_UPPER]), 0)).scores()
    assert null.coverage_up < up[0]
    assert null.r2 < r2[0]


def test_copies_are_parents_with_a_row_like_that_of_a_child() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.96, 0.28], [0.6, 0.8], [0.28, 0.96]])
    parents, children = slice(0, 2), slice(2, 5)
    ends = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    edges, both = Edges(parents, children, *ends, torch.ones(3)), np.arange(2)
    assert copied_share(rows, edges, both) == 0.5  # .96 and .6; .8
    assert copied_share(rows, Edges(parents, children, ends[0], torch.tensor([0, 1, 2]), torch.ones(3)), both) == 1
    assert copied_share(rows, edges, both[1:]) == 0
    assert np.isnan(copied_share(rows, edges, both[:0]))


def test_parent_densities_count_edges() -> None:
    values = np.zeros((100, 4))
    values[:30, 0] = 1  # too dense
    values[:10, 1] = 1
    codes = codes_of(values)
    edges = Edges(slice(0, 2), slice(2, 4), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.ones(3))
    assert parent_densities(codes, edges) == pytest.approx(((0.3 + 0.1 + 0.1) / 3, 1 / 3))


def test_an_edge_between_directions_passes_and_one_apart_does_not() -> None:
    # latents: parent 0 and child 1 of one family, parent 2 and child 3 that fire apart; then six more rows
    generator = np.random.default_rng(0)
    on = np.zeros((600, 4), dtype=bool)
    on[:, 0] = np.arange(600) % 4 == 0
    on[:, 1] = on[:, 0] & (np.arange(600) % 8 == 0)
    on[:, 2], on[:, 3] = generator.random(600) < 0.1, generator.random(600) < 0.1
    rows = torch.eye(10, dtype=torch.float64)
    rows[1] = (rows[0] + rows[1]) / 2**0.5
    # the child's tokens hold both directions, more of each than the parent's others do
    x = torch.from_numpy(on.astype(np.float64)) @ rows[:4] + 0.01 * torch.from_numpy(generator.normal(size=(600, 10)))
    edges = Edges(slice(0, 3), slice(1, 4), torch.tensor([0, 2]), torch.tensor([0, 2]), torch.ones(2))
    codes = codes_of(on.astype(float), document=1)  # documents of one token: halves are even and odd ones
    order = np.argsort(np.arange(600) % 2, kind="stable")
    found = edge_directions(codes, edges, x[torch.from_numpy(order)], rows[:4], rows)
    assert found.residual[0] == pytest.approx(2**-0.5, abs=0.01)  # d* is the child's row
    # 2 and 3 are apart: d* = row 3 less row 2, and less half of it where both fire
    assert found.residual[1] < -0.5
    assert found.ranked.tolist() == [True, False]


def test_edges_that_cannot_be_judged_are_left_out() -> None:
    values = np.zeros((100, 3))
    values[:20, 0] = values[:20, 1] = 1  # never the parent without the child
    values[:5, 2] = 1  # a child on five tokens
    edges = Edges(slice(0, 1), slice(1, 3), torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2))
    found = edge_directions(codes_of(values), edges, torch.randn(100, 4), torch.eye(4)[:3], torch.eye(4))
    assert len(found.residual) == 0
