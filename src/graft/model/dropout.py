"""Dropout on the inputs of adapters (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html), each adapter's its own, as in PEFT.

No mask is stored: whether an element is dropped is a function of the adapter's seed and of the element's place, computed again wherever
it is needed. That function is Philox 4x32 of 7 rounds (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405: the fewest that
pass BigCrush). Its key is the seed, its counter (column // 8, row, 0, 0), and of its 128 bits each of eight columns has 16. At most one
input with what is dropped is in memory at a time. On a GPU the masks are made in kernels (kernels/dropout.py); here are their twins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 1 << 16
ROUNDS = 7
_LOW = (1 << 32) - 1


class Drop(NamedTuple):
    """What the adapters of a group drop in one forward."""

    seeds: Tensor  # [adapters] int64, on the device of their inputs
    threshold: int  # of LEVELS: so many are dropped

    @property
    def kept(self) -> float:
        """The share that is kept."""
        return 1 - self.threshold / LEVELS


def threshold_of(rate: float) -> int:
    """The nearest to a rate, less than 1, of what is dropped."""
    return min(round(rate * LEVELS), LEVELS - 1)


def grown(scale: float, drop: Drop | None) -> float:
    """An adapter's scale where it stands for what is dropped too; no input is multiplied, so none is rounded."""
    return scale if drop is None else scale / drop.kept


# ---- the masks ----------------------------------------------------------------------------------------------------------
def kept(seed: Tensor, threshold: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] bool: what one adapter, whose seed is [] int64, keeps of its input."""
    row = torch.arange(rows, device=seed.device)[:, None]
    words = philox(torch.arange(-(-columns // 8), device=seed.device), row, seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(rows, -1)[:, :columns] >= threshold


def philox(c0: Tensor, c1: Tensor, key: Tensor) -> list[Tensor]:
    """The four words, int64 each, of Philox 4x32 at the counter (c0, c1, 0, 0) with a key of 64 bits."""
    c = [c0, c1, torch.zeros_like(c0), torch.zeros_like(c0)]
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(ROUNDS):
        one, other = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # of 64 bits, whatever their sign
        c = [(other >> 32 & _LOW) ^ c[1] ^ k0, other & _LOW, (one >> 32 & _LOW) ^ c[3] ^ k1, one & _LOW]
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c


def dropped(x: Tensor, drop: Drop, n: int) -> Tensor:
    """x [t, h] as the n-th adapter takes it: zero where it is dropped, else as it was."""
    if x.is_cuda:
        from graft.model.kernels.dropout import dropped as on_gpu

        return on_gpu(x, drop.seeds[n], drop.threshold)
    return torch.where(kept(drop.seeds[n], drop.threshold, *x.shape), x, 0.0)


# ---- the products of adapters that share an input ---------------------------------------------------------------------
def down_product(x: Tensor, a: Tensor, drop: Drop | None, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale · x Aᵀ [t, adapters · r] of x [t, h], as each takes it, and their A [adapters · r, h]; in `out`, whose rows may lie apart, where it is given."""
    if drop is None:
        return torch.addmm(x.new_empty(1) if out is None else out, x, a.t(), beta=0, alpha=scale, out=out)
    u = x.new_empty(len(x), len(a)) if out is None else out
    for n, (part, own) in enumerate(zip(*(_each(m, drop, dim) for m, dim in ((u, 1), (a, 0))), strict=True)):
        torch.addmm(part, dropped(x, drop, n), own.t(), beta=0, alpha=scale, out=part)
    return u


def of_a(du: Tensor, x: Tensor, drop: Drop | None, out: Tensor) -> None:
    """out = duᵀ x [adapters · r, h], the gradient of A where that of down_product() is du."""
    if drop is None:
        torch.mm(du.t(), x, out=out)
        return
    for n, (part, own) in enumerate(zip(*(_each(m, drop, dim) for m, dim in ((du, 1), (out, 0))), strict=True)):
        torch.mm(part.t(), dropped(x, drop, n), out=own)


def add_back_(dx: Tensor, du: Tensor, a: Tensor, drop: Drop | None) -> None:
    """dx [t, h] += du A, without what was dropped: the gradient of x."""
    if drop is None:
        dx.addmm_(du, a)
    elif dx.is_cuda:
        from graft.model.kernels.dropout import add_back_ as on_gpu

        on_gpu(dx, du, a, drop.seeds, drop.threshold)
    else:
        for n, (part, own) in enumerate(zip(*(_each(m, drop, dim) for m, dim in ((du, 1), (a, 0))), strict=True)):
            dx.add_(dropped(part @ own, drop, n))


def _each(m: Tensor, drop: Drop, dim: int) -> tuple[Tensor, ...]:
    """Its part of each adapter."""
    return m.chunk(len(drop.seeds), dim)
