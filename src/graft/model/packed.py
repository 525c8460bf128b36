"""Packed bins through a causal LM: documents never attend across their borders, and the loss is a sum over targets.

This is the plain reference (a boolean block mask through PyTorch's scaled_dot_product_attention); it runs anywhere and
costs batch * seq_len^2 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedBatch(NamedTuple):
    """One micro-batch of `b` bins of `s` tokens."""

    input_ids: Tensor  # [b, s] long
    position_ids: Tensor  # [b, s] long, from 0 in every document
    document: Tensor  # [b, s] long, equal inside a document; padding is documents of their own
    target_at: Tensor  # [t] long: flat index into [b * s] of the position that predicts a target
    targets: Tensor  # [t] long

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(*(t.to(device, non_blocking=True) for t in self))


def block_causal_mask(document: Tensor) -> Tensor:
    """[b, 1, s, s] bool, True where query i may see key j: same document and j <= i."""
    s = document.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


class PackedLM(nn.Module):
    """The language model as the training engine sees it: a batch in, the summed token loss (nats) out."""

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm

    def forward(self, batch: PackedBatch) -> Tensor:
        hidden = self.lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=block_causal_mask(batch.document),
            use_cache=False,
        ).last_hidden_state
        supervised = hidden.reshape(-1, hidden.shape[-1])[batch.target_at]  # the head sees targets only
        logits = self.lm.get_output_embeddings()(supervised)
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
