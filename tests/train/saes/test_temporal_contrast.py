"""The contrastive loss against slow references, and what it keeps from step to step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.train.saes.contrasted import CLOCK, WINDOW, batch_of, contrastive
from train.data.batch import Batch
from train.saes.contrast import draw_one, draw_places, earlier_places
from train.saes.contrastive import Contrastive
from train.saes.kept import Kept
from train.saes.parts import generator_of
from train.schedule import Clock


def slow_embeddings(sae: Contrastive, batch: Batch) -> list[Tensor]:
    """z of every token by the keys' own encoder, token by token."""
    slow = sae.contrast.slow
    assert slow is not None
    result = []
    for x in batch.x.flatten(0, 1):
        u = torch.relu((x - slow.b_dec) @ slow.W_enc + slow.b_enc)
        codes = torch.where(u > sae.sparsity.threshold[0], u, 0.0)
        result.append(codes / codes.norm() if codes.any() else codes)
    return result


def slow_loss(sae: Contrastive, batch: Batch, latents: Tensor, clock: Clock) -> float:
    """The mean over windows of InfoNCE, token by token, from the module's own draws."""
    config, generator = sae.config, generator_of(sae.contrast.seed, clock.step, torch.device("cpu"))
    high = latents[..., : sae.n_high].flatten(0, 1)
    z = [row / row.norm() if row.any() else row for row in high]
    doc = batch.doc.flatten().tolist()
    places = draw_places(batch.valid, batch.n_valid, config.keys, generator)
    seen_by = slow_embeddings(sae, batch) if sae.contrast.slow is not None else z
    keys = [(seen_by[p], doc[p], p) for p in places.tolist()]
    keys += [(row, int(d), -1) for row, d in zip(sae.contrast.negatives, sae.contrast.negative_docs, strict=True)]
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
    "options",
    [
        {},
        {"same_document": False},
        {"positives": "shuffled"},
        {"same_document": False, "symmetric": True},
        {"key_momentum": 0.8},
        {"key_momentum": 0.8, "same_document": False, "symmetric": True},
    ],
)
def test_loss_is_that_of_a_loop(options: dict[str, object]) -> None:
    sae = contrastive(contrast_windows=(1, 3), tau=0.5, **options)
    for step in range(3):
        batch = batch_of(seed=step)
        clock = Clock(50 + step, 100, 64)
        output = sae.training_pass(batch, clock)
        expected = slow_loss(sae, batch, output.latents.detach(), clock)
        with torch.no_grad():  # what an optimizer would do, so that an encoder that follows stays behind
            sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator_of(1, step, torch.device("cpu"))))
        sae.after_step(clock)
        # float32 against float64 sums of some sixty terms
        assert output.parts["contrastive"].item() == pytest.approx(0.1 * expected, rel=1e-4)
    assert (sae.contrast.negatives != 0).any(1).sum() > 30  # the buffer took part in the last of them


@pytest.mark.parametrize("head", ["none", "random"])
def test_similarities_are_float32_under_autocast(head: str) -> None:
    sae = contrastive(head=head)
    high = torch.rand(8, 2, sae.n_high, generator=torch.Generator().manual_seed(0))
    z = sae.contrast.embed(high.flatten(0, 1))
    held = sae.contrast.held(sparse=False)
    exact = sae.contrast.similarity(z, z, held)
    with torch.autocast("cpu", torch.bfloat16):
        again = sae.contrast.embed(high.flatten(0, 1))
        assert torch.equal(again, z)
        assert torch.equal(sae.contrast.similarity(again, again, held), exact)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_sparse_buffer_gives_the_similarities_of_the_whole_one(shape: tuple[int, ...]) -> None:
    sae = contrastive(d_sae=400)
    generator = torch.Generator().manual_seed(0)
    few = torch.rand(sae.contrast.negatives.shape, generator=generator) < 0.05
    few[7] = False  # a token without any
    sae.contrast.negatives.copy_(torch.randn(few.shape, generator=generator) * few)
    keys, back = torch.randn(6, sae.n_high, generator=generator), torch.randn(*shape, 46, generator=generator)
    found = []
    for sparse in (False, True):
        held = sae.contrast.held(sparse)
        assert isinstance(held, Kept) == sparse
        z = torch.randn(*shape, sae.n_high, generator=torch.Generator().manual_seed(1)).requires_grad_()
        scores = sae.contrast.similarity(z, keys, held)
        found += [scores.detach(), torch.autograd.grad((scores * back).sum(), z)[0]]
    assert torch.allclose(found[2], found[0], atol=1e-5)
    assert torch.allclose(found[3], found[1], atol=1e-4)  # sums of 46 numbers of size 10


def test_a_buffer_of_which_much_is_not_0_is_taken_whole() -> None:
    sae = contrastive()
    sae.contrast.negatives.fill_(1.0)
    assert isinstance(sae.contrast.held(sparse=True), torch.Tensor)
    assert isinstance(contrastive(centred=True).contrast.held(sparse=True), torch.Tensor)  # z less its mean is not 0


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
    assert torch.allclose(sae.contrast.negatives, torch.cat([pushed[4][0], pushed[3][0]]))
    assert torch.equal(sae.contrast.negative_docs, torch.cat([pushed[4][1], pushed[3][1]]))


def test_weight_rises_once_the_buffer_is_full() -> None:
    sae = contrastive(ramp=0.1)  # full after two steps of 20, then ten steps of a hundred
    weights = [sae.contrast.weight(Clock(step, 100, 64)) for step in (0, 1, 2, 6, 11, 60)]
    assert weights == pytest.approx([0, 0, 0.01, 0.05, 0.1, 0.1])


def test_dense_features_are_left_out_of_the_embeddings() -> None:
    sae = contrastive(density_limit=0.5)
    high = torch.zeros(2, 2, sae.n_high)
    high[..., 0], high[0, 0, 1] = 3.0, 2.0
    sae.contrast.follow_density_(high, 4, Clock(0, 100, 4))
    assert sae.contrast.density[:3].tolist() == [1.0, 0.25, 0.0]
    z = sae.contrast.embed(high.flatten(0, 1)[:2])
    assert z[0, :2].tolist() == [0.0, 1.0]
    assert z[1].eq(0).all()
    sae.contrast.follow_density_(torch.zeros_like(high), 4, Clock(1, 100, 4))
    assert sae.contrast.density[0].item() == pytest.approx(0.95)


def test_the_keys_encoder_follows_the_trained_one() -> None:
    sae = contrastive(key_momentum=0.75)
    sae.start(1.0, torch.full((8,), 0.5))
    slow = sae.contrast.slow
    assert slow is not None
    before = {name: value.clone() for name, value in sae.high_encoder().items()}
    assert all(torch.equal(slow.get_buffer(name), value) for name, value in before.items())
    sae.training_pass(batch_of(), Clock(0, 100, 64))
    with torch.no_grad():
        sae.W_enc += 1.0
        sae.b_enc -= 2.0
        sae.b_dec += 4.0
    sae.after_step(Clock(0, 100, 64))
    for name, moved in (("W_enc", 1.0), ("b_enc", -2.0), ("b_dec", 4.0)):
        assert torch.allclose(slow.get_buffer(name), before[name] + 0.25 * moved)


def test_keys_of_their_own_encoder_pass_no_gradient() -> None:
    sae = contrastive(key_momentum=0.9, positives="multi")
    batch = batch_of()
    high = torch.rand(8, WINDOW, sae.n_high, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, _ = sae.contrast(high, batch, CLOCK, sae.sparsity.threshold[0])
    loss.backward()
    places = draw_places(batch.valid, batch.n_valid, 20, generator_of(0, CLOCK.step, torch.device("cpu")))
    looked_at = set(places[:7].tolist())
    for reach in sae.config.contrast_windows:
        before, there = earlier_places(batch, places[:7], reach)
        looked_at |= set(before[there].tolist())
    assert high.grad is not None
    reached = set(high.grad.flatten(0, 1).any(1).nonzero()[:, 0].tolist())
    assert reached
    assert reached <= looked_at  # anchors and positives; the other keys were fixed
    assert set(places.tolist()) - looked_at


def test_difference_form_is_that_of_a_loop() -> None:
    sae = contrastive(loss="difference", contrast_windows=(1, 3), density_limit=0.4)
    sae.contrast.density[0] = 0.5  # left out
    batch = batch_of()
    output = sae.training_pass(batch, CLOCK)
    codes = output.latents.detach()[..., : sae.n_high].flatten(0, 1).clone()
    codes[:, 0] = 0
    x, generator = batch.x.flatten(0, 1), generator_of(0, CLOCK.step, torch.device("cpu"))
    places, means = draw_places(batch.valid, batch.n_valid, 20, generator), []
    for reach in (1, 3):
        before, there = earlier_places(batch, places[:7], reach)
        one, losses = draw_one(there, generator), []
        for a, place in enumerate(places[:7].tolist()):
            if there[a, one[a]]:
                s = int(before[a, one[a]])
                alike = float(x[place] @ x[s] / (x[place].norm() * x[s].norm()))
                losses.append(max(alike, 0.0) * float((codes[place] - codes[s]).abs().sum()))
        means.append(sum(losses) / len(losses))
    assert output.parts["contrastive"].item() == pytest.approx(0.1 * sum(means) / 2, rel=1e-5)  # float32 sums
    assert sae.contrast.negatives.shape == (0, sae.n_high)
    assert sae.contrast.weight(Clock(0, 100, 64)) == pytest.approx(0.1 / 20)  # no buffer to wait for


def test_centred_embeddings_are_less_the_running_mean() -> None:
    sae = contrastive(centred=True)
    assert sae.contrast.mean is not None
    assert not sae.contrast.mean.any()
    batch = batch_of()
    codes = sae.training_pass(batch, CLOCK).latents.detach()[..., : sae.n_high]
    assert torch.allclose(sae.contrast.mean, 0.05 * codes.sum((0, 1)) / batch.n_valid)
    rows = torch.zeros(2, sae.n_high)
    rows[0, 0] = 2.0
    z = sae.contrast.embed(rows)
    assert torch.allclose(z[0], torch.nn.functional.normalize(rows[0] - sae.contrast.mean, dim=0))
    assert z[1].eq(0).all()  # a token without an active feature has no embedding, mean or not
