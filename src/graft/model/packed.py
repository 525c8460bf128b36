"""Packed bins through a causal LM: documents never attend across their borders, and the loss is a sum over targets.

On a GPU the bins of a micro-batch run as one row of documents through a packed kernel (attention.py); on the CPU each bin is
a row under a boolean block mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.model import attention
from graft.model.loss import linear_cross_entropy


class PackedBatch(NamedTuple):
    """One micro-batch of `b` bins of `s` tokens."""

    input_ids: Tensor  # [b, s] long
    position_ids: Tensor  # [b, s] long, from 0 in every document; of rows with images [3, b, s]
    cu: Tensor  # [documents + 1] int32: 0, and where each document ends in b * s; the padding of a bin is one more
    longest: Tensor  # [] int32, tokens of the longest document; stays on the CPU
    target_at: Tensor  # [t] long: flat index into [b * s] of the position that predicts a target
    targets: Tensor  # [t] long

    def to(self, device: torch.device | str) -> PackedBatch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self._fields if name != "longest"}
        return self._replace(**moved)

    def pinned(self) -> PackedBatch:
        """In memory from which a GPU copies while it computes."""
        return PackedBatch(*(tensor.pin_memory() for tensor in self))


class PackedLM(nn.Module):
    """The language model as the training engine sees it: a batch in, the summed token loss (nats) out."""

    def __init__(self, lm: Any, backend: str | None = None):
        """backend: of attention.py; None: a mask."""
        super().__init__()
        self.lm, self.backend = lm, backend
        if backend is not None:
            attention.register()
            self._use(attention.NAME)

    def _use(self, implementation: str) -> None:
        self.lm.set_attn_implementation(implementation)

    def forward(self, batch: Any) -> Tensor:
        """batch: a PackedBatch; what another kind of model takes besides, it says."""
        return linear_cross_entropy(self._supervised(batch), self.lm.get_output_embeddings().weight, batch.targets)

    @torch.no_grad()
    def logprobs(self, batch: Any) -> Tensor:
        """Of each target, [t] fp32, nats; their logits are whole in memory, so for few targets."""
        logits = F.linear(self._supervised(batch), self.lm.get_output_embeddings().weight).float()
        found: Tensor = logits.log_softmax(dim=-1).gather(1, batch.targets[:, None])[:, 0]
        return found

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Only dropout is switched off: a layer of bitsandbytes that once ran in eval mode on a CPU repacks its 4-bit weights and
        computes otherwise from then on, so that a resumed run would part from an undisturbed one."""
        dropouts = [m for m in self.modules() if isinstance(m, nn.Dropout)]
        for m in dropouts:
            m.eval()
        yield
        for m in dropouts:
            m.train()

    def _supervised(self, batch: Any) -> Tensor:
        """Hidden states [t, h] that predict the targets: the head sees no others."""
        return self._predicting(batch, {"input_ids": batch.input_ids})

    def _predicting(self, batch: PackedBatch, tokens: dict[str, Tensor]) -> Tensor:
        """_supervised() of a model that is given `tokens` [b, s, …]."""
        if self.backend is None:
            mask = attention.block_causal_mask(batch.cu, *batch.input_ids.shape)
            given: dict[str, Any] = {**tokens, "position_ids": batch.position_ids, "attention_mask": mask}
        else:
            torch._dynamo.maybe_mark_dynamic(batch.cu, 0)  # else another number of documents would be another compilation
            given = {name: x.flatten(0, 1)[None] for name, x in tokens.items()}
            given["position_ids"] = batch.position_ids.flatten(-2).unsqueeze(-2)
            given |= {"cu": batch.cu, "longest": batch.longest, "backend": self.backend}
        hidden = self.lm.base_model(**given, use_cache=False).last_hidden_state
        found: Tensor = hidden.reshape(-1, hidden.shape[-1])[batch.target_at]
        return found
