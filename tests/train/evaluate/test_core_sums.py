"""What suite core adds up, against plain numpy; how it depends on the batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from train.evaluate.core_sums import Tally, largest_cosines, shares, weights_by_latent
from train.saes import make_sae

D, L, T = 6, 10, 5
OF_BATCHES = {"mse_saebench", "explained_variance_legacy", "relative_reconstruction_bias"}


def example(n: int = 12, counted: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations with a mean, latents (some below 0, some always 0), reconstructions, and what counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, T, D, generator=generator) + 1.5
    latents = torch.relu(torch.randn(n, T, L, generator=generator) - 0.5)
    latents[..., 0] = -torch.rand(n, T, generator=generator)
    latents[..., 1] = 0.0
    latents[..., 2] *= torch.rand(n, T, generator=generator) < 0.05
    out = 0.8 * x + 0.3 * torch.randn(n, T, D, generator=generator)
    return x, latents, out, torch.rand(n, T, generator=generator) < counted


def tally_of(size: int, x: Tensor, latents: Tensor, out: Tensor, counted: Tensor) -> Tally:
    tally = Tally(latents.shape[-1])
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        tally.add(x[rows], latents[rows], out[rows], counted[rows])
    return tally


def by_hand(size: int, x: Tensor, latents: Tensor, out: Tensor, counted: Tensor) -> dict[str, float]:
    """The definitions of SAEBench 0.6.0, token by token and batch by batch."""
    per_token: dict[str, list[float]] = {}
    batches = []
    for start in range(0, len(x), size):
        mask = counted[start : start + size].numpy()
        a, b = (v[start : start + size].double().numpy()[mask] for v in (x, out))
        f = latents[start : start + size].double().numpy()[mask]
        mu = a.mean(0)
        for t in range(len(a)):
            error = ((a[t] - b[t]) ** 2).sum()
            values = {
                "explained_variance_legacy": 1 - error / ((a[t] - mu) ** 2).sum(),
                "mse_saebench": error / len(a),
                "mse": error,
                "cossim": a[t] @ b[t] / np.linalg.norm(a[t]) / np.linalg.norm(b[t]),
                "l2_norm_in": np.linalg.norm(a[t]),
                "l2_norm_out": np.linalg.norm(b[t]),
                "l2_ratio": np.linalg.norm(b[t]) / np.linalg.norm(a[t]),
                "l0": (f[t] != 0).sum(),
                "l1": f[t].sum(),
            }
            for name, value in values.items():
                per_token.setdefault(name, []).append(float(value))
        batches.append((a, b))
    means = {name: float(np.mean(values)) for name, values in per_token.items()}
    squares = np.mean([(a**2).sum(1).mean() for a, _ in batches])
    errors = np.mean([((a - b) ** 2).sum(1).mean() for a, b in batches])
    biases = [(b**2).sum(1).mean() / (a * b).sum(1).mean() for a, b in batches]
    a, b = (np.concatenate(part) for part in zip(*batches, strict=True))
    return means | {
        "explained_variance": 1 - ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(),
        "explained_variance_saebench_v06": float(1 - errors / (squares - (squares / D) ** 2)),
        "nmse": ((a - b) ** 2).sum() / (a**2).sum(),
        "relative_reconstruction_bias": float(np.mean(biases)),
    }


@pytest.mark.parametrize("size", [4, 5])  # 5: a last batch of two
def test_figures_agree_with_brute_force(size: int) -> None:
    made = example()
    assert tally_of(size, *made).figures() == pytest.approx(by_hand(size, *made), rel=1e-6)


def test_figures_of_other_batches_differ_only_where_they_must() -> None:
    made = example(counted=1.1)  # everything counts: batches of equal size are equally many tokens
    one, other = (tally_of(size, *made).figures() for size in (12, 3))
    differ = {name for name in one if one[name] != pytest.approx(other[name], rel=1e-9)}
    assert differ == OF_BATCHES
    assert other["mse_saebench"] == pytest.approx(4 * one["mse_saebench"])


def test_a_batch_without_a_counted_token_changes_nothing() -> None:
    x, latents, out, counted = example()
    counted[4:8] = False
    with_it = tally_of(4, x, latents, out, counted)
    kept = torch.cat([torch.arange(4), torch.arange(8, 12)])
    without = tally_of(4, x[kept], latents[kept], out[kept], counted[kept])
    assert with_it.figures() == without.figures()
    assert with_it.batches == 2


def test_the_ratio_of_norms_is_over_one_where_the_input_is_almost_zero() -> None:
    x, out = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    x[0, 1, 0], out[0, 0, 0], out[0, 1, 0] = 2.0, 3.0, 5.0
    tally = tally_of(1, x, torch.ones(1, 2, 1), out, torch.ones(1, 2, dtype=torch.bool))
    assert tally.figures()["l2_ratio"] == pytest.approx((3 + 5 / 2) / 2)


def test_densities_and_tokens_per_context_agree_with_brute_force() -> None:
    x, latents, out, counted = example()
    found = tally_of(4, x, latents, out, counted).by_latent()
    for latent in range(L):
        fires = ((latents[..., latent] > 0) & counted).numpy()
        assert found["feature_density"][latent] == pytest.approx(fires.sum() / counted.sum().item())
        contexts = fires.any(1).sum()
        value = float(found["consistent_activation_heuristic"][latent])
        assert value == pytest.approx(fires.sum() / contexts) if contexts else np.isnan(value)
    assert found["feature_density"][0] == found["feature_density"][1] == 0  # below 0 is not active


def test_shares_count_latents_and_their_activity() -> None:
    density = torch.tensor([0.0, 0.01, 0.011, 0.1, 0.5], dtype=torch.float64)
    cosines = {
        "max_encoder_cosine_sim": torch.full((5,), 0.25),
        "max_decoder_cosine_sim": torch.linspace(0, 1, 5),
    }
    total = 0.621
    assert shares({"feature_density": density, **cosines}) == pytest.approx(
        {
            "frac_alive": 0.8,
            "freq_over_1_percent": 0.6,
            "freq_over_10_percent": 0.2,
            "normalized_freq_over_1_percent": 0.611 / total,
            "normalized_freq_over_10_percent": 0.5 / total,
            "average_max_encoder_cosine_sim": 0.25,
            "average_max_decoder_cosine_sim": 0.5,
        }
    )
    silent = shares({"feature_density": torch.zeros(5), **cosines})
    assert (silent["frac_alive"], silent["normalized_freq_over_1_percent"]) == (0, 0)


def test_largest_cosines_leave_the_latent_itself_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.evaluate.core_sums.COSINE_ROWS", 3)  # several blocks, the last one short
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    rows[7] = -2 * rows[1]  # opposite: signed, so not near
    rows[5] = 3 * rows[2]
    unit = (rows / rows.norm(dim=-1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    expected = [max(cosines[i, j] for j in range(10) if j != i) for i in range(10)]
    found = largest_cosines(rows)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found[5] == pytest.approx(1)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("topk", {}), ("gated", {}), ("relational", {}), ("compositional", {"encoder": "comp_only"})],
)
def test_weights_of_latents_agree_with_brute_force(variant: str, options: dict[str, Any]) -> None:
    sae = make_sae(variant, {"d_sae": 16, **({} if variant == "gated" else {"k": 4}), **options}, D, 0, "test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.scale.fill_(0.5)
        sae.W_enc.copy_(torch.randn(D, 16, generator=generator))
        sae.b_enc.copy_(torch.randn(16, generator=generator))
        if variant == "gated":
            sae.b_mag.copy_(torch.arange(16.0))  # type: ignore[operator]
    found = weights_by_latent(sae)
    encoder, decoder = sae.W_enc.detach().double().numpy(), sae.W_dec.detach().double().numpy()
    bias = (sae.b_mag if variant == "gated" else sae.b_enc).detach().numpy()  # type: ignore[union-attr]
    assert found["encoder_bias"].tolist() == pytest.approx((bias / 0.5).tolist())
    upper = 7 if variant == "compositional" else 0  # its high and mid latents read nothing of the token itself
    for latent in range(16):
        row, column = decoder[latent], encoder[:, latent] * (latent >= upper)
        norm = np.linalg.norm(column)
        assert found["encoder_norm"][latent] == pytest.approx(norm, abs=1e-6)
        cosine = float(found["encoder_decoder_cosine_sim"][latent])
        assert cosine == pytest.approx(row @ column / norm, abs=1e-6) if norm else np.isnan(cosine)
    assert torch.allclose(found["max_decoder_cosine_sim"], largest_cosines(sae.W_dec.detach()).double())
