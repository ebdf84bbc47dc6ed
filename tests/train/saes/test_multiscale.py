"""Multi-scale: convolutions, targets and separation against slow references; nothing from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes import multiscale as module
from train.saes.base import SAE
from train.saes.multiscale import MultiScale
from train.saes.separation import correlation, separation
from train.schedule import Clock

B, T, D, LATENTS, K = 3, 12, 6, 18, 4  # 18 latents in groups of 5, 5, 4, 4
CLOCK = Clock(50, 100, B * T)  # no separation at this step


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new(**options: Any) -> MultiScale:
    sae = make_sae("multiscale", {"d_sae": LATENTS, "k": K, "window": T} | options, D, 0, "test")
    assert isinstance(sae, MultiScale)
    with torch.no_grad():
        sae.b_dec.copy_(randn(D, seed=1))
        if options.get("convolution") != "none":
            sae.omega.copy_(randn(*sae.omega.shape, seed=2))
        if options.get("convolution") == "mixture":
            sae.mixture.copy_(randn(*sae.mixture.shape, seed=3))
        if sae.omega_0 is not None:
            sae.omega_0.copy_(randn(*sae.omega_0.shape, seed=6))
    return sae


def packed(x: Tensor | None = None) -> Batch:
    """Windows whose documents change at 5, at 2 and 9, and not; one invalid place in each."""
    doc = torch.zeros(B, T, dtype=torch.int32)
    doc[0, 5:] = 1
    doc[1, 2:] = 1
    doc[1, 9:] = 2
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 6] = valid[1, 4] = valid[2, 0] = False
    return Batch.of(randn(B, T, D, seed=4) if x is None else x, doc=doc, valid=valid)


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


def group_of(latent: int) -> int:
    return [number for number, size in enumerate((5, 5, 4, 4)) for _ in range(size)][latent]


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


def slow_separation(rows: Tensor, group: list[int]) -> float:
    unit = rows / rows.norm(dim=-1, keepdim=True)
    across, within = 0.0, 0.0
    for i in range(len(rows)):
        for same in (False, True):
            others = [j for j in range(len(rows)) if j != i and (group[i] == group[j]) is same]
            nearest = max([0.0, *(float(unit[i] @ unit[j]) for j in others)]) ** 2
            across, within = across + nearest * (not same), within + nearest * same
    return (across + 0.5 * within) / len(rows)


def test_separation_agrees_with_a_slow_reference() -> None:
    rows, group = randn(18, D), [group_of(latent) for latent in range(18)]
    rows /= rows.norm(dim=-1, keepdim=True)
    got = separation(rows, torch.tensor(group)).item()
    assert got == pytest.approx(slow_separation(rows, group), rel=1e-5)
    # by hand: two rows at 60° in different groups, cos² = ¼, and nobody else in either group
    pair = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert separation(pair, torch.tensor([0, 1])).item() == pytest.approx(0.25)
    assert separation(pair, torch.tensor([0, 0])).item() == pytest.approx(0.125)
    assert separation(-pair * torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])).item() == 0.0  # pointing apart


def test_products_of_separation_are_float32_under_autocast() -> None:
    rows, group = torch.nn.functional.normalize(randn(18, D), dim=-1), torch.tensor([group_of(i) for i in range(18)])
    energies, valid = randn(3, 5, 4).square(), torch.ones(3, 5, dtype=torch.bool)
    exact = separation(rows, group), correlation(energies, valid, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separation(rows, group), exact[0])
        assert torch.equal(correlation(energies, valid, 15), exact[1])


def test_separation_is_taken_every_fourth_step_and_counts_four_times() -> None:
    sae, batch = new(lambda_sep=0.2), packed()
    expected = 4 * 0.2 * slow_separation(sae.W_dec.detach(), [group_of(latent) for latent in range(18)])
    for step in range(9):
        parts = sae.training_pass(batch, Clock(step, 100, B * T)).parts
        assert ("separation" in parts) == (step in (0, 4, 8))
        if "separation" in parts:
            assert parts["separation"].item() == pytest.approx(expected, rel=1e-5)


def test_sampled_rows_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEPARATION_ROWS", 3)
    sae = new()
    rows, group = sae.sampled_rows(8)
    torch.manual_seed(1)
    torch.rand(5)
    again, _ = new().sampled_rows(8)
    assert torch.equal(rows, again)
    assert group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = [(sae.W_dec == row).all(1).nonzero().item() for row in rows]
    assert [group_of(int(latent)) for latent in found] == group.tolist()
    assert len(set(found)) == 12
    assert not torch.equal(rows, sae.sampled_rows(12)[0])
    sae.seed = 2**40  # the same in the 32 bits that torch takes of a seed
    assert not torch.equal(rows, sae.sampled_rows(8)[0])


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
    assert torch.equal(plain.last_loss, flat.last_loss)
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


def test_correlation_is_that_of_valid_tokens() -> None:
    # groups 0 and 1 rise together, 2 falls with them half the way (r² = ¾ by hand), the last token does not count
    energies = torch.tensor([[[0.0, 1.0, 5.0], [1.0, 3.0, 5.0], [2.0, 5.0, 2.0], [9.0, -9.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    assert correlation(energies, valid, 3).item() == pytest.approx((1 + 0.75 + 0.75) / 3, rel=1e-5)
    constant = torch.ones(1, 4, 2)
    assert correlation(constant, valid, 3).item() == 0.0


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
