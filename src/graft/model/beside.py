"""The adapters' B beside the frozen W that they adapt: the matmul that makes the gradient dy W of their input makes dy B as well.

By itself dy B reads all of dy for a few columns: of gate and up, and of q, k and v, 0.3 ms a layer of Llama-3.1-8B on an H200. But the
tiles of the matmul rarely end where W does: twenty of 208 columns cover 4,160, of which W has 4,096. So the rows of W are laid apart, and B is
copied between them before each backward, that of each layer at columns and rows of its own, zeros around it. Whether one matmul is faster than
several is measured (gemm.choose()); where it was not, nothing is laid apart and all is as without this file.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from graft.model import gemm
from graft.model.frozen import Frozen
from graft.model.fused import Layout

STEP = 64  # numbers: rows begin at multiples of 128 bytes, as before


def shape_of(tokens: int, frozen: Frozen, layout: Layout) -> gemm.Shape:
    """Of the one matmul."""
    columns = layout.rank * len(layout.sizes)
    return gemm.Shape(tokens, sum(frozen.outs), frozen.ins, back=True, beside=columns, apart=-columns % STEP)


def make_room(frozen: Frozen, layout: Layout) -> None:
    shape = shape_of(0, frozen, layout)
    frozen.make_room(shape.beside + shape.apart)


def placed(w: Tensor, layout: Layout, b: list[Tensor], blank: bool) -> Tensor:
    """[out, in + columns] of W [out, in] with room: W, and beside it, where they now are, every B [size, rank]; blank: zeros are there already."""
    ins, rank = w.shape[1], layout.rank
    wide = w.as_strided((len(w), ins + rank * len(layout.sizes)), w.stride())
    if not blank:
        wide[:, ins:].zero_()
    for n, (start, size, own) in enumerate(zip(layout.starts, layout.sizes, b, strict=True)):
        wide[start : start + size, ins + n * rank : ins + (n + 1) * rank] = own
    return wide


def back(dy: Tensor, frozen: Frozen, layout: Layout, b: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(dy W [t, in], dy B [t, layers · rank]), whose rows lie apart; None where one matmul of both was not chosen."""
    run = gemm.chosen(shape_of(len(dy), frozen, layout)) if frozen.room else None
    if run is None:
        return None
    wide = placed(frozen.opened(), layout, b, blank=frozen.kind == "dense")
    out = gemm.room_for(dy, wide)
    run(dy, wide, out)
    return out[:, : frozen.ins], out[:, frozen.ins :]


def operands(shape: gemm.Shape, frozen: Frozen, layout: Layout) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """As gemm.choose() takes them."""
    w = frozen.opened()
    draw = partial(torch.randn, dtype=w.dtype, device=w.device)
    x, b = draw(shape.rows, shape.outs), [draw(size, layout.rank) for size in layout.sizes]
    apart = torch.cat([w, w.new_zeros(len(w), shape.beside + shape.apart)], dim=1)[:, : shape.ins]
    parts = [(own, up) for (own, _), up in zip(layout.columns(x, x[:, : shape.beside]), b, strict=True)]
    return x, placed(apart, layout, b, blank=True), w.contiguous(), parts
