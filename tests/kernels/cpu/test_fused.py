"""The CPU's fused ops against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.fused import add_rmsnorm, norm_weight, rope_and_cache_write, silu_mul


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_add_rmsnorm(rows: int, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    residual, delta, weight = torch.randn(rows, 96) * scale, (torch.randn(rows, 96) * scale).to(dtype), torch.randn(96)
    total = residual.double() + delta.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = add_rmsnorm(residual, delta, norm_weight(weight), 1e-5, dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(residual.double(), total, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(add_rmsnorm(residual, None, norm_weight(weight), 1e-5, dtype), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_mul(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(7, 64).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_silu_mul_saturates() -> None:
    gate_up = torch.full((1, 2), 60000.0, dtype=torch.float16)
    assert silu_mul(gate_up).item() == 65504.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache_write(dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, dim = 5, 6, 2, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    before = qkv.clone()
    angles = torch.randn(tokens, dim // 2)
    rotations = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    cache = torch.full((2, 32, kv_heads, dim), float("nan"), dtype=torch.bfloat16)
    slots = torch.tensor([3, 4, 31, 0, 17])
    weights = torch.randn(2, dim)
    qk_norm = (norm_weight(weights[0]), norm_weight(weights[1]), 1e-6) if normed else None
    q = rope_and_cache_write(qkv, rotations, heads, kv_heads, cache, slots, torch.float32, qk_norm)

    x = before.double().view(tokens, -1, dim)
    if normed:
        length = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x[:, :heads] = (x / length)[:, :heads] * weights[0]
        x[:, heads : heads + kv_heads] = (x / length)[:, heads : heads + kv_heads] * weights[1]
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    rotated = torch.stack(
        [x[..., 0::2] * cos - x[..., 1::2] * sin, x[..., 0::2] * sin + x[..., 1::2] * cos], -1
    ).flatten(-2)
    torch.testing.assert_close(q.double(), rotated[:, :heads], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[0, slots].double(), rotated[:, heads : heads + kv_heads], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(cache[1, slots].double(), x[:, heads + kv_heads :], rtol=1e-2, atol=1e-2)
    assert cache.isnan().sum() == 2 * (32 - tokens) * kv_heads * dim  # nothing else was written
