"""The two halves of a decoder layer, x + attention(norm(x)) and x + MLP(norm(x)), each one step for autograd.

What a chain of operators would write and read again stays in place: a norm hands its rows to the matmul in the matmul's own
format and their product with the adapters' A beside it; adapters are added inside the activation, the rotary embedding and
the residual; q, k and v are turned and attended to where the matmul left them. Of a norm its input is kept, not its output.
Nothing here is compiled. Used for layers as Llama's (https://arxiv.org/abs/2307.09288), also where a token has three positions
(M-RoPE: the angles of its row, column and time are laid side by side before the first layer); others run through fused.py alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.recipe import FUSED_RANK
from graft.model import attention, beside
from graft.model.dropout import Drop, add_back_, grown, of_a
from graft.model.elementwise import adapt_and_rotate_, add_, norm, norm_backward, of_norm, rotate_, swiglu, swiglu_backward
from graft.model.frozen import matmul, matmul_back
from graft.model.fused import FusedLinear, Group, adapted_backward, down, through_b

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen2_5_VLDecoderLayer")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen2_5_VLAttention")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen2_5_VLRMSNorm")


class Half:
    """A norm, the layers that read it, one group, and the last layer, whose output is added to the half's input."""

    def __init__(self, norm: Any, group: Group, last: Group):
        self.weight, self.eps, self.group, self.last = norm.weight, norm.variance_epsilon, group, last

    def read(self, x: Tensor, adapter: Tensor | None, drop: Drop | None) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """(the group's output without its adapters, their B, u [t, layers · r], rstd [t] of the norm) of x [t, h]."""
        group, frozen = self.group, self.group.frozen
        a, b = (None, []) if adapter is None else group.layout.split(adapter, frozen.ins)
        n, rstd, u = norm(x, self.weight, self.eps, a, grown(group.scale, drop), frozen.kind == "fp8", drop)
        return matmul(n, frozen.kind, frozen.tensors, frozen.bias), b, u, rstd

    def back(
        self,
        dout: Tensor,
        dy: Tensor,
        gradient: Tensor | None,
        x: Tensor,
        u: Tensor,
        rstd: Tensor,
        adapter: Tensor | None,
        drop: Drop | None,
        wanted: bool,
    ) -> Tensor | None:
        """dx where it is wanted, of the gradient dy of read()'s output, and dout that flows past; that of A is filled in in the adapter's gradient."""
        group, frozen, a = self.group, self.group.frozen, None
        dn, raw = _back(dy, u, group, adapter) if wanted else (None, through_b(dy, u, adapter, group.layout, frozen.ins))
        du, turned = of_norm(raw, grown(group.scale, drop), rstd, x.dtype)
        if adapter is not None and gradient is not None:
            a, _ = group.layout.split(adapter, frozen.ins)
            da, _ = group.layout.split(gradient, frozen.ins)
            of_a(turned, x, drop, da)  # duᵀ (x · rstd · weight), without the product
            da.mul_(self.weight)
        if dn is None:
            return None
        if a is not None and drop is not None:
            add_back_(dn, du, a, drop)
            a = None
        return norm_backward(dout, dn, du, a, u, group.scale, x, rstd, self.weight)


def _back(dy: Tensor, u: Tensor, group: Group, adapter: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dy W, dy B) of the gradient dy of a group's output."""
    if adapter is not None and (both := beside.back(dy, group, adapter)):
        return both
    frozen = group.frozen
    return matmul_back(dy, frozen.kind, frozen.tensors), through_b(dy, u, adapter, group.layout, frozen.ins)


def _of_b(dy: Tensor, u: Tensor, group: Group, gradient: Tensor | None) -> None:
    """Fill in every dyᵀ u in the gradient of a group's adapter."""
    if gradient is not None:
        for (own, part), one in zip(group.layout.columns(dy, u), group.layout.split(gradient, group.frozen.ins)[1], strict=True):
            torch.mm(own.t(), part, out=one)


def _like(adapter: Tensor | None) -> Tensor | None:
    return None if adapter is None else torch.empty_like(adapter)


def _write(x: Tensor, inner: Tensor, u: Tensor, group: Group, adapter: Tensor | None) -> Tensor:
    """x + the layer's output of inner, in whose room, if any, u stands, and u: the end of a half; group is of one layer."""
    if adapter is not None and (whole := beside.add(x, inner, group, adapter)) is not None:
        return whole
    frozen = group.frozen
    out = matmul(inner, frozen.kind, frozen.tensors, frozen.bias)
    add_(out, x, u, None if adapter is None else group.layout.split(adapter, frozen.ins)[1][0])
    return out


# ---- attention --------------------------------------------------------------------------------------------------------
class Where(NamedTuple):
    """What attention needs to know of the tokens of a micro-batch."""

    cos: Tensor  # [t, width], as sin
    sin: Tensor
    cu: Tensor  # as attention.Documents has them
    longest: Tensor
    backend: str


class AttentionHalf(Half):
    """x + o(attention(q, k, v of norm(x))) over packed documents. again: the backward makes all but its input again."""

    def __init__(self, norm: Any, attn: Any, again: bool):
        super().__init__(norm, attn.q_proj.group, attn.o_proj.group)
        self.softmax_scale, self.again = attn.scaling, again
        self.heads, self.kv_heads = (m.out_features // attn.head_dim for m in (attn.q_proj, attn.k_proj))

    def __call__(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], cu: Tensor, longest: Tensor, backend: str, **_: Any) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        cos, sin = (angles.reshape(len(flat), -1) for angles in position_embeddings)
        out: Tensor = _Attend.apply(flat, self.group.adapter, self.last.adapter, self, Where(cos, sin, cu, longest, backend))
        return out.view_as(x)

    def attend(self, x: Tensor, adapter: Tensor | None, drop: Drop | None, where: Where) -> tuple[Tensor, ...]:
        """(attention's output [t, heads · width], the log of each softmax's sum, q | k | v turned, u, rstd)."""
        y, b, u, rstd = self.read(x, adapter, drop)
        own = dict(zip(self.group.adapted, b, strict=True))  # by place: q, k, v
        adapt_and_rotate_(y, u, [own.get(place) for place in range(3)], self.heads, self.kv_heads, where.cos, where.sin)
        given = *self.split(y), where.cu, where.longest, self.softmax_scale, where.backend
        out, lse = attention.forward(*given, room=beside.room_after(len(x), self.last))
        return out.flatten(1), lse, y, u, rstd

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [t, heads, width], views."""
        q, k, v = y.unflatten(1, (self.heads + 2 * self.kv_heads, -1)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adapter: Tensor | None, adapter_o: Tensor | None, half: AttentionHalf, where: Where) -> Tensor:
        drop, drop_o = drops = half.group.drop, half.last.drop
        inner = half.attend(x, adapter, drop, where)
        u_o = down(inner[0], adapter_o, half.last.layout, half.last.scale, drop_o, beside.behind(inner[0], half.last))
        out = _write(x, inner[0], u_o, half.last, adapter_o)
        ctx.half, ctx.where, ctx.drops = half, where, drops
        ctx.save_for_backward(x, adapter, adapter_o, u_o, *(() if half.again else inner))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        half, where, (drop, drop_o) = ctx.half, ctx.where, ctx.drops
        x, adapter, adapter_o, u_o, *kept = ctx.saved_tensors
        out, lse, y, u, rstd = kept or half.attend(x, adapter, drop, where)
        dout, o = dout.contiguous(), half.last
        d, raw = _back(dout, u_o, o, adapter_o)
        d, of_o = adapted_backward(d, raw * grown(o.scale, drop_o), dout, out, u_o, adapter_o, o.layout, drop_o)
        dy = torch.empty_like(y)
        rows, made = (m.unflatten(1, (half.heads, -1)) for m in (d, out))
        given = rows, *half.split(y), made, lse, where.cu, where.longest, half.softmax_scale, where.backend
        attention.backward(half.split(dy), *given)
        rotate_(dy, half.heads + half.kv_heads, where.cos, where.sin, -1.0)
        gradient = _like(adapter)
        dx = half.back(dout, dy, gradient, x, u, rstd, adapter, drop, ctx.needs_input_grad[0])
        _of_b(dy, u, half.group, gradient)
        return dx, gradient, None if adapter_o is None else of_o, None, None


# ---- MLP ----------------------------------------------------------------------------------------------------------------
class MlpHalf(Half):
    """x + down(silu(gate(norm(x))) · up(norm(x))), no bias. again: the backward makes gate | up again."""

    def __init__(self, norm: Any, mlp: Any, again: bool):
        super().__init__(norm, mlp.gate_proj.group, mlp.down_proj.group)
        self.again = again

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _Mlp.apply(x.reshape(-1, x.shape[-1]), self.group.adapter, self.last.adapter, self)
        return out.view_as(x)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adapter: Tensor | None, adapter_down: Tensor | None, half: MlpHalf) -> Tensor:
        drop, drop_down = drops = half.group.drop, half.last.drop
        y, b, u, rstd = half.read(x, adapter, drop)
        narrow = half.last
        a = None if adapter_down is None else narrow.layout.split(adapter_down, narrow.frozen.ins)[0]
        act, u_down = swiglu(y, u, b, a, grown(narrow.scale, drop_down), drop_down, beside.room_after(len(x), narrow))
        out = _write(x, act, u_down, narrow, adapter_down)
        ctx.half, ctx.drops = half, drops
        ctx.save_for_backward(x, adapter, adapter_down, u_down, *(() if half.again else (y, u, rstd)))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        half, narrow, (drop, drop_down) = ctx.half, ctx.half.last, ctx.drops
        x, adapter, adapter_down, u_down, *kept = ctx.saved_tensors
        b = [] if adapter is None else half.group.layout.split(adapter, half.group.frozen.ins)[1]
        y, u, rstd = kept or [one for n, one in enumerate(half.read(x, adapter, drop)) if n != 1]
        dout, a, of_b, of_act = dout.contiguous(), None, None, None
        gradient, gradient_down = _like(adapter), _like(adapter_down)
        if gradient is not None:
            of_b = gradient[len(gradient) - y.shape[1] * half.group.layout.rank :].view(2, -1, half.group.layout.rank)  # gate's, and behind it up's
        if adapter_down is not None and gradient_down is not None:
            (a, _), (of_act, _) = (narrow.layout.split(m, narrow.frozen.ins) for m in (adapter_down, gradient_down))
            _of_b(dout, u_down, narrow, gradient_down)
        dact, raw = _back(dout, u_down, narrow, adapter_down)
        dy = swiglu_backward(dact, y, u, b, raw * grown(narrow.scale, drop_down), a, of_b, of_act, drop_down)
        del dact  # as large as act: not needed while the rest goes back
        dx = half.back(dout, dy, gradient, x, u, rstd, adapter, drop, ctx.needs_input_grad[0])
        return dx, gradient, gradient_down, None


# ---- the last norm ----------------------------------------------------------------------------------------------------
class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n, rstd, _ = norm(x, weight, eps, None, 1.0, False)
        ctx.save_for_backward(x, rstd, weight)
        assert isinstance(n, Tensor)
        return n

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        none = dn.new_empty(len(x), 0)
        return norm_backward(None, dn.contiguous(), none, None, none, 1.0, x, rstd, weight), None, None


def _normed(last: Any, hidden_states: Tensor) -> Tensor:
    out: Tensor = _Norm.apply(hidden_states.reshape(-1, hidden_states.shape[-1]), last.weight, last.variance_epsilon)
    return out.view_as(hidden_states)


# ---- the layers -------------------------------------------------------------------------------------------------------
def fuse_blocks(model: Any, kept: str = "none") -> None:
    """Run every layer by its halves, and the last norm, where they compute the same: layer.halves, None for one that the layer's own modules compute.

    kept "selective": the MLP's wide activations, two thirds of a layer's, are made again in the backward, for a quarter more work;
    "full": all but the input of each half, where both are fused.
    """
    for layer in model.modules():
        if type(layer).__name__ not in LAYERS:
            continue
        attn, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
        fits = [_fits(child, norm) for child, norm in zip((attn, mlp), norms, strict=True)]
        fits[0] = fits[0] and type(attn).__name__ in ATTENTIONS
        fits[1] = fits[1] and type(mlp).__name__ in MLPS and _is_plain(mlp)
        whole = all(fits)
        attend = AttentionHalf(norms[0], attn, whole and kept == "full") if fits[0] else None
        gated = MlpHalf(norms[1], mlp, kept == "selective" or (whole and kept == "full")) if fits[1] else None
        layer.halves = attend, gated
        if whole:
            layer.forward = partial(_whole, attend, gated)
        elif attend:
            layer.forward = partial(_by_attention, layer, torch.compiler.disable(attend))
        elif gated:
            layer.forward = partial(_by_mlp, layer, torch.compiler.disable(gated))

    last: Any = getattr(getattr(model.base_model, "language_model", model.base_model), "norm", None)
    if type(last).__name__ in NORMS:
        last.forward = partial(_normed, last)


# one function each: torch.compile, which takes the rest of a layer, guards no argument that is a disabled function
def _whole(attend: Any, mlp: Any, hidden_states: Tensor, **given: Any) -> Tensor:
    out: Tensor = mlp(attend(hidden_states, **given))
    return out


def _by_attention(layer: Any, attend: Any, hidden_states: Tensor, **given: Any) -> Tensor:
    x: Tensor = attend(hidden_states, **given)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _by_mlp(layer: Any, mlp: Any, hidden_states: Tensor, **given: Any) -> Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
    out: Tensor = mlp(hidden_states + attended)
    return out


def _fits(module: Any, norm: Any) -> bool:
    linears = [m for m in module.children() if isinstance(m, FusedLinear)]
    narrow = all(m.group.layout.rank <= FUSED_RANK for m in linears)
    return bool(linears) and narrow and type(norm).__name__ in NORMS


def _is_plain(mlp: Any) -> bool:
    """No bias, the activation SiLU, and adapters on both of gate and up or on neither."""
    layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return is_silu(mlp.act_fn) and all(layer.group.frozen.bias is None for layer in layers) and len(mlp.gate_proj.group.adapted) != 1


def is_silu(act: Any) -> bool:
    x = torch.linspace(-3, 3, 7)
    return bool(torch.allclose(act(x), torch.nn.functional.silu(x)))
