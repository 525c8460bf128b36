"""LoRA on frozen layers that share their input (q, k and v; gate and up): one matmul, the adapters added in place.

y = x Wᵀ + b and, for each adapted layer, y[:, its rows] += (s x Aᵀ) Bᵀ. Nothing of y's size but y itself is made; of the
forward only x and s x Aᵀ [t, r] are kept. The two operators are opaque to torch.compile, so the norms and activations
around them are fused and nothing of this is recomputed. Saved adapters are those of lora.py. With dropout (dropout.py) x is
here what each adapter keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, library, nn

from graft.core.recipe import Lora
from graft.model.dropout import Drop, add_back_, down_product, grown, of_a, threshold_of
from graft.model.frozen import Frozen, Kind, matmul, matmul_back
from graft.model.lora import in_tower, new_pair, targets

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order with one input


# ---- the arithmetic -----------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where the adapters of a group lie in their one vector: every A [rank, in], one below the other, then every B [size, rank]."""

    rank: int
    starts: list[int]  # of each adapted layer's columns in the group's output
    sizes: list[int]

    def split(self, adapter: Tensor, ins: int) -> tuple[Tensor, list[Tensor]]:
        """(A of all [layers · rank, in], [B]): views."""
        a, *b = adapter.split([self.rank * len(self.sizes) * ins, *(size * self.rank for size in self.sizes)])
        return a.view(-1, ins), [up.view(-1, self.rank) for up in b]

    def columns(self, y: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(columns of y, columns of u) of each layer."""
        for n, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            yield y[:, start : start + size], u[:, n * self.rank : (n + 1) * self.rank]


def adapted(
    x: Tensor, kind: str, frozen: list[Tensor], bias: Tensor | None, adapter: Tensor | None, layout: Layout, scale: float, drop: Drop | None
) -> tuple[Tensor, Tensor]:
    """(y [t, outs], u = s x Aᵀ [t, layers · rank]) of x [t, in]."""
    y, u = matmul(x, kind, frozen, bias), down(x, adapter, layout, scale, drop)
    if adapter is not None:
        for (own, part), up in zip(layout.columns(y, u), layout.split(adapter, x.shape[1])[1], strict=True):
            own.addmm_(part, up.t())
    return y, u


def down(x: Tensor, adapter: Tensor | None, layout: Layout, scale: float, drop: Drop | None, out: Tensor | None = None) -> Tensor:
    """u = s x Aᵀ, s grown for what is dropped, in `out` where it is given; empty without an adapter."""
    if adapter is None:
        return x.new_empty(x.shape[0], 0)
    return down_product(x, layout.split(adapter, x.shape[1])[0], drop, grown(scale, drop), out)


def through_b(dy: Tensor, u: Tensor, adapter: Tensor | None, layout: Layout, ins: int) -> Tensor:
    """dy B [t, layers · rank]; u, which is empty, without an adapter."""
    if adapter is None:
        return u
    found = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    for (own, part), up in zip(layout.columns(dy, found), layout.split(adapter, ins)[1], strict=True):
        torch.mm(own, up, out=part)
    return found


def adapted_backward(
    dx: Tensor, du: Tensor, dy: Tensor, x: Tensor, u: Tensor, adapter: Tensor | None, layout: Layout, drop: Drop | None
) -> tuple[Tensor, Tensor]:
    """(dx, the gradient of the adapter, empty without one) of the gradient dy of adapted(): dx of dy W, to which du A is added, and of du = s dy B."""
    if adapter is None:
        return dx, x.new_empty(0)
    gradient = torch.empty_like(adapter)
    da, db = layout.split(gradient, x.shape[1])
    for (own, part), of_up in zip(layout.columns(dy, u), db, strict=True):
        torch.mm(own.t(), part, out=of_up)
    of_a(du, x, drop, da)
    add_back_(dx, du, layout.split(adapter, x.shape[1])[0], drop)
    return dx, gradient


# ---- the operators ----------------------------------------------------------------------------------------------------
@library.custom_op("graft::lora_forward", mutates_args=())
def lora_forward(
    x: Tensor,
    kind: str,
    frozen: list[Tensor],
    bias: Tensor | None,
    adapter: Tensor | None,
    rank: int,
    starts: list[int],
    sizes: list[int],
    outs: int,
    scale: float,
    seeds: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """adapted(), for autograd and the compiler; seeds: of a Drop."""
    return adapted(x, kind, frozen, bias, adapter, Layout(rank, starts, sizes), scale, _drop(seeds, threshold))


@lora_forward.register_fake
def _(x, kind, frozen, bias, adapter, rank, starts, sizes, outs, scale, seeds, threshold):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], outs), x.new_empty(x.shape[0], 0 if adapter is None else rank * len(sizes))


@library.custom_op("graft::lora_backward", mutates_args=())
def lora_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    kind: str,
    frozen: list[Tensor],
    adapter: Tensor | None,
    rank: int,
    starts: list[int],
    sizes: list[int],
    scale: float,
    seeds: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of adapted(), for the compiler."""
    layout, drop = Layout(rank, starts, sizes), _drop(seeds, threshold)
    du = through_b(dy, u, adapter, layout, x.shape[1]).mul_(grown(scale, drop))
    return adapted_backward(matmul_back(dy, kind, frozen), du, dy, x, u, adapter, layout, drop)


@lora_backward.register_fake
def _(dy, x, u, kind, frozen, adapter, rank, starts, sizes, scale, seeds, threshold):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(0) if adapter is None else torch.empty_like(adapter)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kind, frozen, _, adapter, *ctx.layout, _, ctx.scale, seeds, ctx.threshold = inputs
    ctx.count = len(frozen)
    ctx.save_for_backward(x, output[1], adapter, seeds, *frozen)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, u, adapter, seeds, *frozen = ctx.saved_tensors
    dx, gradient = lora_backward(dy.contiguous(), x, u, ctx.kind, frozen, adapter, *ctx.layout, ctx.scale, seeds, ctx.threshold)
    return dx, None, [None] * ctx.count, None, None if adapter is None else gradient, *[None] * 7


lora_forward.register_autograd(_backward, setup_context=_keep)


def _drop(seeds: Tensor | None, threshold: int) -> Drop | None:
    return None if seeds is None else Drop(seeds, threshold)


# ---- modules ----------------------------------------------------------------------------------------------------------
class Group:
    """Layers that share an input: computed when the first is called, handed out as the others are."""

    adapter: Tensor | None = None  # of its layers, as Layout has it; Adapters hands it out, and what it drops
    drop: Drop | None = None
    part: Callable[[], Tensor]

    def __init__(self, frozen: Frozen, layers: list[FusedLinear], lora: Lora | None, pairs: list[tuple[Tensor, Tensor] | None]):
        self.frozen, self.layers = frozen, layers
        self.waiting: list[Tensor] = []
        self.scale = lora.alpha / lora.r if lora else 1.0
        self.adapted = [n for n, pair in enumerate(pairs) if pair]
        starts, sizes = [sum(frozen.outs[:n]) for n in self.adapted], [frozen.outs[n] for n in self.adapted]
        # autograd of an operator stumbles over an empty list of numbers
        self.layout = Layout(lora.r if lora else 0, starts or [0], sizes or [0])
        layers[0].add_module("frozen", frozen)
        for place, layer in enumerate(layers):
            layer.group, layer.place = self, place

    def pair(self, place: int) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a layer, views."""
        if place not in self.adapted:
            return None
        n, r = self.adapted.index(place), self.layout.rank
        a, b = self.layout.split(self.part(), self.frozen.ins)
        return a[n * r : (n + 1) * r], b[n]

    def output(self, place: int, x: Tensor) -> Tensor:
        if place == 0:
            frozen, flat = self.frozen, x.reshape(-1, x.shape[-1])
            given = flat, frozen.kind, frozen.tensors, frozen.bias, self.adapter, *self.layout, sum(frozen.outs), self.scale
            y, _ = lora_forward(*given, *(self.drop or (None, 0)))
            self.waiting = list(y.view(*x.shape[:-1], -1).split(frozen.outs, dim=-1))
        out = self.waiting[place]
        if place == len(self.layers) - 1:
            self.waiting = []
        return out


class Adapters(nn.Module):
    """The adapters of all groups as one parameter: DeepSpeed takes 30 ms a step over the 128 that an 8B model has otherwise."""

    def __init__(self, groups: list[Group], vectors: list[Tensor], dropout: float):
        super().__init__()
        self.groups, self.sizes = groups, [len(v) for v in vectors]
        self.place: Callable[[], None] | None = None  # what beside.py has of every B beside its W
        self.dropout = nn.Dropout(dropout)  # its rate, and whether it is on: who switches a model's dropout off finds it
        self.flat = nn.Parameter(torch.cat(vectors))
        for n, group in enumerate(groups):
            group.part = partial(self._part, n)

    def _part(self, n: int) -> Tensor:
        return self.flat.split(self.sizes)[n]

    def hand_out(self, *_: Any) -> None:
        """Before each forward, also of a tower by itself: give every group its part, whose gradient finds the way back, and what it drops."""
        for group, part, drop in zip(self.groups, self.flat.split(self.sizes), self._drops(), strict=True):
            group.adapter, group.drop = part, drop
        if self.place:
            self.place()

    def _drops(self) -> list[Drop | None]:
        """Of each group in one forward. Seeds come of torch's generator, which training seeds anew in each step and rank: a resumed
        run draws what the lost one drew, every micro-batch its own; what a backward computes again has its forward's."""
        threshold = threshold_of(self.dropout.p) if self.dropout.training else 0
        if not threshold:
            return [None] * len(self.groups)
        counts = [len(group.adapted) for group in self.groups]
        seeds = torch.randint(2**63 - 1, (sum(counts),), device=self.flat.device)
        return [Drop(own, threshold) for own in seeds.split(counts)]


class FusedLinear(nn.Module):
    """One frozen layer of a group."""

    group: Group
    place: int

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def pair(self) -> tuple[Tensor, Tensor] | None:
        return self.group.pair(self.place)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(self.place, x)


def fuse(
    model: Any, kind: Kind, lora: Lora | None, dtype: torch.dtype, device: torch.device | str, seed: int, vision: bool = False
) -> dict[str, tuple[Frozen, int]]:
    """Freeze the model and replace every linear layer but its head by a group's; returns (weights, place) by layer.

    A vision tower's stay as they are, or, where `vision` has them adapted, dense: their widths are none that FP8 multiplies. The model may be on the meta device: weights are empty until Frozen.put(). Adapters, in `dtype`, are drawn from `seed` as inject() draws them.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    adapted = {full for full, *_ in targets(model, lora.targets, vision)} if lora else set()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    linears = {name: module for name, module in linears.items() if name in adapted or not in_tower(name)}
    pairs: dict[str, tuple[Tensor, Tensor] | None] = {}
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        for name, linear in linears.items():
            pairs[name] = new_pair(lora, linear.in_features, linear.out_features, dtype, device) if lora and name in adapted else None
    found: dict[str, tuple[Frozen, int]] = {}
    groups: list[Group] = []
    vectors: list[Tensor] = []
    for names in _groups(list(linears)):
        layers = [linears[name] for name in names]
        held = "dense" if in_tower(names[0]) else kind
        frozen = Frozen(held, [x.out_features for x in layers], layers[0].in_features, any(x.bias is not None for x in layers), dtype, device)
        group = Group(frozen, [FusedLinear(x) for x in layers], lora, [pairs[name] for name in names])
        for place, name in enumerate(names):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, group.layers[place])
            found[name] = frozen, place
        if group.adapted:
            own = [pair for name in names if (pair := pairs.pop(name))]
            groups.append(group)
            vectors.append(torch.cat([m.flatten() for m in (*(a for a, _ in own), *(b for _, b in own))]))
    if lora and groups:
        model.adapters = Adapters(groups, vectors, lora.dropout)
        getattr(model, "base_model", model).register_forward_pre_hook(model.adapters.hand_out)
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
