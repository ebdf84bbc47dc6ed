"""A training step of `compositional` with the kept codes alone.

First, without gradients and from low to high: u of all latents with what the kept codes below add, and which are kept.
Then the kept codes again, with gradients: through their own entries of u (`taken`), and through A from the codes below.
Of A and of the cosines of upper rows with their parts only the candidates are looked at. f A has all latents of a
level, [tokens, latents], and so has its gradient, but for those two no array has. It agrees with the plain step up to
the order of additions.
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
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.compositional import Compositional

Members = tuple[Tensor, Tensor]
"""A of low to mid [low, mid] and of mid to high [mid, high], zeros and all."""


def steps_with_kept(config: CompositionalConfig) -> bool:
    """Whether there is such a step under these settings; if not, all codes are computed, and the kept ones decoded."""
    from_values = config.agreement > 0 and config.agree_on == "values"
    return config.sparsity == "budgets" and config.group == 0 and not from_values


def kept_pass(sae: Compositional, batch: Batch, clock: Clock) -> Output:
    """`training_pass` of all three levels, from the kept codes alone."""
    dead, W_dec, members = sae.dead(clock), sae.rows(), sae.composed_of(composition.transposed)
    chosen = choose(sae, batch, members, sae.maybe(dead), clock)
    levels = encoded(sae, chosen, members, dead, (batch.x.shape[0], batch.x.shape[1]))
    loss, reconstruction = sae.nested(batch, levels.latents, W_dec)
    aux = aux_k_kept(batch.x - reconstruction, levels.of_dead, dead, W_dec, batch.valid)
    parts = {"reconstruction": loss, "aux": sae.config.aux_alpha * aux}
    if sae.config.agreement:
        parts["agreement"] = agreement_weight(sae.config, clock) * agreement(levels, members)
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
        dead: where AuxK looks, [tokens, latents]; nothing where the host knows that no latent is dead.
    """

    centred: Float[Tensor, "N D"]
    u: Float[Tensor, "N L"]
    kept: list[Places] = field(default_factory=list)
    dead: list[Places] = field(default_factory=list)


@torch.no_grad()
def choose(sae: Compositional, batch: Batch, members: Members, dead: Bool[Tensor, " L"] | None, clock: Clock) -> Chosen:
    """Level by level, the largest of each; thresholds take note of them."""
    chosen = Chosen(*all_of(batch.x, sae.direct_encoder(), sae.b_enc, sae.b_dec, only_some(batch)))
    below = None
    for level, place in enumerate(sae.places):
        u = chosen.u[:, place]
        if below is not None and sae.config.encoder != "no_comp":
            u.addcmul_(sae.coupling[place], below.times(members[level - 1]).flatten(0, 1))
        places = keep_batch_top_k(u, sae.sparsity.n_kept(level, batch.n_valid, clock))
        below = Kept(u[places.row, places.column].relu_(), places, (len(u), 1, u.shape[1]))
        sae.sparsity.note(below.values, level, clock)
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
    sae: Compositional, chosen: Chosen, members: Members, dead: Bool[Tensor, " L"], shape: tuple[int, int]
) -> KeptLevels:
    """The codes of a step of [batch, window] tokens."""
    sets = [places.among(own.start, sae.d_sae) for places, own in zip(chosen.kept, sae.places, strict=True)]
    u = taken(chosen.u, chosen.centred, sae.direct_encoder(), sae.b_enc, sae.b_dec, sets + chosen.dead)
    parts = list(u.split([len(places.column) for places in sets + chosen.dead]))
    codes: list[Kept] = []
    for level, (own, places) in enumerate(zip(sae.places, chosen.kept, strict=True)):
        if level and sae.config.encoder != "no_comp":
            below = codes[-1].detach() if sae.config.detach_lower else codes[-1]
            written, coupling = below.times(members[level - 1]), sae.coupling[own]
            parts[level] = with_gradients_of(parts[level], from_below(written, coupling, places))
            if chosen.dead:
                inside, some = within(chosen.dead[0], own)
                added = torch.zeros_like(parts[-1]).index_put((inside,), from_below(written, coupling, some))
                parts[-1] = with_gradients_of(parts[-1], added)
        codes.append(Kept(parts[level].relu(), places, (*shape, sae.sizes[level])))
    latents = Kept.joined(codes[::-1])
    if not chosen.dead:
        return KeptLevels(codes, latents, None)
    places = chosen.dead[0]  # on a GPU some of these may not be dead
    return KeptLevels(codes, latents, Kept(parts[-1].relu() * dead[places.column], places, latents.shape))


def from_below(written: Float[Tensor, "B T U"], coupling: Float[Tensor, " U"], places: Places) -> Float[Tensor, " K"]:
    """c_j (f A)_j at some places of a level."""
    return at(coupling, places) * written.flatten().gather(0, places.number)


def within(places: Places, own: slice) -> tuple[Int[Tensor, " K"], Places]:
    """Which of these places are of the latents of a level, and these as places of the level alone."""
    n = own.stop - own.start
    inside = ((places.column >= own.start) & (places.column < own.stop)).nonzero().squeeze(-1)
    return inside, Places.numbered(places.row[inside] * n + places.column[inside] - own.start, places.n_rows, n)


def agreement(levels: KeptLevels, members: Members) -> Float[Tensor, ""]:
    """`l2_loss` of the upper levels and what is below them, which looks at active upper codes alone."""
    losses = []
    for level, A in zip((MID, HIGH), members, strict=True):
        f, below = levels.codes[level], levels.codes[level - 1].times(A)
        losses.append(l2_loss(f.values, below.flatten().gather(0, f.places.number)))
    return torch.stack(losses).sum()
