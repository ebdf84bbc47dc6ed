"""Which metrics end a learner, and which do not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from train.monitors import alarms, dense_alarm, verdict

HEALTHY = {"step": 5000, "loss": 0.1, "grad_norm_max": 1.0, "explained_variance": 0.9, "l0": 32.0}


def judge(quiet_steps: int = 0, n_steps: int = 10_000, **changed: Any) -> str | None:
    metrics = HEALTHY | changed
    return verdict(metrics, metrics["explained_variance"], quiet_steps, n_steps)


def test_a_healthy_learner_passes() -> None:
    assert judge() is None
    assert judge(explained_variance=None) is None  # constant input has no variance to explain


@pytest.mark.parametrize("name", ["loss", "grad_norm_max", "explained_variance"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_ends_at_once(name: str, value: float) -> None:
    assert judge(step=1, **{name: value}) == "loss or gradient not finite by step 1"


def test_a_blown_up_loss_ends_before_the_grace_is_over() -> None:
    assert "blown up; lower lr" in str(judge(step=60, explained_variance=-1e4))
    assert judge(step=50, explained_variance=-1e4) is None


def test_a_bad_start_is_forgiven() -> None:
    # levelled variants start near -18 (spec §0.4); the grace of a run of 10,000 steps is 1,000
    assert judge(step=1000, explained_variance=-18.0) is None
    assert "below 0 at step 1001" in str(judge(step=1001, explained_variance=-18.0))


def test_one_bad_step_is_not_judged() -> None:
    # metrics of a single step are written, but their explained variance is not what ends a learner
    assert verdict(HEALTHY | {"explained_variance": -0.5}, None, 0, 10_000) is None


@pytest.mark.parametrize(("n_steps", "enough"), [(10**6, 200), (1000, 200), (500, 100), (40, 8), (3, 1)])
def test_silence_in_a_row_ends(n_steps: int, enough: int) -> None:
    # a reconstruction loss averaged over dimensions makes L1 d times too strong: L0 goes to 0, EV to 0 from above
    assert judge(quiet_steps=enough - 1, n_steps=n_steps, step=3) is None
    assert "collapsed; lower lr" in str(judge(quiet_steps=enough, n_steps=n_steps, step=3))
    penalised = judge(quiet_steps=enough, n_steps=n_steps, step=3, loss_sparsity=0.1)
    assert "collapsed; lower the sparsity penalty" in str(penalised)


@pytest.mark.parametrize(("n_steps", "last_free"), [(200, 100), (2000, 400), (10**6, 1000)])
def test_the_grace_is_a_fifth_of_the_run_within_limits(n_steps: int, last_free: int) -> None:
    assert judge(step=last_free, explained_variance=-1.0, n_steps=n_steps) is None
    assert judge(step=last_free + 1, explained_variance=-1.0, n_steps=n_steps) is not None


def test_a_healthy_learner_raises_no_alarm() -> None:
    assert alarms(HEALTHY | {"dead": 0.05, "loss_reconstruction": 0.1, "loss_aux": 0.09}, 32, 10_000) == {}
    assert alarms(HEALTHY | {"loss_reconstruction": 0.1, "loss_gate": 0.15}, 32, 10_000) == {}  # of gated
    assert dense_alarm(0.005) == {}


@pytest.mark.parametrize(
    ("odd", "kind", "text"),
    [
        ({"dead": 0.21}, "dead", "21% of the latents are dead"),
        ({"loss_tree": 0.06}, "loss_tree", "loss_tree 0.06 is more than half of the reconstruction loss 0.1"),
        ({"explained_variance": 0.49}, "explained_variance", "explained variance 0.49 with k = 32"),
    ],
)
def test_alarms_say_what_is_odd_after_the_first_fifth(odd: dict[str, float], kind: str, text: str) -> None:
    metrics = HEALTHY | {"loss_reconstruction": 0.1} | odd
    assert text in alarms(metrics, 32, 10_000)[kind]
    assert alarms(metrics | {"step": 2000}, 32, 10_000) == {}
    assert alarms(metrics | {"step": 21}, 32, 100).keys() == {kind}


def test_a_low_explained_variance_is_no_alarm_with_few_latents() -> None:
    assert alarms(HEALTHY | {"explained_variance": 0.3}, 7, 10_000) == {}


def test_latents_that_always_fire_raise_an_alarm() -> None:
    assert dense_alarm(0.02) == {"dense": "2.0% of the latents fire on more than half of the tokens"}
