"""The gated activation with its adapters, and its gradient with theirs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graft.model.dropout import Drop
from graft.model.gemm import roomy, widened
from graft.model.kernels.dropout import kept
from graft.model.kernels.shared import loading_ahead, sigmoid
from graft.model.kernels.sums import add_up


def swiglu(
    y: Tensor, u: Tensor, b: list[Tensor], a: Tensor | None = None, scale: float = 1.0, drop: Drop | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """elementwise.swiglu(): (act = silu(gate) · up of y [t, 2 n] = gate | up, to which u Bᵀ is added on the way; scale · act aᵀ [t, r]).

    A program goes along the columns of a few rows, so that the sums over columns stay in registers, or along a part of the columns
    where there are too few rows to occupy the GPU; the parts' sums are added up afterwards, always in the same order.
    """
    t, n = y.shape[0], y.shape[1] // 2
    out = roomy(y, n, room)
    r, r_down = b[0].shape[1] if b else 0, 0 if a is None else a.shape[0]
    rows, columns, most, warps = _TILE
    blocks = triton.cdiv(t, rows)
    along = triton.cdiv(triton.cdiv(n, columns), triton.next_power_of_2(triton.cdiv(PROGRAMS, blocks))) * columns  # of few lengths: each is compiled
    parts = triton.cdiv(n, along)
    of_down = torch.empty(parts, t, r_down, dtype=torch.float32, device=y.device)
    given = (u, *b) if b else (y, y, y)
    seed, threshold = (y, 0) if drop is None else drop
    widths = max(16, triton.next_power_of_2(r)), max(16, triton.next_power_of_2(r_down))

    def launch(ahead: int) -> None:
        _swiglu[(parts, blocks)](
            *(y, *given, y if a is None else a, seed, out, of_down, t, n, n + room, r, r_down, scale),
            *(bool(b), a is not None, threshold, *widths, along, rows, columns, ahead),
            num_warps=warps,
        )

    loading_ahead(most, launch, "swiglu", *widths, bool(b), a is not None, drop is not None)
    u_down = y.new_empty(t, r_down)
    if r_down:
        add_up(of_down, u_down, widened(out, r_down)[:, n:] if room else None)
    return out, u_down


def swiglu_backward(
    dact: Tensor,
    y: Tensor,
    u: Tensor,
    b: list[Tensor],
    du: Tensor,
    a: Tensor | None,
    of_b: Tensor | None,
    of_a: Tensor | None,
    drop: Drop | None = None,
) -> Tensor:
    """elementwise.swiglu_backward(): the gradient [t, 2 n] of y; of_b [2, n, r] and of_a [r, n] are filled in.

    A program goes down CHUNK rows of a strip of columns, so that the sums over rows stay in registers; the chunks' sums are
    added up afterwards, always in the same order.
    """
    t, n = dact.shape
    dy, chunks = torch.empty_like(y), triton.cdiv(t, CHUNK)
    r, r_down = b[0].shape[1] if b else 0, 0 if a is None else a.shape[0]
    parts_b = torch.empty(chunks, 2 * n, r, dtype=torch.float32, device=y.device) if b else None
    parts_a = None if a is None else torch.empty(chunks, n, r_down, dtype=torch.float32, device=y.device)
    given = (u, *b) if b else (y, y, y)
    down = (y, y) if a is None else (du, a)
    seed, threshold = (y, 0) if drop is None else drop
    widths = max(16, triton.next_power_of_2(r)), max(16, triton.next_power_of_2(r_down))
    rows, columns, most, warps, registers = _backward_tile(max(widths), drop is not None)

    def launch(ahead: int) -> None:
        _swiglu_backward[(triton.cdiv(n, columns), chunks)](
            *(dact, y, *given, *down, seed, dy, parts_b, parts_a, t, n, dact.stride(0), r, r_down),
            *(bool(b), a is not None, threshold, *widths, CHUNK, rows, columns, ahead),
            num_warps=warps,
            maxnreg=registers,
        )

    loading_ahead(most, launch, "swiglu_backward", *widths, bool(b), a is not None, drop is not None)
    if parts_b is not None and of_b is not None:
        add_up(parts_b, of_b.flatten(0, 1))
    if parts_a is not None and of_a is not None:
        add_up(parts_a, of_a.t())
    return dy


CHUNK = 2048  # rows
PROGRAMS = 4096  # that occupy a GPU: of four warps, several on each multiprocessor, for some rounds
_TILE = 64, 64, 3, 4  # rows, columns, loads ahead, warps


def _backward_tile(width: int, drops: bool) -> tuple[int, int, int, int, int | None]:
    """As _TILE, and registers a thread: with 128 of them two programs of eight warps share a multiprocessor and nothing leaves the registers.

    What leaves them is dear: of 32 rows for r = 32 in four warps the sums did, 2.1 ms a layer of 8B instead of 0.8.
    """
    if width > 32:
        return 32, 64, 3, 4, None
    return (16, 128, 3, 8, 128) if width == 32 or drops else (64, 64, 3, 4, None)


@triton.jit(do_not_specialize_on_alignment=["seed"])
def _swiglu(
    y, u, b_gate, b_up, a, seed, out, of_down, t, n, of_out, r, r_down, scale, adapted: tl.constexpr, down: tl.constexpr, threshold: tl.constexpr,
    width: tl.constexpr, width_down: tl.constexpr, along: tl.constexpr, of_t: tl.constexpr, of_n: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * of_t + tl.arange(0, of_t)).to(tl.int64)
    k, k_down = tl.arange(0, width), tl.arange(0, width_down)
    if adapted:
        of_u, fits = u + rows[:, None] * (2 * r) + k[None, :], (rows[:, None] < t) & (k[None, :] < r)
        gate_u, up_u = tl.load(of_u, mask=fits, other=0.0), tl.load(of_u + r, mask=fits, other=0.0)
    if down:
        total = tl.zeros((of_t, width_down), tl.float32)
    for start in tl.range(0, along, of_n, num_stages=ahead):
        first = tl.program_id(0) * along + start
        columns = first + tl.arange(0, of_n)
        inside = (rows[:, None] < t) & (columns[None, :] < n)
        at = rows[:, None] * (2 * n) + columns[None, :]
        gate = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(y + at + n, mask=inside, other=0.0).to(tl.float32)
        if adapted:
            holds = (columns[None, :] < n) & (k[:, None] < r)
            gate = tl.dot(gate_u, tl.load(b_gate + columns[None, :] * r + k[:, None], mask=holds, other=0.0), gate)
            up = tl.dot(up_u, tl.load(b_up + columns[None, :] * r + k[:, None], mask=holds, other=0.0), up)
        act = (gate * sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * of_out + columns[None, :], act, mask=inside)
        if down:
            if threshold:
                act = tl.where(kept(seed, threshold, rows, first, of_n), act, 0.0)
            held = (columns[:, None] < n) & (k_down[None, :] < r_down)
            total = tl.dot(act, tl.load(a + k_down[None, :] * n + columns[:, None], mask=held, other=0.0), total)
    if down:
        to = of_down + (tl.program_id(0) * t + rows[:, None]) * r_down + k_down[None, :]
        tl.store(to, total * scale, mask=(rows[:, None] < t) & (k_down[None, :] < r_down))


@triton.jit(do_not_specialize_on_alignment=["seed"])
def _swiglu_backward(
    dact, y, u, b_gate, b_up, du, a, seed, dy, of_b, of_a, t, n, of_dact, r, r_down, adapted: tl.constexpr, down: tl.constexpr, threshold: tl.constexpr,
    width: tl.constexpr, width_down: tl.constexpr, chunk: tl.constexpr, of_t: tl.constexpr, of_n: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * of_n + tl.arange(0, of_n)
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
        rows = (tl.program_id(1) * chunk + start + tl.arange(0, of_t)).to(tl.int64)
        inside = (rows[:, None] < t) & (columns[None, :] < n)
        at = rows[:, None] * (2 * n) + columns[None, :]
        gate = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(y + at + n, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dact + rows[:, None] * of_dact + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if adapted:
            of_u, fits = u + rows[:, None] * (2 * r) + k[None, :], (rows[:, None] < t) & (k[None, :] < r)
            gate_u, up_u = tl.load(of_u, mask=fits, other=0.0), tl.load(of_u + r, mask=fits, other=0.0)
            gate, up = tl.dot(gate_u, gate_b, gate), tl.dot(up_u, up_b, up)
        if down:
            of_du = tl.load(du + rows[:, None] * r_down + k_down[None, :], mask=(rows[:, None] < t) & (k_down[None, :] < r_down), other=0.0)
            if threshold:
                keeps = kept(seed, threshold, rows, tl.program_id(0) * of_n, of_n)
                d += tl.where(keeps, tl.dot(of_du, a_down), 0.0)
            else:
                d = tl.dot(of_du, a_down, d)
        s = sigmoid(gate)
        silu = gate * s
        d_gate, d_up = (d * up * (s + silu - silu * s)).to(dy.dtype.element_ty), (d * silu).to(dy.dtype.element_ty)
        tl.store(dy + at, d_gate, mask=inside)
        tl.store(dy + at + n, d_up, mask=inside)
        if adapted:
            sum_gate, sum_up = tl.dot(tl.trans(d_gate), gate_u, sum_gate), tl.dot(tl.trans(d_up), up_u, sum_up)
        if down:
            act = silu * up
            if threshold:
                act = tl.where(keeps, act, 0.0)
            sum_a = tl.dot(tl.trans(act.to(dy.dtype.element_ty)), of_du, sum_a)
    if adapted:
        to = of_b + tl.program_id(1).to(tl.int64) * (2 * n * r) + columns[:, None] * r + k[None, :]
        held = (columns[:, None] < n) & (k[None, :] < r)
        tl.store(to, sum_gate, mask=held)
        tl.store(to + n * r, sum_up, mask=held)
    if down:
        to = of_a + tl.program_id(1).to(tl.int64) * (n * r_down) + columns[:, None] * r_down + k_down[None, :]
        tl.store(to, sum_a, mask=(columns[:, None] < n) & (k_down[None, :] < r_down))
