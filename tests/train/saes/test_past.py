"""Looking back: both attentions and the lag filter against loops, and nothing from where it must not come."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train.data.batch import Batch
from train.saes.past import (
    document_runs,
    feature_map,
    lagged,
    masked_attention,
    past_mask,
    prefix_attention,
    softmax_attention,
)

B, T, H, R, V = 3, 40, 2, 4, 3
Attention = Callable[[Tensor, Tensor, Tensor, Batch, int], Tensor]


def restarted(q: Tensor, k: Tensor, v: Tensor, batch: Batch, span: int) -> Tensor:
    """Prefix sums over blocks of 16, so that 40 places make two and a half."""
    return prefix_attention(q, k, v, batch, span, restart=16)


both = pytest.mark.parametrize("attention", [masked_attention, restarted])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(last: int = 1) -> Batch:
    """Documents change at 11 and 13; in row 1 everywhere, row 2 is one document; some places are invalid."""
    doc = torch.zeros(B, T, dtype=torch.int32)
    doc[0, 11:], doc[0, 13:] = 1, last
    doc[1] = torch.arange(T)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 5] = valid[0, 20] = valid[2, 0] = valid[2, 17] = False
    return Batch.of(randn(B, T, 2), doc=doc, valid=valid)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k = (feature_map(randn(B, T, H, R, seed=seed)) for seed in (1, 2))
    return q, k, randn(B, T, H, V, seed=3)


def seen(batch: Batch, b: int, t: int, span: int) -> list[int]:
    """The places t may look back on: back one by one, up to another document."""
    places = []
    for s in range(t - 1, max(t - span, 0) - 1, -1):
        if batch.doc[b, s] != batch.doc[b, t]:
            break
        if batch.valid[b, s] and batch.valid[b, t]:
            places.append(s)
    return places


def slow_attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, span: int) -> Tensor:
    out = torch.zeros(B, T, H, V)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                weights = {s: float(q[b, t, h] @ k[b, s, h]) for s in seen(batch, b, t, span)}
                for s, weight in weights.items():
                    out[b, t, h] += weight * v[b, s, h] / sum(weights.values())
    return out


@both
@pytest.mark.parametrize("span", [1, 3, 16])
def test_attention_agrees_with_a_slow_loop(attention: Attention, span: int) -> None:
    batch, (q, k, v) = packed(), inputs()
    # float32 over at most 16 products; the loop leaves out the 1e-6 in the denominator, where sums are above .01
    assert torch.allclose(attention(q, k, v, batch, span), slow_attention(q, k, v, batch, span), atol=1e-4)


@pytest.mark.parametrize("span", [1, 3, 16])
def test_softmax_attention_agrees_with_a_slow_loop(span: int) -> None:
    batch = packed()
    q, k, v = randn(B, T, H, R, seed=1), randn(B, T, H, R, seed=2), randn(B, T, H, V, seed=3)
    got = softmax_attention(q, k, v, batch, span)
    for b in range(B):
        for t in range(T):
            places = seen(batch, b, t, span)
            for h in range(H):
                raised = [math.exp(float(q[b, t, h] @ k[b, s, h]) / 2) for s in places]  # √R = 2
                rows = [weight * v[b, s, h] for weight, s in zip(raised, places, strict=True)]
                expected = torch.stack(rows).sum(0) / sum(raised) if rows else torch.zeros(V)
                assert torch.allclose(got[b, t, h], expected, atol=1e-6)


def test_softmax_attention_can_look_at_one_place_and_its_gradients_are_finite() -> None:
    batch, v = packed(), randn(B, T, H, V, seed=3)
    q = torch.full((B, T, H, R), 30.0, requires_grad=True)
    k = torch.full((B, T, H, R), 30.0)
    k[2, 30] = 60.0  # far above the others: 1800 / √R apart
    got = softmax_attention(q, k, v, batch, 16)
    assert torch.allclose(got[2, 31:], v[2, 30].expand(T - 31, H, V), atol=1e-6)
    assert got[1].abs().max() == 0.0  # every place is a document of its own
    got.square().sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_softmax_attention_is_float32_under_autocast() -> None:
    batch, (q, k, v) = packed(), inputs()
    exact = softmax_attention(q, k, v, batch, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(softmax_attention(q, k, v, batch, 16), exact)


def test_a_document_that_comes_back_is_another_one() -> None:
    batch = packed(last=0)
    assert document_runs(batch)[0, [0, 10, 11, 12, 13]].tolist() == [0, 0, 1, 1, 2]
    q, k, v = inputs()
    assert torch.allclose(masked_attention(q, k, v, batch, 16), restarted(q, k, v, batch, 16), atol=1e-5)
    assert not past_mask(batch, 16)[0, 13].any()


@pytest.mark.parametrize("span", [4, 64, 256])
def test_attentions_agree_over_long_windows_with_gradients(span: int) -> None:
    n = 600
    doc = (torch.arange(n) // 250).to(torch.int32)[None]
    batch = Batch.of(randn(1, n, 2), doc=doc, valid=torch.arange(n)[None] % 7 != 3)
    values = [feature_map(randn(1, n, 4, 16, seed=1)), feature_map(randn(1, n, 4, 16, seed=2)), randn(1, n, 4, 16)]
    leaves = [value.detach().requires_grad_() for value in values]
    weight = randn(1, n, 4, 16, seed=5)
    results = []
    for attention in (masked_attention, prefix_attention):
        out = attention(*leaves, batch, torch.tensor(span))
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-4  # spec §6


@pytest.mark.parametrize("attention", [masked_attention, restarted, softmax_attention])
def test_attention_of_a_single_place_is_zero(attention: Attention) -> None:
    ones = torch.ones(5, 1, 1, 1)
    assert attention(ones, ones, ones, Batch.of(ones[..., 0]), 4).abs().max() == 0.0


def test_lag_filter_agrees_with_a_slow_loop() -> None:
    batch, values, weights = packed(), randn(B, T, R, seed=1), randn(6, R, seed=2)
    expected = torch.zeros(B, T, R)
    for b in range(B):
        for t in range(T):
            for s in seen(batch, b, t, 6):
                expected[b, t] += weights[t - s - 1] * values[b, s]
    assert torch.allclose(lagged(values, weights, batch), expected, atol=1e-5)


def test_lag_filter_by_hand() -> None:
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0])[None, :, None]
    got = lagged(values, torch.tensor([[1.0], [0.5]]), Batch.of(values))
    assert got.flatten().tolist() == [0.0, 1.0, 10.5, 105.0]


def test_lag_filter_is_float32_under_autocast() -> None:
    batch, values, weights = packed(), randn(B, T, R, seed=1), randn(6, R, seed=2)
    exact = lagged(values, weights, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lagged(values, weights, batch), exact)
