"""int8 activations: x[t, d] ≈ q[t, d] · token[t] · dimension[d], with q whole numbers from −127 to 127.

`dimension` is the root mean square of each dimension over a sample, so that the few dimensions that are a hundred times
the others cost these no precision; `token` then lets each token use all of the range. With `token` alone the relative
error is near 6e-3 on data with two such dimensions, with both near 7e-5.
"""

from __future__ import annotations

import torch

LEVELS = 127
LEAST = 1e-2  # of the root mean square over all dimensions: what never fired in the sample may yet fire


def dimension_scales(mean_square: torch.Tensor) -> torch.Tensor:
    """Scales float32 [D] from E x² [D] of a sample; all ones for a sample of zeros."""
    floor = LEAST * mean_square.mean().sqrt()
    scales = torch.maximum(mean_square.sqrt(), floor).float()
    return scales if floor > 0 else torch.ones_like(scales)


def quantise(x: torch.Tensor, dimension: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., D] and token scales float32 [...] for x [..., D]; zeros for a token that is not finite."""
    scaled = x.float() / dimension
    token = torch.linalg.vector_norm(scaled, torch.inf, dim=-1) / LEVELS
    token = torch.where(torch.isfinite(token), token, 0.0)
    q = scaled.div_(token[..., None]).round_()  # 0 / 0 and what is not finite give no number
    return q.nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), token


def dequantise(q: torch.Tensor, token: torch.Tensor, dimension: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] from what `quantise` gave."""
    return q.float().mul_(token[..., None]).mul_(dimension)
