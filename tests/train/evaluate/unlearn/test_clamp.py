"""The intervention against its formula, position by position."""

from __future__ import annotations

import pytest
import torch

from train.data.batch import Batch
from train.evaluate.unlearn.clamp import Clamp, codes_of, intervene
from train.saes import make_sae
from train.saes.base import SAE

D, L = 4, 3


@pytest.fixture
def sae() -> SAE:
    """Latent i is what x has of dimension i, above 1."""
    sae = make_sae("standard", {"d_sae": L, "l1": 0.1}, D, 0, "test").requires_grad_(False)
    sae.W_enc.copy_(torch.eye(D)[:, :L])
    sae.W_dec.copy_(torch.eye(D)[:L])
    sae.b_enc.fill_(-1.0)
    return sae


X = torch.tensor([[[5.0, 5, 5, 1], [3, 0, 2, 7], [0, 4, 0, 7], [9, 0, 0, 7]]])


def test_active_latents_go_to_minus_their_value_and_the_error_stays(sae: SAE) -> None:
    got = intervene(sae, Batch.of(X), Clamp((0, 1), (10.0, 20.0)))
    # f = x − 1 where above 0; x' = x + (−c − f): 3 − (10 + 2), 4 − (20 + 3), 9 − (10 + 8)
    expected = [[[5.0, 5, 5, 1], [-9, 0, 2, 7], [0, -19, 0, 7], [-9, 0, 0, 7]]]
    assert got.tolist() == expected


def test_ablation_takes_away_what_the_latent_writes(sae: SAE) -> None:
    got = intervene(sae, Batch.of(X), Clamp((0,), (0.0,)))
    assert got.tolist() == [[[5.0, 5, 5, 1], [1, 0, 2, 7], [0, 4, 0, 7], [1, 0, 0, 7]]]


def test_first_position_has_no_codes(sae: SAE) -> None:
    codes = codes_of(sae, Batch.of(X))
    assert codes[0, 0].tolist() == [0, 0, 0]
    assert codes[0, 1].tolist() == [2, 0, 1]


def test_no_latents_change_nothing(sae: SAE) -> None:
    assert torch.equal(intervene(sae, Batch.of(X), Clamp((), ())), X)


def test_activations_keep_their_type(sae: SAE) -> None:
    got = intervene(sae, Batch.of(X.bfloat16()), Clamp((0,), (10.0,)))
    assert got.dtype == torch.bfloat16
    assert got[0, 1].tolist() == [-9, 0, 2, 7]


def test_name_tells_clamps_apart() -> None:
    names = {Clamp(*one).name for one in (((1,), (2.0,)), ((1,), (2.5,)), ((2,), (2.0,)), ((1, 2), (2.0, 2.0)))}
    assert len(names) == 4
