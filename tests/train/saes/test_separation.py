"""Separation of decoder rows and decorrelation of groups: slow references, and when a step takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.saes.scaled import B, D, T, group_of, new, packed, randn
from train.saes import multiscale as module
from train.saes.separation import correlation, separation
from train.schedule import Clock


def slow_separation(rows: Tensor, group: list[int]) -> float:
    unit = rows / rows.norm(dim=-1, keepdim=True)
    across, within = 0.0, 0.0
    for i in range(len(rows)):
        for same in (False, True):
            others = [j for j in range(len(rows)) if j != i and (group[i] == group[j]) is same]
            nearest = max([0.0, *(float(unit[i] @ unit[j]) for j in others)]) ** 2
            across, within = across + nearest * (not same), within + nearest * same
    return (across + 0.5 * within) / len(rows)


def test_separation_agrees_with_a_slow_reference() -> None:
    rows, group = randn(18, D), [group_of(latent) for latent in range(18)]
    rows /= rows.norm(dim=-1, keepdim=True)
    got = separation(rows, torch.tensor(group)).item()
    assert got == pytest.approx(slow_separation(rows, group), rel=1e-5)
    # by hand: two rows at 60° in different groups, cos² = ¼, and nobody else in either group
    pair = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert separation(pair, torch.tensor([0, 1])).item() == pytest.approx(0.25)
    assert separation(pair, torch.tensor([0, 0])).item() == pytest.approx(0.125)
    assert separation(-pair * torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])).item() == 0.0  # pointing apart


def test_products_of_separation_are_float32_under_autocast() -> None:
    rows, group = torch.nn.functional.normalize(randn(18, D), dim=-1), torch.tensor([group_of(i) for i in range(18)])
    energies, valid = randn(3, 5, 4).square(), torch.ones(3, 5, dtype=torch.bool)
    exact = separation(rows, group), correlation(energies, valid, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separation(rows, group), exact[0])
        assert torch.equal(correlation(energies, valid, 15), exact[1])


def test_separation_is_taken_every_fourth_step_and_counts_four_times() -> None:
    sae, batch = new(lambda_sep=0.2), packed()
    expected = 4 * 0.2 * slow_separation(sae.W_dec.detach(), [group_of(latent) for latent in range(18)])
    for step in range(9):
        parts = sae.training_pass(batch, Clock(step, 100, B * T)).parts
        assert ("separation" in parts) == (step in (0, 4, 8))
        if "separation" in parts:
            assert parts["separation"].item() == pytest.approx(expected, rel=1e-5)


def test_sampled_rows_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEPARATION_ROWS", 3)
    sae = new()
    rows, group = sae.sampled_rows(8)
    torch.manual_seed(1)
    torch.rand(5)
    again, _ = new().sampled_rows(8)
    assert torch.equal(rows, again)
    assert group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = [(sae.W_dec == row).all(1).nonzero().item() for row in rows]
    assert [group_of(int(latent)) for latent in found] == group.tolist()
    assert len(set(found)) == 12
    assert not torch.equal(rows, sae.sampled_rows(12)[0])
    sae.seed = 2**40  # the same in the 32 bits that torch takes of a seed
    assert not torch.equal(rows, sae.sampled_rows(8)[0])


def test_correlation_is_that_of_valid_tokens() -> None:
    # groups 0 and 1 rise together, 2 falls with them half the way (r² = ¾ by hand), the last token does not count
    energies = torch.tensor([[[0.0, 1.0, 5.0], [1.0, 3.0, 5.0], [2.0, 5.0, 2.0], [9.0, -9.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    assert correlation(energies, valid, 3).item() == pytest.approx((1 + 0.75 + 0.75) / 3, rel=1e-5)
    constant = torch.ones(1, 4, 2)
    assert correlation(constant, valid, 3).item() == 0.0
