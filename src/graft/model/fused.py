"""LoRA on frozen layers that share their input (q, k and v; gate and up): one matmul, the adapters added in place.

y = x Wᵀ + b and, for each adapted layer, y[:, its rows] += (s x Aᵀ) Bᵀ. Nothing of y's size but y itself is made; of the
forward only x and s x Aᵀ [t, r] are kept. The two operators are opaque to torch.compile, so the norms and activations
around them are fused and nothing of this is recomputed. Saved adapters are those of lora.py. With dropout, which each
adapter draws for itself as in PEFT, the adapters run beside the one matmul instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.recipe import Lora
from graft.model.frozen import Frozen, Kind, matmul, matmul_back
from graft.model.lora import Adapter, targets

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order with one input


# ---- the arithmetic -----------------------------------------------------------------------------------------------------
def adapted(
    x: Tensor, kind: str, frozen: list[Tensor], bias: Tensor | None, a: Tensor | None, b: list[Tensor], starts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(y [t, outs], u = s x Aᵀ [t, layers · r]) of x [t, in]; a: [layers · r, in], b: [out, r] of each layer, which begins at its start in y."""
    y, u = matmul(x, kind, frozen, bias), down(x, a, scale)
    for own, part, up in parts(y, u, b, starts):
        own.addmm_(part, up.t())
    return y, u


def down(x: Tensor, a: Tensor | None, scale: float) -> Tensor:
    """u = s x Aᵀ; empty without an adapter."""
    return x.new_empty(x.shape[0], 0) if a is None else torch.mm(x, a.t()).mul_(scale)


def parts(y: Tensor, u: Tensor, b: list[Tensor], starts: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(columns of y, columns of u, B) of each layer."""
    for n, (start, up) in enumerate(zip(starts, b, strict=False)):
        r = up.shape[1]
        yield y[:, start : start + up.shape[0]], u[:, n * r : (n + 1) * r], up


def adapter_gradients(
    dy: Tensor, x: Tensor, u: Tensor, a: Tensor | None, b: list[Tensor], starts: list[int], scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(du = s dy B, dA, [dB of each layer]); dx still lacks du A."""
    if a is None:
        return u, x.new_empty(0), []
    du, db = torch.empty_like(u), []
    for (own, of_du, up), (_, of_u, _) in zip(parts(dy, du, b, starts), parts(dy, u, b, starts), strict=True):
        torch.mm(own, up, out=of_du)
        db.append(torch.mm(of_u.t(), own).t().contiguous())  # dy is read once, in order
    du.mul_(scale)
    return du, torch.mm(du.t(), x), db


# ---- the operators ----------------------------------------------------------------------------------------------------
@torch.library.custom_op("graft::lora_forward", mutates_args=())
def lora_forward(
    x: Tensor, kind: str, frozen: list[Tensor], bias: Tensor | None, a: Tensor | None, b: list[Tensor], starts: list[int], outs: int, scale: float
) -> tuple[Tensor, Tensor]:
    """adapted(), for autograd and the compiler."""
    return adapted(x, kind, frozen, bias, a, b, starts, scale)


@lora_forward.register_fake
def _(x, kind, frozen, bias, a, b, starts, outs, scale):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], outs), x.new_empty(x.shape[0], 0 if a is None else a.shape[0])


@torch.library.custom_op("graft::lora_backward", mutates_args=())
def lora_backward(
    dy: Tensor, x: Tensor, u: Tensor, kind: str, frozen: list[Tensor], a: Tensor | None, b: list[Tensor], starts: list[int], scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(dx, dA, [dB of each layer])."""
    dx = matmul_back(dy, kind, frozen)
    du, da, db = adapter_gradients(dy, x, u, a, b, starts, scale)
    if a is not None:
        dx.addmm_(du, a)
    return dx, da, db


@lora_backward.register_fake
def _(dy, x, u, kind, frozen, a, b, starts, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(0) if a is None else torch.empty_like(a), [torch.empty_like(up) for up in b]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kind, frozen, _, a, b, ctx.starts, _, ctx.scale = inputs
    ctx.count, ctx.adapted = len(frozen), a is not None
    ctx.save_for_backward(x, output[1], *frozen, *([a, *b] if a is not None else []))


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, u, *rest = ctx.saved_tensors
    frozen, adapter = rest[: ctx.count], rest[ctx.count :]
    a, b = (adapter[0], adapter[1:]) if ctx.adapted else (None, [])
    dx, da, db = lora_backward(dy.contiguous(), x, u, ctx.kind, frozen, a, b, ctx.starts, ctx.scale)
    return dx, None, [None] * ctx.count, None, da if ctx.adapted else None, db if ctx.adapted else [], None, None, None


lora_forward.register_autograd(_backward, setup_context=_keep)


# ---- modules ----------------------------------------------------------------------------------------------------------
class Group:
    """Layers that share an input: computed when the first is called, handed out as the others are."""

    def __init__(self, frozen: Frozen, layers: list[FusedLinear]):
        self.frozen, self.layers = frozen, layers
        self.waiting: list[Tensor] = []

    def output(self, layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            self.waiting = list(self._compute(x))
        out = self.waiting[layer]
        if layer == len(self.layers) - 1:
            self.waiting = []
        return out

    def adapters(self) -> tuple[Tensor | None, list[Tensor], float, list[int]]:
        """(A of all layers that add theirs here, B of each, scale, where each begins in the output)."""
        own: list[tuple[int, Any]] = [(n, layer) for n, layer in enumerate(self.layers) if layer.A is not None and not layer.beside]
        if not own:
            return None, [], 1.0, [0]  # autograd of an operator stumbles over an empty list of numbers
        a = torch.cat([layer.A for _, layer in own]) if len(own) > 1 else own[0][1].A
        return a, [layer.B for _, layer in own], own[0][1].scale, [sum(self.frozen.outs[:n]) for n, _ in own]

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        frozen, (a, b, scale, starts) = self.frozen, self.adapters()
        y, _ = lora_forward(x.reshape(-1, x.shape[-1]), frozen.kind, frozen.tensors, frozen.bias, a, b, starts, sum(frozen.outs), scale)
        return y.view(*x.shape[:-1], -1).split(frozen.outs, dim=-1)


class FusedLinear(Adapter):
    """One frozen layer of a group, with or without an adapter in `dtype`."""

    def __init__(self, linear: nn.Linear, lora: Lora | None, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group: Any = None  # a Group; its weights are a submodule of the group's first layer
        self.place = 0
        if lora:
            self.make_adapter(lora, dtype, device)
        self.beside = self.A is not None and not isinstance(self.dropout, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group.output(self.place, x)
        return y + self.adapt(x) if self.beside else y


def fuse(model: Any, kind: Kind, lora: Lora | None, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, tuple[Frozen, int]]:
    """Freeze the model and replace every linear layer but its head by a group's; returns (weights, place) by layer.

    The model may be on the meta device: weights are empty until Frozen.put(). Adapters are drawn from `seed` as inject() draws them.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    adapted = {full for full, *_ in targets(model, lora.targets)} if lora else set()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    made: dict[str, FusedLinear] = {}
    found: dict[str, tuple[Frozen, int]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        for name, linear in linears.items():
            made[name] = FusedLinear(linear, lora if name in adapted else None, dtype, device)
    for names in _groups(list(linears)):
        layers = [linears[name] for name in names]
        frozen = Frozen(kind, [x.out_features for x in layers], layers[0].in_features, any(x.bias is not None for x in layers), dtype, device)
        group = Group(frozen, [made[name] for name in names])
        for place, name in enumerate(names):
            made[name].group, made[name].place = group, place
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[name])
            found[name] = frozen, place
        made[names[0]].add_module("frozen", frozen)
    return found


def _groups(names: list[str]) -> list[list[str]]:
    """Names of linear layers, those together that share an input."""
    by_parent: dict[str, list[str]] = {}
    for name in names:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    groups = []
    for parent, members in by_parent.items():
        for shared in SHARED:
            together = [full for last in shared if (full := f"{parent}.{last}") in members]
            if len(together) == len(shared):
                groups.append(together)
                members = [name for name in members if name not in together]
        groups += [[name] for name in members]
    return groups
