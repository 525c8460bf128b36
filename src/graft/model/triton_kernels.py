"""The few kernels that PyTorch's own compiler writes slowly: rows to FP8 in one pass, the transpose of a byte matrix, the
activation with its adapters and its gradient, the rotary embedding in place.

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
    block = triton.next_power_of_2(columns)
    warps = 8 if block == 16_384 else 4
    _quantize[(rows,)](x, x if factors is None else factors, out, scales, columns, x.stride(0), factors is not None, block, num_warps=warps)
    return out, scales


@triton.jit
def _quantize(x, factors, out, scales, columns, stride, scaled: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < columns
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        values *= tl.load(factors + at, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / LARGEST
    tl.store(out + row * columns + at, (values * (1.0 / scale)).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


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


def swiglu(y: Tensor, u: Tensor | None, b: list[Tensor]) -> Tensor:
    """blocks.swiglu(): silu(gate) · up of y [t, 2 n] = gate | up, to which u Bᵀ is added on the way; returns [t, n]."""
    t, n = y.shape[0], y.shape[1] // 2
    out = torch.empty(t, n, dtype=y.dtype, device=y.device)
    r = b[0].shape[1] if b else 0
    given = (u, *b) if b else (y, y, y)
    _swiglu[_tiles(t, n)](y, *given, out, t, n, r, bool(b), max(16, triton.next_power_of_2(r)), *_TILE, num_warps=4)
    return out


def swiglu_backward(dact: Tensor, y: Tensor, u: Tensor, b: list[Tensor], du: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """blocks.swiglu_backward(): (the gradient [t, 2 n] of y, those of b [2, n, r] and of a [r, n]).

    A program goes down CHUNK rows of a strip of columns, so that the sums over rows stay in registers; the chunks' sums are
    added up afterwards, always in the same order.
    """
    t, n = dact.shape
    dy, chunks = torch.empty_like(y), triton.cdiv(t, CHUNK)
    r, r_down = b[0].shape[1] if b else 0, 0 if a is None else a.shape[0]
    of_b = torch.empty(chunks, 2, n, r, dtype=torch.float32, device=y.device) if b else None
    of_a = None if a is None else torch.empty(chunks, n, r_down, dtype=torch.float32, device=y.device)
    given = (u, *b) if b else (y, y, y)
    down = (y, y) if a is None else (du, a)
    widths = max(16, triton.next_power_of_2(r)), max(16, triton.next_power_of_2(r_down))
    rows, columns, ahead, warps = _BACKWARD_TILE
    _swiglu_backward[(chunks, triton.cdiv(n, columns))](
        dact, y, *given, *down, dy, of_b, of_a, t, n, r, r_down, bool(b), a is not None, *widths, CHUNK, rows, columns, ahead, num_warps=warps
    )
    return dy, None if of_b is None else of_b.sum(0).to(y.dtype), None if of_a is None else of_a.sum(0).t().to(y.dtype)


CHUNK = 1024  # rows
_BACKWARD_TILE = 32, 128, 3, 4  # rows, columns, loads ahead, warps
_TILE = 16, 128


def _tiles(t: int, n: int) -> tuple[int, int]:
    return triton.cdiv(t, _TILE[0]), triton.cdiv(n, _TILE[1])


@triton.jit
def _gate_and_up(y, u, b_gate, b_up, rows, columns, inside, t, n, r, adapted: tl.constexpr, width: tl.constexpr):
    at = rows[:, None] * (2 * n) + columns[None, :]
    gate = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + at + n, mask=inside, other=0.0).to(tl.float32)
    if adapted:
        k = tl.arange(0, width)
        of_u = rows[:, None] * (2 * r) + k[None, :]
        fits = (rows[:, None] < t) & (k[None, :] < r)
        of_b = columns[None, :] * r + k[:, None]
        holds = (columns[None, :] < n) & (k[:, None] < r)
        gate = tl.dot(tl.load(u + of_u, mask=fits, other=0.0), tl.load(b_gate + of_b, mask=holds, other=0.0), gate)
        up = tl.dot(tl.load(u + of_u + r, mask=fits, other=0.0), tl.load(b_up + of_b, mask=holds, other=0.0), up)
    return gate, up


@triton.jit
def _swiglu(y, u, b_gate, b_up, out, t, n, r, adapted: tl.constexpr, width: tl.constexpr, of_t: tl.constexpr, of_n: tl.constexpr):
    rows = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64)
    columns = tl.program_id(1) * of_n + tl.arange(0, of_n)
    inside = (rows[:, None] < t) & (columns[None, :] < n)
    gate, up = _gate_and_up(y, u, b_gate, b_up, rows, columns, inside, t, n, r, adapted, width)
    tl.store(out + rows[:, None] * n + columns[None, :], (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    dact, y, u, b_gate, b_up, du, a, dy, of_b, of_a, t, n, r, r_down, adapted: tl.constexpr, down: tl.constexpr,
    width: tl.constexpr, width_down: tl.constexpr, chunk: tl.constexpr, of_t: tl.constexpr, of_n: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * of_n + tl.arange(0, of_n)
    k, k_down = tl.arange(0, width), tl.arange(0, width_down)
    if adapted:
        holds = (columns[None, :] < n) & (k[:, None] < r)
        gate_b = tl.load(b_gate + columns[None, :] * r + k[:, None], mask=holds, other=0.0)
        up_b = tl.load(b_up + columns[None, :] * r + k[:, None], mask=holds, other=0.0)
        sum_gate, sum_up = tl.zeros((of_n, width), tl.float32), tl.zeros((of_n, width), tl.float32)
    if down:
        of_down = (columns[None, :] < n) & (k_down[:, None] < r_down)
        a_down = tl.load(a + k_down[:, None] * n + columns[None, :], mask=of_down, other=0.0)
        sum_a = tl.zeros((of_n, width_down), tl.float32)
    for start in tl.range(0, chunk, of_t, num_stages=ahead):
        rows = (tl.program_id(0) * chunk + start + tl.arange(0, of_t)).to(tl.int64)
        inside = (rows[:, None] < t) & (columns[None, :] < n)
        at = rows[:, None] * (2 * n) + columns[None, :]
        gate = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(y + at + n, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dact + rows[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if adapted:
            of_u, fits = u + rows[:, None] * (2 * r) + k[None, :], (rows[:, None] < t) & (k[None, :] < r)
            gate_u, up_u = tl.load(of_u, mask=fits, other=0.0), tl.load(of_u + r, mask=fits, other=0.0)
            gate, up = tl.dot(gate_u, gate_b, gate), tl.dot(up_u, up_b, up)
        if down:
            of_du = tl.load(du + rows[:, None] * r_down + k_down[None, :], mask=(rows[:, None] < t) & (k_down[None, :] < r_down), other=0.0)
            d = tl.dot(of_du, a_down, d)
        s = tl.sigmoid(gate)
        d_gate, d_up = (d * up * s * (1 + gate * (1 - s))).to(dy.dtype.element_ty), (d * gate * s).to(dy.dtype.element_ty)
        tl.store(dy + at, d_gate, mask=inside)
        tl.store(dy + at + n, d_up, mask=inside)
        if adapted:
            sum_gate, sum_up = tl.dot(tl.trans(d_gate), gate_u, sum_gate), tl.dot(tl.trans(d_up), up_u, sum_up)
        if down:
            sum_a = tl.dot(tl.trans((gate * s * up).to(dy.dtype.element_ty)), of_du, sum_a)
    if adapted:
        to = of_b + tl.program_id(0).to(tl.int64) * (2 * n * r) + columns[:, None] * r + k[None, :]
        held = (columns[:, None] < n) & (k[None, :] < r)
        tl.store(to, sum_gate, mask=held)
        tl.store(to + n * r, sum_up, mask=held)
    if down:
        to = of_a + tl.program_id(0).to(tl.int64) * (n * r_down) + columns[:, None] * r_down + k_down[None, :]
        tl.store(to, sum_a, mask=(columns[:, None] < n) & (k_down[None, :] < r_down))


def adapt_and_rotate_(y: Tensor, u: Tensor, b: list[Tensor | None], heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> None:
    """blocks.adapt_and_rotate_() of y [t, (heads + 2 kv_heads) · width], whose rows lie in memory in order."""
    t, width = cos.shape
    r = next(m.shape[1] for m in b if m is not None)
    at = [sum(m is not None for m in b[:n]) if m is not None else -1 for n, m in enumerate(b)]
    given = [y if m is None else m for m in b]
    grid = (triton.cdiv(t, 64), heads + 2 * kv_heads)
    sizes = y.stride(0), u.stride(0), cos.stride(0), r, heads, kv_heads
    _adapt_and_rotate[grid](y, u, *given, cos, sin, t, *sizes, *at, width // 2, max(16, triton.next_power_of_2(r)), 64, num_warps=4)


@triton.jit
def _adapt_and_rotate(
    y, u, b_q, b_k, b_v, cos, sin, t, stride, of_u, of_angles, r, heads, kv_heads, q_at, k_at, v_at,
    half: tl.constexpr, width: tl.constexpr, of_t: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = (tl.program_id(0) * of_t + tl.arange(0, of_t)).to(tl.int64)
    i, k = tl.arange(0, half), tl.arange(0, width)
    inside = rows[:, None] < t
    first = y + rows[:, None] * stride + head * (2 * half) + i[None, :]
    left = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    of_k, of_v = head >= heads, head >= heads + kv_heads
    which = tl.where(of_v, v_at, tl.where(of_k, k_at, q_at))
    own = head - tl.where(of_v, heads + kv_heads, tl.where(of_k, heads, 0))
    if which >= 0:
        b = b_q
        if of_v:
            b = b_v
        elif of_k:
            b = b_k
        part = tl.load(u + rows[:, None] * of_u + which * r + k[None, :], mask=inside & (k[None, :] < r), other=0.0)
        of_b = b + (own * (2 * half) + i[None, :]) * r + k[:, None]
        left = tl.dot(part, tl.load(of_b, mask=k[:, None] < r, other=0.0), left)
        right = tl.dot(part, tl.load(of_b + half * r, mask=k[:, None] < r, other=0.0), right)
    if not of_v:
        angles = rows[:, None] * of_angles + i[None, :]
        c = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        left, right = left * c - right * s, right * c + left * s
    tl.store(first, left.to(y.dtype.element_ty), mask=inside)
    tl.store(first + half, right.to(y.dtype.element_ty), mask=inside)


def rotate_(y: Tensor, heads: int, cos: Tensor, sin: Tensor, sign: float) -> None:
    """blocks.rotate_(): the first `heads` heads of each row of y turned in place by its position's angles, cos and sin [t, width]."""
    t, width = cos.shape
    block = triton.next_power_of_2(heads * width // 2)
    _rotate[(t,)](y, cos, sin, y.stride(0), cos.stride(0), heads, sign, width // 2, block, num_warps=8)


@triton.jit
def _rotate(y, cos, sin, stride, of_angles, heads, sign, half: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    head, i = at // half, at % half
    inside = head < heads
    first = y + row * stride + head * (2 * half) + i
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * of_angles + i).to(tl.float32)
    s = tl.load(sin + row * of_angles + i).to(tl.float32) * sign
    tl.store(first, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * c + a * s).to(y.dtype.element_ty), mask=inside)
