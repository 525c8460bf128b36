"""What adapters drop, made where it is used: their inputs, and the gradients of these."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graft.model.dropout import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)
_TILE = 8, 512, 4  # rows, columns, warps
_BACK_TILE = 64, 128, 32, 8  # rows, columns, of the rank at once at most, warps


@triton.jit
def kept(seed, threshold, rows, start, columns: tl.constexpr):
    """dropout.kept() of these rows, int64, and of the columns from `start` on, both multiples of 8."""
    row, column = rows.to(tl.uint32)[:, None], (start // 8 + tl.arange(0, columns // 8)).to(tl.uint32)[None, :]
    zero = row * 0 + column * 0
    a, b, c, d = tl.philox(tl.load(seed), column + zero, row + zero, zero, zero, _ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


def dropped(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """dropout.dropped() of x [t, h], each of whose rows lies in memory in order."""
    t, h = x.shape
    out = x.new_empty(t, h)
    rows, columns, warps = _TILE
    _dropped[(triton.cdiv(t, rows), triton.cdiv(h, columns))](x, seed, out, x.stride(0), t, h, threshold, rows, columns, num_warps=warps)
    return out


@triton.jit(do_not_specialize_on_alignment=["seed"])
def _dropped(x, seed, out, stride, t, h, threshold: tl.constexpr, of_t: tl.constexpr, of_h: tl.constexpr):
    rows = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64)
    start = tl.program_id(1) * of_h
    columns = start + tl.arange(0, of_h)
    inside = (rows[:, None] < t) & (columns[None, :] < h)
    value = tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    tl.store(out + rows[:, None] * h + columns[None, :], tl.where(kept(seed, threshold, rows, start, of_h), value, 0.0), mask=inside)


def add_back_(dx: Tensor, du: Tensor, a: Tensor, seeds: Tensor, threshold: int) -> None:
    """dropout.add_back_() to dx [t, h], each of whose rows lies in memory in order; those of du and a one behind the other."""
    (t, h), layers = dx.shape, len(seeds)
    r = len(a) // layers
    rows, columns, most, warps = _BACK_TILE
    of_r = min(most, max(16, triton.next_power_of_2(r)))
    grid = triton.cdiv(t, rows), triton.cdiv(h, columns)
    _add_back[grid](dx, du, a, seeds, dx.stride(0), t, h, r, layers, threshold, of_r, rows, columns, num_warps=warps)


@triton.jit(do_not_specialize_on_alignment=["seeds"])
def _add_back(
    dx, du, a, seeds, stride, t, h,
    r: tl.constexpr, layers: tl.constexpr, threshold: tl.constexpr, of_r: tl.constexpr, of_t: tl.constexpr, of_h: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64)
    start = tl.program_id(1) * of_h
    columns, k = start + tl.arange(0, of_h), tl.arange(0, of_r)
    inside = (rows[:, None] < t) & (columns[None, :] < h)
    at = rows[:, None] * stride + columns[None, :]
    value = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
    for n in range(layers):
        product = tl.zeros((of_t, of_h), tl.float32)
        for first in range(0, r, of_r):
            some = first + k
            part = tl.load(du + rows[:, None] * (layers * r) + n * r + some[None, :], mask=(rows[:, None] < t) & (some[None, :] < r), other=0.0)
            of_a = tl.load(a + (n * r + some[:, None]) * h + columns[None, :], mask=(some[:, None] < r) & (columns[None, :] < h), other=0.0)
            product = tl.dot(part, of_a, product, input_precision="ieee")
        value += tl.where(kept(seeds + n, threshold, rows, start, of_h), product, 0.0)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
