"""Groups of latents with the kept codes alone: choosing, thresholds, and whole steps against plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.saes.stepped import check_alike, stepped, whole
from tests.train.saes.test_contract import new_sae
from tests.train.saes.test_kept import gradient, kept_of, random, some_codes
from train.saes.grouped import aux_k_kept, choose_by_group, chooses_places, note_by_group, part_of, through
from train.saes.kept import Kept
from train.saes.parts import aux_k_loss
from train.saes.places import keep_top_k, keep_top_k_of
from train.saes.sparsity import Mode, Sparsity
from train.schedule import Clock

SIZES = (7, 13, 20)
CLOCK = Clock(50, 100, 24)


def sparsity_of(mode: Mode, **options: Any) -> Sparsity:
    sparsity = Sparsity(SIZES, 6, 16, mode, shares=(0.5, 0.2, 0.3), **options)
    sparsity.threshold.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return sparsity


@pytest.mark.parametrize("mode", ["budgets", "joint"])
def test_groups_keep_what_sparsity_keeps_and_move_its_thresholds(mode: Mode) -> None:
    ours, theirs, u = sparsity_of(mode), sparsity_of(mode), random(24, 40)
    places = choose_by_group(ours, 24, CLOCK)(u)
    kept = Kept(u[places.row, places.column], places, (1, 24, 40))
    note_by_group(ours, kept, CLOCK)
    groups = u[None].relu().split(SIZES, dim=-1)
    first = [theirs.active(part, group, 24, CLOCK) for group, part in enumerate(groups)]
    assert torch.equal(kept.dense(), torch.cat(theirs.settle(groups, first, 24, CLOCK), dim=-1))
    assert torch.equal(ours.threshold, theirs.threshold)
    assert not torch.equal(ours.threshold, sparsity_of(mode).threshold)
    assert len(kept.values) == 24 * 6


def test_places_are_chosen_without_gradients_where_prices_are_alike() -> None:
    assert chooses_places(sparsity_of("budgets", weights=(1.0, 2.0, 3.0)))
    assert chooses_places(sparsity_of("joint"))
    assert not chooses_places(sparsity_of("joint", weights=(1.0, 2.0, 3.0)))
    assert not chooses_places(sparsity_of("joint", floor=0.5))
    assert not chooses_places(sparsity_of("l1"))


def test_a_product_in_a_sum_gets_its_gradients_from_the_places() -> None:
    u, left, right, back = random(24, 40), random(24, 3, seed=1), random(3, 40, seed=2), random(24, 40, seed=3)
    left, right = left.requires_grad_(), right.requires_grad_()
    places = [keep_top_k(u, 5), keep_top_k_of(u, torch.arange(40) % 3 == 0, 2)]
    row, column = (torch.cat([getattr(each, name) for each in places]) for name in ("row", "column"))
    taken = u[row, column].requires_grad_()
    values = through(taken, left, right, places)
    assert torch.equal(values, taken)
    (values * back[row, column]).sum().backward()
    theirs = left.detach().clone().requires_grad_(), right.detach().clone().requires_grad_()
    ((theirs[0] @ theirs[1])[row, column] * back[row, column]).sum().backward()
    assert torch.allclose(gradient(left), gradient(theirs[0]), atol=1e-5)
    assert torch.allclose(gradient(right), gradient(theirs[1]), atol=1e-5)
    assert torch.equal(gradient(taken), back[row, column])


@pytest.mark.parametrize("place", [slice(0, 7), slice(7, 20), slice(20, 40), slice(0, 40)])
def test_a_part_of_the_latents_is_that_of_the_dense_codes(place: slice) -> None:
    codes, back = some_codes(), random(1, 24, 40, seed=3)
    codes[..., 8:19] = 0.0
    kept = kept_of(codes)
    part = part_of(kept, place)
    assert torch.equal(part.dense(), codes[..., place])
    (part.dense() * back[..., place]).sum().backward()
    expected = torch.zeros_like(codes)
    expected[..., place] = back[..., place]
    assert torch.equal(gradient(kept.values), expected[codes > 0])


def test_aux_k_of_kept_codes_is_that_of_all() -> None:
    u, W_dec, residual = random(1, 24, 40).relu(), random(40, 6, seed=1), random(1, 24, 6, seed=2)
    dead, valid = torch.zeros(40, dtype=torch.bool), torch.ones(1, 24, dtype=torch.bool)
    assert float(aux_k_kept(residual, None, dead, W_dec, valid)) == 0
    dead[[3, 8, 22, 39]] = True
    places = keep_top_k_of(u[0], dead, 3)
    of_dead = Kept(u[0][places.row, places.column], places, (1, 24, 40))
    assert torch.allclose(
        aux_k_kept(residual, of_dead, dead, W_dec, valid), aux_k_loss(residual, u, dead, W_dec, valid), rtol=1e-5
    )


def cases() -> list[Any]:
    """Settings under which steps keep few codes from selection on."""
    options: dict[str, list[dict[str, object]]] = {
        "contrastive": [
            {},
            {"high_weight": 0.0, "buffer": 0},
            {"lambda_c": 0.0, "k_high": 1},
            {"loss": "difference", "freeze_b_dec": 0.5, "k_anneal": 0.9},
            {"positives": "multi", "symmetric": True, "density_penalty": 1.0, "density_cap": 0.05},
            {"centred": True, "positives": "shuffled"},
            {"key_momentum": 0.9, "density_limit": 1.0, "similarity": "dot", "same_document": False},
            {"sparsity": "joint"},
        ],
        "relational": [
            {},
            {"joint": True, "position_gate": True, "gate_penalty": 0.1},
            {"memory": "lags", "context_as": "input", "decoder_reads": "all"},
            {"memory": "lags", "temporal_share": 0.5, "k_anneal": 0.9},
            {"attention": "prefix", "no_position": True, "decoder_rank": 8},
            {"attention": "softmax", "no_gate": True, "temporal_share": 1.0},
            {"no_attention": True},
            {"no_attention": True, "no_position": True},
            {"no_dec_temporal": True},
        ],
        "multiscale": [
            {},
            {"sparsity": "budgets", "token_weights": True, "kernel": 4, "lambda_decorrelation": 0.5},
            {"causal": False, "k_anneal": 0.9},
            {"convolution": "none", "lambda_sep": 0.0},
            {"dilations": (3,), "lambda_decorrelation": 0.5},
            {"dilations": (1, 3, 5), "lambda_scale": 0.0},
        ],
    }
    return [(variant, each) for variant, several in options.items() for each in several]


@pytest.mark.parametrize(("variant", "options"), cases(), ids=str)
def test_a_step_with_the_kept_codes_is_the_plain_one(variant: str, options: dict[str, object]) -> None:
    _, kept = check_alike(variant, options)
    assert isinstance(kept.output.latents, Kept)


@pytest.mark.parametrize("variant", ["contrastive", "relational", "multiscale"])
@pytest.mark.parametrize(
    "circumstances", [{"dead": 0.0}, {"some_invalid": False}, {"progress": 0.0}, {"quiet": True}], ids=str
)
def test_so_it_is_without_dead_latents_or_gaps_and_at_the_start(variant: str, circumstances: dict[str, object]) -> None:
    check_alike(variant, {}, **circumstances)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("contrastive", {"sparsity": "l1"}),
        ("contrastive", {"head": "learned"}),
        ("multiscale", {"sparsity": "l1"}),
        ("multiscale", {"convolution": "mixture"}),
    ],
    ids=str,
)
def test_other_settings_find_all_codes_first(variant: str, options: dict[str, object]) -> None:
    step = stepped(new_sae(variant, **options), sparse=True)
    assert isinstance(step.output.latents, Tensor)
    assert (whole(step.output.latents) > 0).any()
