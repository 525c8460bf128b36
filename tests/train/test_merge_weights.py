"""The weights that an adapter is merged into are those that training multiplies by, tensor by tensor; bases that are odd or broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from graft.core.errors import ArtifactError, ConfigError
from graft.core.recipe import Lora
from graft.model.base import load_base
from graft.model.stream import load_fused
from graft.train.merge_weights import Adapter, MergeBase

from ..engine.tiny_model import random_adapter

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 330, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied in fp32 and one file; untied in bf16 and several; with biases, in fp16."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(root / "tied")
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).bfloat16().save_pretrained(root / "untied", max_shard_size="50KB")
    biased = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)).half()
    for name, p in biased.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    biased.save_pretrained(root / "biased")
    return root


NAMES = ["tied", "untied", "biased"]


def opened(module):
    """What a linear layer multiplies by, opened by bitsandbytes' own layers."""
    import bitsandbytes.functional as bnb

    state = getattr(module.weight, "quant_state", None)
    return module.weight.data if state is None else bnb.dequantize_4bit(module.weight.data, state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_they_are_those_of_load_base(bases, name, precision):
    base, lm = MergeBase(str(bases / name), None, precision, CPU), load_base(str(bases / name), None, precision, "cpu")
    modules = dict(lm.named_modules())
    compared = 0
    for full, p in lm.named_parameters():
        wanted = opened(modules[full.rpartition(".")[0]]) if full.endswith("weight") else p.data
        found = base.trained(full)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), full
        compared += 1
    assert compared == len(base.specs) > 15
    assert base.quantised == {f"{n}.weight" for n, m in modules.items() if hasattr(getattr(m, "weight", None), "quant_state")}
    assert len(base.quantised) == (14 if precision == "nf4" else 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_they_are_those_that_the_trainer_holds(bases, name, precision):
    """Read through its layers: what row n of the identity comes to is column n of W."""
    base, lm = MergeBase(str(bases / name), None, precision, CPU), load_fused(str(bases / name), None, precision, None, CPU, 0)
    held = 0
    for full, layer in lm.named_modules():
        if (group := getattr(layer, "group", None)) is None:
            continue
        frozen, found = group.frozen, base.trained(f"{full}.weight")
        rows = slice(start := sum(frozen.outs[: layer.place]), start + frozen.outs[layer.place])
        if precision == "fp8":
            codes, scales = (t[rows] for t in frozen.tensors)
            assert torch.equal(found, codes.float() * scales)
        else:
            from graft.model.frozen import matmul

            wanted = matmul(torch.eye(frozen.ins, dtype=torch.bfloat16), frozen.kind, frozen.tensors, None).t()[rows]
            assert torch.equal(found, wanted)
        held += 1
    others = [(n, p) for n, p in lm.named_parameters() if "frozen" not in n]
    assert held == 14 and others and all(torch.equal(base.trained(n), p) for n, p in others)


@pytest.fixture
def copy(bases, tmp_path):
    """make(name) -> (a copy of a base of one file, its tensors, put(tensors) which replaces them)."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(bases / name, folder)
        return folder, load_file(folder / "model.safetensors"), lambda tensors: save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return make


def test_extra_tensors_are_left_out_and_missing_ones_refused(copy):
    folder, tensors, put = copy("tied")
    put(tensors | {"model.rotary_emb.inv_freq": torch.ones(3), "classifier.weight": torch.ones(2, 2)})
    base = MergeBase(str(folder), None, "bf16", CPU)
    assert base.left_out == ["classifier.weight", "model.rotary_emb.inv_freq"] and set(base.specs) == set(tensors)
    put({name: t for name, t in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors that a llama model needs, such as model\.norm\.weight"):
        MergeBase(str(folder), None, "bf16", CPU)
    put(tensors | {"model.norm.weight": torch.ones(63)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is \[63\], its config asks for \[64\]"):
        MergeBase(str(folder), None, "bf16", CPU)


def test_a_tied_head_may_be_stored_too_or_alone_but_not_differ(copy):
    folder, tensors, put = copy("tied")
    embedding = tensors["model.embed_tokens.weight"]
    put(tensors | {"lm_head.weight": embedding.clone()})
    base = MergeBase(str(folder), None, "fp32", CPU)
    assert base.left_out == [] and "lm_head.weight" not in base.specs and torch.equal(base.trained("lm_head.weight"), embedding)
    put({("lm_head.weight" if name == "model.embed_tokens.weight" else name): t for name, t in tensors.items()})
    assert torch.equal(MergeBase(str(folder), None, "fp32", CPU).trained("model.embed_tokens.weight"), embedding)
    put(tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ConfigError, match=r"lm_head\.weight and model\.embed_tokens\.weight, which differ, and its config ties them"):
        MergeBase(str(folder), None, "fp32", CPU)


def test_a_base_that_is_quantised_already_is_refused(copy):
    folder, _, _ = copy("tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(ConfigError, match="is quantised already: name the model that it was made from"):
        MergeBase(str(folder), None, "nf4", CPU)


def test_the_adapter_of_another_base_is_refused(bases, tmp_path):
    base = MergeBase(str(bases / "tied"), None, "fp32", CPU)
    own = random_adapter(bases / "tied", Lora(r=4, targets=("q_proj", "down_proj")), tmp_path / "own", 0)
    base.check(Adapter(own))
    tensors = load_file(own / "adapter_model.safetensors")

    def refused(tensors, match, error=ArtifactError):
        save_file(tensors, own / "adapter_model.safetensors")
        with pytest.raises(error, match=match) as e:
            base.check(Adapter(own))
        assert "\n" not in str(e.value)

    refused(
        {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()},
        r"is the adapter of another base: it adapts model\.layers\.7\.mlp\.down_proj, which is no linear layer of",
    )
    wider = {name: torch.zeros(4, 96) if name.endswith("q_proj.lora_A.weight") else t for name, t in tensors.items()}
    refused(wider, r"another base: its model\.layers\.0\.self_attn\.q_proj is \[64, 96\], that of .* is \[64, 64\]")
    refused({name: t[:3] if "lora_A" in name else t for name, t in tensors.items()}, r"its config says rank 4")
    head = {f"base_model.model.lm_head.lora_{m}.weight": torch.zeros(*s) for m, s in {"A": (4, 64), "B": (330, 4)}.items()}
    refused(head, r"adapts lm_head, whose weight .* shares with its embedding")
    untied = MergeBase(str(bases / "untied"), None, "nf4", CPU)
    untied.check(adapter := Adapter(own))
    assert torch.equal(untied.merged("lm_head.weight", adapter), untied.trained("lm_head.weight"))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_reads_the_shards(bases, tmp_path, name):
    adapter = Adapter(random_adapter(bases / name, Lora(r=4), tmp_path / "adapter", 0))
    base = MergeBase(str(bases / name), None, "bf16", CPU)
    assert base.write(adapter, tmp_path, 50_000) == len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    lm = load_base(str(tmp_path), None, "bf16", "cpu")
    found = dict(lm.named_parameters())
    assert set(found) == set(base.specs) and all(torch.equal(p, base.merged(n, adapter)) for n, p in found.items())
    stored = dict(load_base(str(bases / name), None, "bf16", "cpu").named_parameters())
    assert sum(not torch.equal(p, stored[n]) for n, p in found.items()) == len(adapter.pairs) == 14
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == (name == "tied")
