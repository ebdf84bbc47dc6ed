"""Partial sums against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harvest.moments import PartialSums

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_partial_sums_equal_numpy_over_the_trainable_positions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(6, 5, 4, generator=generator) * 3 + 1).to(dtype)
    trainable = torch.rand(6, 5, generator=generator) < 0.7
    sums = PartialSums(4, CPU)
    for part, keep in zip(stored.split(4), trainable.split(4), strict=True):
        values, norms = sums.add(part, keep)
        assert torch.equal(values, part)
        assert torch.allclose(norms, part.float().norm(dim=-1))
    total, facts = sums.result()
    kept = stored.double().numpy()[trainable.numpy()]
    assert total.shape == (1, 2, 4)
    assert np.allclose(total[0, 0], kept.sum(0), rtol=1e-12)
    assert np.allclose(total[0, 1], (kept**2).sum(0), rtol=1e-6 if dtype == torch.float32 else 1e-12)
    assert facts == {
        "count": int(trainable.sum()),
        "max_abs": float(np.abs(kept).max()),
        "nonfinite": 0,
        "first_nonfinite_sequence": None,
    }


def test_partial_sums_leave_positions_that_are_not_finite_out() -> None:
    stored = torch.ones(3, 2, 4)
    stored[1, 0, 2] = torch.nan
    stored[2, 1, :2] = torch.inf
    sums = PartialSums(4, CPU)
    values, norms = sums.add(stored, torch.ones(3, 2, dtype=torch.bool))
    assert values[1, 0].tolist() == values[2, 1].tolist() == [0.0] * 4
    assert values.sum() == 4 * 4
    assert norms.isnan().tolist() == [[False, False], [True, False], [False, True]]
    total, facts = sums.result()
    assert total[0].tolist() == [[4.0] * 4, [4.0] * 4]
    assert facts == {"count": 4, "max_abs": 1.0, "nonfinite": 3, "first_nonfinite_sequence": 1}


def test_partial_sums_count_a_norm_that_overflows_before_its_values_do() -> None:
    stored = torch.ones(2, 1, 4)
    stored[1] = 1e20  # squared: over what float32 holds
    sums = PartialSums(4, CPU)
    _, norms = sums.add(stored, torch.ones(2, 1, dtype=torch.bool))
    assert norms.isnan().tolist() == [[False], [True]]
    facts = sums.result()[1]
    assert (facts["count"], facts["nonfinite"], facts["first_nonfinite_sequence"]) == (1, 1, 1)


def test_partial_sums_first_bad_sequence_counts_over_batches() -> None:
    sums = PartialSums(1, CPU)
    keep = torch.ones(2, 1, dtype=torch.bool)
    sums.add(torch.zeros(2, 1, 1), keep)
    sums.add(torch.tensor([[[0.0]], [[torch.inf]]]), keep)
    assert sums.result()[1]["first_nonfinite_sequence"] == 3


def test_partial_sums_keep_large_counts_exact() -> None:
    # a million times 0.1 in float32 would be off by about 1e-3 of the total
    sums = PartialSums(1, CPU)
    for _ in range(10):
        sums.add(torch.full((1, 100_000, 1), 0.1), torch.ones(1, 100_000, dtype=torch.bool))
    total, facts = sums.result()
    assert facts["count"] == 1_000_000
    assert total[0, 0, 0] == pytest.approx(1e6 * float(np.float32(0.1)), rel=1e-12)
