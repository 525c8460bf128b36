"""The global batches of a run, one after the other; on a GPU the next one is read while this one is computed."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from graft.core.shards import ShardSet
from graft.model.packed import PackedBatch
from graft.train.batches import collate
from graft.train.order import BinOrder, share_out


class GlobalBatch(NamedTuple):
    """One step's bins, of all ranks but for `micro_batches`, which are this rank's."""

    step: int
    indices: np.ndarray
    micro_batches: list[PackedBatch]
    tokens: int
    targets: int
    mean_document_tokens: float  # weighted by length


class Feed:
    """`waited_s`: seconds for which the last batch kept the device waiting."""

    def __init__(self, shards: ShardSet, seed: int, global_batch: int, micro: int, world: int, rank: int, device: torch.device):
        self.shards, self.order, self.costs = shards, BinOrder(len(shards), seed), shards.costs()
        self.global_batch, self.micro, self.world, self.rank, self.device = global_batch, micro, world, rank, device
        self.waited_s = 0.0
        self._ahead: GlobalBatch | None = None

    def take(self, step: int) -> GlobalBatch:
        """The batch of `step`, on the device."""
        if self._ahead is None or self._ahead.step != step:
            began_s = time.perf_counter()
            self._ahead = self._read(step)
            self.waited_s = time.perf_counter() - began_s
        found, self._ahead = self._ahead, None
        return found._replace(micro_batches=[b.to(self.device) for b in found.micro_batches])

    def look_ahead(self, step: int) -> None:
        """Read the batch of `step` while the device has work in its queue."""
        if self.device.type != "cuda":
            return
        began_s = time.perf_counter()
        self._ahead = self._read(step)
        self.waited_s = time.perf_counter() - began_s if torch.cuda.current_stream().query() else 0.0

    def _read(self, step: int) -> GlobalBatch:
        indices = self.order.take(step * self.global_batch, self.global_batch)
        bins, costs = [self.shards.bin(i) for i in indices], self.costs[indices]
        groups = share_out(costs, self.world, self.micro)[self.rank]
        batches = [collate([bins[i] for i in group]) for group in groups]
        if self.device.type == "cuda":
            batches = [b.pinned() for b in batches]
        tokens = sum(int(b.doc_lens.sum()) for b in bins)
        return GlobalBatch(step, indices, batches, tokens, max(sum(b.targets for b in bins), 1), float(costs.sum()) / tokens)
