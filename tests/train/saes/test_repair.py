"""Dead leaves and what they are reset to."""

from __future__ import annotations

import torch

from tests.train.saes.trees import D, tokens, tree, uneven
from train.data.batch import Batch
from train.saes.repair import repair_landmarks, residual_directions
from train.saes.tree import Tree
from train.schedule import Clock


def test_repairs_come_every_tenth_or_3000_steps_up_to_seventy_percent() -> None:
    assert repair_landmarks(400) == (40, 80, 120, 160, 200, 240, 280)
    assert repair_landmarks(50_000) == tuple(range(3000, 35_001, 3000))
    assert tree(repair=False).landmarks(400) == ()


def test_residual_directions_are_the_main_ones_of_the_worst_families() -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(300, 4, generator=generator) < 0.3
    axes = torch.eye(D)[:4] * torch.tensor([1.0, 3.0, 2.0, 9.0])[:, None]
    error = active.float() @ axes + 0.01 * torch.randn(300, D, generator=generator)
    wanted = torch.tensor([True, True, True, False])
    only = active & (active.sum(-1, keepdim=True) == 1)  # apart, so that each axis belongs to one family
    families, directions = residual_directions([(error, only)], wanted, 2)
    assert families.tolist() == [1, 2]
    assert torch.allclose(directions, torch.eye(D)[1:3], atol=0.02)


def dead_leaf_tree() -> tuple[Tree, Batch]:
    """A tree both leaves of whose first middle latent, number 10, are dead."""
    sae = tree(40, 6)
    x = tokens(400)
    uneven(sae)
    with torch.no_grad():
        sae.tokens_silent[[20, 21]] = 10**9
    return sae, Batch.of(x)


def test_a_dead_leaf_is_reset_to_what_its_family_leaves_over() -> None:
    sae, batch = dead_leaf_tree()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    codes = sae.codes(batch)
    family = ((codes[..., 10] > 0) | (codes[..., 20] > 0) | (codes[..., 21] > 0))[:, 0]
    error = (batch.x - sae.reconstruct(codes, batch))[family, 0]
    masks = sae.revise(lambda: [batch], Clock(10, 100, 64))
    main = torch.linalg.svd(error.detach(), full_matrices=False).Vh[0]
    assert abs(float(main @ sae.W_dec.detach()[20])) > 0.99  # ten rounds of power iteration
    assert torch.allclose(sae.W_enc[:, 20], 0.2 * sae.W_dec[20])
    assert int(sae.tokens_silent[20]) == 0
    assert int(sae.tokens_silent[21]) == 10**9  # one of a family at a time
    others = torch.arange(40) != 20
    assert torch.equal(sae.W_dec[others], before["W_dec"][others])
    assert torch.equal(sae.W_enc[:, others], before["W_enc"][:, others])
    assert {"W_enc", "W_dec", "b_enc", "up", "kappa"} == set(masks)
    assert all(mask.nonzero()[:, 0].tolist() == [20] for mask in masks.values())


def test_without_dead_leaves_nothing_is_read_or_changed() -> None:
    sae = tree(40, 6)

    def never() -> list[Batch]:
        raise AssertionError("read")

    assert sae.revise(never, Clock(10, 100, 64)) == {}
