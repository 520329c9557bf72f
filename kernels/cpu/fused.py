"""The ops between the matmuls on a CPU: as few torch calls as each allows, since at one row a call costs more than its
arithmetic. The residual stream is float32 throughout."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from kernels.cpu import rows
from kernels.kv_cache import quantize_rows


def norm_weight(weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm's weight [H] in the form `add_rmsnorm` takes: float32, times sqrt(H)."""
    return weight.float() * math.sqrt(weight.shape[-1])


def add_rmsnorm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """residual float32 [T, H] += delta [T, H]; returns RMSNorm(residual) [T, H] in `dtype`.

    x / sqrt(mean(x^2) + eps) * w = x (w sqrt(H)) / sqrt(|x|^2 + H eps): three calls; weight from `norm_weight`.
    """
    if dtype == residual.dtype and rows.fits(residual, *(() if delta is None else (delta,))):
        return rows.add_rmsnorm(residual, delta, weight, eps)
    if delta is not None:
        residual.add_(delta)
    length = torch.linalg.vector_norm(residual, dim=-1, keepdim=True).hypot_(_epsilon(residual.shape[-1], eps))
    if dtype == residual.dtype:
        return (residual * weight).div_(length)
    return torch.div(residual * weight, length, out=torch.empty(residual.shape, dtype=dtype))


@functools.cache
def _epsilon(size: int, eps: float) -> torch.Tensor:
    """sqrt(size * eps): what the length of a vector of `size` elements is taken together with."""
    return torch.tensor(math.sqrt(size * eps))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I], the same dtype. float16 saturates instead of overflowing."""
    half = gate_up.shape[-1] // 2
    if rows.fits(gate_up) and half % 16 == 0:
        return rows.silu_mul(gate_up)
    gate, up = gate_up[:, :half], gate_up[:, half:]
    out = F.silu(gate).mul_(up)
    return out.clamp_(-65504, 65504) if out.dtype == torch.float16 else out


def rope_and_cache_write(
    qkv: torch.Tensor,
    rotations: torch.Tensor,
    heads: int,
    kv_heads: int,
    cache: torch.Tensor,
    slots: torch.Tensor,
    dtype: torch.dtype,
    qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k and writes k and v into the cache.

    qkv [T, (heads + 2 kv_heads) D]: q, k, v of each token, overwritten where they are float32; pairs (2i, 2i + 1) of a
    head are the real and imaginary parts that are rotated. rotations complex64 [T, 1, D/2]. cache [2, slots, kv_heads,
    D]: this layer's K and V. slots int64 [T]: where each token goes. qk_norm: RMSNorm weights [D] of q and k (from
    `norm_weight`) and eps, applied to each head before the rotation. scales: of an 8-bit cache, float32 [2, slots,
    kv_heads, 1]. Returns q [T, heads, D] in `dtype`.
    """
    tokens = qkv.shape[0]
    x = qkv.float().view(tokens, heads + 2 * kv_heads, -1)
    if qk_norm is not None:
        q_weight, k_weight, eps = qk_norm
        for part, weight in ((x[:, :heads], q_weight), (x[:, heads : heads + kv_heads], k_weight)):
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            part.mul_(weight).div_(length.hypot_(_epsilon(part.shape[-1], eps)))
    torch.view_as_complex(x[:, : heads + kv_heads].unflatten(-1, (-1, 2))).mul_(rotations)
    if scales is not None:
        rows = x[:, heads:].view(tokens, 2, kv_heads, -1).transpose(0, 1)
        stored, scale = quantize_rows(rows, cache.dtype)
        cache.view(torch.int8).index_copy_(1, slots, stored.view(torch.int8))
        scales.index_copy_(1, slots, scale.unsqueeze(-1))
        return x[:, :heads].to(dtype)
    if cache.dtype == dtype:
        x = x.to(dtype)
        q, kv = x[:, :heads], x[:, heads:]
    else:
        q, kv = x[:, :heads].to(dtype), x[:, heads:].to(cache.dtype)
    cache.index_copy_(1, slots, kv.view(tokens, 2, kv_heads, -1).transpose(0, 1))
    return q
