"""Attribution to latents and the faithfulness of paths on a tiny model: finite differences, splices by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.models import LanguageModel, find_model, load_model
from common.splice import fixed, logits_of
from tests.conftest import HOOK
from train.evaluate.attribution import Text, attribute, read_text
from train.evaluate.faithfulness import kept_counts, measure, steps_to
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


def mean_ce(text: Text, logits: Tensor) -> float:
    return -float(log_probability(text)(logits)) / int(text.predicting.sum())


def test_curve_begins_with_the_bias_and_ends_with_the_sae(model: LanguageModel, sae: SAE, text: Text) -> None:
    paths = flat_paths(text)
    counts = kept_counts(paths)
    assert counts == [0, 1, 2, 4]
    ranks = paths.ranks(torch.rand(len(paths.token), generator=torch.Generator().manual_seed(0)))
    found = list(measure(sae, model, HOOK, text, paths, ranks, counts))
    where = text.mask[..., None]
    for losses, put in ((found[0], sae.b_dec / sae.scale), (found[-1], sae(text.x))):
        logits = logits_of(model, text.tokens, HOOK, fixed(torch.where(where, put, text.x)))
        assert losses.ce / losses.n == pytest.approx(mean_ce(text, logits), abs=1e-6)
        clean = logits_of(model, text.tokens).log_softmax(-1)[0]
        kl = (clean.exp() * (clean - logits.log_softmax(-1)[0])).sum(-1)[:-1][text.predicting[0]]
        assert losses.kl == pytest.approx(float(kl.sum()), rel=1e-4)
    assert [round(losses.latents / losses.n, 6) for losses in found] == [0, 1, 2, 4]


def test_kept_paths_are_those_of_lowest_rank(model: LanguageModel, sae: SAE, text: Text) -> None:
    paths = flat_paths(text)
    sizes = paths.attribution(text.latents[text.mask])
    (losses,) = measure(sae, model, HOOK, text, paths, paths.ranks(sizes), [2])
    largest = torch.topk(text.latents, 2, dim=-1)
    kept = torch.zeros_like(text.latents).scatter(-1, largest.indices, largest.values)
    put = torch.where(text.mask[..., None], kept @ sae.W_dec + sae.b_dec / sae.scale, text.x)
    assert losses.ce / losses.n == pytest.approx(
        mean_ce(text, logits_of(model, text.tokens, HOOK, fixed(put))), abs=1e-6
    )


def test_counts_double_up_to_the_most() -> None:
    assert [steps_to(most) for most in (0, 1, 2, 5, 8)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 4, 5], [0, 1, 2, 4, 8]]
    none = Paths(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
    assert kept_counts(none) == [0]
