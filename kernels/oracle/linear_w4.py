"""4-bit weights in plain float32 torch."""

from __future__ import annotations

import torch


def dequantise(q: torch.Tensor, d: torch.Tensor, m: torch.Tensor, zero_point: bool = False) -> torch.Tensor:
    """float32 [N, K] = q * d + m, or (q - m) * d with zero points; q uint8 [N, K], d and m [N, K/G]."""
    group = q.shape[1] // d.shape[1]
    d, m = (t.float().repeat_interleave(group, 1) for t in (d, m))
    return (q.float() - m) * d if zero_point else q.float() * d + m


def as_fp16(w: torch.Tensor, alpha: float) -> torch.Tensor:
    """The weights as the kernel multiplies them: rounded to fp16 once, as w / alpha."""
    return (w / alpha).half().float() * alpha


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float32 [M, N] = x [M, K] @ w [N, K]^T."""
    return x.float() @ w.t()
