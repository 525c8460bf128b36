"""The engine that a recipe names, or that suits this machine: evaluate, predict and serve all start it here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError
from graft.engine.protocol import Engine


def start(
    kind: str,
    base: str,
    revision: str | None,
    precision: str,
    tokenizer: Any,
    *,
    adapters: dict[str, Path] | None = None,
    max_batch: int,
    max_adapters: int,
    max_rank: int,
    kv_tokens: int | None = None,
    image_pixels: int | None = None,
) -> Engine:
    """With these adapters loaded. kind: serve.engine, where "auto" is vLLM if it is installed beside a GPU and takes the base and its precision.
    image_pixels: of an image that a base is shown, as in training (shard.image_pixels).

    ConfigError where the base cannot be run, ArtifactError where an adapter does not fit it.
    """
    limits: dict[str, Any] = {"max_batch": max_batch, "max_adapters": max_adapters, "max_rank": max_rank, "kv_tokens": kv_tokens}
    engine: Engine
    from graft.model.base import read_config, sees_images

    seeing = sees_images(read_config(base, revision))
    if kind == "vllm" and seeing:
        raise ConfigError(
            f'serve.engine = "vllm", and the base {base!r} sees images, which graft shows by its own engine alone: set serve.engine = "hf"'
        )
    if kind == "vllm" or (kind == "auto" and not seeing and suits_vllm(precision)):
        from graft.engine.vllm import VLLMEngine

        engine = VLLMEngine(base, revision, precision, tokenizer, **limits)
    else:
        from graft.engine.hf import HFEngine

        engine = HFEngine(base, revision, precision, {}, tokenizer, **limits, image_pixels=image_pixels)
    try:
        for name, folder in (adapters or {}).items():
            engine.load(name, folder)
    except BaseException:
        engine.close()
        raise
    return engine


def suits_vllm(precision: str) -> bool:
    import torch

    return precision == "bf16" and torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
