"""The fused operations in plain float32 torch."""

from __future__ import annotations

import torch


def add_rmsnorm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + x in residual's dtype, its RMSNorm in float32); x and residual [M, H], weight [H]."""
    if x is not None:
        residual = (residual.float() + x.float()).to(residual.dtype)
    h = residual.float()
    return residual, h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """float32 [M, I] = silu(first half of gate_up [M, 2 I]) * second half."""
    gate, up = gate_up.float().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def scaled_fp16(x: torch.Tensor, exp: int) -> torch.Tensor:
    """fp16(x * 2^-exp), saturating."""
    return (x * 2.0**-exp).clamp(-65504, 65504).half()


def rope(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """float32 [T, heads, D]: x, RMSNormed per head if weight [D] is given, with each pair (2i, 2i + 1) rotated.

    cos_sin float32 [max_position, D / 2, 2].
    """
    x = x.float()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    cos, sin = cos_sin[positions.long()].unsqueeze(1).unbind(-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
