"""A frozen base read straight onto the device, one tensor at a time, into the layers that training uses (fused.py).

Nothing is ever whole in host memory, and on the GPU there is at most one weight beside what stays: an 8B base in FP8 needs
its 8.6 GB (the embedding and the head stay in bf16), not 16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.core.hub import model_folder, weight_files
from graft.core.recipe import Lora
from graft.model.base import auto_class, read_config, sees_images
from graft.model.frozen import Kind
from graft.model.fused import fuse
from graft.model.lora import TOWER

KINDS: dict[str, Kind] = {"fp32": "dense", "bf16": "dense", "fp8": "fp8", "nf4": "nf4"}


def load_fused(base: str, revision: str | None, precision: str, lora: Lora | None, device: torch.device, seed: int, vision: bool = False) -> Any:
    """A causal LM in eval mode on `device`, its linear layers but the head fused, frozen and held in `precision`, with fresh adapters.

    vision: adapters on a vision tower too, which is in bf16 (fp32 where `precision` is) in any case. Raises ConfigError where `base` is no model, or its weights are not those that its config asks for.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    config = read_config(base, revision)
    try:
        with torch.device("meta"):
            lm: Any = auto_class(config).from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as e:
        raise ConfigError(f"model.base = {base!r} is no causal language model: {str(e).strip().splitlines()[0][:200]}") from None
    places = fuse(lm, KINDS[precision], lora, dtype, device, seed, vision)
    _make_rotary(lm, device)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()  # the whole model's, not its text part's, as transformers
    wanted = {name for name, p in lm.named_parameters() if p.is_meta} - tied
    wanted |= {f"{name}.weight" for name in places} | {f"{name}.bias" for name, (frozen, _) in places.items() if frozen.bias is not None}
    for stored, tensor in weights(base, revision, device):
        name = named(stored, config)
        module, _, leaf = name.rpartition(".")
        if name not in wanted:
            if name in tied or "rotary_emb" in name:
                continue
            raise ConfigError(f"model.base = {base!r} holds the tensor {stored}, which a {config.model_type} model has no place for")
        wanted.discard(name)
        if module in places:
            frozen, place = places[module]
            frozen.put(place, **{leaf: tensor})
        else:
            lm.get_submodule(module)._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    if wanted:
        raise ConfigError(f"model.base = {base!r} lacks {len(wanted)} tensors that a {config.model_type} model needs, such as {min(wanted)}")
    if tied:
        lm.tie_weights()
    return lm.eval()


def weights(base: str, revision: str | None, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) of all safetensors files of a model folder or hub id; ConfigError where there are none."""
    from safetensors import SafetensorError, safe_open

    folder = model_folder(base, revision, weights=True)
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as e:
            raise ConfigError(f"model.base = {base!r}: {name} cannot be read ({e}); only safetensors are") from None


def named(stored: str, config: Any) -> str:
    """What transformers calls a stored tensor; a Qwen2.5-VL's files name it as its first versions did, or as it is."""
    if not sees_images(config):
        return stored
    if stored.startswith(f"{TOWER}."):
        return f"model.{stored}"
    return re.sub(rf"^model\.(?!{TOWER}\.|language_model\.)", "model.language_model.", stored)


def stored_as(name: str, config: Any) -> str:
    """The other way: the name in a file that every program reads."""
    return re.sub(rf"^model\.({TOWER}\.)|^(model\.)language_model\.", r"\1\2", name) if sees_images(config) else name


def _make_rotary(lm: nn.Module, device: torch.device) -> None:
    """Rotary embeddings hold computed buffers, which no file has: make them anew."""
    for name, module in list(lm.named_modules()):
        if "inv_freq" in module._buffers:
            parent, _, attribute = name.rpartition(".")
            setattr(lm.get_submodule(parent), attribute, type(module)(module.config).to(device))  # type: ignore[operator]
