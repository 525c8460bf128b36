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


TINY = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def written(shape, folder, layers):
    """The number of weights of a random base of a shape that SHAPES does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", shape)
        return shapes.write_random_base("tiny", folder, layers=layers)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, written(shapes.SHAPES["tinyllama"] | TINY, folder, 2)


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
    sizes = {name: shapes.empty_model(name).num_parameters() for name in shapes.SHAPES}
    published = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-3b": 3_212_749_824, "tinyllama": 1_100_048_384, "qwen2.5-vl-7b": 8_292_166_656}
    assert {name: sizes[name] for name in published} == published


def test_a_model_that_sees_is_written_too_and_reads_text_alone(tmp_path, monkeypatch):
    from transformers import Qwen2_5_VLForConditionalGeneration

    real = shapes.SHAPES["qwen2.5-vl-7b"]
    text = real["text_config"] | TINY | {"rope_parameters": real["text_config"]["rope_parameters"] | {"mrope_section": [2, 3, 3]}}
    vision = real["vision_config"] | {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    monkeypatch.setattr(shapes, "_FILE", 60_000)
    weights = written(real | {"text_config": text, "vision_config": vision}, tmp_path, 2)
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 80_000
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(loading.values()) and model.num_parameters() == weights
    assert len(model.model.language_model.layers) == len(model.model.visual.blocks) == 2
    attention = model.model.language_model.layers[0].self_attn
    assert (attention.q_proj.bias == 0).all() and attention.q_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    ids = torch.arange(24).view(2, 12)
    ids[1, 1:] = ids[0, 1:]
    logits = model(ids).logits
    assert logits.shape == (2, 12, 90) and logits.isfinite().all()
    assert not torch.equal(logits[0, -1], logits[1, -1]), "the last position sees the first token"


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
    with pytest.raises(ConfigError, match="is no folder"):
        load_fused(str(tmp_path / "none"), None, "bf16", None, CPU, 0)
