"""The adapters' B beside the frozen W that they adapt, [W | B]: one matmul makes both products with the gradient dy, or adds both of a layer's.

By itself dy B reads all of dy for a few columns: of gate and up, and of q, k and v, 0.3 ms a layer of Llama-3.1-8B on an H200. But the tiles
of the matmul rarely end where W does: twenty of 208 columns cover 4,160, of which W has 4,096. And where a half of a layer ends, x + y Wᵀ + u Bᵀ,
u beside y makes the second product a part of the first's sum and x its beginning; a kernel of its own reads and writes each of them once more.
So the rows of W, and of y, are laid apart, and B and u are copied between them each time, those of each layer at columns and rows of their own,
zeros around them. Whether one matmul is faster than several is measured (gemm.choose()); where it was not, nothing is laid apart and all is as
without this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from graft.model import gemm
from graft.model.elementwise import add_
from graft.model.fused import Group, Layout

STEP = 64  # numbers: rows begin at multiples of 128 bytes, as before


def shape_of(tokens: int, group: Group, back: bool) -> gemm.Shape:
    """Of the one matmul: of dy W and dy B, or of x + y Wᵀ + u Bᵀ."""
    frozen, columns = group.frozen, group.layout.rank * len(group.layout.sizes)
    return gemm.Shape(tokens, sum(frozen.outs), frozen.ins, back, beside=columns, apart=-columns % STEP)


def make_room(group: Group) -> None:
    shape = shape_of(0, group, back=True)
    group.frozen.make_room(shape.beside + shape.apart)


def placed(w: Tensor, layout: Layout, b: list[Tensor], blank: bool) -> Tensor:
    """[out, in + columns] of W [out, in] with room: W, and beside it, where they now are, every B [size, rank]; blank: zeros are there already."""
    ins, rank = w.shape[1], layout.rank
    wide = _widened(w, rank * len(layout.sizes))
    if not blank:
        wide[:, ins:].zero_()
    for n, (start, size, own) in enumerate(zip(layout.starts, layout.sizes, b, strict=True)):
        wide[start : start + size, ins + n * rank : ins + (n + 1) * rank] = own
    return wide


def back(dy: Tensor, group: Group, adapter: Tensor) -> tuple[Tensor, Tensor] | None:
    """(dy W [t, in], dy B [t, layers · rank]), whose rows lie apart; None where one matmul of both was not chosen."""
    frozen = group.frozen
    run = gemm.chosen(shape_of(len(dy), group, back=True)) if frozen.room else None
    if run is None:
        return None
    wide = _with(group, adapter)
    out = gemm.roomy(dy, wide.shape[1], wide.stride(0) - wide.shape[1])
    run(dy, wide, out)
    return out[:, : frozen.ins], out[:, frozen.ins :]


def room_after(tokens: int, group: Group) -> int:
    """The room after each row of y that add() wants; none where one matmul was not chosen."""
    return group.frozen.room if group.frozen.room and gemm.chosen(shape_of(tokens, group, back=False)) else 0


def add(x: Tensor, y: Tensor, u: Tensor, group: Group, adapter: Tensor) -> Tensor | None:
    """x + y Wᵀ + u Bᵀ [t, out] of x [t, out], u [t, rank] and y [t, in] with room; None where one matmul of all was not chosen."""
    if not (room := room_after(len(x), group)) or y.stride(0) != y.shape[1] + room:
        return None
    run, wide = gemm.chosen(shape_of(len(x), group, back=False)), _with(group, adapter)
    assert run is not None
    both, out = _widened(y, u.shape[1]), torch.empty_like(x)
    both[:, y.shape[1] :] = u
    run(both, wide, x, out)
    return out


def _with(group: Group, adapter: Tensor) -> Tensor:
    """W, where it is held or opened, with every B of the adapter beside it."""
    frozen = group.frozen
    return placed(frozen.opened(), group.layout, group.layout.split(adapter, frozen.ins)[1], blank=frozen.kind == "dense")


def _widened(m: Tensor, columns: int) -> Tensor:
    """A matrix with room and so many columns of it."""
    return m.as_strided((len(m), m.shape[1] + columns), m.stride())


def operands(shape: gemm.Shape, group: Group) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
    """As gemm.choose() takes them."""
    frozen, layout = group.frozen, group.layout
    w = frozen.opened()
    draw = partial(torch.randn, dtype=w.dtype, device=w.device)
    b = [draw(size, layout.rank) for size in layout.sizes]
    room = shape.beside + shape.apart
    wide, alone = placed(_spread(w, room), layout, b, blank=True), w.contiguous()
    if shape.back:
        dy = draw(shape.rows, shape.outs)
        parts = [(own, up) for (own, _), up in zip(layout.columns(dy, dy[:, : shape.beside]), b, strict=True)]

        def several() -> None:
            for own, up in parts:
                torch.mm(own, up)
            gemm.product(dy, alone, back=True)

        return (dy, wide), several
    x, y, u = draw(shape.rows, shape.outs), draw(shape.rows, shape.ins), draw(shape.rows, shape.beside)
    both = _widened(_spread(y, room), shape.beside)
    both[:, shape.ins :] = u
    return (both, wide, x), lambda: add_(gemm.product(y, alone), x, u, b[0])


def _spread(m: Tensor, room: int) -> Tensor:
    return torch.cat([m, m.new_zeros(len(m), room)], dim=1)[:, : m.shape[1]]
