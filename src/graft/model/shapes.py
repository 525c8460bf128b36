"""Bases of real shapes with random weights, for benchmarks where no model can be downloaded.

Imports torch inside functions. `graft base build --like llama-3.1-8b --out DIR` writes one, a file of 4 GiB at a time and never whole in memory; 8B take
16 GB of disk and at most 37 s on a machine with an H200. The tokenizer is a small one of graft's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LLAMA_3 = {"bos_token_id": None, "vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
_LLAMA_2 = {"bos_token_id": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3.2-3b": {
        **_LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": True,
    },
    "taigi-llama-2-13b": {
        **_LLAMA_2, "vocab_size": 56_020, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "tinyllama": {
        **_LLAMA_2, "vocab_size": 32_000, "max_position_embeddings": 2048, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584, "tokens_per_second": 2,
        },
    },
}  # fmt: skip
ON_THE_HUB = {  # the shape of each
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2-3b",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama",
    "Bohanlu/Taigi-Llama-2-13B": "taigi-llama-2-13b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}  # by model_type
_FILE = 4 << 30  # bytes of a weights file, at most


def empty_model(like: str, layers: int | None = None) -> Any:
    """A shape's model in bf16 on the meta device; layers: fewer than the shape has. ConfigError where there is no such shape."""
    import torch
    import transformers

    if like not in SHAPES:
        raise ConfigError(f"--like {like!r} is no shape that graft knows: take one of {', '.join(SHAPES)}")
    shape = deepcopy(SHAPES[like])
    if layers:
        shape.get("text_config", shape)["num_hidden_layers"] = layers
        if "vision_config" in shape:
            shape["vision_config"]["depth"] = layers
    name = _ARCHITECTURES[shape.pop("model_type", "llama")]
    made = getattr(transformers, name)
    config = made.config_class(**shape, dtype="bfloat16", architectures=[name])
    with torch.device("meta"):
        return made(config)


def write_random_base(like: str, folder: Path, seed: int = 0, layers: int | None = None) -> int:
    """config.json and bf16 safetensors of a shape's model, N(0, 0.02²), norms of 1 and biases of 0; returns the number of weights.

    layers: fewer than the shape has, for tests. ConfigError where there is no such shape.
    """
    from safetensors.torch import save_file

    model = empty_model(like, layers)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for n, tensors in enumerate(_files(shapes, seed)):
        name = f"model-{n + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    weights = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * weights}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    model.config.save_pretrained(folder)
    return weights


def _files(shapes: dict[str, torch.Size], seed: int) -> Iterator[dict[str, Tensor]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    size = 0
    for name, shape in shapes.items():
        made = torch.zeros(shape, dtype=torch.bfloat16) if name.endswith(".bias") else torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            made = (torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16) * 0.02).cpu()
        if tensors and size + made.nbytes > _FILE:
            yield tensors
            tensors, size = {}, 0
        tensors[name], size = made, size + made.nbytes
    yield tensors
