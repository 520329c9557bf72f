"""The number formats that checkpoints store weights in, as torch tensors. Pure torch, any device.

Block types are GGUF's: a row of K weights is K/32 blocks, each an fp16 scale d (Q4_1: and an fp16 minimum m) and then
its integers q. Q8_0: w = q d, 34 bytes. Q4_0: w = (q - 8) d, 18 bytes. Q4_1: w = q d + m, 20 bytes.
"""

from __future__ import annotations

import torch

from kernels.gpu.w4_layout import from_gguf

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FOUR_BIT = ("Q4_0", "Q4_1")


def four_bit_parts(raw: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """raw uint8 [N, bytes of a row], kind in FOUR_BIT -> q uint8 [N, K] in 0..15, d, m fp16 [N, K/32]: w = q d + m."""
    q, d, m, _ = from_gguf(raw, kind)
    return q, d, m


def dequantize(raw: torch.Tensor, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """raw uint8 [N, bytes of a row] of a format above -> [N, K]. Computed in float32, then rounded to `dtype` once."""
    if kind in DENSE:
        return raw.view(DENSE[kind]).to(dtype)
    if kind == "Q8_0":
        blocks = raw.view(raw.shape[0], -1, 34)
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        return (blocks[..., 2:].view(torch.int8) * d).flatten(1).to(dtype)
    assert kind in FOUR_BIT, f"no format {kind}"
    q, d, m = four_bit_parts(raw, kind)
    return torch.addcmul(m.float()[..., None], q.view(*d.shape, 32).float(), d.float()[..., None]).flatten(1).to(dtype)
