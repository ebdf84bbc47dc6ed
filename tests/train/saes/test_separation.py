"""Separation of decoder rows and decorrelation of groups: slow references, and when a step takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.saes.scaled import B, D, T, group_of, new, packed, randn
from train.saes import multiscale as module
from train.saes.kept import Kept
from train.saes.separation import correlation, energies_of, separation
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
    got = separation(rows.split([5, 5, 4, 4])).item()
    assert got == pytest.approx(slow_separation(rows, group), rel=1e-5)
    # by hand: two rows at 60° in different groups, cos² = ¼, and nobody else in either group
    pair = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert separation(pair.split(1)).item() == pytest.approx(0.25)
    assert separation([pair]).item() == pytest.approx(0.125)
    assert separation((-pair * torch.tensor([[1.0], [-1.0]])).split(1)).item() == 0.0  # pointing apart


def test_gradients_of_separation_are_those_through_all_cosines() -> None:
    rows = torch.nn.functional.normalize(randn(18, D), dim=-1)
    rows[3] = -rows[:3].mean(0)  # nobody of its own group is near
    group = torch.tensor([group_of(latent) for latent in range(18)])
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    separation(ours.split([5, 5, 4, 4])).backward()
    cosines, same = (theirs @ theirs.t()).clamp_min(0), group[:, None] == group
    across = cosines.masked_fill(same, 0).amax(1).square().mean()
    within = cosines.masked_fill(~same, 0).fill_diagonal_(0).amax(1).square().mean()
    (across + within / 2).backward()
    assert ours.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_separation_of_rows_that_are_no_numbers_is_none() -> None:
    rows = torch.nn.functional.normalize(randn(18, D), dim=-1)
    rows[4, 2] = torch.nan
    assert separation(rows.split([5, 5, 4, 4])).isnan()


def test_energies_of_kept_codes_are_those_of_all() -> None:
    codes = randn(2, 6, 18).relu() * (randn(2, 6, 18, seed=1) > 0.8)
    kept = Kept.of(codes, codes.flatten().nonzero().squeeze(-1))
    assert torch.allclose(energies_of(kept, [5, 5, 4, 4]), energies_of(codes, [5, 5, 4, 4]), atol=1e-6)
    assert energies_of(codes, [5, 5, 4, 4])[1, 3, 1] == codes[1, 3, 5:10].square().sum()


def test_products_of_separation_are_float32_under_autocast() -> None:
    rows = torch.nn.functional.normalize(randn(18, D), dim=-1).split([5, 5, 4, 4])
    energies, valid = randn(3, 5, 4).square(), torch.ones(3, 5, dtype=torch.bool)
    exact = separation(rows), correlation(energies, valid, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separation(rows), exact[0])
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
    groups = sae.sampled_rows(8)
    rows = torch.cat(groups)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(rows, torch.cat(new().sampled_rows(8)))
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    found = [(sae.W_dec == row).all(1).nonzero().item() for row in rows]
    assert [group_of(int(latent)) for latent in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(set(found)) == 12
    assert not torch.equal(rows, torch.cat(sae.sampled_rows(12)))
    sae.seed = 2**40  # the same in the 32 bits that torch takes of a seed
    assert not torch.equal(rows, torch.cat(sae.sampled_rows(8)))


def test_correlation_is_that_of_valid_tokens() -> None:
    # groups 0 and 1 rise together, 2 falls with them half the way (r² = ¾ by hand), the last token does not count
    energies = torch.tensor([[[0.0, 1.0, 5.0], [1.0, 3.0, 5.0], [2.0, 5.0, 2.0], [9.0, -9.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    assert correlation(energies, valid, 3).item() == pytest.approx((1 + 0.75 + 0.75) / 3, rel=1e-5)
    constant = torch.ones(1, 4, 2)
    assert correlation(constant, valid, 3).item() == 0.0
