"""The contrastive variant against slow references."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import load_sae, make_sae, save_sae
from train.saes.base import SAE
from train.saes.contrast import draw_one, draw_places, earlier_places, info_nce, log_sum_of_negatives
from train.saes.contrastive import Contrastive
from train.saes.parts import generator_of
from train.schedule import Clock

D, N_LATENTS, WINDOW = 8, 40, 6
SMALL = {"d_sae": N_LATENTS, "k": 10, "window": WINDOW, "keys": 20, "anchors": 7, "buffer": 40, "density_limit": 1.0}
CLOCK = Clock(50, 100, 64)


def new(variant: str = "contrastive", **options: object) -> SAE:
    return make_sae(variant, SMALL | options if variant == "contrastive" else options, D, 0, "test")


def contrastive(**options: object) -> Contrastive:
    sae = new(**options)
    assert isinstance(sae, Contrastive)
    return sae


def batch_of(n: int = 8, seed: int = 0) -> Batch:
    """Windows of two documents each, a few places not valid."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WINDOW, D, generator=generator) / D**0.5
    doc = torch.stack([torch.tensor([2 * row] * 2 + [2 * row + 1] * (WINDOW - 2)) for row in range(n)]).int()
    valid = torch.rand(n, WINDOW, generator=generator) > 0.2
    return Batch.of(x, doc=doc, valid=valid)


def learner_of(sae: SAE, n_steps: int, lr: float = 3e-3) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=lr)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32, "plain")  # sums in one order


def test_drawn_places_are_valid_and_used_evenly() -> None:
    batch = batch_of()
    places = draw_places(batch.valid, batch.n_valid, 2 * batch.n_valid, generator_of(0, 0, torch.device("cpu")))
    assert sorted(places.tolist()) == sorted(2 * batch.valid.flatten().nonzero()[:, 0].tolist())
    again = draw_places(batch.valid, batch.n_valid, 20, generator_of(0, 0, torch.device("cpu")))
    assert torch.equal(places[:20], again)
    for seed, step in ((0, 1), (1, 0)):
        other = draw_places(batch.valid, batch.n_valid, 20, generator_of(seed, step, torch.device("cpu")))
        assert not torch.equal(again, other)


@pytest.mark.parametrize("distinct", [False, True])
def test_earlier_places_are_those_of_a_loop(distinct: bool) -> None:
    batch = batch_of()
    token = torch.randint(0, 2, batch.valid.shape, generator=torch.Generator().manual_seed(3)).int()
    context = torch.stack([batch.doc, batch.pos, token], dim=-1)
    batch = Batch(batch.x, batch.valid, batch.n_valid, lambda: context)
    places = batch.valid.flatten().nonzero()[:, 0]
    before, there = earlier_places(batch, places, 3, distinct)
    for number, place in enumerate(places.tolist()):
        row, t = divmod(place, WINDOW)
        expected = {
            row * WINDOW + s
            for s in range(max(t - 3, 0), t)
            if batch.valid[row, s]
            and batch.doc[row, s] == batch.doc[row, t]
            and not (distinct and token[row, s] == token[row, t])
        }
        assert set(before[number][there[number]].tolist()) == expected


def test_one_of_the_allowed_is_drawn_and_each_in_its_turn() -> None:
    allowed = torch.tensor([[True, False, True], [False, True, False]])
    drawn = [draw_one(allowed, generator_of(0, step, torch.device("cpu")))[:, 0].tolist() for step in range(400)]
    assert {second for _, second in drawn} == {1}
    first = [one for one, _ in drawn]
    assert set(first) == {0, 2}
    assert 140 < first.count(0) < 260  # 200 of 400; six standard deviations of 10


def slow_loss(sae: Contrastive, batch: Batch, latents: Tensor, clock: Clock) -> float:
    """The mean over windows of InfoNCE, token by token, from the module's own draws."""
    config, generator = sae.config, generator_of(sae.seed, clock.step, torch.device("cpu"))
    high = latents[..., : sae.n_high].flatten(0, 1)
    z = [row / row.norm() if row.any() else row for row in high]
    doc = batch.doc.flatten().tolist()
    places = draw_places(batch.valid, batch.n_valid, config.keys, generator)
    keys = [(z[p], doc[p], p) for p in places.tolist()]
    keys += [(row, int(d), -1) for row, d in zip(sae.negatives, sae.negative_docs, strict=True)]
    means = []
    for reach in config.contrast_windows:
        before, there = earlier_places(batch, places[: config.anchors], reach)
        if config.positives == "shuffled":
            there = batch.doc.flatten()[places] != batch.doc.flatten()[places[: config.anchors], None]
            before = places.expand(config.anchors, -1)
        one = draw_one(there, generator)
        losses = []
        for a, place in enumerate(places[: config.anchors].tolist()):
            s = int(before[a, one[a]])
            if not there[a, one[a]] or not z[place].any() or not z[s].any():
                continue
            others = [
                key
                for key, d, p in keys
                if key.any() and p not in (place, s) and (d != doc[place] or not config.same_document)
            ]
            views = []
            for seen in (place, s) if config.symmetric else (place,):
                negatives = sum(math.exp(float(z[seen] @ key) / config.tau) for key in others)
                positive = math.exp(float(z[place] @ z[s]) / config.tau)
                views.append(-math.log(positive / (positive + negatives)) / math.log(1 + len(others)))
            losses.append(views)
        assert losses
        means += [sum(view) / len(view) for view in zip(*losses, strict=True)]
    return sum(means) / len(means)


@pytest.mark.parametrize(
    "options", [{}, {"same_document": False}, {"positives": "shuffled"}, {"same_document": False, "symmetric": True}]
)
def test_loss_is_that_of_a_loop(options: dict[str, object]) -> None:
    sae = contrastive(contrast_windows=(1, 3), tau=0.5, **options)
    for step in range(3):
        batch = batch_of(seed=step)
        clock = Clock(50 + step, 100, 64)
        output = sae.training_pass(batch, clock)
        expected = slow_loss(sae, batch, output.latents.detach(), clock)
        sae.after_step(clock)
        # float32 against float64 sums of some sixty terms
        assert output.parts["contrastive"].item() == pytest.approx(0.1 * expected, rel=1e-4)
    assert (sae.negatives != 0).any(1).sum() > 30  # the buffer took part in the last of them


def test_equal_embeddings_cost_one_and_perfect_ones_nothing() -> None:
    allowed, chosen = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    count = torch.tensor([[5], [5]])
    same = log_sum_of_negatives(torch.full((2, 5), 10.0), allowed)[:, None]
    assert info_nce(torch.full((2, 1), 10.0), chosen, same, count, True).item() == pytest.approx(1.0)
    assert info_nce(torch.full((2, 1), 10.0), chosen, same, count, False).item() == pytest.approx(math.log(6))
    apart = log_sum_of_negatives(torch.full((2, 5), -30.0), allowed)[:, None]
    assert info_nce(torch.full((2, 1), 10.0), chosen, apart, count, True).item() == pytest.approx(0.0, abs=1e-6)


def test_anchors_without_negatives_or_positives_do_not_count() -> None:
    similarity = torch.zeros(3, 2, requires_grad=True)
    allowed = torch.tensor([[True, True], [False, False], [True, True]])
    chosen = torch.tensor([[True], [True], [False]])
    negatives = log_sum_of_negatives(similarity, allowed)[:, None]
    loss = info_nce(torch.zeros(3, 1), chosen, negatives, allowed.sum(1, keepdim=True), False)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))  # of the first alone: 1 / (1 + 2)
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()
    assert similarity.grad[1:].eq(0).all()


@pytest.mark.parametrize("head", ["none", "random"])
def test_similarities_are_float32_under_autocast(head: str) -> None:
    sae = contrastive(head=head)
    high, places = torch.rand(8, 2, sae.n_high, generator=torch.Generator().manual_seed(0)), torch.arange(16)
    z = sae.embed(high, places)
    exact = sae.similarity(z, z)
    with torch.autocast("cpu", torch.bfloat16):
        again = sae.embed(high, places)
        assert torch.equal(again, z)
        assert torch.equal(sae.similarity(again, again), exact)


def test_the_buffer_holds_the_latest_embeddings_with_their_documents() -> None:
    sae = contrastive()
    pushed = []
    for step in range(5):
        batch = batch_of(seed=step)
        output = sae.training_pass(batch, Clock(step, 100, 64))
        sae.after_step(Clock(step, 100, 64))
        places = draw_places(batch.valid, batch.n_valid, 20, generator_of(0, step, torch.device("cpu")))
        high = output.latents.detach()[..., : sae.n_high].flatten(0, 1)[places]
        pushed.append((torch.nn.functional.normalize(high, dim=-1), batch.doc.flatten()[places]))
    # steps 0 1 2 3 4 went to the slots 0 1 0 1 0 of 20 each
    assert torch.allclose(sae.negatives, torch.cat([pushed[4][0], pushed[3][0]]))
    assert torch.equal(sae.negative_docs, torch.cat([pushed[4][1], pushed[3][1]]))


def test_weight_rises_once_the_buffer_is_full() -> None:
    sae = contrastive(ramp=0.1)  # full after two steps of 20, then ten steps of a hundred
    weights = [sae.weight(Clock(step, 100, 64)) for step in (0, 1, 2, 6, 11, 60)]
    assert weights == pytest.approx([0, 0, 0.01, 0.05, 0.1, 0.1])


def test_dense_features_are_left_out_of_the_embeddings() -> None:
    sae = contrastive(density_limit=0.5)
    high = torch.zeros(2, 2, sae.n_high)
    high[..., 0], high[0, 0, 1] = 3.0, 2.0
    sae.follow_density_(high, 4, Clock(0, 100, 4))
    assert sae.density[:3].tolist() == [1.0, 0.25, 0.0]
    z = sae.embed(high, torch.tensor([0, 1]))
    assert z[0, :2].tolist() == [0.0, 1.0]
    assert z[1].eq(0).all()
    sae.follow_density_(torch.zeros_like(high), 4, Clock(1, 100, 4))
    assert sae.density[0].item() == pytest.approx(0.95)


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
    assert torch.equal(learners[0].last_loss, learners[1].last_loss)
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
        # the published form
        {"sparsity": "joint", "positives": "adjacent", "similarity": "dot", "symmetric": True, "tau": 1.0,
         "buffer": 0, "same_document": False, "density_limit": 1.0, "scale_free": False},
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


def test_shuffled_positives_are_of_other_documents() -> None:
    sae = contrastive(positives="shuffled")
    batch = batch_of()
    generator = generator_of(0, 0, torch.device("cpu"))
    places = draw_places(batch.valid, batch.n_valid, 20, generator)
    doc = batch.doc.flatten()
    chosen, counts = sae.positives(batch, places[:7], places, doc[places], 8, generator)
    assert counts.all()
    assert (doc[chosen[:, 0]] != doc[places[:7]]).all()


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


def test_a_trained_sae_keeps_no_negatives(tmp_path: Path) -> None:
    sae = contrastive()
    learner_of(sae, 20).train_step(batch_of(), 48)
    assert sae.negatives.any()
    sae.fold()
    save_sae(sae, tmp_path, {})
    loaded = load_sae(tmp_path)
    assert loaded.state_dict()["negatives"].shape == (0, sae.n_high)
    assert torch.equal(loaded.encode(torch.ones(3, D)), sae.encode(torch.ones(3, D)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"anchors": 30}, "anchors = 30 are drawn from keys = 20"),
        ({"buffer": 10}, "buffer = 10 is less than keys = 20"),
        ({"k_high": 10}, "k_high = 10 leaves nothing of k = 10"),
        ({"high_share": 0.01}, r"high_share = 0\.01 of d_sae = 40 leaves an empty group"),
        ({"contrast_windows": (0,)}, r"contrast_windows = \(0,\): each must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        contrastive(**options)
