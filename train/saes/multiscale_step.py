"""The codes of a training step of `multiscale`, all of them or the kept ones alone.

With the kept ones u is found without gradients, one dense product per group. A kept entry belongs to one group, so the
inputs y^δ of all of them are one matrix [tokens · groups, d_model], of whose product with W_enc the kept entries are
a sample: gradients for both come from there. The two ways agree up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from train.data.batch import Batch
from train.saes.grouped import all_of_groups, aux_k_kept, choose_by_group, note_by_group, only_some, through
from train.saes.kept import Codes, codes_at, encode_kept, largest_of
from train.saes.parts import masked
from train.saes.places import Entries
from train.saes.taps import Past
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.multiscale import MultiScale


@dataclass(frozen=True)
class Coded:
    """What a training step is made from.

    Attributes:
        latents: [batch, window, latents], all or the kept ones.
        aux_k: AuxK's loss from the residual.
        penalty: the loss part of an L1 penalty, if there is one.
    """

    latents: Codes
    aux_k: Callable[[Tensor], Tensor]
    penalty: Mapping[str, Tensor] = field(default_factory=dict)


def coded_plain(sae: MultiScale, batch: Batch, past: Past, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
    u = masked(sae.pre_activations(batch, past), batch.valid, batch.n_valid)
    active = sae.active(u, batch.n_valid, clock)
    latents = torch.cat(active, dim=-1) if len(active) > 1 else active[0]
    penalty = sae.sparsity.penalty(active, batch.n_valid, clock)
    return Coded(latents, lambda residual: sae.aux_k(residual, u, dead, batch.valid), penalty)


def coded_sparse(sae: MultiScale, batch: Batch, past: Past, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
    choose, valid, some = choose_by_group(sae.sparsity, batch.n_valid, clock), only_some(batch), sae.maybe(dead)
    if sae.config.convolution == "none":
        latents, of_dead = encode_kept(batch.x, sae.W_enc, sae.b_enc, sae.b_dec, valid, choose, some, sae.may_die)
    else:
        h = past[0][0]
        y = torch.stack([h + values for values in sae.context(past)], dim=2)
        u = all_of_groups(y, sae.W_enc, sae.b_enc, sae.sizes, valid)
        kept, *others = largest_of(u, choose, sae.d_in, some, sae.may_die)
        places = [kept, *(each.ascending() for each in others)]
        entries = Entries.of(places)
        by_group = [each.by_block(sae.sizes) for each in places]
        values = through(u[entries.row, entries.column], y.flatten(0, 2), sae.W_enc, by_group, sae.b_enc)
        latents, of_dead = codes_at(values, places, (batch.x.shape[0], batch.x.shape[1], sae.d_sae), some)
    note_by_group(sae.sparsity, latents, clock)
    return Coded(latents, lambda residual: aux_k_kept(residual, of_dead, dead, sae.W_dec, batch.valid))
