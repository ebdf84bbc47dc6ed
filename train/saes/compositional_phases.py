"""What `compositional` does before all three levels train, and when parts are found anew.

First the low level alone, as flat BatchTopK; then, at a landmark, parts from its directions and co-activity, upper
levels that start from them, and one gain per level; in `reassign`, candidates anew from time to time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from train.data.batch import Batch
from train.saes import composition, spectral
from train.saes.base import Batches, Output
from train.saes.composition import HIGH, LOW, MID, CoActivity, Hierarchy
from train.saes.compositional_config import CompositionalConfig
from train.saes.grouped import aux_k_kept, only_some
from train.saes.kept import Codes, Kept, encode_kept, product
from train.saes.linear import AuxK
from train.saes.parts import (
    aux_k_loss,
    batch_top_k,
    count_silence_,
    masked,
    pre_activations,
    reconstruction_loss,
    smallest_kept,
    update_average_,
)
from train.saes.places import keep_batch_top_k
from train.schedule import Clock, averaging

if TYPE_CHECKING:  # which imports this module
    from train.saes.compositional import Compositional

REASSIGN_STEPS = 5000  # or half of a shorter run
REASSIGN_UNTIL = 0.8
Sizes = tuple[int, int, int]


def reassignments(start: int, n_steps: int) -> range:
    """Steps before which candidates are found anew, in a run whose three levels begin at `start`."""
    every = max(min(REASSIGN_STEPS, n_steps // 2), 1)
    return range(start + every, int(REASSIGN_UNTIL * n_steps), every)


# ---- the low level alone -----------------------------------------------------------------------------------------


def flat_pass(sae: Compositional, batch: Batch, clock: Clock) -> Output:
    """The low level alone, with all of k."""
    place = sae.places[LOW]
    rows = sae.W_dec[place] if sae.config.decoder == "free" else sae.W_low
    dead = sae.dead(clock)[place]
    f, aux_k = (_flat_kept if sae.sparse else _flat_whole)(sae, batch, dead, rows, clock)
    smallest = smallest_kept(f.values if isinstance(f, Kept) else f)
    update_average_(sae.sparsity.threshold[LOW], smallest, averaging(clock.n_steps), clock.step == 0)
    reconstruction = product(f, rows) + sae.b_dec
    count_silence_(sae.tokens_silent[place], f, batch.n_valid)
    parts = {
        "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
        "aux": sae.config.aux_alpha * aux_k(batch.x - reconstruction),
    }
    return Output(parts, _of_all_levels(sae, f), reconstruction, {"dead": dead.float().mean()})


def _flat_whole(sae: Compositional, batch: Batch, dead: Tensor, rows: Tensor, clock: Clock) -> tuple[Tensor, AuxK]:
    u, f = flat(sae, batch, clock)
    return f, lambda residual: aux_k_loss(residual, u, dead, rows, batch.valid)


def _flat_kept(sae: Compositional, batch: Batch, dead: Tensor, rows: Tensor, clock: Clock) -> tuple[Kept, AuxK]:
    place, n_kept = sae.places[LOW], round(sae.sparsity.k_at(clock) * batch.n_valid)
    weights = (sae.W_enc[:, place], sae.b_enc[place], sae.b_dec)
    choice = functools.partial(keep_batch_top_k, n_kept=n_kept)
    f, of_dead = encode_kept(batch.x, *weights, only_some(batch), choice, sae.maybe(dead))
    return f, lambda residual: aux_k_kept(residual, of_dead, dead, rows, batch.valid)


def _of_all_levels(sae: Compositional, low: Codes) -> Codes:
    if isinstance(low, Kept):
        return Kept(low.values, low.places.among(sae.n_upper, sae.d_sae), (*low.shape[:2], sae.d_sae))
    return torch.cat([low.new_zeros(*low.shape[:2], sae.n_upper), low], dim=-1)


def flat(sae: Compositional, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor]:
    """Rectified pre-activations of the low level, and the k·N largest of them."""
    place = sae.places[LOW]
    u = torch.relu(pre_activations(batch.x, sae.W_enc[:, place], sae.b_enc[place], sae.b_dec))
    u = masked(u, batch.valid, batch.n_valid)
    return u, batch_top_k(u, min(round(sae.sparsity.k_at(clock) * batch.n_valid), u.numel()))


# ---- parts -------------------------------------------------------------------------------------------------------


def first_hierarchies(
    config: CompositionalConfig, sizes: Sizes, rows: Float[Tensor, "W D"], generator: torch.Generator
) -> tuple[Hierarchy, Hierarchy]:
    """Parts to begin with: those for good, or, where clustering comes later, any."""
    if config.pretrain and config.hierarchy != "fixed_random":
        low, mid, high = sizes
        width = config.candidates
        return composition.any_hierarchy(low, mid, width), composition.any_hierarchy(mid, high, width)
    similar = composition.affinity(rows, rows, None)
    return hierarchies(config, sizes, similar, torch.ones(len(rows)), generator)


def hierarchies(
    config: CompositionalConfig,
    sizes: Sizes,
    affinity: Float[Tensor, "W W"],
    mass: Float[Tensor, " W"],
    generator: torch.Generator,
) -> tuple[Hierarchy, Hierarchy]:
    """Parts of the mid and of the high level, by clustering the low one; or at random."""
    low, mid, high = sizes
    if config.hierarchy == "fixed_random":
        n_parts = config.random_parts
        first = composition.random_hierarchy(low, mid, n_parts, generator)
        return first, composition.random_hierarchy(mid, high, n_parts, generator)
    affinity = composition.strongest(affinity)
    first, member = found_parts(config, affinity, mass, mid, generator)
    above = member @ affinity @ member.T  # mean over pairs of parts
    return first, found_parts(config, above, member @ mass, high, generator)[0]


def found_parts(
    config: CompositionalConfig,
    affinity: Float[Tensor, "W W"],
    mass: Float[Tensor, " W"],
    n_upper: int,
    generator: torch.Generator,
) -> tuple[Hierarchy, Float[Tensor, "U W"]]:
    """One level's parts, and their membership, by the clustering asked for."""
    if config.clustering == "seeds":
        return composition.seeds_with_overlap(affinity, mass, n_upper, config.candidates, generator)
    clusters = spectral.partition(affinity, n_upper, generator.initial_seed() % 2**32)
    return composition.from_clusters(affinity, clusters, n_upper, config.candidates)


def cluster(sae: Compositional, batches: Batches, clock: Clock) -> dict[str, Tensor]:
    """Parts from the low level's directions and co-activity; upper levels start from them."""
    counts, first = CoActivity(), None
    for batch in batches():
        first = first or batch
        f = flat(sae, batch, clock)[1][batch.valid]
        counts.add(f, f)
    assert first is not None
    rows = sae.rows()[sae.places[LOW]]
    generator = torch.Generator().manual_seed(sae.seed + 1 + clock.step)
    similar = composition.affinity(rows, rows, counts.correlation())
    made = hierarchies(sae.config, sae.sizes, similar, counts.mass, generator)
    for name, found in zip(("mid", "high"), made, strict=True):
        sae.get_parameter(f"logits_{name}").copy_(found.logits())
        sae.get_buffer(f"candidates_{name}").copy_(found.candidates)
    upper = slice(0, sae.n_upper)
    A1, A2 = sae.compositions()
    mid = composition.composed_rows(A1, rows)
    sae.W_dec[upper] = torch.cat([composition.composed_rows(A2, mid), mid])
    sae.after_step(clock)  # with the residual, if there is one
    sae.W_enc[:, upper] = sae.W_dec[upper].T
    sae.b_enc[upper] = 0.0
    sae.tokens_silent[upper] = 0
    sae.sparsity.threshold[MID:] = 0.0
    fit_gains(sae, first, clock)
    changed = torch.arange(sae.d_sae, device=rows.device) < sae.n_upper
    averages = {"W_enc": changed[None], "b_enc": changed}
    return averages | ({"W_dec": changed[:, None]} if sae.config.decoder == "free" else {})


def fit_gains(sae: Compositional, batch: Batch, clock: Clock) -> None:
    """Scale each level so that the nested loss on one batch is least, and start the thresholds."""
    f = sae.levels(batch, sae.compositions(), clock)[1]
    h = masked((batch.x - sae.b_dec).float(), batch.valid, batch.n_valid).flatten()
    written = torch.stack([(codes @ sae.W_dec[place]).flatten() for codes, place in zip(f, sae.places, strict=True)])
    gains = composition.fitted_gains(written, h, sae.omega)
    for level, place in enumerate(sae.places):
        sae.W_enc[:, place] *= gains[level]
        sae.b_enc[place] *= gains[level]
        if level:  # what comes from below has that level's gain already
            sae.coupling[place] *= gains[level] / gains[level - 1]
    sae.sparsity.begin_([codes * gain for codes, gain in zip(f, gains, strict=True)])


def reassign(sae: Compositional, batches: Batches, clock: Clock) -> dict[str, Tensor]:
    """Candidates anew from the levels' present directions and co-activity; kept ones keep their weight."""
    counts = (CoActivity(), CoActivity())
    for batch in batches():
        low, mid, high = (f[batch.valid] for f in sae.levels(batch, sae.compositions(), None)[1])
        counts[0].add(low, mid)
        counts[1].add(mid, high)
    averages = {}
    for name, level, found in zip(("mid", "high"), (MID, HIGH), counts, strict=True):
        lower, upper = sae.W_dec[sae.places[level - 1]], sae.W_dec[sae.places[level]]
        affinities = composition.affinity(lower, upper, found.correlation())
        logits, candidates = sae.get_parameter(f"logits_{name}"), sae.get_buffer(f"candidates_{name}")
        moved, values, changed = composition.reassigned(affinities, candidates, logits)
        candidates.copy_(moved)
        logits.copy_(values)
        averages[f"logits_{name}"] = changed
    sae.after_step(clock)
    return averages
