"""Prompts with images in HFEngine: the vision tower's features where the placeholder tokens stand, and M-RoPE's positions (model/vision.py).

A row's images pass the tower alone, under the row's own adapter, so that what they become does not depend on batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.errors import DataError
from graft.model.images import ImageProcessor, Seen
from graft.model.vision import features, positions


class Prompt(NamedTuple):
    """What a forward over whole rows takes of one."""

    ids: list[int]
    images: tuple[Seen, ...] = ()
    where: Tensor | None = None  # [3, s] long: time, row and column of each token of a prompt with images; None: token n lies at n
    shift: int = 0  # from the number of a token behind the prompt to where it lies: an image takes fewer places than it has tokens


class Sight:
    """Of an engine whose model has a vision tower."""

    def __init__(self, model: Any, processor: ImageProcessor):
        self.model, self.processor, self.image = model, processor, int(model.config.image_token_id)

    def check(self, row: int, ids: list[int], images: Sequence[Seen]) -> None:
        """DataError where the placeholders are not those of the images."""
        held, needed = ids.count(self.image), sum(self.processor.tokens(image.grid) for image in images)
        if held != needed:
            raise DataError(f"request {row} holds {held} tokens that stand for images, and its {len(images)} images need {needed}")

    def prompt(self, ids: list[int], images: tuple[Seen, ...]) -> Prompt:
        if not images:
            return Prompt(ids)
        where = positions(self.model, torch.tensor(ids), _grids(images))
        return Prompt(ids, images, where, int(where.max()) + 1 - len(ids))

    def embedded(self, prompts: Sequence[Prompt], ids: Tensor, alone: Callable[[int], None]) -> Tensor:
        """[b, s, h] of `ids` [b, s], which these prompts begin. alone: called before the tower sees the images of row n, and of no other."""
        found: Tensor = self.model.get_input_embeddings()(ids)
        for n, prompt in enumerate(prompts):
            if prompt.images:
                alone(n)
                pixels = torch.cat([torch.from_numpy(image.patches) for image in prompt.images]).to(ids.device)
                here = ids[n, : len(prompt.ids)] == self.image
                found[n, : len(prompt.ids)][here] = features(self.model, pixels, _grids(prompt.images)).to(found.dtype)
        return found

    def positions(self, prompts: Sequence[Prompt], tokens: Tensor) -> Tensor:
        """[3, b, s] of rows of s tokens that these prompts begin; tokens: [s], 0, 1, …"""
        found = tokens.repeat(3, len(prompts), 1)
        for n, prompt in enumerate(prompts):
            if prompt.where is not None:
                found[:, n, : len(prompt.ids)] = prompt.where.to(tokens.device)
        return found


def _grids(images: Sequence[Seen]) -> Tensor:
    return torch.tensor([image.grid for image in images], dtype=torch.long)
