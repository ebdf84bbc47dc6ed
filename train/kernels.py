"""Triton kernels for a sparse step on a GPU: rows of CSR times dense, sampled products, and the k largest of each row.

No atomics: every sum is taken by one program in a fixed order, so that a resumed run repeats it to the bit. Tested in
Triton's interpreter on a CPU; not yet run on a GPU, and chosen there only by `--kernels sparse` (docs/log.md).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 256  # dimensions that a program holds at once
BLOCK_E = 16  # kept entries that it reads at once
BLOCK_L = 4096  # pre-activations that the selection reads at once
OPTIONS = {"enable_fp_fusion": True}  # a product and a sum in one instruction; Triton 3.9 warns where it is not said


def csr_times(first: Tensor, column: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """[R, C] in CSR · [C, D] -> [R, D], float32; entries of row r are first[r] to first[r + 1]."""
    n_rows, width = len(first) - 1, dense.shape[1]
    out = torch.empty(n_rows, width, device=dense.device, dtype=torch.float32)
    if out.numel():
        grid = (n_rows, triton.cdiv(width, BLOCK_D))
        blocks = {"BLOCK_D": BLOCK_D, "BLOCK_E": BLOCK_E}
        _times[grid](first, column, values, dense.contiguous(), out, width, **blocks, **OPTIONS)
    return out


def csr_sampled(first: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[r] · right[c] for each entry (r, c) of CSR: [R, D], [C, D] -> [entries], float32."""
    out = torch.empty(len(column), device=left.device, dtype=torch.float32)
    if len(column):
        tensors = (first, column, left.contiguous(), right.contiguous(), out)
        blocks = {"BLOCK_D": BLOCK_D, "BLOCK_E": BLOCK_E}
        _sampled[(len(first) - 1,)](*tensors, left.shape[1], **blocks, **OPTIONS)
    return out


def row_top_k(u: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row: float32 [N, L] -> int64 [N, k], in no particular order.

    Among equal values the first ones are taken. A radix selection: four passes over a row find the k-th largest key, a
    byte at a time from the top, and a fifth writes the places.
    """
    out = torch.empty(len(u), k, device=u.device, dtype=torch.int64)
    if out.numel():
        _top_k[(len(u),)](u.contiguous(), out, u.shape[1], k, BLOCK_L=BLOCK_L, **OPTIONS)
    return out


@triton.jit
def _times(first, column, values, dense, out, width, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, stop = tl.load(first + row), tl.load(first + row + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(start, stop, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        there = entry < stop
        c = tl.load(column + entry, mask=there, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & (d < width)[None, :]
        rows = tl.load(dense + c[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * rows, axis=0)
    tl.store(out + row * width + d, total, mask=d < width)


@triton.jit
def _sampled(first, column, left, right, out, width, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first + row), tl.load(first + row + 1)
    for begin in range(start, stop, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        there = entry < stop
        c = tl.load(column + entry, mask=there, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_E], tl.float32)
        for low in range(0, width, BLOCK_D):
            d = low + tl.arange(0, BLOCK_D)
            ours = tl.load(left + row * width + d, mask=d < width, other=0.0).to(tl.float32)
            mask = there[:, None] & (d < width)[None, :]
            theirs = tl.load(right + c[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(ours[None, :] * theirs, axis=1)
        tl.store(out + entry, total, mask=there)


@triton.jit
def _keys(values):
    """uint32 in the order of the float32 values: sign bit turned for those above 0, all bits for the others."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _top_k(u, out, n_latents, k, BLOCK_L: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = u + row * n_latents
    bins = tl.arange(0, 256)
    prefix = tl.zeros([1], tl.uint32)  # the top bytes of the k-th largest key, as far as they are known
    wanted = tl.zeros([1], tl.int32) + k  # how many of the keys with that prefix are kept
    for byte in tl.static_range(4):
        shift = 24 - 8 * byte
        counts = tl.zeros([256], tl.int32)
        for low in range(0, n_latents, BLOCK_L):
            place = low + tl.arange(0, BLOCK_L)
            keys = _keys(tl.load(base + place, mask=place < n_latents, other=0.0))
            alike = (place < n_latents) & ((keys >> shift >> 8) == (prefix >> shift >> 8))
            digit = tl.where(alike, (keys >> shift) & 255, 0).to(tl.int32)
            strangers = BLOCK_L - tl.sum(alike.to(tl.int32))  # counted in bin 0 and taken out again
            counts += tl.histogram(digit, 256) - tl.where(bins == 0, strangers, 0)
        at_least = tl.cumsum(counts, reverse=True)
        chosen = tl.sum((at_least >= wanted).to(tl.int32)) - 1
        wanted -= tl.sum(tl.where(bins == chosen, at_least - counts, 0))
        prefix |= chosen.to(tl.uint32) << shift
    n_above = tl.zeros([1], tl.int32)
    n_equal = k - wanted
    for low in range(0, n_latents, BLOCK_L):
        place = low + tl.arange(0, BLOCK_L)
        there = place < n_latents
        keys = _keys(tl.load(base + place, mask=there, other=0.0))
        above, equal = there & (keys > prefix), there & (keys == prefix)
        to_above = n_above + tl.cumsum(above.to(tl.int32)) - 1
        to_equal = n_equal + tl.cumsum(equal.to(tl.int32)) - 1
        tl.store(out + row * k + to_above, place.to(tl.int64), mask=above)
        tl.store(out + row * k + to_equal, place.to(tl.int64), mask=equal & (to_equal < k))
        n_above += tl.sum(above.to(tl.int32))
        n_equal += tl.sum(equal.to(tl.int32))
