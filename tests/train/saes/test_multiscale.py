"""Multi-scale: convolutions and targets against slow references; nothing from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from tests.train.saes.scaled import CLOCK, LATENTS, B, D, K, T, group_of, new, packed, randn
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE
from train.saes.multiscale import MultiScale


def reaches(batch: Batch, b: int, t: int, lag: int) -> bool:
    s = t - lag
    return 0 <= s < T and bool(batch.valid[b, s]) and bool(batch.doc[b, s] == batch.doc[b, t])


def taps_of(sae: MultiScale) -> list[int]:
    """Dilations back of each tap: 1, 2, …, or by turns to both sides."""
    return [1, 2, 3, 4][: sae.config.kernel - 1] if sae.config.causal else [1, -1, 2, -2][: sae.config.kernel - 1]


def slow_context(sae: MultiScale, batch: Batch, number: int) -> Tensor:
    """Σ_j ω_j ⊙ h_{t−jδ} of one scale, place by place."""
    rows = []
    for b in range(B):
        for t in range(T):
            total = torch.zeros(D)
            for tap, dilations in enumerate(taps_of(sae)):
                lag = dilations * sae.config.dilations[number]
                if reaches(batch, b, t, lag):
                    total = total + sae.omega[number, tap] * (batch.x[b, t - lag] - sae.b_dec)
            rows.append(total)
    return torch.stack(rows).view(B, T, D)


def slow_pre_activations(sae: MultiScale, batch: Batch) -> Tensor:
    context = [slow_context(sae, batch, number) for number in range(4)]
    columns = []
    for latent in range(LATENTS):
        shares = [float(group_of(latent) == number) for number in range(4)]
        y = torch.zeros(B, T, D)
        for number in range(4):
            share = sae.mixture.softmax(0)[number, latent] if hasattr(sae, "mixture") else shares[number]
            own = sae.omega_0[number] if sae.omega_0 is not None else torch.ones(D)
            y = y + share * (own * (batch.x - sae.b_dec) + context[number])
        columns.append(y @ sae.W_enc[:, latent] + sae.b_enc[latent])
    return torch.relu(torch.stack(columns, dim=-1))


@pytest.mark.parametrize(("kernel", "causal"), [(2, True), (3, True), (5, True), (3, False), (4, False), (5, False)])
@pytest.mark.parametrize("convolution", ["dilated", "mixture"])
@pytest.mark.parametrize("token_weights", [False, True])
def test_convolution_agrees_with_a_slow_loop_and_so_do_its_gradients(
    token_weights: bool, convolution: str, kernel: int, causal: bool
) -> None:
    sae = new(convolution=convolution, kernel=kernel, causal=causal, token_weights=token_weights)
    batch = packed()
    weight = randn(B, T, LATENTS, seed=5)
    u, slow = sae.pre_activations(batch), slow_pre_activations(sae, batch)
    assert torch.allclose(u, slow, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    names = ["omega", "W_enc", "b_enc", "b_dec"] + (["mixture"] if convolution == "mixture" else [])
    names += ["omega_0"] if token_weights else []
    parameters = [sae.get_parameter(name) for name in names]
    ours, theirs = (torch.autograd.grad((values * weight).sum(), parameters) for values in (u, slow))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("convolution", ["dilated", "mixture"])
def test_the_direct_encoder_is_what_a_token_without_a_past_is_multiplied_with(convolution: str) -> None:
    sae = new(convolution=convolution, token_weights=True)
    x = randn(7, D, seed=8)
    alone = torch.relu((x - sae.b_dec) @ sae.direct_encoder() + sae.b_enc)
    assert torch.allclose(sae.pre_activations(Batch.of(x[:, None]))[:, 0], alone, atol=1e-5)
    assert torch.equal(sae.as_affine().W_enc, sae.direct_encoder())
    assert torch.equal(new(convolution=convolution).direct_encoder(), new(convolution=convolution).W_enc)


def test_the_first_weights_see_no_past_and_encode_as_a_flat_sae() -> None:
    sae, batch = new(), packed()
    flat = make_sae("batchtopk", {"d_sae": LATENTS, "k": K}, D, 0, "test")
    with torch.no_grad():
        sae.omega.zero_()
        flat.b_dec.copy_(sae.b_dec)
    assert torch.allclose(sae.encode(batch), flat.encode(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convolution", ["dilated", "mixture"])
def test_codes_do_not_see_the_future(convolution: str) -> None:
    sae, x = new(convolution=convolution), randn(B, T, D, seed=4)
    before = sae.encode(packed(x))
    for t in range(1, T):
        changed = x.clone()
        changed[:, t:] = 7.0
        after = sae.encode(packed(changed))
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_without_causality_codes_see_the_future_and_say_so() -> None:
    sae, x = new(causal=False), randn(B, T, D, seed=4)
    changed = x.clone()
    changed[2, 8] += 3.0
    moved = (sae.encode(packed(changed)) - sae.encode(packed(x))).abs().sum(-1)
    assert (moved[2, [6, 7, 8, 9]] > 0).all()  # dilations 1 and 2 reach it from either side
    assert moved[:2].max() == 0.0
    assert sae.sees_future
    assert sae.as_affine().lost == "what the encoder reads from the past and from the future"
    # targets that look ahead leak nothing into an encoder of single tokens
    assert not new(causal=False, convolution="none").sees_future
    assert not new().sees_future
    assert not make_sae("topk", {"d_sae": LATENTS, "k": K}, D, 0, "test").sees_future


@pytest.mark.parametrize("causal", [True, False])
def test_codes_do_not_see_other_documents_or_invalid_places(causal: bool) -> None:
    sae, x = new(causal=causal), randn(B, T, D, seed=4)
    before = sae.encode(packed(x))
    changed = x.clone()
    changed[0, :5] = 7.0  # the first document of the first window
    assert torch.equal(sae.encode(packed(changed))[0, 5:], before[0, 5:])
    changed = x.clone()
    changed[0, 6] = changed[2, 0] = 1e3  # invalid
    after = sae.encode(packed(changed))
    seen = packed().valid[..., None]
    assert torch.equal(after * seen, before * seen)
    changed = x.clone()
    changed[0, 7] = 7.0  # and what they do see: one place before, in the document
    assert not torch.equal(sae.encode(packed(changed))[0, 8], before[0, 8])


def test_a_document_encodes_the_same_wherever_it_lies() -> None:
    sae, one, other = new(), randn(1, 5, D, seed=6), randn(1, 7, D, seed=7)
    doc = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    forward = sae.encode(Batch.of(torch.cat([one, other], dim=1), doc=doc))
    backward = sae.encode(Batch.of(torch.cat([other, one], dim=1), doc=doc.flip(1)))
    for got in (backward[:, 7:], sae.encode(one)):
        assert torch.allclose(got, forward[:, :5], rtol=1e-5, atol=1e-6)
    for got in (backward[:, :7], sae.encode(other)):
        assert torch.allclose(got, forward[:, 5:], rtol=1e-5, atol=1e-6)


def test_rows_have_no_past() -> None:
    sae, x = new(), randn(4, D, seed=8)
    flat = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert torch.allclose(sae.encode(x), flat, rtol=1e-5, atol=1e-5)  # thresholds are 0


@torch.no_grad()
def slow_targets(sae: MultiScale, batch: Batch, latents: Tensor) -> float:
    losses = []
    for number in (1, 2, 3):
        total = 0.0
        for b in range(B):
            for t in range(T):
                if not batch.valid[b, t]:
                    continue
                lags = [dilations * sae.config.dilations[number] for dilations in taps_of(sae)]
                seen = [batch.x[b, t], *(batch.x[b, t - lag] for lag in lags if reaches(batch, b, t, lag))]
                slow = [latent for latent in range(LATENTS) if group_of(latent) >= number]
                made = latents[b, t, slow] @ sae.W_dec[slow]
                total += float((torch.stack(seen).mean(0) - sae.b_dec - made).square().sum())
        losses.append(total / batch.n_valid)
    return sum(losses) / 3


@pytest.mark.parametrize(("convolution", "causal"), [("dilated", True), ("none", True), ("dilated", False)])
def test_scale_targets_agree_with_a_slow_reference(convolution: str, causal: bool) -> None:
    sae, batch = new(lambda_scale=0.5, convolution=convolution, causal=causal), packed()
    output = sae.training_pass(batch, CLOCK)
    assert output.parts["scale"].item() == pytest.approx(0.5 * slow_targets(sae, batch, output.latents), rel=1e-5)
    whole = output.latents @ sae.W_dec + sae.b_dec
    assert torch.allclose(output.reconstruction, whole, rtol=1e-5, atol=1e-5)


def test_equal_budgets_keep_the_same_number_in_every_group() -> None:
    sae, batch = new(sparsity="budgets"), packed()
    active = sae.training_pass(batch, CLOCK).latents > 0
    assert [int(part.sum()) for part in active.split(sae.sizes, dim=-1)] == [33, 33, 33, 33]  # 33 valid tokens, k = 4
    assert not active[~batch.valid].any()
    everywhere = new().training_pass(batch, CLOCK).latents > 0
    assert int(everywhere.sum()) == 4 * 33


def test_equal_budgets_hold_in_every_group_after_calibration() -> None:
    sae, batch = new(sparsity="budgets"), packed()
    sae.calibrate(lambda: [batch])
    active = (sae.codes(batch) > 0)[batch.valid]
    assert [int(part.sum()) for part in active.split(sae.sizes, dim=-1)] == [33, 33, 33, 33]


@pytest.mark.parametrize("sparsity", ["joint", "budgets"])
@pytest.mark.parametrize("convolution", ["dilated", "mixture", "none"])
def test_folding_keeps_codes_and_reconstruction(sparsity: str, convolution: str) -> None:
    sae, batch = new(sparsity=sparsity, convolution=convolution), packed()
    with torch.no_grad():
        sae.b_enc.copy_(randn(LATENTS, seed=9) * 0.3)
        sae.scale.fill_(0.37)
        sae.calibrate(lambda: [batch.with_x(batch.x * 0.37)])
        latents, reconstruction = sae.encode(batch), sae(batch)
        sae.fold()
        assert torch.allclose(sae.encode(batch), latents, rtol=1e-4, atol=1e-5)
        assert torch.allclose(sae(batch), reconstruction, rtol=1e-4, atol=1e-5)
    assert sae.scale.item() == 1.0
    assert 0 < (latents > 0).float().mean() < 0.5


def learner_of(sae: SAE) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=1e-2)
    return Learner(config, sae, 30, torch.device("cpu"), torch.float32, "plain")  # sums in one order


def test_with_everything_off_it_trains_as_flat_batchtopk() -> None:
    sizes = {"d_sae": LATENTS, "k": K, "window": T}
    plain = learner_of(make_sae("multiscale", sizes | dict(MultiScale.plain or {}), D, 0, "test"))
    flat = learner_of(make_sae("batchtopk", sizes, D, 0, "test"))
    for step in range(30):
        batch = packed(randn(B, T, D, seed=step))
        for learner in (plain, flat):
            learner.train_step(batch, B * T)
    assert torch.equal(plain.tally.last_loss, flat.tally.last_loss)
    for name, value in flat.sae.named_parameters():
        assert torch.equal(plain.sae.get_parameter(name), value), name


def test_training_with_every_term_is_the_same_twice() -> None:
    options = {"lambda_decorrelation": 0.1, "sparsity": "budgets"}
    one, other = (learner_of(new(**options)) for _ in range(2))
    for step in range(9):
        for learner in (one, other):
            learner.train_step(packed(randn(B, T, D, seed=step)), B * T)
    assert all(torch.equal(value, other.sae.state_dict()[name]) for name, value in one.sae.state_dict().items())
    metrics = one.read_metrics()
    assert {"loss_scale", "loss_separation", "loss_decorrelation", "omega_mean_1", "l0_dilation_8"} <= metrics.keys()
    assert sum(metrics[f"l0_dilation_{2**n}"] for n in range(4)) == pytest.approx(metrics["l0"])


def test_an_l1_penalty_may_take_the_place_of_the_budget() -> None:
    sae, batch = new(sparsity="l1", l1=0.05), packed()
    output = sae.training_pass(batch, CLOCK)
    size = output.latents[batch.valid].sum().item() / 33
    assert output.parts["sparsity"].item() == pytest.approx(0.05 * size, rel=1e-5)


def test_token_weights_start_at_one_and_are_learned() -> None:
    options = {"d_sae": LATENTS, "k": K, "window": T}
    fixed, learned = (
        learner_of(make_sae("multiscale", options | extra, D, 0, "test")) for extra in ({}, {"token_weights": True})
    )
    assert torch.equal(fixed.sae.encode(packed()), learned.sae.encode(packed()))
    for step in range(9):
        for run in (fixed, learned):
            run.train_step(packed(randn(B, T, D, seed=step)), B * T)
    assert isinstance(learned.sae, MultiScale)
    assert learned.sae.omega_0 is not None
    moved = (learned.sae.omega_0 - 1).norm(dim=1) / D**0.5
    assert (moved > 0.005).all()
    figures = learned.sae.inner_figures()
    assert [float(figures[f"omega_token_{name}"]) for name in (1, 2, 4, 8)] == pytest.approx(moved.tolist())
    assert set(learned.sae.state_dict()) - set(fixed.sae.state_dict()) == {"omega_0"}


def test_omega_is_logged_for_each_scale() -> None:
    sae = new()
    with torch.no_grad():
        sae.omega.zero_()
        sae.omega[2, 0, :2] = torch.tensor([3.0, -1.0])
    taps, values = sae.omega[2].numel(), {name: value.item() for name, value in sae.inner_figures().items()}
    assert values["omega_mean_4"] == pytest.approx(2 / taps)
    assert values["omega_std_4"] == pytest.approx((10 / taps - (2 / taps) ** 2) ** 0.5)
    assert values["omega_distance_4"] == pytest.approx((10 / D) ** 0.5)
    assert all(values[f"omega_{figure}_8"] == 0 for figure in ("mean", "std", "distance"))
    assert new(convolution="none").inner_figures() == {}


def test_groups_of_one_dilation_are_told_apart() -> None:
    assert list(new(dilations=[2, 4, 4, 4]).groups()) == ["dilation 2", "dilation 4", "dilation 4-2", "dilation 4-3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": []}, "at least one"),
        ({"dilations": [0, 1]}, "each at least 1"),
        ({"dilations": [4, 2]}, "smallest first"),
        ({"d_sae": 3, "k": 2}, "4 dilations need as many latents"),
        ({"kernel": 1}, "greater than 1"),
        ({"token_weights": True, "convolution": "none"}, "token_weights are a convolution's"),
        ({"kernel": 2, "causal": False}, "causal = false needs a kernel of at least 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sae("multiscale", {"d_sae": LATENTS, "k": K, "window": T} | options, D, 0, "test")


def test_one_scale_is_one_group_without_targets() -> None:
    sae = new(dilations=[4])
    assert sae.sizes == [LATENTS]
    assert sae.omega.shape == (1, 2, D)
    assert "scale" not in sae.training_pass(packed(), CLOCK).parts
