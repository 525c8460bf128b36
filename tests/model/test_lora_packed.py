"""LoRA and packed attention against plain references, on a tiny random Llama."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from graft.core.errors import ArtifactError, ConfigError, Unreadable
from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.core.shards import Bin
from graft.model import lora
from graft.model.attention import block_causal_mask
from graft.model.base import random_llama
from graft.model.lora import LoraLinear, inject, merge_into, read_adapter, save_adapter
from graft.model.packed import PackedLM
from graft.train.batches import collate

SHAPE = EmbeddedBase(vocab_size=300, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, train=Train(corpora=("a",), lora=None))
ALL = Lora(r=4, alpha=8)


def llama(seed=0):
    return random_llama(SHAPE, 300, 128, seed).eval()


def a_bin(lens, length=32, seed=0, supervised=None):
    rng = np.random.default_rng(seed)
    mask = np.zeros(length, np.uint8)
    mask[: sum(lens)] = 1 if supervised is None else (rng.random(sum(lens)) < supervised)
    return Bin(rng.integers(0, 300, length, dtype=np.int32), mask, np.array(lens, np.int32))


def test_packed_documents_do_not_see_each_other():
    lm = llama()
    packed = a_bin([10, 7, 12])
    together = PackedLM(lm)(collate([packed]))
    alone, at = 0.0, 0
    for n in packed.doc_lens:
        ids = torch.from_numpy(packed.input_ids[at : at + n]).long()[None]
        logits = lm(ids).logits[0, :-1]
        alone += F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        at += n
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_targets_are_supervised_tokens_inside_a_document():
    b = a_bin([5, 6], length=16)
    b.loss_mask[:] = 0
    b.loss_mask[[2, 5, 7]] = 1  # position 5 is the first token of the second document: nothing predicts it
    batch = collate([b])
    assert batch.target_at.tolist() == [1, 6]
    assert batch.targets.tolist() == [b.input_ids[2], b.input_ids[7]]
    assert batch.position_ids[0].tolist() == [*range(5), *range(6), *range(5)]
    assert batch.cu.tolist() == [0, 5, 11, 16] and batch.longest == 6 and b.targets == 2


def test_block_mask_is_causal_inside_documents():
    mask = block_causal_mask(torch.tensor([0, 2, 4], dtype=torch.int32), 1, 4)[0, 0]
    assert mask.tolist() == [[True, False, False, False], [True, True, False, False], [False, False, True, False], [False, False, True, True]]


def with_random_adapter(lora=ALL, seed=0):
    lm = llama()
    inject(lm, lora, torch.float32, seed)
    generator = torch.Generator().manual_seed(1)
    for module in lm.modules():
        if isinstance(module, LoraLinear):
            module.B.data = torch.randn(module.B.shape, generator=generator) * 0.1
    return lm.eval()


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained():
    lm, ids = llama(), torch.arange(20)[None]
    before = lm(ids).logits
    inject(lm, ALL, torch.float32, 0)
    torch.testing.assert_close(lm(ids).logits, before)
    assert {n.rsplit(".", 1)[-1] for n, p in lm.named_parameters() if p.requires_grad} == {"A", "B"}


def test_peft_reads_the_saved_adapter_to_the_same_logits(tmp_path):
    from peft import PeftModel

    lm, ids = with_random_adapter(), torch.arange(20)[None]
    save_adapter(lm, ALL, tmp_path, "base")
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(ids).logits, llama()(ids).logits, atol=1e-3)


def test_an_adapters_bytes_come_as_its_library_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "STAGED_BYTES", 40_000)  # several times over
    monkeypatch.setattr(lora, "PART_BYTES", 3000)
    save_adapter(with_random_adapter(), ALL, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    first = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert lora._bytes_on(torch.device("cpu"), file, first).numpy().tobytes() == file.read_bytes()[first:]
    shapes = lora.read_tensors(file, torch.device("meta"))
    assert {n: (t.shape, t.dtype) for n, t in shapes.items()} == {n: (t.shape, t.dtype) for n, t in load_file(file).items()}


def test_merged_weights_give_the_adapters_logits(tmp_path):
    lm, ids = with_random_adapter(), torch.arange(20)[None]
    save_adapter(lm, ALL, tmp_path, "base")
    config, pairs = read_adapter(tmp_path)
    merged = llama()
    layers = dict(merged.named_modules())
    for name, w in merge_into(lambda n: layers[n].weight.data, config, pairs).items():
        layers[name].weight.data = w
    torch.testing.assert_close(merged(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_fp64_formula():
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5, bias=False).double(), Lora(r=2, alpha=3, targets=("x",)), torch.float64)
    layer.B.data.normal_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: torch.func.functional_call(layer, {"A": a, "B": b}, (x,)), (x, layer.A, layer.B))


def test_damaged_adapters_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no readable adapter"):
        read_adapter(tmp_path)
    save_adapter(with_random_adapter(), ALL, tmp_path, "base")
    whole = json.loads((tmp_path / "adapter_config.json").read_text())
    for wrong in ([whole], {**whole, "r": None}, {**whole, "r": 0}, {key: value for key, value in whole.items() if key != "lora_alpha"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ArtifactError, match="gives no r and lora_alpha"):
            read_adapter(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="no readable adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="no readable adapter") as e:
        read_adapter(tmp_path)
    assert not isinstance(e.value, Unreadable)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()  # an OSError of whoever reads it
    for folder in (tmp_path, tmp_path / "unmounted"):
        with pytest.raises(Unreadable, match="no readable adapter"):
            read_adapter(folder)
    with pytest.raises(ConfigError, match="'nope'"):
        inject(llama(), Lora(targets=("q_proj", "nope")), torch.float32, 0)
