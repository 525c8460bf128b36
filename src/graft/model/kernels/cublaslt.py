"""Matmuls by any one of cuBLASLt's algorithms, in the library that PyTorch has loaded; PyTorch itself takes the first that cuBLAS suggests.

The interface is https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api. The library is column-major: a matrix [rows, columns] of
PyTorch is one of [columns, rows] there, so w comes first.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

_COMPUTE_FP32, _FP32, _BF16 = 68, 0, 14  # of cublasComputeType_t and cudaDataType_t
_TRANSPOSED_FIRST = 3  # of cublasLtMatmulDescAttributes_t
_LARGEST_WORKSPACE = 1  # of cublasLtMatmulPreferenceAttributes_t
WORKSPACE_BYTES = 32 << 20  # what PyTorch gives it on Hopper


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t: may be stored, and used again with the same version of the library."""

    _fields_ = [("data", c_uint64 * 8)]

    @property
    def text(self) -> str:
        return bytes(self).hex()


def stored(text: str | None) -> Algorithm | None:
    """The algorithm whose bytes were stored in hexadecimal; None where they are no algorithm's."""
    with suppress(ValueError):
        if text and len(data := bytes.fromhex(text)) == ctypes.sizeof(Algorithm):
            return Algorithm.from_buffer_copy(data)
    return None


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4)]


class Product:
    """x wᵀ of x [rows, ins] and w [outs, ins], or where `back` is x w of x [rows, outs], in bf16 with sums in fp32, each row in memory in order.

    Raises OSError where there is no such library, RuntimeError where it refuses.
    """

    def __init__(self, rows: int, outs: int, ins: int, back: bool):
        self.width, inner = (ins, outs) if back else (outs, ins)  # of the result, and what is summed over
        self._form = _made("cublasLtMatmulDescCreate", c_int(_COMPUTE_FP32), c_int(_FP32))
        if not back:
            transposed = c_int32(1)
            _do("cublasLtMatmulDescSetAttribute", self._form, c_int(_TRANSPOSED_FIRST), byref(transposed), c_size_t(4))
        self._w, self._x, self._out = (_layout(columns, height) for columns, height in ((ins, outs), (inner, rows), (self.width, rows)))

    def suggested(self, most: int = 16) -> list[Algorithm]:
        """The library's algorithms for this shape, its first choice first."""
        preference = _made("cublasLtMatmulPreferenceCreate")
        room = c_size_t(WORKSPACE_BYTES)
        _do("cublasLtMatmulPreferenceSetAttribute", preference, c_int(_LARGEST_WORKSPACE), byref(room), c_size_t(8))
        found, count = (_Found * most)(), c_int()
        given = _handle(), self._form, self._w, self._x, self._out, self._out, preference, c_int(most), found, byref(count)
        _do("cublasLtMatmulAlgoGetHeuristic", *given)
        _do("cublasLtMatmulPreferenceDestroy", preference)
        return [Algorithm.from_buffer_copy(one.algorithm) for one in found[: count.value] if one.state == 0]

    def taken(self, text: str | None) -> Algorithm | None:
        """The stored algorithm, where this library, on this GPU, runs it."""
        if (algorithm := stored(text)) is None:
            return None
        found = _Found()
        given = _handle(), self._form, self._w, self._x, self._out, self._out, byref(algorithm), byref(found)
        runs = _library().cublasLtMatmulAlgoCheck(*given) == 0 and found.workspace <= WORKSPACE_BYTES
        return algorithm if runs else None

    def run(self, algorithm: Algorithm, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Fill in out [rows, outs], or [rows, ins] where `back` is, on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        to = c_void_p(out.data_ptr())
        operands = c_void_p(w.data_ptr()), self._w, c_void_p(x.data_ptr()), self._x, byref(_ZERO), to, self._out, to, self._out
        workspace = c_void_p(_workspace(stream).data_ptr())
        _do("cublasLtMatmul", _handle(), self._form, byref(_ONE), *operands, byref(algorithm), workspace, c_size_t(WORKSPACE_BYTES), c_void_p(stream))


_ONE, _ZERO = c_float(1.0), c_float(0.0)


@cache
def version() -> int:
    ask = _library().cublasLtGetVersion
    ask.restype = c_size_t
    return int(ask())


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")


@cache
def _handle() -> c_void_p:
    return _made("cublasLtCreate")


@cache
def _workspace(stream: int) -> Tensor:
    """One a stream: what runs there runs in order."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _layout(rows: int, columns: int) -> c_void_p:
    """Of a column-major matrix without gaps."""
    return _made("cublasLtMatrixLayoutCreate", c_int(_BF16), c_uint64(rows), c_uint64(columns), c_int64(rows))


def _made(constructor: str, *given: Any) -> c_void_p:
    found = c_void_p()
    _do(constructor, byref(found), *given)
    return found


def _do(function: str, *given: Any) -> None:
    if status := getattr(_library(), function)(*given):
        raise RuntimeError(f"{function} failed with status {status}")
