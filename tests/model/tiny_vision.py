"""A Qwen2.5-VL of random weights whose forward takes milliseconds, and a row with an image for it."""

import io
import random
from pathlib import Path

import torch
from PIL import Image

from graft.core.recipe import EmbeddedBase, Train, Vision
from graft.data.drawings import drawn
from graft.model.base import random_qwen_vl
from graft.model.images import ImageProcessor, write_config

SHAPE = EmbeddedBase(
    hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, vision=Vision(layers=3), train=Train(corpora=("a",), lora=None)
)
START, END, IMAGE = 5, 6, 7


def tiny(seed: int = 0, vocab_size: int = 300, images: dict[str, int] | None = None):
    return random_qwen_vl(SHAPE, SHAPE.vision, vocab_size, 2048, seed, images or {"start": START, "end": END, "image": IMAGE}).eval()


def write(folder: Path, **made) -> Path:
    tiny(**made).save_pretrained(folder)
    write_config(folder)
    return folder


def row(processor: ImageProcessor, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [s], pixels [patches, …], grids [images, 3]) of a row that shows images of these sizes between random text."""
    rng = random.Random(seed)
    ids, pixels, grids = [], [], []
    for size in sizes:
        image = Image.open(io.BytesIO(drawn("pie chart", "red", 3, rng))).resize(size)
        grid = processor.grid(*size)
        ids += [*(rng.randrange(10, 300) for _ in range(5)), START, *[IMAGE] * processor.tokens(grid), END]
        pixels.append(torch.from_numpy(processor.patches(image)))
        grids.append(grid)
    ids += [rng.randrange(10, 300) for _ in range(7)]
    return torch.tensor(ids), torch.cat(pixels) if pixels else torch.empty(0), torch.tensor(grids, dtype=torch.long).view(-1, 3)
