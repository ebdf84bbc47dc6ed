"""Steps of a compositional hierarchy with kept codes alone: against plain steps, in every phase."""

from __future__ import annotations

import pytest
import torch

from tests.train.saes.stepped import check_alike
from train.saes import composition
from train.saes.kept import Kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pretrain": 0.0, "copy_limit": 0.1},
        {"encoder": "no_comp"},
        {"encoder": "comp_only"},
        {"decoder": "free"},
        {"decoder": "residual"},
        {"agreement": 0.1},
        {"agreement": 0.1, "detach_lower": True},
        {"agreement": 0.1, "encoder": "no_comp", "copies": 0.0},
        {"hierarchy": "fixed_random"},
        {"nesting": (0.0, 0.0, 1.0)},
        {"nesting": (0.0, 0.5, 1.0)},
        {"nesting": (0.5, 0.0, 1.0)},
        {"k_anneal": 0.9, "window": 16},
        {"living_parts": True},
    ],
)
def test_a_step_with_kept_codes_is_the_plain_step(options: dict[str, object]) -> None:
    plain, kept = check_alike("compositional", options)
    assert isinstance(kept.output.latents, Kept)
    assert not isinstance(plain.output.latents, Kept)
    levels = plain.output.latents.split([18, 37, 73], dim=-1)
    assert all(bool((codes > 0).any()) for codes in levels)


@pytest.mark.parametrize(
    "circumstances",
    [
        {"some_invalid": False},
        {"dead": 0.0},
        {"dead": 1.0},
        {"quiet": True},
        {"progress": 0.0},  # the low level alone
        {"progress": 0.05, "dead": 0.0},
    ],
)
@pytest.mark.parametrize("decoder", ["composed", "free"])
def test_so_it_is_without_dead_latents_or_invalid_places_and_early(
    circumstances: dict[str, object], decoder: str
) -> None:
    _, kept = check_alike("compositional", {"d_sae": 131, "decoder": decoder}, **circumstances)
    assert isinstance(kept.output.latents, Kept)


@pytest.mark.parametrize(
    "options",
    [{"group": 0.01}, {"agreement": 0.1, "agree_on": "values"}, {"sparsity": "joint"}, {"sparsity": "l1"}],
)
def test_with_other_settings_all_codes_are_computed(options: dict[str, object]) -> None:
    _, kept = check_alike("compositional", options)
    assert not isinstance(kept.output.latents, Kept)


def test_a_hierarchy_is_the_same_with_its_candidates_alone() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.0], [2.0, 1.0, 3.0]])
    candidates = torch.tensor([[4, 0, 2], [1, 3, 0]])
    A = composition.dense(weights, candidates, 5)
    assert A.tolist() == [[0.25, 0, 0, 0, 0.5], [3, 2, 0, 1, 0]]
    kept = composition.kept(weights, candidates, 5)
    assert torch.equal(kept.dense()[0], A)
    rows = torch.randn(5, 4)
    assert torch.allclose(composition.composed_rows(kept, rows), composition.composed_rows(A, rows), atol=1e-6)
