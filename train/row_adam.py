"""Triton kernels that take Adam's step on matrices of unit rows in one pass: projection, clipping, Adam, unit norm.

The stock way goes over such a matrix, its gradient and its averages four times. A program holds one row. Tested in
Triton's interpreter on a CPU; not yet run on a GPU, and chosen there only by `--kernels sparse` (docs/log.md).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels import OPTIONS

WIDEST = 8192  # dimensions of a row that a program can hold, with those of its gradient and averages


def projected_squares(weight: Tensor, gradient: Tensor) -> Tensor:
    """‖g − (g·w) w‖² of each row: [L, d], [L, d] -> [L], all float32, unit rows w."""
    out = torch.empty(len(weight), device=weight.device, dtype=torch.float32)
    if weight.numel():
        _squares[(len(weight),)](weight, gradient.contiguous(), out, weight.shape[1], **_shape(weight))
    return out


def step_rows_(
    weight: Tensor,
    gradient: Tensor,
    averages: tuple[Tensor, Tensor],
    scale: Tensor,
    factors: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam's step on unit rows [L, d], which are unit rows after it too; the averages move with it.

    Args:
        averages: of the gradient and of its square, [L, d].
        scale: factor on the projected gradient, a scalar on the device.
        factors: 1 − βⁿ of both averages in the n-th step, and the learning rate, [3] on the device.
    """
    if weight.numel():
        rates = (1 - betas[0], 1 - betas[1])  # here, in double precision: 1 − .999 in float32 is off by 1e-5
        tensors = (weight, gradient.contiguous(), *averages, scale, factors)
        _step[(len(weight),)](*tensors, *rates, eps, weight.shape[1], **_shape(weight))


def _shape(weight: Tensor) -> dict[str, int]:
    """The block that holds a row, and warps such that a thread has at most 16 entries of it."""
    block = triton.next_power_of_2(weight.shape[1])
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)} | OPTIONS


@triton.jit
def _projected(weight, gradient, place, there):
    """A row, and its gradient without what lies along it."""
    w = tl.load(weight + place, mask=there, other=0.0)
    g = tl.load(gradient + place, mask=there, other=0.0)
    return w, g - tl.sum(g * w) * w


@triton.jit
def _squares(weight, gradient, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    _, g = _projected(weight, gradient, row * width + d, d < width)
    tl.store(out + row, tl.sum(g * g))


@triton.jit
def _step(weight, gradient, average, square, scale, factors, rate_1, rate_2, eps, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    place, there = row * width + d, d < width
    w, g = _projected(weight, gradient, place, there)
    g *= tl.load(scale)
    m = tl.load(average + place, mask=there, other=0.0)
    v = tl.load(square + place, mask=there, other=0.0)
    m += rate_1 * (g - m)
    v += rate_2 * (g * g - v)
    tl.store(average + place, m, mask=there)
    tl.store(square + place, v, mask=there)
    size = tl.load(factors + 2) / tl.load(factors)
    w -= size * m / (tl.sqrt_rn(v) / tl.sqrt_rn(tl.load(factors + 1)) + eps)
    w /= tl.maximum(tl.sqrt_rn(tl.sum(w * w)), 1e-12)
    tl.store(weight + place, w, mask=there)
