"""Which entries are kept: against sorting everything."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.saes import places as module
from train.saes.places import add_at_, keep_batch_top_k, keep_top_k, keep_top_k_of

N, D, L = 24, 6, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_top_k_keeps_the_largest_of_each_row() -> None:
    u = random(N, L)
    places = keep_top_k(u, 5)
    chosen = torch.zeros(N, L, dtype=torch.bool)
    chosen[places.row, places.column] = True
    expected = u >= u.topk(5).values[:, -1:]
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("n_kept", [1, 37, 300, N * L, 2 * N * L])
def test_batch_top_k_keeps_the_largest_of_all_in_order(n_kept: int) -> None:
    u = random(N, L)
    places = keep_batch_top_k(u, n_kept)
    n_expected = min(n_kept, int((u > 0).sum()))
    flat = places.row * L + places.column
    assert flat.tolist() == sorted(u.flatten().topk(n_expected).indices.tolist())


def test_batch_top_k_of_some_columns_is_that_of_the_columns_alone() -> None:
    u = random(N, L)
    some, alone = keep_batch_top_k(u[:, 7:19], 50), keep_batch_top_k(u[:, 7:19].contiguous(), 50)
    assert torch.equal(some.first, alone.first)
    assert torch.equal(some.column, alone.column)


def test_batch_top_k_is_exact_where_the_sample_of_rows_misleads() -> None:
    u = torch.full((640, 8), 0.1)
    u[::10] = 5.0  # the rows sampled are nothing like the others
    u[1] = 9.0
    places = keep_batch_top_k(u, 2000)
    values = u[places.row, places.column]
    assert len(values) == 2000
    assert int((values == 9).sum()) == 8
    assert int((values == 5).sum()) == 512


def test_batch_top_k_of_nothing_positive_is_empty() -> None:
    places = keep_batch_top_k(-torch.ones(N, L), 10)
    assert len(places.column) == 0
    assert places.first.tolist() == [0] * (N + 1)
    assert places.times(torch.zeros(0), random(L, D)).abs().sum() == 0


def test_values_are_added_at_indices_that_are_named_often() -> None:
    flat = torch.ones(4)
    add_at_(flat, torch.tensor([3, 1, 3]), torch.tensor([1.0, 2.0, 4.0]))
    assert flat.tolist() == [1, 3, 1, 6]


def test_places_in_ascending_order_are_the_same_ones() -> None:
    places = keep_top_k(random(N, L), 7)
    assert not bool((places.column.view(N, 7).diff(dim=1) > 0).all())
    ascending = places.ascending()
    assert bool((ascending.column.view(N, 7).diff(dim=1) > 0).all())
    assert torch.equal(ascending.first, places.first)
    assert torch.equal(ascending.column, places.column.view(N, 7).sort(dim=1).values.flatten())


def test_rows_are_cut_where_blocks_end() -> None:
    places = keep_batch_top_k(random(N, L), 200)
    blocks = places.by_block([5, 1, 14, 20])
    assert blocks.n_rows == 4 * N
    block = torch.tensor([0] * 5 + [1] + [2] * 14 + [3] * 20)[places.column]
    assert torch.equal(blocks.row, 4 * places.row + block)
    assert torch.equal(blocks.column, places.column)


def test_top_k_of_some_looks_at_no_others() -> None:
    u, some = random(N, L), torch.zeros(L, dtype=torch.bool)
    some[[2, 11, 30]] = True
    places = keep_top_k_of(u, some, 2)
    chosen = torch.where(some, u, -torch.inf).topk(2).indices.sort().values
    assert torch.equal(places.column.view(N, 2).sort().values, chosen)
    assert len(keep_top_k_of(u, some, 8).column) == 3 * N


@pytest.mark.parametrize("spoiled", [(slice(None),), (1, 3)])
def test_what_is_not_a_number_is_kept_for_all_to_see(spoiled: tuple[slice | int, ...]) -> None:
    u = random(640, 8)
    u[spoiled] = torch.nan
    places = keep_batch_top_k(u, 100)
    assert len(places.column) == 100
    assert u[places.row, places.column].isnan().any()


def test_importing_makes_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, *rest: Any) -> None:
            raise AssertionError(f"{function} at import: huge pages can no longer be asked for")

    spec = importlib.util.spec_from_file_location("places_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "places_again", again)
    with Refused():  # type: ignore[no-untyped-call]
        spec.loader.exec_module(again)
    assert callable(again.keep_top_k)
