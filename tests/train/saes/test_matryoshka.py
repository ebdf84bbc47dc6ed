"""Nested prefixes against a slow reference, and the flat SAE when there is one prefix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from train.data.batch import Batch
from train.saes import make_sae
from train.saes.matryoshka import Matryoshka
from train.schedule import Clock

D, N_LATENTS = 16, 64


def new(**options: object) -> Matryoshka:
    sae = make_sae("matryoshka", {"d_sae": N_LATENTS, "k": 8} | options, D, 0, "test")
    assert isinstance(sae, Matryoshka)
    return sae


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_blocks_follow_the_published_fractions() -> None:
    assert new().blocks == [2, 4, 8, 16, 34]


def test_blocks_add_up_where_fractions_do_not_fit() -> None:
    # ends at 33.3 and 66.7 of 100
    assert new(d_sae=100, fractions=[1 / 3, 1 / 3, 1 / 3]).blocks == [33, 34, 33]


def test_loss_is_the_plain_mean_over_prefixes() -> None:
    sae = new()
    sae.start(1.0, 0.1 * randn(D))
    x = randn(40, 1, D, seed=1)
    valid = torch.arange(40)[:, None] % 5 != 0
    output = sae.training_pass(Batch.of(x, valid=valid), Clock(50, 100, 40))
    latents, errors = output.latents.detach(), []
    for end in (2, 6, 14, 30, 64):
        x_hat = (latents[:, 0, :end] @ sae.W_dec[:end] + sae.b_dec).detach()
        errors.append(float((x[:, 0] - x_hat)[valid[:, 0]].square().sum(-1).mean()))
    assert float(output.parts["reconstruction"].detach()) == pytest.approx(sum(errors) / 5, rel=1e-5)
    assert torch.allclose(output.reconstruction, latents @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_an_inner_latent_learns_from_every_prefix_that_holds_it() -> None:
    sae = new()
    x = randn(40, 1, D, seed=1)
    output = sae.training_pass(Batch.of(x), Clock(50, 100, 40))
    output.parts["reconstruction"].backward()
    latents = output.latents.detach()[:, 0]
    assert sae.W_dec.grad is not None
    for row, prefixes in ((0, (2, 6, 14, 30, 64)), (20, (30, 64)), (40, (64,))):
        residuals = [x[:, 0] - (latents[:, :end] @ sae.W_dec[:end] + sae.b_dec) for end in prefixes]
        slope = sum(-2 * latents[:, row] @ residual / 40 for residual in residuals) / 5
        assert torch.allclose(sae.W_dec.grad[row], torch.as_tensor(slope), rtol=1e-3, atol=1e-5)


def test_with_one_prefix_it_is_flat_batchtopk_to_the_bit() -> None:
    assert Matryoshka.plain is not None
    nested = make_sae("matryoshka", {"d_sae": N_LATENTS, "k": 8, **Matryoshka.plain}, D, 0, "test")
    flat = make_sae("batchtopk", {"d_sae": N_LATENTS, "k": 8}, D, 0, "test")
    x = randn(40, 1, D)
    ours, theirs = (sae.training_pass(Batch.of(x), Clock(50, 100, 40)) for sae in (nested, flat))
    assert torch.equal(ours.total, theirs.total)
    assert torch.equal(ours.reconstruction, theirs.reconstruction)


@pytest.mark.parametrize(
    ("fractions", "said"),
    [([0.5, 0.4], "fractions sum to 0.9; 1 is needed"), ([0.001, 0.999], "leave a block without a latent")],
)
def test_fractions_that_do_not_fit_are_refused(fractions: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        new(fractions=fractions)
