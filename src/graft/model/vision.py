"""Rows with images through a Qwen2.5-VL (https://arxiv.org/abs/2502.13923): the tower's features stand where the placeholder tokens are.

The loss, the packed attention and all else is PackedLM's; positions are three to a token (M-RoPE), as the model itself counts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.model.lora import TOWER
from graft.model.packed import PackedBatch, PackedLM


class ImageBatch(NamedTuple):
    """One micro-batch of rows, some with images."""

    text: PackedBatch  # with position_ids [3, b, s]
    pixels: Tensor  # [patches, channels · 2 · patch²] of all its images, in order
    grids: Tensor  # [images, 3] long; stays on the CPU, where the tower's windows are laid out

    @property
    def targets(self) -> Tensor:
        return self.text.targets

    @property
    def target_at(self) -> Tensor:
        return self.text.target_at

    def to(self, device: torch.device | str) -> ImageBatch:
        return self._replace(text=self.text.to(device), pixels=self.pixels.to(device, non_blocking=True))

    def pinned(self) -> ImageBatch:
        return self._replace(text=self.text.pinned(), pixels=self.pixels.pin_memory())


class VisionLM(PackedLM):
    """A Qwen2.5-VL as the training engine sees it: takes batches of text, and of rows with images."""

    def _use(self, implementation: str) -> None:
        self.lm.set_attn_implementation({"text_config": implementation, "vision_config": "sdpa"})  # the tower's windows are no documents

    def _supervised(self, batch: PackedBatch | ImageBatch) -> Tensor:
        if isinstance(batch, PackedBatch):
            return super()._supervised(batch)
        ids = batch.text.input_ids
        embedded = self.lm.get_input_embeddings()(ids)
        if len(batch.grids):
            here = (ids == self.lm.config.image_token_id)[..., None].expand_as(embedded)
            embedded = embedded.masked_scatter(here, features(self.lm, batch.pixels, batch.grids).to(embedded.dtype))
        elif any(p.requires_grad for p in tower(self.lm).parameters()):
            embedded = embedded + 0.0 * features(self.lm, *self._nothing(ids.device)).sum()  # ranks reduce the gradients of all that is trained
        return self._predicting(batch.text, {"inputs_embeds": embedded})

    def _nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """An image of one token, all zeros."""
        v = self.lm.config.vision_config
        side = v.spatial_merge_size
        return torch.zeros(side**2, v.in_channels * v.temporal_patch_size * v.patch_size**2, device=device), torch.tensor([[1, side, side]])


def features(lm: Any, pixels: Tensor, grids: Tensor) -> Tensor:
    """[tokens, h]: what the tower makes of images, one after the other. pixels, grids: as in an ImageBatch."""
    return torch.cat(lm.base_model.get_image_features(pixels, grids).pooler_output)


def positions(lm: Any, ids: Tensor, grids: Tensor) -> Tensor:
    """[3, s] long, time, row and column of each token of one row: ids [s], grids [images, 3] of its images."""
    kinds = (ids == lm.config.image_token_id).int()
    found: Tensor = lm.base_model.get_rope_index(ids[None], kinds[None], image_grid_thw=grids if len(grids) else None)[0]
    return found[:, 0]


def tower(lm: Any) -> Any:
    """The module of a Qwen2.5-VL that sees, None of a model of text."""
    return getattr(lm.base_model, TOWER, None)
