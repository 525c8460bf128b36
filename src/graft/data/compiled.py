"""numba's compiler as graft uses it: machine code is kept on disk, so one process compiles and the others load it.

Importing numba costs 0.4 s. The code is kept beside the source where that folder can be written, else in the user's cache
folder (or NUMBA_CACHE_DIR); where none of these can be, each process compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """`function` as machine code, compiled at its first call; it holds no GIL and checks no array border."""
    try:
        return cast(Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba found no place for its cache
        return cast(Function, njit(nogil=True)(function))
