"""Smoothness of codes against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.data.batch import Batch
from train.evaluate.smoothness import DistinctLatents, Smoothness, runs_of


def sequence(
    *values: list[float], doc: list[int] | None = None, valid: list[bool] | None = None
) -> tuple[Tensor, Batch]:
    """Codes [1, places, latents] of one sequence; x moves by 2 from each place to the next."""
    latents = torch.tensor(values)[None]
    length = latents.shape[1]
    x = 2.0 * torch.arange(length)[None, :, None]
    documents = None if doc is None else torch.tensor([doc])
    return latents, Batch.of(x, doc=documents, valid=None if valid is None else torch.tensor([valid]))


def test_runs_end_at_documents_and_at_invalid_tokens() -> None:
    _, batch = sequence(*[[0.0]] * 7, doc=[0, 0, 0, 0, 1, 1, 1], valid=[True, True, False, True, True, True, False])
    offset, length = runs_of(batch)
    assert offset.tolist() == [[0, 1, -1, 0, 0, 1, -1]]
    assert length.tolist() == [[2, 2, 0, 1, 2, 2, 0]]


def test_runs_of_nothing() -> None:
    _, batch = sequence([0.0], valid=[False])
    assert [values.tolist() for values in runs_of(batch)] == [[[-1]], [[0]]]


def test_changes_by_hand() -> None:
    found = Smoothness(2)
    # steps: (1, 1) → 2; (0, 3) → 3; the third is into another document
    found.add(*sequence([0.0, 1.0], [1.0, 2.0], [1.0, 5.0], [9.0, 9.0], doc=[0, 0, 0, 1]))
    assert (found.pairs, found.runs) == (2, 2)
    assert found.change / found.size == pytest.approx((2 + 3) / (3 + 6))
    assert found.per_distance / found.moved == pytest.approx((2 / 2 + 3 / 2) / 2)
    assert found.steepest.tolist() == [0.5, 1.5]


def test_tokens_that_do_not_move_have_no_slope() -> None:
    latents, batch = sequence([0.0], [1.0], [3.0])
    found = Smoothness(1)
    found.add(latents, Batch.of(torch.tensor([[[0.0], [0.0], [4.0]]])))
    assert (found.pairs, found.moved) == (2, 1)
    assert found.per_distance == pytest.approx(2 / 4)
    found.add(latents[:, :1], Batch.of(batch.x[:, :1]))  # nothing follows anything
    assert found.pairs == 2


def waves(period: int, constant: float = 3.0) -> Smoothness:
    places = torch.arange(64)
    found = Smoothness(1)
    found.add((constant + torch.cos(2 * math.pi * places / period))[None, :, None], Batch.of(torch.zeros(1, 64, 1)))
    return found


@pytest.mark.parametrize(("period", "low", "high"), [(32, 16, 0), (8, 16, 0), (4, 16, 0), (2, 0, 32)])
def test_spectrum_divides_at_half_of_the_highest_frequency(period: int, low: float, high: float) -> None:
    found = waves(period)
    assert found.windows == 2
    # energy of 32 places of a cosine is 16, of alternating signs 32; a window of 32 has 32 times that; the mean is out
    assert (found.low / 2 / 32, found.high / 2 / 32) == pytest.approx((low, high), abs=1e-3)


def test_white_noise_has_about_as_much_on_both_sides() -> None:
    found = Smoothness(4)
    values = torch.randn(64, 64, 4, generator=torch.Generator().manual_seed(0))
    found.add(values, Batch.of(torch.zeros(64, 64, 1)))
    assert found.high / found.low == pytest.approx(15 / 16, rel=0.1)  # 7 · 2 + 1 frequencies to 8 · 2
    assert sum(found.details) / found.approximation == pytest.approx(7, rel=0.1)


def test_haar_energies_by_hand() -> None:
    found = Smoothness(1)
    pattern = [4.0, 2.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]
    found.add(*sequence(*[[value] for value in pattern * 4]))
    # four times: (4 − 2)² / 2, (6 − 10)² / 4, (16 − 0)² / 8, and what is left, 16² / 8
    assert [*found.details, found.approximation] == pytest.approx([8, 16, 128, 128])
    assert sum(found.details) + found.approximation == pytest.approx(4 * sum(value**2 for value in pattern))


def test_windows_begin_where_a_run_does() -> None:
    latents, valid = torch.zeros(1, 40, 1), torch.ones(1, 40, dtype=torch.bool)
    valid[0, 3] = False
    latents[0, 3] = 100.0
    latents[0, 4:36] = 1.0
    latents[0, 36:] = 7.0  # 36 valid places in a row: one window of 32, and 4 left over
    found = Smoothness(1)
    found.add(latents, Batch.of(torch.zeros(1, 40, 1), valid=valid))
    assert found.windows == 1
    assert found.approximation == pytest.approx(32.0)


def test_distinct_latents_of_a_documents_stretches() -> None:
    found = DistinctLatents(3, window=4)
    on = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    # the fourth token is not valid: the stretch ends with the fifth, in which all three were active
    valid = [True, True, True, False, True, True]
    found.add(*sequence(*on, doc=[5] * 6, valid=valid))
    assert (found.windows, found.total) == (1, 3)
    # the document goes on in the next sequence: one token is left from the last one
    found.add(*sequence([0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], doc=[5, 5, 5, 6]))
    assert (found.windows, found.total) == (2, 4)
    # document 6 begins anew, and never has four
    found.add(*sequence([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], doc=[6, 6]))
    assert found.windows == 2
