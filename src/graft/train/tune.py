"""Which algorithms a run's large matmuls use (model/gemm.py): measured where the run is long enough to win more than it costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.core.recipe import Train
from graft.model import gemm
from graft.model.frozen import Frozen, quantize_rows, transposed
from graft.model.lora import in_tower
from graft.model.loss import CHUNK
from graft.train.flops import peak_flops

LEAST_S = 1800.0  # what a run must at least take, at half of the GPU's nominal FLOP/s, for "auto" to measure: that takes about 50 s
USUAL_FLOPS = 300e12  # of a GPU whose own are not known


def tune(lm: Any, config: Train, tokens: int, left_flop: float) -> str | None:
    """Choose for micro-batches of `tokens`; returns a line for people on what was measured, if anything was. left_flop: of this rank in the rest of the run."""
    if config.tune_matmuls is False or config.deterministic or not config.lora or not torch.cuda.is_available():
        return None
    measure = config.tune_matmuls is True or left_flop / (0.5 * (peak_flops() or USUAL_FLOPS)) >= LEAST_S
    try:
        return gemm.choose(operands_of(lm, tokens), measure)
    except (OSError, RuntimeError, AttributeError) as e:  # another cuBLASLt, or too little memory for it
        return f"matmuls that are not tuned yet are left to PyTorch: {(str(e) or repr(e)).splitlines()[0][:200]}"


def operands_of(lm: Any, tokens: int) -> dict[gemm.Shape, Callable[[], tuple[Tensor, ...]]]:
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
            own = dict.fromkeys(_both_ways(tokens, outs, ins), partial(_opened, module))
        weights = own | weights
    head = lm.get_output_embeddings().weight
    if tokens >= CHUNK and head.dtype == torch.bfloat16:
        weights |= dict.fromkeys(_both_ways(CHUNK, *head.shape), partial(tuple, (head.detach(),)))
    return {shape: partial(_operands, shape, weight) for shape, weight in weights.items()}


def _both_ways(rows: int, outs: int, ins: int) -> list[gemm.Shape]:
    return [gemm.Shape(rows, outs, ins, back) for back in (False, True)]


def _opened(frozen: Frozen) -> tuple[Tensor, ...]:
    return (frozen.opened(),)


def _operands(shape: gemm.Shape, weight: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    found = weight()
    x = torch.randn(shape.rows, shape.outs if shape.back else shape.ins, dtype=torch.bfloat16, device=found[0].device)
    return *(quantize_rows(x) if shape.fp8 else (x,)), *found
