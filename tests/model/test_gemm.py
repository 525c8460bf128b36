"""The choice among cuBLASLt's algorithms and QuACK's kernels, and, on a GPU, what they compute."""

import json
from types import SimpleNamespace

import pytest
import torch

from graft.model import beside, gemm
from graft.model.frozen import Frozen, fp8_works, quantize_rows
from graft.model.fused import Layout
from graft.model.kernels import cublaslt, quack

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = 1024, 768, 512  # rows, outs, ins


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gemm, "_chosen", {})
    return tmp_path / "graft" / "matmuls.json"


def operands(device="cpu"):
    draw = torch.Generator().manual_seed(0)
    rows, outs, ins = SHAPE
    return tuple(torch.randn(*shape, generator=draw).to(torch.bfloat16).to(device) for shape in ((rows, ins), (rows, outs), (outs, ins)))


def test_what_is_not_chosen_is_pytorchs():
    x, dy, w = operands()
    into = torch.empty(SHAPE[0], SHAPE[2], dtype=torch.bfloat16)
    assert torch.equal(gemm.product(x, w), x @ w.t()) and torch.equal(gemm.product(dy, w, back=True), dy @ w)
    assert gemm.product(dy, w, back=True, out=into) is into and torch.equal(into, dy @ w)


def test_a_chosen_algorithm_runs_on_what_it_was_timed_on_alone(monkeypatch):
    x, _, w = operands()
    ran = []
    monkeypatch.setattr(gemm, "ALIGNED_BYTES", 64)  # as memory of the CPU is
    monkeypatch.setattr(gemm, "_chosen", {gemm.Shape(*SHAPE, False): lambda x, w, out: ran.append(out.shape)})
    gemm.product(x, w)
    assert ran == [(SHAPE[0], SHAPE[1])]
    for one, other in ((x[:-1], w), (x.float(), w.float()), (x.t().contiguous().t(), w), (torch.cat([x, x], dim=1)[:, : SHAPE[2]], w)):
        assert torch.equal(gemm.product(one, other), one @ other.t())
    shifted = torch.empty(x.numel() + 8, dtype=x.dtype)[8:].view_as(x).copy_(x)
    assert torch.equal(gemm.product(shifted, w), x @ w.t()), "not aligned"
    assert len(ran) == 1


def test_it_runs_on_weights_whose_rows_lie_apart_as_it_was_chosen_to(monkeypatch):
    x, _, w = operands()
    ran = []
    monkeypatch.setattr(gemm, "ALIGNED_BYTES", 64)
    monkeypatch.setattr(gemm, "_chosen", {gemm.Shape(*SHAPE, apart=64): lambda x, w, out: ran.append(w.stride(0))})
    apart = torch.cat([w, w.new_zeros(len(w), 64)], dim=1)[:, : SHAPE[2]]
    gemm.product(x, apart)
    assert ran == [SHAPE[2] + 64]
    other = torch.cat([w, w.new_zeros(len(w), 32)], dim=1)[:, : SHAPE[2]]
    assert torch.equal(gemm.product(x, w), x @ w.t()) and torch.equal(gemm.product(x, other), x @ w.t()) and len(ran) == 1


def test_the_fastest_wins_where_it_is_ahead():
    assert gemm.finalists([5.0, 1.0, 9.0, 3.0, 2.0, 2.5]) == [0, 2, 3, 5, 4], "PyTorch's own is always among them"
    assert gemm.finalists([5.0]) == [0]
    assert gemm.winner([100.0, 100.4, 99.0]) == 0 and gemm.winner([100.0, 100.6, 101.0]) == 2 and gemm.winner([100.0]) == 0


def test_an_algorithm_is_stored_in_hexadecimal():
    kept = bytes(range(64))
    assert cublaslt.stored(kept.hex()).text == kept.hex()
    assert [cublaslt.stored(text) for text in (None, "", "xy", "00ff", "00" * 63, "00" * 65)] == [None] * 6


def test_tiles_are_stored_in_words():
    assert [quack.stored(tiles.text) for tiles in quack.FASTEST] == quack.FASTEST
    assert quack.FASTEST[1].text == "quack 256x192 1x2 swapped"
    assert [quack.stored(text) for text in (None, "", "00" * 64, "quack 256x192", "quack 256x192 1x2 twice")] == [None] * 5


def test_tiles_are_offered_where_they_run(monkeypatch):
    monkeypatch.setattr(quack, "installed", lambda: None)
    assert quack.Product(*SHAPE, False).suggested() == [] and quack.Product(*SHAPE, False).taken(quack.FASTEST[0].text) is None, "another GPU"
    monkeypatch.setattr(quack, "installed", lambda: "0.6.5")
    assert quack.Product(*SHAPE, False).suggested() == quack.FASTEST
    for shape in ((1028, 768, 512), (1024, 770, 512), (1024, 768, 500)):
        assert quack.Product(*shape, True).suggested() == [] and quack.Product(*shape, True).taken(quack.FASTEST[0].text) is None, "rows out of step"


@ON_GPU
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_every_algorithm_multiplies_and_the_choice_is_remembered(cache, monkeypatch, kind):
    x, dy, w = operands("cuda")
    held = Frozen(kind, [SHAPE[1]], SHAPE[2], False, torch.bfloat16, "cuda")
    held.put(0, w)
    w = held.opened()
    for back, given, wanted in ((False, x, x @ w.t()), (True, dy, dy @ w)):
        for library in (cublaslt, quack):
            product = library.Product(*SHAPE, back)
            suggested = product.suggested()
            assert all(product.taken(algorithm.text).text == algorithm.text for algorithm in suggested)
            assert suggested or (library is quack and not quack.installed())
            for algorithm in suggested:
                for _ in range(2):
                    out = torch.full_like(wanted, torch.nan)
                    product.run(algorithm, given, w, out)
                    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=0.5)

    monkeypatch.setattr(gemm, "ROUNDS_S", (0.01, 0.01))
    both = {gemm.Shape(*SHAPE): lambda: (x, w), gemm.Shape(*SHAPE, back=True): lambda: (dy, w)}
    assert gemm.choose(both, measure=False) is None and not cache.exists()
    assert "matmuls of 2 shapes tuned" in gemm.choose(both, measure=True)
    known = json.loads(cache.read_text())
    assert len(known) == 2 and len(gemm._chosen) == sum(v is not None for v in known.values())
    for kept in [cublaslt.Product(*SHAPE, True).suggested()[-1].text, *([quack.FASTEST[-1].text] if quack.installed() else [])]:
        cache.write_text(json.dumps({key: kept if "back" in key else "00" * 64 for key in known}))
        gemm._chosen.clear()
        assert gemm.choose(dict.fromkeys(both, lambda: pytest.fail("measured again")), measure=True) is None
        assert list(gemm._chosen) == [gemm.Shape(*SHAPE, True)], "what the library does not take is left to PyTorch"
        torch.testing.assert_close(gemm.product(dy, w, back=True), dy @ w, rtol=2e-2, atol=0.5)
        torch.testing.assert_close(gemm.product(x, w), x @ w.t(), rtol=0, atol=0)


@ON_GPU
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("back", [True, False], ids=["back", "forward"])
def test_what_lies_beside_is_multiplied_too_and_the_rest_goes_on(cache, monkeypatch, kind, back):
    if not quack.installed():
        pytest.skip("needs QuACK on Hopper")
    x, dy, w = operands("cuda")
    layout = Layout(16, [0, 512], [512, 256]) if back else Layout(16, [0], [768])
    held = Frozen(kind, layout.sizes, SHAPE[2], False, torch.bfloat16, "cuda")
    for layer, own in enumerate(w.split(layout.sizes)):
        held.put(layer, own)
    group, columns = SimpleNamespace(frozen=held, layout=layout), 16 * len(layout.sizes)
    adapter = torch.randn(columns * SHAPE[2] + 16 * SHAPE[1], device="cuda", dtype=torch.bfloat16)
    w, (_, b) = held.opened().clone(), layout.split(adapter, SHAPE[2])
    u = torch.randn(SHAPE[0], 16, device="cuda", dtype=torch.bfloat16)
    y = gemm.roomy(x, SHAPE[2], 64).copy_(x)
    gemm.widened(y, 16)[:, SHAPE[2] :] = u
    shape = beside.shape_of(SHAPE[0], group, back)
    monkeypatch.setattr(gemm, "ROUNDS_S", (0.01, 0.01))
    assert "matmuls of 1 shapes tuned" in gemm.choose({shape: lambda: beside.operands(shape, group)}, measure=True)
    (key,) = json.loads(cache.read_text())
    beside.make_room(group)
    beside.Standing(SimpleNamespace(groups=[group], sizes=[len(adapter)], flat=adapter))()
    close = {"rtol": 2e-2, "atol": 0.5}
    for tiles in quack.FASTEST:
        cache.write_text(json.dumps({key: tiles.text}))
        assert gemm.choose({shape: lambda: pytest.fail("measured again")}, measure=True) is None
        for _ in range(2):
            if back:
                dx, du = beside.back(dy, group, adapter)
                torch.testing.assert_close(dx, dy @ w, **close)
                torch.testing.assert_close(du, torch.cat([dy[:, :512] @ b[0], dy[:, 512:] @ b[1]], dim=1), **close)
            else:
                torch.testing.assert_close(beside.add(dy, y, group, adapter), dy + x @ w.t() + u @ b[0].t(), **close)
    if kind == "nf4":
        return
    for library in (cublaslt, quack):
        for way, given, wanted in ((False, x, x @ w.t()), (True, dy, dy @ w)):
            alone = library.Product(*SHAPE, way, 64)
            for algorithm in alone.suggested():
                assert alone.taken(algorithm.text)
                out = torch.full_like(wanted, torch.nan)
                alone.run(algorithm, given, held.opened(), out)
                torch.testing.assert_close(out, wanted, **close)


@ON_GPU
def test_a_kernel_that_does_not_compile_is_left_out(cache, monkeypatch):
    if not quack.installed():
        pytest.skip("needs QuACK on Hopper")
    broken = quack.Tiles(100, 17, (1, 1), False)
    monkeypatch.setattr(quack, "FASTEST", [broken])
    monkeypatch.setattr(gemm, "ROUNDS_S", (0.01, 0.01))
    assert quack.Product(*SHAPE, False).taken(broken.text) is None
    x, _, w = operands("cuda")
    assert "tuned" in gemm.choose({gemm.Shape(*SHAPE): lambda: (x, w)}, measure=True)
    assert broken.text not in json.loads(cache.read_text()).values()


@ON_GPU
def test_fp8_is_multiplied_by_every_algorithm_and_the_choice_is_remembered(cache, monkeypatch):
    if not fp8_works("cuda"):
        pytest.skip("a GPU without FP8")
    x, _, w = operands("cuda")
    (x8, x_scales), (w8, w_scales) = quantize_rows(x), quantize_rows(w)
    given = x8, x_scales, w8, w_scales.t()
    wanted, close = gemm.scaled_product(*given), {"rtol": 2e-2, "atol": 0.5}
    torch.testing.assert_close(wanted.float(), (x8.float() * x_scales) @ (w8.float() * w_scales).t(), **close)
    library = cublaslt.ScaledProduct(*SHAPE)
    suggested = library.suggested()
    assert suggested and all(library.taken(algorithm.text) for algorithm in suggested)
    for algorithm in suggested:
        out = torch.full_like(wanted, torch.nan)
        library.run(algorithm, *given, out)
        torch.testing.assert_close(out, wanted, **close)
    monkeypatch.setattr(gemm, "ROUNDS_S", (0.01, 0.01))
    shape = gemm.Shape(*SHAPE, fp8=True)
    assert "matmuls of 1 shapes tuned" in gemm.choose({shape: lambda: given}, measure=True)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: suggested[-1].text}))
    assert gemm.choose({shape: lambda: pytest.fail("measured again")}, measure=True) is None and list(gemm._chosen) == [shape]
    torch.testing.assert_close(gemm.scaled_product(*given), wanted, **close)
