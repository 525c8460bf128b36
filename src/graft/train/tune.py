"""Which algorithms a run's large matmuls use (model/gemm.py, beside.py): measured once a machine, in a run that is long enough for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.core.recipe import Train
from graft.model import beside, gemm
from graft.model.frozen import NF4_BLOCK, Frozen, quantize_rows, transposed
from graft.model.fused import Group
from graft.model.kernels import quack
from graft.model.lora import in_tower
from graft.model.loss import CHUNK
from graft.train.flops import peak_flops

LEAST_S = (
    1800.0  # what a run must at least take, at half of the GPU's nominal FLOP/s, for "auto" to measure: that takes one minute or two, once a machine
)
USUAL_FLOPS = 300e12  # of a GPU whose own are not known


def tune(lm: Any, config: Train, tokens: int, left_flop: float) -> str | None:
    """Choose for micro-batches of `tokens`; returns a line for people on what was measured, if anything was. left_flop: of this rank in the rest of the run."""
    if config.tune_matmuls is False or config.deterministic or not config.lora or not torch.cuda.is_available():
        return None
    measure = config.tune_matmuls is True or left_flop / (0.5 * (peak_flops() or USUAL_FLOPS)) >= LEAST_S
    groups = beside_of(lm, tokens)
    together: dict[gemm.Shape, Callable[[], tuple[Any, ...]]] = {shape: partial(beside.operands, shape, some[0]) for shape, some in groups.items()}
    try:
        said = gemm.choose(operands_of(lm, tokens) | together, measure)
        if groups:
            lm.adapters.place = beside.Standing(lm.adapters)  # before there is room: what has some is filled, though the next finds no memory
        for group in dict.fromkeys(group for shape, some in groups.items() if gemm.chosen(shape) for group in some):
            beside.make_room(group)
            torch.cuda.empty_cache()  # what this one leaves is too small for the next
        if apart := {shape: made for shape, made in operands_of(lm, tokens).items() if shape.apart}:
            gemm.choose(apart, measure)  # remembered: what was chosen for W alone goes on
        return said
    except (OSError, RuntimeError, AttributeError) as e:  # another cuBLASLt, or too little memory for it
        return f"matmuls that are not tuned yet are left to PyTorch: {(str(e) or repr(e)).splitlines()[0][:200]}"


def operands_of(lm: Any, tokens: int) -> dict[gemm.Shape, Callable[[], tuple[Any, ...]]]:
    """{shape: what makes operands of it} of all matmuls with frozen weights in bf16 or FP8, both ways, and of the head's."""
    weights: dict[gemm.Shape, Callable[[], tuple[Tensor, ...]]] = {}
    for name, module in lm.named_modules():
        if not isinstance(module, Frozen) or module.bias is not None or module.dtype != torch.bfloat16 or in_tower(name):
            continue
        outs, ins = sum(module.outs), module.ins
        own: dict[gemm.Shape, Callable[[], tuple[Tensor, ...]]]
        if module.kind == "fp8":
            w8, scales = module.tensors
            own = {
                gemm.Shape(tokens, outs, ins, fp8=True): partial(tuple, (w8, scales.t())),
                gemm.Shape(tokens, ins, outs, fp8=True): partial(transposed, w8),
            }
        else:
            own = dict.fromkeys(_both_ways(tokens, outs, ins, module.room if module.kind == "dense" else 0), partial(_opened, module))
        weights = own | weights
    head = lm.get_output_embeddings().weight
    if tokens >= CHUNK and head.dtype == torch.bfloat16:
        weights |= dict.fromkeys(_both_ways(CHUNK, *head.shape), partial(tuple, (head.detach(),)))
    return {shape: partial(_operands, shape, weight) for shape, weight in weights.items()}


def beside_of(lm: Any, tokens: int) -> dict[gemm.Shape, list[Group]]:
    """{shape: groups} of the matmuls that might do their adapters' work as well (model/beside.py).

    Of a layer's half: those that make the gradients of its input and of its last layer's, and that layer's output.
    """
    halves = [half for layer in lm.modules() for half in getattr(layer, "halves", ()) if half]
    found: dict[gemm.Shape, list[Group]] = {}
    for half in halves if quack.installed() else []:
        for group, back in ((half.group, True), (half.last, True), (half.last, False)):
            frozen = group.frozen
            if group.adapted and frozen.kind != "fp8" and frozen.bias is None and frozen.dtype == torch.bfloat16 and frozen.ins % NF4_BLOCK == 0:
                found.setdefault(beside.shape_of(tokens, group, back), []).append(group)
    return found


def _both_ways(rows: int, outs: int, ins: int, apart: int = 0) -> list[gemm.Shape]:
    return [gemm.Shape(rows, outs, ins, back, apart=apart) for back in (False, True)]


def _opened(frozen: Frozen) -> tuple[Tensor, ...]:
    return (frozen.opened(),)


def _operands(shape: gemm.Shape, weight: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    found = weight()
    x = torch.randn(shape.rows, shape.outs if shape.back else shape.ins, dtype=torch.bfloat16, device=found[0].device)
    return *(quantize_rows(x) if shape.fp8 else (x,)), *found
