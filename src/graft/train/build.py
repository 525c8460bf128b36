"""The model that a stage trains, on this rank's device: fused, packed and compiled on a GPU, plain on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from graft.core.errors import ConfigError
from graft.core.recipe import Train
from graft.model import attention
from graft.model.base import DTYPES, load_base
from graft.model.blocks import fuse_blocks
from graft.model.frozen import fp8_works
from graft.model.lora import inject
from graft.model.packed import PackedLM
from graft.model.stream import load_fused
from graft.model.tower import fuse_tower
from graft.model.vision import VisionLM, tower


def build(base: str, revision: str | None, precision: str, config: Train, seed: int, device: torch.device) -> PackedLM:
    """In training mode, adapters (or all weights) trainable. Raises ConfigError where the precision cannot work here."""
    on_gpu = device.type == "cuda"
    if precision == "fp8" and not fp8_works(device):
        have = (
            f"{torch.cuda.get_device_name(device)} has compute capability {torch.cuda.get_device_capability(device)}" if on_gpu else "there is none"
        )
        raise ConfigError(f"model.precision = 'fp8' needs a GPU of compute capability 8.9 (Ada, Hopper or later), here {have}: use bf16 or nf4")
    if config.lora and on_gpu:
        lm = load_fused(base, revision, precision, config.lora, device, seed, config.train_vision)
        fuse_blocks(lm, config.activation_checkpointing)
    else:
        lm = load_base(base, revision, precision, device)
        if config.lora:
            inject(lm, config.lora, DTYPES[precision], seed, config.train_vision)
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{base} has a head with a bias, which graft does not compute: it would train as another model; name another base")
    eyes = tower(lm)
    if config.train_vision and not eyes:
        raise ConfigError(f"train_vision = true, and {base} has no vision tower: leave it out, or name a Qwen2.5-VL model")
    if eyes and not config.train_vision:
        eyes.requires_grad_(False)
        if config.lora and on_gpu:
            fuse_tower(eyes)
    c = lm.config.get_text_config()
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    backend = "reference" if on_gpu and config.lora else None  # in fp32, which the fast kernels do not take
    if on_gpu and DTYPES[precision] == torch.bfloat16:
        backend = attention.fastest(c.num_attention_heads, c.num_key_value_heads, width, device)
    _wrap_layers(lm, on_gpu and config.compile, config.activation_checkpointing == "full")
    return (VisionLM if eyes else PackedLM)(lm, backend).train()


def _wrap_layers(lm: Any, compiled: bool, checkpointed: bool) -> None:
    """Compile each decoder layer that is not fused as a whole, and have its backward compute it again."""
    if not (compiled or checkpointed):
        return
    layers = getattr(getattr(lm.base_model, "language_model", lm.base_model), "layers", None)
    if layers is None:
        raise ConfigError(
            f"a {lm.config.model_type} model has no list of decoder layers that graft knows: set compile = false and activation_checkpointing = 'none'"
        )
    for layer in layers:
        if all(getattr(layer, "halves", [None])):
            continue
        forward: Callable[..., Any] = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=False)
        layer.forward = partial(checkpoint, forward, use_reentrant=False) if checkpointed else forward


def compilations() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
