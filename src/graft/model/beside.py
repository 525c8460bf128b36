"""The adapters' B beside the frozen W that they adapt, [W | B]: one matmul makes what several did.

By itself dy B reads all of dy for a few columns: 0.04 to 0.2 ms each in a layer of Llama-3.1-8B on an H200. But the tiles of the matmul rarely end
where W does: twenty of 208 columns cover 4,160, of which W has 4,096. So the one that makes dy W makes dy B as well. And where a half of a layer ends,
x + y Wᵀ + u Bᵀ, u beside y makes the second product a part of the first's sum and x its beginning; a kernel of its own reads and writes each of them once
more. So the rows of W, and of y, are laid apart, and between them stand u and every B, each at columns and rows of its own with zeros around it: copied
there before each forward (Standing), of an NF4 base each time that it is opened. Whether one matmul is faster than several is measured (gemm.choose());
where it was not, nothing is laid apart and all is as without this file. A under W, for x Aᵀ beside x Wᵀ, was measured too and never was faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

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
    """Lay the rows of W apart, once. A Standing of the model's adapters fills the room before each forward."""
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
    """Every B beside its W where that lies open and has room; called before each forward it copies them there, on a GPU in one kernel.

    What has room is looked up in the first call.
    """

    def __init__(self, adapters: Adapters):
        self.adapters = adapters

    @cached_property
    def places(self) -> list[tuple[Tensor, int]]:
        """[(where at W, where in the vector of all adapters)]."""
        found: list[tuple[Tensor, int]] = []
        start = 0
        for group, size in zip(self.adapters.groups, self.adapters.sizes, strict=True):
            layout, frozen = group.layout, group.frozen
            if frozen.room and frozen.kind == "dense":
                columns = layout.rank * len(layout.sizes)
                at, wide = start + columns * frozen.ins, gemm.widened(frozen.opened(), columns)
                for n, (first, rows) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
                    own = slice(frozen.ins + n * layout.rank, frozen.ins + (n + 1) * layout.rank)
                    found.append((wide[first : first + rows, own], at))
                    at += rows * layout.rank
            start += size
        return found

    @cached_property
    def table(self) -> Tensor:
        """The places as kernels/sums.py takes them."""
        rows = [(to.data_ptr(), to.stride(0), at, len(to)) for to, at in self.places]
        return torch.tensor(rows, dtype=torch.int64, device=self.adapters.flat.device)

    def __call__(self) -> None:
        flat = self.adapters.flat.detach()
        if not flat.is_cuda:
            for to, at in self.places:
                to.copy_(flat[at : at + to.numel()].view_as(to))
        elif self.places:
            from graft.model.kernels.sums import place

            place(flat, self.table, self.places[0][0], max(len(to) for to, _ in self.places))


def operands(shape: gemm.Shape, group: Group) -> tuple[tuple[Tensor, ...], Callable[[], object], Tensor]:
    """As gemm.choose() takes them."""
    frozen, layout = group.frozen, group.layout
    w = frozen.opened()
    draw = partial(torch.randn, dtype=w.dtype, device=w.device)
    alone, b = w.contiguous(), [draw(size, layout.rank) for size in layout.sizes]
    x, room = draw(shape.rows, shape.outs if shape.back else shape.ins), shape.beside + shape.apart
    wide = placed(_spread(w, room), layout, b, blank=True)
    if shape.back:
        parts = [(own, up) for (own, _), up in zip(layout.columns(x, x[:, : shape.beside]), b, strict=True)]

        def several() -> None:
            for own, up in parts:
                torch.mm(own, up)
            gemm.product(x, alone, back=True)

        return (x, wide), several, torch.mm(x, wide)
    past, u = draw(shape.rows, shape.outs), draw(shape.rows, shape.beside)
    both = gemm.widened(_spread(x, room), shape.beside)
    both[:, shape.ins :] = u
    return (both, wide, past), lambda: add_(gemm.product(x, alone), past, u, b[0]), torch.addmm(past, both, wide.t())


def _spread(m: Tensor, room: int) -> Tensor:
    return torch.cat([m, m.new_zeros(len(m), room)], dim=1)[:, : m.shape[1]]
