"""What a base's config asks for beyond one mask and the head's weight is refused; what it merely mentions is not."""

import json

import numpy as np
import pytest
import torch
import transformers

from graft.core.errors import ConfigError
from graft.core.shards import Bin
from graft.model.base import load_base, read_config
from graft.model.packed import PackedLM
from graft.train.alike import refuse_unlike, window
from graft.train.batches import collate

NUMBERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
NUMBERS |= {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def written(folder, name, **more):
    """A config as config.json has it, and as transformers reads it."""
    text = {**NUMBERS, **more}
    whole = {"text_config": text, "vision_config": {}} if name == "Qwen2_5_VL" else text
    getattr(transformers, f"{name}Config")(**whole).save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    return told.get("text_config") or told, read_config(str(folder), None).get_text_config().to_dict()


@pytest.mark.parametrize(
    ("name", "more", "seen"),
    [
        ("Llama", {}, None),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 4}, None),  # as Qwen2.5 has it
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, None),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, 8),
        ("Qwen3", {"use_sliding_window": False, "sliding_window": None}, None),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ("Qwen2_5_VL", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 4}, None),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {"sliding_window": 8}, 8),
        ("Phi3", {"sliding_window": 8}, 8),
        ("Gemma3Text", {"sliding_window": 8, "head_dim": 16}, 8),
    ],
)
def test_a_window_is_told_where_layers_have_one(tmp_path, name, more, seen):
    raw, filled = written(tmp_path, name, **more)
    for config in (raw, filled):
        refuse_unlike(config, "it")
        assert window(config) == seen
    bare = {key: value for key, value in raw.items() if key != "layer_types"}  # as older files are, which `graft check` reads as they lie
    assert window(bare) == seen


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("Granite", {"logits_scaling": 8.0}, r"it has logits_scaling = 8\.0, which graft does not compute"),
        ("Cohere", {}, r"logit_scale = 0\.0625"),
        ("Gemma2", {"head_dim": 16}, r"final_logit_softcapping = 30\.0"),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": None}, r"attn_logit_softcapping = 50\.0"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "layers of 'conv'"),
    ],
)
def test_other_heads_and_layers_are_refused_by_the_key(tmp_path, name, more, said):
    _, filled = written(tmp_path, name, **more)
    with pytest.raises(ConfigError, match=said):
        refuse_unlike(filled, "it")


def test_a_granite_whose_logits_are_not_scaled_is_taken(tmp_path):
    for config in written(tmp_path, "Granite", logits_scaling=1.0):
        refuse_unlike(config, "it")


@pytest.mark.parametrize(("tokens", "same"), [(8, True), (10, False)])
def test_a_document_no_longer_than_the_window_trains_as_transformers_computes_it(tmp_path, tokens, same):
    torch.manual_seed(0)
    made = transformers.MistralForCausalLM(transformers.MistralConfig(**NUMBERS, sliding_window=8, initializer_range=0.3)).eval()
    made.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, tokens).astype(np.int32)
    batch = collate([Bin(ids, np.ones(tokens, np.uint8), np.array([tokens], np.int32))])
    with torch.no_grad():
        ours = PackedLM(load_base(str(tmp_path), None, "fp32", "cpu"))(batch).item()
        asked = torch.tensor(ids, dtype=torch.long)[None]
        theirs = torch.nn.functional.cross_entropy(made(asked).logits[0, :-1], asked[0, 1:], reduction="sum").item()
    assert (ours == pytest.approx(theirs, rel=1e-5)) == same
