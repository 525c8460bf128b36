"""The summed cross-entropy of a language model's head, with its logits never whole in memory.

A chunk of rows at a time: logits, loss, and at once the gradient, so that what is kept for the backward is of the size of
the hidden states (the idea of Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.2). A chunk of 4,096 rows of a
vocabulary of 128,256 takes 1 GiB in bf16; the gradient takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.model import gemm

CHUNK = 4096  # rows


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden weightᵀ)[target], in nats and fp32: hidden [n, h], weight [vocabulary, h], targets [n]."""
    if not hidden.is_cuda:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    loss: Tensor = _Chunked.apply(hidden, weight, targets)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            gradient = gemm.product(hidden[rows], weight)
            loss += cross_entropy_(gradient, targets[rows])
            if of_hidden is not None:
                gemm.product(gradient, weight, back=True, out=of_hidden[rows])
            if of_weight is not None:
                of_weight += torch.mm(gradient.t(), hidden[rows])
            del gradient  # or it would live while the next chunk is made
        ctx.save_for_backward(of_hidden, of_weight if of_weight is None else of_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors  # `given` is fp32, and so is the product before it is rounded
        of_hidden, of_weight = (None if g is None else (g.float() * given).to(g.dtype) for g in (of_hidden, of_weight))
        return of_hidden, of_weight, None


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed loss in fp32; logits [n, vocabulary] become its gradient."""
    if logits.is_cuda:
        from graft.model.kernels.loss import cross_entropy_ as on_gpu

        return on_gpu(logits, targets)
    wide = logits.float()
    log_sum = wide.logsumexp(dim=-1, keepdim=True)
    loss = (log_sum.squeeze(-1) - wide.gather(1, targets[:, None]).squeeze(-1)).sum()
    logits.copy_((wide - log_sum).exp().scatter_add_(1, targets[:, None], wide.new_full((len(targets), 1), -1.0)))
    return loss
