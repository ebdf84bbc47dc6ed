"""A training step of `compositional` with the kept codes alone.

First, without gradients and from low to high: u of all latents with what the kept codes below add, and which are kept.
Then the kept codes again, with gradients: through their own entries of u (`taken`), and through A from the codes below.
Of A only the candidates are looked at, in f A (`reach`), in upper rows and in their cosines with parts. It agrees with
the plain step up to the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.data.batch import Batch
from train.saes import composition
from train.saes.base import Output
from train.saes.composition import HIGH, MID
from train.saes.compositional_config import CompositionalConfig
from train.saes.compositional_losses import agreement_weight, row_losses
from train.saes.consistency import l2_loss
from train.saes.grouped import aux_k_kept, only_some
from train.saes.kept import Kept, all_of, at, taken, with_gradients_of
from train.saes.parts import count_silence_
from train.saes.places import Places, keep_batch_top_k, keep_top_k_of
from train.saes.reach import Reach
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.compositional import Compositional


def steps_with_kept(config: CompositionalConfig) -> bool:
    """Whether there is such a step under these settings; if not, all codes are computed, and the kept ones decoded."""
    from_values = config.agreement > 0 and config.agree_on == "values"
    return config.sparsity == "budgets" and config.group == 0 and not from_values


def kept_pass(sae: Compositional, batch: Batch, clock: Clock) -> Output:
    """`training_pass` of all three levels, from the kept codes alone."""
    dead, A = sae.dead(clock), sae.composed_of(composition.kept)
    W_dec = sae.rows(A)
    chosen = choose(sae, batch, A, sae.maybe(dead), clock)
    levels = encoded(sae, chosen, A, dead, (batch.x.shape[0], batch.x.shape[1]))
    loss, reconstruction = sae.nested(batch, levels.latents, W_dec)
    aux = aux_k_kept(batch.x - reconstruction, levels.of_dead, dead, W_dec, batch.valid)
    parts = {"reconstruction": loss, "aux": sae.config.aux_alpha * aux}
    if sae.config.agreement:
        parts["agreement"] = agreement_weight(sae.config, clock) * agreement(levels.codes, chosen, A)
    parts |= row_losses(sae, W_dec, composition.nearest_part_kept)
    count_silence_(sae.tokens_silent, levels.latents, batch.n_valid)
    return Output(parts, levels.latents, reconstruction, sae.figures(dead))


# ---- which codes are kept --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What a step keeps; known without gradients.

    Attributes:
        centred: x − b_dec, [tokens, d_model].
        u: pre-activations with what comes from below, not rectified, [tokens, latents].
        kept: from low to high, places of the codes [tokens, latents of the level].
        reach: what the codes of low reach in mid, and those of mid in high.
        dead: where AuxK looks, [tokens, latents]; nothing where the host knows that no latent is dead.
    """

    centred: Float[Tensor, "N D"]
    u: Float[Tensor, "N L"]
    kept: list[Places] = field(default_factory=list)
    reach: list[Reach] = field(default_factory=list)
    dead: list[Places] = field(default_factory=list)


@torch.no_grad()
def choose(
    sae: Compositional, batch: Batch, A: tuple[Kept, Kept], dead: Bool[Tensor, " L"] | None, clock: Clock
) -> Chosen:
    """Level by level, the largest of each; thresholds take note of them."""
    chosen = Chosen(*all_of(batch.x, sae.direct_encoder(), sae.b_enc, sae.b_dec, only_some(batch)))
    codes = chosen.u.new_zeros(0)
    for level, own in enumerate(sae.places):
        if level:
            reach, weights = Reach.of(chosen.kept[-1], A[level - 1].places), A[level - 1].values
            if sae.config.encoder != "no_comp":
                scaled = (weights.view(own.stop - own.start, -1) * sae.coupling[own, None]).flatten()
                reach.add_to_(chosen.u, own.start, codes, scaled)
            chosen.reach.append(reach)
        u = chosen.u[:, own]
        places = keep_batch_top_k(u, sae.sparsity.n_kept(level, batch.n_valid, clock))
        codes = u[places.row, places.column].relu_()
        sae.sparsity.note(codes, level, clock)
        chosen.kept.append(places)
    if dead is not None:
        chosen.dead.append(keep_top_k_of(chosen.u, dead, sae.d_in // 2, sae.may_die))
    return chosen


# ---- their values, with gradients ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptLevels:
    """The kept codes of a step.

    Attributes:
        codes: from low to high.
        latents: of all levels.
        of_dead: codes of dead latents, for AuxK; None where the host knows that none is dead.
    """

    codes: list[Kept]
    latents: Kept
    of_dead: Kept | None


def encoded(
    sae: Compositional, chosen: Chosen, A: tuple[Kept, Kept], dead: Bool[Tensor, " L"], shape: tuple[int, int]
) -> KeptLevels:
    """The codes of a step of [batch, window] tokens."""
    sets = [places.among(own.start, sae.d_sae) for places, own in zip(chosen.kept, sae.places, strict=True)]
    u = taken(chosen.u, chosen.centred, sae.direct_encoder(), sae.b_enc, sae.b_dec, sets + chosen.dead)
    parts = list(u.split([len(places.column) for places in sets + chosen.dead]))
    codes: list[Kept] = []
    for level, (own, places) in enumerate(zip(sae.places, chosen.kept, strict=True)):
        if level and sae.config.encoder != "no_comp":
            below = codes[-1].values.detach() if sae.config.detach_lower else codes[-1].values
            reach, weights, coupling = chosen.reach[level - 1], A[level - 1].values, sae.coupling[own]
            added = at(coupling, places) * reach.at(places).sums(below, weights)
            parts[level] = with_gradients_of(parts[level], added)
            if chosen.dead:
                inside, some = within(chosen.dead[0], own)
                added = at(coupling, some) * reach.at(some).sums(below, weights)
                parts[-1] = with_gradients_of(parts[-1], torch.zeros_like(parts[-1]).index_put((inside,), added))
        codes.append(Kept(parts[level].relu(), places, (*shape, sae.sizes[level])))
    latents = Kept.joined(codes[::-1])
    if not chosen.dead:
        return KeptLevels(codes, latents, None)
    places = chosen.dead[0]  # on a GPU some of these may not be dead
    return KeptLevels(codes, latents, Kept(parts[-1].relu() * dead[places.column], places, latents.shape))


def within(places: Places, own: slice) -> tuple[Int[Tensor, " K"], Places]:
    """Which of these places are of the latents of a level, and these as places of the level alone."""
    n = own.stop - own.start
    inside = ((places.column >= own.start) & (places.column < own.stop)).nonzero().squeeze(-1)
    return inside, Places.numbered(places.row[inside] * n + places.column[inside] - own.start, places.n_rows, n)


def agreement(codes: list[Kept], chosen: Chosen, A: tuple[Kept, Kept]) -> Float[Tensor, ""]:
    """`l2_loss` of the upper levels and what is below them, which looks at active upper codes alone."""
    losses = []
    for level in (MID, HIGH):
        below = chosen.reach[level - 1].at(chosen.kept[level]).sums(codes[level - 1].values, A[level - 1].values)
        losses.append(l2_loss(codes[level].values, below))
    return torch.stack(losses).sum()
