"""The L0 controller on a model of training: L0 answers the penalty weight weakly, late, and starts far away."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import ConfigError
from train.saes import REGISTRY, make_sae
from train.saes.sparsity import L0Controller
from train.schedule import Clock


def course(controller: L0Controller, n_steps: int, best: float, gain: float, lag: float) -> list[float]:
    """L0 step by step: it goes to 32·(λ/best)^−gain with a time constant of `lag` steps, from 512."""
    level, seen = math.log(512.0), []
    for step in range(n_steps):
        clock = Clock(step, n_steps, 1024)
        weight = float(controller.penalty(torch.ones(()), clock))  # with the warm-up's factor
        level += (math.log(32) - gain * math.log(max(weight, 1e-9) / best) - level) / lag
        controller.follow_(torch.tensor(math.exp(level)), clock)
        seen.append(math.exp(level))
    return seen


@pytest.mark.parametrize("n_steps", [400, 5000, 20_000])
@pytest.mark.parametrize("gain", [0.25, 1.0])
@pytest.mark.parametrize("best", [0.01, 0.03, 0.2])
def test_l0_is_at_the_target_well_before_the_end(n_steps: int, gain: float, best: float) -> None:
    controller = L0Controller(0.03, 32.0)
    seen = course(controller, n_steps, best, gain, lag=15.0)
    # gains and lags as measured on the demo store; the last third is within 3 % of the target
    assert max(abs(l0 / 32 - 1) for l0 in seen[-n_steps // 3 :]) < 0.03
    assert float(controller.weight) == pytest.approx(best, rel=0.15)


def test_weight_stays_without_a_target() -> None:
    controller = L0Controller(0.03, None)
    course(controller, 100, 0.2, 0.3, 15.0)
    assert float(controller.weight) == pytest.approx(0.03)


def test_weight_stays_during_the_warmup_and_then_moves_by_the_rule() -> None:
    controller = L0Controller(0.03, 32.0)
    for step in range(10):
        controller.follow_(torch.tensor(64.0), Clock(step, 100, 1024))
        assert float(controller.weight) == pytest.approx(0.03)
    controller.follow_(torch.tensor(64.0), Clock(10, 100, 1024))
    # e = log 2 for the first time: the whole proportional part, and 10 / 100 · clip(4 log 2) = 0.1
    assert float(controller.weight) == pytest.approx(0.03 * 2 * math.exp(0.1), rel=1e-5)
    controller.follow_(torch.tensor(64.0), Clock(11, 100, 1024))
    assert float(controller.weight) == pytest.approx(0.03 * 2 * math.exp(0.2), rel=1e-5)


def test_a_late_start_is_as_the_end_of_the_warmup() -> None:
    controller = L0Controller(0.03, 32.0)
    controller.follow_(torch.tensor(64.0), Clock(40, 100, 1024))
    assert float(controller.l0_average) == 64.0
    assert float(controller.weight) == pytest.approx(0.03 * 2 * math.exp(0.1), rel=1e-5)


def test_weight_stays_within_thirty_times_its_start() -> None:
    for l0, factor in ((0.0, 1 / 30), (1e4, 30.0)):
        controller = L0Controller(0.03, 32.0)
        for step in range(100):
            controller.follow_(torch.tensor(l0), Clock(step, 100, 1024))
        assert float(controller.weight) == pytest.approx(0.03 * factor, rel=1e-5)


@pytest.mark.parametrize("variant", ["standard", "panneal", "gated", "jumprelu", "tree", "multiscale", "contrastive"])
def test_a_penalty_of_zero_that_is_to_be_led_is_refused(variant: str) -> None:
    fields = REGISTRY[variant].Config.model_fields
    name = "l0" if variant == "jumprelu" else "l1"
    led = {"target_l0": 8.0} if "target_l0" in fields else {"sparsity": "l1"}
    with pytest.raises(ConfigError, match=f"{name} = 0 cannot be led to an L0"):
        make_sae(variant, {"d_sae": 64, name: 0.0} | led, 16, 0, "test")
    if "target_l0" in fields:
        make_sae(variant, {"d_sae": 64, name: 0.0}, 16, 0, "test")  # nothing leads it: no penalty
