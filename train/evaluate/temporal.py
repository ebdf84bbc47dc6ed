"""Suite `temporal`: how long latents persist along documents, at what density, and how smoothly codes move (spec §5.5).

Whole sequences of the store are encoded, so that lags up to 64 fit: a variant that reads the past sees all of it that
the sequence holds, as it would in use, whatever its training window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.baseline import Baseline, baseline_of
from train.evaluate.missing import Figures, Missing, evaluation
from train.evaluate.pairs import LAGS, Pairs
from train.evaluate.persistence import persistence_of
from train.evaluate.sequences import MOST_VALUES, rows_of
from train.evaluate.smoothness import DistinctLatents, Smoothness
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.temporal_figures import (
    LAG,
    Look,
    alive,
    counts,
    curve,
    density_bins,
    group_figures,
    intervals,
    matched_figures,
    persistence_figures,
    run_figures,
    smoothness_figures,
)
from train.saes import load_sae

TEMPORAL_METRICS = {
    "tokens": "held-out tokens evaluated",
    "documents": "held-out documents they are of",
    "l0": "mean number of latents above 0",
    "alive": "latents of density ≥ max(1e-5, 10 / tokens); the figures below are of these",
    "rho_1": "ρ(1), mean over latents weighted by activation mass",
    "rho_8": "ρ(8), the same: no evidence by itself, as it rises with density",
    "rho_8_unweighted": "ρ(8), plain mean over latents",
    "rho_8_null": "ρ(8) with the later token from another document, same place of its sequence",
    "rho_8_null_elsewhere": "ρ(8) with the later token from another document, half a sequence on",
    "correlation_time": "τ½: lag at which the mass-weighted ρ is half of ρ(1)",
    "matched_rho_8": "ρ(8) within ten bins of density, averaged with the baseline's mass per bin",
    "matched_rho_8_baseline": "the baseline's own ρ(8) over the same bins",
    "matched_difference": "matched_rho_8 − matched_rho_8_baseline",
    "matched_covered": "share of the baseline's mass in bins that both have",
    "dense_mass": "activation mass in latents active on more than 40 % of the tokens, as a share of all",
    "dense_share": "share of all latents active on more than a tenth of the tokens",
    "always_share": "share of all latents active on more than half of the tokens",
    "mi_8": "I(b_t; b_t+8) / H(b), b = being active; mean weighted by activation mass",
    "mi_8_null": "the same with the later token from another document, same place",
    "run_length": "tokens in a row on which a latent stays active; mean weighted by activation mass",
    "run_length_ratio": "that over what independent tokens of the same density would give",
    "total_variation": "Σ‖f_t − f_t−1‖₁ / Σ‖f_t‖₁",
    "lipschitz": "mean of ‖f_t − f_t−1‖₁ / ‖x_t − x_t−1‖₂",
    "lipschitz_latent": "mean over latents of the largest |f_t − f_t−1| / ‖x_t − x_t−1‖₂",
    "fft_ratio": "energy above over energy up to half of the highest frequency, the mean left out",
    "haar_ratio": "energy of three levels of Haar details over that of the approximation",
    "variance_ratio": "var(f_t − f_t−1) / var(f_t − f_t−8), sums over latents",
    "sequence_l0": "distinct latents in 128 tokens of a document",
}


def temporal(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        DataError: no held-out token.
        ConfigError: `--baseline` names no learner of the same activations.
    """
    baseline = baseline_of(subject)
    look, flat = look_at(subject, baseline)
    figures = counts(look)
    if bool(look.alive.any()):
        figures |= persistence_figures(look) | matched_figures(look, flat, baseline)
        figures |= run_figures(look) | smoothness_figures(look)
    rest: Figures = dict.fromkeys(TEMPORAL_METRICS, Missing("no latent is active on enough of these tokens"))
    return evaluation(
        TEMPORAL_METRICS,
        rest | figures,
        {
            "baseline": None if baseline.folder is None else str(baseline.folder),
            "intervals": intervals(look, flat),
            "curve": curve(look),
            "density_bins": density_bins(look, flat),
            "groups": {name: group_figures(look, flat, place) for name, place in subject.sae.groups().items()},
        },
    )


@torch.no_grad()
def look_at(subject: Subject, baseline: Baseline) -> tuple[Look, Look | None]:
    """One pass over the held-out tokens, with the SAE and its baseline, if there is one."""
    sae, itself = subject.sae, baseline.folder == subject.folder
    flat = None if baseline.folder is None or itself else load_sae(baseline.folder, str(subject.device))
    pairs, smoothness, distinct = Pairs(sae.d_sae, LAGS, LAG), Smoothness(sae.d_sae), DistinctLatents(sae.d_sae)
    theirs = Pairs(flat.d_sae, (LAG,), LAG) if flat is not None else None
    for batch in pieces(subject, max(sae.d_sae, flat.d_sae if flat is not None else 0)):
        latents = sae.encode(batch)
        for one in (pairs, smoothness, distinct):
            one.add(latents, batch)
        if flat is not None and theirs is not None:
            theirs.add(flat.encode(batch), batch)
    if not pairs.tokens.sum():
        raise DataError("there is no held-out token to evaluate on. Harvest more, or raise --held-out.")
    ours = Look(pairs, persistence_of(pairs), alive(pairs), smoothness, distinct)
    if theirs is not None:
        return ours, Look(theirs, persistence_of(theirs), alive(theirs))
    return ours, ours if itself else None


def pieces(subject: Subject, n_latents: int) -> Iterator[Batch]:
    """Whole sequences in the order of the store, few enough at once for their codes; two at least, for the nulls.

    Codes take a few times their size while they are looked at.
    """
    rows = max(MOST_VALUES // (subject.store.context * n_latents), 2)
    for batch in subject.held_out(subject.store.context):
        for start in range(0, len(batch.x), rows):
            subject.refuse_when_stopped()
            yield rows_of(batch, slice(start, start + rows))
