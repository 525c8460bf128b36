"""Matmuls by QuACK's kernels for Hopper (`quack-kernels`, https://github.com/Dao-AILab/quack, which FlashAttention-4 brings with it).

Their tiles are larger than cuBLAS has for these shapes, 256 by 192 and 208: less is moved between L2, shared memory and registers for the
same product, which at the GPU's power limit is what counts (benchmarks/RESULTS.md). A kernel is compiled in a second, once a machine.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.model.remembered import folder

HOPPER = (9, 0)
ALIGNED = 8  # numbers in the 16 bytes at which the copy engine wants each row to begin


class Tiles(NamedTuple):
    """How one kernel cuts a product: tiles of so many rows and columns, `cluster` of which, below or beside each other, share what they read."""

    rows: int
    columns: int
    cluster: tuple[int, int]
    swapped: bool  # w xᵀ instead, whose rows are the result's columns

    @property
    def text(self) -> str:
        return f"quack {self.rows}x{self.columns} {self.cluster[0]}x{self.cluster[1]}{' swapped' if self.swapped else ''}"


# of 44 in quack.gemm_config, those that were the fastest of any shape of an 8B on an H200
FASTEST = [Tiles(256, columns, cluster, swapped) for columns in (192, 208) for cluster, swapped in (((1, 2), False), ((1, 2), True), ((2, 1), True))]


def stored(text: str | None) -> Tiles | None:
    """The tiles whose text was stored; None where it is no tiles'."""
    found = re.fullmatch(r"quack (\d+)x(\d+) (\d+)x(\d+)( swapped)?", text or "")
    return Tiles(int(found[1]), int(found[2]), (int(found[3]), int(found[4])), bool(found[5])) if found else None


@cache
def installed() -> str | None:
    """The version that can run on this GPU, if one can."""
    with suppress(PackageNotFoundError):
        found = version("quack-kernels")
        return found if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER else None
    return None


class Product:
    """As cublaslt.Product, of the same matrices; beside: of those of beside.py.

    Then the rows of what is [rows, ins] lie as far apart as those of w: of the result where `back` is, else of x, and x wᵀ is added to something.
    """

    def __init__(self, rows: int, outs: int, ins: int, back: bool, apart: int = 0, beside: bool = False):
        self.rows, self.outs, self.ins, self.back, self.apart, self.beside = rows, outs, ins, back, apart, beside
        self._plans: dict[Tiles, Any] = {}

    def suggested(self) -> list[Tiles]:
        return list(FASTEST) if self._runs() else []

    def _runs(self) -> bool:
        return installed() is not None and not any(n % ALIGNED for n in (self.rows, self.outs, self.ins, self.apart))

    def taken(self, text: str | None) -> Tiles | None:
        """The stored tiles, where a kernel of these runs on this machine."""
        tiles = stored(text) if self._runs() else None
        if tiles is None:
            return None
        apart = self.apart if self.beside else 0
        narrow, wide = (self.rows, self.outs, 0), (self.rows, self.ins, apart)
        made = [
            torch.empty(height, columns + gap, dtype=torch.bfloat16, device="cuda")[:, :columns]
            for height, columns, gap in (narrow if self.back else wide, (self.outs, self.ins, self.apart), wide if self.back else narrow)
        ]
        try:
            self.run(tiles, *made[:2], *(made[2:] if self._adds else []), made[2])
        except Exception:  # noqa: BLE001 - whatever another version of a compiler raises, PyTorch multiplies
            return None
        return tiles

    @property
    def _adds(self) -> bool:
        return self.beside and not self.back

    def run(self, tiles: Tiles, x: Tensor, w: Tensor, *last: Tensor) -> None:
        """last: out, before it what is added where something is. Fill in out [rows, outs], or [rows, ins] where `back` is, on the current stream."""
        gemm = _library()
        second = w.t() if self.back else w  # [columns, inner]
        ends = [last[-1], last[0] if self._adds else None]
        operands = [second, x, *(m if m is None else m.t() for m in ends)] if tiles.swapped else [x, second, *ends]
        if (plan := self._plans.get(tiles)) is None:
            self._plans[tiles] = gemm.gemm(*operands, None, tiles.rows, tiles.columns, *tiles.cluster, pingpong=False)
        else:
            gemm.run_gemm_plan(plan, *operands)


@cache
def _library() -> Any:
    import quack.cache
    import quack.gemm

    quack.cache.CACHE_DIR = quack.cache.CACHE_DIR or str(folder() / "quack")  # else a folder in /tmp that anyone may make
    return quack.gemm
