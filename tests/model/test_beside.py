"""One matmul for the gradient of an input and of its adapters: what it computes, and that a layer computes the same by it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.core.recipe import Lora
from graft.model import beside, gemm
from graft.model.blocks import fuse_blocks
from graft.model.frozen import Frozen
from graft.model.fused import Layout, fuse

TOKENS = 40
NUMBERS = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def by_one_matmul(monkeypatch, shapes):
    """As if each of them had been chosen, by PyTorch's matmul; returns which run."""
    ran = []

    def run_of(shape):
        def run(x, w, out):
            assert out.stride() == (w.stride(0), 1) and w.shape == (shape.outs, shape.ins + shape.beside)
            assert w.stride(0) == w.shape[1] + shape.apart
            ran.append(shape)
            torch.mm(x, w, out=out)

        return run

    monkeypatch.setattr(gemm, "_chosen", {shape: run_of(shape) for shape in shapes})
    return ran


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    "layout", [Layout(16, [0, 96, 128], [96, 32, 32]), Layout(4, [96], [32]), Layout(40, [0, 128], [96, 32])], ids=["all", "one", "wide"]
)
def test_it_is_the_gradient_of_the_input_and_of_each_adapter(monkeypatch, kind, layout):
    frozen = Frozen(kind, [96, 32, 32], 64, False, torch.bfloat16, "cpu")
    for layer, (rows, seed) in enumerate(((96, 1), (32, 2), (32, 3))):
        frozen.put(layer, drawn(rows, 64, seed=seed))
    dy, b, w, buffer = drawn(TOKENS, 160), [drawn(size, layout.rank, seed=4 + n) for n, size in enumerate(layout.sizes)], frozen.opened(), frozen.w0
    shape = beside.shape_of(TOKENS, frozen, layout)
    ran = by_one_matmul(monkeypatch, [shape])
    assert beside.back(dy, frozen, layout, b) is None, "no room"
    beside.make_room(frozen, layout)
    assert frozen.w0 is buffer and torch.equal(frozen.opened(), w) and frozen.opened().stride(0) % 64 == 0
    assert beside.back(dy[:-1], frozen, layout, b) is None, "as many tokens were not timed"
    for own in (b, [torch.full_like(m, 7.0) for m in b], b):
        dn, du = beside.back(dy, frozen, layout, own)
    assert ran == [shape] * 3
    torch.testing.assert_close(dn, dy @ w)
    torch.testing.assert_close(du, torch.cat([part @ up for (part, _), up in zip(layout.columns(dy, du), b, strict=True)], dim=1))


@pytest.mark.parametrize("targets", [Lora().targets, ("q_proj", "v_proj", "up_proj", "gate_proj"), ("k_proj", "down_proj")])
@pytest.mark.parametrize(("kind", "kept", "dropout"), [("dense", "none", 0.0), ("dense", "full", 0.3), ("nf4", "selective", 0.0)])
def test_a_layers_gradients_are_those_without(monkeypatch, targets, kind, kept, dropout):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**NUMBERS)).to(torch.bfloat16)
    weights = {name: m.weight.detach().clone() for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    places = fuse(plain, kind, Lora(r=4, targets=targets, dropout=dropout), torch.bfloat16, "cpu", 3)
    for name, (frozen, place) in places.items():
        frozen.put(place, weights[name])
    plain.adapters.flat.data.copy_(drawn(plain.adapters.flat.numel()) * 0.1)
    fuse_blocks(plain, kept)
    groups = [half.group for layer in plain.model.layers for half in layer.halves if half and half.group.adapted]
    shapes = {beside.shape_of(TOKENS, group.frozen, group.layout) for group in groups}
    angles, x = [drawn(1, TOKENS, 16, seed=n) for n in (1, 2)], drawn(1, TOKENS, 64, seed=3)
    cu, longest = torch.tensor([0, 24, TOKENS], dtype=torch.int32), torch.tensor(24)

    def gradients():
        given = x.clone().requires_grad_()
        torch.manual_seed(5)
        plain.adapters.hand_out()
        out = given
        for layer in plain.model.layers:
            out = layer(out, position_embeddings=angles, cu=cu, longest=longest, backend="reference")
        out.float().pow(2).sum().backward()
        flat, plain.adapters.flat.grad = plain.adapters.flat.grad, None
        return given.grad, flat

    wanted = gradients()
    ran = by_one_matmul(monkeypatch, shapes)
    for group in groups:
        beside.make_room(group.frozen, group.layout)
    found = gradients()
    assert set(ran) == shapes and len(ran) == len(groups)
    for one, other in zip(found, wanted, strict=True):
        assert other.norm() > 0 and (one - other).float().norm() <= 1e-2 * other.float().norm()


def test_the_operands_to_time_are_those_of_the_one_matmul_and_of_all():
    layout = Layout(16, [0, 128], [96, 32])
    frozen = Frozen("dense", [96, 32, 32], 64, False, torch.bfloat16, "cpu")
    for layer, rows in enumerate(frozen.outs):
        frozen.put(layer, drawn(rows, 64, seed=layer))
    shape = beside.shape_of(TOKENS, frozen, layout)
    assert (shape.beside, shape.apart, shape.text) == (32, 32, "40 160 64 back beside 32")
    x, wide, w, parts = beside.operands(shape, frozen, layout)
    assert w.is_contiguous() and x.shape == (TOKENS, 160) and wide.stride(0) == 128
    torch.testing.assert_close(torch.mm(x, wide), torch.cat([torch.mm(x, w), *(torch.mm(own, b) for own, b in parts)], dim=1))
