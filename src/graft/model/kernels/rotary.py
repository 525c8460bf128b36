"""The rotary embedding in place, with the adapters of q, k and v."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def adapt_and_rotate_(y: Tensor, u: Tensor, b: list[Tensor | None], heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> None:
    """elementwise.adapt_and_rotate_() of y [t, (heads + 2 kv_heads) · width], whose rows lie in memory in order."""
    t, width = cos.shape
    r = next(m.shape[1] for m in b if m is not None)
    at = [sum(m is not None for m in b[:n]) if m is not None else -1 for n, m in enumerate(b)]
    given = [y if m is None else m for m in b]
    grid = heads + 2 * kv_heads, triton.cdiv(t, 64)  # neighbours in memory run side by side
    sizes = y.stride(0), u.stride(0), cos.stride(0), r, heads, kv_heads
    _adapt_and_rotate[grid](y, u, *given, cos, sin, t, *sizes, *at, width // 2, max(16, triton.next_power_of_2(r)), 64, num_warps=4)


@triton.jit
def _adapt_and_rotate(
    y, u, b_q, b_k, b_v, cos, sin, t, stride, of_u, of_angles, r, heads, kv_heads, q_at, k_at, v_at,
    half: tl.constexpr, width: tl.constexpr, of_t: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    rows = (tl.program_id(1) * of_t + tl.arange(0, of_t)).to(tl.int64)
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
    """elementwise.rotate_(): the first `heads` heads of each row of y turned in place by its position's angles, cos and sin [t, width]."""
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
