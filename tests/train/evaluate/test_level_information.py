"""Mutual information between levels, against pairs counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.train.evaluate.made_codes import codes_of, independent
from train.evaluate.coactivity import correlations, strongest
from train.evaluate.codes import elsewhere
from train.evaluate.level_information import information_intervals, level_information

LOWER, UPPER = np.arange(6), np.arange(6, 10)


def example() -> np.ndarray:
    """Upper latents 6 and 7 copy 2 and 4 in part; 8 is apart; 9 is 0 with 3 and otherwise never."""
    values = independent(3000, 10, 0.2)
    values[:, 6] = np.where(np.arange(3000) % 3 > 0, values[:, 2], values[:, 6])
    values[:, 7] = values[:, 4]
    values[:, 9] = (values[:, 3] == 0) * 1.0
    return values


def information(a: np.ndarray, b: np.ndarray) -> float:
    """Plug-in mutual information in bits of two bool arrays, less 1 / (2 n ln 2)."""
    total = 0.0
    for i in (a, ~a):
        for j in (b, ~b):
            joint = (i & j).mean()
            total += joint * np.log2(joint / (i.mean() * j.mean())) if joint else 0.0
    return max(total - 1 / (2 * len(a) * np.log(2)), 0.0)


def bits(a: np.ndarray) -> float:
    p = a.mean()
    return float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)))


def test_best_partner_and_its_nmi_are_those_of_a_search() -> None:
    values = example()
    on = values > 0
    codes = codes_of(values)
    found = level_information(codes.values[:, LOWER], codes.values[:, UPPER])
    table = np.array(
        [[information(on[:, i], on[:, j]) / min(bits(on[:, i]), bits(on[:, j])) for i in LOWER] for j in UPPER]
    )
    assert found.nmi.numpy() == pytest.approx(table.max(1))
    assert found.partner.tolist() == table.argmax(1).tolist()
    assert found.partner.tolist()[:2] == [2, 4]
    assert found.nmi[1] == pytest.approx(1, abs=1e-3)  # a copy: 1 but for the correction
    assert found.nmi[3] == pytest.approx(1, abs=1e-3)
    entropies = np.array([bits(on[:, j]) for j in UPPER])
    assert found.mean == pytest.approx(table.max(1).mean())
    assert found.weighted == pytest.approx(np.average(table.max(1), weights=entropies))


def test_shuffled_tokens_tell_nothing() -> None:
    codes = codes_of(example())
    lower = codes.values.tocsr()[elsewhere(codes.document, 0)][:, LOWER].tocsc()
    assert level_information(lower, codes.values[:, UPPER]).mean < 0.005


def test_intervals_hold_the_figures() -> None:
    codes = codes_of(example())
    found = level_information(codes.values[:, LOWER], codes.values[:, UPPER])
    mean, weighted = information_intervals(codes, LOWER, UPPER, found)
    assert mean is not None
    assert weighted is not None
    assert mean[0] < found.mean < mean[1] < mean[0] + 0.1
    assert weighted[0] < found.weighted < weighted[1]


def test_correlations_are_those_of_the_events() -> None:
    values = example()
    values[:, 5] = 0  # never active: 0, not NaN
    codes = codes_of(values)
    lower, upper = codes.values[:, LOWER], codes.values[:, UPPER]
    ((block, phi),) = correlations(lower, upper)
    expected = np.corrcoef((values > 0).T + 0.0 + 1e-9 * np.eye(10, 3000))[:6, 6:]
    expected[5] = 0
    assert (block.start, block.stop) == (0, 4)
    assert phi == pytest.approx(expected, abs=1e-5)
    among = np.array([True, True, False, True, True, False])
    order = strongest(lower, upper, among, 3)
    assert set(order.flatten().tolist()) <= {0, 1, 3, 4}
    for row, column in zip(order, np.abs(phi).T, strict=True):
        assert column[row[0]] >= column[row[1]] >= column[row[2]] >= column[among].min()
    assert torch.as_tensor(order[1])[0] == 4
