"""`graft base build --like SHAPE OUT`: a model folder with random weights of a real shape and a small tokenizer, for benchmarks."""

from __future__ import annotations

from pathlib import Path

from graft.core.sections import Corpus
from graft.data.corpora import made
from graft.data.tokenizer import train_tokenizer


def write_like(like: str, folder: Path, layers: int | None = None) -> int:
    """Write the folder, tokenizer last; returns the number of weights. ConfigError where there is no such shape.

    layers: fewer than the shape has.
    """
    from graft.model.shapes import write_random_base

    weights = write_random_base(like, folder, layers=layers)
    train_tokenizer((row["text"] for row in made(Corpus(kind="docstrings", documents=200))), 3000).save_pretrained(folder, save_jinja_files=False)
    return weights
