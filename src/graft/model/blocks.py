"""The two halves of a decoder layer as one operator each: q, k, v, rotary embedding and attention; and the gated MLP.

What a chain of operators would write and read again stays in place: the adapters of gate and up are added inside the
activation, that of down inside its gradient, and q, k and v are turned and attended to where the matmul left them. Used
for Llama, Mistral and Qwen2 layers (layouts of https://arxiv.org/abs/2307.09288); any other runs through fused.py alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library, nn

from graft.model import attention
from graft.model.frozen import matmul, matmul_back
from graft.model.fused import FusedLinear, Layout, adapted, adapter_gradient, down, down_backward

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


# ---- what has a kernel on the GPU -----------------------------------------------------------------------------------------
def swiglu(y: Tensor, u: Tensor, b: list[Tensor]) -> Tensor:
    """silu(gate) · up of gate | up = y [t, 2 n] + u Bᵀ; b: [] or [n, r] of gate and up, u [t, 2 r]."""
    if y.is_cuda:
        from graft.model.triton_kernels import swiglu as on_gpu

        return on_gpu(y, u, b)
    gate, up = _gate_and_up(y, u, b)
    return (torch.nn.functional.silu(gate) * up).to(y.dtype)


def swiglu_backward(dact: Tensor, y: Tensor, u: Tensor, b: list[Tensor], du: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What flows back where the gradient of the output act is d = dact [t, n] + du a; a [r, n] or None, du [t, r].

    Returns the gradient dy [t, 2 n] of y; that of b, dyᵀ u of each half [2, n, r], None where b is []; and duᵀ act [r, n], None
    where a is.
    """
    if y.is_cuda:
        from graft.model.triton_kernels import swiglu_backward as on_gpu

        return on_gpu(dact, y, u, b, du, a)
    gate, up = _gate_and_up(y, u, b)
    d = dact.float() if a is None else dact.float() + du.float() @ a.float()
    s = gate.sigmoid()
    dy = torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=1).to(y.dtype)
    of_b = torch.stack([half.t() @ part for half, part in zip(dy.chunk(2, dim=1), u.chunk(2, dim=1), strict=True)]) if b else None
    return dy, of_b, None if a is None else du.t() @ (gate * s * up).to(y.dtype)


def _gate_and_up(y: Tensor, u: Tensor, b: list[Tensor]) -> list[Tensor]:
    halves = [half.float() for half in y.chunk(2, dim=1)]
    return [half + part.float() @ up.float().t() for half, part, up in zip(halves, u.chunk(2, dim=1), b, strict=True)] if b else halves


def adapt_and_rotate_(y: Tensor, u: Tensor, b: list[Tensor | None], heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> None:
    """Add u Bᵀ to the columns of q, k and v in y [t, (heads + 2 kv_heads) · width], then turn q and k; b: their B or None, u [t, r] of each that is."""
    if y.is_cuda and any(m is not None for m in b):
        from graft.model.triton_kernels import adapt_and_rotate_ as on_gpu

        return on_gpu(y, u, b, heads, kv_heads, cos, sin)
    columns = y.split([h * cos.shape[1] for h in (heads, kv_heads, kv_heads)], dim=1)
    adapted = [(own, up) for own, up in zip(columns, b, strict=True) if up is not None]
    for (own, up), part in zip(adapted, u.chunk(max(1, len(adapted)), dim=1), strict=bool(adapted)):
        own.addmm_(part, up.t())
    return rotate_(y, heads + kv_heads, cos, sin, 1.0)


def rotate_(y: Tensor, heads: int, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Turn the first `heads` heads of y [t, heads · width …] in place; cos and sin [t, width]; sign -1 turns back.

    Rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) in the layout of halves that Hugging Face models use.
    """
    if y.is_cuda:
        from graft.model.triton_kernels import rotate_ as on_gpu

        return on_gpu(y, heads, cos, sin, sign)
    t, width = cos.shape
    x = y[:, : heads * width].view(t, heads, width)
    a, b = x.float().chunk(2, dim=-1)
    c, s = cos[:, None, : width // 2].float(), sin[:, None, : width // 2].float() * sign
    x.copy_(torch.cat([a * c - b * s, b * c + a * s], dim=-1))
    return None


# ---- MLP ----------------------------------------------------------------------------------------------------------------
def _wide(rank: int, inner: int) -> Layout:
    return Layout(rank, [0, inner], [inner, inner])


@library.custom_op("graft::mlp_forward", mutates_args=())
def mlp_forward(
    x: Tensor,
    kind: str,
    wide: list[Tensor],
    narrow: list[Tensor],
    adapter: Tensor | None,
    adapter_down: Tensor | None,
    rank: int,
    inner: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output [t, h], gate | up without adapters, their u, the activation's u) of x [t, h]; wide: frozen gate and up; narrow: down.

    Without `keep`, gate | up come back empty, and the backward makes them again.
    """
    layout = _wide(rank, inner)
    y, u = matmul(x, kind, wide, None), down(x, adapter, layout, scale)
    act = swiglu(y, u, [] if adapter is None else layout.split(adapter, x.shape[1])[1])
    out, u_down = adapted(act, kind, narrow, None, adapter_down, Layout(rank, [0], [x.shape[1]]), scale)
    return out, y if keep else x.new_empty(0, 2 * inner), u, u_down


@mlp_forward.register_fake
def _(x, kind, wide, narrow, adapter, adapter_down, rank, inner, scale, keep):  # type: ignore[no-untyped-def]
    t = x.shape[0]
    us = [x.new_empty(t, 0 if m is None else layers * rank) for m, layers in ((adapter, 2), (adapter_down, 1))]
    return torch.empty_like(x), x.new_empty(t if keep else 0, 2 * inner), *us


@library.custom_op("graft::mlp_backward", mutates_args=())
def mlp_backward(
    dout: Tensor,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    u_down: Tensor,
    kind: str,
    wide: list[Tensor],
    narrow: list[Tensor],
    adapter: Tensor | None,
    adapter_down: Tensor | None,
    rank: int,
    inner: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, the gradients of both adapters)."""
    layout, of_down = _wide(rank, inner), Layout(rank, [0], [x.shape[1]])
    a, b = (None, []) if adapter is None else layout.split(adapter, x.shape[1])
    a_down = None if adapter_down is None else of_down.split(adapter_down, inner)[0]
    if len(y) < len(x):
        y = matmul(x, kind, wide, None)
    du_down = down_backward(dout, u_down, adapter_down, of_down, inner, scale)
    dy, of_b, of_a_down = swiglu_backward(matmul_back(dout, kind, narrow), y, u, b, du_down, a_down)
    dx = matmul_back(dy, kind, wide)
    du = down_backward(dy, u, adapter, layout, x.shape[1], scale)
    gradients = [x.new_empty(0) if m is None else torch.empty_like(m) for m in (adapter, adapter_down)]
    if adapter is not None and a is not None and of_b is not None:
        of_a, _ = layout.split(gradients[0], x.shape[1])
        torch.mm(du.t(), x, out=of_a)
        gradients[0][of_a.numel() :] = of_b.flatten()
        dx.addmm_(du, a)
    if adapter_down is not None and of_a_down is not None:
        of_a, (of_b_down,) = of_down.split(gradients[1], inner)
        of_a.copy_(of_a_down)
        torch.mm(dout.t(), u_down, out=of_b_down)
    return dx, gradients[0], gradients[1]


@mlp_backward.register_fake
def _(dout, x, y, u, u_down, kind, wide, narrow, adapter, adapter_down, rank, inner, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), *(x.new_empty(0) if m is None else torch.empty_like(m) for m in (adapter, adapter_down))


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.kind, wide, narrow, adapter, adapter_down, *ctx.rest, _ = inputs
    ctx.counts, ctx.has = (len(wide), len(narrow)), (adapter is not None, adapter_down is not None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], *wide, *narrow, *(m for m in (adapter, adapter_down) if m is not None))


def _mlp_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    x, y, u, u_down, *rest = ctx.saved_tensors
    wide, narrow, own = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts)], iter(rest[sum(ctx.counts) :])
    adapters = [next(own) if has else None for has in ctx.has]
    dx, *gradients = mlp_backward(dout.contiguous(), x, y, u, u_down, ctx.kind, wide, narrow, *adapters, *ctx.rest)
    none: list[list[None]] = [[None] * n for n in ctx.counts]
    return dx, None, *none, *(g if has else None for g, has in zip(gradients, ctx.has, strict=True)), None, None, None, None


mlp_forward.register_autograd(_mlp_backward, setup_context=_keep_mlp)


class FusedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)), no bias, no dropout."""

    def __init__(self, mlp: Any, recompute: bool):
        super().__init__()
        self.keep = not recompute
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.gate_proj.group, self.down_proj.group
        frozen, flat, rank = wide.frozen, x.reshape(-1, x.shape[-1]), max(wide.layout.rank, narrow.layout.rank)
        out, *_rest = mlp_forward(
            flat, frozen.kind, frozen.tensors, narrow.frozen.tensors, wide.adapter, narrow.adapter, rank, frozen.outs[0], wide.scale, self.keep
        )
        return out.view_as(x)


# ---- attention --------------------------------------------------------------------------------------------------------
@library.custom_op("graft::attend_forward", mutates_args=())
def attend_forward(
    x: Tensor,
    kind: str,
    frozen: list[Tensor],
    bias: Tensor | None,
    adapter: Tensor | None,
    rank: int,
    starts: list[int],
    sizes: list[int],
    scale: float,
    cos: Tensor,
    sin: Tensor,
    cu: Tensor,
    longest: Tensor,
    heads: int,
    kv_heads: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(attention's output [t, heads · width], q | k | v turned, u, the log of each softmax's sum) of x [t, h]; cos, sin [t, width]."""
    layout = Layout(rank, starts, sizes)
    y, u = matmul(x, kind, frozen, bias), down(x, adapter, layout, scale)
    own = {} if adapter is None else dict(zip(starts, layout.split(adapter, x.shape[1])[1], strict=True))
    width = cos.shape[1]
    adapt_and_rotate_(y, u, [own.get(first * width) for first in (0, heads, heads + kv_heads)], heads, kv_heads, cos, sin)
    out, lse = attention.forward(*_split(y, heads, kv_heads), cu, longest, softmax_scale, backend)
    return out.view(len(x), -1), y, u, lse


def _split(y: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [t, heads, width], views."""
    q, k, v = y.view(len(y), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@attend_forward.register_fake
def _(x, kind, frozen, bias, adapter, rank, starts, sizes, scale, cos, sin, cu, longest, heads, kv_heads, softmax_scale, backend):  # type: ignore[no-untyped-def]
    t, width = cos.shape
    wide = x.new_empty(t, (heads + 2 * kv_heads) * width)
    lse = x.new_empty(attention.lse_shape(t, heads, backend), dtype=torch.float32)
    return x.new_empty(t, heads * width), wide, x.new_empty(t, 0 if adapter is None else rank * len(sizes)), lse


@library.custom_op("graft::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    y: Tensor,
    u: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu: Tensor,
    longest: Tensor,
    kind: str,
    frozen: list[Tensor],
    adapter: Tensor | None,
    rank: int,
    starts: list[int],
    sizes: list[int],
    scale: float,
    heads: int,
    kv_heads: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, the gradient of the adapter)."""
    dy, shape, layout = torch.empty_like(y), (len(x), heads, -1), Layout(rank, starts, sizes)
    grads = _split(dy, heads, kv_heads)
    attention.backward(grads, dout.view(shape), *_split(y, heads, kv_heads), out.view(shape), lse, cu, longest, softmax_scale, backend)
    rotate_(dy, heads + kv_heads, cos, sin, -1.0)
    dx = matmul_back(dy, kind, frozen)
    du, gradient = adapter_gradient(dy, x, u, adapter, layout, scale)
    if adapter is not None:
        dx.addmm_(du, layout.split(adapter, x.shape[1])[0])
    return dx, gradient


@attend_backward.register_fake
def _(dout, x, out, y, u, lse, cos, sin, cu, longest, kind, frozen, adapter, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(0) if adapter is None else torch.empty_like(adapter)


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.kind, frozen, _, adapter, *ctx.layout_and_scale, cos, sin, cu, longest, heads, kv_heads, softmax_scale, backend = inputs
    ctx.rest = heads, kv_heads, softmax_scale, backend
    ctx.count = len(frozen)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output, cos, sin, cu, longest, *frozen, *([] if adapter is None else [adapter]))


def _attend_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    x, out, y, u, lse, cos, sin, cu, longest, *rest = ctx.saved_tensors
    frozen, adapter = rest[: ctx.count], rest[ctx.count] if len(rest) > ctx.count else None
    given = x, out, y, u, lse, cos, sin, cu, longest
    dx, gradient = attend_backward(dout.contiguous(), *given, ctx.kind, frozen, adapter, *ctx.layout_and_scale, *ctx.rest)
    return dx, None, [None] * ctx.count, None, None if adapter is None else gradient, *[None] * 12


attend_forward.register_autograd(_attend_backward, setup_context=_keep_attend)


class FusedAttention(nn.Module):
    """q, k, v, rotary embedding, attention over packed documents, o."""

    def __init__(self, attn: Any):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        self.width, self.softmax_scale = attn.head_dim, attn.scaling
        self.heads, self.kv_heads = (m.out_features // attn.head_dim for m in (attn.q_proj, attn.k_proj))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], cu: Tensor, longest: Tensor, backend: str, **_: Any
    ) -> tuple[Tensor, None]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        group = self.q_proj.group
        frozen = group.frozen
        cos, sin = (angles.reshape(len(x), -1) for angles in position_embeddings)
        given = cos, sin, cu, longest, self.heads, self.kv_heads, self.softmax_scale, backend
        out, *_rest = attend_forward(x, frozen.kind, frozen.tensors, frozen.bias, group.adapter, *group.layout, group.scale, *given)
        return self.o_proj(out.view(*hidden_states.shape[:-1], -1)), None


def fuse_blocks(model: nn.Module, recompute: bool = False) -> None:
    """Put the operators in place of every layer's halves where they compute the same; the adapters keep their names.

    recompute: the MLP's wide activations, two thirds of a layer's, are made again in the backward: a quarter more work.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            layers = [m for m in child.children() if isinstance(m, FusedLinear)]
            if not layers or any(layer.beside for layer in layers):
                continue
            if type(child).__name__ in ATTENTIONS:
                setattr(module, name, FusedAttention(child))
            elif type(child).__name__ in MLPS and _is_plain(child):
                setattr(module, name, FusedMlp(child, recompute))


def _is_plain(mlp: Any) -> bool:
    """No bias, the activation SiLU, and adapters on both of gate and up or on neither."""
    layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    x = torch.linspace(-3, 3, 7)
    silu = bool(torch.allclose(mlp.act_fn(x), torch.nn.functional.silu(x)))
    return silu and all(layer.group.frozen.bias is None for layer in layers) and len(mlp.gate_proj.group.adapted) != 1
