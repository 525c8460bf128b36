"""A Qwen2.5-VL of random weights whose forward takes milliseconds, and a row with an image for it."""

import io
import random
from pathlib import Path

import torch
from PIL import Image

from graft.core.recipe import EmbeddedBase, Lora, Train, Vision
from graft.data import drawings
from graft.data.drawings import drawn
from graft.data.tokenizer import VISION, train_tokenizer
from graft.model.base import load_base, random_qwen_vl
from graft.model.images import ImageProcessor, write_config
from graft.model.lora import LoraLinear, inject, save_adapter

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


def write_speaking(folder: Path) -> Path:
    """One with a tokenizer of its own, and weights larger than a fresh model's, so that what is seen decides what comes next."""
    tokenizer = train_tokenizer([m["content"] for row in drawings.rows(9, 0) for m in row["messages"]], 300, images=True)
    write(folder, vocab_size=len(tokenizer), images={t: tokenizer.convert_tokens_to_ids(t) for t in VISION})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    model = load_base(str(folder), None, "fp32", "cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, lora: Lora, seed: int, vision: bool = False) -> Path:
    """A random one over that base; vision: over its tower too."""
    model = load_base(str(base), None, "fp32", "cpu")
    inject(model, lora, torch.float32, seed, vision)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.B, std=0.3)
    folder.mkdir()
    save_adapter(model, lora, folder, str(base))
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
