"""Which algorithms a run's large matmuls use (model/gemm.py): measured where the run is long enough to win more than it costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.core.recipe import Train
from graft.model import gemm
from graft.model.frozen import Frozen
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
        return gemm.choose(weights_of(lm, tokens), measure)
    except (OSError, RuntimeError, AttributeError) as e:  # another cuBLASLt, or too little memory for it
        return f"matmuls that are not tuned yet are left to PyTorch: {(str(e) or repr(e)).splitlines()[0][:200]}"


def weights_of(lm: Any, tokens: int) -> dict[tuple[int, int, int], Callable[[], Tensor]]:
    """{(rows, outs, ins): what makes a weight of that shape} of all matmuls with frozen weights in bf16, and of the head's."""
    found: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
    for name, module in lm.named_modules():
        if isinstance(module, Frozen) and module.kind != "fp8" and module.bias is None and module.dtype == torch.bfloat16 and not in_tower(name):
            found.setdefault((tokens, sum(module.outs), module.ins), module.opened)
    head = lm.get_output_embeddings().weight
    if tokens >= CHUNK and head.dtype == torch.bfloat16:
        found[CHUNK, *head.shape] = partial(torch.Tensor.detach, head)
    return found
