"""Every figure of one pair of neighbouring levels, each with its null."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.evaluate.codes import Codes, elsewhere
from train.evaluate.composition_score import Composition, composition_score
from train.evaluate.coverage import copied_share, edge_directions, edge_sums_by_document, parent_densities
from train.evaluate.ladder import post_hoc_tree
from train.evaluate.level_information import information_intervals, level_information
from train.evaluate.own_parts import own_parts
from train.evaluate.predictive_information import predictive_information
from train.evaluate.regression import MIN_ACTIVE, often_active
from train.evaluate.reuse import is_edge, reuse_of
from train.evaluate.structure import Edges, EdgeScores, permuted

LEAST_UPPER, LEAST_LOWER = 2, 8
SENSITIVITY = (0.3, 0.5, 0.7)  # what R² is asked for in place of ½
ADVICE = "Raise --max-tokens, or hold out more documents (train fit --held-out)."

PAIR_METRICS = {
    "composition_score": "share of upper latents that pass both composition tests",
    "composition_null": "the same with eight random lower latents of like density",
    "composition_corrected": "(score − null) / (1 − null)",
    "composition_geometric": "share that passes the geometric test",
    "composition_functional": "share that passes the functional test",
    "composition_r2_geometric": "mean R² of decoder rows",
    "composition_r2_functional": "mean R² of codes",
    "own_part_score": "share of upper latents with R² ≥ .5 on their own parts",
    "own_part_null": "the same on the parts of another upper latent of like density",
    "own_part_r2": "mean R² on own parts",
    "own_part_r2_null": "mean R² on another's parts",
    "nmi": "normalised mutual information with the lower latent that tells most, mean over upper latents",
    "nmi_null": "the same with the tokens of the lower level shuffled across documents",
    "nmi_weighted": "the mean weighted by entropy",
    "nmi_weighted_null": "its null",
    "predictive_bits": "Σ U H, bits per token of upper activity that 32 lower latents foretell",
    "predictive_share": "Σ U H / Σ H",
    "predictive_share_null": "the same with shuffled tokens",
    "reuse_none": "share of lower latents that are part of no upper one",
    "reuse_once": "share that are part of one",
    "reuse_shared": "share that are part of two or more",
    "reuse_gini": "Gini coefficient of the out-degrees",
    "reuse_in_degree": "mean number of parts of an upper latent that has any",
    "reuse_parts": "effective number of parts",
    "reuse_overlap_z": "overlap of the parts of two upper latents, in standard deviations above random graphs",
    "coverage_up": "any child active when the parent is, corrected for chance",
    "coverage_down": "the parent active when a child is, corrected for chance",
    "edge_r2": "R² of parents on the weighted sum of their children",
    "edge_r2_null": "the same with the children of another parent of like density",
    "hcs_up": "√(coverage_up · edge_r2)",
    "hcs_up_null": "the same with the children of another parent",
    "hcs_down": "√(coverage_down · edge_r2)",
    "hcs_down_null": "the same with the children of another parent",
    "copied_share": "share of alive parents whose decoder row is nearly that of a child (cosine above .95)",
    "parent_density": "mean density of parents over edges",
    "invalid_share": "share of edges whose parent is active on over a fifth of the tokens",
    "residual_cosine": "S_res: mean over edges",
    "residual_rank": "share of edges that pass the rank test",
}


@dataclass
class Figures:
    """Figures of one pair, gathered one after the other.

    Attributes:
        values: by the names of `PAIR_METRICS`; what was not put is None.
        reasons: why, for those that are None.
        intervals: of some, over documents.
        more: what else is told.
    """

    values: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(PAIR_METRICS))
    reasons: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: float | None, why_not: str = "it is no number on these tokens") -> None:
        """Note a figure; one that is None or no finite number is None for the reason given."""
        if value is None or not math.isfinite(value):
            self.reasons[name] = why_not
        else:
            self.values[name] = float(value)

    def leave(self, start: str, reason: str) -> None:
        """None for all figures whose names start so."""
        self.reasons |= {name: reason for name in PAIR_METRICS if name.startswith(start)}

    def between(self, names: Iterable[str], found: Iterable[tuple[float, float] | None]) -> None:
        """Note intervals where there are some."""
        self.intervals |= {name: list(ends) for name, ends in zip(names, found, strict=True) if ends is not None}


@dataclass(frozen=True)
class Pair:
    """Two neighbouring levels.

    Attributes:
        codes: of the upper latents, then of the lower ones.
        n_upper: how many upper ones there are.
        upper, lower: numbers of the alive ones there.
        weights: the variant's own between all of them [upper, lower], or None.
        rows: their unit decoder rows; all_rows: those of every latent of the SAE.
        x: activations of the tokens [n, d].
    """

    codes: Codes
    n_upper: int
    upper: np.ndarray
    lower: np.ndarray
    weights: Tensor | None
    rows: Tensor
    all_rows: Tensor
    x: Tensor

    @classmethod
    def of(
        cls, codes: Codes, upper: np.ndarray, lower: np.ndarray, weights: Tensor | None, rows: Tensor, x: Tensor
    ) -> Pair:
        """From the codes and decoder rows of all latents, and the numbers of the levels' latents."""
        chosen = np.concatenate([upper, lower])
        own = codes.of(chosen)
        alive = np.flatnonzero(own.alive)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return cls(
            codes=own,
            n_upper=len(upper),
            upper=alive[alive < len(upper)],
            lower=alive[alive >= len(upper)],
            weights=weights,
            rows=rows[torch.from_numpy(chosen)],
            all_rows=rows,
            x=x,
        )

    def between_alive(self, weights: Tensor) -> Tensor:
        """Those of alive latents [alive upper, alive lower]."""
        return weights[torch.from_numpy(self.upper)][:, torch.from_numpy(self.lower - self.n_upper)]

    def tree_of_alive(self) -> Tensor:
        """The post-hoc tree as weights between all latents."""
        weights = torch.zeros(self.n_upper, len(self.rows) - self.n_upper)
        found = post_hoc_tree(self.codes, self.lower, self.upper)
        weights[torch.from_numpy(self.upper)[:, None], torch.from_numpy(self.lower - self.n_upper)] = found
        return weights


def measure_pair(pair: Pair, seed: int = 0) -> Figures:
    """All figures of `PAIR_METRICS`."""
    found = Figures()
    documents = pair.codes.first_documents, pair.codes.n_documents - pair.codes.first_documents
    found.more |= {"upper_alive": len(pair.upper), "lower_alive": len(pair.lower)}
    if len(pair.upper) < LEAST_UPPER or len(pair.lower) < LEAST_LOWER or min(documents) < 2:
        found.leave(
            "",
            f"{len(pair.upper)} upper and {len(pair.lower)} lower latents are alive on {sum(documents)} held-out "
            f"documents; {LEAST_UPPER}, {LEAST_LOWER} and 4 are needed. {ADVICE}",
        )
        return found
    with_tree = pair.weights is None
    weights = pair.weights if pair.weights is not None else pair.tree_of_alive()
    alive_weights = pair.between_alive(weights)
    composition = put_composition(found, pair, seed)
    put_own_parts(found, pair, alive_weights, seed)
    put_information(found, pair, seed)
    if with_tree and composition is None:
        found.leave("reuse", found.reasons["composition_score"])
    else:
        put_reuse(found, composition.weights if with_tree and composition is not None else alive_weights, seed)
    found.more |= {
        "links": "post-hoc tree" if with_tree else "the variant's",
        "reuse_weights": "functional regression" if with_tree else "the variant's",
    }
    put_edges(found, pair, weights, seed)
    return found


def put_composition(found: Figures, pair: Pair, seed: int) -> Composition | None:
    """The composition score; None where too few latents can be regressed."""
    scored = often_active(pair.codes, pair.upper)
    found.more["upper_scored"] = len(scored)
    if len(scored) < LEAST_UPPER:
        reason = f"{len(scored)} upper latents are active on {MIN_ACTIVE} tokens of each half; 2 are needed. {ADVICE}"
        found.leave("composition", reason)
        found.leave("own_part", reason)
        return None
    made = composition_score(pair.codes, pair.rows, pair.lower, scored, seed)
    score, null = float(made.score(made.terms.sum(0))), float(made.null.double().mean())
    found.put("composition_score", score)
    found.put("composition_null", null)
    found.put("composition_corrected", (score - null) / (1 - null) if null < 1 else None)
    found.put("composition_geometric", float(made.made.double().mean()))
    found.put("composition_functional", float(made.passing(made.terms.sum(0)).double().mean()))
    found.put("composition_r2_geometric", float(made.geometric.mean()))
    found.put("composition_r2_functional", float(made.functional.mean()))
    found.between(["composition_score"], [made.interval()])
    found.more["geometric_threshold"] = made.threshold
    found.more["composition_score_at"] = {f"{level:g}": made.score_at(level) for level in SENSITIVITY}
    return made


def put_own_parts(found: Figures, pair: Pair, weights: Tensor, seed: int) -> None:
    if "own_part_score" in found.reasons:
        return
    score = own_parts(pair.codes, pair.lower, pair.upper, weights, seed)
    found.put("own_part_score", score.passing)
    found.put("own_part_null", score.passing_null)
    found.put("own_part_r2", score.balanced)
    found.put("own_part_r2_null", score.balanced_null)
    found.between(["own_part_score", "own_part_r2"], score.intervals())
    found.more["own_part_score_at"] = {f"{level:g}": score.passing_at(level) for level in SENSITIVITY}
    found.more |= {"own_part_r2_active": score.active, "own_part_r2_active_null": score.active_null}


def put_information(found: Figures, pair: Pair, seed: int) -> None:
    codes, order = pair.codes, elsewhere(pair.codes.document, seed)
    lower, upper = codes.values[:, pair.lower], codes.values[:, pair.upper]
    told = level_information(lower, upper)
    null = level_information(lower.tocsr()[order].tocsc(), upper)
    for name, value in (("nmi", told.mean), ("nmi_null", null.mean)):
        found.put(name, value)
    for name, value in (("nmi_weighted", told.weighted), ("nmi_weighted_null", null.weighted)):
        found.put(name, value)
    found.between(["nmi", "nmi_weighted"], information_intervals(codes, pair.lower, pair.upper, told))
    foretold = predictive_information(codes, pair.lower, pair.upper, seed)
    by_chance = predictive_information(codes, pair.lower, pair.upper, seed, order)
    found.put("predictive_bits", foretold.bits)
    found.put("predictive_share", foretold.share)
    found.put("predictive_share_null", by_chance.share)
    found.more["predictive_bits_null"] = by_chance.bits
    found.between(["predictive_bits", "predictive_share"], foretold.intervals())


def put_reuse(found: Figures, weights: Tensor, seed: int) -> None:
    reuse = reuse_of(weights, seed)
    for name in ("none", "once", "shared", "gini", "in_degree", "parts"):
        found.put(f"reuse_{name}", getattr(reuse, name))
    found.put("reuse_overlap_z", reuse.overlap_z, "all graphs with these degrees have the same overlap")
    found.more["reuse_overlap"] = reuse.overlap


def put_edges(found: Figures, pair: Pair, weights: Tensor, seed: int) -> None:
    """Over all latents of the levels: a child whose parent is dead is not covered."""
    n_upper, codes, x = pair.n_upper, pair.codes, pair.x
    if pair.weights is None:  # on the first half, where it was made, a tree covers unrelated levels too
        codes, x = codes.second_half, x[codes.middle :]
    parent, child = is_edge(weights).nonzero().T
    if not len(parent):
        for start in ("coverage", "edge", "hcs", "copied", "parent", "invalid", "residual"):
            found.leave(start, "no upper latent has a part")
        return
    edges = Edges(slice(0, n_upper), slice(n_upper, len(pair.rows)), parent, child, weights[parent, child])
    sums = edge_sums_by_document(codes, edges)
    scores = sums.scores()
    given = permuted(edges, torch.from_numpy(codes.density[:n_upper]), seed)
    null = edge_sums_by_document(codes, given).scores()
    for name, value in zip(EDGE_FIGURES, edge_figures(scores), strict=True):
        found.put(name, value)
    found.put("edge_r2_null", null.r2)
    found.put("hcs_up_null", null.hcs())
    found.put("hcs_down_null", null.hcs(top_down=True))
    found.between(EDGE_FIGURES, sums.intervals(edge_figures))
    found.put("copied_share", copied_share(pair.rows, edges, pair.upper))
    density, invalid = parent_densities(codes, edges)
    found.put("parent_density", density)
    found.put("invalid_share", invalid)
    found.more |= {
        "edges": len(parent),
        "coverage_up_null": null.coverage_up,
        "coverage_down_null": null.coverage_down,
        "coverage_up_unweighted": scores.plain_up,
        "coverage_down_unweighted": scores.plain_down,
    }
    directions = edge_directions(codes, edges, x, pair.rows, pair.all_rows, seed)
    why_not = f"no edge has a child active on ten tokens and a parent active on ten without it. {ADVICE}"
    found.put("residual_cosine", float(directions.residual.mean()), why_not)
    found.put("residual_rank", float(directions.ranked.double().mean()), why_not)
    found.more["edges_judged"] = len(directions.residual)


EDGE_FIGURES = ("coverage_up", "coverage_down", "edge_r2", "hcs_up", "hcs_down")


def edge_figures(scores: EdgeScores) -> list[float]:
    """In the order of `EDGE_FIGURES`."""
    return [scores.coverage_up, scores.coverage_down, scores.r2, scores.hcs(), scores.hcs(top_down=True)]
