"""When a run's matmuls are tuned, and which."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.core.recipe import Lora, Train
from graft.model import gemm
from graft.model.fused import fuse
from graft.model.gemm import Shape
from graft.model.loss import CHUNK
from graft.train import tune

NUMBERS = dict(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def fused(kind, dtype=torch.bfloat16):
    lm = LlamaForCausalLM(LlamaConfig(**NUMBERS)).to(dtype)
    fuse(lm, kind, Lora(), dtype, "cpu", 0)
    return lm


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_shape_of_a_frozen_weight_is_tuned_once_a_way(kind):
    found = tune.operands_of(fused(kind), CHUNK)
    shapes = {(64, 32), (32, 32), (192, 32), (32, 96)}  # q, k and v together; o; gate and up together; down
    assert set(found) == {Shape(CHUNK, *shape, back) for shape in shapes for back in (False, True)}, "the head's 64 rows are those of q, k and v"
    for shape, made in found.items():
        x, w = made()
        assert w.shape == (shape.outs, shape.ins) and gemm.product(x, w, back=shape.back).shape == (CHUNK, shape.ins if shape.back else shape.outs)


def test_fp8_is_multiplied_by_the_weight_and_by_its_transpose():
    found = tune.operands_of(fused("fp8"), CHUNK)
    head = {Shape(CHUNK, 64, 32), Shape(CHUNK, 64, 32, back=True)}
    assert head < set(found), "in bf16"
    both = {(64, 32), (32, 64), (32, 32), (192, 32), (32, 192), (32, 96), (96, 32)}
    assert set(found) - head == {Shape(CHUNK, *shape, fp8=True) for shape in both}
    for shape in set(found) - head:
        x8, x_scales, w8, w_scales = found[shape]()
        assert (x8.dtype, w8.dtype) == (torch.float8_e4m3fn,) * 2 and x8.shape == (CHUNK, shape.ins) and w8.shape == (shape.outs, shape.ins)
        assert x_scales.shape == (CHUNK, 1) and w_scales.shape == (1, shape.outs) and w_scales.is_contiguous()


def test_what_is_not_multiplied_in_bf16_is_not_tuned():
    assert tune.operands_of(fused("dense", torch.float32), CHUNK) == {}
    assert Shape(CHUNK, 64, 32) not in tune.operands_of(fused("dense"), 512), "there the head has fewer rows than it takes at a time"


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
    monkeypatch.setattr(gemm, "choose", lambda operands, measure: asked.append(measure))
    tune.tune(fused("dense"), Train.model_validate(said), CHUNK, flop)
    assert asked == wanted


def test_another_library_leaves_them_to_pytorch(monkeypatch):
    def choose(operands, measure):
        raise OSError("libcublasLt.so.99: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "peak_flops", lambda: None)
    monkeypatch.setattr(gemm, "choose", choose)
    said = tune.tune(fused("dense"), Train(), CHUNK, 1e18)
    assert said == "matmuls that are not tuned yet are left to PyTorch: libcublasLt.so.99: cannot open shared object file"
