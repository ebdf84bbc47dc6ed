"""The shared pieces against slow plain references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.data.batch import Batch
from train.saes import make_sae
from train.saes.parts import (
    aux_k_loss,
    batch_top_k,
    count_silence_,
    generator_of,
    geometric_median,
    reconstruction_loss,
    smallest_kept,
    threshold_for,
    top_k,
    update_average_,
)
from train.schedule import Clock


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_reconstruction_loss_sums_over_dimensions_and_averages_over_valid_tokens() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]], [[9.0, 9.0]]])
    valid = torch.tensor([[True], [True], [False]])
    # squared errors 1 + 4 = 5 and 9 + 0 = 9; the third token does not count
    assert reconstruction_loss(x, torch.zeros_like(x), valid, 2).item() == 7.0


def test_top_k_keeps_the_largest_of_each_token() -> None:
    u = randn(5, 3, 8).relu()
    kept = top_k(u, 2)
    for row, out in zip(u.reshape(-1, 8).tolist(), kept.reshape(-1, 8).tolist(), strict=True):
        allowed = sorted(row, reverse=True)[:2]
        assert out == [value if value in allowed else 0.0 for value in row]


def test_batch_top_k_keeps_the_largest_of_the_batch() -> None:
    u = randn(5, 3, 8).abs()
    kept = batch_top_k(u, 11)
    allowed = set(sorted(u.flatten().tolist(), reverse=True)[:11])
    assert kept.flatten().tolist() == [value if value in allowed else 0.0 for value in u.flatten().tolist()]


def slow_aux(residual: Tensor, u: Tensor, dead: Tensor, W_dec: Tensor, valid: Tensor) -> float:
    """AuxK token by token."""
    rows = [(e, a) for e, a, keep in zip(residual[:, 0], u[:, 0], valid[:, 0], strict=True) if keep]
    mean = torch.stack([e for e, _ in rows]).mean(0)
    alive = [i for i in range(len(dead)) if dead[i]]
    n = min(residual.shape[-1] // 2, len(alive))
    errors, spread = 0.0, 0.0
    for e, a in rows:
        chosen = sorted(alive, key=lambda i: -float(a[i]))[:n]
        estimate = sum((a[i] * W_dec[i] for i in chosen), torch.zeros_like(e))
        errors += float((e - estimate).square().sum())
        spread += float((e - mean).square().sum())
    return errors / spread


@pytest.mark.parametrize("n_dead", [1, 3, 9])
def test_aux_k_agrees_with_a_slow_reference(n_dead: int) -> None:
    residual, u, W_dec = randn(7, 1, 6), randn(7, 1, 12, seed=1).relu(), randn(12, 6, seed=2)
    dead = torch.arange(12) < n_dead
    valid = torch.arange(7)[:, None] != 3
    got = aux_k_loss(residual, u, dead, W_dec, valid).item()
    assert got == pytest.approx(slow_aux(residual, u, dead, W_dec, valid), rel=1e-5)


def test_aux_k_is_zero_with_no_dead_latent_and_with_no_residual() -> None:
    u, W_dec, valid = randn(7, 1, 12).relu(), randn(12, 6), torch.ones(7, 1, dtype=torch.bool)
    assert aux_k_loss(randn(7, 1, 6), u, torch.zeros(12, dtype=torch.bool), W_dec, valid).item() == 0.0
    dead = torch.ones(12, dtype=torch.bool)
    assert aux_k_loss(torch.zeros(7, 1, 6), u, dead, W_dec, valid).item() == 0.0  # 0 spread


def test_aux_k_has_a_gradient_of_zero_where_nothing_is_left_over() -> None:
    u, W_dec = randn(7, 1, 12).relu().requires_grad_(), randn(12, 6).requires_grad_()
    valid, dead = torch.ones(7, 1, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    aux_k_loss(torch.zeros(7, 1, 6), u, dead, W_dec, valid).backward()
    for leaf in (u, W_dec):
        assert leaf.grad is not None
        assert leaf.grad.eq(0).all()


@pytest.mark.parametrize("seed", [0, 2**32, 2**40])
def test_draws_of_a_step_depend_on_the_seed_and_the_step(seed: int) -> None:
    def drawn(seed: int, step: int) -> Tensor:
        return torch.rand(4, generator=generator_of(seed, step, torch.device("cpu")))

    assert torch.equal(drawn(seed, 7), drawn(seed, 7))
    for other in (drawn(seed + 1, 7), drawn(seed + 2**32, 7), drawn(seed, 8)):
        assert not torch.equal(other, drawn(seed, 7))


def test_gradients_of_reconstruction_and_aux_agree_with_finite_differences() -> None:
    f64 = torch.float64
    x, b_dec = randn(4, 1, 6, dtype=f64), randn(6, seed=3, dtype=f64) * 0.1
    W_enc, W_dec = randn(6, 10, seed=1, dtype=f64), randn(10, 6, seed=2, dtype=f64)
    dead, valid = torch.arange(10) < 4, torch.ones(4, 1, dtype=torch.bool)
    parameters = [value.requires_grad_() for value in (W_enc, W_dec, b_dec)]

    def loss(parts: list[Tensor]) -> Tensor:
        # as in the library, with its casts to float32 left out: they would drown the differences
        enc, dec, bias = parts
        u = torch.relu((x - bias) @ enc)
        latents = top_k(u, 3)
        reconstruction = latents @ dec + bias
        residual = (x - reconstruction).detach() if frozen is None else frozen
        kept = top_k(torch.where(dead, u, 0.0), 3)
        aux = (residual - kept @ dec).square().sum() / (residual - residual.mean((0, 1))).square().sum()
        return (x - reconstruction).square().sum(-1).mean() + aux / 32

    frozen: Tensor | None = None
    analytic = torch.autograd.grad(loss(parameters), parameters)
    frozen = (x - (top_k(torch.relu((x - b_dec) @ W_enc), 3) @ W_dec + b_dec)).detach()
    for number, (parameter, gradient) in enumerate(zip(parameters, analytic, strict=True)):
        for index in range(0, parameter.numel(), 7):
            step = torch.zeros(parameter.numel(), dtype=f64)
            step[index] = 1e-6
            moved = [[p.detach().clone() for p in parameters] for _ in range(2)]
            moved[0][number] += step.view_as(parameter)
            moved[1][number] -= step.view_as(parameter)
            slope = float(loss(moved[0]) - loss(moved[1])) / 2e-6
            assert slope == pytest.approx(float(gradient.flatten()[index]), rel=1e-5, abs=1e-8)
    # and the library's float32 gradients are those of the float64 formula
    small = [p.detach().float().requires_grad_() for p in parameters]
    u = torch.relu((x.float() - small[2]) @ small[0])
    reconstruction = top_k(u, 3) @ small[1] + small[2]
    total = reconstruction_loss(x.float(), reconstruction, valid, 4)
    total = total + aux_k_loss(x.float() - reconstruction, u, dead, small[1], valid) / 32
    for ours, exact in zip(torch.autograd.grad(total, small), analytic, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1.0, 3.0, 2.5])
def test_threshold_gives_the_l0_asked_for(k: float) -> None:
    batches = [randn(40, 16, seed=seed).relu() for seed in range(5)]
    theta = threshold_for(batches, k)
    everything = sorted(torch.cat(batches).flatten().tolist(), reverse=True)
    n = round(k * 200)
    assert theta == pytest.approx((everything[n - 1] + everything[n]) / 2, rel=1e-6)
    assert sum(value > theta for value in everything) == n


def test_silence_counts_valid_tokens_since_a_latent_fired() -> None:
    silent = torch.tensor([10, 20, 30])
    count_silence_(silent, torch.tensor([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]]), 2)
    assert silent.tolist() == [12, 0, 32]


def test_average_is_set_first_and_moves_after() -> None:
    average = torch.tensor(5.0)
    update_average_(average, torch.tensor(2.0), 0.9, first=True)
    assert average.item() == 2.0
    update_average_(average, torch.tensor(4.0), 0.9, first=False)
    assert average.item() == pytest.approx(2.2)
    update_average_(average, torch.tensor(math.inf), 0.9, first=False)
    assert average.item() == pytest.approx(2.2)


def test_average_takes_the_first_value_whenever_it_comes() -> None:
    average = torch.tensor(math.inf)
    update_average_(average, torch.tensor(2.0), 0.9, first=False)
    assert average.item() == 2.0


def test_smallest_kept_is_the_smallest_positive_latent() -> None:
    assert smallest_kept(torch.tensor([[[0.0, 3.0]], [[0.5, 0.0]]])).item() == 0.5
    assert smallest_kept(torch.zeros(1, 1, 2)).item() == math.inf


def test_geometric_median_of_known_points() -> None:
    # of four corners of a square: the centre; of three points on a line: the middle one
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert torch.allclose(geometric_median(square), torch.tensor([1.0, 1.0]), atol=1e-4)
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0]])
    assert torch.allclose(geometric_median(line), torch.tensor([1.0, 0.0]), atol=1e-2)


def test_geometric_median_is_not_drawn_away_by_an_outlier() -> None:
    points = torch.cat([randn(200, 4), torch.full((1, 4), 1e4)])
    assert geometric_median(points).norm() < 0.5
    assert points.mean(0).norm() > 50


def test_annealing_starts_from_at_most_all_latents() -> None:
    sae = make_sae("topk", {"d_sae": 8, "k": 2, "k_anneal": 0.5}, 64, 0, "test")  # d / 4 = 16
    latents = sae.training_pass(Batch.of(randn(5, 1, 64)), Clock(0, 100, 5)).latents
    assert (latents > 0).sum() > 2 * 5
