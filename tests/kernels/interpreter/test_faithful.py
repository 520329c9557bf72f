"""The repaired interpreter against torch: every bfloat16 bit pattern, every float8 value."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(x, y, total, difference, product, fused, less, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(difference + i, a - b)
    tl.store(product + i, a * b)
    tl.store(fused + i, tl.fma(a, b, a))
    tl.store(less + i, (a < b).to(x.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square)))


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit or 8-bit float type."""
    bits = torch.int8 if dtype.itemsize == 1 else torch.int16
    values = torch.arange(torch.iinfo(bits).min, torch.iinfo(bits).max + 1).to(bits).view(dtype)
    return values[values.float().isfinite()]


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_float_conversion_rounds_to_nearest_even(source, target):
    if source == torch.float32:  # values between two bfloat16, and their ties
        x = every(torch.bfloat16).float()
        x = torch.cat([x, x * 1.001, (x.view(torch.int32) | 0x8000).view(torch.float32)])
        x = x[x.isfinite()]
    else:
        x = every(source)
    y = torch.empty(len(x), dtype=target)
    cast_kernel[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)))
    wide = x.float()
    if target.itemsize == 1 and source != target:  # the hardware's float8 conversion saturates
        limit = torch.finfo(target).max
        wide = wide.clamp(-limit, limit)
    assert torch.equal(y.float(), wide.to(target).float())


@pytest.mark.parametrize("integer", [torch.int8, torch.int32], ids=str)
def test_integers_become_bfloat16_and_back(integer):
    x = torch.arange(-128, 128).to(integer)
    y, back = torch.empty(256, dtype=torch.bfloat16), torch.empty(256, dtype=integer)
    cast_kernel[(1,)](x, y, 256, BLOCK=256)
    cast_kernel[(1,)](y, back, 256, BLOCK=256)
    assert torch.equal(y, x.to(torch.bfloat16)) and torch.equal(back, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(512, generator=generator).to(dtype) for _ in range(2))
    total, difference, product, fused = (torch.empty(512, dtype=dtype) for _ in range(4))
    less = torch.empty(512, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, total, difference, product, fused, less, BLOCK=512)
    assert torch.equal(total, x + y) and torch.equal(difference, x - y) and torch.equal(product, x * y)
    if dtype != torch.float32:  # numpy has no fused multiply-add
        assert torch.equal(fused, (x.double() * y.double() + x.double()).to(dtype))
    assert torch.equal(less, (x < y).to(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_dot(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-8, 9, (32, 32), generator=generator).float().to(dtype) for _ in range(2))
    out = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    dot_kernel[(1,)](x, y, out, N=32)
    assert torch.equal(out.float(), x.float() @ y.float())
