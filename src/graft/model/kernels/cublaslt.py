"""Matmuls by any one of cuBLASLt's algorithms, in the library that PyTorch has loaded; PyTorch itself takes the first that cuBLAS suggests.

The interface is https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api. The library is column-major: a matrix [rows, columns] of
PyTorch is one of [columns, rows] there, so w comes first.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

_COMPUTE_FP32, _FP32, _BF16, _E4M3 = 68, 0, 14, 28  # of cublasComputeType_t and cudaDataType_t
_TRANSPOSED_FIRST, _FAST_SUMS = 3, 25  # of cublasLtMatmulDescAttributes_t
_SCALES_OF_FIRST, _SCALES_OF_SECOND, _FORM_OF_FIRST, _FORM_OF_SECOND = 17, 18, 31, 32  # of the same
_A_SCALE_A_ROW = 3  # of cublasLtMatmulMatrixScale_t
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

    apart: so many numbers lie between two rows of w. Raises OSError where there is no such library, RuntimeError where it refuses.
    """

    def __init__(self, rows: int, outs: int, ins: int, back: bool, apart: int = 0):
        self.width, inner = (ins, outs) if back else (outs, ins)  # of the result, and what is summed over
        self._form = _made("cublasLtMatmulDescCreate", c_int(_COMPUTE_FP32), c_int(_FP32))
        if not back:
            self._set(_TRANSPOSED_FIRST, c_int32(1))
        self._w = _layout(ins, outs, apart=apart)
        self._x, self._out = _layout(inner, rows), _layout(self.width, rows)

    def _set(self, attribute: int, value: Any) -> None:
        _do("cublasLtMatmulDescSetAttribute", self._form, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))

    def suggested(self, most: int = 16) -> list[Algorithm]:
        """The library's algorithms for this shape, its first choice first; none where it has none on this GPU."""
        preference = _made("cublasLtMatmulPreferenceCreate")
        room = c_size_t(WORKSPACE_BYTES)
        _do("cublasLtMatmulPreferenceSetAttribute", preference, c_int(_LARGEST_WORKSPACE), byref(room), c_size_t(8))
        found, count = (_Found * most)(), c_int()
        given = _handle(), self._form, self._w, self._x, self._out, self._out, preference, c_int(most), found, byref(count)
        status = _library().cublasLtMatmulAlgoGetHeuristic(*given)
        _do("cublasLtMatmulPreferenceDestroy", preference)
        if status:
            return []
        return [Algorithm.from_buffer_copy(one.algorithm) for one in found[: count.value] if one.state == 0]

    def taken(self, text: str | None) -> Algorithm | None:
        """The stored algorithm, where this library, on this GPU, runs it."""
        if (algorithm := stored(text)) is None:
            return None
        found = _Found()
        given = _handle(), self._form, self._w, self._x, self._out, self._out, byref(algorithm), byref(found)
        runs = _library().cublasLtMatmulAlgoCheck(*given) == 0 and found.workspace <= WORKSPACE_BYTES
        return algorithm if runs else None

    def run(self, algorithm: Algorithm, *given: Tensor) -> None:
        """given: x, w, out. Fill in out [rows, outs], or [rows, ins] where `back` is, on the current stream."""
        (x, w, out), stream = given, torch.cuda.current_stream().cuda_stream
        to = c_void_p(out.data_ptr())
        operands = c_void_p(w.data_ptr()), self._w, c_void_p(x.data_ptr()), self._x, byref(_ZERO), to, self._out, to, self._out
        workspace = c_void_p(_workspace(stream).data_ptr())
        _do("cublasLtMatmul", _handle(), self._form, byref(_ONE), *operands, byref(algorithm), workspace, c_size_t(WORKSPACE_BYTES), c_void_p(stream))


class ScaledProduct(Product):
    """x8 w8ᵀ of x8 [rows, ins] and w8 [outs, ins] in e4m3 with a scale for each of their rows, the result in bf16, its sums as fast as PyTorch asks for."""

    def __init__(self, rows: int, outs: int, ins: int):
        super().__init__(rows, outs, ins, back=False)
        self._set(_FAST_SUMS, c_int8(1))
        for form, scales in ((_FORM_OF_FIRST, _SCALES_OF_FIRST), (_FORM_OF_SECOND, _SCALES_OF_SECOND)):
            self._set(form, c_int32(_A_SCALE_A_ROW))
            self._set(scales, c_void_p(_ADDRESS))
        self._w, self._x = _layout(ins, outs, of=_E4M3), _layout(ins, rows, of=_E4M3)

    def run(self, algorithm: Algorithm, *given: Tensor) -> None:
        """given: x8, x_scales, w8, w_scales, out."""
        x8, x_scales, w8, w_scales, out = given
        self._set(_SCALES_OF_FIRST, c_void_p(w_scales.data_ptr()))
        self._set(_SCALES_OF_SECOND, c_void_p(x_scales.data_ptr()))
        super().run(algorithm, x8, w8, out)


_ADDRESS = 4096  # suggestions are made for some aligned one, and do not read there
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


def _layout(rows: int, columns: int, of: int = _BF16, apart: int = 0) -> c_void_p:
    """Of a column-major matrix with so many numbers between two columns."""
    return _made("cublasLtMatrixLayoutCreate", c_int(of), c_uint64(rows), c_uint64(columns), c_int64(rows + apart))


def _made(constructor: str, *given: Any) -> c_void_p:
    found = c_void_p()
    _do(constructor, byref(found), *given)
    return found


def _do(function: str, *given: Any) -> None:
    if status := getattr(_library(), function)(*given):
        raise RuntimeError(f"{function} failed with status {status}")
