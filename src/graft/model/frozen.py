"""The frozen weights of linear layers that share an input, as one matrix: y = x Wᵀ, and for the gradient dx = dy W.

W [out, in] is held as it trains fastest or smallest: `dense` (fp32 or bf16), `fp8` or `nf4`. FP8 is e4m3 with a scale a row
of W, chosen once. x is quantised a row at a time as it comes. For dx the scales of W, which lie along the sum there, go
into dy before its own rows are quantised: so one copy of W serves both ways, transposed on the fly (0.1 ms a layer on an
H200), and the gradient is that of the very weights of the forward. Formats: Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433. NF4 is bitsandbytes', opened into bf16 for each matmul. Beside W there may be room (beside.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graft.model import gemm

Kind = Literal["dense", "fp8", "nf4"]
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
NF4_BLOCK, NF4_STATE_BLOCK = 64, 256  # weights a scale, scales a scale of scales: bitsandbytes' defaults
_OF_NF4 = 5  # tensors a layer
Operand = Tensor | tuple[Tensor, Tensor]  # [t, n], or quantize_rows() of it


class Frozen(nn.Module):
    """W of some layers, one below the other, and their bias; buffers that no checkpoint holds.

    `tensors` are what matmul() and matmul_back() take: dense [W]; fp8 [W, scales [out, 1] fp32]; nf4 five for each layer.
    """

    room = 0  # so many numbers lie between two rows of W, of NF4 once it is opened; of no use to any matmul here

    def __init__(self, kind: Kind, outs: Sequence[int], ins: int, bias: bool, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.kind: Kind = kind
        self.outs, self.ins, self.dtype = list(outs), ins, dtype
        rows = sum(outs)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        if kind == "dense":
            shapes = [((rows, ins), dtype)]
        elif kind == "fp8":
            shapes = [((rows, ins), FP8), ((rows, 1), torch.float32)]
        else:
            for out in outs:
                blocks = out * ins // NF4_BLOCK
                states = -(-blocks // NF4_STATE_BLOCK)
                shapes += [((out * ins // 2, 1), torch.uint8), ((blocks,), torch.uint8), ((states,), torch.float32)]
                shapes += [((), torch.float32), ((256,), torch.float32)]
        self.count = len(shapes)
        for n, (shape, kept) in enumerate(shapes):
            self.register_buffer(f"w{n}", torch.empty(shape, dtype=kept, device=device), persistent=False)
        self.register_buffer("bias", torch.zeros(rows, dtype=dtype, device=device) if bias else None, persistent=False)
        self.bias: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, f"w{n}") for n in range(self.count)]

    def opened(self) -> Tensor:
        """W [outs, ins] as a matmul takes it, with its room; not of fp8."""
        return self.tensors[0] if self.kind == "dense" else _opened(self.tensors, self.ins, self.dtype, self.room)

    def make_room(self, room: int) -> None:
        """Lay the rows of W apart, with zeros between them; of nf4 they will be, with anything."""
        if self.kind == "dense":
            held = self.tensors[0]
            wide = held.new_zeros(len(held), self.ins + room)[:, : self.ins]
            held.data = wide.copy_(held)  # in place: whoever holds the buffer sees it
        self.room = room

    @torch.no_grad()
    def put(self, layer: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Fill in the weight [out, in] or the bias [out] of one layer, quantised on this module's device."""
        start = sum(self.outs[:layer])
        rows = slice(start, start + self.outs[layer])
        if bias is not None:
            assert self.bias is not None
            self.bias[rows].copy_(bias)
        if weight is None:
            return
        own = self.tensors
        if self.kind == "dense":
            own[0][rows].copy_(weight)
        elif self.kind == "fp8":
            own[0][rows], own[1][rows] = quantize_rows(weight.to(own[0].device))
        else:
            for held, found in zip(own[_OF_NF4 * layer :], _nf4_of(weight.to(own[0].device, self.dtype)), strict=False):
                held.copy_(found)


def matmul(x: Operand, kind: str, tensors: list[Tensor], bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias: [t, in] -> [t, out], in x's dtype, or in bf16 where x is in FP8 already."""
    if kind == "fp8":
        (x8, scales), dtype = (quantize_rows(x), x.dtype) if isinstance(x, Tensor) else (x, torch.bfloat16)
        return _fp8_matmul(x8, scales, tensors[0], tensors[1].t(), dtype, bias)
    assert isinstance(x, Tensor)
    w = tensors[0] if kind == "dense" else _opened(tensors, x.shape[1], x.dtype)
    return gemm.product(x, w) if bias is None else torch.addmm(bias, x, w.t())


def matmul_back(dy: Tensor, kind: str, tensors: list[Tensor]) -> Tensor:
    """dy W: [t, out] -> [t, in]."""
    if kind == "fp8":
        w8, scales = tensors
        dy8, of_rows = quantize_rows(dy, scales)
        return _fp8_matmul(dy8, of_rows, *transposed(w8), dy.dtype, None)
    if kind == "dense":
        return gemm.product(dy, tensors[0], back=True)
    ins = sum(2 * packed.numel() for packed in tensors[::_OF_NF4]) // dy.shape[1]
    return gemm.product(dy, _opened(tensors, ins, dy.dtype), back=True)


# ---- FP8 --------------------------------------------------------------------------------------------------------------
def fp8_works(device: torch.device | str) -> bool:
    """Whether the GPU multiplies FP8 (Hopper, Ada and later)."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(e4m3 [t, n], scales [t, 1] fp32) of x [t, n], each column first multiplied by its factor ([n] or [n, 1] fp32)."""
    if x.is_cuda:
        from graft.model.kernels.fp8 import quantize_rows as on_gpu

        return on_gpu(x, factors)
    wide = x.float() if factors is None else x.float() * factors.reshape(1, -1)
    scales = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide / scales).to(FP8), scales


def _fp8_matmul(x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """x8 [t, k] · w8ᵀ [k, n], both with k in order in memory; x_scales [t, 1], w_scales [1, n]."""
    if x8.is_cuda:
        return gemm.scaled_product(x8, x_scales, w8, w_scales, dtype=dtype, bias=bias)
    y = (x8.float() @ w8.float().t()) * x_scales * w_scales
    return (y if bias is None else y + bias.float()).to(dtype)


def transposed(w8: Tensor) -> tuple[Tensor, Tensor]:
    """(w8ᵀ [in, out], its scales [1, in], which are one: W's own went into what it multiplies)."""
    ones = torch.ones(1, w8.shape[1], device=w8.device)
    if w8.is_cuda:
        from graft.model.kernels.fp8 import transposed as on_gpu

        return on_gpu(w8), ones
    return w8.view(torch.uint8).t().contiguous().view(FP8), ones


# ---- NF4 --------------------------------------------------------------------------------------------------------------
def _nf4_of(weight: Tensor) -> list[Tensor]:
    """[packed, absmax uint8, absmax of absmax, offset, code of absmax] of a weight, with double quantisation."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    return [packed, state.absmax, state.state2.absmax, state.offset, state.state2.code]


def _opened(tensors: list[Tensor], ins: int, dtype: torch.dtype, room: int = 0) -> Tensor:
    """W [out, in] of all layers, its rows apart by `room`, which is not written to."""
    rows = [2 * packed.numel() // ins for packed in tensors[::_OF_NF4]]
    out = torch.empty(sum(rows), ins + room, dtype=dtype, device=tensors[0].device)[:, :ins]
    for n, part in enumerate(out.split(rows)):
        own = tensors[_OF_NF4 * n : _OF_NF4 * (n + 1)]
        if part.is_cuda:
            from graft.model.kernels.nf4 import open_

            open_(part, own, NF4_BLOCK, NF4_STATE_BLOCK)
        else:
            part.copy_(opened_by_bitsandbytes(own, part.shape, dtype))
    return out


def opened_by_bitsandbytes(tensors: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """W of one layer."""
    from bitsandbytes.functional import dequantize_blockwise

    packed, absmax, of_absmax, offset, code = tensors
    scales = dequantize_blockwise(absmax, absmax=of_absmax, code=code, blocksize=NF4_STATE_BLOCK) + offset
    opened: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, NF4_BLOCK, "nf4", shape, dtype)
    return opened
