"""RMS norm with what follows it, its gradient with what flows past it, and a residual with its adapter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graft.model.dropout import Drop, down_product
from graft.model.kernels.shared import loading_ahead

LARGEST = tl.constexpr(448.0)  # of e4m3
_BACKWARD_TILE = 64, 128, 8, 3  # rows, columns, warps, loads ahead
_ADD_TILE = 64, 256, 4  # rows, columns, warps


def norm(
    x: Tensor, weight: Tensor, eps: float, a: Tensor | None, scale: float, fp8: bool, drop: Drop | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    """elementwise.norm() of x [t, h] whose rows lie in memory in order: u is made of x, and of its rstd afterwards."""
    t, h = x.shape
    out = torch.empty(t, h, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    scales = torch.empty(t, 1, dtype=torch.float32, device=x.device) if fp8 else None
    rstd = torch.empty(t, dtype=torch.float32, device=x.device)
    u = x.new_empty(t, 0) if a is None else down_product(x, a * weight, drop)
    widths = triton.next_power_of_2(h), triton.next_power_of_2(max(1, u.shape[1]))
    _norm[(t,)](x, weight, out, rstd if scales is None else scales, rstd, u, u.shape[1], eps, scale, h, a is not None, fp8, *widths, num_warps=4)
    return out if scales is None else (out, scales), rstd, u


@triton.jit
def _norm(
    x, weight, out, scales, rstd, u, rank, eps, of_u,
    h: tl.constexpr, adapted: tl.constexpr, fp8: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, k = tl.arange(0, block), tl.arange(0, width)
    value = tl.load(x + row * h + at, mask=at < h, other=0.0)
    wide = value.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=0) / h + eps)
    tl.store(rstd + row, r)
    if adapted:
        raw = tl.load(u + row * rank + k, mask=k < rank, other=0.0).to(tl.float32)
        tl.store(u + row * rank + k, (raw * (r * of_u)).to(u.dtype.element_ty), mask=k < rank)
    w = tl.load(weight + at, mask=at < h, other=0.0).to(tl.float32)
    n = ((wide * r).to(value.dtype).to(tl.float32) * w).to(value.dtype)
    if fp8:
        n = n.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(n), axis=0), 1e-12) / LARGEST
        tl.store(scales + row, scale)
        tl.store(out + row * h + at, (n * (1.0 / scale)).to(tl.float8e4nv), mask=at < h)
    else:
        tl.store(out + row * h + at, n, mask=at < h)


def norm_backward(
    dout: Tensor | None, dn: Tensor, du: Tensor, a: Tensor | None, u: Tensor, scale: float, x: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """elementwise.norm_backward(): all rows lie in memory in order, those of dn may lie apart."""
    (t, h), rank = x.shape, du.shape[1]
    dx = torch.empty_like(x)
    rows, columns, warps, most = _BACKWARD_TILE
    width = max(16, triton.next_power_of_2(rank))

    def launch(ahead: int) -> None:
        _norm_backward[(triton.cdiv(t, rows),)](
            *(x if dout is None else dout, dn, du, x if a is None else a, u, x, rstd, weight, dx, t, rank, scale, dn.stride(0)),
            *(h, dout is not None, a is not None, width, rows, columns, ahead),
            num_warps=warps,
        )

    loading_ahead(most, launch, "norm", width, dout is not None)
    return dx


@triton.jit
def _norm_backward(
    dout, dn, du, a, u, x, rstd, weight, dx, t, rank, scale, apart,
    h: tl.constexpr, past: tl.constexpr, adapted: tl.constexpr, width: tl.constexpr, of_t: tl.constexpr, of_h: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64)
    i, k = tl.arange(0, of_h), tl.arange(0, width)
    r = tl.load(rstd + rows, mask=rows < t, other=0.0)[:, None]
    total = tl.zeros((of_t, of_h), tl.float32)
    for start in tl.range(0, h, of_h, num_stages=ahead):
        columns = start + i
        inside = (rows[:, None] < t) & (columns[None, :] < h)
        at = rows[:, None] * h + columns[None, :]
        w = tl.load(weight + columns, mask=columns < h, other=0.0).to(tl.float32)[None, :]
        g = tl.load(dn + rows[:, None] * apart + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += g * w * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1)[:, None] * r
    part = x  # of any type, where there is no adapter
    if adapted:
        fits = (rows[:, None] < t) & (k[None, :] < rank)
        part = tl.load(du + rows[:, None] * rank + k[None, :], mask=fits, other=0.0)
        of_u = tl.load(u + rows[:, None] * rank + k[None, :], mask=fits, other=0.0).to(tl.float32)
        mean += (tl.sum(part.to(tl.float32) * of_u, axis=1) / scale)[:, None]  # du a · n = du · n aᵀ, and that is u
    mean /= h
    for start in tl.range(0, h, of_h, num_stages=ahead):
        columns = start + i
        inside = (rows[:, None] < t) & (columns[None, :] < h)
        at = rows[:, None] * h + columns[None, :]
        g = tl.load(dn + rows[:, None] * apart + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if adapted:
            holds = (k[:, None] < rank) & (columns[None, :] < h)
            g = tl.dot(part, tl.load(a + k[:, None] * h + columns[None, :], mask=holds, other=0.0), g)
        w = tl.load(weight + columns, mask=columns < h, other=0.0).to(tl.float32)[None, :]
        d = r * (g * w - tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r * mean)
        if past:
            d += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


def of_norm(raw: Tensor, scale: float, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """elementwise.of_norm()."""
    t, r = raw.shape
    du, turned = raw.new_empty(t, r), raw.new_empty(t, r, dtype=dtype)
    rows = max(1, 2048 // triton.next_power_of_2(r))
    _of_norm[(triton.cdiv(t, rows),)](raw, rstd, du, turned, t, r, raw.stride(0), scale, triton.next_power_of_2(r), rows, num_warps=4)
    return du, turned


@triton.jit
def _of_norm(raw, rstd, du, turned, t, r, apart, scale, width: tl.constexpr, of_t: tl.constexpr):
    rows, k = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64), tl.arange(0, width)
    fits = (rows[:, None] < t) & (k[None, :] < r)
    value = (tl.load(raw + rows[:, None] * apart + k[None, :], mask=fits, other=0.0).to(tl.float32) * scale).to(du.dtype.element_ty)
    at = rows[:, None] * r + k[None, :]
    tl.store(du + at, value, mask=fits)
    by = tl.load(rstd + rows, mask=rows < t, other=0.0)
    tl.store(turned + at, (value.to(tl.float32) * by[:, None]).to(turned.dtype.element_ty), mask=fits)


def add_(y: Tensor, x: Tensor, u: Tensor, b: Tensor | None) -> None:
    """elementwise.add_() of y and x [t, h], whose rows lie in memory in order."""
    (t, h), rank = x.shape, u.shape[1]
    rows, columns, warps = _ADD_TILE
    grid = triton.cdiv(h, columns), triton.cdiv(t, rows)  # neighbours in memory run side by side
    widest = max(16, triton.next_power_of_2(rank))
    _add[grid](y, x, u, y if b is None else b, t, h, rank, b is not None, widest, rows, columns, num_warps=warps)


@triton.jit
def _add(y, x, u, b, t, h, rank, adapted: tl.constexpr, width: tl.constexpr, of_t: tl.constexpr, of_h: tl.constexpr):
    rows = (tl.program_id(1) * of_t + tl.arange(0, of_t)).to(tl.int64)
    columns, k = tl.program_id(0) * of_h + tl.arange(0, of_h), tl.arange(0, width)
    inside = (rows[:, None] < t) & (columns[None, :] < h)
    at = rows[:, None] * h + columns[None, :]
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if adapted:
        part = tl.load(u + rows[:, None] * rank + k[None, :], mask=(rows[:, None] < t) & (k[None, :] < rank), other=0.0)
        holds = (columns[None, :] < h) & (k[:, None] < rank)
        value = tl.dot(part, tl.load(b + columns[None, :] * rank + k[:, None], mask=holds, other=0.0), value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
