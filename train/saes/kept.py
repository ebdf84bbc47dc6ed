"""Codes of a training step as the few that are kept, and products that cost only as much.

A step is five products of the size tokens × d_model × d_sae. Only the encoder's needs all latents: decoding, both
weight gradients and the gradient of the codes touch kept entries alone, k of d_sae (Gao et al. 2406.04093, App. D).
Here they are stock sparse operators of PyTorch on one CSR pattern, sorted by latent once for both weight gradients:

    x̂      = F W_dec                        CSR · dense
    ∂L/∂F  = (g W_decᵀ) where F is kept     sampled product
    ∂L/∂W  = Fᵀ g                           the same entries by latent, CSR · dense

Values and gradients are those of the dense products up to the order of additions. N = batch · window tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

with warnings.catch_warnings():  # PyTorch calls CSR a beta, once in a process
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


def sparse_pays(device: torch.device) -> bool:
    """Whether a step with the kept codes alone is the faster one there, so far as was measured (docs/performance.md).

    On a CPU with MKL it was at every shape. On a GPU, where dense products run hundreds of times as fast, nothing was.
    """
    return device.type == "cpu" and torch.backends.mkl.is_available()


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`train.kernels` for tensors on a GPU where Triton is there; None where stock operators serve."""
    if not tensor.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("train.kernels")


class Places:
    """Which entries of [rows, columns] are kept, row by row.

    Attributes:
        first: of row n the entries first[n] to first[n + 1], int64 [rows + 1].
        column: of each entry, int64 [kept].
        n_columns: columns in all.
    """

    def __init__(self, first: Int[Tensor, " R"], column: Int[Tensor, " K"], n_columns: int) -> None:
        self.first, self.column, self.n_columns = first, column, n_columns

    @property
    def n_rows(self) -> int:
        return len(self.first) - 1

    @functools.cached_property
    def row(self) -> Int[Tensor, " K"]:
        """Row of each entry."""
        rows = torch.arange(self.n_rows, device=self.first.device)
        return rows.repeat_interleave(self.first.diff(), output_size=len(self.column))

    @functools.cached_property
    def by_column(self) -> tuple[Int[Tensor, " K"], Places]:
        """Where the entries lie in the order of columns, and the transposed places."""
        order = torch.argsort(self.column, stable=True)
        first = torch.searchsorted(self.column[order], torch.arange(self.n_columns + 1, device=self.column.device))
        return order, Places(first, self.row[order], self.n_rows)

    def times(self, values: Float[Tensor, " K"], dense: Float[Tensor, "C D"]) -> Float[Tensor, "R D"]:
        """The sparse matrix with these values, times a dense one."""
        kernels = kernels_for(values)
        if kernels is not None:
            product: Tensor = kernels.csr_times(self.first, self.column, values, dense)
        else:
            product = self._matrix(values) @ dense
        return product

    def transposed_times(self, values: Float[Tensor, " K"], dense: Float[Tensor, "R D"]) -> Float[Tensor, "C D"]:
        """The transposed sparse matrix times a dense one."""
        order, transposed = self.by_column
        return transposed.times(values[order], dense)

    def sampled(self, left: Float[Tensor, "R D"], right: Float[Tensor, "C D"]) -> Float[Tensor, " K"]:
        """(left · rightᵀ) at the entries kept."""
        kernels = kernels_for(left)
        if kernels is not None:
            values: Tensor = kernels.csr_sampled(self.first, self.column, left, right)
            return values
        zeros = self._matrix(left.new_zeros(len(self.column)))
        product: Tensor = torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0)
        return product.values()

    def column_sums(self, values: Float[Tensor, " K"]) -> Float[Tensor, " C"]:
        return values.new_zeros(self.n_columns).index_add_(0, self.column, values)

    def _matrix(self, values: Tensor) -> Tensor:
        size = (self.n_rows, self.n_columns)
        return torch.sparse_csr_tensor(self.first, self.column, values, size, check_invariants=False)


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, dense)
        ctx.places = places
        with torch.autocast(values.device.type, enabled=False):  # sparse operators know float32 alone
            return places.times(values, dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, dense = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return ctx.places.sampled(gradient, dense), ctx.places.transposed_times(values, gradient), None


@dataclass(frozen=True)
class Kept:
    """Codes [batch, window, latents] of which only the kept ones are there.

    Attributes:
        values: [kept], never below 0; gradients go through them.
        places: rows are tokens, columns latents.
        shape: (batch, window, latents).
    """

    values: Float[Tensor, " K"]
    places: Places
    shape: tuple[int, int, int]

    def times(self, dense: Float[Tensor, "L D"]) -> Float[Tensor, "B T D"]:
        """codes @ dense, in float32."""
        product: Tensor = _Times.apply(self.values, dense, self.places)  # type: ignore[no-untyped-call]
        return product.view(*self.shape[:2], -1)

    def times_by_block(self, dense: Float[Tensor, "L D"], blocks: list[int]) -> Float[Tensor, "B T P D"]:
        """codes[..., block] @ dense[block] for every block of neighbouring latents, of these sizes, in float32.

        The latents of a token must be in ascending order.
        """
        ends = torch.tensor(blocks, device=dense.device).cumsum(0)
        block = torch.searchsorted(ends, self.places.column, right=True)
        counts = torch.bincount(self.places.row * len(blocks) + block, minlength=self.places.n_rows * len(blocks))
        first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        places = Places(first, self.places.column, self.places.n_columns)
        product: Tensor = _Times.apply(self.values, dense, places)  # type: ignore[no-untyped-call]
        return product.view(*self.shape[:2], len(blocks), -1)

    def fired(self) -> Int[Tensor, " L"]:
        """On how many tokens each latent is above 0."""
        return torch.bincount(self.places.column[self.values > 0], minlength=self.shape[-1])

    def dense(self) -> Float[Tensor, "B T L"]:
        """All codes, zeros and all."""
        flat = self.values.new_zeros(self.places.n_rows, self.shape[-1])
        return flat.index_put((self.places.row, self.places.column), self.values).view(self.shape)


Codes = Tensor | Kept
"""Codes [batch, window, latents], all of them or the kept ones."""

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
        largest = torch.topk(u.flatten(), min(n_kept, u.numel()), sorted=False).indices
        return _places_of(largest.sort().values, u)
    sample = u[:: max(len(u) // SAMPLED_ROWS, 1)]
    n_guessed = min(int(MARGIN * n_kept * len(sample) / len(u)) + 1, sample.numel())
    guess = torch.topk(sample.flatten(), n_guessed).values[-1].clamp_min(0.0)
    candidates = (u > guess).flatten().nonzero().squeeze(-1)
    if len(candidates) < n_kept and guess > 0:
        candidates = (u > 0).flatten().nonzero().squeeze(-1)
    if len(candidates) > n_kept:
        best = torch.topk(u.flatten()[candidates], n_kept, sorted=False).indices
        candidates = candidates[best.sort().values]
    return _places_of(candidates, u)


def _places_of(flat: Int[Tensor, " K"], u: Float[Tensor, "N L"]) -> Places:
    """Places of ascending indices into the flattened u."""
    row = flat // u.shape[-1]
    first = torch.searchsorted(row, torch.arange(len(u) + 1, device=u.device))
    return Places(first, flat - row * u.shape[-1], u.shape[-1])


class _Encoded(torch.autograd.Function):
    """Gives the gradient of pre-activations that were found without one, where it is not 0: see `encode_kept`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, of_dead: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor,
        places: Places, dead: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(values, of_dead, centred, W_enc)
        ctx.places, ctx.dead = places, dead
        return values, of_dead

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, of_dead, centred, W_enc = ctx.saved_tensors
        du = gradients[0] * (values > 0)
        of_W_enc = ctx.places.transposed_times(du, centred)
        of_b_enc = ctx.places.column_sums(du)
        if ctx.dead is not None:
            du_dead = gradients[1] * (of_dead > 0)
            of_W_enc.index_add_(0, ctx.dead, du_dead.t() @ centred)
            of_b_enc.index_add_(0, ctx.dead, du_dead.sum(0))
        return None, None, None, of_W_enc.t(), of_b_enc, -(W_enc @ of_b_enc), None, None


def encode_kept(
    x: Float[Tensor, "B T D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"],
    b_dec: Float[Tensor, " D"],
    valid: Bool[Tensor, "B T"] | None,
    choose: Choice,
    dead: Int[Tensor, " A"] | None,
) -> tuple[Kept, Float[Tensor, "B T A"]]:
    """ReLU((x − b_dec) W_enc + b_enc) where chosen, and that of the `dead` latents in full.

    Args:
        valid: positions that count, None where all do; at others nothing is above 0.
        choose: which of u, not rectified, [tokens, latents] are kept.
        dead: latents asked for in full, for AuxK.
    """
    with torch.no_grad():
        centred = (x - b_dec).flatten(0, 1)
        if torch.is_autocast_enabled(x.device.type):
            u = (centred @ W_enc).float().add_(b_enc)  # the product in the lower precision, the sum in float32
        else:
            u = torch.addmm(b_enc, centred, W_enc)
        if valid is not None:
            u.masked_fill_(~valid.flatten()[:, None], 0.0)
        places = choose(u)
        values = u[places.row, places.column].relu_()
        of_dead = u.new_zeros(len(u), 0) if dead is None else u.index_select(-1, dead).relu_()
    values, of_dead = _Encoded.apply(  # type: ignore[no-untyped-call]
        values, of_dead, centred, W_enc, b_enc, b_dec, places, dead
    )
    shape = (x.shape[0], x.shape[1], W_enc.shape[1])
    return Kept(values, places, shape), of_dead.view(*shape[:2], -1)
