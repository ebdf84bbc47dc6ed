"""Positions: buckets, gates on position rows, and their pruning after training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train.saes.related import LATENTS, B, D, K, T, learner_of, new, packed, randn
from train.data.batch import Batch
from train.saes import make_sae
from train.saes.positions import explained, hard_concrete, largest_within, position_bucket
from train.saes.relational import Relational
from train.schedule import Clock


def test_position_buckets_are_single_then_half_octaves() -> None:
    places = torch.tensor([[-1, 0, 15, 16, 22, 23, 32, 64, 2896, 2897, 10**6]], dtype=torch.int32)
    # 16·√2 = 22.6; 64 is two octaves on: 16 + 4; 16·2^7.5 = 2896.3
    assert position_bucket(places)[0].tolist() == [-1, 0, 15, 16, 16, 17, 18, 20, 30, 31, 31]


def test_positions_are_read_and_unknown_ones_are_not() -> None:
    sae, x = new(no_attention=True), randn(B, T, D)
    known, unknown = packed(x), Batch.of(x)
    assert sae.position_term(unknown, None).abs().max() == 0
    assert (sae.position_term(known, None).abs().sum(-1) > 0).all()


def test_position_gates_start_open_and_are_penalised_in_the_second_half() -> None:
    sae = make_sae("relational", {"d_sae": LATENTS, "k": K, "window": T, "position_gate": True}, D, 0, "test")
    assert isinstance(sae, Relational)
    # σ(2)·1.2 − .1 = .957; log-odds of being open: 2 − 2/3·log(.1/1.1) = 3.599, P = .9734
    assert hard_concrete(sae.z, None).tolist() == pytest.approx([0.9570] * 5, abs=1e-4)
    batch = packed(randn(B, T, D))
    sae.requires_grad_(False)
    early, late = (sae.training_pass(batch, Clock(step, 100, B * T)).parts["position_gates"] for step in (49, 50))
    assert float(early) == 0.0
    assert float(late) == pytest.approx(1e-3 * 0.9734, rel=1e-4)


def test_position_gates_are_drawn_by_seed_and_step() -> None:
    options, batch = {"d_sae": LATENTS, "k": K, "window": T, "position_gate": True}, packed(randn(B, T, D))
    terms = []
    for seed, step in ((0, 3), (0, 3), (0, 4), (2**40, 3)):
        sae = make_sae("relational", options, D, seed, "test")
        assert isinstance(sae, Relational)
        with torch.no_grad():
            sae.U.fill_(1.0)
            sae.V.fill_(1.0)
        terms.append(sae.position_term(batch, Clock(step, 100, B * T)))
    assert torch.equal(terms[0], terms[1])  # a resumed run draws the same
    assert not torch.equal(terms[0], terms[2])
    assert not torch.equal(terms[0], terms[3])


@pytest.mark.parametrize("fits", range(7))
def test_bisection_finds_the_last_that_fits(fits: int) -> None:
    costs = [0.0, *[1.0 if n > fits else 0.1 * n for n in range(1, 7)]]
    assert largest_within(lambda n: costs[n], 6, 0.65) == fits


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n_dropped", [0, 2, 5])
def test_as_many_of_the_smallest_position_rows_go_as_the_tolerance_pays_for(n_dropped: int, gated: bool) -> None:
    sae = told_by_position(gated)
    batch = told(sae)
    rows = sae.U.clone()
    gates = hard_concrete(sae.z, None)[:, None] if gated else 1.0
    order = (rows * gates @ sae.V).norm(dim=-1).argsort().tolist()
    whole = plainly_explained(sae, batch)
    assert explained(sae, lambda: [batch]) == pytest.approx(whole, abs=1e-5)
    costs = []
    for n in range(6):  # one after the other, each measured
        sae.U.copy_(rows)
        sae.U[order[:n]] = 0.0
        costs.append(whole - plainly_explained(sae, batch))
    assert costs == sorted(costs)  # else bisection might stop early
    sae.U.copy_(rows)
    between = [*costs, costs[-1] + 0.01]
    tolerance = (between[n_dropped] + between[n_dropped + 1]) / 2
    pruned = told_by_position(gated, prune_positions=tolerance)
    assert float(pruned.inner_figures()["position_rows"]) == 1
    found = pruned.calibrate(lambda: [batch])
    assert found["position_rows"] == pytest.approx(1 - n_dropped / 5)
    assert found["position_rows_cost"] == pytest.approx(costs[n_dropped], abs=1e-5)
    left = torch.ones(5, 1).index_fill(0, torch.tensor(order[:n_dropped], dtype=torch.int64), 0.0)
    assert torch.equal(pruned.U, rows * left)
    assert float(pruned.inner_figures()["position_rows"]) == pytest.approx(1 - n_dropped / 5)


def told_by_position(gated: bool, **options: Any) -> Relational:
    """Its temporal latents know nothing but the position, the others nothing at all."""
    sae = new(position_gate=gated, no_dec_temporal=True, no_attention=True, no_gate=True, **options)
    sae.b_dec.zero_()
    sae.U.copy_(torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])[:, None] * randn(1, 8, seed=41).abs())
    sae.V.copy_(0.03 * randn(8, 32, seed=42).abs())
    sae.W_enc.zero_()
    sae.W_dec[:5] = torch.eye(D)[:5]
    if gated:
        sae.z.copy_(torch.tensor([2.0, 2.0, -1.0, 2.0, 2.0]))
    sae.sparsity.threshold.zero_()
    return sae


def told(sae: Relational, seed: int = 0) -> Batch:
    """What it knows, and as much noise."""
    return packed(sae.position_term(packed(torch.zeros(B, T, D)), None) @ sae.W_dec[:5] + randn(B, T, D, seed=seed))


def plainly_explained(sae: Relational, batch: Batch) -> float:
    x = batch.x[batch.valid].double()
    error = x - sae.reconstruct(sae.codes(batch), batch)[batch.valid]
    return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())


def test_pruning_that_was_interrupted_is_done_again_to_the_bit() -> None:
    sae = told_by_position(False, prune_positions=0.1)
    data = [told(sae, seed) for seed in range(3)]
    learner = learner_of(sae.requires_grad_(True), 4)
    for step in range(4):
        learner.train_step(data[step % 3], B * T)
    saved = {group: {name: t.clone() for name, t in found.items()} for group, found in learner.tensors().items()}
    read = iter([data, data, data[:1]])  # … and then somebody asks to stop
    with pytest.raises(StopIteration):
        sae.calibrate(lambda: next(read))
    assert not torch.equal(sae.U, saved["weights"]["U"])
    results = []
    for _ in range(2):
        again = learner_of(told_by_position(False, prune_positions=0.1).requires_grad_(True), 4)
        again.restore(saved, learner.facts())
        results.append((again.sae.calibrate(lambda: data), again.sae.state_dict()))
    assert results[0][0] == results[1][0]
    assert 0 < results[0][0]["position_rows"] < 1
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_position_rows_stay_unless_pruning_is_asked_for() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    rows = sae.U.clone()
    assert not [name for name in sae.calibrate(lambda: [batch]) if name.startswith("position")]
    assert torch.equal(sae.U, rows)
    assert set(sae.inner_figures()) == {"span"}
