"""When a run's matmuls are tuned, and which."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.core.recipe import Lora, Train
from graft.model import gemm
from graft.model.blocks import fuse_blocks
from graft.model.fused import fuse
from graft.model.gemm import Shape
from graft.model.kernels import quack
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


def test_where_one_matmul_is_chosen_for_more_the_weights_get_room(monkeypatch):
    """And what was chosen for these alone goes on to be, though their rows lie apart now."""
    lm = LlamaForCausalLM(LlamaConfig(**NUMBERS | {"hidden_size": 64, "intermediate_size": 128})).to(torch.bfloat16)
    places = fuse(lm, "dense", Lora(targets=("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")), torch.bfloat16, "cpu", 0)
    fuse_blocks(lm)
    assert tune.beside_of(lm, CHUNK) == {}, "on another GPU than Hopper"
    monkeypatch.setattr(quack, "installed", lambda: "0.6.5")
    of_qkv, of_gate_and_up = (Shape(CHUNK, outs, 64, back=True, beside=32, apart=32) for outs in (128, 256))
    of_down, to_down = (Shape(CHUNK, 64, 128, back=back, beside=16, apart=48) for back in (True, False))
    assert {shape: len(groups) for shape, groups in tune.beside_of(lm, CHUNK).items()} == {of_qkv: 2, of_gate_and_up: 2, of_down: 2, to_down: 2}
    asked = []

    def choose(operands, measure):
        asked.append(set(operands))
        gemm._chosen |= {of_gate_and_up: print, of_down: print, to_down: print}
        return "tuned" if len(asked) == 1 else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm, "_chosen", {})
    monkeypatch.setattr(gemm, "choose", choose)
    monkeypatch.setattr(tune, "peak_flops", lambda: None)
    assert tune.tune(lm, Train(), CHUNK, 1e18) == "tuned"
    assert {of_qkv, of_gate_and_up, of_down, to_down, Shape(CHUNK, 256, 64), Shape(CHUNK, 256, 64, back=True)} < asked[0]
    assert not any(s.apart for s in asked[0] if not s.beside)
    assert asked[1:] == [{Shape(CHUNK, *shape, back, apart=64) for shape in ((256, 64), (64, 128)) for back in (True, False)}]
    assert {name.rpartition(".")[2]: frozen.room for name, (frozen, _) in places.items()} == dict(
        q_proj=0, k_proj=0, v_proj=0, o_proj=0, gate_proj=64, up_proj=64, down_proj=64
    )


def test_what_has_room_is_filled_though_another_finds_no_memory_for_its_own(monkeypatch):
    lm = LlamaForCausalLM(LlamaConfig(**NUMBERS | {"hidden_size": 64, "intermediate_size": 128})).to(torch.bfloat16)
    places = fuse(lm, "dense", Lora(), torch.bfloat16, "cpu", 0)
    fuse_blocks(lm)
    first, left = places["model.layers.0.self_attn.q_proj"][0], [1]
    make_room = tune.beside.make_room

    def scarce(*given):
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left.pop()
        make_room(*given)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quack, "installed", lambda: "0.6.5")
    monkeypatch.setattr(gemm, "_chosen", dict.fromkeys(tune.beside_of(lm, CHUNK), print))
    monkeypatch.setattr(gemm, "choose", lambda operands, measure: None)
    monkeypatch.setattr(tune, "peak_flops", lambda: None)
    monkeypatch.setattr(tune.beside, "make_room", scarce)
    assert "CUDA out of memory" in tune.tune(lm, Train(), CHUNK, 1e18)
    assert [frozen.room for frozen, _ in places.values()].count(64) == 3, "q, k and v of one layer"
    lm.adapters.flat.data.fill_(7.0)
    lm.adapters.hand_out()
    wide = first.opened().as_strided((128, 64 + 48), (128, 1))
    assert (wide[:64, 64:80] == 7).all() and (wide[64:96, 80:96] == 7).all() and (wide[96:, 96:] == 7).all()
    assert (wide[:64, 80:] == 0).all() and (wide[64:96, 64:80] == 0).all(), "each B at rows and columns of its own"


def test_another_library_leaves_them_to_pytorch(monkeypatch):
    def choose(operands, measure):
        raise OSError("libcublasLt.so.99: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "peak_flops", lambda: None)
    monkeypatch.setattr(gemm, "choose", choose)
    said = tune.tune(fused("dense"), Train(), CHUNK, 1e18)
    assert said == "matmuls that are not tuned yet are left to PyTorch: libcublasLt.so.99: cannot open shared object file"
