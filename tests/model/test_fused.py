"""Fused layers against plain ones in fp64, whatever holds the frozen weights, and their adapters against PEFT."""

import pytest
import torch
from torch import library

from graft.model.dropout import Drop, grown, kept, threshold_of
from graft.model.frozen import FP8, Frozen, matmul, matmul_back, quantize_rows
from graft.model.fused import Layout, lora_forward

KINDS = ["dense", "fp8", "nf4"]


def frozen_of(kind, weights, bias=None, dtype=torch.bfloat16):
    held = Frozen(kind, [len(w) for w in weights], weights[0].shape[1], bias is not None, dtype, "cpu")
    for n, weight in enumerate(weights):
        held.put(n, weight, None if bias is None else bias[n])
    return held


def of_bits(held):
    """W as it is held, in fp64."""
    if held.kind == "dense":
        return held.tensors[0].double()
    if held.kind == "fp8":
        return held.tensors[0].double() * held.tensors[1].double()
    return matmul_back(torch.eye(sum(held.outs), dtype=held.dtype), held.kind, held.tensors).double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_matmuls_are_those_of_the_weights_as_they_are_held(kind):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(out, 128, generator=draw).bfloat16() for out in (64, 32, 32)]
    bias = [torch.randn(len(w), generator=draw).bfloat16() for w in weights]
    held = frozen_of(kind, weights, bias)
    w = of_bits(held)
    near = {"dense": 0, "fp8": 0.04, "nf4": 0.1}[kind]
    assert (w - torch.cat(weights).double()).norm() <= near * w.norm()
    x, dy = torch.randn(50, 128, generator=draw).bfloat16(), torch.randn(50, 128, generator=draw).bfloat16()
    error = 0.04 if kind == "fp8" else 0.005  # of x and dy in FP8, or of a result in bf16
    y, dx = matmul(x, kind, held.tensors, held.bias).double(), matmul_back(dy, kind, held.tensors).double()
    wanted_y, wanted_dx = x.double() @ w.t() + torch.cat(bias).double(), dy.double() @ w
    assert (y - wanted_y).norm() < error * wanted_y.norm() and (dx - wanted_dx).norm() < error * wanted_dx.norm()


def test_rows_in_fp8_use_the_whole_range_and_zeros_stay():
    x = torch.randn(20, 64) * torch.logspace(-6, 6, 20)[:, None]
    x[3] = 0
    x8, scales = quantize_rows(x)
    assert x8.dtype == FP8 and (x8.float().abs().amax(dim=1)[torch.arange(20) != 3] == 448).all() and not x8[3].float().any()
    assert torch.allclose(x8.float() * scales, x, rtol=0.0626, atol=0) or ((x8.float() * scales - x).abs() <= scales * 2**-9 + 0.0625 * x.abs()).all()
    by_column, _ = quantize_rows(x, torch.full((64, 1), 2.0))
    assert torch.equal(by_column.float(), x8.float())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_in_fp64(kind, dropout):
    draw = torch.Generator().manual_seed(1)
    dtype = torch.float32 if kind == "dense" else torch.bfloat16
    held = frozen_of(kind, [torch.randn(out, 128, generator=draw).to(dtype) for out in (64, 64)], dtype=dtype)
    x = torch.randn(30, 128, generator=draw).to(dtype).requires_grad_()
    adapter = torch.cat([torch.randn(4 * 2 * 128, generator=draw) / 8, torch.randn(128 * 4, generator=draw)]).to(dtype).requires_grad_()
    drop = Drop(torch.tensor([5, 6]), threshold_of(dropout)) if dropout else None
    y, _ = lora_forward(x, kind, held.tensors, None, adapter, 4, [0, 64], [64, 64], 128, 0.5, *(drop or (None, 0)))
    dy = torch.randn(30, 128, generator=draw).to(dtype)
    found = [y, *torch.autograd.grad(y, (x, adapter), dy)]

    x64, adapter64 = (t.detach().double().requires_grad_() for t in (x, adapter))
    a64, b64 = Layout(4, [0, 64], [64, 64]).split(adapter64, 128)
    q64, k64 = (x64 * kept(seed, drop.threshold, 30, 128) for seed in drop.seeds) if drop else (x64, x64)
    added = torch.cat([q64 @ a64[:4].t() @ b64[0].t(), k64 @ a64[4:].t() @ b64[1].t()], dim=1)
    y64 = x64 @ of_bits(held).t() + grown(0.5, drop) * added
    wanted = [y64, *torch.autograd.grad(y64, (x64, adapter64), dy.double())]
    error = {"dense": 1e-6, "fp8": 0.04, "nf4": 0.01}[kind]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and (one.double() - other).norm() < error * other.norm()


def test_the_operators_are_as_they_say():
    x, adapter = torch.randn(6, 8, requires_grad=True), torch.randn(2 * 2 * 8 + 2 * 8 * 2, requires_grad=True)
    library.opcheck(
        lora_forward, (x, "dense", [torch.randn(16, 8)], torch.randn(16), adapter, 2, [0, 8], [8, 8], 16, 2.0, torch.tensor([5, 6]), 9000)
    )
    library.opcheck(lora_forward, (x, "dense", [torch.randn(16, 8)], None, None, 0, [0], [0], 16, 1.0, None, 0))
