"""What a stage trains: the same model however its activations are kept, and what cannot work is one line."""

import numpy as np
import pytest
import torch

from graft.core.errors import ConfigError
from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.core.shards import Bin
from graft.model.base import random_llama
from graft.model.lora import adapters
from graft.train.batches import collate
from graft.train.build import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    shape = EmbeddedBase(vocab_size=300, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, train=Train(corpora=("a",), lora=None))
    folder = tmp_path_factory.mktemp("base")
    random_llama(shape, 300, 64, 0).save_pretrained(folder)
    return str(folder)


def gradients(base, **train):
    model = build(base, None, "fp32", Train(lora=Lora(r=4), **train), 0, CPU)
    for _, _, b in adapters(model.lm):
        b.data.fill_(0.01)
    ids = np.arange(40, dtype=np.int32) * 7 % 300
    loss = model(collate([Bin(ids, np.ones(40, np.uint8), np.array([12, 20], np.int32))]))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_computing_layers_again_changes_nothing(base):
    loss, kept = gradients(base)
    again, recomputed = gradients(base, activation_checkpointing="full")
    assert loss == again and kept.keys() == recomputed.keys() and len(kept) == 2 * 7 * 2
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_fp8_without_such_a_gpu_is_refused(base):
    with pytest.raises(ConfigError, match=r"model\.precision = 'fp8' needs a GPU of compute capability 8\.9 .* here there is none: use bf16 or nf4"):
        build(base, None, "fp8", Train(), 0, CPU)


def test_a_head_with_a_bias_is_refused(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has a head with a bias, which graft does not compute"):
        build(str(tmp_path), None, "fp32", Train(lora=None), 0, CPU)


def test_a_model_without_known_layers_trains_plainly_and_refuses_the_rest(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert build(str(tmp_path), None, "fp32", Train(lora=None), 0, CPU).lm.config.model_type == "gpt2"
    with pytest.raises(ConfigError, match="a gpt2 model has no list of decoder layers"):
        build(str(tmp_path), None, "fp32", Train(lora=None, activation_checkpointing="full"), 0, CPU)
