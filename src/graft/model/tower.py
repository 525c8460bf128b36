"""The vision tower of a Qwen2.5-VL (https://arxiv.org/abs/2502.13923, section 2.1) over all images of a micro-batch at once.

It computes what transformers' own does, with its weights. What depends on the sizes of images alone is laid out on the CPU, while the batch before
is computed (Layout). Windows are documents of one attention: of an image of 1 MP, 80 windows in each of 28 blocks, that is 28 kernels and not 2,240
calls. A frozen tower has no gradient, so that fuse_tower() may work in place, with the decoder's kernels between its matmuls (elementwise.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.model.blocks import is_silu
from graft.model.elementwise import norm, rotate_, swiglu

ALIGNED = 64  # what a fused MLP's width is a multiple of: rows of 3,420 numbers, as the 7B's, begin where a GPU's matrix units do not


# ---- where things lie -------------------------------------------------------------------------------------------------
class Borders(NamedTuple):
    """Which patches attend to each other."""

    cu: Tensor  # [parts + 1] int32: 0, and where each part ends
    longest: int  # patches


class Layout(NamedTuple):
    """Of some images, one after the other."""

    order: Tensor  # [tokens] long: tokens, of 2 · 2 patches each, window by window
    back: Tensor  # [tokens] long: undoes that
    at: Tensor  # [patches, 2] long, row and column of each, window by window
    windows: Borders
    whole: Borders  # images

    def to(self, device: torch.device | str) -> Layout:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Layout:
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> Layout:
        windows, whole = (borders._replace(cu=act(borders.cu)) for borders in (self.windows, self.whole))
        return Layout(act(self.order), act(self.back), act(self.at), windows, whole)


def laid_out(config: Any, grids: Tensor) -> Layout:
    """On the CPU, of images of these grids [images, 3], in patches, one at least; config: of the tower."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    side = config.spatial_merge_size
    order, windows = get_vision_window_index(grids, side, config.window_size, config.patch_size)
    at = get_vision_position_ids(grids, side).view(len(order), side**2, 2)[order].flatten(0, 1)
    return Layout(order, order.argsort(), at, *(Borders(cu, int(cu.diff().max())) for cu in (windows, get_vision_cu_seqlens(grids))))


# ---- the forward ------------------------------------------------------------------------------------------------------
def see(eyes: Any, pixels: Tensor, layout: Layout) -> Tensor:
    """[tokens, h]: what the tower makes of images, whose patches are pixels [patches, channels · 2 · patch²]."""
    embed = eyes.patch_embed.proj.weight
    x = F.linear(pixels.to(embed.dtype), embed.flatten(1))  # a convolution whose windows do not overlap
    x = x.view(len(layout.order), -1, x.shape[-1])[layout.order].flatten(0, 1)
    cos, sin = eyes.rotary_pos_emb(x, layout.at)
    for n, block in enumerate(eyes.blocks):
        act = getattr(block, "fused", None) or partial(_plain, block)
        x = act(x, cos, sin, layout.whole if n in eyes.fullatt_block_indexes else layout.windows)
    found: Tensor = eyes.merger(x)[layout.back]
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, borders: Borders, scale: float) -> Tensor:
    """q, k and v [t, heads, d] -> [t, heads, d]: each patch to all of its part."""
    if q.dtype != torch.float32 and _flashes(q.device):
        cu, longest = borders.cu, borders.longest
        out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, False, False, scale=scale)[0]
        return out
    parts = zip(*(x.transpose(0, 1).split(borders.cu.diff().tolist(), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c, scale=scale) for a, b, c in parts], dim=1).transpose(0, 1)


@cache
def _flashes(device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _plain(block: Any, x: Tensor, cos: Tensor, sin: Tensor, borders: Borders) -> Tensor:
    """A block by its own modules, for autograd."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    x = x + attn.proj(attend(q, k, v, borders, attn.scaling).flatten(1))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


class _Fused:
    """A block of frozen weights, without a gradient. The MLP's weights, gate's and up's as one matrix, are filled up with zeros, which change nothing."""

    def __init__(self, block: Any):
        attn, mlp = block.attn, block.mlp
        self.norms = [(n.weight, n.variance_epsilon) for n in (block.norm1, block.norm2)]
        self.heads, self.scale = attn.num_heads, attn.scaling
        self.qkv, self.proj = ((m.weight, m.bias) for m in (attn.qkv, attn.proj))
        wide, narrow = (mlp.gate_proj, mlp.up_proj), mlp.down_proj
        more = -narrow.in_features % ALIGNED
        self.wide = torch.cat([F.pad(m.weight, (0, 0, 0, more)) for m in wide]), torch.cat([F.pad(m.bias, (0, more)) for m in wide])
        self.narrow = F.pad(narrow.weight, (0, more)), narrow.bias

    @torch.no_grad()
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, borders: Borders) -> Tensor:
        y = F.linear(self._normed(0, x), *self.qkv)
        rotate_(y, 2 * self.heads, cos, sin, 1.0)
        q, k, v = y.view(len(x), 3, self.heads, -1).unbind(1)
        x = F.linear(attend(q, k, v, borders, self.scale).flatten(1), *self.proj).add_(x)
        y = F.linear(self._normed(1, x), *self.wide)
        return F.linear(swiglu(y, y, [])[0], *self.narrow).add_(x)

    def _normed(self, n: int, x: Tensor) -> Tensor:
        weight, eps = self.norms[n]
        found = norm(x, weight, eps, None, 1.0, False)[0]
        assert isinstance(found, Tensor)
        return found


@torch.no_grad()
def fuse_tower(eyes: Any) -> None:
    """Have every block of a tower that nothing trains run fused; its MLP's own weights are let go."""
    for block in eyes.blocks:
        if is_silu(block.mlp.act_fn):
            block.fused = _Fused(block)
            del block.mlp
