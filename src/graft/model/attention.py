"""Causal attention over packed documents, none across its border, by the fastest kernel that the machine has.

On an H200, forward and backward of four documents of 4,096 tokens, 32 heads of 128: `fa4`, FlashAttention-4
(`pip install --pre flash-attn-4`), 3.5 ms; `cudnn`, NVIDIA's through its frontend (`pip install nvidia-cudnn-frontend`),
4.8 ms; `flash`, what PyTorch carries (FlashAttention-2, or 3 where that is installed), 6.7 ms. `reference` runs anywhere
with a mask of seq_len² bytes a bin. fastest() tries those that are there and remembers the answer on the machine. Where
torch.use_deterministic_algorithms is on, each sums its gradients in one order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library

from graft.core.errors import ConfigError
from graft.model.gemm import roomy
from graft.model.remembered import folder, recalled, remember

NAME = "graft_packed"  # what transformers calls it
WRONG = 2e-2  # relative, of the output or a gradient in bf16, against the reference
BACKENDS = {"fa4": "flash_attn.cute", "cudnn": "cudnn", "flash": "torch"}  # and the module that each needs


class Documents(NamedTuple):
    """The borders of the packed documents of a micro-batch."""

    cu: Tensor  # [documents + 1] int32 on the device, 0 and then where each ends
    longest: Tensor  # [] int32 on the CPU, tokens


def block_causal_mask(cu: Tensor, bins: int, seq_len: int) -> Tensor:
    """[bins, 1, seq_len, seq_len] bool, True where query i may see key j: same document and j <= i."""
    document = torch.searchsorted(cu, torch.arange(bins * seq_len, dtype=cu.dtype, device=cu.device), right=True).view(bins, seq_len)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=cu.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """q [t, heads, d], k and v [t, kv_heads, d] -> [t, heads, d]."""
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = block_causal_mask(documents.cu, 1, len(q))
    return F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, backend: str) -> Tensor:
    """q [t, heads, d], k and v [t, kv_heads, d], bf16 on a GPU -> [t, heads, d]; heads is a multiple of kv_heads."""
    return attention_forward(q, k, v, documents.cu, documents.longest, scale, backend)[0]


def register() -> None:
    """Make `attn_implementation = NAME` known to transformers; the model is called with documents= and backend=."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _of_transformers)


def _of_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    cu: Tensor,
    longest: Tensor,
    backend: str,
    **_: Any,
) -> tuple[Tensor, None]:
    b, _h, t, d = query.shape
    q, k, v = (x.transpose(1, 2).reshape(b * t, -1, d) for x in (query, key, value))
    return attention(q, k, v, Documents(cu, longest), scaling, backend).view(b, t, -1, d), None


# ---- the kernels ------------------------------------------------------------------------------------------------------
def forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Tensor, scale: float, backend: str, room: int = 0) -> tuple[Tensor, Tensor]:
    """(out [t, heads, d], the log of each softmax's sum, laid out as the backend likes); rows of q, k, v may lie apart.

    room: numbers between two rows of out, where the backend can leave them.
    """
    if backend == "cudnn":
        return _cudnn(q, k, v, cu, longest, scale).forward(q, k, v, cu)
    into = roomy(q, q.shape[1] * q.shape[2], room).unflatten(1, q.shape[1:]) if backend in ("fa4", "reference") else None
    if backend == "reference":
        assert into is not None
        return into.copy_(reference(q, k, v, Documents(cu, longest), scale)), q.new_empty(0, dtype=torch.float32)
    n = int(longest)
    if backend == "fa4":
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(q, k, v, **_borders(cu, n, scale), return_lse=True, out=into)
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, n, n, 0.0, True, False, scale=scale)
    return out, lse


def _borders(cu: Tensor, longest: int, scale: float) -> dict[str, Any]:
    """FlashAttention-4's arguments."""
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": scale, "causal": True}


def _batched(cu: Tensor, longest: int, scale: float, lse: Tensor, *tensors: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """((lse, *tensors), arguments) of its backward. Documents of one length are a batch, in which no tile looks for its borders: 3 % faster (a forward is 10 % slower so)."""
    documents = len(cu) - 1
    if documents * longest != len(tensors[0]):
        return (lse, *tensors), _borders(cu, longest, scale)
    lse = lse.unflatten(1, (documents, longest)).transpose(0, 1).contiguous()
    return (lse, *(x.unflatten(0, (documents, longest)) for x in tensors)), {"softmax_scale": scale, "causal": True}


def lse_shape(t: int, heads: int, backend: str) -> tuple[int, ...]:
    return {"cudnn": (t, heads, 1), "reference": (0,)}.get(backend, (heads, t))


def backward(
    grads: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, longest: Tensor,
    scale: float, backend: str,
) -> None:  # fmt: skip
    """Fill in dq, dk and dv, which lie in memory as q, k and v do; rows of dout may lie apart, and of out as forward() left them."""
    if backend == "fa4":
        from flash_attn.cute.interface import _flash_attn_bwd

        (lse, q, k, v, out, dout, dq, dk, dv), given = _batched(cu, int(longest), scale, lse, q, k, v, out, dout, *grads)
        _flash_attn_bwd(q, k, v, out, dout, lse, **given, deterministic=torch.are_deterministic_algorithms_enabled(), dq=dq, dk=dk, dv=dv)
        return None
    dout = dout.contiguous()
    if backend == "cudnn":
        return _cudnn(q, k, v, cu, longest, scale).backward(grads, dout, q, k, v, out, lse, cu)
    if backend == "reference":
        found = _reference_backward(dout, q, k, v, Documents(cu, longest), scale)
    else:
        n = int(longest)
        rng, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        found = torch.ops.aten._flash_attention_backward(dout, q, k, v, out, lse, cu, cu, n, n, 0.0, True, rng, unused, scale=scale)
    for grad, one in zip(grads, found, strict=True):
        grad.copy_(one)
    return None


def _reference_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, ...]:
    """The plain formula, in fp32 at least (https://arxiv.org/abs/2205.14135, appendix B.2)."""
    (t, heads, d), kv_heads = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    dout, q, k, v = (x.to(wide).transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0) for x in (dout, q, k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~block_causal_mask(documents.cu, 1, t)[0], -torch.inf)
    p = scores.softmax(dim=-1)
    dp = dout @ v.transpose(1, 2)
    ds = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) * scale
    dq, dk, dv = ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ dout
    dk, dv = (x.view(kv_heads, -1, t, d).sum(dim=1) for x in (dk, dv))  # of the heads that share one
    return tuple(x.transpose(0, 1) for x in (dq, dk, dv))


# ---- the operators ----------------------------------------------------------------------------------------------------
@library.custom_op("graft::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """forward(), for autograd and the compiler."""
    return forward(q, k, v, cu, longest, scale, backend)


@attention_forward.register_fake
def _(q, k, v, cu, longest, scale, backend):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(lse_shape(q.shape[0], q.shape[1], backend), dtype=torch.float32)


@library.custom_op("graft::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, longest: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    backward(grads, dout, q, k, v, out, lse, cu, longest, scale, backend)
    return grads


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, cu, longest, scale, backend):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu, longest, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu, longest)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu, longest = ctx.saved_tensors
    return (*attention_backward(dout.contiguous(), q, k, v, out, lse, cu, longest, ctx.scale, ctx.backend), None, None, None, None)


attention_forward.register_autograd(_backward, setup_context=_keep)


# ---- cuDNN ------------------------------------------------------------------------------------------------------------
def _cudnn(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Tensor, scale: float) -> _Cudnn:
    """The graphs for these shapes: documents and the longest rounded up to powers of two, so that few are ever built."""
    documents, length = (1 << (n - 1).bit_length() for n in (max(16, cu.shape[0] - 1), max(128, int(longest))))
    return _cudnn_of(documents, length, *q.shape, k.shape[1], q.stride(0), k.stride(0), v.stride(0), scale, q.device.index or 0)


@cache
def _cudnn_of(*shape: Any) -> _Cudnn:
    return _Cudnn(*shape)


class _Cudnn:
    """cuDNN's graphs of one shape; tensors are token by token ("THD"), each document found by its offset."""

    def __init__(
        self,
        documents: int,
        length: int,
        tokens: int,
        heads: int,
        width: int,
        kv_heads: int,
        of_q: int,
        of_k: int,
        of_v: int,
        scale: float,
        device: int,
    ):
        import cudnn

        self.documents, self.length, self.tokens, self.heads, self.width = documents, length, tokens, heads, width
        self.rows = {"q": of_q, "k": of_k, "v": of_v, "out": heads * width, "lse": heads}  # elements from token to token
        self.count = {"q": heads, "k": kv_heads, "v": kv_heads, "out": heads}
        self.handle = cudnn.create_handle()
        self.workspace = torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}")
        self.forward_graph, self.backward_graph = (self._build(cudnn, backward, scale) for backward in (False, True))

    def _build(self, cudnn: Any, backward: bool, scale: float) -> tuple[Any, dict[str, Any]]:
        of = cudnn.data_type
        graph = cudnn.pygraph(io_data_type=of.BFLOAT16, intermediate_data_type=of.FLOAT, compute_data_type=of.FLOAT, handle=self.handle)
        b, n, d = self.documents, self.length, self.width
        node = {f"of_{name}": graph.tensor(name=f"of_{name}", dim=[b + 1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=of.INT32) for name in self.rows}
        node["lengths"] = graph.tensor(name="lengths", dim=[b, 1, 1, 1], stride=[1, 1, 1, 1], data_type=of.INT32)

        def shape(like: str) -> dict[str, list[int]]:
            return {"dim": [b, self.count[like], n, d], "stride": [n * self.rows[like], d, self.rows[like], 1]}

        def given(name: str, like: str) -> Any:
            node[name] = graph.tensor(name=name, **shape(like)).set_ragged_offset(node[f"of_{like}"])
            return node[name]

        def made(name: str, tensor: Any, like: str) -> None:
            laid = shape(like)
            node[name] = tensor.set_output(True).set_dim(laid["dim"]).set_stride(laid["stride"]).set_ragged_offset(node[f"of_{like}"])

        q, k, v = (given(name, name) for name in "qkv")
        common = {"attn_scale": scale, "use_causal_mask": True, "use_padding_mask": True, "seq_len_q": node["lengths"], "seq_len_kv": node["lengths"]}
        of_lse = {"dim": [b, self.heads, n, 1], "stride": [n * self.heads, 1, self.heads, 1]}
        if backward:
            out, dout = given("out", "out"), given("dout", "out")
            lse = graph.tensor(name="lse", **of_lse, data_type=of.FLOAT).set_ragged_offset(node["of_lse"])
            total = {"max_total_seq_len_q": self.tokens, "max_total_seq_len_kv": self.tokens}
            total |= {"use_deterministic_algorithm": True} if torch.are_deterministic_algorithms_enabled() else {}
            grads = graph.sdpa_backward(name="back", q=q, k=k, v=v, o=out, dO=dout, stats=lse, **total, **common)
            for name, grad in zip("qkv", grads, strict=True):
                made(f"d{name}", grad, name)
        else:
            out, lse = graph.sdpa(name="sdpa", q=q, k=k, v=v, generate_stats=True, **common)
            made("out", out, "out")
            lse.set_output(True).set_data_type(of.FLOAT).set_dim(of_lse["dim"]).set_stride(of_lse["stride"]).set_ragged_offset(node["of_lse"])
        node["lse"] = lse
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph, node

    def _run(self, built: tuple[Any, dict[str, Any]], cu: Tensor, tensors: dict[str, Tensor]) -> None:
        import cudnn

        graph, node = built
        padded = torch.cat([cu, cu[-1:].expand(self.documents + 1 - cu.shape[0])])  # what is over is empty
        tensors = tensors | {"lengths": padded.diff()} | {f"of_{name}": padded * row for name, row in self.rows.items()}
        if self.workspace.numel() < graph.get_workspace_size():
            self.workspace = self.workspace.new_empty(graph.get_workspace_size())
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute({node[name]: tensor for name, tensor in tensors.items()}, self.workspace, handle=self.handle)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1], 1, dtype=torch.float32)
        self._run(self.forward_graph, cu, {"q": q, "k": k, "v": v, "out": out, "lse": lse})
        return out, lse

    def backward(
        self, grads: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor
    ) -> None:
        given = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
        self._run(self.backward_graph, cu, given | dict(zip(("dq", "dk", "dv"), grads, strict=True)))


# ---- the choice -------------------------------------------------------------------------------------------------------
def fastest(heads: int, kv_heads: int, width: int, device: torch.device) -> str:
    """The backend for this shape on this machine: measured once, then read from the cache folder.

    `reference` where no other works. GRAFT_ATTENTION names one, for comparisons; ConfigError where it is none of them.
    """
    if chosen := os.environ.get("GRAFT_ATTENTION"):
        if chosen not in (*BACKENDS, "reference"):
            raise ConfigError(f"GRAFT_ATTENTION = {chosen!r} is none of {', '.join(BACKENDS)}, reference")
        return chosen
    if device.type != "cuda":
        return "reference"
    _newest_flash()
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what fa4 compiles stays on the machine; read as it is imported
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder() / "flash_attn_4"))
    have = [name for name, module in BACKENDS.items() if _installed(module)]
    shape = ("deterministic", heads, kv_heads, width) if torch.are_deterministic_algorithms_enabled() else (heads, kv_heads, width)
    key = " ".join(map(str, (torch.cuda.get_device_name(device), torch.__version__, *have, *shape)))
    known = recalled("attention")
    if (found := known.get(key)) is None:
        times_s = {name: t for name in have if (t := _time_s(name, heads, kv_heads, width, device)) is not None}
        found = known[key] = min(times_s, key=times_s.__getitem__, default="reference")
        remember("attention", known)
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


@cache
def _newest_flash() -> None:
    """Have PyTorch's FlashAttention be version 3 where that is installed and PyTorch can hand over to it."""
    activate: Callable[[str], None] | None = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate and _installed("flash_attn_interface"):
        with suppress(ImportError, RuntimeError, ValueError):
            activate("FA3")


def _time_s(backend: str, heads: int, kv_heads: int, width: int, device: torch.device) -> float | None:
    """Seconds of a forward and backward of 8,192 tokens in documents of several lengths; None where the backend does not work, is wrong, or varies and may not."""
    try:
        draw = torch.Generator(device).manual_seed(0)
        q, k, v, given = (
            torch.randn(8192, h, width, generator=draw, device=device, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads, heads)
        )

        def run(ends: list[int], how: str = backend) -> tuple[Tensor, ...]:
            documents = Documents(torch.tensor(ends, dtype=torch.int32, device=device), torch.tensor(np.diff(ends).max(), dtype=torch.int32))
            own = [x[: ends[-1]].detach().requires_grad_() for x in (q, k, v)]
            out = attention(own[0], own[1], own[2], documents, width**-0.5, how)
            return out, *torch.autograd.grad(out, own, given[: ends[-1]])

        first = 512  # tokens of the first document: the reference's gradient holds several matrices of it squared for each head
        wanted = run([0, first], "reference")
        for ends in (list(range(0, 8193, first)), several := [0, first, 3072, 6144, 8192]):
            found = run(ends)
            if not all((one[:first] - other).norm() <= WRONG * other.norm() for one, other in zip(found, wanted, strict=True)):
                return None
            if torch.are_deterministic_algorithms_enabled() and not all(map(torch.equal, found, run(ends))):
                return None
        times_s = []
        for _ in range(4):
            torch.cuda.synchronize(device)
            began_s = time.perf_counter()
            run(several)
            torch.cuda.synchronize(device)
            times_s.append(time.perf_counter() - began_s)
        return min(times_s)
    except Exception as e:  # noqa: BLE001  a backend that is not built for this machine fails in its own way
        print(f"attention: {backend} does not work here: {type(e).__name__}: {str(e)[:200]}", flush=True)
        return None
