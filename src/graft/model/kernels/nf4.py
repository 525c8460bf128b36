"""Weights in NF4 to numbers in one pass, the scales of their scales opened on the way; bitsandbytes takes three, and as many launches a layer."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64, 4  # scales, warps


def open_(out: Tensor, tensors: list[Tensor], block: int, state_block: int) -> None:
    """Fill out [rows, columns] with what a layer's five tensors, as frozen.py has them, hold; block: weights a scale, state_block: scales a scale of theirs.

    Where out's rows lie apart, `columns` are whole blocks.

    Equal to bitsandbytes' to the last bit (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3): no sum is fused with its product.
    """
    blocks, (at_once, warps) = tensors[1].numel(), _TILE
    a_row = 0 if out.is_contiguous() else out.shape[1] // block
    _open[(triton.cdiv(blocks, at_once),)](
        *tensors, _levels(out.device), out, blocks, out.stride(0), a_row, state_block, block // 2, at_once, num_warps=warps, enable_fp_fusion=False
    )


@cache
def _levels(device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    found: Tensor = get_4bit_type("nf4", device=device)
    return found


@triton.jit
def _open(
    packed, absmax, of_absmax, offset, code, levels, out, blocks, apart,
    a_row: tl.constexpr, state: tl.constexpr, half: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * at_once + tl.arange(0, at_once)).to(tl.int64)
    inside = block < blocks
    of_block = tl.load(code + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
    scale = of_block * tl.load(of_absmax + block // state, mask=inside, other=0.0) + tl.load(offset)
    pairs = tl.load(packed + block[:, None] * half + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    first, second = tl.load(levels + (pairs >> 4)) * scale[:, None], tl.load(levels + (pairs & 15)) * scale[:, None]
    first_of = block // a_row * apart + block % a_row * (2 * half) if a_row else block * (2 * half)
    to = out + first_of[:, None] + tl.arange(0, 2 * half)[None, :]
    tl.store(to, tl.interleave(first, second).to(out.dtype.element_ty), mask=inside[:, None])
