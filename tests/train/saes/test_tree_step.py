"""Steps of a tree with kept codes alone: against plain steps, under every option and in every circumstance."""

from __future__ import annotations

import pytest

from tests.train.saes.stepped import check_alike
from train.saes.kept import Kept

DOWN, WIDE, ALONE = {"orientation": "top_down"}, {"shape": "fanout"}, {"coverage": 0.03}


@pytest.mark.parametrize(
    "options",
    [
        {},
        DOWN,
        WIDE,
        DOWN | WIDE,
        {"gate": "hard"},
        {"gate": "hard"} | DOWN | WIDE,
        {"no_enc_skip": True},
        {"no_enc_skip": True} | DOWN,
        {"no_dec_skip": True},
        {"kappa": 0.0},
        {"kappa": 0.0, "l2": 0.0, "kl": 0.0},
        {"nesting": (0.0, 0.0, 1.0)},
        {"k_anneal": 0.9, "window": 16},
        ALONE,
        ALONE | DOWN | WIDE,
        ALONE | {"kappa": 0.0, "l2": 0.0, "kl": 0.0},
        ALONE | {"no_enc_skip": True} | DOWN,
        ALONE | {"gate": "hard", "no_enc_skip": True, "no_dec_skip": True} | WIDE,
    ],
)
def test_a_step_with_kept_codes_is_the_plain_step(options: dict[str, object]) -> None:
    plain, kept = check_alike("tree", options)
    assert isinstance(kept.output.latents, Kept)
    assert not isinstance(plain.output.latents, Kept)
    assert all(part.item() > 0 or name == "coverage" for name, part in plain.output.parts.items())


@pytest.mark.parametrize(
    "circumstances",
    [
        {"some_invalid": False},
        {"dead": 0.0},
        {"dead": 1.0},
        {"quiet": True},
        {"progress": 0.01},  # the thresholds' averages begin; no agreement yet
    ],
)
def test_so_it_is_without_dead_latents_or_invalid_places_and_early(circumstances: dict[str, object]) -> None:
    check_alike("tree", {"d_sae": 131}, **circumstances)


@pytest.mark.parametrize("options", [{"swap": 0.3}, {"rho": 0.1}, {"sparsity": "joint"}, {"sparsity": "l1"}])
def test_with_other_settings_all_codes_are_computed(options: dict[str, object]) -> None:
    _, kept = check_alike("tree", options)
    assert not isinstance(kept.output.latents, Kept)
