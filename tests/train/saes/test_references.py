"""The references: exact figures on data whose moments are known, and a run that no monitor ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.runs import learner, run
from train.data.batch import Batch
from train.saes import load_sae, make_sae
from train.saes.base import SAE
from train.saes.references import Reference, mean_and_covariance
from train.schedule import Clock

D = 4
AXES = torch.tensor([3.0, 0.5, 2.0, 1.0])  # length of the swing along each axis
MEAN = torch.tensor([10.0, -1.0, 0.0, 2.0])
CLOCK = Clock(0, 100, 8)


def swings() -> Tensor:
    """Eight points μ ± a_i e_i: mean μ, covariance diag(a²) / 4. [8, 1, 4]"""
    return torch.cat([MEAN + torch.diag(AXES), MEAN - torch.diag(AXES)])[:, None]


def revised(variant: str, **options: int) -> SAE:
    sae = make_sae(variant, options, D, 0, "test")
    sae.start(1.0, torch.tensor([9.0, 0.0, 0.0, 0.0]))  # a starting point that is not the mean
    if 0 in sae.landmarks(100):
        with torch.no_grad():
            sae.revise(lambda: [Batch.of(swings())], CLOCK)
    return sae


def test_mean_and_covariance_of_known_points_leave_out_what_is_invalid() -> None:
    x = torch.cat([swings(), torch.full((1, 1, D), 1e6)])
    valid = torch.ones(9, 1, dtype=torch.bool)
    valid[8] = False
    batches = [Batch.of(x[:3], valid=valid[:3]), Batch.of(x[3:], valid=valid[3:])]
    mean, covariance = mean_and_covariance(lambda: batches, torch.zeros(D))
    # float32 batches of numbers near 10, squared near 100: seven digits leave 1e-5
    assert torch.allclose(mean, MEAN, atol=1e-5)
    assert torch.allclose(covariance, torch.diag(AXES.square() / 4), atol=1e-4)


def test_mean_gives_the_mean_and_no_latent() -> None:
    sae, x = revised("mean"), swings()
    assert not sae.encode(x).any()
    assert torch.allclose(sae(x), MEAN.expand_as(x), atol=1e-5)


def test_pca_keeps_the_longest_swings_and_loses_the_others() -> None:
    sae, x = revised("pca", k=2), swings()
    expected = x.clone()
    expected[[1, 3, 5, 7]] = MEAN  # swings along axes 1 and 3, the two shortest
    assert torch.allclose(sae(x), expected, atol=1e-4)
    # of a variance of (9 + .25 + 4 + 1) / 4 the two longest swings are 13 / 4
    error, variance = (x - sae(x)).detach().square().sum(), (x - MEAN).square().sum()
    assert float(1 - error / variance) == pytest.approx(13 / 14.25, abs=1e-5)


def test_a_pair_of_latents_has_one_active_for_each_sign() -> None:
    sae = revised("pca", k=2)
    x = MEAN + torch.tensor([[1.0, 0.0, -2.0, 5.0]])
    latents = sae.encode(x)[0]
    assert sorted(latents[latents > 1e-3].tolist()) == pytest.approx([1.0, 2.0], abs=1e-4)
    assert (sae.encode(2 * MEAN - x)[0] > 1e-3).nonzero().flatten().tolist() != (latents > 1e-3).nonzero().tolist()
    pairs = latents[:D], latents[D:]
    assert not (pairs[0] * pairs[1]).any()


def test_identity_gives_back_the_input_with_a_latent_per_dimension() -> None:
    sae = revised("identity")
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sae(x), x, atol=1e-5)  # x − b_dec + b_dec, b_dec near 9
    assert ((sae.encode(x) > 0).sum(-1) == D).all()


def test_pca_of_all_dimensions_or_more_is_the_identity() -> None:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    for k in (D, D + 1):
        assert torch.allclose(revised("pca", k=k)(x), x, atol=1e-4)


def test_a_width_asked_for_is_not_heeded() -> None:
    for variant in ("mean", "pca", "identity"):
        assert make_sae(variant, {"d_sae": 64} | ({"k": 2} if variant == "pca" else {}), D, 0, "test").d_sae == 2 * D


def test_references_finish_a_run_and_their_figures_are_in_order(shared_store: Path, tmp_path: Path) -> None:
    """Long enough for `collapsed` (12 quiet steps) and for an explained variance below 0 after the first 100."""
    names = ("mean", "pca", "identity")
    outcome = run(shared_store, tmp_path / "r", *(learner(name) for name in names), steps=80, log_every=1)
    assert outcome.reason == "3 of 3 learners finished"
    mean, pca, identity = (outcome.learners[name]["metrics"] for name in names)
    assert (mean["l0"], pca["l0"], identity["l0"]) == (0, 4, 16)
    # the mean of training documents on held-out ones: below 0, by the distance of the two means
    assert -0.05 < mean["explained_variance"] <= 0
    assert 0.25 < pca["explained_variance"] < 1  # four directions of sixteen, the best ones
    assert identity["explained_variance"] == pytest.approx(1, abs=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "r" / "pca" / "metrics.jsonl").read_text().splitlines()]
    assert {line["lr"] for line in lines} == {0.0}


def test_steps_change_nothing_after_the_first_look(shared_store: Path, tmp_path: Path) -> None:
    short = run(shared_store, tmp_path / "short", learner("pca"), steps=40)
    long = run(shared_store, tmp_path / "long", learner("pca"), steps=60)
    assert short.learners["pca"]["metrics"] == long.learners["pca"]["metrics"]
    loaded = [load_sae(tmp_path / name / "pca") for name in ("short", "long")]
    assert isinstance(loaded[0], Reference)
    assert torch.equal(loaded[0].W_dec, loaded[1].W_dec)
    assert torch.equal(loaded[0].b_dec, loaded[1].b_dec)
