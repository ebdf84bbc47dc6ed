"""Samples by hand, for suites that look at tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse

from train.evaluate.sample import Sample


def sample_of(
    token: Sequence[int],
    doc: Sequence[int],
    codes: np.ndarray,
    valid: Sequence[bool] | None = None,
    x: np.ndarray | None = None,
    context: int = 16,
) -> Sample:
    """A sample of `token` [n] and `codes` [n, d_sae], laid out in sequences of `context` tokens."""
    n = len(token)
    padded = -(-n // context) * context
    rows, doc_rows = np.zeros(padded, np.int64), np.full(padded, -1, np.int64)
    rows[:n], doc_rows[:n] = token, doc
    return Sample(
        token=np.array(token, np.int64),
        doc=np.array(doc, np.int64),
        row=np.arange(n) // context,
        column=np.arange(n) % context,
        valid=np.ones(n, bool) if valid is None else np.array(valid),
        codes=sparse.csc_array(codes.astype(np.float32)),
        x=torch.from_numpy(codes if x is None else x),
        rows=rows.reshape(-1, context),
        doc_rows=doc_rows.reshape(-1, context),
    )
