"""Causal attention over the paged KV cache (kernels/kv_cache.py): `prefill` for many queries, `decode` for one.

For query i of a sequence, over the keys j <= i (and j > i - window):   out_i = sum_j softmax_j(scale * q_i . k_j) v_j

One pass over the keys in tiles of block_n, with a running maximum, sum and accumulator (online softmax). Exponents are
powers of two: exp(scale * x) = 2^(qs * x) with qs = scale * log2(e).

The G query heads that share a KV head fill the rows of one matrix product, so K and V are read once for all of them.
8-bit caches: tiles become 16-bit floats; a row's scale multiplies its column of scores (K) or of probabilities (V).

Roofline. decode: every K and V byte once, 2 G FLOPs an element: bound by memory. prefill: 4 D FLOPs for each visible
(query, key) pair and head: bound by the tensor cores from a few hundred tokens on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import kv_cache
from kernels.gpu.tiles import Gpu, current_gpu, tuned
from kernels.kv_cache import KVCache

MAX_SPLITS = 64  # parts that one sequence's keys are cut into at most
LONG_SPLIT = 2048  # tokens: a longer part would let one sequence hold up the batch
COMPUTE = {  # the matrix products' operands. 8-bit values are exact in both; these conversions are the cheap ones
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.bfloat16,
    torch.float8_e4m3fn: tl.float16,
}
V_GAIN = tl.constexpr(256.0)  # keeps probability * 8-bit scale out of float16's subnormals; divided out at the end


@triton.jit
def _load_tile(
    K, V, K_SCALE, V_SCALE, table, hk, n0, end,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    EIGHT: tl.constexpr, TMA: tl.constexpr, CT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [BD, BN], values [BN, BD] and their scales [BN] for tokens n0 .. n0 + BN of one sequence and KV head.

    MASKED: values from token `end` on read as zero. Their probabilities are zero, but what an earlier owner of the page
    has left there may be NaN; in 8-bit caches only in its scale."""
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    k_scale = tl.full([BN], 1.0, tl.float32)
    v_scale = k_scale
    if TMA:  # descriptors over rows [blocks * HKV * PAGE, D]; columns from D on read as zero
        row = (tl.load(table + n0 // PAGE) * HKV + hk) * PAGE + n0 % PAGE
        k = K.load([row, 0]).T
        v = V.load([row, 0])
        if MASKED:
            v = tl.where((n0 + n < end)[:, None], v, 0.0)
    else:
        if BN <= PAGE:  # the tile lies in one page
            row = (tl.load(table + n0 // PAGE).to(tl.int64) * HKV + hk) * PAGE
            t = tl.multiple_of(n0 % PAGE, BN) + n
            K += row * D
            V += row * D
            if EIGHT:
                K_SCALE += row
                V_SCALE += row
        else:  # several pages; behind the end the last one again
            page = tl.load(table + tl.minimum(n0 + n, end - 1) // PAGE).to(tl.int64)
            t = (page * HKV + hk) * PAGE + (n0 + n) % PAGE
        k_at = K + t[None, :] * D + d[:, None]
        if EIGHT:
            v_at = V + d[None, :] * PAGE + t[:, None]
            k_scale = tl.load(K_SCALE + t)
            if MASKED:
                v_scale = tl.load(V_SCALE + t, mask=n0 + n < end, other=0.0) * V_GAIN
            else:
                v_scale = tl.load(V_SCALE + t) * V_GAIN
        else:
            v_at = V + t[:, None] * D + d[None, :]
        if BD == D:
            k = tl.load(k_at).to(CT)
        else:
            k = tl.load(k_at, mask=(d < D)[:, None], other=0.0).to(CT)
        if MASKED and not EIGHT:
            v = tl.load(v_at, mask=(n0 + n < end)[:, None] & (d < D)[None, :], other=0.0).to(CT)
        elif BD == D:
            v = tl.load(v_at).to(CT)
        else:
            v = tl.load(v_at, mask=(d < D)[None, :], other=0.0).to(CT)
    return k, v, k_scale, v_scale


@triton.jit
def _attend(q, k, v, k_scale, v_scale, visible, peak, total, acc, qs, EIGHT: tl.constexpr, MASKED: tl.constexpr):
    """One tile of the online softmax. visible: bool, broadcasts to [rows, BN]; not read unless MASKED."""
    s = tl.dot(q, k, input_precision="ieee")
    if EIGHT:
        s *= k_scale[None, :]
    if MASKED:
        s = tl.where(visible, s, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * qs)
    shift = new_peak
    if MASKED:  # a row that has seen nothing yet: -inf - -inf is NaN
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = tl.exp2(s * qs - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    if EIGHT:
        p *= v_scale[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit(do_not_specialize=["splits", "min_tokens", "s_table"])
def decode_kernel(
    Q, K, V, K_SCALE, V_SCALE, TABLE, KV_LEN, OUT, PARTIAL, LSE, ARRIVED,
    scale, splits, min_tokens, s_table, s_q, s_out,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, EIGHT: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid (B, HKV, splits). Program (b, hk, i) attends to the i-th part of the sequence; the last to arrive combines.

    Parts have at least min_tokens, so short sequences use fewer than `splits`; programs without a part return at once.
    PARTIAL float32 [B, HKV, splits, G, D] normalised outputs, LSE float32 [B, HKV, splits, G] log2 of their sums,
    ARRIVED int32 [B, HKV] zeros, and zeros again at the end. BH >= G rows, BN tokens a tile, SPLITS >= splits.
    """
    b = tl.program_id(0)
    hk = tl.program_id(1)
    part = tl.program_id(2)
    n_kv = tl.load(KV_LEN + b)
    first = 0  # the first token that is visible
    if WINDOW > 0:
        first = tl.maximum(n_kv - WINDOW, 0)
    base = first // BN * BN
    per = tl.maximum(tl.cdiv(tl.cdiv(n_kv - base, splits), BN) * BN, min_tokens)
    active = tl.maximum(tl.cdiv(n_kv - base, per), 1)
    if part >= active:
        return
    lo = base + part * per
    hi = tl.minimum(lo + per, n_kv)
    h = tl.arange(0, BH)
    d = tl.arange(0, BD)
    n = tl.arange(0, BN)
    real = (h < G)[:, None] & (d < D)[None, :]
    head = hk * G + h
    q = tl.load(Q + b * s_q + head[:, None] * D + d[None, :], mask=real, other=0.0).to(CT)
    peak = tl.full([BH], -float("inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BD], tl.float32)
    qs = scale * 1.4426950408889634
    table = TABLE + b.to(tl.int64) * s_table
    for n0 in range(lo, hi, BN):
        k, v, k_scale, v_scale = _load_tile(
            K, V, K_SCALE, V_SCALE, table, hk, n0, hi, HKV, D, BD, PAGE, BN, EIGHT, False, CT, True
        )
        visible = n0 + n < hi
        if WINDOW > 0:
            visible &= n0 + n >= first
        peak, total, acc = _attend(q, k, v, k_scale, v_scale, visible[None, :], peak, total, acc, qs, EIGHT, True)
    acc *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]  # a padded row sees nothing: its output is 0
    if EIGHT:
        acc *= 1.0 / V_GAIN
    if active == 1:
        tl.store(OUT + b * s_out + head[:, None] * D + d[None, :], acc.to(OUT.dtype.element_ty), mask=real)
    else:
        pair = b * HKV + hk
        PARTIAL += pair.to(tl.int64) * splits * (G * D)
        LSE += pair * splits * G
        tl.store(PARTIAL + (part * G + h)[:, None] * D + d[None, :], acc, mask=real)
        tl.store(LSE + part * G + h, peak + tl.log2(total), mask=h < G)
        tl.debug_barrier()  # every thread's stores come before the one thread's atomic, which publishes them
        if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel") == active - 1:
            tl.store(ARRIVED + pair, 0)
            i = tl.arange(0, SPLITS)
            for g in range(G):
                e = tl.load(LSE + i * G + g, mask=i < active, other=-float("inf"), cache_modifier=".cg")
                w = tl.exp2(e - tl.max(e, 0))
                some = (i < active)[:, None] & (d < D)[None, :]
                parts = tl.load(
                    PARTIAL + (i * G + g)[:, None] * D + d[None, :], mask=some, other=0.0, cache_modifier=".cg"
                )
                out = tl.sum(parts * w[:, None], 0) / tl.sum(w, 0)
                tl.store(OUT + b * s_out + (hk * G + g) * D + d, out.to(OUT.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["s_table"])
def prefill_kernel(
    Q, K, V, K_SCALE, V_SCALE, TABLE, CU_Q, KV_LEN, OUT,
    scale, s_table, s_q, s_out,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    WINDOW: tl.constexpr, EIGHT: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the longest query, HKV, B). BM rows are BM // G query positions x G heads, position-major; a G
    that does not divide BM leaves rows over, which must not store. K, V: TMA descriptors of [BN, BD], or pointers."""
    b = tl.program_id(2)
    hk = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest work first
    q0 = tl.load(CU_Q + b)
    q_len = tl.load(CU_Q + b + 1) - q0
    n_kv = tl.load(KV_LEN + b)
    BQ: tl.constexpr = BM // G
    if tile * BQ >= q_len:
        return
    r = tl.arange(0, BM)
    d = tl.arange(0, BD)
    n = tl.arange(0, BN)
    row = tile * BQ + r // G
    head = hk * G + r % G
    real = ((row < q_len) & (r < BQ * G))[:, None] & (d < D)[None, :]
    at = (q0 + row).to(tl.int64)[:, None]
    q = tl.load(Q + at * s_q + head[:, None] * D + d[None, :], mask=real, other=0.0).to(CT)
    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    qs = scale * 1.4426950408889634
    table = TABLE + b.to(tl.int64) * s_table
    # Keys that the tile's rows see, in multiples of BN:   lo | left edge of the window | inside | diagonal | hi
    first = n_kv - q_len + tile * BQ  # position of the first row
    hi = tl.minimum(first + BQ, n_kv)
    position = (first + r // G)[:, None]
    inside = 0
    diagonal = (first + 1) // BN * BN
    if WINDOW > 0:
        inside = tl.cdiv(tl.maximum(hi - WINDOW, 0), BN) * BN
        diagonal = tl.maximum(diagonal, inside)
        for n0 in range(tl.maximum(first + 1 - WINDOW, 0) // BN * BN, inside, BN):
            k, v, k_scale, v_scale = _load_tile(
                K, V, K_SCALE, V_SCALE, table, hk, n0, hi, HKV, D, BD, PAGE, BN, EIGHT, TMA, CT, True
            )
            visible = ((n0 + n)[None, :] <= position) & ((n0 + n)[None, :] > position - WINDOW)
            peak, total, acc = _attend(q, k, v, k_scale, v_scale, visible, peak, total, acc, qs, EIGHT, True)
    for n0 in range(inside, diagonal, BN):  # every row sees the whole tile
        k, v, k_scale, v_scale = _load_tile(
            K, V, K_SCALE, V_SCALE, table, hk, n0, hi, HKV, D, BD, PAGE, BN, EIGHT, TMA, CT, False
        )
        peak, total, acc = _attend(q, k, v, k_scale, v_scale, True, peak, total, acc, qs, EIGHT, False)
    for n0 in range(diagonal, hi, BN):
        k, v, k_scale, v_scale = _load_tile(
            K, V, K_SCALE, V_SCALE, table, hk, n0, hi, HKV, D, BD, PAGE, BN, EIGHT, TMA, CT, True
        )
        visible = (n0 + n)[None, :] <= position
        if WINDOW > 0:
            visible &= (n0 + n)[None, :] > position - WINDOW
        peak, total, acc = _attend(q, k, v, k_scale, v_scale, visible, peak, total, acc, qs, EIGHT, True)
    acc *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]  # leftover rows may see nothing
    if EIGHT:
        acc *= 1.0 / V_GAIN
    tl.store(OUT + at * s_out + head[:, None] * D + d[None, :], acc.to(OUT.dtype.element_ty), mask=real)


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    """block_n tokens a tile."""

    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class PrefillTile:
    """block_m rows (query positions x heads of a group) by block_n tokens."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Splits:
    """Decode cuts a sequence's keys into at most `count` parts of at least min_tokens (a multiple of the tile)."""

    count: int
    min_tokens: int


@dataclasses.dataclass(frozen=True)
class DecodeWorkspace:
    """What the parts leave for the last one, laid out as decode_kernel says. `arrived` is zero between calls."""

    partial: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor


def decode_config(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, gpu: Gpu
) -> DecodeTile:
    """The tile for caches of `dtype`; the same for every batch."""
    block_n = 32 if dtype is torch.float32 else 64
    if dtype in kv_cache.QMAX:  # V's tokens are contiguous within a page only
        block_n = min(block_n, block_size)
    tile = DecodeTile(block_n, 4, 3)
    return tuned(gpu, "decode", case_name(heads, kv_heads, head_dim, block_size, dtype, gpu), tile)


def prefill_config(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, gpu: Gpu
) -> PrefillTile:
    """The tile for caches of `dtype`; the same for every batch."""
    rows = triton.next_power_of_2(heads // kv_heads)
    block_n = 64
    if gpu.capability < 90 and head_dim > 64:  # the operands lie in registers there: a larger tile would spill
        block_n = 32
    if dtype in kv_cache.QMAX:  # as in decode
        block_n = min(block_n, block_size)
    tile = PrefillTile(max(128, rows), block_n, 8, 2)
    if dtype is torch.float32:
        tile = PrefillTile(max(64, rows), 32, 8, 2)
    return tuned(gpu, "prefill", case_name(heads, kv_heads, head_dim, block_size, dtype, gpu), tile)


def decode_splits(batch: int | None, kv_heads: int, max_len: int, gpu: Gpu) -> Splits:
    """Enough parts to fill the GPU three times over; long ones when there are many sequences, never longer than
    LONG_SPLIT while MAX_SPLITS allows. batch None: the same for every batch; a row's bits do not depend on it then."""
    if batch is None:
        return Splits(min(MAX_SPLITS, triton.cdiv(max_len, 512)), 512)
    wanted = triton.cdiv(3 * gpu.multiprocessors, batch * kv_heads)
    min_tokens = max(128, LONG_SPLIT // triton.next_power_of_2(wanted))
    count = max(wanted, triton.cdiv(max_len, LONG_SPLIT))
    return Splits(min(MAX_SPLITS, count, triton.cdiv(max_len, min_tokens)), min_tokens)


def decode_workspace(
    max_batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_len: int,
    device: torch.device,
    invariant: bool = False,
) -> DecodeWorkspace:
    """Room for every batch up to max_batch of sequences up to max_len tokens (invariant: see decode_splits)."""
    gpu = current_gpu()
    batches = range(1, max_batch + 1)
    parts = max(b * decode_splits(None if invariant else b, kv_heads, max_len, gpu).count for b in batches)
    return DecodeWorkspace(
        torch.empty(parts * heads * head_dim, device=device),
        torch.empty(parts * heads, device=device),
        torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
    )


def decode(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    kv_len: torch.Tensor,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    scale: float,
    window: int = 0,
    splits: Splits | None = None,
    tile: DecodeTile | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence, its last token, whose key and value are in the cache already. One launch.

    q, out [B, heads, head_dim], rows may be strided; block_table int32 [B, P] covers the longest sequence; kv_len
    int32 [B] counts the query's token; 0 marks a padded row, whose output is zeros. window: tokens it sees, 0: all.
    splits: default decode_splits(B, ...) for sequences as long as the block table; tile: default decode_config(...).
    Returns out.
    """
    batch, heads, head_dim = q.shape
    kv_heads, gpu = cache.k.shape[1], current_gpu()
    _check(q, cache, block_table, kv_len, out)
    tile = tile or decode_config(heads, kv_heads, head_dim, cache.block_size, cache.k.dtype, gpu)
    splits = splits or decode_splits(batch, kv_heads, block_table.shape[1] * cache.block_size, gpu)
    assert splits.count <= MAX_SPLITS and splits.min_tokens % tile.block_n == 0, f"{splits} for {tile}"
    assert workspace.lse.numel() >= batch * heads * splits.count, "workspace too small"
    assert workspace.arrived.numel() >= batch * kv_heads, "workspace too small"
    decode_kernel[(batch, kv_heads, splits.count)](
        q, cache.k, cache.v, cache.k_scale, cache.v_scale, block_table, kv_len, out,
        workspace.partial, workspace.lse, workspace.arrived,
        scale, splits.count, splits.min_tokens, block_table.stride(0), q.stride(0), out.stride(0),
        **_constants(q, cache, window), BH=max(16, triton.next_power_of_2(heads // kv_heads)),
        BN=tile.block_n, SPLITS=MAX_SPLITS, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def prefill(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    out: torch.Tensor,
    *,
    max_q: int,
    scale: float,
    window: int = 0,
    tile: PrefillTile | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens, whose keys and values are in the cache already. One launch.

    q, out [T, heads, head_dim], rows may be strided; sequence b owns rows cu_q[b]:cu_q[b+1] (int32 [B+1]), at most
    max_q, the last of its kv_len[b] positions (int32 [B]); block_table int32 [B, P]. window: tokens a query sees,
    itself included, 0: all; tile: default prefill_config(...). Returns out.
    """
    heads, head_dim = q.shape[1:]
    blocks, kv_heads, block_size, _ = cache.k.shape
    gpu, batch = current_gpu(), kv_len.shape[0]
    _check(q, cache, block_table, kv_len, out)
    assert cu_q.dtype == torch.int32 and cu_q.shape == (batch + 1,), "cu_q"
    tile = tile or prefill_config(heads, kv_heads, head_dim, block_size, cache.k.dtype, gpu)
    tma = uses_tma(cache.k.dtype, block_size, tile, gpu)
    k, v = cache.k, cache.v
    constants = _constants(q, cache, window)
    if tma:
        assert blocks * kv_heads * block_size < 2**31, "a descriptor counts rows in 32 bits"
        box = [tile.block_n, constants["BD"]]
        k, v = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k, v))
    grid = (triton.cdiv(max_q, tile.block_m // (heads // kv_heads)), kv_heads, batch)
    prefill_kernel[grid](
        q, k, v, cache.k_scale, cache.v_scale, block_table, cu_q, kv_len, out,
        scale, block_table.stride(0), q.stride(0), out.stride(0),
        **constants, BM=tile.block_m, BN=tile.block_n, TMA=tma, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def uses_tma(dtype: torch.dtype, block_size: int, tile: PrefillTile, gpu: Gpu) -> bool:
    """Whether prefill reads through Hopper's tensor memory accelerator: unquantised tiles that lie in one page."""
    return gpu.capability >= 90 and dtype not in kv_cache.QMAX and block_size % tile.block_n == 0


def bytes_and_flops(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int = 0,
) -> tuple[int, int]:
    """The least bytes one layer must move (each visible key and value once, queries in, outputs out) and its FLOPs
    (two products over the visible pairs). decode is q_lens of 1."""
    window = window or max(kv_lens)
    tokens = sum(min(n, window + q - 1) for q, n in zip(q_lens, kv_lens, strict=True))
    pairs = sum(min(i + 1, window) for q, n in zip(q_lens, kv_lens, strict=True) for i in range(n - q, n))
    io = 2 * sum(q_lens) * heads * head_dim * q_dtype.itemsize
    return io + tokens * kv_cache.bytes_per_token(kv_heads, head_dim, cache_dtype), 4 * pairs * heads * head_dim


def _constants(q: torch.Tensor, cache: KVCache, window: int) -> dict[str, Any]:
    heads, head_dim = q.shape[1:]
    kv_heads = cache.k.shape[1]
    return {
        "HKV": kv_heads, "G": heads // kv_heads, "D": head_dim, "BD": triton.next_power_of_2(head_dim),
        "PAGE": cache.block_size, "WINDOW": window, "EIGHT": cache.quantized, "CT": COMPUTE[cache.k.dtype],
    }  # fmt: skip


def case_name(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, gpu: Gpu) -> str:
    """The name of a case in the tuned JSON."""
    if dtype is torch.float8_e4m3fn and gpu.capability < 89:
        raise ValueError(f"{gpu.name} (sm_{gpu.capability}) has no float8: use an int8 KV cache")
    return f"{str(dtype).removeprefix('torch.')} d{head_dim} g{heads // kv_heads} block{block_size}"


def _check(q: torch.Tensor, cache: KVCache, block_table: torch.Tensor, kv_len: torch.Tensor, out: torch.Tensor) -> None:
    """The caller's promises that the kernels rely on."""
    _, heads, head_dim = q.shape
    batch = kv_len.shape[0]
    assert out.shape == q.shape and out.dtype == q.dtype, "out"
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in (q, out)), "heads must be contiguous"
    assert cache.k.is_contiguous() and cache.v.is_contiguous() and cache.k.shape[3] == head_dim, "cache"
    assert heads % cache.k.shape[1] == 0 and head_dim % 16 == 0, "heads"
    assert block_table.dtype == kv_len.dtype == torch.int32 and block_table.shape[0] == batch, "block table"
    assert block_table.stride(1) == 1, "block table"
