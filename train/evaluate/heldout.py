"""Suite `heldout`: reconstruction and sparsity on held-out documents, in raw units, with no language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.gini import gini
from train.evaluate.subject import Evaluation, Subject
from train.saes.base import SAE

DENSE_ABOVE = 0.1
ALWAYS_ABOVE = 0.5
SMALL_NORM = 1e-4  # below it a ratio of norms says nothing (spec §1.3)
NO_VARIANCE = 1e-10

HELDOUT_METRICS = {
    "tokens": "held-out tokens evaluated",
    "explained_variance": "1 − E‖x − x̂‖² / (E‖x‖² − ‖E x‖²), sums over all tokens in float64",
    "nmse": "E‖x − x̂‖² / E‖x‖²",
    "mse": "E‖x − x̂‖², summed over dimensions",
    "cosine": "mean of x·x̂ / (‖x‖‖x̂‖)",
    "l2_ratio": "mean of ‖x̂‖ / ‖x‖ (over 1 where ‖x‖ < 1e-4): below 1 is shrinkage",
    "l0": "mean number of latents above 0",
    "l1": "mean sum of latents, raw units",
    "dead_share": "share of latents that never fire on these tokens",
    "dense_share": "share of latents that fire on more than a tenth of these tokens",
    "always_share": "share of latents that fire on more than half of these tokens",
    "density_gini": "Gini coefficient of the latents' densities: 0 when all fire equally often, near 1 when few do all",
}


def heldout(subject: Subject) -> Evaluation:
    """The suite."""
    return Evaluation(evaluate_heldout(subject.sae, subject.held_out()))


@torch.no_grad()
def evaluate_heldout(sae: SAE, batches: Iterable[Batch]) -> dict[str, Any]:
    """The figures named in `HELDOUT_METRICS`, over the valid positions of `batches`.

    Raises:
        DataError: no held-out token.
    """
    sums: dict[str, Tensor] = {}
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    tokens = 0

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()

    device = sae.W_dec.device
    for batch in batches:
        batch = batch.to(device)
        latents_all = sae.encode(batch)
        reconstruction = sae.decode(latents_all, batch)[batch.valid].double()
        x, latents = batch.x[batch.valid].double(), latents_all[batch.valid]
        norm_x, norm_r = x.norm(dim=-1), reconstruction.norm(dim=-1)
        add("error2", (x - reconstruction).square().sum())
        add("x2", x.square().sum())
        add("x", x.sum(0))
        add("cosine", ((x * reconstruction).sum(-1) / (norm_x * norm_r).clamp_min(1e-30)).sum())
        add("l2_ratio", (norm_r / norm_x.masked_fill(norm_x < SMALL_NORM, 1.0)).sum())
        add("l0", (latents > 0).sum())
        add("l1", latents.double().sum())
        fired += (latents > 0).sum(0).double().cpu()
        tokens += len(x)
    if not tokens:
        raise DataError("there is no held-out token to evaluate on. Harvest more, or raise --held-out.")
    return {
        "tokens": tokens,
        "explained_variance": explained_variance(sums, tokens),
        "nmse": float(sums["error2"] / sums["x2"]),
        "mse": float(sums["error2"] / tokens),
        "cosine": float(sums["cosine"] / tokens),
        "l2_ratio": float(sums["l2_ratio"] / tokens),
        "l0": float(sums["l0"] / tokens),
        "l1": float(sums["l1"] / tokens),
        "dead_share": float((fired == 0).double().mean()),
        "dense_share": float((fired > DENSE_ABOVE * tokens).double().mean()),
        "always_share": float((fired > ALWAYS_ABOVE * tokens).double().mean()),
        "density_gini": gini(fired),
    }


def explained_variance(sums: dict[str, Tensor], tokens: int) -> float:
    """1 − E‖x − x̂‖² / Var x; where nothing varies, 1 if nothing is left over and else 0."""
    error = float(sums["error2"] / tokens)
    variance = float(sums["x2"] / tokens - (sums["x"] / tokens).square().sum())
    if variance < NO_VARIANCE:
        return 1.0 if error < NO_VARIANCE else 0.0
    return 1 - error / variance
