"""Makes `TRITON_INTERPRET=1` agree with the hardware for bfloat16 and float8 (Triton 3.6 and 3.7).

Triton's interpreter keeps bfloat16 as uint16 and float8 as uint8 and then calculates on these bits: a bfloat16 sum or
dot product is garbage, and narrowing conversions truncate. `install()` swaps the builder's class for one that widens to
float32, calculates, and rounds to nearest even (float8: saturating, as PTX `cvt.rn.satfinite` does). What the
interpreter cannot run at all (inline assembly, libdevice calls) stays an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FLOATS = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def _scalar(handle: TensorHandle) -> tl.dtype:
    return handle.dtype.scalar


def _to_torch(data: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The interpreter's array (bits of a float of `dtype`, in any numpy type of that width) as a torch tensor."""
    bits = np.array(data, order="C").view(UNSIGNED[dtype.itemsize])  # a copy: torch wants writable memory
    return torch.from_numpy(bits).view(dtype)


def _to_numpy(tensor: torch.Tensor, np_dtype: np.dtype) -> np.ndarray:
    bits = tensor.contiguous().view(SIGNED[tensor.dtype.itemsize]).numpy()
    return bits.view(np_dtype)


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    value, dtype = _to_torch(data, FLOATS[source]), FLOATS[target]
    if dtype in FLOAT8:
        limit = torch.finfo(dtype).max
        value = value.float().clamp(-limit, limit)  # NaN stays NaN
    return _to_numpy(value.to(dtype), interpreter._get_np_dtype(target)).reshape(data.shape)


def _widen(handle: TensorHandle) -> np.ndarray:
    """The handle's values in a numpy type that can calculate: bfloat16 and float8 become float32."""
    dtype = FLOATS.get(_scalar(handle))
    if dtype is torch.bfloat16 or dtype in FLOAT8:
        return _to_torch(handle.data, dtype).float().numpy()
    return handle.data


def _narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """float32 values rounded to `dtype`."""
    return TensorHandle(_convert(np.asarray(values, dtype=np.float32), tl.float32, dtype), dtype)


class FaithfulBuilder(InterpreterBuilder):
    """The interpreter's builder with correct arithmetic on bfloat16 and float8."""

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        source, target = _scalar(src), dst_type.scalar
        if source not in FLOATS or target not in FLOATS or rounding_mode == ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return TensorHandle(_convert(src.data, source, target), target)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = _scalar(src), dst_type.scalar
        if source in FLOATS and target in FLOATS:
            return TensorHandle(_convert(src.data, source, target), target)
        if target == tl.bfloat16:  # from an integer
            return _narrow(src.data, target)
        return super().cast_impl(TensorHandle(_widen(src), tl.float32) if source == tl.bfloat16 else src, dst_type)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if _scalar(lhs) == tl.bfloat16 and op not in BITWISE:
            out = op(_widen(lhs), _widen(rhs))
            return TensorHandle(out, tl.int1) if out.dtype == bool else _narrow(out, tl.bfloat16)
        handle = super().binary_op(lhs, rhs, op)
        return TensorHandle(handle.data, tl.int1) if handle.data.dtype == bool else handle  # a comparison's type

    def unary_op(self, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        dtype = _scalar(arg)
        return _narrow(op(_widen(arg)), dtype) if dtype == tl.bfloat16 else super().unary_op(arg, op)

    def ternary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable[..., np.ndarray]
    ) -> TensorHandle:
        dtype = _scalar(other)
        if dtype != tl.bfloat16 or op is np.where:  # a select moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(op(_widen(lhs), _widen(rhs), _widen(other)), dtype)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        dtype = _scalar(z)
        if dtype in (tl.float16, tl.bfloat16):  # one rounding; float32 holds the exact product
            exact = _widen(x).astype(np.float32) * _widen(y).astype(np.float32) + _widen(z).astype(np.float32)
            return _narrow(exact, dtype)
        return super().create_fma(x, y, z)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
        """float32 accumulation, as tensor cores do. Integers are exact (in float64: numpy's integer loop is slow)."""
        x, y, dtype = _widen(a), _widen(b), _scalar(d)
        wide = np.float64 if np.issubdtype(x.dtype, np.integer) or x.dtype == np.float64 else np.float32
        product = np.matmul(x.astype(wide), y.astype(wide))
        if dtype == tl.bfloat16:
            return _narrow(product + _widen(d), dtype)
        return TensorHandle((product.astype(d.data.dtype) + d.data).astype(d.data.dtype), dtype)


def install() -> None:
    """Swaps the arithmetic of the running process's interpreter. Calling it twice changes nothing."""
    interpreter.interpreter_builder.__class__ = FaithfulBuilder
    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "faithful", False):
        return

    def patched(tensor: Any, *args: Any) -> Any:
        """Triton 3.6 with numpy >= 2.4 cannot turn a one-element array into a loop bound."""
        result = patch_tensor(tensor, *args)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    patched.faithful = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
