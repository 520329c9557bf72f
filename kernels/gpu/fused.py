"""The element-wise work between matmuls, each piece in one launch that reads and writes every byte once.

    add_rmsnorm            residual += x;  out = residual / sqrt(mean(residual^2) + eps) * weight
    silu_mul               out = silu(gate) * up
    rope_and_cache_write   q and k: RMSNorm per head (optional), rotate pairs (2i, 2i + 1); k and v into their cache
    pages,
                           quantised there if the cache has 8 bits
    quantise_rows          x in 8 bits with a scale for each row (Rounded): what an 8-bit matmul reads; the first two
                           can write that, too

All arithmetic is float32, rounded once. Where a 4-bit matmul reads the output it is fp16: out = fp16(y * 2^-out_exp),
saturating; the matmul multiplies by 2^out_exp. Roofline: bytes over the copy bandwidth; at decode the launch itself.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.gpu.epilogue import EXP, Norm, squares_shape
from kernels.kv_cache import QMAX, KVCache

MOST_ROUNDED = 16384  # columns of a row that one program can round without spilling


@triton.jit
def _store(at, value, scale, mask):
    """Rounds to at's type; fp16 saturates and takes the scale."""
    if at.dtype.element_ty == tl.float16:
        value = tl.clamp(value * scale, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _quantise(x, QMAX: tl.constexpr, DTYPE: tl.constexpr, INTEGER: tl.constexpr):
    """Rows of x [BH, BD] -> 8-bit values, scales [BH]. A row of zeros has scale 0, one that is not finite has NaN: no
    value is NaN."""
    scale = tl.max(tl.abs(x), 1) / QMAX + tl.sum(x * 0.0, 1)  # a maximum alone would drop NaN
    x = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None])
    x = tl.where(x == x, x, 0.0)
    if INTEGER:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to nearest even
    return x.to(DTYPE), scale


@triton.jit
def _store_row(out, scales, row, s_out, i, y, out_scale, inside, QMAX: tl.constexpr):
    """Columns i of a row; or, of 8 bits, the whole row y (with zeros outside) and its scale."""
    at = out + row * s_out + i
    if QMAX == 0.0:
        _store(at, y, out_scale, inside)
    else:
        stored, scale = _quantise(y[None, :], QMAX, out.dtype.element_ty, out.dtype.element_ty == tl.int8)
        tl.store(at[None, :], stored, mask=inside[None, :])
        tl.store(scales + row + tl.arange(0, 1), scale)


@triton.jit
def add_rmsnorm_kernel(
    X, residual, weight, out, eps, out_scale, s_x, s_residual, s_out,
    H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, scales=None, QMAX: tl.constexpr = 0.0,
    squares=None, same_squares=None, SLOTS: tl.constexpr = 1,
):  # fmt: skip
    """One program a row. squares: of the row, for a norm between matmuls (epilogue.py)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    h = tl.load(residual + row * s_residual + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(X + row * s_x + i, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(residual.dtype.element_ty)
        tl.store(residual + row * s_residual + i, rounded, mask=inside)
        h = rounded.to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(h * h, 0)
    y = h * (1.0 / tl.sqrt_rn(total / H + eps)) * w
    _store_row(out, scales, row, s_out, i, y, out_scale, inside, QMAX)
    if squares is not None:
        slot = tl.arange(0, triton.next_power_of_2(SLOTS))
        parts = tl.where(slot == 0, total, 0.0)
        tl.store(squares + row * SLOTS + slot, parts, mask=slot < SLOTS)
        tl.store(same_squares + row * SLOTS + slot, parts, mask=slot < SLOTS)


@triton.jit
def silu_mul_kernel(
    gate_up, out, out_scale, s_in, s_out, INNER: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr,
    scales=None, QMAX: tl.constexpr = 0.0,
):  # fmt: skip
    """Grid (rows, INNER / BLOCK); of 8 bits (rows, 1)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < INNER
    at = gate_up + row * s_in + i // TURN * (2 * TURN) + i % TURN
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + TURN, mask=inside, other=0.0).to(tl.float32)
    _store_row(out, scales, row, s_out, i, gate / (1.0 + tl.exp(-gate)) * up, out_scale, inside, QMAX)


@triton.jit
def quantise_rows_kernel(X, out, scales, s_x, s_out, K: tl.constexpr, BLOCK: tl.constexpr, QMAX: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(X + row * s_x + i, mask=i < K, other=0.0).to(tl.float32)
    _store_row(out, scales, row, s_out, i, x, 1.0, i < K, QMAX)


@triton.jit
def rope_kernel(
    qkv, positions, slots, cos_sin, q_weight, k_weight, K, V, K_SCALE, V_SCALE, eps, s_qkv,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, H / BH + 2 HKV / BH, each rounded up): BH heads of q, then of k, then of v."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (H + BH - 1) // BH
    KV_PARTS: tl.constexpr = (HKV + BH - 1) // BH
    is_q = part < Q_PARTS
    is_v = part >= Q_PARTS + KV_PARTS
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:  # a padded row
        return
    first = part * BH
    heads = H
    column = 0
    if not is_q:
        first = (part - Q_PARTS) % KV_PARTS * BH
        heads = HKV
        column = H + HKV if is_v else H
    h = first + tl.arange(0, BH)
    d = tl.arange(0, BD)
    inside = (h < heads)[:, None] & (d < D)[None, :]
    at = qkv + token.to(tl.int64) * s_qkv + (column + h)[:, None] * D + d[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if not is_v:
        if NORM:
            w = tl.load((q_weight if is_q else k_weight) + d, mask=d < D, other=0.0).to(tl.float32)
            x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps))[:, None] * w[None, :]
        angle = tl.load(cos_sin + tl.load(positions + token).to(tl.int64) * D + d, mask=d < D, other=0.0)
        cos, sin = tl.split(angle.reshape(BD // 2, 2))
        a, b = tl.split(x.reshape(BH, BD // 2, 2))
        x = tl.join(a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :]).reshape(BH, BD)
    if is_q:
        tl.store(at, x.to(qkv.dtype.element_ty), mask=inside)
        return
    page = slot // PAGE
    row = slot % PAGE
    kv_row = (page * HKV + h) * PAGE + row  # [BH]
    if QMAX == 0.0:
        cache = (V if is_v else K) + kv_row[:, None] * D + d[None, :]
        tl.store(cache, x.to(K.dtype.element_ty), mask=inside)
    else:
        stored, scale = _quantise(x, QMAX, K.dtype.element_ty, K.dtype.element_ty == tl.int8)
        tl.store((V_SCALE if is_v else K_SCALE) + kv_row, scale, mask=h < HKV)
        if is_v:
            cache = V + ((page * HKV + h)[:, None] * D + d[None, :]) * PAGE + row
            tl.store(cache, stored, mask=inside)
        else:
            tl.store(K + kv_row[:, None] * D + d[None, :], stored, mask=inside)


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """Rows in 8 bits: q int8 or fp8 [M, K], scales float32 [M, 1]. They stand for q * scales."""

    q: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, m: int, k: int, dtype: torch.dtype, device: torch.device) -> Rounded:
        return cls(torch.empty(m, k, dtype=dtype, device=device), torch.empty(m, 1, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype


def _target(out: torch.Tensor | Rounded) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    return (out.q, out.scales, QMAX[out.dtype]) if isinstance(out, Rounded) else (out, None, 0.0)


def add_rmsnorm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | Rounded,
    *,
    eps: float,
    out_exp: int = 0,
    squares: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """residual [M, H] += x [M, H] in place (x None: unchanged), out [M, H] = RMSNorm(residual) * weight [H].

    Any float dtypes, rows contiguous. out fp16: saturating fp16(y * 2^-out_exp). squares: both sets of a Norm, written.
    """
    m, h = residual.shape
    out, scales, qmax = _target(out)
    assert out.shape == (m, h) and weight.shape == (h,) and (x is None or x.shape == (m, h)), (
        residual.shape,
        out.shape,
    )
    assert all(t is None or t.stride(-1) == 1 for t in (x, residual, weight, out))
    assert out_exp == 0 or out.dtype == torch.float16
    block = triton.next_power_of_2(h)
    add_rmsnorm_kernel[(m,)](
        residual if x is None else x, residual, weight, out, eps, 2.0**-out_exp,
        0 if x is None else x.stride(0), residual.stride(0), out.stride(0),
        h, block, x is not None, scales, qmax, *(squares or (None, None)), squares[0].shape[1] if squares else 1,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


def start_norm(residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> Norm:
    """The norm before the first of the matmuls that share their norms: out [M, H] is x of that matmul."""
    # Each in memory of its own: where a pointer may not be aligned, another variant is compiled.
    now, before = (torch.empty(squares_shape(residual), device=residual.device) for _ in range(2))
    add_rmsnorm(None, residual, weight, out, eps=eps, out_exp=EXP.value, squares=(now, before))
    return Norm(residual, now, before, eps)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | Rounded, *, out_exp: int = 0, turn: int | None = None) -> None:
    """out [M, I] = silu(gate) * up for gate_up [M, 2 I]: `turn` columns of gate, as many of up, and so on (None: I of
    each); out fp16: saturating fp16(y * 2^-out_exp)."""
    out, scales, qmax = _target(out)
    m, inner = out.shape
    assert gate_up.shape == (m, 2 * inner) and gate_up.stride(1) == out.stride(1) == 1, (gate_up.shape, out.shape)
    assert out_exp == 0 or out.dtype == torch.float16
    assert not qmax or inner <= MOST_ROUNDED, inner
    whole = triton.next_power_of_2(inner)
    block = whole if qmax else min(1024, whole)
    silu_mul_kernel[(m, triton.cdiv(inner, block))](
        gate_up, out, 2.0**-out_exp, gate_up.stride(0), out.stride(0), inner, block, turn or inner, scales, qmax,
        num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip


def rope_and_cache_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: KVCache,
    heads: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates q in place and writes k (rotated) and v into the cache; k and v in qkv stay as they were.

    qkv [T, (heads + 2 kv_heads) * D], rows contiguous; positions and slots int [T] (slot = block * block_size + row;
    negative: a padded row, left alone); cos_sin float32 [max_position, D / 2, 2]; q_weight, k_weight [D]: RMSNorm of
    each head before the rotation, with eps.
    """
    kv_heads, page, d = cache.k.shape[1:]
    tokens = qkv.shape[0]
    assert qkv.shape[1] == (heads + 2 * kv_heads) * d and qkv.stride(1) == 1, (qkv.shape, heads, kv_heads, d)
    assert positions.shape == slots.shape == (tokens,) and cos_sin.shape[1:] == (d // 2, 2) and d % 2 == 0
    assert cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and (q_weight is None) == (k_weight is None)
    bh, bd = min(8, triton.next_power_of_2(kv_heads)), triton.next_power_of_2(d)
    grid = (tokens, triton.cdiv(heads, bh) + 2 * triton.cdiv(kv_heads, bh))
    rope_kernel[grid](
        qkv, positions, slots, cos_sin, q_weight, k_weight, cache.k, cache.v, cache.k_scale, cache.v_scale, eps,
        qkv.stride(0), heads, kv_heads, d, page, bh, bd,
        q_weight is not None, QMAX.get(cache.k.dtype, 0.0), num_warps=max(1, bh * bd // 256),
    )  # fmt: skip


def quantise_rows(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    """out [M, K] (int8 or fp8) = x [M, K] / scales, rounded to nearest; scales float32 [M, 1]: the row's largest
    magnitude over 127 or 448. A row of zeros has scale 0."""
    m, k = x.shape
    assert out.shape == (m, k) and scales.shape == (m, 1) and scales.is_contiguous(), (x.shape, out.shape, scales.shape)
    assert x.stride(1) == out.stride(1) == 1
    block = triton.next_power_of_2(k)
    quantise_rows_kernel[(m,)](
        x, out, scales, x.stride(0), out.stride(0), k, block, QMAX[out.dtype], num_warps=min(max(block // 512, 1), 16)
    )


def add_rmsnorm_bytes_and_flops(m: int, h: int, itemsize: int = 2) -> tuple[int, int]:
    """x and residual read, residual and out written; about 5 operations an element."""
    return (4 * m * h + h) * itemsize, 5 * m * h


def silu_mul_bytes_and_flops(m: int, inner: int, itemsize: int = 2) -> tuple[int, int]:
    """gate and up read, out written; about 5 operations an element."""
    return 3 * m * inner * itemsize, 5 * m * inner


def rope_bytes_and_flops(
    tokens: int, heads: int, kv_heads: int, d: int, itemsize: int = 2, cache_itemsize: int = 2
) -> tuple[int, int]:
    """qkv read, q, k and v written (8-bit caches: with a float32 scale a row), a row of cos_sin; 3 operations a rotated
    element."""
    scales = 8 * kv_heads if cache_itemsize == 1 else 0
    per_token = (2 * heads + 2 * kv_heads) * d * itemsize + 2 * kv_heads * d * cache_itemsize + scales + 4 * d + 8
    return tokens * per_token, tokens * (heads + kv_heads) * d * 3
