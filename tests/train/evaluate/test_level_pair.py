"""All figures of a pair of levels whose relation is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from tests.train.evaluate.made_codes import codes_of, few_resamples, independent
from train.evaluate.level_pair import ADVICE, PAIR_METRICS, Figures, Pair, measure_pair

__all__ = ["few_resamples"]  # holds for every test here

N_UPPER, N_LOWER = 12, 36
UPPER, LOWER = np.arange(N_UPPER), np.arange(N_UPPER, N_UPPER + N_LOWER)


def family_weights() -> Tensor:
    """Upper latent j over lower ones 3j to 3j + 2."""
    return torch.eye(N_UPPER, dtype=torch.float64).repeat_interleave(3, dim=1)


def pair(weights: Tensor | None, made: bool = True) -> Pair:
    """Upper codes and rows are sums of their parts, or by chance."""
    values = independent(4000, N_UPPER + N_LOWER, 0.03)
    rows = torch.randn(N_UPPER + N_LOWER, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if made:
        values[:, :N_UPPER] = values[:, LOWER] @ family_weights().numpy().T
        rows /= rows.norm(dim=-1, keepdim=True)
        rows[:N_UPPER] = family_weights() @ rows[N_UPPER:]
    codes = codes_of(values)
    x = torch.from_numpy(codes.values.toarray()).double() @ rows
    return Pair.of(codes, UPPER, LOWER, weights, rows, x)


@pytest.fixture(scope="module")
def true_hierarchy() -> Figures:
    return measure_pair(pair(family_weights()))


def test_a_true_hierarchy_has_everything_and_its_nulls_nothing(true_hierarchy: Figures) -> None:
    found = true_hierarchy.values
    assert list(found) == list(PAIR_METRICS)
    ones = ["composition_score", "composition_corrected", "composition_geometric", "composition_functional"]
    ones += ["composition_r2_geometric", "composition_r2_functional", "own_part_score", "own_part_r2", "reuse_once"]
    ones += ["coverage_up", "coverage_down", "edge_r2", "hcs_up", "hcs_down"]
    for name in ones:
        assert found[name] == pytest.approx(1, abs=1e-3), name
    nulls = ["composition_null", "own_part_null", "own_part_r2_null", "nmi_null", "nmi_weighted_null", "edge_r2_null"]
    nulls += ["predictive_share_null", "hcs_up_null", "hcs_down_null", "reuse_none", "reuse_shared", "invalid_share"]
    for name in nulls:
        assert found[name] == pytest.approx(0, abs=0.07), name
    # of one part of three: (h(.03) − .0873 h(.03 / .0873)) / h(.03)
    assert found["nmi"] == pytest.approx(0.583, abs=0.04)
    assert float(found["predictive_share"] or 0) > 0.8
    assert found["reuse_parts"] == pytest.approx(3)
    assert found["reuse_in_degree"] == 3
    assert found["copied_share"] == 0  # a sum of three: cosines about .58
    for name in ("composition_score_at", "own_part_score_at"):
        assert true_hierarchy.more[name] == {"0.3": 1, "0.5": 1, "0.7": 1}
    assert true_hierarchy.more["predictive_bits_null"] < 0.1 * float(found["predictive_bits"] or 0)
    assert found["parent_density"] == pytest.approx(1 - 0.97**3, abs=0.01)
    assert true_hierarchy.reasons == {"reuse_overlap_z": "all graphs with these degrees have the same overlap"}


def test_headline_scores_have_intervals_around_them(true_hierarchy: Figures) -> None:
    expected = {"composition_score", "own_part_score", "own_part_r2", "nmi", "nmi_weighted", "predictive_bits"}
    expected |= {"predictive_share", "coverage_up", "coverage_down", "edge_r2", "hcs_up", "hcs_down"}
    assert set(true_hierarchy.intervals) == expected
    for name, (low, high) in true_hierarchy.intervals.items():
        value = true_hierarchy.values[name]
        assert value is not None
        assert low - 0.02 <= value <= high + 0.02, name


def test_without_weights_the_tree_is_found_and_reuse_is_that_of_the_regression() -> None:
    found = measure_pair(pair(None))
    assert (found.more["links"], found.more["reuse_weights"]) == ("post-hoc tree", "functional regression")
    assert found.more["edges"] == N_LOWER
    assert found.values["hcs_up"] == pytest.approx(1, abs=0.03)  # weights are φ, not all 1
    assert found.values["own_part_score"] == 1
    assert found.values["reuse_once"] == 1


def test_a_post_hoc_tree_of_unrelated_levels_scores_as_its_null() -> None:
    found = measure_pair(pair(None, made=False)).values
    for name in ("coverage_up", "coverage_down"):  # .043 up where the tree was made, too
        assert found[name] == pytest.approx(0, abs=0.03), name


def test_levels_that_have_nothing_to_do_with_each_other_score_as_their_nulls() -> None:
    found = measure_pair(pair(family_weights(), made=False)).values
    for name in (
        "composition_score",
        "own_part_score",
        "own_part_r2",
        "coverage_up",
        "coverage_down",
        "edge_r2",
        "nmi",
    ):
        assert found[name] == pytest.approx(0, abs=0.05), name
    assert found["residual_rank"] == 0


def test_edges_are_all_those_of_a_tree_and_the_parts_where_latents_are_shared() -> None:
    weak = family_weights() * torch.tensor([1.0, 1.0, 0.02], dtype=torch.float64).repeat(N_UPPER)
    assert measure_pair(pair(weak)).more["edges"] == 36  # a child that weighs little is a child
    shared = weak.clone()
    shared[0, 3] = 0.02  # a candidate of two
    assert measure_pair(pair(shared)).more["edges"] == 24


def test_too_few_latents_or_documents_are_a_reason_for_everything() -> None:
    few = pair(family_weights())
    codes = few.codes.of(np.concatenate([UPPER[:1], LOWER]))
    found = measure_pair(Pair.of(codes, np.arange(1), np.arange(1, 37), None, few.rows[: len(codes.density)], few.x))
    assert set(found.values.values()) == {None}
    assert set(found.reasons) == set(PAIR_METRICS)
    assert found.reasons["nmi"] == (
        "1 upper and 36 lower latents are alive on 80 held-out documents; 2, 8 and 4 are needed. "
        "Raise --max-tokens, or hold out more documents (train fit --held-out)."
    )
    values = independent(300, 48, 0.2)
    found = measure_pair(Pair.of(codes_of(values, document=100), UPPER, LOWER, None, few.rows, few.x[:300]))
    assert "on 3 held-out documents" in found.reasons["hcs_up"]


def test_upper_latents_without_parts_or_too_rare_to_regress_have_a_reason() -> None:
    found = measure_pair(pair(torch.zeros(N_UPPER, N_LOWER)))
    assert found.reasons["hcs_up"] == found.reasons["residual_cosine"] == "no upper latent has a part"
    assert found.values["nmi"] is not None
    values = independent(4000, 48, 0.03)
    values[:, :N_UPPER] = 0
    values[np.arange(0, 4000, 250)[:, None], UPPER] = 1.0  # 16 tokens each
    rows = pair(None).all_rows
    rare = measure_pair(Pair.of(codes_of(values), UPPER, LOWER, None, rows, torch.zeros(4000, 64)))
    reason = "0 upper latents are active on 20 tokens of each half; 2 are needed. " + ADVICE
    assert {rare.reasons[name] for name in ("composition_score", "own_part_r2", "reuse_gini")} == {reason}
    assert rare.values["nmi"] is not None


def test_only_alive_latents_are_compared_and_a_dead_parent_covers_nobody() -> None:
    whole = pair(family_weights())
    dead = np.diag(np.append(0.0, np.ones(47)))
    values = sparse.csc_array(whole.codes.values @ dead)
    values.eliminate_zeros()
    cut = Pair.of(replace(whole.codes, values=values), UPPER, LOWER, family_weights(), 2 * whole.rows, whole.x)
    assert (len(cut.upper), len(cut.lower), cut.n_upper) == (11, 36, 12)
    assert torch.equal(cut.between_alive(family_weights()), family_weights()[1:])
    assert torch.allclose(cut.rows.norm(dim=-1), torch.ones(48, dtype=torch.float64))
    found = measure_pair(cut)
    assert found.values["coverage_up"] == pytest.approx(1)
    assert found.values["coverage_down"] == pytest.approx(11 / 12, abs=0.01)
    assert found.values["own_part_score"] == 1
    assert found.values["reuse_none"] == pytest.approx(3 / 36)
