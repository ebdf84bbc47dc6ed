"""The figures of suite `temporal`, from what one pass over the held-out tokens shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.evaluate.baseline import Baseline
from train.evaluate.bootstrap import bootstrap_interval
from train.evaluate.matching import BIN_EDGES, bin_of, dense_mass, density_matched, mass_by_bin, rho_by_bin
from train.evaluate.missing import Figures, Missing
from train.evaluate.pairs import A_ON, AA, AB, BB, BOTH, A, B, Kind, Pairs, correlation
from train.evaluate.persistence import Persistence, correlation_time, information, mass_weighted, shares
from train.evaluate.smoothness import DOCUMENT_WINDOW, WINDOW, DistinctLatents, Smoothness

LAG = 8  # at which SAEs are compared: longer than a word, shorter than most documents
ALIVE_ABOVE, ALIVE_TOKENS = 1e-5, 10  # density, or activations


@dataclass(frozen=True)
class Look:
    """What one pass over the held-out tokens shows of an SAE; L latents.

    Attributes:
        alive: which latents are active often enough to be judged [L].
        smoothness, distinct: None for a baseline.
    """

    pairs: Pairs
    persistence: Persistence
    alive: Tensor
    smoothness: Smoothness | None = None
    distinct: DistinctLatents | None = None


def alive(pairs: Pairs) -> Tensor:
    """Latents of density ≥ max(1e-5, 10 / tokens) [L]."""
    tokens = float(pairs.tokens.sum())
    return pairs.fired.sum(0) >= max(ALIVE_ABOVE * tokens, ALIVE_TOKENS)


def counts(look: Look) -> Figures:
    """What is there whatever the codes are."""
    found, pairs = look.persistence, look.pairs
    return {
        "tokens": int(pairs.tokens.sum()),
        "documents": len(pairs.documents),
        "l0": float(found.density.sum()),
        "alive": int(look.alive.sum()),
        "dense_share": float((found.density > 0.1).double().mean()),
        "always_share": float((found.density > 0.5).double().mean()),
    }


def weighted(values: dict[int, Tensor] | Tensor | None, look: Look, lag: int = LAG) -> float | Missing:
    """Mean over the alive latents by activation mass, of figures [L], or of those at a lag."""
    if isinstance(values, dict):
        values = values.get(lag)
    if values is None:
        return Missing(why_no_pairs(look, lag))
    return mass_weighted(values, look.persistence.mass, look.alive)


def why_no_pairs(look: Look, lag: int) -> str:
    """Why there is no pair of a kind at a lag."""
    if lag not in look.persistence.rho:
        return f"no two held-out tokens of one document are {lag} apart in a sequence"
    return f"no two held-out tokens of different documents are {lag} apart: the null needs several documents"


def persistence_figures(look: Look) -> Figures:
    """ρ with its nulls, how long it lasts, and the same for being active at all."""
    found, time = look.persistence, correlation_time(look.persistence, look.alive)
    rho = found.rho.get(LAG)
    return {
        "rho_1": weighted(found.rho, look, 1),
        "rho_8": weighted(found.rho, look),
        "rho_8_unweighted": Missing(why_no_pairs(look, LAG)) if rho is None else float(rho[look.alive].mean()),
        "rho_8_null": weighted(found.null, look),
        "rho_8_null_elsewhere": weighted(found.null_elsewhere, look),
        "correlation_time": Missing(time.reason) if time.value is None else time.value,
        "dense_mass": dense_mass(found),
        "mi_8": weighted(information(look.pairs, "inside", LAG), look),
        "mi_8_null": weighted(information(look.pairs, "same_place", LAG), look),
    }


def matched_figures(look: Look, flat: Look | None, baseline: Baseline) -> Figures:
    """ρ(8) at equal density with the baseline."""
    names = ("matched_rho_8", "matched_rho_8_baseline", "matched_difference", "matched_covered")
    if flat is None:
        return dict.fromkeys(names, Missing(baseline.reason))
    if LAG not in look.persistence.rho:
        return dict.fromkeys(names, Missing(why_no_pairs(look, LAG)))
    matched = density_matched(look.persistence, flat.persistence, LAG, look.alive, flat.alive)
    if not matched.covered:
        return dict.fromkeys(names, Missing("no bin of density holds latents of both"))
    values = (matched.value, matched.reference, matched.value - matched.reference, matched.covered)
    return dict(zip(names, values, strict=True))


def run_figures(look: Look) -> Figures:
    """How long latents stay active, and the variance of steps of 1 against that of steps of 8."""
    near, far, smoothness = look.pairs.whole("inside", 1), look.pairs.whole("inside", LAG), look.smoothness
    assert smoothness is not None
    if near is None:
        return dict.fromkeys(("run_length", "run_length_ratio", "variance_ratio"), Missing(why_no_pairs(look, 1)))
    active, tokens, density = look.pairs.fired.sum(0), float(look.pairs.tokens.sum()), look.persistence.density
    length = active / (active - near[0][BOTH]).clamp_min(1)  # a run begins where the token before is not active
    # independent tokens: n π (1 − π) + π² runs are due in n tokens in a row, 1 / (1 − π) tokens each where n is large
    due = tokens / (tokens * (1 - density) + smoothness.runs * density)
    figures: Figures = {"run_length": weighted(length, look), "run_length_ratio": weighted(length / due, look)}
    if far is None:
        return figures | {"variance_ratio": Missing(why_no_pairs(look, LAG))}
    step, leap = (float(spread(*sums)[look.alive].sum()) for sums in (near, far))
    return figures | {"variance_ratio": step / leap if leap else Missing("no latent varies over 8 tokens")}


def spread(sums: Tensor, n: float) -> Tensor:
    """Variance of the later member less the first [L]."""
    a, b, aa, bb, ab = sums[:A_ON] / n
    variance: Tensor = aa + bb - 2 * ab - (b - a).square()
    return variance.clamp_min(0)


def smoothness_figures(look: Look) -> Figures:
    """How codes move from token to token."""
    found, distinct = look.smoothness, look.distinct
    assert found is not None
    assert distinct is not None
    steps = Missing("no two held-out tokens of one document follow each other")
    rare = Missing(f"no {WINDOW} held-out tokens of one document in a row in which a latent varies")
    short = Missing(f"no held-out document has {DOCUMENT_WINDOW} tokens")
    return {
        "total_variation": found.change / found.size if found.size else steps,
        "lipschitz": found.per_distance / found.moved if found.moved else steps,
        "lipschitz_latent": float(found.steepest[look.alive].mean()) if found.moved else steps,
        "fft_ratio": found.high / found.low if found.low else rare,
        "haar_ratio": sum(found.details) / found.approximation if found.approximation else rare,
        "sequence_l0": distinct.total / distinct.windows if distinct.windows else short,
    }


# ---- intervals ---------------------------------------------------------------------------------------------------


def intervals(look: Look, flat: Look | None) -> dict[str, list[float] | None]:
    """95 % intervals over blocks of documents, of which each document is its own while there are at most 128."""
    names = ("rho_8", "matched_difference")
    found: dict[str, list[float] | None] = dict.fromkeys(names)
    if LAG not in look.persistence.rho or not bool(look.alive.any()):
        return found
    ours = sums_by_block(look)

    def rho(sums: Tensor) -> float:
        measured = at_lag(sums)
        return mass_weighted(measured.rho[LAG], measured.mass)

    found["rho_8"] = as_list(bootstrap_interval(ours, rho))
    if flat is not None and bool(flat.alive.any()):
        both = torch.cat([ours, sums_by_block(flat)], dim=-1)

        def difference(sums: Tensor) -> float:
            matched = density_matched(at_lag(sums[:, : ours.shape[-1]]), at_lag(sums[:, ours.shape[-1] :]), LAG)
            return matched.value - matched.reference

        found["matched_difference"] = as_list(bootstrap_interval(both, difference))
    return found


def as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def sums_by_block(look: Look) -> Tensor:
    """What ρ(8), density and mass of the alive latents are made of, [blocks, 7, alive + 1]; last, pairs and tokens."""
    pairs, n_blocks = look.pairs, min(len(look.pairs.documents), look.pairs.n_blocks)
    inside = pairs.by["inside", LAG]
    rows = [*inside.sums[[A, B, AA, BB, AB]], pairs.fired, pairs.mass]
    totals = [inside.n] * 5 + [pairs.tokens] * 2
    columns = [torch.cat([row[:, look.alive], total[:, None]], 1) for row, total in zip(rows, totals, strict=True)]
    return torch.stack(columns, dim=1)[:n_blocks]


def at_lag(sums: Tensor) -> Persistence:
    """ρ(8), density and mass from sums over blocks."""
    latents, totals = sums[:, :-1], sums[:, -1]
    return Persistence({LAG: correlation(latents, totals[0])}, {}, {}, {}, latents[5] / totals[5], shares(latents[6]))


# ---- what else the file says --------------------------------------------------------------------------------------


def curve(look: Look) -> dict[str, list[Any]]:
    """Figures by lag, mass-weighted unless named otherwise; None where there is no pair."""
    found, lags = look.persistence, sorted(look.persistence.rho)

    def over_lags(values: dict[int, Tensor]) -> list[float | None]:
        means = (weighted(values, look, lag) for lag in lags)
        return [None if isinstance(mean, Missing) else mean for mean in means]

    def told(kind: Kind) -> list[float | None]:
        known = {lag: told for lag in lags if (told := information(look.pairs, kind, lag)) is not None}
        return over_lags(known)

    return {
        "lags": lags,
        "pairs": [found.n_pairs[lag] for lag in lags],
        "rho": over_lags(found.rho),
        "rho_unweighted": [float(found.rho[lag][look.alive].mean()) if look.alive.any() else None for lag in lags],
        "null": over_lags(found.null),
        "null_elsewhere": over_lags(found.null_elsewhere),
        "mi": told("inside"),
        "mi_null": told("same_place"),
    }


def density_bins(look: Look, flat: Look | None) -> dict[str, list[Any]]:
    """By bin of density: alive latents, activation mass and ρ(8), with the baseline's."""
    bins: dict[str, list[Any]] = {"edges": list(BIN_EDGES)}
    for name, one in (("", look), ("baseline_", flat)):
        if one is None:
            continue
        measured = one.persistence
        bins[f"{name}latents"] = torch.bincount(bin_of(measured.density[one.alive]), minlength=10).tolist()
        bins[f"{name}mass"] = mass_by_bin(measured, one.alive).tolist()
        if LAG in measured.rho:
            rho = rho_by_bin(measured, LAG, one.alive)
            bins[f"{name}rho_8"] = [None if value != value else value for value in rho.tolist()]
    return bins


def group_figures(look: Look, flat: Look | None, place: slice) -> dict[str, Any]:
    """The figures of one level or time scale."""
    found = look.persistence
    among = torch.zeros_like(look.alive)
    among[place] = look.alive[place]
    figures: dict[str, Any] = {
        "latents": len(range(*place.indices(len(among)))),
        "alive": int(among.sum()),
        "l0": float(found.density[place].sum()),
        "mass": float(found.mass[place].sum()),
    }
    names = ("rho_8", "rho_8_null", "correlation_time", "matched_rho_8", "matched_rho_8_baseline", "matched_covered")
    figures |= dict.fromkeys(names) | {"reason": "no latent of the group is active on enough of these tokens"}
    if not figures["alive"]:
        return figures
    time = correlation_time(found, among)
    figures |= {"correlation_time": time.value, "reason": time.reason}
    for name, values in (("rho_8", found.rho), ("rho_8_null", found.null)):
        if LAG in values:
            figures[name] = mass_weighted(values[LAG], found.mass, among)
    if flat is not None and LAG in found.rho:
        matched = density_matched(found, flat.persistence, LAG, among, flat.alive)
        figures["matched_covered"] = matched.covered
        if matched.covered:
            figures |= {"matched_rho_8": matched.value, "matched_rho_8_baseline": matched.reference}
    return figures
