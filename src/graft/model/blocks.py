"""The two halves of a decoder layer as one operator each: q, k, v, rotary embedding and attention; and the gated MLP.

What a chain of operators would write and read again stays in place: the adapters of gate and up are added inside the
activation, that of down inside its gradient, and q, k and v are turned and attended to where the matmul left them. Used
for Llama, Mistral and Qwen2 layers (layouts of https://arxiv.org/abs/2307.09288); any other runs through fused.py alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.model import attention
from graft.model.frozen import matmul, matmul_back
from graft.model.fused import FusedLinear, adapted, adapter_gradients, down

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


def swiglu_backward(dact: Tensor, y: Tensor, u: Tensor, b: list[Tensor], du: Tensor, a: Tensor | None) -> Tensor:
    """The gradient [t, 2 n] of y, where that of the output is dact [t, n] + du a."""
    if y.is_cuda:
        from graft.model.triton_kernels import swiglu_backward as on_gpu

        return on_gpu(dact, y, u, b, du, a)
    gate, up = _gate_and_up(y, u, b)
    d = dact.float() if a is None else dact.float() + du.float() @ a.float()
    s = gate.sigmoid()
    return torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=1).to(y.dtype)


def _gate_and_up(y: Tensor, u: Tensor, b: list[Tensor]) -> list[Tensor]:
    halves = [half.float() for half in y.chunk(2, dim=1)]
    return [half + part.float() @ up.float().t() for half, part, up in zip(halves, u.chunk(2, dim=1), b, strict=True)] if b else halves


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
@torch.library.custom_op("graft::mlp_forward", mutates_args=())
def mlp_forward(
    x: Tensor,
    kind: str,
    wide: list[Tensor],
    narrow: list[Tensor],
    a: Tensor | None,
    b: list[Tensor],
    a_down: Tensor | None,
    b_down: list[Tensor],
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output [t, h], gate | up without adapters, their u, activation, its u) of x [t, h]; wide: frozen gate and up; narrow: down.

    Without `keep`, gate | up and the activation come back empty, and the backward makes them again.
    """
    y, u = matmul(x, kind, wide, None), down(x, a, scale)
    act = swiglu(y, u, b)
    out, u_down = adapted(act, kind, narrow, None, a_down, b_down, [0], scale)
    return (out, y, u, act, u_down) if keep else (out, x.new_empty(0, y.shape[1]), u, x.new_empty(0, act.shape[1]), u_down)


@mlp_forward.register_fake
def _(x, kind, wide, narrow, a, b, a_down, b_down, scale, keep):  # type: ignore[no-untyped-def]
    t, h = x.shape
    kept = t if keep else 0
    n = _inner(kind, wide, narrow, h)
    r, r_down = (0 if m is None else m.shape[0] for m in (a, a_down))
    return torch.empty_like(x), x.new_empty(kept, 2 * n), x.new_empty(t, r), x.new_empty(kept, n), x.new_empty(t, r_down)


def _inner(kind: str, wide: list[Tensor], narrow: list[Tensor], h: int) -> int:
    return 2 * narrow[0].numel() // h if kind == "nf4" else wide[0].shape[0] // 2


@torch.library.custom_op("graft::mlp_backward", mutates_args=())
def mlp_backward(
    dout: Tensor, x: Tensor, y: Tensor, u: Tensor, act: Tensor, u_down: Tensor,
    kind: str, wide: list[Tensor], narrow: list[Tensor], a: Tensor | None, b: list[Tensor], a_down: Tensor | None, b_down: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """(dx, dA, [dB], dA of down, [dB of down])."""
    if len(y) < len(x):
        y = matmul(x, kind, wide, None)
        act = swiglu(y, u, b)
    du_down, da_down, db_down = adapter_gradients(dout, act, u_down, a_down, b_down, [0], scale)
    dy = swiglu_backward(matmul_back(dout, kind, narrow), y, u, b, du_down, a_down)
    dx = matmul_back(dy, kind, wide)
    du, da, db = adapter_gradients(dy, x, u, a, b, [0, dy.shape[1] // 2], scale)
    if a is not None:
        dx.addmm_(du, a)
    return dx, da, db, da_down, db_down


@mlp_backward.register_fake
def _(dout, x, y, u, act, u_down, kind, wide, narrow, a, b, a_down, b_down, scale):  # type: ignore[no-untyped-def]
    like = [x.new_empty(0) if m is None else torch.empty_like(m) for m in (a, a_down)]
    return torch.empty_like(x), like[0], [torch.empty_like(m) for m in b], like[1], [torch.empty_like(m) for m in b_down]


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.kind, wide, narrow, a, b, a_down, b_down, ctx.scale, _ = inputs
    ctx.counts = len(wide), len(narrow), len(b), len(b_down)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], *wide, *narrow, *([a, *b] if b else []), *([a_down, *b_down] if b_down else []))


def _mlp_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    x, y, u, act, u_down, *rest = ctx.saved_tensors
    wide, narrow, adapters = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts[:2])], rest[sum(ctx.counts[:2]) :]
    a, *b = adapters[: 1 + ctx.counts[2]] if ctx.counts[2] else [None]
    a_down, *b_down = adapters[-1 - ctx.counts[3] :] if ctx.counts[3] else [None]
    dx, da, db, da_down, db_down = mlp_backward(dout.contiguous(), x, y, u, act, u_down, ctx.kind, wide, narrow, a, b, a_down, b_down, ctx.scale)
    none: list[list[None]] = [[None] * n for n in ctx.counts[:2]]
    return dx, None, *none, da if b else None, db, da_down if b_down else None, db_down, None, None


mlp_forward.register_autograd(_mlp_backward, setup_context=_keep_mlp)


class FusedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)), no bias, no dropout."""

    def __init__(self, mlp: Any, recompute: bool):
        super().__init__()
        self.keep = not recompute
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.gate_proj.group, self.down_proj.group
        a, b, scale, _ = wide.adapters()
        a_down, b_down, scale_down, _ = narrow.adapters()
        frozen, flat = wide.frozen, x.reshape(-1, x.shape[-1])
        out, *_rest = mlp_forward(
            flat, frozen.kind, frozen.tensors, narrow.frozen.tensors, a, b, a_down, b_down, scale if b else scale_down, self.keep
        )
        return out.view_as(x)


# ---- attention --------------------------------------------------------------------------------------------------------
@torch.library.custom_op("graft::attend_forward", mutates_args=())
def attend_forward(
    x: Tensor, kind: str, frozen: list[Tensor], bias: Tensor | None, a: Tensor | None, b: list[Tensor], starts: list[int], scale: float,
    cos: Tensor, sin: Tensor, cu: Tensor, longest: Tensor, heads: int, kv_heads: int, softmax_scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(attention's output [t, heads · width], q | k | v turned, u, the log of each softmax's sum) of x [t, h]; cos, sin [t, width]."""
    y, u = adapted(x, kind, frozen, bias, a, b, starts, scale)
    rotate_(y, heads + kv_heads, cos, sin, 1.0)
    out, lse = attention.forward(*_split(y, heads, kv_heads), cu, longest, softmax_scale, backend)
    return out.view(len(x), -1), y, u, lse


def _split(y: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [t, heads, width], views."""
    q, k, v = y.view(len(y), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@attend_forward.register_fake
def _(x, kind, frozen, bias, a, b, starts, scale, cos, sin, cu, longest, heads, kv_heads, softmax_scale, backend):  # type: ignore[no-untyped-def]
    t, width = cos.shape
    wide = x.new_empty(t, (heads + 2 * kv_heads) * width)
    lse = x.new_empty(attention.lse_shape(t, heads, backend), dtype=torch.float32)
    return x.new_empty(t, heads * width), wide, x.new_empty(t, 0 if a is None else a.shape[0]), lse


@torch.library.custom_op("graft::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, x: Tensor, out: Tensor, y: Tensor, u: Tensor, lse: Tensor,
    kind: str, frozen: list[Tensor], a: Tensor | None, b: list[Tensor], starts: list[int], scale: float,
    cos: Tensor, sin: Tensor, cu: Tensor, longest: Tensor, heads: int, kv_heads: int, softmax_scale: float, backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """(dx, dA, [dB])."""
    dy = torch.empty_like(y)
    shape = len(x), heads, -1
    grads = _split(dy, heads, kv_heads)
    attention.backward(grads, dout.view(shape), *_split(y, heads, kv_heads), out.view(shape), lse, cu, longest, softmax_scale, backend)
    rotate_(dy, heads + kv_heads, cos, sin, -1.0)
    dx = matmul_back(dy, kind, frozen)
    du, da, db = adapter_gradients(dy, x, u, a, b, starts, scale)
    if a is not None:
        dx.addmm_(du, a)
    return dx, da, db


@attend_backward.register_fake
def _(dout, x, out, y, u, lse, kind, frozen, a, b, starts, scale, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(0) if a is None else torch.empty_like(a), [torch.empty_like(m) for m in b]


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.kind, frozen, _, a, b, ctx.starts, ctx.scale, cos, sin, cu, longest, *ctx.rest = inputs
    ctx.count, ctx.adapted = len(frozen), a is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output, cos, sin, cu, longest, *frozen, *([a, *b] if a is not None else []))


def _attend_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    x, out, y, u, lse, cos, sin, cu, longest, *rest = ctx.saved_tensors
    frozen, adapters = rest[: ctx.count], rest[ctx.count :]
    a, *b = adapters if ctx.adapted else [None]
    given = ctx.kind, frozen, a, b, ctx.starts, ctx.scale, cos, sin, cu, longest, *ctx.rest
    dx, da, db = attend_backward(dout.contiguous(), x, out, y, u, lse, *given)
    return dx, None, [None] * ctx.count, None, da if ctx.adapted else None, db, *[None] * 10


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
        a, b, scale, starts = group.adapters()
        cos, sin = (angles.reshape(len(x), -1) for angles in position_embeddings)
        frozen = group.frozen
        out, *_rest = attend_forward(
            x,
            frozen.kind,
            frozen.tensors,
            frozen.bias,
            a,
            b,
            starts,
            scale,
            cos,
            sin,
            cu,
            longest,
            self.heads,
            self.kv_heads,
            self.softmax_scale,
            backend,
        )
        return self.o_proj(out.view(*hidden_states.shape[:-1], -1)), None


def fuse_blocks(model: nn.Module, recompute: bool = False) -> None:
    """Put the operators in place of every layer's halves where they compute the same; the adapters keep their names.

    recompute: the MLP's wide activations, two thirds of a layer's, are made again in the backward for a sixth more time.
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
    return silu and all(layer.group.frozen.bias is None for layer in layers) and (mlp.gate_proj.A is None) == (mlp.up_proj.A is None)
