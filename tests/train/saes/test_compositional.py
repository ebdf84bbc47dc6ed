"""Compositional: levels, codes, losses, the clustering in the middle of a run, switches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from common.errors import ConfigError
from tests.train.saes.levelled import N_LATENTS, D, K, new, randn
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import composition, make_sae
from train.saes.base import SAE
from train.saes.compositional import HIGH, LOW, MID, Compositional
from train.schedule import Clock


def inputs(n: int = 64, seed: int = 0) -> Batch:
    """Unit mean squared norm, from 24 sparse directions."""
    directions = randn(24, D, seed=100)
    active = (randn(n, 24, seed=seed) > 1.0) * randn(n, 24, seed=seed + 1).abs()
    x = active @ directions + 0.1 * randn(n, D, seed=seed + 2)
    return Batch.of((x / x.square().sum(-1).mean().sqrt())[:, None])


def learner_of(sae: SAE, n_steps: int) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=3e-3)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32)


def train(learner: Learner, until: int) -> None:
    while learner.step < until:
        if learner.at_landmark():
            learner.revise(lambda: [inputs(seed=1000 + 10 * number) for number in range(4)], 64)
        learner.train_step(inputs(seed=10 * learner.step), 64)


def test_levels_are_four_to_two_to_one_and_stored_coarse_to_fine() -> None:
    sae = new()
    assert sae.sizes == (40, 20, 10)
    assert (sae.places[HIGH], sae.places[MID], sae.places[LOW]) == (slice(0, 10), slice(10, 30), slice(30, 70))


def test_plain_is_flat_batchtopk() -> None:
    assert Compositional.plain is not None
    ours = learner_of(new(**Compositional.plain), 30)
    flat = learner_of(make_sae("batchtopk", {"d_sae": N_LATENTS, "k": K}, D, 0, "test"), 30)
    for step in range(30):
        batch = inputs(seed=step)
        ours.train_step(batch, 64)
        flat.train_step(batch, 64)
        # the levels are summed one after the other: the last bits differ, and grow a little in 30 steps
        assert float(ours.tally.last_loss) == pytest.approx(float(flat.tally.last_loss), rel=1e-4)
    assert torch.allclose(ours.sae.W_dec, flat.sae.W_dec, atol=1e-4)
    assert torch.allclose(ours.sae.W_enc, flat.sae.W_enc, atol=1e-4)


def test_upper_rows_are_made_of_lower_ones_after_every_step() -> None:
    sae = new()
    train(learner_of(sae, 20), 8)
    low = sae.W_dec[sae.places[LOW]].detach()
    levels = {"mid": low, "high": sae.W_dec[sae.places[MID]].detach()}
    for name, place in (("mid", sae.places[MID]), ("high", sae.places[HIGH])):
        logits, candidates = sae.get_parameter(f"logits_{name}"), sae.get_buffer(f"candidates_{name}")
        for row, weights, parts in zip(sae.W_dec[place], softplus(logits), candidates, strict=True):
            made = sum((w * levels[name][i] for w, i in zip(weights, parts, strict=True)), torch.zeros(D))
            assert torch.allclose(row, made / made.norm(), atol=1e-5)
    assert torch.allclose(low, sae.W_low)


def test_each_level_keeps_its_budget() -> None:
    sae = new(pretrain=0.0)
    latents = sae.training_pass(inputs(), Clock(50, 100, 64)).latents
    assert [(latents[..., place] > 0).sum().item() / 64 for place in sae.places] == [8.0, 4.0, 2.0]


def test_the_loss_is_the_weighted_sum_over_prefixes() -> None:
    sae = new(pretrain=0.0)
    batch = inputs()
    output = sae.training_pass(batch, Clock(50, 100, 64))
    expected = 0.0
    for weight, end in zip((0.25, 0.5, 1.0), (10, 30, 70), strict=True):
        made = output.latents[..., :end] @ sae.W_dec[:end] + sae.b_dec
        expected += weight / 1.75 * (batch.x - made).square().sum(-1).mean().item()
    assert output.parts["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_pre_activations_add_what_the_parts_say() -> None:
    sae = new(pretrain=0.0)
    sae.sparsity.threshold.fill_(0.05)
    batch = inputs()
    A1, A2 = sae.compositions()
    h = batch.x - sae.b_dec
    lower: Tensor | None = None
    codes = sae.codes(batch)
    for place, A in ((sae.places[LOW], None), (sae.places[MID], A1), (sae.places[HIGH], A2)):
        u = h @ sae.W_enc[:, place] + sae.b_enc[place]
        if A is not None and lower is not None:
            u = u + 0.1 * lower @ A.T
        lower = u.relu() * (u > 0.05)
        assert torch.allclose(codes[..., place], lower, atol=1e-5)


def test_the_first_tenth_trains_the_low_level_alone() -> None:
    sae = new()
    learner = learner_of(sae, 100)
    before = sae.W_enc.detach().clone()
    train(learner, 10)
    upper = slice(0, sae.n_upper)
    assert torch.equal(sae.W_enc[:, upper], before[:, upper])
    assert not torch.equal(sae.W_enc[:, sae.n_upper :], before[:, sae.n_upper :])
    latents = sae.training_pass(inputs(), Clock(9, 100, 64)).latents
    assert (latents[..., upper] > 0).sum() == 0
    assert (latents > 0).sum() == 64 * K


@pytest.mark.parametrize("sparsity", ["budgets", "joint", "l1"])
def test_upper_levels_are_silent_in_inference_until_the_clustering(sparsity: str) -> None:
    sae = new(sparsity=sparsity)
    learner = learner_of(sae, 100)
    train(learner, 10)
    low, theta = sae.places[LOW], sae.sparsity.threshold[LOW]
    u = torch.relu((inputs().x - sae.b_dec) @ sae.W_enc[:, low] + sae.b_enc[low])
    codes = sae.codes(inputs())
    assert not codes[..., : sae.n_upper].any()
    assert torch.allclose(codes[..., low], u * (u > theta), atol=1e-6)
    assert 0 < theta < torch.inf
    train(learner, 11)
    assert sae.codes(inputs())[..., : sae.n_upper].any()


@pytest.mark.parametrize("sparsity", ["budgets", "joint"])
def test_thresholds_are_finite_after_the_clustering_though_a_level_starves(sparsity: str) -> None:
    sae = new(sparsity=sparsity, level_weights=(0.25, 1.0, 16.0))
    learner = learner_of(sae, 100)
    train(learner, 10)
    learner.revise(lambda: [inputs()], 64)
    threshold = sae.sparsity.threshold
    assert torch.isfinite(threshold).all()
    assert threshold.min() > 0
    if sparsity == "joint":  # one score for all, times the price
        assert torch.allclose(threshold / threshold[LOW], torch.tensor([1.0, 4.0, 64.0]))
        assert sae.W_enc[:, sae.places[HIGH]].norm(dim=0).tolist() == pytest.approx([1.0] * 10)  # it wrote nothing
    train(learner, 30)
    assert torch.isfinite(threshold).all()


def test_a_run_of_two_steps_is_clustered_too() -> None:
    sae = new()
    learner = learner_of(sae, 2)
    assert sae.landmarks(2) == (1,)
    train(learner, 2)
    assert torch.isfinite(sae.sparsity.threshold).all()
    assert math.isfinite(float(learner.tally.last_loss))


def test_reassigning_keeps_the_averages_of_parts_that_stay() -> None:
    sae = new(hierarchy="reassign", candidates=8)
    learner = learner_of(sae, 40)
    train(learner, 24)
    state = learner.optimizer.state[sae.logits_mid]
    average, squares, candidates = (v.clone() for v in (state["exp_avg"], state["exp_avg_sq"], sae.candidates_mid))
    assert learner.at_landmark()
    learner.revise(lambda: [inputs(seed=1000)], 64)
    kept = (candidates == sae.candidates_mid) & (sae.logits_mid > composition.UNASSIGNED)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(state["exp_avg"], torch.where(kept, average, 0.0))
    assert torch.allclose(state["exp_avg_sq"], torch.where(kept, squares, squares[kept].mean()))


def test_the_group_norm_is_float32_under_autocast() -> None:
    upper, lower, logits = randn(20, 1, 3).relu(), randn(20, 1, 6, seed=1).relu(), randn(3, 3, seed=2)
    values = (upper, lower, logits, torch.tensor([[0, 1, 2], [1, 2, 3], [3, 4, 5]]), 0.5, 20)
    exact = composition.group_sparsity(*values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(composition.group_sparsity(*values), exact)


def test_the_joint_phase_starts_above_the_mean() -> None:
    learner = learner_of(new(), 200)
    train(learner, 20)
    learner.read_metrics()
    train(learner, 21)
    # without gains per level the explained variance of this step is far below 0
    assert learner.read_metrics()["explained_variance"] > 0.3


def test_clustering_is_a_function_of_weights_and_batches() -> None:
    learner = learner_of(new(), 100)
    train(learner, 10)
    twin = copy.deepcopy(learner)
    train(learner, 12)
    train(twin, 12)
    for name, value in learner.sae.state_dict().items():
        assert torch.equal(value, twin.sae.state_dict()[name]), name


def test_clustering_resets_the_averages_of_what_it_made() -> None:
    learner = learner_of(new(), 100)
    train(learner, 10)
    averages = learner.sae.revise(lambda: [inputs()], Clock(10, 100, 64))
    assert averages["W_enc"].expand(D, N_LATENTS).sum() == 30 * D
    assert averages["b_enc"].nonzero().flatten().tolist() == list(range(30))


def test_the_learning_rate_warms_up_anew_and_the_logits_have_their_own() -> None:
    sae = new()
    # pre-training ends at step 10 of 100, and 5 steps of warm-up follow
    assert sae.rates(Clock(9, 100, 64)) == (1.0, 10.0)
    assert [sae.rates(Clock(step, 100, 64))[0] for step in (10, 12, 14, 50)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert new(pretrain=0.0).rates(Clock(0, 100, 64)) == (1.0, 10.0)


def test_landmarks_are_the_clustering_and_the_reassignments() -> None:
    assert new().landmarks(20_000) == (2000,)
    assert new(pretrain=0.0).landmarks(20_000) == ()
    assert new(hierarchy="reassign").landmarks(20_000) == (2000, 7000, 12000)
    assert new(hierarchy="reassign").landmarks(1000) == (100, 600)


@pytest.mark.parametrize("hierarchy", ["learned", "fixed_cluster", "fixed_random", "reassign"])
def test_only_learned_hierarchies_change(hierarchy: str) -> None:
    sae = new(hierarchy=hierarchy)
    learner = learner_of(sae, 20)
    train(learner, 3)
    before = sae.logits_mid.detach().clone()
    train(learner, 8)
    assert torch.equal(before, sae.logits_mid) == (hierarchy in ("fixed_cluster", "fixed_random"))
    train(learner, 14)  # past a reassignment
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


def test_a_partition_gives_each_low_latent_to_one_mid_latent() -> None:
    sae = new(clustering="partition", hierarchy="fixed_cluster")
    train(learner_of(sae, 20), 3)
    mid, high = sae.compositions()
    for A in (mid, high):
        is_part = 0.5 * A.amax(1, keepdim=True) < A  # the members of a cluster weigh the same, others a hundredth
        assert is_part.sum(0).tolist() == [1] * A.shape[1]
        assert is_part.any(1).all()


@pytest.mark.parametrize("hierarchy", ["learned", "reassign"])
def test_dead_latents_weigh_no_more_than_candidates(hierarchy: str) -> None:
    sae = new(living_parts=True, pretrain=0.0, hierarchy=hierarchy)
    with torch.no_grad():
        sae.logits_mid.fill_(0.5)
        sae.logits_mid[:, 1] = composition.NO_PART - 1  # less already
    gone = sae.candidates_mid[0, :2]
    sae.tokens_silent[sae.places[LOW].start + gone] = 10**9
    clock = Clock(50, 100, 64)
    before = sae.logits_mid.detach().clone()
    sae.after_step(clock)
    is_gone = torch.isin(sae.candidates_mid, gone)
    assert 0 < is_gone.sum() < is_gone.numel()
    wanted = torch.where(is_gone, before.clamp(max=composition.NO_PART), before)
    assert torch.equal(sae.logits_mid, wanted)
    assert torch.allclose(sae.W_dec, sae.rows())


def test_copies_cost_what_they_exceed_the_limit_by() -> None:
    sae = new(copies=2.0, copy_limit=0.5, pretrain=0.0)
    with torch.no_grad():
        for logits in (sae.logits_mid, sae.logits_high):
            logits.copy_(composition.NO_PART + randn(*logits.shape))
            logits[: len(logits) // 2, 0] = 1.0  # half of the rows are all but one part
    got = sae.training_pass(inputs(), Clock(50, 100, 64)).parts["copies"]
    expected, rows = 0.0, sae.rows().detach()
    for logits, candidates, level in sae.hierarchy():
        excess = []
        for row, values, parts in zip(rows[sae.places[level]], logits.tolist(), candidates.tolist(), strict=True):
            four = [part for _, part in sorted(zip(values, parts, strict=True))[-4:]]
            nearest = max((rows[sae.places[level - 1]][part] @ row).item() for part in four)
            excess.append(max(max(nearest, 0.0) ** 2 - 0.5, 0.0))
        expected += 2.0 * sum(excess) / len(excess)
    assert got.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.9  # twice a half of a half, at both levels
    got.backward()
    assert sae.logits_mid.grad is not None
    # away from the one part
    assert sae.logits_mid.grad[:10, 0].sum() > 0


def test_inner_figures_count_parts_and_copies() -> None:
    sae = new(pretrain=0.0, hierarchy="fixed_random", random_parts=5)
    figures = sae.inner_figures()
    assert figures["parts_mid"].item() == pytest.approx(5.0)
    assert figures["parts_high"].item() == pytest.approx(5.0)
    with torch.no_grad():
        sae.logits_mid[:, 1:] = composition.UNASSIGNED
        sae.logits_high[:5, 1:] = composition.UNASSIGNED
    figures = {name: value.item() for name, value in sae.inner_figures().items()}
    assert figures["parts_mid"] == pytest.approx(1.0)
    assert figures["parts_high"] == pytest.approx(3.0)
    assert figures["copies_mid"] == 1.0
    assert figures["copies_high"] == 0.5


def test_random_parts_are_as_many_as_asked_for() -> None:
    sae = new(hierarchy="fixed_random", random_parts=5)
    A1, A2 = sae.compositions()
    for A in (A1, A2):
        assert ((A > 0).sum(1) == 5).all()
        assert torch.allclose(A[A > 0], torch.tensor(0.2))


def test_comp_only_does_not_see_the_input_in_upper_levels() -> None:
    sae = new(encoder="comp_only", pretrain=0.0)
    codes = sae.codes(inputs())
    with torch.no_grad():
        sae.W_enc[:, : sae.n_upper] = 7.0
    assert torch.equal(sae.codes(inputs()), codes)
    assert (codes[..., : sae.n_upper] > 0).any()


def test_no_comp_keeps_the_coupling_at_zero() -> None:
    sae = new(encoder="no_comp")
    train(learner_of(sae, 20), 6)
    assert sae.coupling.eq(0).all()


@pytest.mark.parametrize("detach", [False, True])
def test_detach_lower_stops_gradients_into_lower_codes(detach: bool) -> None:
    sae = new(detach_lower=detach, pretrain=0.0)
    latents = sae.training_pass(inputs(), Clock(50, 100, 64)).latents
    latents[..., : sae.n_upper].sum().backward()
    assert sae.W_enc.grad is not None
    assert (sae.W_enc.grad[:, sae.places[LOW]].abs().sum() == 0) == detach


def test_the_residual_is_penalised_and_written() -> None:
    sae = new(decoder="residual", pretrain=0.0)
    with torch.no_grad():
        sae.residual.zero_()
        made = sae.rows()
        sae.residual[0] = 2 * made[0] - made[0] + made[1]
    moved = sae.rows()[0]
    expected = 2 * made[0] + made[1]
    assert torch.allclose(moved, expected / expected.norm(), atol=1e-5)
    part = sae.training_pass(inputs(), Clock(50, 100, 64)).parts["residual"].item()
    assert part == pytest.approx((made[0] + made[1]).square().sum().item() / 30, rel=1e-5)


@pytest.mark.parametrize("agree_on", ["codes", "values"])
def test_agreement_rises_between_a_fifth_and_two_fifths_of_the_run(agree_on: str) -> None:
    sae = new(agreement=0.5, agree_on=agree_on, pretrain=0.0)
    parts = [
        sae.training_pass(inputs(), Clock(step, 100, 64)).parts["agreement"].item() for step in (10, 20, 30, 40, 90)
    ]
    assert parts[:2] == [0.0, 0.0]
    assert parts[2] == pytest.approx(parts[4] / 2, rel=1e-4)
    assert parts[3] == pytest.approx(parts[4], rel=1e-4)
    assert parts[4] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": "joint"},
        {"sparsity": "l1"},
        {"group": 0.002},
        {"copies": 1.0},
        {"clustering": "partition"},
        {"sparsity": "joint", "level_floor": 0.5},
        {"sparsity": "l1", "level_floor": 0.5},
        {"decoder": "residual"},
        {"decoder": "free"},
        {"encoder": "comp_only"},
        {"agreement": 0.02, "agree_on": "values"},
    ],
)
def test_every_switch_trains(options: dict[str, Any]) -> None:
    sae = new(**options)
    learner = learner_of(sae, 30)
    train(learner, 30)
    metrics = learner.read_metrics()
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(float(learner.tally.last_loss))
    norms = sae.W_dec.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def test_settings_that_make_no_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="three levels need at least 8 latents"):
        make_sae("compositional", {"d_sae": 7, "k": 2}, D, 0, "test")
    with pytest.raises(ConfigError, match="must be above 0"):
        new(nesting=(1.0, 1.0, 0.0))
