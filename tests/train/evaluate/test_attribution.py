"""Attribution to latents and the faithfulness of paths on a tiny model: finite differences, splices by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.models import LanguageModel, load_model
from common.sources import find_model
from common.splice import fixed, logits_of
from tests.conftest import HOOK
from train.evaluate.attribution import Text, attribute, copies_at_once, read_text
from train.evaluate.faithfulness import (
    cross_entropy,
    divergence,
    kept_counts,
    log_chances,
    only,
    shares_of,
    steps_to,
    without,
)
from train.evaluate.path_figures import log_probability
from train.evaluate.paths import Paths, find_paths
from train.saes import make_sae
from train.saes.base import SAE

N = 24


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


@pytest.fixture(scope="module")
def sae(model: LanguageModel) -> SAE:
    made = make_sae("topk", {"d_sae": 32, "k": 4}, model.d_model, 0, "test")
    with torch.no_grad():
        made.start(2.0, torch.full((model.d_model,), 0.05))  # a scale and a bias, so that both are seen to count
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def text(model: LanguageModel, sae: SAE) -> Text:
    """One sequence: a position of another kind, a document of 12 tokens, and the beginning of the next."""
    tokens = torch.randint(0, 256, (1, N), generator=torch.Generator().manual_seed(0))
    doc = torch.tensor([[0] * 13 + [1] * 11])
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[0, [0, 20]] = False
    return read_text(sae, model, HOOK, tokens, doc, mask)


def test_text_is_what_the_model_and_the_sae_say(model: LanguageModel, sae: SAE, text: Text) -> None:
    x = model.capture(text.tokens, [HOOK])[HOOK]
    where = text.mask[..., None]
    assert torch.equal(text.x, x)
    assert torch.allclose(text.latents, sae.encode(x) * where)
    assert torch.allclose(text.error, (x - sae(x)) * where, atol=1e-6)
    assert text.predicting[0].nonzero()[:, 0].tolist() == [p for p in range(23) if p not in (0, 12, 20)]


def test_attribution_is_that_of_finite_differences(model: LanguageModel, sae: SAE, text: Text) -> None:
    figure = log_probability(text)
    found = attribute(sae, model, HOOK, text, figure, steps=3)
    start = torch.where(text.mask[..., None], sae.b_dec / sae.scale, text.x)
    active = text.latents[0].nonzero()[::17]
    assert len(active) >= 5
    for place, latent in active.tolist():
        step = torch.zeros_like(text.x)
        step[0, place] = 2e-3 * sae.W_dec[latent]
        slopes = []
        for share in (1 / 6, 3 / 6, 5 / 6):
            point = start + share * (text.x - start)
            ends = [float(figure(logits_of(model, text.tokens, HOOK, fixed(point + sign * step)))) for sign in (1, -1)]
            slopes.append((ends[0] - ends[1]) / 4e-3)
        expected = float(text.latents[0, place, latent]) * np.mean(slopes)
        assert float(found.latents[0, place, latent]) == pytest.approx(expected, rel=0.02, abs=2e-4)
    assert (found.latents[text.latents == 0] == 0).all()


def test_latents_and_error_add_up_to_the_whole_with_enough_steps(model: LanguageModel, sae: SAE, text: Text) -> None:
    figure = log_probability(text)
    few, many = (attribute(sae, model, HOOK, text, figure, steps) for steps in (1, 32))
    start = torch.where(text.mask[..., None], sae.b_dec / sae.scale, text.x)
    ends = [float(figure(logits_of(model, text.tokens, HOOK, fixed(x)))) for x in (start, text.x)]
    assert (many.start, many.start + many.total) == pytest.approx(tuple(ends))
    assert abs(many.missing) < 0.01 * abs(many.total)
    assert abs(few.missing) > abs(many.missing)
    assert abs(many.error) > 0.01 * abs(many.total)  # or the test says nothing of it


def flat_paths(text: Text) -> Paths:
    return find_paths(text.latents[text.mask], [np.arange(32)], [])


def test_losses_with_only_the_bias_or_all_shares_are_those_of_a_splice(
    model: LanguageModel, sae: SAE, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = flat_paths(text)
    shares = [shares_of(text, paths, torch.full((len(paths.token),), kept)) for kept in (False, True)]
    puts = [only(sae, text, part) for part in shares]
    found = list(log_chances(model, HOOK, text, puts))
    where = text.mask[..., None]
    for changed, put in zip(found, (sae.b_dec / sae.scale, sae(text.x)), strict=True):
        logits = logits_of(model, text.tokens, HOOK, fixed(torch.where(where, put, text.x)))
        assert cross_entropy(text, changed) == pytest.approx(-float(log_probability(text)(logits)), rel=1e-6)
        clean = logits_of(model, text.tokens).log_softmax(-1)[0]
        kl = (clean.exp() * (clean - logits.log_softmax(-1)[0])).sum(-1)[:-1][text.predicting[0]]
        here = clean[:-1][text.predicting[0]]
        assert divergence(here, changed) == pytest.approx(float(kl.sum()), rel=1e-4)
    monkeypatch.setattr("train.evaluate.attribution.MOST_LOGITS", 1)  # one after the other
    for changed, alone in zip(found, log_chances(model, HOOK, text, puts), strict=True):
        assert torch.allclose(changed, alone, atol=1e-5)


def test_gradients_of_steps_at_once_are_those_of_one_after_the_other(
    model: LanguageModel, sae: SAE, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = attribute(sae, model, HOOK, text, log_probability(text))
    monkeypatch.setattr("train.evaluate.attribution.MOST_LOGITS", 3 * N * model.vocabulary)
    assert copies_at_once(model, text) == 3
    apart = attribute(sae, model, HOOK, text, log_probability(text))
    assert torch.allclose(together.latents, apart.latents, atol=1e-6)


def test_shares_without_are_what_only_leaves_out(sae: SAE, text: Text) -> None:
    paths = flat_paths(text)
    chosen = paths.ranks(paths.attribution(text.latents[text.mask])) < 2
    largest = torch.topk(text.latents, 2, dim=-1)
    kept = torch.zeros_like(text.latents).scatter(-1, largest.indices, largest.values)
    where = text.mask[..., None]
    shares = shares_of(text, paths, chosen)
    expected = torch.where(where, kept @ sae.W_dec + sae.b_dec / sae.scale, text.x)
    assert torch.allclose(only(sae, text, shares), expected, atol=1e-6)
    left = torch.where(where, text.x - kept @ sae.W_dec, text.x)
    assert torch.allclose(without(sae, text, shares), left, atol=1e-6)


def test_counts_double_up_to_the_most() -> None:
    assert [steps_to(most) for most in (0, 1, 2, 5, 8)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 4, 5], [0, 1, 2, 4, 8]]
    none = Paths(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
    assert kept_counts(none) == [0]
