"""The codes of a training step of `relational`, all of them or the kept ones alone.

With the kept ones u, and the terms that are added to it, is found without gradients; both then have theirs from the
kept places alone. The two ways agree up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.data.batch import Batch
from train.saes.grouped import aux_k_kept, choose_by_group, note_by_group, only_some, through
from train.saes.kept import Codes, all_of, codes_at, largest_of, taken
from train.saes.parts import masked
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.relational import Relational


@dataclass(frozen=True)
class Coded:
    """What a training step is made from.

    Attributes:
        latents: [batch, window, latents], all or the kept ones.
        gate: g, where there is one.
        measured: how large the terms are, and the gate.
        aux_k: AuxK's loss from the residual.
    """

    latents: Codes
    gate: Float[Tensor, "B T 1"] | None
    measured: Mapping[str, Tensor]
    aux_k: Callable[[Tensor], Tensor]


def coded_plain(sae: Relational, batch: Batch, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
    terms, measured = sae.terms(batch, clock), {}
    added = {} if terms is None else terms.dense()
    temporal, static = sae.pre_activations(batch, added)
    groups = [masked(torch.relu(u), batch.valid, batch.n_valid) for u in (temporal, static)]
    kept = [sae.sparsity.active(u, i, batch.n_valid, clock) for i, u in enumerate(groups)]
    latents = torch.cat(sae.sparsity.settle(groups, kept, batch.n_valid, clock), dim=-1)
    if terms is not None:
        alone = masked((temporal - torch.stack(list(added.values())).sum(0)).detach(), batch.valid, batch.n_valid)
        norms = {name: masked(term.detach(), batch.valid, batch.n_valid).norm() for name, term in added.items()}
        measured = measures(norms, alone.norm(), terms.gate, batch)
    u, gate = torch.cat(groups, dim=-1), None if terms is None else terms.gate
    return Coded(latents, gate, measured, lambda residual: sae.aux_k(residual, u, dead, batch.valid))


def coded_sparse(sae: Relational, batch: Batch, dead: Bool[Tensor, " L"], clock: Clock) -> Coded:
    terms, valid, some, measured = sae.terms(batch, clock), only_some(batch), sae.maybe(dead), {}
    centred, u = all_of(batch.x, sae.W_enc, sae.b_enc, sae.b_dec, valid)
    if terms is not None:
        temporal = u[:, : sae.n_temporal]
        measured = measures(terms.norms(valid), temporal.norm(), terms.gate, batch)
        left, right = terms.joined(valid, sae.d_sae)
        temporal.addmm_(left.detach(), right.detach()[:, : sae.n_temporal])
    places = largest_of(u, choose_by_group(sae.sparsity, batch.n_valid, clock), sae.d_in, some, sae.may_die)
    values = taken(u, centred, sae.W_enc, sae.b_enc, sae.b_dec, places)
    if terms is not None:
        values = through(values, left, right, places)
    latents, of_dead = codes_at(values, places, (batch.x.shape[0], batch.x.shape[1], sae.d_sae), some)
    note_by_group(sae.sparsity, latents, clock)
    gate = None if terms is None else terms.gate
    return Coded(latents, gate, measured, lambda residual: aux_k_kept(residual, of_dead, dead, sae.W_dec, batch.valid))


@torch.no_grad()
def measures(
    norms: Mapping[str, Float[Tensor, ""]], alone: Float[Tensor, ""], gate: Float[Tensor, "B T 1"], batch: Batch
) -> dict[str, Float[Tensor, ""]]:
    """The mean gate, and the terms' norms over that of the temporal group's pre-activation without them."""
    ratios = {f"{name}_ratio": norm / alone for name, norm in norms.items()}
    return ratios | {"gate": masked(gate, batch.valid, batch.n_valid).sum() / batch.n_valid}
