"""JumpReLU: its kernel gradients by hand, its three penalties, and its thresholds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.jumprelu import JumpReLU, above, default_bandwidth, jump
from train.schedule import Clock


def new(d: int = 16, d_sae: int = 64, **options: object) -> JumpReLU:
    sae = make_sae("jumprelu", {"d_sae": d_sae} | options, d, 0, "test")
    assert isinstance(sae, JumpReLU)
    return sae


def batch(n: int = 50, seed: int = 0) -> Batch:
    x = torch.randn(n, 1, 16, generator=torch.Generator().manual_seed(seed))
    return Batch.of(x / 4)


def test_jump_and_its_gradients_are_those_of_the_kernel() -> None:
    # ε = 0.2: the kernel holds |u − θ| ≤ 0.1, so the second and third pair
    u = torch.tensor([[[2.0, 0.55, 0.45, -1.0, 0.3]]], requires_grad=True)
    theta = torch.full((5,), 0.5, requires_grad=True)
    latents = jump(u, theta, 0.2)
    assert torch.equal(latents, torch.tensor([[[2.0, 0.55, 0.0, 0.0, 0.0]]]))
    latents.backward(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]))
    assert u.grad is not None
    assert theta.grad is not None
    assert u.grad.flatten().tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert theta.grad.tolist() == pytest.approx([0.0, -2.5 * 2, -2.5 * 3, 0.0, 0.0])  # θ/ε = 2.5


def test_step_moves_thresholds_alone() -> None:
    u = torch.tensor([[[2.0, 0.55]], [[0.45, 0.45]]], requires_grad=True)
    theta = torch.full((2,), 0.5, requires_grad=True)
    active = above(u, theta, 0.2)
    assert active.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
    active.sum().backward()
    assert u.grad is None
    assert theta.grad is not None
    assert theta.grad.tolist() == pytest.approx([-5.0, -10.0])  # 1/ε for each pair inside


def test_expected_gradient_of_l0_is_the_density_at_the_threshold() -> None:
    # u uniform on [0, 1]: d⟨1[u > θ]⟩/dθ = −1, whatever the kernel's width
    u = ((torch.arange(10_000) + 0.5) / 10_000)[:, None, None]
    for bandwidth in (0.02, 0.2):
        theta = torch.tensor([0.4], requires_grad=True)
        above(u, theta, bandwidth).mean().backward()
        assert theta.grad is not None
        assert float(theta.grad) == pytest.approx(-1.0, rel=0.01)


def test_bandwidth_and_start_fall_with_the_length_as_rates_do() -> None:
    assert [default_bandwidth(n) for n in (100, 500, 50_000, 10**6)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    sae = new()
    assert 0 in sae.landmarks(50_000)
    sae.revise(lambda: [], Clock(0, 50_000, 1024))
    assert torch.allclose(sae.theta, torch.tensor(1e-3))
    assert torch.allclose(new(theta=0.03).theta, torch.tensor(0.03))
    assert new(theta=0.03).landmarks(50_000) == ()


def test_start_is_that_of_variants_that_subtract_the_bias() -> None:
    sae, x = new(), batch().x
    b_dec = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    sae.start(1.0, b_dec)
    assert torch.allclose(sae.pre_activations(x), (x - b_dec) @ sae.W_enc, atol=1e-6)


def test_penalties_are_those_of_the_formula() -> None:
    clock, x = Clock(50, 100, 50), batch()
    for penalty in ("l0", "target", "tanh"):
        weight: dict[str, Any] = {"target_weight": 0.5} if penalty == "target" else {"l0": 0.01}
        sae = new(penalty=penalty, target_l0=8.0, **weight)
        output = sae.training_pass(x, clock)
        latents = output.latents.detach()
        l0 = float((latents > 0).sum()) / 50
        expected = {
            "l0": 0.01 * l0,
            "target": 0.5 * (l0 / 8 - 1) ** 2,
            "tanh": 0.01 * float(torch.tanh(4 * 4 * latents).sum()) / 50,  # √16 = 4
        }
        assert float(output.parts["sparsity"].detach()) == pytest.approx(expected[penalty], rel=1e-5)


def test_tanh_pulls_dead_latents_up_to_their_threshold() -> None:
    sae, x = new(penalty="tanh"), batch()
    with torch.no_grad():
        sae.b_enc[:3] = -5.0
    sae.tokens_silent[:3] = 10**9
    part = sae.training_pass(x, Clock(50, 100, 50)).parts["silent"]
    gap = (sae.theta - sae.pre_activations(x.x))[:, 0, :3].clamp_min(0).sum() / 50
    assert float(part.detach()) == pytest.approx(3e-6 * float(gap.detach()), rel=1e-4)
    part.backward()
    assert sae.b_enc.grad is not None
    assert (sae.b_enc.grad[:3] < 0).all()
    assert not sae.b_enc.grad[3:].any()


def test_kernel_share_counts_valid_pairs() -> None:
    x = batch()
    valid = torch.arange(50)[:, None] % 2 == 0
    sae = new(bandwidth=0.05)
    output = sae.training_pass(Batch.of(x.x, valid=valid), Clock(50, 100, 50))
    u = sae.pre_activations(x.x)[valid]
    inside = sum(abs(value - 0.01) <= 0.025 for value in u.flatten().tolist())
    assert float(output.extra["kernel_share"]) == pytest.approx(inside / u.numel(), rel=1e-5)
    assert inside > 0


def test_thresholds_move_and_stay_positive() -> None:
    sae = new(l0=0.05, theta=1e-3, bandwidth=0.05)
    learner = Learner(LearnerConfig(name="x", variant="jumprelu", lr=1e-2), sae, 40, torch.device("cpu"), torch.float32)
    assert learner.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for step in range(40):
        learner.train_step(batch(seed=step), 50)
        assert (sae.theta > 0).all()
    assert (sae.theta - 1e-3).abs().max() > 1e-2


def test_default_rate_is_two_fifths_of_the_others_and_a_given_one_stays() -> None:
    for lr, expected in ((None, 4e-3), (1e-2, 1e-2)):
        config = LearnerConfig(name="x", variant="jumprelu", lr=lr)
        assert Learner(config, new(), 40, torch.device("cpu"), torch.float32).peak_lr == pytest.approx(expected)


def test_calibration_multiplies_every_threshold_by_one_number() -> None:
    sae, x = new(target_l0=5.0), batch(400)
    with torch.no_grad():
        sae.theta.copy_(0.01 + 0.1 * torch.rand(64, generator=torch.Generator().manual_seed(1)))
    before = sae.theta.detach().clone()
    settled = sae.calibrate(lambda: [x])
    assert float((sae.codes(x) > 0).sum()) / 400 == pytest.approx(5.0, abs=0.01)
    assert torch.allclose(sae.theta / before, torch.tensor(settled["threshold_factor"]))


def test_tanh_slope_is_that_of_the_unscaled_form() -> None:
    # at E‖x‖² = d, f is √d times larger and c = 4
    assert math.tanh(4 * math.sqrt(16) * 0.02) == pytest.approx(math.tanh(4 * (0.02 * math.sqrt(16))))


def test_target_penalty_without_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs target_l0"):
        new(penalty="target")
