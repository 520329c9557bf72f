"""8-bit weights and activations in plain float32 torch. The weights themselves: kernels.formats.dequantize."""

from __future__ import annotations

import torch

TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] in `dtype` (int8, fp8 e4m3) and float32 scales [M, 1], the row's largest magnitude over 127 or 448."""
    scales = x.float().abs().amax(-1, keepdim=True) / TOP[dtype]
    steps = x.float() / torch.where(scales > 0, scales, 1.0)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scales


def linear(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """float32 [M, N] = x [M, K] @ w [N, K]^T, with x in 8 bits first if `dtype` says so."""
    if dtype is not None:
        q, scales = quantise_rows(x, dtype)
        return ((q.double() @ w.double().t()) * scales).float()
    return (x.double() @ w.double().t()).float()
