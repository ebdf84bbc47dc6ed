"""Paths and their shares, by hand and by enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from train.evaluate.paths import Paths, find_paths

TREE = ([np.array([0, 1]), np.array([2, 3, 4]), np.array([5, 6, 7, 8])],
        [torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
         torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])])  # fmt: skip


def rows(paths: Paths) -> list[tuple[int, tuple[int, ...], tuple[float, ...]]]:
    """Token, latents and shares of every path, in order of the latents."""
    found = zip(paths.token.tolist(), paths.latents.tolist(), paths.shares.tolist(), strict=True)
    return sorted(
        (token, tuple(latents), tuple(round(share, 6) for share in shares)) for token, latents, shares in found
    )


def test_paths_of_a_tree_by_hand() -> None:
    # top 0 with mid 2 and 3; 2 has leaves 5 and 6 with weights 1 and 3; 3 no active leaf; leaf 8 lost its mid 4
    codes = torch.tensor([[4.0, 0.0, 1.0, 3.0, 0.0, 3.0, 1.0, 0.0, 2.0], [0.0, 5.0] + [0.0] * 7, [0.0] * 9])
    expected = [
        (0, (-1, -1, 8), (0.0, 0.0, 1.0)),
        (0, (0, 2, 5), (0.125, 0.5, 1.0)),  # down 0 → 2 is 1 / 4; 2 → 5 is 3 / 6
        (0, (0, 2, 6), (0.125, 0.5, 1.0)),
        (0, (0, 3, -1), (0.75, 1.0, 0.0)),
        (1, (1, -1, -1), (1.0, 0.0, 0.0)),
    ]
    assert rows(find_paths(codes, *TREE)) == expected


def test_a_part_of_two_latents_is_shared_out_between_them() -> None:
    levels = [np.array([0, 1]), np.array([2]), np.array([3])]
    links = [torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0]])]
    codes = torch.tensor([[6.0, 1.0, 2.0, 5.0]])
    # up 2 → 0 is 6 / 8, up 2 → 1 is 2 / 8; the leaf follows
    expected = [(0, (0, 2, 3), (1.0, 0.75, 0.75)), (0, (1, 2, 3), (1.0, 0.25, 0.25))]
    assert rows(find_paths(codes, levels, links)) == expected


def made(seed: int) -> tuple[Tensor, list[np.ndarray], list[Tensor]]:
    """Codes [5, 24] and links with many parents."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(5, 24, generator=generator) * (torch.rand(5, 24, generator=generator) < 0.6)
    levels = [np.arange(4), np.arange(4, 12), np.arange(12, 24)]
    shapes = ((4, 8), (8, 12))
    links = [
        torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3) for shape in shapes
    ]
    return codes, levels, links


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_every_active_latent_sum_to_one(seed: int) -> None:
    codes, levels, links = made(seed)
    paths = find_paths(codes, levels, links)
    kept = paths.kept(torch.ones(len(paths.token), dtype=torch.bool), codes.double())
    assert kept.numpy() == pytest.approx((codes > 0).double().numpy())
    values = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * (codes > 0)
    per_token = torch.zeros(5, dtype=torch.float64).index_add(0, paths.token, paths.attribution(values))
    assert per_token.numpy() == pytest.approx(values.sum(1).numpy())


def test_paths_are_all_the_longest_chains_once() -> None:
    codes, levels, links = made(3)
    found = [tuple(latents) for latents in find_paths(codes, levels, links).latents.tolist()]
    chains = []
    for row in codes:
        on = [[i for i in level.tolist() if row[i] > 0] for level in levels]
        below = [
            {a: [b for b in on[k + 1] if links[k][a - levels[k][0], b - levels[k + 1][0]] > 0] for a in on[k]}
            for k in range(2)
        ]
        starts = [(0, a) for a in on[0]]
        starts += [
            (k + 1, b) for k in range(2) for b in on[k + 1] if not any(b in children for children in below[k].values())
        ]

        def follow(level: int, latent: int, before: tuple[int, ...], below: list = below) -> list[tuple[int, ...]]:  # type: ignore[type-arg]
            path = (*before, latent)
            children = below[level][latent] if level < 2 else []
            if not children:
                return [path + (-1,) * (2 - level)]
            return [chain for child in children for chain in follow(level + 1, child, path)]

        for level, latent in starts:
            chains += follow(level, latent, (-1,) * level)
    assert sorted(found) == sorted(chains)


def test_without_links_every_active_latent_is_a_path() -> None:
    codes = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert rows(find_paths(codes, [np.arange(3)], [])) == [(0, (1,), (1.0,)), (0, (2,), (1.0,)), (1, (0,), (1.0,))]


def test_ranks_begin_anew_with_every_token() -> None:
    paths = Paths(torch.tensor([0, 0, 0, 2, 2]), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    assert paths.ranks(torch.tensor([0.1, 3.0, 2.0, 5.0, 7.0])).tolist() == [2, 0, 1, 1, 0]


def test_kept_paths_hold_their_shares() -> None:
    codes = torch.tensor([[4.0, 0.0, 1.0, 3.0, 0.0, 3.0, 1.0, 0.0, 2.0]])
    paths = find_paths(codes, *TREE)
    chosen = (paths.latents[:, 1] == 2) & (paths.latents[:, 2] == 6)
    assert paths.kept(chosen, codes)[0].tolist() == [0.125, 0, 0.5, 0, 0, 0, 1, 0, 0]
