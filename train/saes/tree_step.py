"""A training step of `tree` with the kept codes alone.

First, without gradients and level by level: u of all latents with the aggregates of what was kept so far, and which are
kept. Then the kept codes again, with gradients: through their own entries of u (`taken`) and through the aggregates at
their places. Losses, AuxK and counts are over kept codes too. It agrees with the plain step up to the order of
additions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from train.data.batch import Batch
from train.saes.base import Output
from train.saes.consistency import Pair, agreement, coverage_loss, divergence, l2_loss, n_linked, shortfall
from train.saes.grouped import aux_k_kept, only_some
from train.saes.kept import Kept, all_of, at, taken, with_gradients_of
from train.saes.kept_forest import Aggregate, Gathered, HandedDown
from train.saes.parts import count_silence_
from train.saes.places import Places, keep_batch_top_k, keep_top_k_of
from train.saes.tree_config import TreeConfig
from train.schedule import Clock

if TYPE_CHECKING:  # which imports this module
    from train.saes.tree import Tree


def steps_with_kept(config: TreeConfig) -> bool:
    """Whether there is such a step under these settings; if not, all codes are computed, and the kept ones decoded."""
    return config.sparsity == "budgets" and config.swap == 0 and config.rho == 0


def kept_pass(sae: Tree, batch: Batch, clock: Clock) -> Output:
    """`training_pass`, from the kept codes alone."""
    dead, rows = sae.dead(clock), sae.rows()
    chosen = choose(sae, batch, sae.maybe(dead), clock)
    levels = encoded(sae, chosen, dead, (batch.x.shape[0], batch.x.shape[1]))
    loss, reconstruction = sae.nested(batch, levels.latents, rows)
    aux = aux_k_kept(batch.x - reconstruction, levels.of_dead, dead, rows, batch.valid)
    count_silence_(sae.tokens_silent, levels.latents, batch.n_valid)
    parts = {"reconstruction": loss, "aux": sae.config.aux_alpha * aux} | agreement(sae.config, levels.pairs, clock)
    return Output(parts, levels.latents, reconstruction, {"dead": dead.float().mean()} | sae.sparsity.logged())


# ---- which codes are kept --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """Of codes whose aggregate is silent: the latent of the other level that is nearest to being active.

    Attributes:
        alone: numbers of the codes among the kept ones of their level.
        places: of the nearest latents, [tokens, latents].
    """

    alone: Int[Tensor, " n"]
    places: Places


@dataclass(frozen=True)
class Chosen:
    """What a step keeps, by level in the order of encoding; known without gradients.

    Attributes:
        centred: x − b_dec, [tokens, d_model].
        u: pre-activations with their aggregates, not rectified, [tokens, latents].
        kept: places of the codes, [tokens, latents of the level].
        aggregates: of all levels but the first.
        nearest: of the same levels, where there is a loss of coverage.
        dead: where AuxK looks, [tokens, latents]; nothing where the host knows that no latent is dead.
    """

    centred: Float[Tensor, "N D"]
    u: Float[Tensor, "N L"]
    kept: dict[int, Places] = field(default_factory=dict)
    aggregates: dict[int, Aggregate] = field(default_factory=dict)
    nearest: dict[int, Nearest] = field(default_factory=dict)
    dead: list[Places] = field(default_factory=list)


@torch.no_grad()
def choose(sae: Tree, batch: Batch, dead: Bool[Tensor, " L"] | None, clock: Clock) -> Chosen:
    """Level by level, the largest of each; thresholds take note of them."""
    chosen = Chosen(*all_of(batch.x, sae.direct_encoder(), sae.b_enc, sae.b_dec, only_some(batch)))
    codes = chosen.u.new_zeros(0)
    for place, level in enumerate(sae.order):
        u = chosen.u[:, sae.forest.spans[level]]
        if place > 0:
            aggregate = aggregate_of(sae, chosen.kept[sae.order[place - 1]], level)
            values = aggregate.of(codes, edges_to(sae, level))
            add_aggregate_(sae, u, aggregate.places, values, level)
            chosen.aggregates[level] = aggregate
        kept = keep_batch_top_k(u, sae.sparsity.n_kept(place, batch.n_valid, clock))
        codes = u[kept.row, kept.column].relu_()
        sae.sparsity.note(codes, place, clock)
        chosen.kept[level] = kept
        if place > 0 and sae.config.coverage > 0:
            seen = Kept(values, aggregate.places, (len(u), 1, u.shape[1])).at(kept)
            alone = (codes > 0) & (seen == 0) & (kept.column < n_linked(sae, level))
            chosen.nearest[level] = nearest(sae, chosen.u, kept, alone.nonzero().squeeze(-1), level)
    if dead is not None:
        chosen.dead.append(keep_top_k_of(chosen.u, dead, sae.d_in // 2, sae.may_die))
    return chosen


def aggregate_of(sae: Tree, kept: Places, level: int) -> Aggregate:
    """That of a level, of codes kept at these places of the level encoded before it."""
    forest = sae.forest
    if sae.config.orientation == "bottom_up":
        return Gathered.from_children(kept, forest.sizes[level], forest.n_children(level))
    return HandedDown.from_parents(kept, forest.n_children(level - 1), forest.sizes[level])


def edges_to(sae: Tree, level: int) -> Float[Tensor, " C"]:
    """w of the edges over which a level's aggregate comes."""
    lower = level + 1 if sae.config.orientation == "bottom_up" else level
    return sae.edge_weights()[sae.forest.spans[lower]]


def add_aggregate_(sae: Tree, u: Float[Tensor, "N A"], places: Places, values: Float[Tensor, " K"], level: int) -> None:
    """Add κ a to a level's u, and close what a hard gate closes."""
    where = (places.row, places.column)
    if sae.kappa is not None:
        u[where] += softplus(sae.kappa[sae.forest.spans[level]])[places.column] * values
    if sae.config.gate == "hard":
        closed = torch.ones_like(u, dtype=torch.bool)
        closed[where] = values == 0
        closed[:, n_linked(sae, level) :] = False
        u.masked_fill_(closed, 0.0)


def nearest(sae: Tree, u: Float[Tensor, "N L"], kept: Places, alone: Int[Tensor, " n"], level: int) -> Nearest:
    """The best child of each code that is alone; top down, its parent."""
    forest, row, column = sae.forest, kept.row[alone], kept.column[alone]
    if sae.config.orientation == "top_down":
        best = forest.spans[level - 1].start + column // forest.n_children(level - 1)
    else:
        n = forest.n_children(level)
        first = forest.spans[level + 1].start + column * n
        best = first + u[row[:, None], first[:, None] + torch.arange(n, device=u.device)].argmax(-1)
    return Nearest(alone, Places.numbered(row * sae.d_sae + best, len(u), sae.d_sae))


# ---- their values, with gradients ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptPair(Pair):
    """The kept codes of a level and their aggregate.

    Attributes:
        f: the codes, 0 for latents that have no edge to the other level.
        a: the aggregate of all latents of the level.
        seen: the aggregate at the places of f.
        short: of each code that is alone, how far the nearest latent of the other level is from being active. None of
            these was closed by a hard gate, under which no code is alone.
    """

    f: Kept
    a: Kept
    seen: Float[Tensor, " K"]
    short: Float[Tensor, " K"]
    n: int

    def l2(self) -> Float[Tensor, ""]:
        return l2_loss(self.f.values, self.seen)

    def kl(self) -> Float[Tensor, ""]:
        f, sum_f, sum_a = self.f, self.f.sums(), self.a.sums()
        counted = (sum_f > 0) & (sum_a > 0)
        each = divergence(f.values, self.seen, f.spread(sum_f), f.spread(sum_a), self.n)
        return (each * counted[f.places.row]).sum() / counted.sum().clamp_min(1)

    def coverage(self) -> Float[Tensor, ""]:
        return coverage_loss(self.f.values, self.seen, self.short)


@dataclass(frozen=True)
class KeptLevels:
    """The kept codes of a step.

    Attributes:
        latents: of all levels.
        pairs: every level after the first with its aggregate, in the order of encoding.
        of_dead: codes of dead latents, for AuxK; None where the host knows that none is dead.
    """

    latents: Kept
    pairs: list[KeptPair]
    of_dead: Kept | None


def encoded(sae: Tree, chosen: Chosen, dead: Bool[Tensor, " L"], shape: tuple[int, int]) -> KeptLevels:
    """The codes of a step of [batch, window] tokens."""
    spans = sae.forest.spans
    sets = [places.among(spans[level].start, sae.d_sae) for level, places in chosen.kept.items()]
    others = [*(each.places for each in chosen.nearest.values()), *chosen.dead]
    u = taken(chosen.u, chosen.centred, sae.direct_encoder(), sae.b_enc, sae.b_dec, sets + others)
    parts = list(u.split([len(places.column) for places in sets + others]))
    codes, aggregates, seen = _by_level(sae, chosen, parts, shape)
    of_others = []
    if others:
        aggregate = Kept.joined([aggregates[level] for level in sorted(aggregates)])
        each = zip(parts[len(sets) :], others, strict=True)
        of_others = [through_aggregate(u, sae.kappa, places, aggregate.at(places)) for u, places in each]
    latents = Kept.joined([codes[level] for level in sorted(codes)])
    pairs, of_dead = [], None
    for number, (level, a) in enumerate(list(aggregates.items())[1:]):
        f, linked = codes[level], n_linked(sae, level)
        short = torch.zeros_like(f.values)
        if level in chosen.nearest:
            source, threshold = codes[sae.order[number]].values, sae.sparsity.threshold[number]
            short = short.index_put((chosen.nearest[level].alone,), shortfall(of_others[number], source, threshold))
        f = Kept(f.values * (f.places.column < linked), f.places, f.shape)
        pairs.append(KeptPair(f, a, seen[level], short, linked))
    if chosen.dead:  # on a GPU some of these may not be dead
        of_dead = Kept(of_others[-1].relu() * dead[others[-1].column], others[-1], latents.shape)
    return KeptLevels(latents, pairs, of_dead)


def _by_level(
    sae: Tree, chosen: Chosen, u: list[Tensor], shape: tuple[int, int]
) -> tuple[dict[int, Kept], dict[int, Kept], dict[int, Tensor]]:
    """Codes, aggregates, and aggregates at the places of the codes, by level, from u at these places."""
    codes: dict[int, Kept] = {}
    aggregates: dict[int, Kept] = {}
    seen: dict[int, Tensor] = {}
    for place, (level, kept) in enumerate(chosen.kept.items()):
        size, values = (*shape, sae.forest.sizes[level]), u[place]
        if place == 0:
            aggregates[level] = Kept(values[:0], Places.numbered(kept.column[:0], kept.n_rows, kept.n_columns), size)
        else:
            below, aggregate = codes[sae.order[place - 1]], chosen.aggregates[level]
            aggregates[level] = Kept(aggregate.of(below.values, edges_to(sae, level)), aggregate.places, size)
            seen[level] = aggregates[level].at(kept)
            kappa = None if sae.kappa is None else sae.kappa[sae.forest.spans[level]]
            values = through_aggregate(values, kappa, kept, seen[level])
        codes[level] = Kept(values.relu(), kept, size)
    return codes, aggregates, seen


def through_aggregate(u: Tensor, kappa: Tensor | None, places: Places, aggregate: Float[Tensor, " K"]) -> Tensor:
    """u at these places, which κ a is part of, with the gradients of κ a."""
    if kappa is None:
        return u
    return with_gradients_of(u, at(softplus(kappa), places) * aggregate)
