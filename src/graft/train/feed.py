"""The global batches of a run, one after the other; on a GPU the next one is read while this one is computed.

Images are decoded by threads, beside the steps before theirs, and a thread makes the batches of them: 16 images of 1 MP are 200 MB to join and to pin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from graft.core.shards import Bin, ShardSet
from graft.core.stages import Job
from graft.model.images import ImageProcessor
from graft.train.batches import collate
from graft.train.order import BinOrder, share_out
from graft.train.pictures import Pictures

AHEAD = 2  # steps


class GlobalBatch(NamedTuple):
    """One step's bins, of all ranks but for `micro_batches`, which are this rank's."""

    step: int
    indices: np.ndarray
    micro_batches: list[Any]  # PackedBatch, or ImageBatch
    tokens: int
    targets: int
    mean_document_tokens: float  # weighted by length
    images: int


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

    def collate(self, bins: Sequence[Bin]) -> Any:
        """A micro-batch of these."""
        return collate(bins)

    def _read(self, step: int) -> GlobalBatch:
        indices = self.order.take(step * self.global_batch, self.global_batch)
        bins, costs = [self.shards.bin(i) for i in indices], self.costs[indices]
        batches = [self.collate([bins[i] for i in group]) for group in self._own(costs)]
        if self.device.type == "cuda":
            batches = [b.pinned() for b in batches]
        tokens = sum(int(b.doc_lens.sum()) for b in bins)
        images = sum(len(b.images) for b in bins)
        return GlobalBatch(step, indices, batches, tokens, max(sum(b.targets for b in bins), 1), float(costs.sum()) / tokens, images)

    def _own(self, costs: np.ndarray) -> np.ndarray:
        """[accumulation, micro]: which of a step's bins are this rank's."""
        return share_out(costs, self.world, self.micro)[self.rank]


def feed_of(job: Job, lm: Any, total: int, shards: ShardSet, *args: Any) -> Feed:
    """The feed that the shards' kind asks for. lm: what is trained; total: steps of the run; args: as Feed's."""
    if not shards.of_images:
        return Feed(shards, *args)
    processor = ImageProcessor(*job.plan.base_model(job.stage.name), job.recipe.shard.image_pixels)
    folder = job.parents[f"shard-{job.stage.name}"].path
    return ImageFeed(Pictures(folder, processor, lm, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), total, shards, *args)


class ImageFeed(Feed):
    """Of image rows: while a step is computed, on the CPU too, the next one's batch is made and the images of AHEAD are being decoded."""

    def __init__(self, pictures: Pictures, total: int, *args: Any):
        super().__init__(*args)
        self.pictures, self.total = pictures, total
        self._asked = -1  # the last step whose images are being decoded
        self._reader = ThreadPoolExecutor(1, "batches", self._pin_here)
        self._coming: tuple[int, Future[GlobalBatch]] | None = None

    def _pin_here(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _read(self, step: int) -> GlobalBatch:
        if self._coming is None or self._coming[0] != step:
            self._coming = step, self._reader.submit(self._make, step)
        found = self._coming[1].result()
        self._coming = (step + 1, self._reader.submit(self._make, step + 1)) if step + 1 < self.total else None
        return found

    def _make(self, step: int) -> GlobalBatch:
        for ahead in range(max(step, self._asked + 1), min(step + AHEAD + 1, self.total)):
            indices = self.order.take(ahead * self.global_batch, self.global_batch)
            self.pictures.decode(self.shards.bin(i) for i in indices[self._own(self.costs[indices]).flatten()])
            self._asked = ahead
        return super()._read(step)

    def collate(self, bins: Sequence[Bin]) -> Any:
        return self.pictures.collate(bins)
