"""How one layer's keys and values lie in memory: pages of `block_size` tokens, handed out by block number.

    k        [blocks, kv_heads, block_size, head_dim]       one row of head_dim elements for each token and head
    v        the same for 16-bit and 32-bit caches;
             [blocks, kv_heads, head_dim, block_size] for 8-bit ones: P @ V then reads V along its tokens
    k_scale  8-bit caches: float32 [blocks, kv_heads, block_size], one for each row that was quantised
    v_scale  the same

Token t of a sequence is row t % block_size of block `block_table[t // block_size]`; slot = block * block_size + row.
8-bit rows (int8, float8_e4m3fn) are symmetric: value = stored * scale, scale = max|row| / `QMAX[dtype]`, so no
calibration is needed. Attention masks scores, not loads: pages must never hold NaN, so they begin as zeros.
"""

from __future__ import annotations

import dataclasses

import torch

EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # --kv-cache-dtype
QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *QMAX)
BLOCK_SIZES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class KVCache:
    """One layer's pages; the layouts are at the top of this file."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def quantized(self) -> bool:
        return self.k.dtype in QMAX


def allocate(
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> KVCache:
    """Zeroed pages for one layer."""
    assert dtype in DTYPES and block_size in BLOCK_SIZES, f"no KV cache of {dtype} in blocks of {block_size}"
    rows = (blocks, kv_heads, block_size)
    k = torch.zeros(*rows, head_dim, dtype=dtype, device=device)
    if dtype not in QMAX:
        return KVCache(k, torch.zeros_like(k))
    v = torch.zeros(blocks, kv_heads, head_dim, block_size, dtype=dtype, device=device)
    return KVCache(k, v, torch.zeros(rows, device=device), torch.zeros(rows, device=device))


def bytes_per_token(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one token takes in one layer, scales included."""
    return 2 * kv_heads * (head_dim * dtype.itemsize + (4 if dtype in QMAX else 0))


def pack(k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> KVCache:
    """The float32 rows k, v [blocks, kv_heads, block_size, head_dim] as pages of `dtype`."""
    if dtype not in QMAX:
        return KVCache(k.to(dtype), v.to(dtype))
    k8, k_scale = quantize_rows(k, dtype)
    v8, v_scale = quantize_rows(v, dtype)
    return KVCache(k8, v8.transpose(2, 3).contiguous(), k_scale, v_scale)


def unpack(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 values of all pages: k, v [blocks, kv_heads, block_size, head_dim]."""
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k.float(), cache.v.float()
    v = cache.v.float().transpose(2, 3)
    return cache.k.float() * cache.k_scale[..., None], v * cache.v_scale[..., None]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 x [..., head_dim] -> 8-bit values of the same shape, float32 scales [...]; a row of zeros has scale 0."""
    scale = x.abs().amax(-1) / QMAX[dtype]
    stored = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0)
    return (stored.round() if dtype is torch.int8 else stored).to(dtype), scale
