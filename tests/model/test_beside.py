"""One matmul for an input's gradient and its adapters', or for all that ends a half of a layer: what it computes, and that a layer computes the same by it."""

from types import SimpleNamespace

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
        def run(x, w, *last):
            *added, out = last
            assert w.shape == (shape.outs, shape.ins + shape.beside) and w.stride(0) == w.shape[1] + shape.apart
            assert (out if shape.back else x).stride() == w.stride() and len(added) == (not shape.back)
            ran.append(shape)
            if shape.back:
                torch.mm(x, w, out=out)
            else:
                out.copy_(added[0].float() + x.float() @ w.float().t())

        return run

    monkeypatch.setattr(gemm, "_chosen", {shape: run_of(shape) for shape in shapes})
    return ran


def group_of(kind, layout, outs=(96, 32, 32)):
    """What of a group is asked here, with weights."""
    frozen = Frozen(kind, outs, 64, False, torch.bfloat16, "cpu")
    for layer, rows in enumerate(outs):
        frozen.put(layer, drawn(rows, 64, seed=1 + layer))
    return SimpleNamespace(frozen=frozen, layout=layout)


def stand(group, adapter):
    """As before a forward."""
    beside.Standing(SimpleNamespace(groups=[group], sizes=[len(adapter)], flat=adapter))()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    "layout", [Layout(16, [0, 96, 128], [96, 32, 32]), Layout(4, [96], [32]), Layout(40, [0, 128], [96, 32])], ids=["all", "one", "wide"]
)
def test_it_is_the_gradient_of_the_input_and_of_each_adapter(monkeypatch, kind, layout):
    group = group_of(kind, layout)
    frozen, dy, adapter = group.frozen, drawn(TOKENS, 160), drawn(layout.rank * (64 * len(layout.sizes) + sum(layout.sizes)), seed=4)
    w, buffer, (_, b) = frozen.opened(), frozen.w0, layout.split(adapter, 64)
    shape = beside.shape_of(TOKENS, group, back=True)
    ran = by_one_matmul(monkeypatch, [shape])
    assert beside.back(dy, group, adapter) is None, "no room"
    beside.make_room(group)
    assert frozen.w0 is buffer and torch.equal(frozen.opened(), w) and frozen.opened().stride(0) % 64 == 0
    assert beside.back(dy[:-1], group, adapter) is None, "as many tokens were not timed"
    for own in (adapter, torch.full_like(adapter, 7.0), adapter):
        stand(group, own)
        dn, du = beside.back(dy, group, own)
    assert ran == [shape] * 3
    torch.testing.assert_close(dn, dy @ w)
    torch.testing.assert_close(du, torch.cat([part @ up for (part, _), up in zip(layout.columns(dy, du), b, strict=True)], dim=1))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("rank", [4, 64])
def test_it_is_the_sum_that_ends_a_half(monkeypatch, kind, rank):
    group = group_of(kind, Layout(rank, [0], [96]), outs=(96,))
    adapter, x, y, u = drawn(rank * (64 + 96), seed=4), drawn(TOKENS, 96, seed=5), drawn(TOKENS, 64, seed=6), drawn(TOKENS, rank, seed=7)
    w, (_, (b,)) = group.frozen.opened(), group.layout.split(adapter, 64)
    shape = beside.shape_of(TOKENS, group, back=False)
    ran = by_one_matmul(monkeypatch, [shape])
    assert beside.room_after(TOKENS, group) == 0 and beside.add(x, y, group, adapter) is None, "no room beside W"
    beside.make_room(group)
    assert beside.room_after(TOKENS, group) == 64 and beside.room_after(TOKENS - 1, group) == 0
    assert beside.behind(y, group) is None and beside.add(x, y, group, adapter) is None, "no room beside y"
    roomy = gemm.roomy(y, 64, 64).copy_(y)
    beside.behind(roomy, group).copy_(u)
    for own in (adapter, torch.full_like(adapter, 7.0), adapter):
        stand(group, own)
        out = beside.add(x, roomy, group, own)
    assert ran == [shape] * 3 and torch.equal(roomy, y)
    wide = [m.double() for m in (x, y, w, u, b)]
    torch.testing.assert_close(out, (wide[0] + wide[1] @ wide[2].t() + wide[3] @ wide[4].t()).to(torch.bfloat16))


@pytest.mark.parametrize("targets", [Lora().targets, ("q_proj", "v_proj", "up_proj", "gate_proj"), ("k_proj", "down_proj")])
@pytest.mark.parametrize(("kind", "kept", "dropout"), [("dense", "none", 0.0), ("dense", "full", 0.3), ("nf4", "selective", 0.0)])
def test_a_layers_gradients_are_those_without(monkeypatch, targets, kind, kept, dropout):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**NUMBERS))  # fp32: bf16 would round here as much as an adapter does
    weights = {name: m.weight.detach().clone() for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    places = fuse(plain, kind, Lora(r=4, targets=targets, dropout=dropout), torch.float32, "cpu", 3)
    for name, (frozen, place) in places.items():
        frozen.put(place, weights[name])
    plain.adapters.flat.data.copy_(drawn(plain.adapters.flat.numel()) * 0.1)
    fuse_blocks(plain, kept)
    halves = [half for layer in plain.model.layers for half in layer.halves if half]
    ways = [(half.group, beside.shape_of(TOKENS, half.group, back=True)) for half in halves]
    ways += [(half.last, beside.shape_of(TOKENS, half.last, back)) for half in halves for back in (True, False)]
    ways = [(group, shape) for group, shape in ways if group.adapted]
    shapes = {shape for _, shape in ways}
    angles, x = [drawn(1, TOKENS, 16, seed=n).float() for n in (1, 2)], drawn(1, TOKENS, 64, seed=3).float()
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

    def in_two_steps():
        for factor in (1.0, -0.7):  # the second step's adapters are others, and so must be what stands beside W
            plain.adapters.flat.data.mul_(factor)
            yield from gradients()
        plain.adapters.flat.data.div_(-0.7)

    wanted = list(in_two_steps())
    ran = by_one_matmul(monkeypatch, shapes)
    for group in dict.fromkeys(group for group, _ in ways):
        beside.make_room(group)
    plain.adapters.place = beside.Standing(plain.adapters)
    found = list(in_two_steps())
    assert set(ran) == shapes and len(ran) >= 2 * len(ways)
    for one, other in zip(found, wanted, strict=True):
        assert other.norm() > 0 and (one - other).norm() <= 1e-5 * other.norm()


def test_the_operands_to_time_are_those_of_the_one_matmul_and_of_all(monkeypatch):
    group = group_of("dense", Layout(16, [0, 128], [96, 32]))
    shape = beside.shape_of(TOKENS, group, back=True)
    assert (shape.beside, shape.apart, shape.text) == (32, 32, "40 160 64 back beside 32")
    (dy, wide), several, whole = beside.operands(shape, group)
    products = []
    monkeypatch.setattr(gemm, "product", lambda x, w, back: products.insert(0, x @ w))
    monkeypatch.setattr(beside.torch, "mm", lambda own, up: products.append(own @ up))
    several()
    assert dy.shape == (TOKENS, 160) and wide.stride(0) == 128
    torch.testing.assert_close(whole, dy @ wide)
    torch.testing.assert_close(whole, torch.cat(products, dim=1))

    group = group_of("dense", Layout(16, [0], [96]), outs=(96,))
    shape = beside.shape_of(TOKENS, group, back=False)
    assert (shape.beside, shape.apart, shape.text) == (16, 48, "40 96 64 forward beside 16")
    sums = []
    monkeypatch.undo()
    (y, wide, x), several, whole = beside.operands(shape, group)
    monkeypatch.setattr(beside, "add_", lambda y, x, u, b: sums.append(x.float() + y.float() + u.float() @ b.float().t()))
    several()
    assert y.stride(0) == wide.stride(0) == 128
    torch.testing.assert_close(x.float() + y.float() @ wide.float().t(), sums[0], rtol=1e-2, atol=0.1)
    torch.testing.assert_close(whole.float(), sums[0], rtol=1e-2, atol=0.1)
