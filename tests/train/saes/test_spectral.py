"""The spectral partition finds families, whole and the same every time."""

from __future__ import annotations

import torch

from tests.train.saes.levelled import randn
from train.saes.spectral import partition


def test_families_are_found() -> None:
    family = torch.arange(20) % 5
    noise = 0.05 * randn(20, 20).abs()
    found = partition((family[:, None] == family).float() + noise, 5, seed=0)
    same = found[:, None] == found
    assert torch.equal(same, family[:, None] == family)


def test_one_direction_of_affinity_is_enough() -> None:
    family = torch.arange(12) // 4
    one_way = (family[:, None] == family).float().triu()
    found = partition(one_way, 3, seed=0)
    assert torch.equal(found[:, None] == found, family[:, None] == family)


def test_the_same_seed_gives_the_same_clusters() -> None:
    affinity = randn(40, 40).abs()
    assert torch.equal(partition(affinity, 20, seed=3), partition(affinity, 20, seed=3))


def test_latents_that_are_alike_are_no_error() -> None:
    found = partition(torch.ones(10, 10), 4, seed=0)
    assert found.shape == (10,)
    assert set(found.tolist()) <= set(range(4))


def test_two_latents_are_shared_out() -> None:
    assert partition(torch.ones(2, 2), 2, seed=0).tolist() == [0, 1]
    assert partition(torch.ones(2, 2), 1, seed=0).tolist() == [0, 0]
