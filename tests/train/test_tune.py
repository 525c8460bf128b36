"""When a run's matmuls are tuned, and which."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.core.recipe import Lora, Train
from graft.model import gemm
from graft.model.fused import fuse
from graft.model.loss import CHUNK
from graft.train import tune

NUMBERS = dict(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def fused(kind, dtype=torch.bfloat16):
    lm = LlamaForCausalLM(LlamaConfig(**NUMBERS)).to(dtype)
    fuse(lm, kind, Lora(), dtype, "cpu", 0)
    return lm


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_shape_of_a_frozen_weight_is_tuned_once(kind):
    found = tune.weights_of(fused(kind), CHUNK)
    shapes = {(CHUNK, 64, 32), (CHUNK, 32, 32), (CHUNK, 192, 32), (CHUNK, 32, 96)}  # q, k and v together; o; gate and up together; down
    assert set(found) == shapes, "the head's 64 rows are those of q, k and v"
    assert all(make().shape == shape[1:] for shape, make in found.items())


def test_what_is_not_multiplied_in_bf16_is_not_tuned():
    assert set(tune.weights_of(fused("fp8"), CHUNK)) == {(CHUNK, 64, 32)}, "the head"
    assert tune.weights_of(fused("dense", torch.float32), CHUNK) == {}
    assert (CHUNK, 64, 32) not in tune.weights_of(fused("dense"), 512), "there the head has fewer rows than it takes at a time"


@pytest.mark.parametrize(
    ("said", "flop", "wanted"),
    [
        ({}, 1e12, [False]),
        ({}, 1e18, [True]),
        ({"tune_matmuls": True}, 1e12, [True]),
        ({"tune_matmuls": False}, 1e18, []),
        ({"deterministic": True}, 1e18, []),
        ({"lora": False}, 1e18, []),
    ],
)
def test_it_measures_where_a_run_is_long_enough(monkeypatch, said, flop, wanted):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "peak_flops", lambda: 989e12)
    monkeypatch.setattr(gemm, "choose", lambda weights, measure: asked.append(measure))
    tune.tune(fused("dense"), Train.model_validate(said), CHUNK, flop)
    assert asked == wanted


def test_another_library_leaves_them_to_pytorch(monkeypatch):
    def choose(weights, measure):
        raise OSError("libcublasLt.so.99: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "peak_flops", lambda: None)
    monkeypatch.setattr(gemm, "choose", choose)
    said = tune.tune(fused("dense"), Train(), CHUNK, 1e18)
    assert said == "matmuls that are not tuned yet are left to PyTorch: libcublasLt.so.99: cannot open shared object file"
