"""Levels and links: those of variants, and the controls for SAEs without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.ladder import ladder_of, post_hoc_tree, sizes_of
from train.saes import REGISTRY, make_sae
from train.saes.compositional import Compositional
from train.saes.tree import Tree

FLAT = np.linspace(1, 0, 42)


@pytest.mark.parametrize("variant", list(REGISTRY))
def test_linked_groups_are_groups_and_weights_fit_them(variant: str) -> None:
    sae = make_sae(variant, {"d_sae": 64}, 8, 0, "test")
    groups = sae.groups()
    for (upper, lower), weights in sae.links().items():
        sizes = [groups[name].stop - groups[name].start for name in (upper, lower)]
        if weights is not None:
            assert list(weights.shape) == sizes
            assert (weights >= 0).all()
    ladder = ladder_of(sae, np.linspace(0, 1, sae.d_sae), "1,1,2")
    assert sorted(np.concatenate(list(ladder.levels.values())).tolist()) == list(range(sae.d_sae))
    assert len(ladder.links) == len(ladder.levels) - 1
    assert ladder.own == (variant in ("compositional", "tree", "matryoshka"))


def test_tree_gives_each_child_to_its_parent_with_its_weight() -> None:
    sae = make_sae("tree", {"d_sae": 42, "k": 4, "shape": "fanout"}, 8, 0, "test")
    assert isinstance(sae, Tree)
    with torch.no_grad():
        assert sae.up is not None
        sae.up.copy_(torch.linspace(-2, 2, 42))
    ladder = ladder_of(sae, FLAT, "1,1,2")
    assert {name: len(latents) for name, latents in ladder.levels.items()} == {"top": 2, "mid": 8, "leaf": 32}
    expected = torch.zeros(42, 42)
    for child, parent in enumerate(sae.parent.tolist()):
        if parent >= 0:
            expected[parent, child] = sae.edge_weights()[child].detach()
    top, mid = ladder.links
    assert top is not None
    assert mid is not None
    assert torch.equal(top, expected[:2, 2:10])
    assert torch.equal(mid, expected[2:10, 10:])


def test_compositional_gives_its_composition_weights_the_high_level_first() -> None:
    sae = make_sae("compositional", {"d_sae": 42, "k": 4}, 8, 0, "test")
    assert isinstance(sae, Compositional)
    ladder = ladder_of(sae, FLAT, "1,1,2")
    low, high = sae.compositions()
    assert ladder.pairs == [("high", "mid"), ("mid", "low")]
    assert all(
        torch.equal(a, b) for a, b in zip(ladder.links, (high.detach(), low.detach()), strict=True) if a is not None
    )
    assert [len(latents) for latents in ladder.levels.values()] == [6, 12, 24]


def test_matryoshka_has_levels_without_links_and_a_single_block_none() -> None:
    sae = make_sae("matryoshka", {"d_sae": 64, "k": 4}, 8, 0, "test")
    ladder = ladder_of(sae, FLAT, "1,1,2")
    assert ladder.links == [None] * 4
    assert [len(latents) for latents in ladder.levels.values()] == [2, 4, 8, 16, 34]
    plain = make_sae("matryoshka", {"d_sae": 64, "k": 4, "fractions": (1.0,)}, 8, 0, "test")
    assert not ladder_of(plain, np.linspace(0, 1, 64), "1,1,2").own


def test_pseudo_levels_are_cut_by_density_in_the_shares_asked_for() -> None:
    sae = make_sae("batchtopk", {"d_sae": 8, "k": 2}, 8, 0, "test")
    density = np.array([0.1, 0.7, 0.0, 0.5, 0.2, 0.6, 0.3, 0.4])
    ladder = ladder_of(sae, density, "1,1,2")
    assert [latents.tolist() for latents in ladder.levels.values()] == [[1, 5], [3, 7], [0, 2, 4, 6]]
    assert [len(latents) for latents in ladder_of(sae, density, "1,3").levels.values()] == [2, 6]
    assert sizes_of("1,2,4", 1024) == [146, 293, 585]


@pytest.mark.parametrize("shares", ["1", "", "1,x", "1,0,2", "1,-1"])
def test_shares_that_make_no_levels_are_refused(shares: str) -> None:
    with pytest.raises(ConfigError, match=f"--levels {shares}: at least two numbers above 0 are needed, such as 1,1,2"):
        sizes_of(shares, 8)


def test_post_hoc_parents_are_those_that_the_codes_were_made_with() -> None:
    generator = np.random.default_rng(0)
    upper = independent(4000, 4, 0.1)
    lower = np.repeat(upper, 3, axis=1) * (generator.random((4000, 12)) < 0.5)  # children of 0 0 0 1 1 1 …
    never = np.zeros((4000, 1))
    against = (upper.sum(1, keepdims=True) == 0) * 1.0  # on only where no parent is
    codes = codes_of(np.concatenate([upper, lower, never, against], axis=1))
    weights = post_hoc_tree(codes, np.arange(4, 18), np.arange(4))
    assert weights[:, :12].argmax(0).tolist() == np.repeat(np.arange(4), 3).tolist()
    assert (weights[:, :12] > 0).sum(0).tolist() == [1] * 12
    assert (weights[:, 12:] == 0).all()
    half = codes.values.toarray()[: codes.middle] > 0
    phi = np.corrcoef(half[:, 0], half[:, 4])[0, 1]
    assert float(weights[0, 0]) == pytest.approx(phi)


def test_post_hoc_tree_does_not_look_at_the_second_half() -> None:
    upper = independent(2000, 3, 0.2)
    codes = codes_of(np.concatenate([upper, upper], axis=1))
    values = codes.values.tolil()
    values[codes.middle :] = 0
    blind = codes_of(np.zeros((2000, 6)))
    cut = type(codes)(values.tocsc(), blind.document, blind.middle)
    lower, above = np.arange(3, 6), np.arange(3)
    assert torch.equal(post_hoc_tree(cut, lower, above), post_hoc_tree(codes, lower, above))
