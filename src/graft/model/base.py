"""The base model: a random small Llama for the embedded base, or any causal LM loaded in fp32, bf16 or nf4."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers may import DeepSpeed, which else warns on stdout

from graft.core.errors import ConfigError
from graft.core.hub import model_folder
from graft.core.recipe import EmbeddedBase, Vision
from graft.model.lora import TOWER

_ALONE = threading.Lock()  # transformers swaps methods of its classes while it loads: two loads at once leave the swapped ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "nf4": torch.bfloat16}


def load_base(base: str, revision: str | None, precision: str, device: str | torch.device) -> Any:
    """A causal LM, or one that sees images, on `device`, in eval mode, all weights as stored in `precision`.

    fp8 is how a frozen base trains (stream.py); here, where nothing is trained, it is bf16. nf4 is bitsandbytes' NormalFloat4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314),
    computing in bf16. Raises ConfigError where `base` is no model.
    """
    from transformers import BitsAndBytesConfig

    config = read_config(base, revision)
    kwargs: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": "sdpa", "trust_remote_code": False, "use_safetensors": True}
    if precision == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", rf"(.*\.)?{TOWER}"] if sees_images(config) else None,  # a tower stays in bf16
        )
        kwargs["device_map"] = {"": device}
    folder = model_folder(base, revision, weights=True)
    try:
        with _ALONE:
            model: Any = auto_class(config).from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.base = {base!r} cannot be loaded: {str(e).strip().splitlines()[0][:200]}") from None
    return (model if precision == "nf4" else model.to(device)).eval()


def sees_images(config: Any) -> bool:
    """Whether it is a model with a vision tower."""
    return hasattr(config, "vision_config")


def auto_class(config: Any) -> Any:
    """The class of transformers that loads such a model, with its tower where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def read_config(base: str, revision: str | None) -> Any:
    """The model's config; ConfigError where `base` is no model."""
    from transformers import AutoConfig

    folder = model_folder(base, revision)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.base = {base!r} cannot be loaded: {str(e).strip().splitlines()[0][:200]}") from None


def random_qwen_vl(shape: EmbeddedBase, vision: Vision, vocab_size: int, max_position: int, seed: int, images: dict[str, int]) -> Any:
    """A Qwen2_5_VLForConditionalGeneration of the given shape with seeded random weights in fp32; embeddings tied. images: ids of the tokens around and of them.

    Of the angles of a head a quarter turn by time, three eighths by row and as many by column, as in the real ones.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    angles = shape.hidden_size // shape.heads // 2
    text = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": max_position,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [angles - 2 * (3 * angles // 8), 3 * angles // 8, 3 * angles // 8],
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    tower = {
        "depth": vision.layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.heads,
        "out_hidden_size": shape.hidden_size,
        "fullatt_block_indexes": [vision.layers - 1],
    }
    start, end, image = images.values()
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen2_5_VLForConditionalGeneration(config)


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
