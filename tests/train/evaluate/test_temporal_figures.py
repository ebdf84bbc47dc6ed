"""Figures of suite `temporal` on codes made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.data.batch import Batch
from train.evaluate.baseline import Baseline
from train.evaluate.missing import Missing
from train.evaluate.pairs import Pairs
from train.evaluate.persistence import persistence_of
from train.evaluate.smoothness import DistinctLatents, Smoothness
from train.evaluate.temporal_figures import (
    LAG,
    Look,
    at_lag,
    counts,
    intervals,
    matched_figures,
    persistence_figures,
    run_figures,
    sums_by_block,
)


def look_of(latents: Tensor, batch: Batch) -> Look:
    n = latents.shape[-1]
    pairs, smoothness, distinct = Pairs(n, (1, LAG), LAG), Smoothness(n), DistinctLatents(n)
    for one in (pairs, smoothness, distinct):
        one.add(latents, batch)
    return Look(pairs, persistence_of(pairs), pairs.fired.sum(0) >= 1, smoothness, distinct)


def drawn(rows: int, length: int, *densities: float) -> Look:
    """Independent tokens, each sequence a document."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(rows, length, len(densities), generator=generator) < torch.tensor(densities)
    return look_of(on.float(), Batch.of(torch.zeros(rows, length, 1)))


def test_run_lengths_of_known_runs() -> None:
    pattern = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0])  # runs of 3 and 1: 2 on average
    look = look_of(pattern.repeat(2)[None, :, None].repeat(2, 1, 1), Batch.of(torch.zeros(2, 24, 1)))
    figures = run_figures(look)
    assert figures["run_length"] == pytest.approx(2.0)
    # a third of 24 tokens in a row: 24·(1/3)(2/3) + 1/9 runs of 8 tokens on
    due = 8 / (24 * 2 / 9 + 1 / 9)
    assert figures["run_length_ratio"] == pytest.approx(2.0 / due)


def test_independent_tokens_have_no_persistence() -> None:
    look = drawn(60, 200, 0.3, 0.05)
    figures = persistence_figures(look) | run_figures(look)
    for name in ("rho_1", "rho_8", "rho_8_unweighted", "rho_8_null", "rho_8_null_elsewhere"):
        assert figures[name] == pytest.approx(0, abs=0.03)  # 12,000 pairs: standard error .01
    assert figures["mi_8"] == pytest.approx(0, abs=1e-3)
    assert figures["run_length_ratio"] == pytest.approx(1, abs=0.03)
    assert figures["variance_ratio"] == pytest.approx(1, abs=0.03)
    assert isinstance(figures["correlation_time"], Missing)


def test_counts_by_hand() -> None:
    figures = counts(drawn(10, 50, 0.0, 0.3, 0.9))
    assert figures["tokens"] == 500
    assert figures["documents"] == 10
    assert figures["alive"] == 2
    assert figures["l0"] == pytest.approx(1.2, abs=0.1)
    assert (figures["dense_share"], figures["always_share"]) == pytest.approx((2 / 3, 1 / 3))


def test_dense_latents_gain_nothing_by_matching() -> None:
    look, flat = drawn(40, 100, 0.9, 0.05), drawn(40, 100, 0.05, 0.05)
    figures = matched_figures(look, flat, Baseline(None))
    assert figures["matched_covered"] == pytest.approx(1)
    assert figures["matched_difference"] == pytest.approx(0, abs=0.05)
    apart = matched_figures(drawn(40, 100, 0.9), flat, Baseline(None))
    assert apart["matched_rho_8"] == Missing("no bin of density holds latents of both")


def test_intervals_are_of_the_figures_beside_them() -> None:
    look, flat = drawn(40, 100, 0.3, 0.05), drawn(40, 100, 0.05, 0.25)
    figures = persistence_figures(look) | matched_figures(look, flat, Baseline(None))
    found = intervals(look, flat)
    for name, interval in found.items():
        value = figures[name]
        assert interval is not None
        assert not isinstance(value, Missing)
        assert interval[0] < value < interval[1]
        assert interval[1] - interval[0] < 0.1  # 4,000 pairs in 40 documents: a standard error of .015
    whole = at_lag(sums_by_block(look).sum(0))
    assert torch.allclose(whole.rho[LAG], look.persistence.rho[LAG])
    assert torch.allclose(whole.density, look.persistence.density)


def test_documents_beyond_the_blocks_share_them() -> None:
    look = drawn(300, 20, 0.3)
    assert len(look.pairs.documents) == 300
    assert sums_by_block(look).shape == (128, 7, 2)
    assert look.pairs.tokens.tolist() == [60.0] * 44 + [40.0] * 84
