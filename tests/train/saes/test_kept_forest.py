"""Aggregates of kept codes against those of all codes, zeros and all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.saes.forest import LEAF, MID, TOP, Forest
from train.saes.kept_forest import Aggregate, Gathered, HandedDown
from train.saes.places import Places

N = 30


def some_of(n_latents: int) -> tuple[Tensor, Places]:
    """Codes of which a third is there, and where."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(N, n_latents, generator=generator) * (torch.rand(N, n_latents, generator=generator) < 0.3)
    return codes, Places.numbered(codes.flatten().nonzero().squeeze(-1), N, n_latents)


def dense(aggregate: Aggregate, values: Tensor, n_latents: int) -> Tensor:
    places = aggregate.places
    assert (places.number.diff() > 0).all()
    return torch.zeros(N, n_latents).index_put((places.row, places.column), values)


@pytest.mark.parametrize(("shape", "n"), [("halves", 18), ("fanout", 90)])  # two leaves, and six, without a parent
@pytest.mark.parametrize("level", [TOP, MID])
def test_sums_over_kept_children_are_those_over_all(shape: str, n: int, level: int) -> None:
    forest = Forest(n, shape)
    codes, places = some_of(forest.sizes[level + 1])
    weights = torch.rand(forest.sizes[level + 1])
    aggregate = Gathered.from_children(places, forest.sizes[level], forest.n_children(level))
    values = aggregate.of(codes[places.row, places.column], weights)
    assert torch.allclose(dense(aggregate, values, forest.sizes[level]), forest.gathered(codes * weights, level))


@pytest.mark.parametrize(("shape", "n"), [("halves", 18), ("fanout", 90)])
@pytest.mark.parametrize("level", [MID, LEAF])
def test_what_kept_parents_hand_down_is_what_all_do(shape: str, n: int, level: int) -> None:
    forest = Forest(n, shape)
    codes, places = some_of(forest.sizes[level - 1])
    weights = torch.rand(forest.sizes[level])
    aggregate = HandedDown.from_parents(places, forest.n_children(level - 1), forest.sizes[level])
    values = aggregate.of(codes[places.row, places.column], weights)
    assert torch.equal(dense(aggregate, values, forest.sizes[level]), forest.handed_down(codes, level) * weights)
