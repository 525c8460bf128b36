"""A decoder layer's halves as one operator each, against the plain layers, on the CPU's twins of the kernels."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft.core.errors import ConfigError
from graft.core.recipe import Lora
from graft.model import attention
from graft.model.attention import Documents
from graft.model.base import load_base
from graft.model.blocks import fuse_blocks
from graft.model.dropout import Drop, dropped, grown
from graft.model.elementwise import adapt_and_rotate_, add_, norm, norm_backward, rotate_, swiglu, swiglu_backward
from graft.model.frozen import quantize_rows
from graft.model.fused import FusedLinear
from graft.model.lora import LoraLinear, adapter_tensors, adapters, inject
from graft.model.packed import PackedBatch, PackedLM
from graft.model.stream import load_fused

LENS = [20, 44, 36, 28]  # two bins of 64


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def base(request, tmp_path_factory):
    """A folder of a small model: Llama, Qwen2 (biases on q, k, v; tied embeddings), Qwen3 (norms on q and k)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    tied = request.param == "qwen2"
    config = AutoConfig.for_model(request.param, vocab_size=100, max_position_embeddings=256, tie_word_embeddings=tied, pad_token_id=None, **shape)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.normal_(1, 0.3)  # norms and biases that matter
    model.save_pretrained(folder)
    return request.param, folder


def batch():
    ids = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(1))
    cu = torch.tensor([0, *LENS]).cumsum(0)
    at = torch.arange(1, 128)
    at = at[~torch.isin(at, cu)]
    position = torch.cat([torch.arange(n) for n in LENS]).view(2, 64)
    return PackedBatch(ids, position, cu.int(), torch.tensor(max(LENS), dtype=torch.int32), at - 1, ids.view(-1)[at])


def with_adapters(model):
    draw = torch.Generator().manual_seed(2)
    for _, _, b in adapters(model):
        b.data.copy_(torch.randn(b.shape, generator=draw) * 0.1)
    return model


def loss_and_gradients(model):
    """(loss, {name: gradients of A and B}); fused ones all lie in one parameter."""
    loss = model(batch())
    loss.backward()
    gradients = {}
    for name, module in model.lm.named_modules():
        if isinstance(module, LoraLinear):
            gradients[name] = [module.A.grad, module.B.grad]
        if isinstance(module, FusedLinear) and module.pair():
            held = model.lm.adapters.flat
            held.data, before = held.grad, held.data
            gradients[name] = [m.clone() for m in module.pair()]
            held.data = before
    return loss.item(), gradients


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", [Lora().targets, ("q_proj", "v_proj"), ("gate_proj",), ("up_proj", "gate_proj")])
def test_loss_and_gradients_are_those_of_plain_layers(base, targets, kept):
    name, folder = base
    lora = Lora(r=4, alpha=8, targets=targets)
    plain = load_base(str(folder), None, "fp32", "cpu")
    inject(plain, lora, torch.float32, 3)
    fused = load_fused(str(folder), None, "fp32", lora, torch.device("cpu"), 3)
    fuse_blocks(fused, kept)
    attend, mlp = fused.model.layers[0].halves
    assert (attend is not None) == (name != "qwen3") and (mlp is not None) == (("gate_proj" in targets) == ("up_proj" in targets))
    wanted = loss_and_gradients(PackedLM(with_adapters(plain)))
    found = loss_and_gradients(PackedLM(with_adapters(fused), "reference"))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5) and found[1].keys() == wanted[1].keys() and found[1]
    for key, pair in wanted[1].items():
        assert all((one - other).norm() < 1e-4 * other.norm() for one, other in zip(found[1][key], pair, strict=True)), key
    assert adapter_tensors(fused).keys() == adapter_tensors(plain).keys()


class Dropped(torch.nn.Module):
    """What an adapter of a fused model drops, for a plain one."""

    def __init__(self, layer):
        super().__init__()
        self.drop, self.n = layer.group.drop, layer.group.adapted.index(layer.place)

    def forward(self, x):
        return (dropped(x.flatten(0, 1), self.drop, self.n) * grown(1.0, self.drop)).view_as(x)


@pytest.mark.parametrize("targets", [Lora().targets, ("k_proj", "o_proj", "up_proj", "gate_proj"), ("v_proj", "down_proj")])
def test_with_dropout_they_are_those_of_plain_layers_with_the_same_masks(base, targets):
    """Whatever is computed again; and the masks of a forward are drawn with torch's generator, of each adapter alone."""
    _, folder = base
    lora, found, seeds = Lora(r=4, alpha=8, dropout=0.3, targets=targets), {}, {}
    for kept in ("none", "selective", "full"):
        fused = with_adapters(load_fused(str(folder), None, "fp32", lora, torch.device("cpu"), 3))
        fuse_blocks(fused, kept)
        for layer in fused.model.layers if kept == "full" else ():
            if not all(layer.halves):  # as train/build.py has it
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        torch.manual_seed(4)
        found[kept] = loss_and_gradients(PackedLM(fused, "reference").train())
        seeds[kept] = torch.cat([group.drop.seeds for group in fused.adapters.groups]).tolist()
    assert len(set(seeds["none"])) == 2 * len(targets) and seeds["none"] == seeds["selective"] == seeds["full"]
    plain = load_base(str(folder), None, "fp32", "cpu")
    inject(plain, lora, torch.float32, 3)
    for name, module in plain.named_modules():
        if isinstance(module, LoraLinear):
            module.dropout = Dropped(fused.get_submodule(name))
    wanted = loss_and_gradients(PackedLM(with_adapters(plain)))
    for loss, gradients in found.values():
        assert loss == pytest.approx(wanted[0], rel=1e-5) and gradients.keys() == wanted[1].keys()
        for key, pair in wanted[1].items():
            assert all((one - other).norm() < 1e-4 * other.norm() for one, other in zip(gradients[key], pair, strict=True)), key


def test_every_forward_drops_anew_and_a_seed_brings_all_back(base):
    """As a step's seed, which is of its number and rank, does for its micro-batches; what is switched off is as if there were none."""
    _, folder = base
    fused, without = (
        with_adapters(load_fused(str(folder), None, "fp32", Lora(r=4, dropout=dropout), torch.device("cpu"), 3)) for dropout in (0.5, 0.0)
    )
    fuse_blocks(fused), fuse_blocks(without)
    model = PackedLM(fused, "reference").train()

    def micro_batches(seed):
        torch.manual_seed(seed)
        return [model(batch()).item() for _ in range(2)]

    first, again, other = micro_batches(7), micro_batches(7), micro_batches(8)
    assert first == again and len({*first, *other}) == 4
    wanted = PackedLM(without, "reference")(batch())
    with model.without_dropout():
        assert torch.equal(model(batch()), wanted)
    assert model(batch()) != wanted and torch.equal(model.eval()(batch()), wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_a_quantised_base_is_near_the_plain_one(base, precision):
    _, folder = base
    plain = PackedLM(load_base(str(folder), None, "fp32", "cpu"))(batch()).item()
    fused = load_fused(str(folder), None, precision, None, torch.device("cpu"), 3)
    fuse_blocks(fused)
    found = PackedLM(fused, "reference")(batch()).item()
    assert found != plain and found == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_a_quantised_base_drops_the_same(base, precision):
    _, folder = base

    def gradient(held, seed):
        fused = with_adapters(load_fused(str(folder), None, held, Lora(r=4, dropout=0.5), torch.device("cpu"), 3))
        fuse_blocks(fused)
        torch.manual_seed(seed)
        _, gradients = loss_and_gradients(PackedLM(fused, "reference").train())
        return torch.cat([m.detach().float().flatten() for pair in gradients.values() for m in pair])

    wanted = gradient("fp32", 4)
    same, other = (F.cosine_similarity(found, wanted, dim=0) for found in (gradient(precision, 4), gradient("fp32", 5)))
    assert same > 0.9 and abs(other) < 0.1


def test_adapters_wider_than_the_kernels_hold_run_through_plain_groups(base):
    _, folder = base
    fused = load_fused(str(folder), None, "fp32", Lora(r=65), torch.device("cpu"), 3)
    fuse_blocks(fused)
    assert fused.model.layers[0].halves == (None, None) and torch.isfinite(PackedLM(fused, "reference")(batch()))


def test_what_is_fused_by_half_compiles_around_it(base):
    name, folder = base
    lora = Lora(r=4) if name == "qwen3" else Lora(r=4, targets=("q_proj", "gate_proj"), dropout=0.2)
    fused = with_adapters(load_fused(str(folder), None, "fp32", lora, torch.device("cpu"), 3))
    fuse_blocks(fused)
    assert fused.model.layers[0].halves.count(None) == 1
    model = PackedLM(fused, "reference").train()
    torch.manual_seed(4)
    wanted = loss_and_gradients(model)
    fused.adapters.flat.grad = None
    for layer in fused.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=False)
    torch.manual_seed(4)
    found = loss_and_gradients(model)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert all(torch.allclose(x, y, atol=1e-6) for key, pair in wanted[1].items() for x, y in zip(found[1][key], pair, strict=True))


@pytest.mark.parametrize("adapted", [False, True])
def test_norm_and_its_gradient(adapted):
    draw = torch.Generator().manual_seed(0)
    x, dout, dn, du = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in [(9, 12), (9, 12), (9, 12), (9, 4)])
    weight, a = torch.randn(12, generator=draw, dtype=torch.float64), torch.randn(4, 12, generator=draw, dtype=torch.float64) if adapted else None
    x.requires_grad_()
    normed = F.rms_norm(x, (12,), weight, 1e-2)
    n, rstd, u = norm(x, weight, 1e-2, a, 0.5, False)
    assert torch.allclose(n, normed, atol=1e-5) and (torch.allclose(u, 0.5 * normed @ a.t(), atol=1e-5) if adapted else u.shape == (9, 0))
    (wanted,) = torch.autograd.grad(normed, x, dn + du @ a if adapted else dn)
    assert torch.allclose(norm_backward(dout, dn, du, a, u, 0.5, x, rstd, weight), dout + wanted, atol=1e-4)
    assert torch.allclose(norm_backward(None, dn, du, a, u, 0.5, x, rstd, weight), wanted, atol=1e-4)


def test_a_norm_hands_on_fp8_as_it_would_be_quantised():
    x, weight = torch.randn(9, 32).bfloat16(), torch.randn(32).bfloat16()
    (x8, scales), *_ = norm(x, weight, 1e-5, None, 1.0, True)
    wanted8, wanted_scales = quantize_rows(norm(x, weight, 1e-5, None, 1.0, False)[0])
    assert torch.equal(x8.float(), wanted8.float()) and torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_residual_with_its_adapter(adapted):
    y, x, u, b = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 3), torch.randn(8, 3) if adapted else None
    wanted = y + x + (u @ b.t() if adapted else 0)
    add_(y, x, u, b)
    assert torch.allclose(y, wanted, atol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_swiglu_and_its_gradient(dropout):
    draw = torch.Generator().manual_seed(0)
    y, u, dact, du, a = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in [(9, 24), (9, 4), (9, 12), (9, 3), (3, 12)])
    b = [torch.randn(12, 2, generator=draw, dtype=torch.float64) for _ in range(2)]
    b = [m.requires_grad_() for m in b]
    whole = y + torch.cat([u[:, :2] @ b[0].t(), u[:, 2:] @ b[1].t()], dim=1)
    gate, up = whole.chunk(2, dim=1)
    act = F.silu(gate) * up
    drop = Drop(torch.tensor([5]), 30_000) if dropout else None
    with torch.no_grad():
        found, down = swiglu(y, u, b, a, 0.5, drop)
    assert torch.allclose(found, act, atol=1e-5) and torch.allclose(down, 0.5 * (act if drop is None else dropped(act, drop, 0)) @ a.t(), atol=1e-5)
    assert swiglu(y, u, b)[1].shape == (9, 0)
    through, taken = (du @ a, act) if drop is None else (dropped(du @ a, drop, 0), dropped(act, drop, 0))
    wanted = *torch.autograd.grad(act, (whole, *b), dact + through), du.t() @ taken
    of_b, of_a = (torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((2, 12, 2), (3, 12)))
    with torch.no_grad():
        dy = swiglu_backward(dact, y, u, b, du, a, of_b, of_a, drop)
        alone = swiglu_backward(dact, y, u, [], du, None, None, None)
    assert all(torch.allclose(x, w, atol=1e-4) for x, w in zip((dy, *of_b, of_a), wanted, strict=True))
    gate, up = (m.requires_grad_() for m in y.chunk(2, dim=1))
    assert torch.allclose(alone, torch.cat(torch.autograd.grad(F.silu(gate) * up, (gate, up), dact), dim=1), atol=1e-4)


@pytest.mark.parametrize("adapted", ["qkv", "qv", "k"])
def test_adapters_are_added_before_the_turn(adapted):
    draw = torch.Generator().manual_seed(0)
    y, u = torch.randn(5, 4 * 8, generator=draw), torch.randn(5, 3 * len(adapted), generator=draw)
    angle = torch.rand(5, 4, generator=draw).repeat(1, 2)
    b = {name: torch.randn(heads * 8, 3, generator=draw) for name, heads in (("q", 2), ("k", 1), ("v", 1)) if name in adapted}
    wanted = y.clone()
    for n, name in enumerate(adapted):
        start = {"q": 0, "k": 16, "v": 24}[name]
        wanted[:, start : start + len(b[name])] += u[:, 3 * n : 3 * n + 3] @ b[name].t()
    rotate_(wanted, 3, angle.cos(), angle.sin(), 1.0)
    adapt_and_rotate_(y, u, [b.get(name) for name in "qkv"], 2, 1, angle.cos(), angle.sin())
    assert torch.allclose(y, wanted, atol=1e-5)


def test_turning_back_undoes_a_turn_and_turns_only_the_first_heads():
    y = torch.randn(5, 3 * 8)
    angle = torch.rand(5, 4).repeat(1, 2)
    turned = y.clone()
    rotate_(turned, 2, angle.cos(), angle.sin(), 1.0)
    assert torch.equal(turned[:, 16:], y[:, 16:]) and not torch.allclose(turned[:, :16], y[:, :16])
    rotate_(turned, 2, angle.cos(), angle.sin(), -1.0)
    assert torch.allclose(turned, y, atol=1e-6)


def test_attentions_plain_gradient_is_that_of_autograd():
    documents = Documents(torch.tensor([0, 5, 6, 17], dtype=torch.int32), torch.tensor(11, dtype=torch.int32))
    q, k, v, dout = (torch.randn(17, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2, 4))
    out = attention.reference(q, k, v, documents, 0.3)
    wanted = torch.autograd.grad(out, (q, k, v), dout)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    given = dout.detach(), q.detach(), k.detach(), v.detach(), out.detach(), q.new_empty(0)
    attention.backward(grads, *given, *documents, 0.3, "reference")
    assert all(torch.allclose(found, one) for found, one in zip(grads, wanted, strict=True))
    through = attention.attention(q, k, v, documents, 0.3, "reference")
    assert all(torch.allclose(*pair) for pair in zip(torch.autograd.grad(through, (q, k, v), dout), wanted, strict=True))


def test_a_backend_that_is_named_must_be_one(monkeypatch):
    monkeypatch.setenv("GRAFT_ATTENTION", "flash9")
    with pytest.raises(ConfigError, match="'flash9' is none of fa4, cudnn, flash, reference"):
        attention.fastest(4, 2, 16, torch.device("cpu"))
    monkeypatch.delenv("GRAFT_ATTENTION")
    assert attention.fastest(4, 2, 16, torch.device("cpu")) == "reference"
