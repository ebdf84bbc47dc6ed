"""The Triton kernels against plain PyTorch: in Triton's interpreter on a CPU, as they are where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.saes import places
from train.saes.kept import Kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
kernels = pytest.importorskip("train.kernels")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def csr(n_rows: int, n_columns: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 0 to `longest` entries, and the row of each entry."""
    counts = torch.randint(0, longest + 1, (n_rows,), generator=torch.Generator().manual_seed(1))
    counts[0], counts[-1] = 0, longest
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    column = torch.randint(0, n_columns, (int(first[-1]),), generator=torch.Generator().manual_seed(2))
    return first.to(DEVICE), column.to(DEVICE), torch.arange(n_rows).repeat_interleave(counts).to(DEVICE)


@pytest.mark.parametrize("width", [5, 256, 300])
def test_rows_times_dense(width: int) -> None:
    first, column, row = csr(9, 40, 37)
    values, dense = random(len(column)), random(40, width, seed=3)
    expected = torch.zeros(9, width, device=DEVICE).index_add_(0, row, values[:, None] * dense[column])
    assert torch.allclose(kernels.csr_times(first, column, values, dense), expected, atol=1e-4)


@pytest.mark.parametrize("width", [5, 256, 300])
def test_sampled_products(width: int) -> None:
    first, column, row = csr(9, 40, 37)
    left, right = random(9, width), random(40, width, seed=3)
    expected = (left[row] * right[column]).sum(-1)
    assert torch.allclose(kernels.csr_sampled(first, column, left, right), expected, atol=1e-4)


def test_no_entries_give_zeros_and_nothing() -> None:
    first, column = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kernels.csr_times(first, column, random(0), random(7, 3)).tolist() == [[0.0] * 3] * 3
    assert kernels.csr_sampled(first, column, random(3, 2), random(7, 2)).shape == (0,)


@pytest.mark.parametrize(("n_latents", "k"), [(40, 1), (40, 40), (5000, 32), (8192, 7)])
def test_the_k_largest_of_each_row(n_latents: int, k: int) -> None:
    u = random(3, n_latents)
    u[1] *= 1e-30  # tiny ones, and values of one sign
    u[2] = -u[2].abs()
    places = kernels.row_top_k(u, k)
    expected = torch.topk(u, k, dim=-1).indices
    assert torch.equal(places.sort(-1).values, expected.sort(-1).values)


def test_of_equal_values_the_first_are_taken() -> None:
    u = torch.zeros(2, 5000, device=DEVICE)
    u[0, 4900] = 1.0
    u[1, 10:20] = -1.0
    places = kernels.row_top_k(u, 3).sort(-1).values
    assert places.tolist() == [[0, 1, 4900], [0, 1, 2]]


def test_kept_codes_go_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    first, column, _ = csr(9, 40, 7)
    values, dense, back = random(len(column)), random(40, 6, seed=3), random(9, 6, seed=4)
    found = []
    for module in (None, kernels):
        monkeypatch.setattr(places, "kernels_for", lambda tensor, module=module: module)
        codes = Kept(values.clone().requires_grad_(), places.Places(first, column, 40), (1, 9, 40))
        weight = dense.clone().requires_grad_()
        product = codes.times(weight)
        product.backward(back[None])
        assert codes.values.grad is not None
        assert weight.grad is not None
        chosen = places.keep_top_k(random(4, 50), 5).column.view(4, 5).sort(-1).values
        found.append((product.detach(), codes.values.grad, weight.grad, chosen))
    for stock, own in zip(*found, strict=True):
        assert torch.allclose(own.float(), stock.float(), atol=1e-4)
