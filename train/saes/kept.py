"""Codes of a training step as the few that are kept, and products that cost only as much.

A step is five products of the size tokens × d_model × d_sae. Only the encoder's needs all latents: decoding, both
weight gradients and the gradient of the codes touch kept entries alone, k of d_sae (Gao et al. 2406.04093, App. D).
Here they are stock sparse operators of PyTorch on one CSR pattern, sorted by latent once for both weight gradients:

    x̂      = F W_dec                        CSR · dense
    ∂L/∂F  = (g W_decᵀ) where F is kept     sampled product
    ∂L/∂W  = Fᵀ g                           the same entries by latent, CSR · dense

Values and gradients are those of the dense products up to the order of additions. N = batch · window tokens.
`entrywise` has what else is done with single entries; what variants with several groups share is in `grouped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.saes.entrywise import of_rows, row_sums, times
from train.saes.places import Choice, Entries, Places, keep_top_k_of, places_of, side_by_side

FEW = 1 / 16  # share of codes up to which sparse products are the faster ones
MOST = 1 / 8  # share of latents kept up to which whole steps are; at a quarter they are level, at half 1.6 times slower


def sparse_pays(device: torch.device, share: float) -> bool:
    """Whether a step with the kept codes alone, this share of all, is the faster one there, so far as was measured.

    On a CPU with MKL. On a GPU, where dense products run hundreds of times as fast, nothing was (docs/performance.md).
    """
    return share <= MOST and device.type == "cpu" and torch.backends.mkl.is_available()


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

    @classmethod
    def of(cls, codes: Float[Tensor, "B T L"], chosen: Int[Tensor, " K"]) -> Kept:
        """Those of dense codes at ascending indices into them, flattened; gradients go to these alone."""
        flat = codes.flatten(0, 1)
        shape = (codes.shape[0], codes.shape[1], codes.shape[2])
        return cls(flat.flatten().gather(0, chosen), places_of(chosen, flat), shape)

    @classmethod
    def joined(cls, groups: Sequence[Kept]) -> Kept:
        """The codes of groups of latents side by side, as torch.cat along the last axis has dense ones."""
        places, number = side_by_side([each.places for each in groups])
        values = torch.cat([each.values for each in groups])
        shape = (*groups[0].shape[:2], places.n_columns)
        return cls(values.new_zeros(len(values)).scatter(0, number, values), places, shape)

    def detach(self) -> Kept:
        """The same without gradients."""
        return Kept(self.values.detach(), self.places, self.shape)

    def times(self, dense: Float[Tensor, "L D"]) -> Float[Tensor, "B T D"]:
        """codes @ dense, in float32."""
        return times(self.values, dense, self.places).view(*self.shape[:2], -1)

    def times_by_block(self, dense: Float[Tensor, "L D"], blocks: list[int]) -> Float[Tensor, "B T P D"]:
        """codes[..., block] @ dense[block] for every block of neighbouring latents, of these sizes, in float32.

        The latents of a token must be in ascending order.
        """
        places = self.places.by_block(blocks)
        return times(self.values, dense, places).view(*self.shape[:2], len(blocks), -1)

    def at(self, places: Places) -> Float[Tensor, " A"]:
        """The codes at other places, each named once; 0 where nothing is kept."""
        padded = torch.cat([self.values, self.values.new_zeros(1)])
        return padded.gather(0, self.places.find(places))

    def sums(self) -> Float[Tensor, " N"]:
        """The sum of each token's codes."""
        return row_sums(self.values, self.places)

    def spread(self, of_tokens: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
        """A value per token, at each of its kept codes."""
        return of_rows(of_tokens, self.places)

    def fired(self) -> Int[Tensor, " L"]:
        """On how many tokens each latent is above 0."""
        counts = self.places.column.new_zeros(self.shape[-1])
        return counts.index_add_(0, self.places.column, (self.values > 0).long())  # bincount would wait for a GPU

    def dense(self) -> Float[Tensor, "B T L"]:
        """All codes, zeros and all."""
        flat = self.values.new_zeros(self.places.n_rows, self.shape[-1])
        return flat.index_put((self.places.row, self.places.column), self.values).view(self.shape)


Codes = Tensor | Kept
"""Codes [batch, window, latents], all of them or the kept ones."""


def product(codes: Codes, dense: Float[Tensor, "L D"], sparse: bool = False) -> Float[Tensor, "B T D"]:
    """codes @ dense in float32.

    Args:
        sparse: of dense codes take those that are not 0, if they are few. Only for codes that were chosen among others:
            the gradient of a code that is 0 is left out, and it must be one that goes nowhere.
    """
    if isinstance(codes, Kept):
        return codes.times(dense)
    if sparse:
        chosen = codes.detach().flatten().nonzero().squeeze(-1)
        if len(chosen) <= FEW * codes.numel():
            return Kept.of(codes, chosen).times(dense)
    return (codes @ dense).float()


class _Encoded(torch.autograd.Function):
    """Gives the gradient of pre-activations that were found without one, from where they were taken alone."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        entries: Entries,
    ) -> Tensor:
        ctx.save_for_backward(centred, W_enc)
        ctx.entries = entries
        return u

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        du, (*_, wants_b_enc, wants_b_dec, _) = gradients[0], ctx.needs_input_grad
        sums = ctx.entries.column_sums(du)
        of_b_dec = -(W_enc @ sums) if wants_b_dec else None
        return None, None, ctx.entries.transposed_times(du, centred).t(), sums if wants_b_enc else None, of_b_dec, None


def taken(
    u: Float[Tensor, "N L"],
    centred: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"] | None,
    b_dec: Float[Tensor, " D"] | None,
    places: Sequence[Places],
) -> Float[Tensor, " K"]:
    """u = centred W_enc + b_enc, known without gradients, at some places, with the gradients from there alone.

    Args:
        b_enc: None where u is without it.
        b_dec: what was subtracted from the input, if anything was.
    """
    entries = Entries.of(places)
    values: Tensor = _Encoded.apply(  # type: ignore[no-untyped-call]
        u[entries.row, entries.column], centred, W_enc, b_enc, b_dec, entries
    )
    return values


def with_gradients_of(values: Float[Tensor, " K"], part: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Values that have `part` in them already, with its gradients beside their own."""
    return values + (part - part.detach())


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return vector[places.column]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.places.entries.column_sums(gradients[0]), None  # autograd's own adds in any order


def at(vector: Float[Tensor, " L"], places: Places) -> Float[Tensor, " K"]:
    """A value per latent, at the latent of each place."""
    values: Tensor = _At.apply(vector, places)  # type: ignore[no-untyped-call]
    return values


@torch.no_grad()
def all_of(
    x: Float[Tensor, "B T D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"],
    b_dec: Float[Tensor, " D"],
    valid: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N L"]]:
    """x − b_dec, and u = (x − b_dec) W_enc + b_enc of all latents, 0 where not `valid`, for choosing among them."""
    centred, W_enc = (x - b_dec).flatten(0, 1), W_enc.detach()  # else older autocast keeps a copy without gradient
    if torch.is_autocast_enabled(x.device.type):
        u = (centred @ W_enc).float().add_(b_enc)  # the product in the lower precision, the sum in float32
    else:
        u = torch.addmm(b_enc, centred, W_enc)
    if valid is not None:
        u.masked_fill_(~valid.flatten()[:, None], 0.0)
    return centred, u


def encode_kept(
    x: Float[Tensor, "B T D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"],
    b_dec: Float[Tensor, " D"],
    valid: Bool[Tensor, "B T"] | None,
    choose: Choice,
    dead: Bool[Tensor, " L"] | None = None,
    among: Int[Tensor, " C"] | None = None,
) -> tuple[Kept, Kept | None]:
    """ReLU((x − b_dec) W_enc + b_enc) where chosen, and the d_in / 2 largest of the `dead` latents, for AuxK.

    Args:
        valid: positions that count, None where all do; at others nothing is above 0.
        choose: which of u, not rectified, [tokens, latents] are kept.
        dead: None where none is.
        among: latents that all of the dead are among, where the host knows some.
    """
    centred, u = all_of(x, W_enc, b_enc, b_dec, valid)
    places = largest_of(u, choose, x.shape[-1], dead, among)
    values = taken(u, centred, W_enc, b_enc, b_dec, places)
    return codes_at(values, places, (x.shape[0], x.shape[1], W_enc.shape[1]), dead)


@torch.no_grad()
def largest_of(
    u: Float[Tensor, "N L"],
    choose: Choice,
    d_in: int,
    dead: Bool[Tensor, " L"] | None,
    among: Int[Tensor, " C"] | None,
) -> list[Places]:
    """Places of the codes of a step, and of the d_in / 2 largest of each token's dead latents, where some may be."""
    return [choose(u)] if dead is None else [choose(u), keep_top_k_of(u, dead, d_in // 2, among)]


def codes_at(
    u: Float[Tensor, " K"], places: Sequence[Places], shape: tuple[int, int, int], dead: Bool[Tensor, " L"] | None
) -> tuple[Kept, Kept | None]:
    """The codes of a step, and those for AuxK, from their pre-activations one after the other."""
    parts = list(u.relu().split([len(each.column) for each in places]))
    if dead is not None:  # on a GPU some of these places may be of others
        parts[1] = parts[1] * dead[places[1].column]
    kept = [Kept(part, each, shape) for part, each in zip(parts, places, strict=True)]
    return kept[0], kept[1] if dead is not None else None
