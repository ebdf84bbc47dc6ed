"""Intervals over resampled documents, against theory and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.evaluate.bootstrap import bootstrap_interval, resampled_sums


def mean_of(sums: Tensor) -> Tensor:
    """A mean over tokens from their sum and number."""
    return sums[0] / sums[1]


def documents(n: int, tokens: int = 50) -> Tensor:
    """Sum and number of tokens by document; documents differ with standard deviation 1, their tokens hardly."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, 1, generator=generator) + 0.01 * torch.randn(n, tokens, generator=generator)
    return torch.stack([values.sum(1), torch.full((n,), float(tokens))], dim=1)


def test_interval_is_as_wide_as_the_documents_differ() -> None:
    sums = documents(400)
    found = bootstrap_interval(sums, mean_of)
    assert found is not None
    means = (sums[:, 0] / sums[:, 1]).double()
    half = 1.96 * float(means.std()) / 400**0.5  # by tokens it would be a seventh of that
    assert found[0] == pytest.approx(float(means.mean()) - half, abs=0.1 * half)
    assert found[1] == pytest.approx(float(means.mean()) + half, abs=0.1 * half)


def test_documents_that_are_alike_have_no_interval_to_speak_of() -> None:
    found = bootstrap_interval(torch.tensor([[3.0, 2.0]]).expand(20, 2), mean_of)
    assert found == (1.5, 1.5)


def test_interval_repeats_with_its_seed_and_not_with_another() -> None:
    sums = documents(20)
    assert bootstrap_interval(sums, mean_of, n=100) == bootstrap_interval(sums, mean_of, n=100)
    assert bootstrap_interval(sums, mean_of, n=100) != bootstrap_interval(sums, mean_of, n=100, seed=1)


def test_one_document_or_a_figure_that_is_no_number_has_no_interval() -> None:
    assert bootstrap_interval(documents(1), mean_of) is None
    assert bootstrap_interval(torch.zeros(0, 2), mean_of) is None
    assert bootstrap_interval(documents(9) * 0, mean_of) is None


def test_resamples_have_as_many_documents_as_there_are() -> None:
    sums = torch.ones(7, 2, 3)
    drawn = list(resampled_sums(sums, n=130))
    assert len(drawn) == 130
    assert all(torch.equal(total, torch.full((2, 3), 7.0, dtype=torch.float64)) for total in drawn)
    several = torch.stack(list(resampled_sums(torch.eye(5), n=200)))
    assert several.sum(1).unique().tolist() == [5.0]
    assert float(several.mean()) == pytest.approx(1.0)
    assert float(several.var()) == pytest.approx(0.8, abs=0.1)  # binomial: 5 draws, chance 1/5
