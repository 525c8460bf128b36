"""What lies between the matmuls of a decoder layer: norms, residuals, the gated activation and the rotary embedding, each with
the adapters that are added there. On a GPU each is a kernel (kernels/); the arithmetic here is its twin on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.model.dropout import Drop, down_product, dropped
from graft.model.frozen import Operand, quantize_rows
from graft.model.gemm import roomy, widened


# ---- norms and residuals ------------------------------------------------------------------------------------------------
def norm(
    x: Tensor, weight: Tensor, eps: float, a: Tensor | None, scale: float, fp8: bool, drop: Drop | None = None
) -> tuple[Operand, Tensor, Tensor]:
    """(n = x · rstd · weight of x [t, h], as matmul() takes it; rstd [t] fp32; u = scale · n aᵀ [t, r], empty where a [r, h] is None).

    drop: of the adapters whose A lie in a, one below the other. RMS norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467),
    rounded where Hugging Face's models round.
    """
    if x.is_cuda:
        from graft.model.kernels.norm import norm as on_gpu

        return on_gpu(x, weight, eps, a, scale, fp8, drop)
    wide = x.float()
    rstd = (wide.pow(2).mean(dim=1) + eps).rsqrt()
    n = weight * (wide * rstd[:, None]).to(x.dtype)
    u = x.new_empty(len(x), 0) if a is None else down_product(n, a, drop, scale)
    return quantize_rows(n) if fp8 else n, rstd, u


def norm_backward(
    dout: Tensor | None, dn: Tensor, du: Tensor, a: Tensor | None, u: Tensor, scale: float, x: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """dx [t, h] where dn + du a flows back to norm(x), and dout, if any, past it: du [t, r]; a, u and scale as they were there."""
    if x.is_cuda:
        from graft.model.kernels.norm import norm_backward as on_gpu

        return on_gpu(dout, dn, du, a, u, scale, x, rstd, weight)
    g = (dn.float() if a is None else dn.float() + du.float() @ a.float()) * weight.float()
    normed = x.float() * rstd[:, None]
    dx = rstd[:, None] * (g - normed * (g * normed).mean(dim=1, keepdim=True))
    return (dx if dout is None else dout.float() + dx).to(x.dtype)


def of_norm(raw: Tensor, scale: float, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(du = scale · raw [t, r], du · rstd [t, r]) in dtype, of raw whose rows may lie apart and rstd [t] fp32."""
    if raw.is_cuda and raw.numel():
        from graft.model.kernels.norm import of_norm as on_gpu

        return on_gpu(raw, scale, rstd, dtype)
    du = raw * scale
    return du, (du * rstd[:, None]).to(dtype)


def add_(y: Tensor, x: Tensor, u: Tensor, b: Tensor | None) -> None:
    """y += x + u bᵀ in place: y and x [t, h], u [t, r], b [h, r] or None."""
    if y.is_cuda:
        from graft.model.kernels.norm import add_ as on_gpu

        return on_gpu(y, x, u, b)
    y.add_(x)
    if b is not None:
        y.addmm_(u, b.t())
    return None


# ---- the activation -----------------------------------------------------------------------------------------------------
def swiglu(
    y: Tensor, u: Tensor, b: list[Tensor], a: Tensor | None = None, scale: float = 1.0, drop: Drop | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """(act = silu(gate) · up of gate | up = y [t, 2 n] + u Bᵀ; scale · act aᵀ [t, r], empty where a [r, n] is None).

    b: [] or [n, r] of gate and up, u [t, 2 r]; drop: of the adapter of a; room: numbers between two rows of act, of which the second result has
    the first as well.
    """
    if y.is_cuda:
        from graft.model.kernels.swiglu import swiglu as on_gpu

        return on_gpu(y, u, b, a, scale, drop, room)
    gate, up = _gate_and_up(y, u, b)
    act = roomy(y, up.shape[1], room).copy_(F.silu(gate) * up)
    u_down = y.new_empty(len(y), 0) if a is None else down_product(act, a, drop, scale)
    if room:
        widened(act, u_down.shape[1])[:, act.shape[1] :] = u_down
    return act, u_down


def swiglu_backward(
    dact: Tensor,
    y: Tensor,
    u: Tensor,
    b: list[Tensor],
    du: Tensor,
    a: Tensor | None,
    of_b: Tensor | None,
    of_a: Tensor | None,
    drop: Drop | None = None,
) -> Tensor:
    """What flows back where the gradient of the output act is d = dact [t, n] + du a; a [r, n] or None, du [t, r]; rows of dact may lie apart.

    Returns the gradient dy [t, 2 n] of y, and fills in that of b, dyᵀ u of each half, in of_b [2, n, r], None where b is [], and duᵀ act in
    of_a [r, n], None where a is. drop: of the adapter of a, both du a and act without what it drops.
    """
    if y.is_cuda:
        from graft.model.kernels.swiglu import swiglu_backward as on_gpu

        return on_gpu(dact, y, u, b, du, a, of_b, of_a, drop)
    gate, up = _gate_and_up(y, u, b)
    s = gate.sigmoid()
    d = dact.float()
    if a is not None and of_a is not None:
        through, act = du.float() @ a.float(), (gate * s * up).to(y.dtype)
        if drop is not None:
            through, act = dropped(through, drop, 0), dropped(act, drop, 0)
        d = d + through
        torch.mm(du.t(), act, out=of_a)
    dy = torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=1).to(y.dtype)
    for half, part, out in zip(dy.chunk(2, dim=1), u.chunk(2, dim=1), of_b if of_b is not None else [], strict=of_b is not None):
        torch.mm(half.t(), part, out=out)
    return dy


def _gate_and_up(y: Tensor, u: Tensor, b: list[Tensor]) -> list[Tensor]:
    halves = [half.float() for half in y.chunk(2, dim=1)]
    return [half + part.float() @ up.float().t() for half, part, up in zip(halves, u.chunk(2, dim=1), b, strict=True)] if b else halves


# ---- rotary embedding ------------------------------------------------------------------------------------------------
def adapt_and_rotate_(y: Tensor, u: Tensor, b: list[Tensor | None], heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> None:
    """Add u Bᵀ to the columns of q, k and v in y [t, (heads + 2 kv_heads) · width], then turn q and k; b: their B or None, u [t, r] of each that is."""
    if y.is_cuda and any(m is not None for m in b):
        from graft.model.kernels.rotary import adapt_and_rotate_ as on_gpu

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
        from graft.model.kernels.rotary import rotate_ as on_gpu

        return on_gpu(y, heads, cos, sin, sign)
    t, width = cos.shape
    x = y[:, : heads * width].view(t, heads, width)
    a, b = x.float().chunk(2, dim=-1)
    c, s = cos[:, None, : width // 2].float(), sin[:, None, : width // 2].float() * sign
    x.copy_(torch.cat([a * c - b * s, b * c + a * s], dim=-1))
    return None
