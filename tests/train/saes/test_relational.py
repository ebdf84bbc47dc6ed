"""Variant C: its formula against a slow loop, what it may read, its schedules and its switches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from tests.train.saes.related import CLOCK, LATENTS, SPAN, B, D, K, T, learner_of, new, packed, randn
from train.data.batch import Batch
from train.saes import load_sae, make_sae, save_sae
from train.saes.past import feature_map
from train.saes.positions import position_bucket
from train.saes.relational import Relational
from train.saes.relational_terms import Terms
from train.schedule import Clock


def terms_of(sae: Relational, batch: Batch, clock: Clock | None = None) -> Terms:
    terms = sae.terms(batch, clock)
    assert terms is not None
    return terms


def seen(batch: Batch, b: int, t: int, span: int = SPAN) -> list[int]:
    same = [s for s in range(max(t - span, 0), t) if batch.doc[b, s] == batch.doc[b, t]]
    return [s for s in same if batch.valid[b, s] and batch.valid[b, t]]


def attended(sae: Relational, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor | float:
    """From queries and keys before φ."""
    if sae.config.attention == "softmax":
        weights, least = [math.exp(float(q @ key) / math.sqrt(len(q))) for key in keys], 0.0
    else:
        weights, least = [float(feature_map(q) @ feature_map(key)) for key in keys], 1e-6
    parts = [weight * value for weight, value in zip(weights, values, strict=True)]
    return torch.stack(parts).sum(0) / (sum(weights) + least) if parts else 0.0


def slow_codes(sae: Relational, batch: Batch) -> Tensor:
    rows = []
    for b in range(B):
        h = batch.x[b] - sae.b_dec
        for t in range(T):
            context = torch.zeros(64)
            past = seen(batch, b, t)
            for head in range(4):
                part = slice(16 * head, 16 * head + 16)
                q = math.sqrt(D) * h[t] @ sae.W_Q[:, part]
                keys = [math.sqrt(D) * h[s] @ sae.W_K[:, part] for s in past]
                context[part] = attended(sae, q, keys, [h[s] @ sae.W_V[:, part] for s in past])
            gate = torch.sigmoid(sae.w_gate @ torch.cat([h[t], context]) + sae.b_gate)
            u = h[t] @ sae.W_enc + sae.b_enc
            bucket = int(position_bucket(batch.pos[b : b + 1, t : t + 1]))
            u[: sae.n_temporal] += gate * (context @ sae.W_C + sae.U @ sae.V[:, bucket])
            theta = torch.where(torch.arange(LATENTS) < sae.n_temporal, *sae.sparsity.threshold)
            rows.append(torch.where(u > theta, u, 0.0))
    return torch.stack(rows).view(B, T, LATENTS)


def slow_reconstruction(sae: Relational, f: Tensor, batch: Batch) -> Tensor:
    rows = []
    for b in range(B):
        read = f[b, :, : sae.n_read]
        for t in range(T):
            past = seen(batch, b, t)
            keys = [read[s] @ sae.K_y for s in past]
            y = attended(sae, read[t] @ sae.Q_y, keys, [read[s] @ sae.E_y for s in past])
            said = torch.sigmoid(sae.gamma) * (y @ sae.W_O) if isinstance(y, Tensor) else 0.0
            rows.append(f[b, t] @ sae.W_dec + sae.b_dec + said)
    return torch.stack(rows).view(B, T, D)


@pytest.mark.parametrize("attention", ["masked", "prefix", "softmax"])
@pytest.mark.parametrize("reads", ["temporal", "all"])
def test_codes_and_reconstruction_agree_with_a_slow_loop(reads: str, attention: str) -> None:
    sae, batch = new(decoder_reads=reads, attention=attention), packed(randn(B, T, D))
    codes = sae.codes(batch)
    valid = batch.valid[..., None]  # an invalid place has codes of its own that nobody reads; h is 0 there
    assert torch.allclose(codes * valid, slow_codes(sae, batch) * valid, atol=1e-4)
    assert (codes[..., : sae.n_temporal] > 0).any()
    assert torch.allclose(sae.reconstruct(codes, batch), slow_reconstruction(sae, codes, batch), atol=1e-4)


def test_lags_read_the_past_by_a_filter() -> None:
    sae, batch = new(memory="lags", context_as="input", no_gate=True, no_position=True), packed(randn(B, T, D))
    sae.Q_y.copy_(randn(*sae.Q_y.shape, seed=30))
    f, h = sae.codes(batch), batch.x - sae.b_dec
    got, term = sae.reconstruct(f, batch), terms_of(sae, batch).dense()["attention"]
    for b in range(B):
        for t in range(T):
            context, filtered = torch.zeros(64), torch.zeros(32)
            for s in seen(batch, b, t, span=16):
                context += sae.L_V[t - s - 1] * (h[b, s] @ sae.W_V)
                filtered += sae.L_y[t - s - 1] * (f[b, s, : sae.n_read] @ sae.E_y)
            expected = context @ sae.W_B @ sae.W_enc[:, : sae.n_temporal]
            assert torch.allclose(term[b, t], expected, atol=1e-4)
            y = feature_map(f[b, t, : sae.n_read] @ sae.Q_y) * filtered
            assert torch.allclose(got[b, t], f[b, t] @ sae.W_dec + sae.b_dec + y @ sae.W_O, atol=1e-4)


def test_training_reconstructs_as_inference_does_from_the_same_codes() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    output = sae.training_pass(batch, CLOCK)
    assert torch.allclose(sae.reconstruct(output.latents, batch), output.reconstruction, atol=1e-6)
    assert not torch.equal(output.latents @ sae.W_dec + sae.b_dec, output.reconstruction)


def test_each_group_has_its_own_budget() -> None:
    output = new().training_pass(packed(randn(B, T, D)), CLOCK)
    n = int(packed(randn(B, T, D)).valid.sum())
    assert int((output.latents[..., :5] > 0).sum()) == round(K / 4 * n)
    assert int((output.latents[..., 5:] > 0).sum()) == round(3 * K / 4 * n)


def test_stored_codes_decode_to_what_forward_gives() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    sae.scale.fill_(0.37)
    codes = sae.encode(batch).clone()
    assert torch.equal(sae.decode(codes, batch.with_x(torch.full_like(batch.x, torch.nan))), sae(batch))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "prefix"},
        {"attention": "softmax"},
        {"memory": "lags"},
        {"memory": "lags", "context_as": "input"},
    ],
)
def test_nothing_comes_from_the_future_or_from_other_documents(options: dict[str, str]) -> None:
    sae, x = new(**options), randn(B, T, D)
    changes = {
        "future": (slice(None), slice(12, None), slice(None), slice(0, 12)),
        "other document": (0, slice(0, 5), 0, slice(5, None)),
        "next document": (1, slice(9, None), 1, slice(0, 9)),
        "invalid place": (2, slice(0, 1), 2, slice(1, None)),
        "other window": (0, slice(None), slice(1, None), slice(None)),
    }
    # prefix sums hold, and take away again, what lies before the document: equal to rounding, not to the bit
    tolerance = 1e-5 if options.get("attention") == "prefix" else 0.0
    codes, decoded = sae.encode(packed(x)), sae(packed(x))
    for name, (rows, places, kept_rows, kept) in changes.items():
        moved = x.clone()
        moved[rows, places] += 3
        assert (sae.encode(packed(moved)) - codes)[kept_rows, kept].abs().max() <= tolerance, name
        assert (sae(packed(moved)) - decoded)[kept_rows, kept].abs().max() <= tolerance, name
        # decode alone: other codes there, the same ones here
        other = codes.clone()
        other[rows, places] += 1
        shifted = sae.decode(other, packed(x))
        assert (shifted - decoded)[kept_rows, kept].abs().max() <= tolerance, name


def test_the_past_is_read_up_to_the_span() -> None:
    sae, x = new(), randn(B, T, D)
    moved = x.clone()
    moved[2, 3] += 3
    difference = [sae.groups_of_u(packed(value))[0] for value in (x, moved)]
    reached = (difference[0] - difference[1])[2].abs().sum(-1)
    assert (reached[4 : 4 + SPAN] > 0).all()
    assert reached[4 + SPAN :].max() == 0
    codes = sae.encode(packed(x))
    more = codes.clone()
    more[2, 3, 0] += 1
    reached = (sae.decode(more, packed(x)) - sae.decode(codes, packed(x)))[2].abs().sum(-1)
    assert (reached[4 : 4 + SPAN] > 0).all()
    assert reached[4 + SPAN :].max() == 0


def test_rows_have_neither_past_nor_position() -> None:
    sae, x = new(), randn(7, D)
    u = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    theta = torch.where(torch.arange(LATENTS) < 5, *sae.sparsity.threshold)
    assert torch.allclose(sae.encode(x), u * (u > theta), atol=1e-6)
    assert torch.allclose(sae(x), sae.encode(x) @ sae.W_dec + sae.b_dec, atol=1e-6)


def test_span_and_rates_are_functions_of_the_share_done() -> None:
    for n_steps in (100, 20_000):
        sae = new(span=64)
        spans, rates = {}, {}
        for percent in (0, 9, 10, 20, 35, 37, 40, 50, 99):
            clock = Clock(percent * n_steps // 100, n_steps, 1)
            spans[percent], rates[percent] = sae.span_at(clock), sae.rates(clock)[1]
        assert spans == {0: 4, 9: 4, 10: 8, 20: 16, 35: 32, 37: 32, 40: 32, 50: 64, 99: 64}
        # warm-up: 5 of 100 steps; of 20,000 steps 500, which is 2.5 %
        part = 0.5 + 0.5 * (2 / (5 if n_steps == 100 else 2.5))
        expected = {0: 1, 9: 1, 10: 0.5, 20: 0.5, 35: 0.5, 37: part, 40: 1, 50: 0.5, 99: 1}
        assert rates == pytest.approx(expected)
    assert new(span=64, no_curriculum=True).span_at(Clock(0, 100, 1)) == 64
    assert new(temporal_lr=2.0).rates(Clock(99, 100, 1)) == (1.0, 2.0)


@pytest.mark.parametrize("options", [{}, {"position_gate": True}, {"memory": "lags", "context_as": "input"}])
def test_every_temporal_weight_has_the_rate_of_its_own(options: dict[str, Any]) -> None:
    names = {name for name, _ in new(**options).named_parameters()}
    assert names - set(Relational.own_rate) == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_inference_uses_the_span_trained_last(tmp_path: Any) -> None:
    sae, batch = new(span=8), packed(randn(B, T, D))
    sae.training_pass(batch, Clock(25, 100, B * T))
    assert int(sae.span) == sae.inner_figures()["span"] == 2
    save_sae(sae, tmp_path / "sae", {})
    assert torch.equal(load_sae(tmp_path).encode(batch), sae.encode(batch))
    sae.training_pass(batch, Clock(99, 100, B * T))
    assert int(sae.span) == 8


def test_plain_is_batchtopk() -> None:
    options = {"d_sae": LATENTS, "k": K, "window": T}
    learners = [
        learner_of(make_sae(name, options | extra, D, 0, "test"), 30)
        for name, extra in (("batchtopk", {}), ("relational", dict(Relational.plain or {})))
    ]
    for step in range(30):
        for learner in learners:
            learner.train_step(packed(randn(B, T, D, seed=step)), B * T)
    ours, theirs = (learner.sae.state_dict() for learner in learners)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "tokens_silent"):
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(learners[0].tally.last_loss, learners[1].tally.last_loss)
    assert torch.equal(theirs["sparsity.threshold"], ours["sparsity.threshold"].expand(2))


SWITCHES = [{name: True} for name in ("no_position", "no_attention", "no_gate", "no_dec_temporal", "joint")]


OTHERS = [{"memory": "lags"}, {"attention": "softmax"}, {"context_as": "input"}, {"temporal_share": 1.0}]


@pytest.mark.parametrize("switch", [*SWITCHES, *OTHERS])
def test_each_switch_changes_the_result_and_still_trains(switch: dict[str, Any]) -> None:
    results = []
    for options in ({}, switch):
        learner = learner_of(make_sae("relational", {"d_sae": LATENTS, "k": K, "window": T} | options, D, 0, "t"), 6)
        for step in range(6):
            learner.train_step(packed(randn(B, T, D, seed=step)), B * T)
        results.append(float(learner.tally.last_loss))
    assert all(math.isfinite(result) for result in results)
    assert results[0] != results[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"no_gate": True, "gate_penalty": 0.1}, "gate_penalty has no gate to act on"),
        ({"no_attention": True, "no_position": True, "gate_penalty": 0.1}, "gate_penalty has no gate to act on"),
        ({"no_gate": True, "gate_bias": 0.0}, "gate_bias has no gate to act on"),
        ({"no_position": True, "prune_positions": 0.001}, "which no_position leaves out"),
        ({"no_position": True, "position_gate": True}, "which no_position leaves out"),
        ({"memory": "lags", "attention": "softmax"}, "softmax has no attention to act on"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        new(**options)


def test_the_gate_starts_where_it_is_told_to() -> None:
    gates = [float(new(gate_bias=bias).b_gate.sigmoid()) for bias in (-2.0, 0.0)]
    assert gates == pytest.approx([1 / (1 + math.exp(2)), 0.5])
    assert float(new().b_gate) == -2.0


def test_gate_penalty_is_the_mean_gate_of_valid_places() -> None:
    sae, batch = new(gate_penalty=0.5), packed(randn(B, T, D))
    gate = terms_of(sae, batch, CLOCK).gate[batch.valid]
    part = sae.training_pass(batch, CLOCK).parts["gate"]
    assert float(part) == pytest.approx(0.5 * float(gate.mean()), rel=1e-5)


def test_measured_terms_are_ratios_of_norms() -> None:
    sae, batch = new(), packed(randn(B, T, D))
    terms, extra = terms_of(sae, batch, CLOCK).dense(), sae.training_pass(batch, CLOCK).extra
    static = ((batch.x - sae.b_dec) @ sae.W_enc + sae.b_enc)[..., :5][batch.valid]
    for name in ("attention", "position"):
        ratio = float(terms[name][batch.valid].norm() / static.norm())
        assert float(extra[f"{name}_ratio"]) == pytest.approx(ratio, rel=1e-4)


def test_what_only_the_past_says_is_used() -> None:
    # one document of one constant direction per window, and noise: with k = 1 of the noise's size the past helps
    options = {"d_sae": 16, "k": 2, "window": 16, "span": 16, "decoder_reads": "all", "aux_alpha": 0.0}
    sae = make_sae("relational", options, 8, 0, "test")
    learner = learner_of(sae, 300)
    for step in range(300):
        constant = torch.eye(4)[torch.randint(4, (16,), generator=torch.Generator().manual_seed(step))]
        noise = torch.eye(4)[torch.randint(4, (16, 16), generator=torch.Generator().manual_seed(step + 1000))]
        extra = torch.eye(4)[torch.randint(4, (16, 16), generator=torch.Generator().manual_seed(step + 2000))]
        x = torch.cat([constant[:, None].expand(16, 16, 4), noise + extra], dim=-1) / 3**0.5
        learner.train_step(Batch.of(x), 256)
    output = sae.requires_grad_(False).training_pass(Batch.of(x), Clock(299, 300, 256))
    assert float(output.parts["reconstruction"]) < 0.8 * float(output.extra["error_without_past"])
