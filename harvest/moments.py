"""Partial sums of one chunk, taken on the device while the activations are still there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class PartialSums:
    """Sums over the trainable positions of one chunk at one hook, in float64, from the values as stored.

    Attributes:
        nonfinite: NaN or infinite elements seen.
        first_nonfinite: sequence (within the chunk) of the first of them, or None.
    """

    def __init__(self, d_model: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, d_model, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.max_abs = torch.zeros((), dtype=torch.float32, device=device)
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_rows: list[torch.Tensor] = []

    def add(self, stored: torch.Tensor, trainable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a batch.

        Args:
            stored: [n, context, d_model] in the storage type.
            trainable: bool [n, context].

        Returns:
            The batch with non-finite positions zeroed, and norms float32 [n, context], NaN at those positions.
        """
        values = stored.float()
        norms = torch.linalg.vector_norm(values, dim=-1)
        finite = torch.isfinite(norms)
        self.bad_rows.append(~finite.all(dim=-1))
        if values.device.type != "cpu" or not bool(finite.all()):  # asking a GPU would make the model wait
            met = (~torch.isfinite(values)).sum(-1).clamp_min_(1)  # one at least: a norm overflows before its values do
            self.bad += torch.where(finite, 0, met).sum()
            values = torch.where(finite[..., None], values, 0.0)
            stored = values.to(stored.dtype)
        counted = trainable & finite
        weight = counted.flatten().double()
        flat = values.flatten(0, 1).double()
        self.sums[0] += weight @ flat
        self.sums[1] += weight @ flat.square_()
        self.count += counted.sum()
        largest = values.abs().amax(-1)
        self.max_abs = torch.maximum(self.max_abs, (largest * counted).max())
        return stored, torch.where(finite, norms, torch.nan)

    def result(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The sums float64 [1, 2, d_model] and the facts for the journal: count, max_abs, nonfinite, first_bad."""
        rows = torch.cat(self.bad_rows)
        first = int(rows.nonzero()[0]) if bool(rows.any()) else None
        facts = {
            "count": int(self.count),
            "max_abs": float(self.max_abs),
            "nonfinite": int(self.bad),
            "first_nonfinite_sequence": first,
        }
        return self.sums.cpu().numpy()[None], facts
