"""Large matmuls with frozen weights, by the algorithm that is fastest while the GPU is held at its power limit.

cuBLAS suggests several algorithms a shape, and PyTorch takes the first; QuACK has kernels of other tiles. Which of them is the fastest
changes when the GPU is at its limit, as training is: what moves less data between registers, shared memory and L2 lets the clock rise.
On an H200 at its 700 W the best is 3 to 6 % ahead of PyTorch's at the shapes of Llama-3.1-8B, in bf16 (benchmarks/RESULTS.md). choose()
times each for long enough that the limit counts, and remembers the answer on the machine; what it has not chosen is PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.model.remembered import recalled, remember

ROUNDS_S = (0.1, 0.15, 0.15, 0.15)  # how long each runs at a time; after the first round only the FINALISTS do
FINALISTS = 4
ALIGNED_BYTES = 256  # where cuBLAS takes every matrix to begin
WARM_S = 1.5  # before the first, for the clock to fall
MEMORY = "matmuls"
LEAST_GAIN = 0.005  # of PyTorch's pace: below it PyTorch's stays
WRONG = 1e-2  # relative: two orders of adding up differ by bf16's rounding, 2e-3


class Shape(NamedTuple):
    """Of x wᵀ, x [rows, ins] and w [outs, ins]; back: of x w, x [rows, outs]. fp8: of x wᵀ, both in e4m3 with a scale a row.

    beside: with so many more columns that lie beside w in memory (beside.py): back, of x w and theirs; else of x wᵀ to which theirs, with the
    same beside x, and something [rows, outs] are added. apart: so many numbers lie between two rows of w, and here of what else is [rows, ins].
    """

    rows: int
    outs: int
    ins: int
    back: bool = False
    fp8: bool = False
    beside: int = 0
    apart: int = 0

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.outs * self.ins

    @property
    def text(self) -> str:
        """As it is remembered: what is the fastest does not hang on how far apart rows lie."""
        way = "back" if self.back else "fp8" if self.fp8 else "forward"
        return f"{self.rows} {self.outs} {self.ins} {way}" + (f" beside {self.beside}" if self.beside else "")


_chosen: dict[Shape, Callable[..., None]] = {}  # in this process: of operands as product() or scaled_product() has them, and the result


def product(x: Tensor, w: Tensor, *, back: bool = False, out: Tensor | None = None) -> Tensor:
    """x wᵀ of x [rows, ins] and w [outs, ins], whose rows may lie apart; back: x w of x [rows, outs]."""
    run = _chosen.get(Shape(len(x), w.shape[0], w.shape[1], back, apart=w.stride(0) - w.shape[1])) if _chosen else None
    if run is None or not (_aligned(torch.bfloat16, w) and _plain(torch.bfloat16, x, *(() if out is None else (out,)))):
        return torch.mm(x, w if back else w.t(), out=out)
    out = x.new_empty(len(x), w.shape[1 if back else 0]) if out is None else out
    run(x, w, out)
    return out


def scaled_product(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, *, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None
) -> Tensor:
    """x8 w8ᵀ + bias in dtype: x8 [rows, ins] and w8 [outs, ins] in e4m3, of whose rows x_scales [rows, 1] and w_scales [1, outs] are the scales."""
    run = _chosen.get(Shape(len(x8), w8.shape[0], w8.shape[1], fp8=True)) if _chosen and bias is None and dtype == torch.bfloat16 else None
    if run is None or not (_plain(torch.float8_e4m3fn, x8, w8) and _plain(torch.float32, x_scales, w_scales)):
        return torch._scaled_mm(x8, w8.t(), scale_a=x_scales, scale_b=w_scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    out = torch.empty(len(x8), len(w8), dtype=dtype, device=x8.device)
    run(x8, x_scales, w8, w_scales, out)
    return out


def chosen(shape: Shape) -> Callable[..., None] | None:
    """What runs a shape in which something lies beside w: of x, both together [outs, ins + beside], what is added if not back, and where the result goes."""
    return _chosen.get(shape)


def roomy(x: Tensor, columns: int, room: int) -> Tensor:
    """[rows of x, columns] to be filled in, with so much room after each row."""
    return x.new_empty(len(x), columns + room)[:, :columns]


def widened(m: Tensor, columns: int) -> Tensor:
    """A matrix with room and so many columns of it."""
    return m.as_strided((len(m), m.shape[1] + columns), m.stride())


def _plain(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """As an algorithm was timed: without gaps, aligned."""
    return all(m.is_contiguous() for m in tensors) and _aligned(dtype, *tensors)


def _aligned(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return all(m.dtype == dtype and m.stride(1) == 1 and m.data_ptr() % ALIGNED_BYTES == 0 for m in tensors)


# ---- the choice -------------------------------------------------------------------------------------------------------
def choose(operands: dict[Shape, Callable[[], tuple[Any, ...]]], measure: bool) -> str | None:
    """Choose for each shape, whose operands the function makes as product() or scaled_product() takes them; returns a line on what was measured.

    Where something lies beside w they are (what chosen() takes, but for the result; what makes the same of w alone; the result): one kernel
    against several.
    measure: time what the machine does not remember, 4 s a shape, else leave it to PyTorch.
    """
    from graft.model.kernels import cublaslt, quack

    known = recalled(MEMORY)
    began_s = time.perf_counter()
    gains: list[tuple[float, float]] = []  # FLOP of a shape, and by how much it is faster
    machine = f"{torch.cuda.get_device_name()} cuBLASLt {cublaslt.version()} QuACK {quack.installed()}"
    for shape, made in operands.items():
        found: list[Any]
        if shape.fp8:
            found = [cublaslt.ScaledProduct(*shape[:3])]
        elif shape.beside:
            found = [quack.Product(shape.rows, shape.outs, shape.ins + shape.beside, shape.back, shape.apart, beside=True)]
        else:
            found = [library.Product(*shape[:4], shape.apart) for library in (cublaslt, quack)]
        if (key := f"{machine} {shape.text}") not in known:
            if not measure:
                continue
            known[key], gain = _measured(shape, found, made(), warm=not gains)
            gains.append((shape.flop, gain))
        if took := next(((library, algorithm) for library in found if (algorithm := library.taken(known[key]))), None):
            _chosen[shape] = partial(took[0].run, took[1])
    torch.cuda.empty_cache()
    if not gains:
        return None
    remember(MEMORY, known)
    saved = sum(flop * (1 - 1 / (1 + gain)) for flop, gain in gains) / sum(flop for flop, _ in gains)
    return f"matmuls of {len(gains)} shapes tuned in {time.perf_counter() - began_s:.0f} s: {saved:.1%} of their time saved"


def _measured(shape: Shape, found: list[Any], operands: Any, warm: bool) -> tuple[str | None, float]:
    """(the fastest algorithm, as it is stored, or None for PyTorch's; its pace over PyTorch's, less 1)."""
    given = operands
    if shape.beside:
        given, pytorchs, wanted = operands
    else:
        pytorchs = partial(scaled_product, *given) if shape.fp8 else partial(product, *given, back=shape.back)
        wanted = pytorchs()
    out = roomy(wanted, wanted.shape[1], shape.apart) if shape.beside and shape.back else torch.empty_like(wanted)
    runs: dict[str | None, Callable[[], Any]] = {None: pytorchs}
    runs |= {one.text: partial(library.run, one, *given, out) for library in found for one in library.suggested()}
    for name in [name for name, run in runs.items() if not _works(run)]:
        del runs[name]
    names = list(runs)

    if warm:
        _pace(pytorchs, WARM_S)
    last = [names[n] for n in finalists([_pace(run, ROUNDS_S[0]) for run in runs.values()])]
    again = [[_pace(runs[name], for_s) for name in last] for for_s in ROUNDS_S[1:]]
    mean = [sum(each) / len(again) for each in zip(*again, strict=True)]
    if best := winner(mean):
        runs[last[best]]()
        if not (out - wanted).float().norm() <= WRONG * wanted.float().norm():  # NaN too
            best = 0
    return last[best], mean[best] / mean[0] - 1


def _works(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:  # noqa: BLE001 - a kernel that does not compile here, for whatever reason, is none to choose
        return False
    return True


def finalists(paces: list[float]) -> list[int]:
    """Places of the first, which is PyTorch's, and of the FINALISTS fastest others."""
    return [0, *sorted(range(1, len(paces)), key=lambda n: -paces[n])[:FINALISTS]]


def winner(paces: list[float]) -> int:
    """Place of the fastest; of the first, PyTorch's, where none is ahead by LEAST_GAIN."""
    best = max(range(len(paces)), key=paces.__getitem__)
    return best if paces[best] > paces[0] * (1 + LEAST_GAIN) else 0


def _pace(run: Callable[[], Any], for_s: float) -> float:
    """Runs a second, over the last two thirds of for_s."""
    run()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_s(count: int) -> float:
        began.record()
        for _ in range(count):
            run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    count = max(3, int(for_s / 3 / time_s(2) * 2))
    time_s(count)
    return 2 * count / time_s(2 * count)
