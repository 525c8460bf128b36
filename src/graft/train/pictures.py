"""The images of image rows, from files to the tensors of a micro-batch: read, verified, decoded and resized by threads of their own.

Pillow and NumPy work without Python's lock, so a thread decodes while the step is computed. An image of 1 MP takes about 60 ms of a core, and until
its step has passed 12 MB in bf16, 24 in fp32: it is held as the tower takes it.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow

from graft.core.errors import ArtifactError
from graft.core.shards import BUCKET, Bin, Image
from graft.model.images import ImageProcessor
from graft.model.pixels import verified
from graft.model.tower import laid_out
from graft.model.vision import ImageBatch, positions, tower
from graft.train.batches import collate

FOLDER = "images"


class Pictures:
    """Decodes what it is told to, and makes batches of it; an image that nobody announced is decoded when it is needed."""

    def __init__(self, folder: Path, processor: ImageProcessor, lm: Any, world: int):
        """folder: of the shards' artifact. lm: the model, which counts positions. world: processes that share this machine's cores."""
        self.folder, self.processor, self.lm = folder / FOLDER, processor, lm
        self.dtype: torch.dtype = tower(lm).patch_embed.proj.weight.dtype
        self.pool = ThreadPoolExecutor(max(1, (len(os.sched_getaffinity(0)) - 1) // world), thread_name_prefix="images")
        self._waiting: dict[Image, deque[Future[torch.Tensor]]] = {}
        self._changing = Lock()

    def decode(self, bins: Iterable[Bin]) -> None:
        """Begin with the images of these bins, in their order."""
        for image in (image for b in bins for image in b.images):
            with self._changing:
                self._waiting.setdefault(image, deque()).append(self.pool.submit(self._patches, image))

    def collate(self, bins: Sequence[Bin]) -> ImageBatch:
        """Bins of one row each to an ImageBatch, as long as the longest row asks, in BUCKETs. Raises ArtifactError for an image that is not the shards'."""
        longest = max(int(b.doc_lens.sum()) for b in bins)
        end = min(-(-longest // BUCKET) * BUCKET, len(bins[0].input_ids))
        text = collate([b._replace(input_ids=b.input_ids[:end], loss_mask=b.loss_mask[:end]) for b in bins])
        where = torch.zeros(3, *text.input_ids.shape, dtype=torch.long)
        grids = [torch.tensor([image.grid for image in b.images], dtype=torch.long).view(-1, 3) for b in bins]
        for row, (b, own) in enumerate(zip(bins, grids, strict=True)):
            used = int(b.doc_lens.sum())
            where[:, row, :used] = positions(self.lm, text.input_ids[row, :used], own)
        text = text._replace(position_ids=where)
        if not (patches := [self._decoded(image) for b in bins for image in b.images]):
            return ImageBatch(text, torch.empty(0), None)
        return ImageBatch(text, torch.cat(patches), laid_out(self.lm.config.vision_config, torch.cat(grids)))

    def _decoded(self, image: Image) -> torch.Tensor:
        with self._changing:
            waiting = self._waiting.get(image)
            begun = waiting.popleft() if waiting else None
            if not waiting:
                self._waiting.pop(image, None)
        return begun.result() if begun else self._patches(image)

    def _patches(self, image: Image) -> torch.Tensor:
        path = self.folder / image.file
        mend = "make the shards again with `graft run`"
        with Pillow.open(io.BytesIO(verified(path, mend))) as opened:
            found = self.processor.patches(opened.convert("RGB"))
        if len(found) != int(np.prod(image.grid)):
            raise ArtifactError(f"{path} becomes {len(found)} patches, the shards say {image.grid}: shard.image_pixels or the base changed; {mend}")
        return torch.from_numpy(found).to(self.dtype)
