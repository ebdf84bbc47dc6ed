"""What suite `core` adds up over activations and their reconstructions, and reads from the weights.

Definitions are those of SAEBench 0.6.0 (`get_sparsity_and_variance_metrics`), of which some depend on the batches;
beside them stand the ones that do not. Sums are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from train.evaluate.downstream import divided
from train.evaluate.heldout import SMALL_NORM, explained_variance
from train.saes.base import SAE

OVER = {"1_percent": 0.01, "10_percent": 0.1}
COSINE_ROWS = 1024  # compared with all others at once


class Tally:
    """Sums over the counted tokens of batches of activations [sequences, context, d]."""

    def __init__(self, d_sae: int) -> None:
        self.tokens, self.batches = 0, 0
        self.sums: dict[str, Tensor] = {}
        self.fired = torch.zeros(d_sae, dtype=torch.float64)
        self.contexts_fired = torch.zeros(d_sae, dtype=torch.float64)

    @torch.inference_mode()
    def add(self, x: Tensor, latents: Tensor, reconstruction: Tensor, counted: Tensor) -> None:
        """One batch; a batch without a counted token is passed over."""
        n = int(counted.sum())
        if not n:
            return
        self.tokens += n
        self.batches += 1
        self._add_vectors(x[counted].double(), reconstruction[counted].double())
        kept = latents[counted]
        self._add("l0", (kept != 0).sum())
        self._add("l1", kept.sum(-1).double().sum())
        active = (latents > 0) & counted[..., None]
        self.fired += active.sum((0, 1)).double().cpu()
        self.contexts_fired += active.any(1).sum(0).double().cpu()

    def _add_vectors(self, x: Tensor, out: Tensor) -> None:
        n = len(x)
        norm_x, norm_out, dot = x.norm(dim=-1), out.norm(dim=-1), (x * out).sum(-1)
        error2 = (x - out).square().sum(-1)
        x2 = x.square().sum(-1)
        self._add("x", x.sum(0))
        self._add("x2", x2.sum())
        self._add("error2", error2.sum())
        self._add("l2_norm_in", norm_x.sum())
        self._add("l2_norm_out", norm_out.sum())
        self._add("l2_ratio", (norm_out / norm_x.masked_fill(norm_x < SMALL_NORM, 1.0)).sum())
        self._add("cossim", (dot / (norm_x * norm_out)).sum())
        self._add("mse_saebench", error2.sum() / n)
        self._add("explained_variance_legacy", (1 - error2 / (x - x.mean(0)).square().sum(-1)).sum())
        # means of batches, to be averaged with equal weight
        self._add("batch_bias", out.square().sum(-1).mean() / dot.mean())
        self._add("batch_x2", x2.mean())
        self._add("batch_error2", error2.mean())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()

    def figures(self) -> dict[str, float]:
        """Every scalar of the activations; NaN where SAEBench has one."""
        names = ("explained_variance_legacy", "mse_saebench", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio")
        means = {name: float(self.sums[name]) / self.tokens for name in (*names, "l0", "l1")}
        squares = float(self.sums["batch_x2"]) / self.batches
        variance = squares - (squares / len(self.sums["x"])) ** 2
        return means | {
            "explained_variance": explained_variance(self.sums, self.tokens),
            "explained_variance_saebench_v06": 1 - divided(float(self.sums["batch_error2"]) / self.batches, variance),
            "mse": float(self.sums["error2"]) / self.tokens,
            "nmse": divided(float(self.sums["error2"]), float(self.sums["x2"])),
            "relative_reconstruction_bias": float(self.sums["batch_bias"]) / self.batches,
        }

    def by_latent(self) -> dict[str, Tensor]:
        """Of each latent: the share of tokens it is active on, and on how many of a context where it is at all."""
        return {
            "feature_density": self.fired / self.tokens,
            "consistent_activation_heuristic": self.fired / self.contexts_fired,
        }


@torch.no_grad()
def weights_by_latent(sae: SAE) -> dict[str, Tensor]:
    """Figures of each latent's weights, in raw units; of an SAE that looks at the past, what it does to the token."""
    encoder, decoder = sae.direct_encoder().detach(), sae.W_dec.detach()
    bias = getattr(sae, "b_mag", sae.b_enc) / sae.scale  # of a gated SAE the magnitude's, as SAEBench has it
    unit_encoder, unit_decoder = encoder / encoder.norm(dim=0), decoder.T / decoder.norm(dim=1)
    found = {
        "encoder_bias": bias,
        "encoder_norm": encoder.norm(dim=0),
        "encoder_decoder_cosine_sim": cosine_similarity(unit_decoder.T, unit_encoder.T),
        "max_encoder_cosine_sim": largest_cosines(encoder.T),
        "max_decoder_cosine_sim": largest_cosines(decoder),
    }
    return {name: value.double().cpu() for name, value in found.items()}


def largest_cosines(rows: Tensor) -> Tensor:
    """The largest signed cosine of each row [n, d] with another one [n]."""
    unit = normalize(rows, dim=-1)
    found = []
    for start in range(0, len(unit), COSINE_ROWS):
        cosines = unit[start : start + COSINE_ROWS] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.max(dim=-1).values)
    return torch.cat(found)


def shares(by_latent: dict[str, Tensor]) -> dict[str, float]:
    """SAEBench's `misc_metrics`."""
    density = by_latent["feature_density"]
    total = float(density.sum())
    found = {"frac_alive": float((density > 0).double().mean())}
    for name, threshold in OVER.items():
        found[f"freq_over_{name}"] = float((density > threshold).double().mean())
    for name, threshold in OVER.items():
        over = float(density[density > threshold].sum())
        found[f"normalized_freq_over_{name}"] = over / total if total else 0.0
    for kind in ("encoder", "decoder"):
        found[f"average_max_{kind}_cosine_sim"] = float(by_latent[f"max_{kind}_cosine_sim"].mean())
    return found
