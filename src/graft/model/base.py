"""The base model: a random small Llama for the embedded base, or any causal LM loaded in fp32, bf16 or nf4."""

from __future__ import annotations

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers may import DeepSpeed, which else warns on stdout

from graft.core.errors import ConfigError
from graft.core.hub import model_folder
from graft.core.recipe import EmbeddedBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "nf4": torch.bfloat16}


def load_base(base: str, revision: str | None, precision: str, device: str | torch.device) -> Any:
    """A causal LM on `device`, in eval mode, all weights as stored in `precision`.

    fp8 is how a frozen base trains (stream.py); here, where nothing is trained, it is bf16. nf4 is bitsandbytes' NormalFloat4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314),
    computing in bf16. Raises ConfigError where `base` is no model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kwargs: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": "sdpa", "trust_remote_code": False, "use_safetensors": True}
    if precision == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        kwargs["device_map"] = {"": device}
    folder = model_folder(base, revision, weights=True)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.base = {base!r} cannot be loaded: {str(e).strip().splitlines()[0][:200]}") from None
    return (model if precision == "nf4" else model.to(device)).eval()


def read_config(base: str, revision: str | None) -> Any:
    """The model's config; ConfigError where `base` is no model."""
    from transformers import AutoConfig

    folder = model_folder(base, revision)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.base = {base!r} cannot be loaded: {str(e).strip().splitlines()[0][:200]}") from None


def random_llama(shape: EmbeddedBase, vocab_size: int, max_position: int, seed: int) -> Any:
    """A LlamaForCausalLM of the given shape with seeded random weights in fp32; embeddings tied, as small models do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max_position,
            tie_word_embeddings=True,
            bos_token_id=None,
            dtype="float32",
        )
    )
