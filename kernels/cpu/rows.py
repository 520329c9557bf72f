"""What is computed of each row by itself between the matmuls, a kernel for each: RMSNorm, SiLU, rounding to 8 bits.

As torch's operations these are three to six passes over the rows; here one or two, the second from the first cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from kernels.cpu import vector
from kernels.cpu.vector import BYTES, F32, FLOATS, I8, I64, INTEGERS, WIDTH, Builder, Kernel, Value, at, load, store

ZERO = 128  # what 0 is as an unsigned activation
ROUND = 1.5 * 2**23  # added to a small float32 it leaves a whole number, rounded half to even, in the lowest bits
_TINY = 1e-30  # the least step: a row of zeros is divided by it


def fits(*tensors: torch.Tensor) -> bool:
    """Whether there are kernels for these rows."""
    return vector.available() and all(
        x.dtype == torch.float32 and x.shape[-1] % WIDTH == 0 and x.is_contiguous() for x in tensors
    )


def add_rmsnorm(residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual [T, H] += delta [T, H]; returns residual / |residual, eps| * weight [T, H]: as kernels.cpu.fused."""
    out = torch.empty_like(residual)
    rows, size = residual.shape
    tensors = (residual, residual if delta is None else delta, weight, out)
    _run(_add_rmsnorm(delta is not None, size * eps), rows, size, *tensors)
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size)
    _run(_silu_mul(), rows, size, gate_up, out)
    return out


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> uint8 [T, K], a row's largest magnitude at ZERO +- 127, and the steps float32 [T, 1]."""
    rounded, step = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0], 1)
    _run(_round_rows(), x.shape[0], x.shape[1], x, rounded, step)
    return rounded, step


def _run(kernel: Kernel, rows: int, size: int, *tensors: torch.Tensor) -> None:
    kernel(np.array([0, rows, size, *(x.data_ptr() for x in tensors)], np.int64))


def _of_each_row(write: Callable[..., None], count: int) -> Kernel:
    """write(builder, row, size, addresses of the `count` tensors)."""

    def body(b: Builder, arguments: Value) -> None:
        rows, size, *addresses = (b.load(at(b, arguments, i)) for i in range(1, 3 + count))
        pointers = [vector.address(b, address, F32) for address in addresses]
        with vector.each_of(b, at(b, arguments, 0), rows) as row:
            write(b, row, size, *pointers)

    return Kernel(body)


@functools.cache
def _add_rmsnorm(add: bool, epsilon: float) -> Kernel:
    def write(b: Builder, row: Value, size: Value, residual: Value, delta: Value, weight: Value, out: Value) -> None:
        residual, delta, out = (at(b, x, (row, size)) for x in (residual, delta, out))
        total = vector.variable(b, FLOATS, vector.floats(0))
        steps = b.udiv(size, I64(WIDTH))
        with vector.loop(b, I64(0), steps) as i:
            place = at(b, residual, (i, WIDTH))
            x = load(b, place)
            if add:
                x = b.fadd(x, load(b, at(b, delta, (i, WIDTH))))
                store(b, x, place)
            b.store(vector.add_product(b, b.load(total), x, x), total)
        length = vector.square_root(b, b.fadd(vector.total_of(b, b.load(total)), F32(epsilon)))
        factor = vector.splat(b, b.fdiv(F32(1), length))
        with vector.loop(b, I64(0), steps) as i:
            x = b.fmul(load(b, at(b, residual, (i, WIDTH))), load(b, at(b, weight, (i, WIDTH))))
            store(b, b.fmul(x, factor), at(b, out, (i, WIDTH)))

    return _of_each_row(write, 4)


@functools.cache
def _silu_mul() -> Kernel:
    def write(b: Builder, row: Value, size: Value, gate_up: Value, out: Value) -> None:
        with vector.loop(b, I64(0), b.udiv(size, I64(WIDTH))) as i:
            gate = load(b, at(b, gate_up, (row, size, 2), (i, WIDTH)))
            up = load(b, at(b, gate_up, (row, size, 2), size, (i, WIDTH)))
            # Beyond 126 the quotient would be a denormal.
            power = b.fmul(gate, vector.floats(-math.log2(math.e)))
            power = b.select(b.fcmp_ordered(">", power, vector.floats(126)), vector.floats(126), power)
            divisor = b.fadd(vector.floats(1), vector.exp2(b, power))
            store(b, b.fdiv(b.fmul(gate, up), divisor), at(b, out, (row, size), (i, WIDTH)))

    return _of_each_row(write, 2)


@functools.cache
def _round_rows() -> Kernel:
    def write(b: Builder, row: Value, size: Value, x: Value, out: Value, step: Value) -> None:
        x, bytes_ = at(b, x, (row, size)), at(b, b.bitcast(out, I8.as_pointer()), (row, size))
        most = vector.variable(b, FLOATS, vector.floats(0))
        steps = b.udiv(size, I64(WIDTH))
        with vector.loop(b, I64(0), steps) as i:
            bits = b.bitcast(load(b, at(b, x, (i, WIDTH))), INTEGERS)
            size_of = b.bitcast(b.and_(bits, vector.integers(0x7FFFFFFF)), FLOATS)
            b.store(vector.larger(b, b.load(most), size_of), most)
        length = b.fadd(b.fmul(vector.largest_of(b, b.load(most)), F32(1 / 127)), F32(_TINY))
        b.store(length, at(b, step, row))
        factor = vector.splat(b, b.fdiv(F32(1), length))
        with vector.loop(b, I64(0), steps) as i:
            value = b.fadd(b.fmul(load(b, at(b, x, (i, WIDTH))), factor), vector.floats(ROUND + ZERO))
            whole = b.trunc(b.bitcast(value, INTEGERS), BYTES)
            b.store(whole, b.bitcast(at(b, bytes_, (i, WIDTH)), BYTES.as_pointer()), align=1)

    return _of_each_row(write, 3)
