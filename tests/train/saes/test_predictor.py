"""The linear predictor: its formula, what it may read, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE
from train.saes.predictor import Predictor
from train.schedule import Clock

B, T, D, LATENTS, K = 3, 12, 6, 20, 4
CLOCK = Clock(50, 100, B * T)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new(**options: Any) -> Predictor:
    """With weights that say something."""
    sae = make_sae("predictor", {"d_sae": LATENTS, "k": K, "window": T, "lags": 5, "rank": 3} | options, D, 0, "test")
    assert isinstance(sae, Predictor)
    with torch.no_grad():
        sae.sparsity.threshold.fill_(0.3)
        if sae.config.rank:
            sae.W_out.copy_(randn(*sae.W_out.shape, seed=2))
    return sae.requires_grad_(False)


def packed(x: Tensor) -> Batch:
    """Documents change at 5 in the first window, at 2 and 9 in the second; one invalid place in each."""
    doc = torch.zeros(B, T, dtype=torch.int32)
    doc[0, 5:] = 1
    doc[1, 2:], doc[1, 9:] = 1, 2
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 6] = valid[1, 4] = valid[2, 0] = False
    return Batch.of(x, doc=doc, valid=valid)


def test_reconstruction_agrees_with_a_slow_loop() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    f = sae.codes(batch)
    got = sae.reconstruct(f, batch)
    for b in range(B):
        for t in range(T):
            expected = f[b, t] @ sae.W_dec + sae.b_dec
            for s in range(max(t - 5, 0), t):
                if batch.doc[b, s] == batch.doc[b, t] and batch.valid[b, s] and batch.valid[b, t]:
                    expected = expected + (sae.lag_weights[t - s - 1] * (f[b, s] @ sae.W_past)) @ sae.W_out
            assert torch.allclose(got[b, t], expected, atol=1e-5), (b, t)


def test_training_reconstructs_as_inference_does_from_the_same_codes() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    output = sae.training_pass(batch, CLOCK)
    assert torch.allclose(sae.reconstruct(output.latents, batch), output.reconstruction, atol=1e-6)


def test_stored_codes_decode_to_what_forward_gives() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    codes = sae.encode(batch).clone()
    assert torch.equal(sae.decode(codes, batch.with_x(torch.full_like(batch.x, torch.nan))), sae(batch))


def test_nothing_comes_from_the_future_or_from_other_documents() -> None:
    sae, x = new(), randn(B, T, D)
    before = sae(packed(x))
    later = x.clone()
    later[:, 8:] += 5
    assert torch.equal(sae(packed(later))[:, :8], before[:, :8])
    other = x.clone()
    other[0, :5] += 5
    assert torch.equal(sae(packed(other))[0, 5:], before[0, 5:])
    assert not torch.equal(sae(packed(other))[0, 4], before[0, 4])
    spoiled = x.clone()
    spoiled[0, 6] = 1e4  # invalid
    kept = [t for t in range(T) if t != 6]
    assert torch.equal(sae(packed(spoiled))[0, kept], before[0, kept])


def test_the_past_is_read() -> None:
    sae, x = new(), randn(B, T, D)
    moved = x.clone()
    moved[2, 3] += 5
    difference = (sae(packed(moved)) - sae(packed(x)))[2].abs().sum(-1)
    assert (difference[4:9] > 0).all()
    assert difference[9:].max() == 0  # 5 lags


def test_rows_have_no_past() -> None:
    sae, x = new(), randn(7, D)
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    flat = sae.encode(x) @ sae.W_dec + sae.b_dec
    assert torch.allclose(sae(x), flat, atol=1e-6)


def learner_of(sae: SAE, n_steps: int) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=1e-2)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32)


def test_rank_0_is_batchtopk() -> None:
    options = {"d_sae": LATENTS, "k": K, "window": T}
    learners = [
        learner_of(make_sae(name, options | extra, D, 0, "test"), 30)
        for name, extra in (("batchtopk", {}), ("predictor", dict(Predictor.plain or {})))
    ]
    for step in range(30):
        for learner in learners:
            learner.train_step(packed(randn(B, T, D, seed=step)), B * T)
    ours, theirs = (learner.sae.state_dict() for learner in learners)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(learners[0].tally.last_loss, learners[1].tally.last_loss)


def test_what_the_past_says_is_learned() -> None:
    # x_t is one of 8 fresh symbols beside the one of two places ago: 64 pairs, told with one of 16 latents
    options = {"d_sae": 16, "k": 1, "window": 16, "rank": 8, "lags": 3, "aux_alpha": 0.0}
    sae = make_sae("predictor", options, 16, 0, "test")
    learner = learner_of(sae, 200)
    for step in range(200):
        symbol = torch.eye(8)[torch.randint(8, (16, 18), generator=torch.Generator().manual_seed(step))]
        x = torch.cat([symbol[:, 2:], symbol[:, :-2]], dim=-1) / 2**0.5
        learner.train_step(Batch.of(x), 256)
    output = sae.requires_grad_(False).training_pass(Batch.of(x), Clock(199, 200, 256))
    # a code says one of two equal parts, each .44 of what varies; the past says the other but at 2 of 16 places
    assert float(output.extra["error_without_past"]) > 0.3
    assert float(output.parts["reconstruction"]) < 0.25


@pytest.mark.parametrize("options", [{"lags": 0}, {"rank": -1}, {"window": 1}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="test"):
        make_sae("predictor", {"d_sae": 8, "k": 1} | options, D, 0, "test")
