"""Paths kept, taken out, and taken out one by one, against splices by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.models import LanguageModel, load_model
from common.sources import find_model
from common.splice import fixed, logits_of
from tests.conftest import HOOK
from train.evaluate import path_curves
from train.evaluate.attribution import attribute, read_text
from train.evaluate.path_curves import (
    REMOVED,
    Spliced,
    Traced,
    correlation,
    kept_curve,
    removal_curve,
    single_effects,
)
from train.evaluate.path_figures import log_probability
from train.evaluate.paths import find_paths
from train.saes import make_sae

L, K = 32, 6


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


@pytest.fixture(scope="module")
def spliced(model: LanguageModel) -> Spliced:
    sae = make_sae("topk", {"d_sae": L, "k": K}, model.d_model, 0, "test")
    with torch.no_grad():
        sae.start(2.0, torch.full((model.d_model,), 0.05))
    return Spliced(sae.requires_grad_(False), model, HOOK, lambda: None)


@pytest.fixture(scope="module")
def traced(spliced: Spliced) -> list[Traced]:
    """Two sequences of one length, every active latent a path."""
    found = []
    for seed, n in ((0, 14), (1, 9)):
        tokens = torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(1, n, dtype=torch.bool)
        mask[0, 0] = False
        text = read_text(spliced.sae, spliced.model, HOOK, tokens, torch.zeros(1, n, dtype=torch.int64), mask)
        paths = find_paths(text.latents[text.mask], [np.arange(L)], [])
        whole = attribute(spliced.sae, spliced.model, HOOK, text, log_probability(text))
        found.append(Traced(text, paths, whole))
    return found


def log_p(spliced: Spliced, one: Traced, x: Tensor) -> float:
    return float(log_probability(one.text)(logits_of(spliced.model, one.text.tokens, HOOK, fixed(x))))


def strongest(one: Traced, count: int) -> Tensor:
    """Codes with nothing but the latents of largest |attribution| of each token."""
    order = one.found.latents.abs().topk(count, dim=-1).indices
    return torch.zeros_like(one.text.latents).scatter(-1, order, one.text.latents.gather(-1, order))


def test_kept_paths_are_the_strongest_of_each_token(spliced: Spliced, traced: list[Traced]) -> None:
    curve, n = kept_curve(spliced, traced, 0), sum(one.n for one in traced)
    assert [point["kept"] for point in curve] == [0, 1, 2, 4, 6]
    assert [point["latents"] for point in curve] == pytest.approx([0, 1, 2, 4, 6])
    bias = spliced.sae.b_dec / spliced.sae.scale
    for point in curve:
        sums = 0.0
        for one in traced:
            put = strongest(one, int(point["kept"])) @ spliced.sae.W_dec + bias
            sums -= log_p(spliced, one, torch.where(one.text.mask[..., None], put, one.text.x))
        assert point["ce"] == pytest.approx(sums / n, rel=1e-6)
    for name in ("ce", "kl"):
        for end in (0, -1):  # nothing and everything are the same in any order
            assert curve[end][f"random_{name}"] == pytest.approx(curve[end][name], rel=1e-6)
        assert curve[2][f"random_{name}"] != curve[2][name]


def test_removed_paths_are_the_strongest_and_the_error_stays(spliced: Spliced, traced: list[Traced]) -> None:
    curve, n = removal_curve(spliced, traced, 0), sum(one.n for one in traced)
    assert [point["removed"] for point in curve] == list(REMOVED)
    for point in curve:
        rise = 0.0
        for one in traced:
            gone = strongest(one, min(int(point["removed"]), K)) @ spliced.sae.W_dec
            rise += log_p(spliced, one, one.text.x) - log_p(spliced, one, one.text.x - gone)
        assert point["ce_rise"] == pytest.approx(rise / n, rel=1e-4, abs=1e-6)
    assert curve[-1]["random_ce_rise"] == pytest.approx(curve[-1]["ce_rise"], abs=1e-6)  # all six are gone
    assert curve[0]["random_ce_rise"] != curve[0]["ce_rise"]


def test_effects_are_those_of_one_path_after_the_other(
    spliced: Spliced, traced: list[Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_curves, "ABLATED", 5)
    pairs = single_effects(spliced, traced, 3)
    assert pairs.shape == (10, 2)
    generator, expected = torch.Generator().manual_seed(3), []
    for one in traced:
        positions = one.text.mask[0].nonzero()[:, 0]
        for path in torch.randperm(len(one.paths.token), generator=generator)[:5].tolist():
            place, latent = int(positions[one.paths.token[path]]), int(one.paths.latents[path, 0])
            put = one.text.x.clone()
            put[0, place] -= one.text.latents[0, place, latent] * spliced.sae.W_dec[latent]
            fall = log_p(spliced, one, one.text.x) - log_p(spliced, one, put)
            expected.append([float(one.found.latents[0, place, latent]), fall])
    assert torch.allclose(pairs, torch.tensor(expected, dtype=torch.float64), atol=2e-5)
    assert bool(pairs[:, 1].abs().gt(1e-4).any())  # or rounding would be compared


def test_correlation_by_hand() -> None:
    pairs = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]).double()
    assert correlation(pairs) == pytest.approx(0.5)
    assert np.isnan(correlation(pairs[:1]))
    assert np.isnan(correlation(torch.zeros(4, 2)))
