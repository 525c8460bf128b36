"""From bins on disk to the tensors of a micro-batch; no tokenizer, no Python lists of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graft.core.shards import Bin
from graft.model.packed import PackedBatch


def collate(bins: Sequence[Bin]) -> PackedBatch:
    """Bins of equal seq_len to one PackedBatch; position i is a target's predictor where i + 1 is supervised in i's document."""
    ids = torch.from_numpy(np.stack([b.input_ids for b in bins])).long()
    mask = np.stack([b.loss_mask for b in bins])
    size, length = mask.shape
    document = np.zeros((size, length), dtype=np.int64)
    position = np.zeros((size, length), dtype=np.int64)
    for row, b in enumerate(bins):
        lens = np.append(b.doc_lens, length - b.doc_lens.sum())  # the padding is one more document
        document[row] = np.repeat(np.arange(len(lens)), lens)
        position[row] = np.arange(length) - np.repeat(np.cumsum(lens) - lens, lens)
    predicts = np.zeros((size, length), dtype=bool)
    predicts[:, :-1] = (mask[:, 1:] == 1) & (document[:, 1:] == document[:, :-1])
    at = torch.from_numpy(np.flatnonzero(predicts))
    return PackedBatch(ids, torch.from_numpy(position), torch.from_numpy(document), at, ids.reshape(-1)[at + 1])


def attention_cost(b: Bin) -> float:
    """Sum of squared document lengths, to which the attention's FLOPs are proportional."""
    lens = b.doc_lens.astype(np.float64)
    return float(lens @ lens)
