"""Which tokens are compared, and the losses on them, by hand and by loops."""

from __future__ import annotations

import math

import pytest
import torch

from tests.train.saes.contrasted import WINDOW, batch_of
from train.data.batch import Batch
from train.saes.contrast import (
    Drawn,
    Positives,
    density_excess,
    difference,
    draw,
    draw_one,
    draw_places,
    earlier_places,
    info_nce,
    log_sum_of_negatives,
)
from train.saes.parts import generator_of


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


def drawn(batch: Batch, kind: Positives) -> Drawn:
    return draw(batch, 20, 7, kind, (2, 4), False, generator_of(0, 0, torch.device("cpu")))


def test_shuffled_positives_are_of_other_documents() -> None:
    batch = batch_of()
    found = drawn(batch, "shuffled")
    for places, counts in found.positives:
        assert counts.all()
        assert (batch.doc.flatten()[places[:, 0]] != found.doc[:7]).all()


def test_positives_of_every_kind_are_earlier_tokens_of_the_document() -> None:
    batch = batch_of()
    reaches: dict[Positives, tuple[int, ...]] = {
        "window": (2, 4), "multi": (2, 4), "adjacent": (1,), "earlier": (WINDOW - 1,) * 2
    }  # fmt: skip
    for kind, reach in reaches.items():
        found = drawn(batch, kind)
        assert found.anchors.tolist() == found.places[:7].tolist()
        assert [places.shape[1] for places, _ in found.positives] == (
            list(reach) if kind == "multi" else [1] * len(reach)
        )
        for (places, counts), most in zip(found.positives, reach, strict=True):
            assert counts.any()
            back = (found.anchors[:, None] - places)[counts]
            assert ((back >= 1) & (back <= most)).all()
            assert (batch.doc.flatten()[places] == found.doc[:7, None])[counts].all()
            assert batch.valid.flatten()[places][counts].all()


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


def test_difference_is_weighted_by_the_inputs_cosine_and_skips_what_does_not_count() -> None:
    first = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]], [[5.0, 5.0]]])
    second = torch.tensor([[[0.0, 3.0], [1.0, 0.5]], [[2.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    alike = torch.tensor([[0.5, 1.0], [0.8, 9.0], [1.0, 1.0]])
    chosen = torch.tensor([[True, True], [True, False], [False, False]])
    # (.5 · 4 + 1 · .5) / 2 and .8 · 1; the third anchor has none
    assert difference(first, second, alike, chosen).item() == pytest.approx((1.25 + 0.8) / 2)
    alike[0, 0] = -0.5  # counts, and weighs nothing
    assert difference(first, second, alike, chosen).item() == pytest.approx((0.25 + 0.8) / 2)
    assert difference(first, second, alike, torch.zeros_like(chosen)).item() == 0.0


def test_density_excess_is_the_square_above_the_cap_and_lowers_dense_codes_alone() -> None:
    high = torch.tensor([[[2.0, 1.0, 0.0], [4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [9.0, 9.0, 0.0]]], requires_grad=True)
    valid = torch.tensor([[True, True], [True, False]])
    codes = high * valid[..., None]  # the last token is not valid
    loss = density_excess(codes, 3, cap=0.4)
    loss.backward()
    assert loss.item() == pytest.approx((2 / 3 - 0.4) ** 2)  # the others are active on a third, and on none
    assert high.grad is not None
    # 2 · (2/3 − .4) over a typical code of 3 and over three tokens, at every code that the feature has or might have
    assert high.grad[..., 0][valid].tolist() == pytest.approx([2 * (2 / 3 - 0.4) / 9] * 3)
    assert high.grad[..., 1:].eq(0).all()
    assert high.grad[1, 1].eq(0).all()


def test_density_excess_of_a_silent_batch_is_zero() -> None:
    high = torch.zeros(2, 3, 4, requires_grad=True)
    loss = density_excess(high, 6, cap=0.1)
    loss.backward()
    assert loss.item() == 0
    assert high.grad is not None
    assert high.grad.eq(0).all()
