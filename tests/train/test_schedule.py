"""Schedules at hand-worked points."""

from __future__ import annotations

import pytest

from train.schedule import Clock, averaging, dead_after, default_lr, lr_factor, ramp


@pytest.mark.parametrize(
    ("n_steps", "d_sae", "expected"),
    [
        (100, 128, 1e-2),  # the ceiling
        (500, 1536, 1e-2),  # where it was measured
        (2_000, 1536, 5e-3),  # four times the steps: half
        (2_000, 6_144, 2.5e-3),  # four times the width too: a quarter
        (50_000, 2**14, 3.062e-4),  # the literature's 3e-4
        (10_000_000, 2**20, 1e-4),  # the floor
    ],
)
def test_default_lr_falls_with_length_and_width(n_steps: int, d_sae: int, expected: float) -> None:
    assert default_lr(n_steps, d_sae) == pytest.approx(expected, rel=1e-3)


def test_lr_rises_stays_and_falls_to_zero() -> None:
    factors = [lr_factor(Clock(step, 100, 1), 0.05, 0.2) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:81] == [1.0] * 76
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert factors[100] == 0.0


def test_warmup_is_a_thousand_steps_at_most() -> None:
    assert lr_factor(Clock(499, 10**6, 1), 0.05, 0.2) == pytest.approx(0.5)
    assert lr_factor(Clock(999, 10**6, 1), 0.05, 0.2) == 1.0


def test_no_warmup_and_no_decay_is_constant() -> None:
    assert {lr_factor(Clock(step, 10, 1), 0.0, 0.0) for step in range(10)} == {1.0}


def test_ramp_reaches_one_and_stays() -> None:
    assert [ramp(Clock(step, 40, 1), 0.1) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp(Clock(0, 40, 1), 0.0) == 1.0


@pytest.mark.parametrize(("n_steps", "window"), [(100, 10), (1000, 20), (50_000, 1000), (10**7, 1000)])
def test_averaging_window_is_two_percent_of_the_run(n_steps: int, window: int) -> None:
    assert 1 / (1 - averaging(n_steps)) == pytest.approx(window)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(100_000, 50_000), (2_000_000, 100_000), (4_000_000, 200_000), (20_000_000, 1_000_000), (10**9, 10_000_000)],
)
def test_latents_are_dead_after_a_twentieth_of_the_run_within_limits(tokens: int, expected: int) -> None:
    assert dead_after(tokens // 100, 100) == expected
