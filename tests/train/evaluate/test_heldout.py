"""Held-out figures against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate import METRICS
from train.evaluate.heldout import evaluate_heldout
from train.saes import REGISTRY, make_sae
from train.saes.base import SAE

D = 8


def batches_of(x: Tensor, valid: Tensor, size: int = 7) -> list[Batch]:
    return [
        Batch.of(x[cut], valid=valid[cut]) for cut in (slice(start, start + size) for start in range(0, len(x), size))
    ]


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, D, generator=generator) + 2.0
    return x, torch.rand(40, 3, generator=generator) < 0.8


@pytest.mark.parametrize("variant", list(REGISTRY))
def test_figures_agree_with_brute_force(variant: str) -> None:
    sae = make_sae(variant, {"d_sae": 32}, D, 0, "test")
    with torch.no_grad():
        sae.start(0.3, torch.full((D,), 0.5))
        sae.b_enc.fill_(-0.4)
    x, valid = example()
    got = evaluate_heldout(sae, batches_of(x, valid))
    with torch.no_grad():
        rows = x[valid].double().numpy()
        latents = sae.encode(x)[valid].double().numpy()
        out = sae(x)[valid].double().numpy()
    errors = ((rows - out) ** 2).sum(1)
    fired = (latents > 0).mean(0)
    norms = np.linalg.norm(rows, axis=1), np.linalg.norm(out, axis=1)
    expected = {
        "tokens": len(rows),
        "explained_variance": 1 - errors.sum() / ((rows - rows.mean(0)) ** 2).sum(),
        "nmse": errors.sum() / (rows**2).sum(),
        "mse": errors.mean(),
        "cosine": ((rows * out).sum(1) / norms[0] / norms[1]).mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "l0": (latents > 0).sum(1).mean(),
        "l1": latents.sum(1).mean(),
        "dead_share": (fired == 0).mean(),
        "dense_share": (fired > 0.1).mean(),
        "always_share": (fired > 0.5).mean(),
        "density_gini": np.abs(fired[:, None] - fired).sum() / max(2 * len(fired) ** 2 * fired.mean(), 1e-30),
    }
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert got.keys() == METRICS["heldout"].keys()


class Fixed(SAE):
    """Reconstructs through a pair of signed identities, or to a constant."""

    variant = "fixed"

    def codes(self, batch: Batch) -> Tensor:
        return torch.relu(batch.x @ self.W_enc)

    def training_pass(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError("not trained")


def fixed(W: Tensor, b_dec: Tensor) -> Fixed:
    sae = Fixed(REGISTRY[next(iter(REGISTRY))].Config(d_sae=2 * D), D)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([W, -W], dim=1))
        sae.W_dec.copy_(torch.cat([W, -W]))
        sae.b_dec.copy_(b_dec)
    return sae


def test_the_identity_explains_everything() -> None:
    x, valid = example()
    got = evaluate_heldout(fixed(torch.eye(D), torch.zeros(D)), batches_of(x, valid))
    assert (got["explained_variance"], got["nmse"], got["l2_ratio"], got["cosine"]) == pytest.approx((1, 0, 1, 1))
    assert got["l0"] == D  # one of each pair of signs


def test_the_mean_explains_nothing() -> None:
    x, valid = example()
    got = evaluate_heldout(fixed(torch.zeros(D, D), x[valid].mean(0)), batches_of(x, valid))
    assert got["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert (got["l0"], got["dead_share"]) == (0, 1)


def test_where_nothing_varies_explained_variance_is_all_or_nothing() -> None:
    x, valid = torch.full((4, 1, D), 2.0), torch.ones(4, 1, dtype=torch.bool)
    identity, off = fixed(torch.eye(D), torch.zeros(D)), fixed(torch.eye(D), torch.full((D,), 0.1))
    assert evaluate_heldout(identity, batches_of(x, valid))["explained_variance"] == 1
    assert evaluate_heldout(off, batches_of(x, valid))["explained_variance"] == 0


def test_the_ratio_of_norms_is_over_one_where_the_input_is_almost_zero() -> None:
    x = torch.zeros(2, 1, D)
    x[1, 0, 0] = 2.0  # reconstructed as a vector of length 5: 5/2; the zero vector as 3: 3/1
    b_dec = torch.zeros(D)
    b_dec[0] = 3.0
    got = evaluate_heldout(fixed(torch.eye(D), b_dec), batches_of(x, torch.ones(2, 1, dtype=torch.bool)))
    assert got["l2_ratio"] == pytest.approx((3 + 5 / 2) / 2)


def test_no_held_out_token_is_refused() -> None:
    x, valid = example()
    with pytest.raises(DataError, match="no held-out token"):
        evaluate_heldout(fixed(torch.eye(D), torch.zeros(D)), batches_of(x, torch.zeros_like(valid)))
