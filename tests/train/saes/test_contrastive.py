"""The contrastive variant."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from tests.train.saes.contrasted import CLOCK, N_LATENTS, SMALL, WINDOW, D, batch_of, contrastive, learner_of, new
from tests.warm import ROOT
from train.data.batch import Batch
from train.saes import load_sae, make_sae, save_sae
from train.saes.contrastive import Contrastive, ContrastiveConfig
from train.settings import fit_config


def test_groups_have_budgets_of_their_own() -> None:
    sae = contrastive(lambda_c=0.0, d_sae=80)
    batch = batch_of(40)
    latents = sae.training_pass(batch, CLOCK).latents
    # max(4, 10 / 5) = 4 of the 10 in the first fifth of the latents
    assert (latents[..., :16] > 0).sum().item() == 4 * batch.n_valid
    assert (latents[..., 16:] > 0).sum().item() == 6 * batch.n_valid


def test_with_its_extras_off_it_is_flat_batchtopk() -> None:
    ours = new(**Contrastive.plain)
    flat = new("batchtopk", d_sae=N_LATENTS, k=10, window=WINDOW)
    learners = [learner_of(sae, 20) for sae in (ours, flat)]
    for step in range(20):
        for learner in learners:
            learner.train_step(batch_of(seed=step), 48)
    assert torch.equal(learners[0].tally.last_loss, learners[1].tally.last_loss)
    for name, value in flat.named_parameters():
        assert torch.equal(value, ours.get_parameter(name)), name


@pytest.mark.parametrize(
    "options",
    [
        {"positives": "adjacent"},
        {"positives": "multi"},
        {"positives": "earlier"},
        {"positives": "shuffled"},
        {"contrast_windows": (2,)},
        {"buffer": 0},
        {"same_document": False},
        {"head": "random"},
        {"head": "learned"},
        {"distinct_tokens": True},
        {"density_limit": 0.05},
        {"sparsity": "joint"},
        {"sparsity": "l1"},
        {"key_momentum": 0.99},
        {"centred": True},
        {"density_limit": 1.0, "density_penalty": 1.0, "density_cap": 0.05},
        {"freeze_b_dec": 0.2},
        {"loss": "difference"},
        # the published form
        {"sparsity": "joint", "positives": "adjacent", "similarity": "dot", "symmetric": True, "tau": 1.0,
         "buffer": 0, "same_document": False, "density_limit": 1.0, "scale_free": False},
        {"sparsity": "joint", "positives": "adjacent", "loss": "difference", "density_limit": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_ablation_trains(options: dict[str, object]) -> None:
    learner = learner_of(contrastive(**options), 30)
    for step in range(12):
        learner.train_step(batch_of(seed=step), 48)
    metrics = learner.read_metrics()
    assert math.isfinite(metrics["grad_norm_max"])
    assert metrics["loss_contrastive"] >= 0
    assert 0 <= metrics["dropped_anchors"] <= 1


def test_the_example_has_every_ablation() -> None:
    wanted: dict[str, set[object]] = {
        "lambda_c": {0.0, 0.01, 0.03, 0.1, 0.3, 1.0}, "contrast_windows": {(8,), (16,), (32,), (8, 16, 32)},
        "buffer": {0, 1024, 4096, 16_384, 65_536}, "tau": {0.05, 0.1, 0.3, 1.0}, "same_document": {True, False},
        "positives": {"window", "adjacent", "multi", "earlier", "shuffled"}, "distinct_tokens": {False, True},
        "head": {"none", "random", "learned"}, "centred": {False, True}, "key_momentum": {0.0, 0.99},
        "density_limit": {0.1, 1.0}, "density_penalty": {0.0, 1.0}, "freeze_b_dec": {1.0, 0.2},
        "loss": {"info_nce", "difference"}, "similarity": {"cosine", "dot"},
    }  # fmt: skip
    config = fit_config(ROOT / "docs" / "examples" / "contrastive-pythia-70m.toml", {}, (), {}, ())
    options = [one.options for one in config.learner if one.variant == "contrastive"]
    forms = [ContrastiveConfig(**one) for one in options]
    for name, values in wanted.items():
        assert {getattr(form, name) for form in forms} == values, name


def test_b_dec_stays_from_its_step_on() -> None:
    learner = learner_of(contrastive(freeze_b_dec=0.5, density_limit=1.0), 20)
    seen = []
    for step in range(20):
        learner.train_step(batch_of(seed=step), 48)
        seen.append((learner.sae.b_dec.clone(), learner.sae.W_enc.clone()))
    assert not torch.equal(seen[8][0], seen[9][0])
    assert torch.equal(seen[9][0], seen[19][0])
    assert not torch.equal(seen[18][1], seen[19][1])


def test_offset_of_b_dec_is_its_distance_from_the_mean_of_valid_tokens() -> None:
    sae, batch = contrastive(), batch_of()
    with torch.no_grad():
        sae.b_dec += 0.3
    expected = (sae.b_dec - batch.x[batch.valid].mean(0)).norm()
    assert sae.training_pass(batch, CLOCK).extra["b_dec_offset"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_density_penalty_makes_dense_features_rarer() -> None:
    densest = []
    options: dict[str, object]
    for options in ({}, {"density_penalty": 10.0, "density_cap": 0.3}):
        sae = contrastive(density_limit=1.0, **options)
        learner = learner_of(sae, 40, lr=1e-2)
        for step in range(40):
            learner.train_step(batch_of(seed=step), 48)
        densest.append(float(sae.contrast.density.max()))
    assert densest[1] < densest[0] - 0.1, densest


def test_a_run_goes_on_with_all_that_the_loss_keeps() -> None:
    options: dict[str, object] = {"key_momentum": 0.9, "centred": True, "density_penalty": 1.0, "freeze_b_dec": 0.5}
    whole = learner_of(contrastive(**options), 20)
    for step in range(8):
        whole.train_step(batch_of(seed=step), 48)
    kept = {kind: {name: value.clone() for name, value in each.items()} for kind, each in whole.tensors().items()}
    again = learner_of(contrastive(**options), 20)
    again.restore(kept, whole.facts())
    for step in range(8, 16):
        for learner in (whole, again):
            learner.train_step(batch_of(seed=step), 48)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[name]), name


@pytest.mark.parametrize("head", ["none", "random", "learned"])
def test_files_of_before_the_loss_was_apart_still_load(head: str) -> None:
    sae = contrastive(head=head)
    learner_of(sae, 20).train_step(batch_of(), 48)
    old = {name.replace("contrast.", ""): value for name, value in sae.state_dict().items()}
    assert set(old) >= {"density", "negatives", "negative_docs"}
    loaded = contrastive(head=head)
    loaded.load_state_dict(old)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())


def topic_batch(step: int, topics: Tensor, words: Tensor) -> Batch:
    """32 windows of six tokens: the topic of the window, and three words of each token."""
    draws = torch.Generator().manual_seed(step)
    topic = torch.randint(0, len(topics), (32,), generator=draws)
    word = torch.randint(0, len(words), (32, WINDOW, 3), generator=draws)
    x = (1.5 * topics[topic][:, None] + words[word].sum(2)) / 2.3
    return Batch.of(x, doc=topic[:, None].expand(32, WINDOW).int())


def test_the_loss_draws_the_codes_of_a_document_together() -> None:
    generator = torch.Generator().manual_seed(0)
    topics, words = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (12, 40))
    apart = []
    for lambda_c in (0.0, 0.3):
        options = {"d_sae": 60, "k": 6, "keys": 64, "anchors": 64, "buffer": 64, "lambda_c": lambda_c, "ramp": 0.0}
        sae = make_sae("contrastive", SMALL | options, 16, 0, "test")
        learner = learner_of(sae, 150, lr=1e-2)
        for step in range(150):
            learner.train_step(topic_batch(step, topics, words), 32 * WINDOW)
        batch = topic_batch(999, topics, words)
        z = torch.nn.functional.normalize(sae.codes(batch)[..., : sae.config.n_high], dim=-1).flatten(0, 1).detach()
        same = batch.doc.flatten() == batch.doc.flatten()[:, None]
        cosine = z @ z.T
        apart.append(float(cosine[same].mean() - cosine[~same].mean()))
    # mean cosine inside documents less that between them: .55 without the loss, .77 with it
    assert apart[1] > apart[0] + 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_trained_sae_keeps_no_negatives_and_no_second_encoder(tmp_path: Path, momentum: float) -> None:
    sae = contrastive(key_momentum=momentum)
    learner_of(sae, 20).train_step(batch_of(), 48)
    assert sae.contrast.negatives.any()
    sae.fold()
    save_sae(sae, tmp_path, {})
    loaded = load_sae(tmp_path)
    state = loaded.state_dict()
    assert state["contrast.negatives"].shape == (0, sae.n_high)
    assert all(not value.numel() for name, value in state.items() if "slow" in name)
    assert any("slow" in name for name in state) == (momentum > 0)
    assert torch.equal(loaded.encode(torch.ones(3, D)), sae.encode(torch.ones(3, D)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"anchors": 30}, "anchors = 30 are drawn from keys = 20"),
        ({"buffer": 10}, "buffer = 10 is less than keys = 20"),
        ({"k_high": 10}, "k_high = 10 leaves nothing of k = 10"),
        ({"high_share": 0.01}, r"high_share = 0\.01 of d_sae = 40 leaves an empty group"),
        ({"loss": "difference", "key_momentum": 0.9}, "key_momentum is of embeddings, and loss = difference compares"),
        ({"loss": "difference", "head": "random"}, "head is of embeddings"),
        ({"contrast_windows": (0,)}, r"contrast_windows = \(0,\): each must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        contrastive(**options)
