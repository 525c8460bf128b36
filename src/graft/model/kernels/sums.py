"""Sums that programs of another kernel have made in parts, and what is copied beside many matrices at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers that a program adds up, of all parts
_ROWS = 128  # of a matrix that a program copies


def add_up(parts: Tensor, out: Tensor, also: Tensor | None = None) -> None:
    """out [m, n] = the sum of parts [p, m, n] fp32 over p, always in the same order, and `also` too; both may be views of any strides."""
    p, m, n = parts.shape
    of_p, of_n = triton.next_power_of_2(p), triton.next_power_of_2(n)
    of_m = max(1, _TILE // (of_p * of_n))
    given = parts, out, out if also is None else also
    strides = *out.stride(), *(out if also is None else also).stride()
    _add_up[(triton.cdiv(m, of_m),)](*given, p, m, n, *strides, also is not None, of_p, of_m, of_n, num_warps=4)


@triton.jit(do_not_specialize_on_alignment=["out", "also"])
def _add_up(
    parts, out, also, p, m, n, down, along, also_down, also_along, twice: tl.constexpr, of_p: tl.constexpr, of_m: tl.constexpr, of_n: tl.constexpr
):
    i = (tl.program_id(0) * of_m + tl.arange(0, of_m)).to(tl.int64)
    j, part = tl.arange(0, of_n), tl.arange(0, of_p).to(tl.int64)
    inside = (i[:, None] < m) & (j[None, :] < n)
    at = i[:, None] * n + j[None, :]
    each = tl.load(parts + part[:, None, None] * m * n + at[None, :, :], mask=(part[:, None, None] < p) & inside[None, :, :], other=0.0)
    total = tl.sum(each, axis=0).to(out.dtype.element_ty)
    tl.store(out + i[:, None] * down + j[None, :] * along, total, mask=inside)
    if twice:
        tl.store(also + i[:, None] * also_down + j[None, :] * also_along, total, mask=inside)


def place(flat: Tensor, table: Tensor, like: Tensor, most: int) -> None:
    """Copy matrices of as many columns as `like`, which lie one behind the other in flat, to where the table says, where `like` is one of their type.

    table [matrices, 4] int64: address of the first number, numbers from row to row there, offset in flat, rows, `most` at most.
    """
    columns = like.shape[1]
    grid = len(table), triton.cdiv(most, _ROWS)
    _place[grid](flat, table, like, columns, triton.next_power_of_2(columns), _ROWS, num_warps=4)


@triton.jit
def _place(flat, table, like, columns, width: tl.constexpr, of_t: tl.constexpr):
    entry = table + tl.program_id(0) * 4
    to, apart, start, rows = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    i, j = (tl.program_id(1) * of_t + tl.arange(0, of_t)).to(tl.int64), tl.arange(0, width)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    value = tl.load(flat + start + i[:, None] * columns + j[None, :], mask=inside)
    tl.store(to.to(like.dtype) + i[:, None] * apart + j[None, :], value.to(like.dtype.element_ty), mask=inside)
