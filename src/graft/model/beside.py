"""The adapters' B beside the frozen W that they adapt, [W | B]: one matmul makes both products with the gradient dy, or adds both of a layer's.

By itself dy B reads all of dy for a few columns: of gate and up, and of q, k and v, 0.3 ms a layer of Llama-3.1-8B on an H200. But the tiles
of the matmul rarely end where W does: twenty of 208 columns cover 4,160, of which W has 4,096. And where a half of a layer ends, x + y Wᵀ + u Bᵀ,
u beside y makes the second product a part of the first's sum and x its beginning; a kernel of its own reads and writes each of them once more.
So the rows of W, and of y, are laid apart, and between them stand u and every B, each at columns and rows of its own with zeros around it: copied
there before each forward (Standing), of an NF4 base each time that it is opened. Whether one matmul is faster than several is measured (gemm.choose()); where it was not, nothing is laid apart and all is as
without this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from graft.model import gemm
from graft.model.elementwise import add_
from graft.model.fused import Adapters, Group, Layout

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
    wide = gemm.widened(w, rank * len(layout.sizes))
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


def behind(y: Tensor, group: Group) -> Tensor | None:
    """Where u stands in the room of y, if it has some."""
    return gemm.widened(y, group.layout.rank)[:, y.shape[1] :] if y.stride(0) > y.shape[1] else None


def add(x: Tensor, y: Tensor, group: Group, adapter: Tensor) -> Tensor | None:
    """x + y Wᵀ + u Bᵀ [t, out] of x [t, out] and y [t, in], in whose room u [t, rank] stands; None where one matmul of all was not chosen."""
    if not (room := room_after(len(x), group)) or y.stride(0) != y.shape[1] + room:
        return None
    run, wide = gemm.chosen(shape_of(len(x), group, back=False)), _with(group, adapter)
    assert run is not None
    out = torch.empty_like(x)
    run(gemm.widened(y, group.layout.rank), wide, x, out)
    return out


def _with(group: Group, adapter: Tensor) -> Tensor:
    """W with every B of the adapter beside it, where they stand or, of what is opened only now, are placed now."""
    frozen, layout = group.frozen, group.layout
    if frozen.kind == "dense":
        return gemm.widened(frozen.opened(), layout.rank * len(layout.sizes))
    return placed(frozen.opened(), layout, layout.split(adapter, frozen.ins)[1], blank=False)


class Standing:
    """Every B beside its W where that lies open and has room; called before each forward it copies them there, on a GPU in one kernel."""

    def __init__(self, adapters: Adapters):
        self.adapters = adapters
        self.places: list[tuple[Tensor, int]] = []  # where in W's room, and where in the vector of all adapters
        at = 0
        for group, size in zip(adapters.groups, adapters.sizes, strict=True):
            layout, frozen = group.layout, group.frozen
            if frozen.room and frozen.kind == "dense":
                start = at + layout.rank * len(layout.sizes) * frozen.ins
                wide = gemm.widened(frozen.opened(), layout.rank * len(layout.sizes))
                for n, (first, rows) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
                    columns = slice(frozen.ins + n * layout.rank, frozen.ins + (n + 1) * layout.rank)
                    self.places.append((wide[first : first + rows, columns], start))
                    start += rows * layout.rank
            at += size
        rows_of = [(to.data_ptr(), to.stride(0), start, len(to)) for to, start in self.places]
        self.table = torch.tensor(rows_of, dtype=torch.int64, device=adapters.flat.device)

    def __call__(self) -> None:
        flat = self.adapters.flat.detach()
        if not flat.is_cuda:
            for to, start in self.places:
                to.copy_(flat[start : start + to.numel()].view_as(to))
        elif self.places:
            from graft.model.kernels.sums import place

            like, most = self.places[0][0], max(len(to) for to, _ in self.places)
            place(flat, self.table, like, most, like.shape[1])


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
    both = gemm.widened(_spread(y, room), shape.beside)
    both[:, shape.ins :] = u
    return (both, wide, x), lambda: add_(gemm.product(y, alone), x, u, b[0])


def _spread(m: Tensor, room: int) -> Tensor:
    return torch.cat([m, m.new_zeros(len(m), room)], dim=1)[:, : m.shape[1]]
