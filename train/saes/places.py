"""Which entries of a matrix are kept, products that touch them alone, and how the largest ones are found.

Stock sparse operators of PyTorch on CSR; on a GPU, Triton kernels of our own. Products are in float32, equal to dense
ones up to the order of additions, and the same at every call.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.collective import all_min, among_largest, count_over_ranks, largest_of_all, over_ranks


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`train.kernels` for tensors on a GPU where Triton is there; None where stock operators serve."""
    if not tensor.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("train.kernels")


@dataclass(frozen=True)
class Entries:
    """Entries of a sparse matrix [n_rows, n_columns] in any order.

    Attributes:
        row, column: of each entry, int64 [kept].
    """

    row: Int[Tensor, " K"]
    column: Int[Tensor, " K"]
    n_rows: int
    n_columns: int

    @classmethod
    def of(cls, places: Sequence[Places]) -> Entries:
        """Those of several sets of places of one matrix, one set after the other."""
        if len(places) == 1:
            return places[0].entries
        row, column = (torch.cat([getattr(each, name) for each in places]) for name in ("row", "column"))
        return cls(row, column, places[0].n_rows, places[0].n_columns)

    @functools.cached_property
    def by_column(self) -> tuple[Int[Tensor, " K"], Places]:
        """The order that sorts the entries by column, and the places of the transposed matrix."""
        column, order = torch.sort(self.column, stable=True)
        first = torch.searchsorted(column, torch.arange(self.n_columns + 1, device=column.device))
        return order, Places(first, self.row[order], self.n_rows)

    def transposed_times(self, values: Float[Tensor, " K"], dense: Float[Tensor, "R D"]) -> Float[Tensor, "C D"]:
        """The transposed sparse matrix with these values, times a dense one."""
        order, transposed = self.by_column
        return transposed.times(values[order], dense)

    def column_sums(self, values: Float[Tensor, " K"]) -> Float[Tensor, " C"]:
        # index_add_ would add in any order on a GPU, and a resumed run would differ in its last bits
        order, transposed = self.by_column
        return transposed.row_sums(values[order])


class Places:
    """Which entries of [rows, columns] are kept, row by row.

    Attributes:
        first: of row n the entries first[n] to first[n + 1], int64 [rows + 1].
        column: of each entry, int64 [kept].
        n_columns: columns in all.
    """

    def __init__(self, first: Int[Tensor, " R"], column: Int[Tensor, " K"], n_columns: int) -> None:
        self.first, self.column, self.n_columns = first, column, n_columns

    @classmethod
    def numbered(cls, number: Int[Tensor, " K"], n_rows: int, n_columns: int) -> Places:
        """Those of ascending indices into the flattened matrix."""
        row = number // n_columns
        first = torch.searchsorted(row, torch.arange(n_rows + 1, device=number.device))
        return cls(first, number - row * n_columns, n_columns)

    @property
    def n_rows(self) -> int:
        return len(self.first) - 1

    @functools.cached_property
    def row(self) -> Int[Tensor, " K"]:
        """Row of each entry."""
        rows = torch.arange(self.n_rows, device=self.first.device)
        return rows.repeat_interleave(self.first.diff(), output_size=len(self.column))

    @functools.cached_property
    def entries(self) -> Entries:
        """The same places, one by one."""
        return Entries(self.row, self.column, self.n_rows, self.n_columns)

    @functools.cached_property
    def number(self) -> Int[Tensor, " K"]:
        """Index of each entry into the flattened matrix."""
        return self.row * self.n_columns + self.column

    def among(self, start: int, n_columns: int) -> Places:
        """The same entries in a matrix of which this one is the columns from `start` on."""
        return Places(self.first, self.column + start, n_columns)

    def find(self, others: Places) -> Int[Tensor, " A"]:
        """Which of these entries, which must ascend, each of others of the same matrix is; K where it is none."""
        if not len(self.column):
            return torch.zeros_like(others.column)
        n = torch.searchsorted(self.number, others.number).clamp_max(len(self.column) - 1)
        return torch.where(self.number[n] == others.number, n, len(self.column))

    def ascending(self) -> Places:
        """The same places, the columns of each row in ascending order."""
        return Places(self.first, self.number.sort().values - self.row * self.n_columns, self.n_columns)

    def by_block(self, blocks: Sequence[int]) -> Places:
        """The same entries of [rows · blocks, columns]: a row for every block of neighbouring columns, of these sizes.

        Columns must be in ascending order in each row.
        """
        block = torch.zeros_like(self.column)
        for end in accumulate(blocks[:-1]):  # as a tensor, ends would be copied to a GPU, and the step would wait
            block += self.column >= end
        rows = torch.arange(self.n_rows * len(blocks) + 1, device=block.device)
        return Places(torch.searchsorted(self.row * len(blocks) + block, rows), self.column, self.n_columns)

    def row_sums(self, values: Float[Tensor, " K"]) -> Float[Tensor, " R"]:
        """Of these values, the sum of each row."""
        return self.times(values, values.new_ones(self.n_columns, 1)).squeeze(-1)

    def times(self, values: Float[Tensor, " K"], dense: Float[Tensor, "C D"]) -> Float[Tensor, "R D"]:
        """The sparse matrix with these values, times a dense one."""
        kernels = kernels_for(values)
        if kernels is not None:
            product: Tensor = kernels.csr_times(self.first, self.column, values, dense)
        else:
            product = self._matrix(values) @ dense
        return product

    def sampled(self, left: Float[Tensor, "R D"], right: Float[Tensor, "C D"]) -> Float[Tensor, " K"]:
        """(left · rightᵀ) at the entries kept."""
        kernels = kernels_for(left)
        if kernels is not None:
            values: Tensor = kernels.csr_sampled(self.first, self.column, left, right)
            return values
        zeros = self._matrix(left.new_zeros(len(self.column)))
        product: Tensor = torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0)
        return product.values()

    def _matrix(self, values: Tensor) -> Tensor:
        size = (self.n_rows, self.n_columns)
        with warnings.catch_warnings():  # PyTorch calls CSR a beta, once in a process
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(self.first, self.column, values, size, check_invariants=False)


def side_by_side(groups: Sequence[Places]) -> tuple[Places, Int[Tensor, " K"]]:
    """Places of matrices of the same rows, put side by side, and the new numbers of their entries, group by group."""
    first, n_columns = torch.stack([each.first for each in groups]).sum(0), 0
    before, numbers, columns = torch.zeros_like(first[1:]), [], []
    for each in groups:  # within a row the entries of a group come after those of the groups before it
        shift = first[:-1] - each.first[:-1] + before
        numbers.append(torch.arange(len(each.column), device=first.device) + shift[each.row])
        columns.append(each.column + n_columns)
        before, n_columns = before + each.first.diff(), n_columns + each.n_columns
    number = torch.cat(numbers)
    return Places(first, torch.empty_like(number).scatter(0, number, torch.cat(columns)), n_columns), number


def add_at_(flat: Float[Tensor, " M"], number: Int[Tensor, " K"], values: Float[Tensor, " K"]) -> None:
    """Add values at indices, which may be named often, in the same order at every call."""
    if flat.is_cuda:
        flat.index_put_((number,), values, accumulate=True)  # sorts first; on a CPU it is threads that add in any order
    else:
        flat.scatter_add_(0, number, values)


Choice = Callable[[Float[Tensor, "N L"]], Places]
"""Which pre-activations are kept."""


def keep_top_k(u: Float[Tensor, "N L"], k: int) -> Places:
    """The k largest of each row."""
    kernels = kernels_for(u)
    columns = torch.topk(u, k, dim=-1, sorted=False).indices if kernels is None else kernels.row_top_k(u, k)
    first = torch.arange(0, columns.numel() + 1, k, device=u.device)
    return Places(first, columns.flatten(), u.shape[-1])


SAMPLED_ROWS = 64
MARGIN = 1.25  # on the number of candidates: what a sample of rows may be off by


def keep_batch_top_k(u: Float[Tensor, "N L"], n_kept: int) -> Places:
    """The `n_kept` largest positive entries of the whole batch, fewer where fewer are positive.

    Candidates are all entries above a value that a sample of rows puts a little below the one wanted, so that only
    they are ordered. Where the sample misled, all positive entries are candidates. Exact either way. On a GPU, where
    counting candidates would wait for the device, the largest are ordered at once, and some may not be positive.
    """
    if u.is_cuda:
        values, largest = torch.topk(u.flatten(), min(n_kept, u.numel()), sorted=False)
        taken = among_largest(values, n_kept)
        return places_of((largest if taken is None else largest[taken]).sort().values, u)
    sample = u[:: max(len(u) // SAMPLED_ROWS, 1)]
    n_guessed = min(int(MARGIN * n_kept * len(sample) / over_ranks(len(u))) + 1, sample.numel())
    guess = all_min(torch.topk(sample.flatten(), n_guessed).values[-1].clamp_min(0.0))
    candidates = _above(u, guess)
    n_found = count_over_ranks(len(candidates), u.device)
    if n_found < n_kept and guess > 0:
        candidates = _above(u, guess.new_zeros(()))
        n_found = count_over_ranks(len(candidates), u.device)
    if n_found > n_kept:
        best = largest_of_all(u.take(candidates), n_kept)  # u may be some columns of a larger matrix
        candidates = candidates[best.sort().values]
    return places_of(candidates, u)


def _above(u: Float[Tensor, "N L"], least: Float[Tensor, ""]) -> Int[Tensor, " K"]:
    """Indices into the flattened u of what is above a value; NaN is, so that the loss shows it."""
    return (u <= least).logical_not_().flatten().nonzero().squeeze(-1)


def places_of(flat: Int[Tensor, " K"], u: Float[Tensor, "N L"]) -> Places:
    """Places of ascending indices into the flattened u."""
    return Places.numbered(flat, len(u), u.shape[-1])


def keep_top_k_of(
    u: Float[Tensor, "N L"], some: Bool[Tensor, " L"], k: int, among: Int[Tensor, " C"] | None = None
) -> Places:
    """The k largest of each row among `some` latents, fewer where they are fewer.

    On a GPU, where their number is not known without waiting for it, k of those `among` which they are, of all where
    that is not given; others fill up the last places.
    """
    if u.is_cuda and among is None:
        return keep_top_k(torch.where(some, u, -torch.inf), min(k, u.shape[-1]))
    columns = some.nonzero().squeeze(-1) if among is None else among
    values = u.index_select(-1, columns)
    kept = keep_top_k(values if among is None else torch.where(some[among], values, -torch.inf), min(k, len(columns)))
    return Places(kept.first, columns[kept.column], u.shape[-1])
