"""Bases read a tensor at a time: the random ones of real shapes, and what is no model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.core.errors import ConfigError
from graft.core.recipe import Lora
from graft.model import shapes
from graft.model.base import load_base
from graft.model.stream import load_fused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    known = dict(shapes.SHAPES)
    shapes.SHAPES["tiny"] = shapes.SHAPES["tinyllama"] | {
        "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    try:
        weights = shapes.write_random_base("tiny", folder, layers=2)
    finally:
        shapes.SHAPES.clear()
        shapes.SHAPES.update(known)
    return folder, weights


def test_a_random_base_is_an_ordinary_model_folder(small):
    folder, weights = small
    model = load_base(str(folder), None, "bf16", "cpu")
    assert model.num_parameters() == weights and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.norm.weight == 1).all()


def test_a_shape_that_is_not_known_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"'llama-9' is no shape that graft knows: take one of llama-3.1-8b"):
        shapes.write_random_base("llama-9", tmp_path)


def test_the_published_shapes_have_their_sizes():
    from transformers import LlamaConfig, LlamaForCausalLM

    def count(name):
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**shapes.SHAPES[name])).num_parameters()

    sizes = {name: count(name) for name in shapes.SHAPES}
    assert sizes["llama-3.1-8b"] == 8_030_261_248 and sizes["llama-3.2-3b"] == 3_212_749_824 and sizes["tinyllama"] == 1_100_048_384


def test_a_tensor_too_few_or_too_many_is_named(small, tmp_path):
    folder, _ = small
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(next(folder.glob("*.safetensors")))

    def broken(tensors):
        tmp_path.joinpath("config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        load_fused(str(tmp_path), None, "bf16", Lora(), CPU, 0)

    with pytest.raises(ConfigError, match=r"lacks 1 tensors that a llama model needs, such as model.norm.weight"):
        broken({name: t for name, t in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ConfigError, match=r"holds the tensor visual\.patch, which a llama model has no place for"):
        broken(tensors | {"visual.patch": torch.zeros(1)})
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load_fused(str(tmp_path), None, "bf16", None, CPU, 0)
    with pytest.raises(ConfigError, match="cannot be had"):
        load_fused(str(tmp_path / "none"), None, "bf16", None, CPU, 0)
