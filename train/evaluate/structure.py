"""How much of a hierarchy its codes keep: scores of edges between parents and children, beside their null.

Over held-out tokens; p a parent, ch(p) its children, a_p = Σ_{c ∈ ch(p)} w_c f_c, π a latent's density (the share of
tokens on which it is active), # a count of tokens:

    coverage up     S = #(p and any child) / #p, by parent, against S₀ = 1 − Π_c (1 − π_c)
    coverage down   S = #(p and c) / #c, by child, against S₀ = π_p
    R²              squared correlation of f_p with a_p over the tokens where f_p > 0, by parent

Coverage is corrected for chance, (S − S₀) / (1 − S₀), and 0 where the parent is active on more than a fifth of tokens,
since a dense parent covers everything. Means are weighted by the count conditioned on. The headline HCS is
√(coverage · R²). The null is the same model with the children of one parent given to another of like density: an edge
says something as far as it is above that (spec: sae.md §5, evaluation.md §5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from train.data.batch import Batch
from train.evaluate.heldout import explained_variance
from train.saes.base import SAE

DENSE_PARENT = 0.2
DENSITY_BINS = 10  # of equal width in log density
LEAST_PARENTS = 8  # of a bin: in a smaller one parents would keep children much like their own

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Edges:
    """Edges between two levels of one SAE.

    Attributes:
        parents, children: where the levels lie among the latents.
        parent, child: the ends of each edge, numbered within their levels, int64 [edges].
        weight: w of each edge.
    """

    parents: slice
    children: slice
    parent: Tensor
    child: Tensor
    weight: Tensor

    def gathered(self, values: Tensor, weighted: bool = False) -> Tensor:
        """Sums over each parent's children, times w if `weighted`: [N, children] -> [N, parents]."""
        sums = values.new_zeros(*values.shape[:-1], self.parents.stop - self.parents.start)
        ends = values[..., self.child]
        return sums.index_add_(-1, self.parent, ends * self.weight.to(values) if weighted else ends)


@dataclass(frozen=True)
class EdgeScores:
    """See the module.

    Attributes:
        coverage_up, coverage_down: corrected for chance.
        plain_up, plain_down: the same with every parent of one weight.
        r2: of parents.
        n_parents: parents that were ever active.
        dense_share: of those, how many are too dense to count.
    """

    coverage_up: float
    coverage_down: float
    plain_up: float
    plain_down: float
    r2: float
    n_parents: int
    dense_share: float

    def hcs(self, top_down: bool = False) -> float:
        """√(coverage · R²), with the coverage that is natural to the model."""
        coverage = self.coverage_down if top_down else self.coverage_up
        return float((max(coverage, 0.0) * self.r2) ** 0.5)


def score_edges(codes: Iterable[Tensor], edges: Edges) -> EdgeScores:
    """Scores of one set of edges from codes [N, latents], batch by batch."""
    sums: dict[str, Tensor] = {}
    for batch in codes:
        for name, values in edge_sums(batch, edges).items():
            sums[name] = sums.get(name, 0) + values
    return scores_from(sums, edges)


def edge_sums(codes: Tensor, edges: Edges) -> dict[str, Tensor]:
    """What the scores are made of, summed over tokens [N, latents], float64.

    By parent: `p` active; `any` and a child active; `pairs`, children active with it, summed; f, a and their products
    over its active tokens. By child: `c` active. And the number of `tokens`.
    """
    f, below = codes[:, edges.parents].double(), codes[:, edges.children].double()
    on, child_on = (f > 0).double(), (below > 0).double()
    a, n_children = edges.gathered(below, weighted=True), edges.gathered(child_on)
    by_token = {"p": on, "c": child_on, "any": on * (n_children > 0), "pairs": on * n_children}
    by_token |= {"f": f, "a": on * a, "ff": f * f, "aa": on * a * a, "fa": f * a}
    sums = {name: values.sum(0) for name, values in by_token.items()}
    return sums | {"tokens": torch.tensor([float(len(codes))], dtype=torch.float64, device=codes.device)}


def scores_from(sums: dict[str, Tensor], edges: Edges) -> EdgeScores:
    """The scores, from sums as `edge_sums` gives them."""
    density, child_density = sums["p"] / sums["tokens"], sums["c"] / sums["tokens"]
    silent = (1 - child_density).clamp_min(1e-300).log()
    by_chance = 1 - edges.gathered(silent).exp()
    up = corrected(sums["any"] / sums["p"].clamp_min(1), by_chance, density)
    # all edges of a parent have its density for chance, so that they can be taken together
    child_tokens = edges.gathered(sums["c"])
    down = corrected(sums["pairs"] / child_tokens.clamp_min(1), density, density)
    alive = int((sums["p"] > 0).sum())
    return EdgeScores(
        coverage_up=weighted(up, sums["p"]),
        coverage_down=weighted(down, child_tokens),
        plain_up=weighted(up, (sums["p"] > 0).double()),
        plain_down=weighted(down, (child_tokens > 0).double()),
        r2=weighted(squared_correlation(sums), sums["p"]),
        n_parents=alive,
        dense_share=int((density > DENSE_PARENT).sum()) / max(alive, 1),
    )


def corrected(coverage: Tensor, by_chance: Tensor, parent_density: Tensor) -> Tensor:
    """(S − S₀) / (1 − S₀); 0 where the parent is dense or chance alone covers everything."""
    counted = (parent_density <= DENSE_PARENT) & (by_chance < 1 - 1e-9)
    return torch.where(counted, (coverage - by_chance) / (1 - by_chance).clamp_min(1e-9), 0.0)


def weighted(values: Tensor, weight: Tensor) -> float:
    """The weighted mean; 0 where nothing has weight."""
    return float((values * weight).sum() / weight.sum().clamp_min(1e-300))


def squared_correlation(sums: dict[str, Tensor]) -> Tensor:
    """R² by parent from sums over the tokens where it is active; 0 where one side does not vary."""
    count = sums["p"].clamp_min(1)
    spread_f = sums["ff"] - sums["f"].square() / count
    spread_a = sums["aa"] - sums["a"].square() / count
    together = sums["fa"] - sums["f"] * sums["a"] / count
    varies = (spread_f > 1e-9 * sums["ff"]) & (spread_a > 1e-9 * sums["aa"])
    return torch.where(varies, together.square() / (spread_f * spread_a).clamp_min(1e-300), 0.0).clamp(0, 1)


def permuted(edges: Edges, density: Tensor, seed: int) -> Edges:
    """The same children under other parents of like density: in each bin every parent gets those of another."""
    given = others_of_like_density(density, seed).to(edges.parent.device)
    return replace(edges, parent=given[edges.parent])


def others_of_like_density(density: Tensor, seed: int) -> Tensor:
    """For each latent another of its bin of density, each taken once; itself where it is alone."""
    generator = torch.Generator().manual_seed(seed)
    given = torch.arange(len(density))
    for members in density_bins(density):
        order = members[torch.randperm(len(members), generator=generator)]
        given[order] = order.roll(1)  # one cycle: nobody keeps its own
    return given


def density_bins(density: Tensor) -> list[Tensor]:
    """Latents by log density, bins merged from the sparse end until each holds at least 8 (or there is one).

    Those that never fire are with the sparsest, and do not widen the bins of the others.
    """
    logs = density.cpu().double().log()
    low = logs[logs.isfinite()].min() if logs.isfinite().any() else logs.new_zeros(())
    logs = logs.maximum(low)
    width = (logs.max() - low).clamp_min(1e-9)
    numbers = ((logs - low) / width * DENSITY_BINS).long().clamp(max=DENSITY_BINS - 1)
    bins: list[Tensor] = []
    waiting = torch.zeros(0, dtype=torch.int64)
    for number in range(DENSITY_BINS):
        waiting = torch.cat([waiting, (numbers == number).nonzero()[:, 0]])
        if len(waiting) >= LEAST_PARENTS:
            bins.append(waiting)
            waiting = waiting[:0]
    if len(waiting):
        bins = [*bins[:-1], torch.cat([*bins[-1:], waiting])]
    return bins


# ---- of a trained SAE ------------------------------------------------------------------------------------------------


def edges_of(parent: Tensor, weight: Tensor, levels: Sequence[slice]) -> list[Edges]:
    """Edges between neighbouring levels, given from the top down.

    Args:
        parent: number of each latent's parent among all latents, -1 for none.
        weight: w of each latent's edge.
    """
    found = []
    for above, below in pairwise(levels):
        child = (parent[below] >= 0).nonzero()[:, 0]
        ends = parent[below][child] - above.start
        found.append(Edges(above, below, ends, child, weight[below][child].detach()))
    return found


@torch.no_grad()
def hierarchy_scores(sae: SAE, edges: Edges, batches: Batches, seed: int = 0) -> tuple[EdgeScores, EdgeScores]:
    """Scores of one set of edges on the valid tokens of `batches` (raw units), and of their permuted null."""
    fired = torch.zeros(edges.parents.stop - edges.parents.start, dtype=torch.float64)
    tokens = 0

    def codes() -> Iterable[Tensor]:
        for batch in batches():
            yield sae.encode(batch.to(sae.W_dec.device))[batch.valid]

    def counted() -> Iterable[Tensor]:
        nonlocal tokens, fired
        for latents in codes():
            tokens += len(latents)
            fired += (latents[:, edges.parents] > 0).double().sum(0).cpu()
            yield latents

    own = score_edges(counted(), edges)
    return own, score_edges(codes(), permuted(edges, fired / tokens, seed))


@torch.no_grad()
def prefix_explained_variance(
    sae: SAE, ends: Sequence[int], batches: Batches, order: Tensor | None = None
) -> list[float]:
    """Explained variance of b_dec and the latents before each end alone, on the valid tokens of `batches`.

    Before in `order` (numbers of latents), or as they are stored.
    """
    place = torch.arange(sae.d_sae) if order is None else order.argsort()
    place = place.to(sae.W_dec.device)
    sums = [{name: torch.zeros((), dtype=torch.float64) for name in ("error2", "x2", "x")} for _ in ends]
    tokens = 0
    for batch in batches():
        batch = batch.to(sae.W_dec.device)
        latents = sae.encode(batch)
        x = batch.x[batch.valid].double()
        tokens += len(x)
        for end, totals in zip(ends, sums, strict=True):
            errors = x - sae.decode(latents * (place < end), batch)[batch.valid].double()
            totals["error2"] = totals["error2"] + errors.square().sum().cpu()
            totals["x2"] = totals["x2"] + x.square().sum().cpu()
            totals["x"] = totals["x"] + x.sum(0).cpu()
    return [explained_variance(totals, tokens) for totals in sums]
