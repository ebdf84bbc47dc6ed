"""Looking back inside a window, for the temporal variants: strictly causal, inside one document, valid places only.

Windowed attention, per head, over S_t = {s: t − span ≤ s < t, same document, both valid}; 0 where S_t is empty:

    linear    c_t = Σ_{s∈S_t} (q_t·k_s) v_s / (Σ_{s∈S_t} q_t·k_s + 1e-6)          q, k ≥ 0: after `feature_map`
    softmax   c_t = Σ_{s∈S_t} softmax_s(q_t·k_s / √R) v_s

The linear one in two ways that agree: a masked product, simple and quick up to a few hundred places, and prefix sums of
k_s ⊗ v_s, whose cost does not grow with the span. All in float32. B batch, T window, H heads, R rank, V value.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.data.batch import Batch

EPSILON = 1e-6
RESTART = 256  # places after which prefix sums start anew: their difference loses digits as they grow

Span = int | Int[Tensor, ""]
"""Places looked back on: a number, or a tensor on the device so that nothing waits for it."""


def document_runs(batch: Batch) -> Int[Tensor, "B T"]:
    """Number of the document within its window, from 0: a document that comes back later is another one."""
    changes = batch.doc[:, 1:] != batch.doc[:, :-1]
    return nn.functional.pad(changes.long().cumsum(-1), (1, 0))


def past_mask(batch: Batch, span: Span) -> Bool[Tensor, "B T T"]:
    """[b, t, s]: whether t may see s."""
    runs = document_runs(batch)
    places = torch.arange(runs.shape[1], device=runs.device)
    back = places[:, None] - places
    near = (back > 0) & (back <= span)
    return near & (runs[:, :, None] == runs[:, None]) & batch.valid[:, :, None] & batch.valid[:, None]


def feature_map(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """φ = elu + 1, positive, in float32."""
    return nn.functional.elu(values.float()) + 1


def masked_attention(
    q: Float[Tensor, "B T H R"], k: Float[Tensor, "B T H R"], v: Float[Tensor, "B T H V"], batch: Batch, span: Span
) -> Float[Tensor, "B T H V"]:
    """The formula as it stands, with all pairs of places: the reference."""
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bthr,bshr->bhts", q.float(), k.float()) * past_mask(batch, span)[:, None]
        total = scores.sum(-1).transpose(1, 2)[..., None]
        return torch.einsum("bhts,bshv->bthv", scores, v.float()) / (total + EPSILON)


def softmax_attention(
    q: Float[Tensor, "B T H R"], k: Float[Tensor, "B T H R"], v: Float[Tensor, "B T H V"], batch: Batch, span: Span
) -> Float[Tensor, "B T H V"]:
    """Weights that can be as sharp as one place: what the linear form is cheaper than."""
    with torch.autocast(q.device.type, enabled=False):
        seen = past_mask(batch, span)[:, None]
        scores = torch.einsum("bthr,bshr->bhts", q.float(), k.float()) / q.shape[-1] ** 0.5
        # where nothing is seen all are alike, and then 0: a softmax of nothing but −∞ would be NaN
        shown = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
        return torch.einsum("bhts,bshv->bthv", shown.softmax(-1) * seen, v.float())


def prefix_attention(
    q: Float[Tensor, "B T H R"],
    k: Float[Tensor, "B T H R"],
    v: Float[Tensor, "B T H V"],
    batch: Batch,
    span: Span,
    restart: int = RESTART,
) -> Float[Tensor, "B T H V"]:
    """The same from prefix sums, restarted every `restart` ≥ span places."""
    n = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        ones = torch.ones_like(v[..., :1])
        pairs = k.float()[..., None] * torch.cat([v, ones], dim=-1).float()[..., None, :]
        pairs = torch.where(batch.valid[..., None, None, None], pairs, 0.0)
        blocks = nn.functional.pad(pairs, (0, 0) * 3 + (0, -n % restart)).unflatten(1, (-1, restart))
        sums = nn.functional.pad(blocks.cumsum(2), (0, 0) * 3 + (1, 0))
        totals, before = sums[:, :, -1], sums[:, :, :-1].flatten(1, 2)[:, :n]  # before: without the place itself
        first = _first_place(batch, span)
        places = torch.arange(n, device=q.device)
        earlier = nn.functional.pad(totals, (0, 0) * 3 + (1, 0))[:, places // restart]  # the block before, if any
        crossing = (first // restart != places // restart)[..., None, None, None]
        start = before[torch.arange(len(q), device=q.device)[:, None], first]
        # an empty window's sums cancel, but their gradients, times 1 / EPSILON, would only do so up to rounding
        empty = ~_sees_something(batch, first)[..., None, None, None]
        seen = torch.where(empty, 0.0, before - start + torch.where(crossing, earlier, 0.0))
        weighted = torch.einsum("bthr,bthrv->bthv", q.float(), seen)
        return weighted[..., :-1] / (weighted[..., -1:] + EPSILON)


def _first_place(batch: Batch, span: Span) -> Int[Tensor, "B T"]:
    """First place of each place's window: `span` back, or where its document begins."""
    places = torch.arange(batch.doc.shape[1], device=batch.doc.device)
    begins = nn.functional.pad(batch.doc[:, 1:] != batch.doc[:, :-1], (1, 0))
    return torch.maximum(torch.where(begins, places, 0).cummax(-1).values, places - span)


def _sees_something(batch: Batch, first: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Whether a valid place has a valid one in its window."""
    n_before = nn.functional.pad(batch.valid.long().cumsum(-1), (1, 0))[:, :-1]
    return batch.valid & (n_before > n_before.gather(-1, first))


def lagged(values: Float[Tensor, "B T R"], weights: Float[Tensor, "K R"], batch: Batch) -> Float[Tensor, "B T R"]:
    """Σ_j weights[j − 1] ⊙ values_{t−j} over lags j = 1 … K: a causal filter per column."""
    n_lags = len(weights)
    kept = torch.where(batch.valid[..., None], values.float(), 0.0)
    past = nn.functional.pad(kept, (0, 0, n_lags, 0)).unfold(1, n_lags, 1)[:, :-1]  # lags K … 1
    runs = document_runs(batch)
    same = nn.functional.pad(runs, (n_lags, 0), value=-1).unfold(1, n_lags, 1)[:, :-1] == runs[..., None]
    seen = torch.where((same & batch.valid[..., None])[:, :, None], past, 0.0)
    with torch.autocast(values.device.type, enabled=False):
        return torch.einsum("btrk,kr->btr", seen, weights.flip(0).float())
