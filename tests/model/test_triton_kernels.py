"""Every kernel on the GPU against its twin on the CPU, which other tests hold against autograd in fp64.

Without a GPU: `pip install triton`, `TRITON_INTERPRET=1 pytest tests/model/test_triton_kernels.py` runs all but FP8.
"""

import os

import pytest
import torch

from graft.model import dropout, elementwise, frozen
from graft.model import loss as head
from graft.model.gemm import widened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs a GPU, or Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from graft.model.kernels import dropout as dropping  # noqa: E402  they import triton
from graft.model.kernels import fp8, loss, nf4, norm, rotary, shared, sums, swiglu  # noqa: E402

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def drawn(*shape, scale=1.0, seed=0):
    """(on the device, the same numbers on the CPU)."""
    on_cpu = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DTYPE)
    return on_cpu.to(DEVICE, copy=True), on_cpu


def drops(adapters, rate, seed=9):
    """(on the device, the same on the CPU)."""
    on_cpu = dropout.Drop(torch.randint(2**63 - 1, (adapters,), generator=torch.Generator().manual_seed(seed)), dropout.threshold_of(rate))
    return on_cpu._replace(seeds=on_cpu.seeds.to(DEVICE)), on_cpu


def apart(x):
    """The same numbers with room between rows, full of what no kernel may read."""
    held = torch.full((x.shape[0], x.shape[1] + 64), torch.nan, dtype=x.dtype, device=x.device)
    return held[:, : x.shape[1]].copy_(x)


def near(found, wanted, tolerance=1e-2):
    found, wanted = found.float().cpu(), wanted.float()
    assert found.shape == wanted.shape and (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    ("t", "n", "r", "r_down", "rate"),
    [
        *[(2050, 384, 16, 16, 0), (70, 130, 8, 4, 0), (70, 130, 8, 4, 0.3), (300, 256, 0, 16, 0), (300, 256, 16, 0, 0), (64, 128, 64, 32, 0.05)],
        (256, 300, 16, 16, 0),
    ],
)
@pytest.mark.parametrize("programs", [4, swiglu.PROGRAMS])  # of few each has many columns
def test_swiglu_and_its_gradient(monkeypatch, t, n, r, r_down, rate, programs):
    monkeypatch.setattr(swiglu, "PROGRAMS", programs)
    (y, y_), (dact, dact_) = drawn(t, 2 * n, seed=1), drawn(t, n, seed=2)
    (u, u_), (du, du_) = drawn(t, 2 * r, seed=3), drawn(t, r_down, seed=4)
    b, b_ = map(list, zip(*(drawn(n, r, scale=0.2, seed=5 + i) for i in range(2)), strict=True)) if r else ([], [])
    a, a_ = drawn(r_down, n, scale=0.2, seed=7) if r_down else (None, None)
    drop, drop_ = drops(1, rate) if rate else (None, None)
    near(swiglu.swiglu(y, y, [])[0], elementwise.swiglu(y_, y_, [])[0])
    act, down = swiglu.swiglu(y, u, b, a, 0.5, drop, room=64)
    for one, other in zip((act, down), elementwise.swiglu(y_, u_, b_, a_, 0.5, drop_), strict=True):
        near(one, other)
    assert act.stride() == (n + 64, 1) and torch.equal(widened(act, r_down)[:, n:], down)
    assert torch.equal(act, swiglu.swiglu(y, u, b, a, 0.5, drop)[0])

    def gradients(of, device, *given):
        into = [torch.full(shape, torch.nan, dtype=DTYPE, device=device) if used else None for shape, used in (((2, n, r), r), ((r_down, n), r_down))]
        return [of(*given[:-1], *into, given[-1]), *into]

    found, again = (gradients(swiglu.swiglu_backward, DEVICE, apart(dact), y, u, b, du, a, drop) for _ in range(2))
    wanted = gradients(elementwise.swiglu_backward, "cpu", dact_, y_, u_, b_, du_, a_, drop_)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            near(one, other)
    assert all(torch.equal(x, z) for x, z in zip(found, again, strict=True) if x is not None), "twice the same"


@pytest.mark.parametrize(("p", "m", "n"), [(1, 3, 1), (5, 70, 16), (16, 100, 40), (130, 33, 64)])
def test_parts_are_added_up_to_wherever_they_go(p, m, n):
    parts = torch.randn(p, m, n, generator=torch.Generator().manual_seed(0))
    wanted, parts = parts.double().sum(0), parts.to(DEVICE)
    out, also = apart(torch.zeros(m, n, dtype=DTYPE, device=DEVICE)), torch.zeros(n, m, dtype=DTYPE, device=DEVICE)
    sums.add_up(parts, out, also.t())
    near(out, wanted)
    assert torch.equal(also.t(), out)
    alone = torch.zeros_like(also)
    sums.add_up(parts, alone.t())
    assert torch.equal(alone, also)


def test_matrices_are_copied_to_where_each_belongs():
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    held = [torch.zeros(rows, columns, dtype=DTYPE, device=DEVICE) for rows, columns in ((200, 70), (120, 3), (5, 9))]
    places = [(held[0][:, 64:67], 10), (held[1], 610), (held[2][1:4, 2:5], 991)]
    table = torch.tensor([(to.data_ptr(), to.stride(0), at, len(to)) for to, at in places]).to(DEVICE)
    sums.place(flat, table, places[0][0], 200)
    for (to, at), whole in zip(places, held, strict=True):
        assert torch.equal(to, flat[at : at + to.numel()].view_as(to)) and whole.count_nonzero() == to.count_nonzero()


@pytest.mark.parametrize("r", [1, 32, 48, 200])
def test_the_gradient_of_what_an_adapter_gives(r):
    (raw, raw_), (rstd, rstd_) = drawn(77, r, seed=1), drawn(77, seed=2)
    found = norm.of_norm(apart(raw), 0.5, rstd.float(), DTYPE)
    for one, other in zip(found, elementwise.of_norm(raw_.to(DTYPE), 0.5, rstd_.float(), DTYPE), strict=True):
        near(one, other)


def test_swiglu_of_gates_near_and_far_each_by_itself():
    gate = torch.cat([torch.linspace(-43, 43, 500), torch.tensor([-1e4, -100.0, -44.5, 0.0, 44.5, 100.0, 1e4])]).to(DTYPE)[None]
    y, wide, ones = torch.cat([gate, torch.ones_like(gate)], dim=1).to(DEVICE), gate.double(), torch.ones_like(gate).to(DEVICE)
    s = torch.sigmoid(wide)
    wanted = wide * s, s * (1 + wide * (1 - s))  # the activation, and what flows back to the gate; to the other half the activation flows
    act, dy = swiglu.swiglu(y, y, [])[0], swiglu.swiglu_backward(ones, y, y, [], ones, None, None, None)
    n = gate.shape[1]
    for found, one in zip((act, dy[:, n:], dy[:, :n]), (wanted[0], *wanted), strict=True):
        torch.testing.assert_close(found.cpu().double(), one, rtol=1e-2, atol=1e-17)


@pytest.mark.parametrize(("t", "h"), [(1, 8), (70, 130), (33, 1100)])
def test_what_is_dropped_is_the_same_bits(t, h):
    (x, x_), (drop, drop_) = drawn(t, h), drops(3, 0.2)
    for n in range(3):
        found = dropout.dropped(x_, drop_, n)
        assert torch.equal(dropping.dropped(x, drop.seeds[n], drop.threshold).cpu(), found) and (t == 1 or (found == 0).any())
    wide, wide_ = drawn(t, 3 * h)
    apart = dropping.dropped(wide[:, h : 2 * h], drop.seeds[0], drop.threshold)
    assert torch.equal(apart.cpu(), dropout.dropped(wide_[:, h : 2 * h], drop_, 0)), "rows that lie apart"


@pytest.mark.parametrize(("t", "h", "r", "adapters"), [(70, 130, 4, 3), (130, 256, 64, 2), (40, 96, 100, 1)])
def test_what_is_dropped_has_no_gradient(t, h, r, adapters):
    (dx, dx_), (du, du_), (a, a_), (drop, drop_) = drawn(t, h), drawn(t, adapters * r, seed=1), drawn(adapters * r, h, seed=2), drops(adapters, 0.4)
    distant = apart(dx)
    dropout.add_back_(dx_, du_, a_, drop_)
    for one in (dx, distant):
        dropping.add_back_(one, du, a, drop.seeds, drop.threshold)
        near(one, dx_)


@pytest.mark.parametrize("adapted", ["qkv", "qv", "k", "v"])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "r"), [(8, 2, 128, 16), (4, 4, 64, 8)])
def test_adapters_and_rotary_embedding(adapted, heads, kv_heads, width, r):
    (y, y_), (u, u_) = drawn(200, (heads + 2 * kv_heads) * width), drawn(200, len(adapted) * r, seed=1)
    angle = torch.rand(200, width // 2, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    b = [
        drawn(h * width, r, scale=0.2, seed=3 + h) if name in adapted else (None, None)
        for name, h in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    ]
    rotary.adapt_and_rotate_(y, u, [m for m, _ in b], heads, kv_heads, cos.to(DEVICE), sin.to(DEVICE))
    elementwise.adapt_and_rotate_(y_, u_, [m for _, m in b], heads, kv_heads, cos, sin)
    near(y, y_)
    rotary.rotate_(y, heads + kv_heads, cos.to(DEVICE), sin.to(DEVICE), -1.0)
    elementwise.rotate_(y_, heads + kv_heads, cos, sin, -1.0)
    near(y, y_)


def test_a_towers_angles_turn_heads_that_are_no_power_of_two_wide():
    y, y_ = drawn(130, 3 * 16 * 80)
    angle = torch.rand(130, 40, generator=torch.Generator().manual_seed(2)).repeat(1, 2)  # in fp32
    rotary.rotate_(y, 2 * 16, angle.cos().to(DEVICE), angle.sin().to(DEVICE), 1.0)
    elementwise.rotate_(y_, 2 * 16, angle.cos(), angle.sin(), 1.0)
    near(y, y_)


@pytest.mark.parametrize("columns", [4096, 28_672])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_to_fp8(scaled, columns):
    if DEVICE == "cpu":
        pytest.skip("the interpreter rounds to FP8 in another way")
    x, x_ = drawn(300, columns, scale=3.0)
    factors = torch.rand(columns, generator=torch.Generator().manual_seed(1)) if scaled else None
    found, scales = fp8.quantize_rows(x, None if factors is None else factors.to(DEVICE))
    wanted, scales_ = frozen.quantize_rows(x_, factors)
    assert torch.allclose(scales.cpu(), scales_, rtol=1e-6)
    assert (found.cpu().float() != wanted.float()).float().mean() < 0.005, "a rounding here and there"


def test_transpose():
    x = torch.randint(0, 255, (300, 450), dtype=torch.uint8)
    assert torch.equal(fp8.transposed(x.to(DEVICE)).cpu(), x.t())


@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (200, 4096), (70, 1088)])
@pytest.mark.parametrize("dtype", {torch.float32, DTYPE})  # the interpreter rounds to bf16 in its own way
def test_nf4_is_opened_as_bitsandbytes_opens_it(rows, columns, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(DTYPE)
    held = frozen.Frozen("nf4", [rows], columns, False, DTYPE, DEVICE)
    held.put(0, weight)
    found = torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE)
    nf4.open_(found, held.tensors, frozen.NF4_BLOCK, frozen.NF4_STATE_BLOCK)
    assert torch.equal(found, frozen.opened_by_bitsandbytes(held.tensors, found.shape, dtype)) and found.isfinite().all()
    distant = apart(torch.zeros_like(found))
    nf4.open_(distant, held.tensors, frozen.NF4_BLOCK, frozen.NF4_STATE_BLOCK)
    assert torch.equal(distant, found) and distant.as_strided((rows, columns + 64), distant.stride())[:, columns:].isnan().all()


@pytest.mark.parametrize(("t", "h", "r"), [(200, 4096, 96), (50, 520, 48), (70, 130, 0), (33, 3584, 16), (33, 1280, 0), (64, 640, 192)])
def test_norm_and_its_gradient(t, h, r):
    """Where three adapters drop, what flows back through them is in dn already."""
    (x, x_), (weight, weight_) = drawn(t, h), drawn(h, seed=1)
    a, a_ = drawn(r, h, scale=0.1, seed=2) if r else (None, None)
    drop, drop_ = drops(3, 0.3) if r == 48 else (None, None)
    found, wanted = norm.norm(x, weight, 1e-5, a, 2.0, False, drop), elementwise.norm(x_, weight_, 1e-5, a_, 2.0, False, drop_)
    for one, other in zip(found, wanted, strict=True):
        near(one, other)
    a, a_ = (a, a_) if drop is None else (None, None)
    (dout, dout_), (dn, dn_), (du, du_) = drawn(t, h, seed=3), drawn(t, h, seed=4), drawn(t, r, seed=5)
    for past, past_ in ((dout, dout_), (None, None)):
        for one in (dn, apart(dn)):
            dx = norm.norm_backward(past, one, du, a, found[2], 2.0, x, found[1], weight)
            near(dx, elementwise.norm_backward(past_, dn_, du_, a_, wanted[2], 2.0, x_, wanted[1], weight_))


def test_fewer_loads_ahead_where_the_gpu_is_small(monkeypatch):
    monkeypatch.setattr(shared, "_fitted", {})
    asked = []

    def launch(ahead):
        asked.append(ahead)
        if ahead > room:
            raise OutOfResources(ahead, room, "shared memory")

    for case in ((2, [3, 2]), (2, [2]), (1, [2, 1])):
        room, wanted = case
        asked.clear()
        shared.loading_ahead(3, launch, "kernel", 64)
        assert asked == wanted
    room = 0
    with pytest.raises(OutOfResources):
        shared.loading_ahead(3, launch, "kernel", 256)


def test_a_norm_hands_on_fp8():
    if DEVICE == "cpu":
        pytest.skip("the interpreter rounds to FP8 in another way")
    (x, x_), (weight, weight_), (a, a_) = drawn(300, 4096, scale=3.0), drawn(4096, seed=1), drawn(48, 4096, scale=0.1, seed=2)
    (found, scales), rstd, u = norm.norm(x, weight, 1e-5, a, 2.0, True)
    (wanted, scales_), rstd_, u_ = elementwise.norm(x_, weight_, 1e-5, a_, 2.0, True)
    near(scales, scales_), near(rstd, rstd_), near(u, u_)
    near(found.float() * scales, wanted.float() * scales_)


@pytest.mark.parametrize(("t", "h", "r"), [(200, 4096, 16), (70, 130, 0), (33, 96, 64)])
def test_a_residual_with_its_adapter(t, h, r):
    (y, y_), (x, x_), (u, u_) = drawn(t, h), drawn(t, h, seed=1), drawn(t, r, seed=2)
    b, b_ = drawn(h, r, scale=0.2, seed=3) if r else (None, None)
    norm.add_(y, x, u, b)
    elementwise.add_(y_, x_, u_, b_)
    near(y, y_)


@pytest.mark.parametrize("vocabulary", [50, 8192, 20_000])
def test_the_loss_and_its_gradient_in_the_logits_place(vocabulary):
    logits, logits_ = drawn(30, vocabulary, scale=3.0)
    targets = torch.randint(0, vocabulary, (30,), generator=torch.Generator().manual_seed(1))
    near(loss.cross_entropy_(logits, targets.to(DEVICE)), head.cross_entropy_(logits_, targets), 1e-4)
    near(logits, logits_)
