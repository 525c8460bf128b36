"""The loss of a chunk of logits and its gradient, which takes the logits' place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """loss.cross_entropy_() of logits [n, vocabulary], whose rows lie in memory in order."""
    n, v = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    _cross_entropy[(n,)](logits, targets, losses, v, min(8192, triton.next_power_of_2(v)), num_warps=8)
    return losses.sum()


@triton.jit
def _cross_entropy(logits, targets, losses, v: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    of_target = tl.load(logits + row * v + target).to(tl.float32)  # before any warp may write there: the sums below wait for all
    at = tl.arange(0, block)
    largest, total = -float("inf"), 0.0
    for start in range(0, v, block):
        x = tl.load(logits + row * v + start + at, mask=start + at < v, other=-float("inf")).to(tl.float32)
        found = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - found) + tl.sum(tl.exp(x - found), axis=0)
        largest = found
    log_sum = tl.log(total) + largest
    tl.store(losses + row, log_sum - of_target)
    for start in range(0, v, block):
        here = logits + row * v + start + at
        x = tl.load(here, mask=start + at < v, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - log_sum) - tl.where(start + at == target, 1.0, 0.0)
        tl.store(here, gradient.to(logits.dtype.element_ty), mask=start + at < v)
