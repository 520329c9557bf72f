"""Y[M, N] = X[M, K] @ W[N, K]^T with 4-bit weights W = q * d + m (or (q - z) * d) per group of 32, 64, 128 or K.

One kernel for every 4-bit format, laid out as in w4_layout.py. The product is computed transposed, Y^T = W X^T: W,
which must be dequantised in registers anyway, is the tensor core's left operand and never goes through shared memory,
and M is the instruction's small side (8, 16, ... 256), so a batch of 3 wastes 13 columns of 16 and not 61 rows of 64.

    word --and--> two q as fp16 subnormals --fma d, m--> two weights * 2^-e      8 weights: 1 rotate, 4 ands, 4 fmas
    fp16 dot, float32 sum; * 2^e on the way out

Each weight is rounded once, to RN16(w * 2^-e): relative error of a layer 1.9e-4 (bf16 weights: 1.7e-3).

Roofline: at small M the weight's bytes, N * K * (1/2 + 4/G), over the memory bandwidth; the tile's loop must then cost
fewer instructions a weight than the card issues in that time (H100: 4.9 at 4.5 bits, 6.2 at 5 bits). To fill the card
at small M the K axis is split (split_k.py). Above some hundred rows the matrix rate is the limit and no fused kernel
reaches cuBLAS: dequantise once into a scratch buffer and call torch.mm.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu import split_k
from kernels.gpu.epilogue import PLAIN, Epilogue
from kernels.gpu.split_k import Tile, Workspace
from kernels.gpu.tiles import Gpu, bucket, current_gpu, tuned
from kernels.gpu.w4_layout import W4

CROSSOVER = (
    800  # rows above which dequantising once and calling torch.mm is expected to be faster; not yet measured by us
)
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def _dequantise_asm(zero_point):
    """PTX: word $8 and (scale | minimum << 16) of rows a and b, $9 and $10, to 8 fp16. HFMA2 picks halves, so the moves
    are free."""
    code = [f"mov.b32 {{l, h}}, ${9 + i}; mov.b32 d{i}, {{l, l}}; mov.b32 m{i}, {{h, h}};" for i in range(2)]
    for i in range(4):
        if i == 2:
            code.append("shf.r.wrap.b32 t, $8, $8, 8;")
        code.append(f"and.b32 r, {'$8' if i < 2 else 't'}, {'0x003c003c' if i % 2 else '0x03c003c0'};")
        if zero_point:
            code.append(f"add.rn.f16x2 r, r, m{i % 2}; mul.rn.f16x2 r, r, d{i % 2};")
        else:
            code.append(f"fma.rn.f16x2 r, r, d{i % 2}, m{i % 2};")
        code.append(f"mov.b32 {{${2 * i},${2 * i + 1}}}, r;")
    return "{ .reg .b16 l, h; .reg .b32 t, r, d0, m0, d1, m1; " + " ".join(code) + " }"


@triton.jit
def _half(r, i: tl.constexpr):
    return ((r >> (16 * i)) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _two_weights(r, c, ZERO_POINT: tl.constexpr):
    d = _half(c, 0)
    m = _half(c, 1)
    if ZERO_POINT:
        low = (_half(r, 0) + m) * d
        high = (_half(r, 1) + m) * d
    else:
        low = _half(r, 0) * d + m
        high = _half(r, 1) * d + m
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def _eight_weights(b, c0, c1, ZERO_POINT: tl.constexpr):
    """A word and the pairs of its rows -> 8 fp16 weights: a0, a1, b0, b1, a2, a3, b2, b3."""
    if INTERPRET:  # it has no inline assembly
        t = (b >> 8) | (b << 24)
        w0, w1 = _two_weights(b & 0x03C003C0, c0, ZERO_POINT)
        w2, w3 = _two_weights(b & 0x003C003C, c1, ZERO_POINT)
        w4, w5 = _two_weights(t & 0x03C003C0, c0, ZERO_POINT)
        w6, w7 = _two_weights(t & 0x003C003C, c1, ZERO_POINT)
        return w0, w1, w2, w3, w4, w5, w6, w7
    else:
        return tl.inline_asm_elementwise(
            _dequantise_asm(ZERO_POINT),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            args=[b, c0, c1],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _weights(
    words, pairs, k0, rows, s_words, s_pairs,
    GROUP: tl.constexpr, ZERO_POINT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Loads and dequantises W[16 * rows, k0 : k0 + BK] -> fp16 [BN, BK]. rows [BN / 16] are rows of `words`."""
    tl.static_assert(BK % 64 == 0 and (BK % GROUP == 0 or GROUP % BK == 0), "tile and group do not fit each other")
    G: tl.constexpr = BN // 16
    KT: tl.constexpr = BK // 64
    GI: tl.constexpr = 64 // GROUP if GROUP < 64 else 1  # groups in 64 of k
    KO: tl.constexpr = (
        (BK // GROUP if BK > GROUP else 1) if GROUP > 64 else KT
    )  # pairs of the tile, in steps of max(64, G)
    rw = tl.arange(0, KT * 128)
    rd = tl.arange(0, KO * GI * 16)
    b = tl.load(words + rows[:, None] * s_words + (k0 * 2 + rw)[None, :], eviction_policy="evict_first")
    c = tl.load(pairs + rows[:, None] * s_pairs + (k0 // GROUP * 16 + rd)[None, :], eviction_policy="evict_first")
    # The pairs, spread over the words they belong to: registers only, no exchange between threads.
    c = c.reshape(G, KO, 1, 8, 1, GI, 1, 2).broadcast_to(G, KO, KT // KO, 8, 4, GI, 4 // GI, 2)
    c0, c1 = tl.split(c.reshape(G, KT * 128, 2))
    w0, w1, w2, w3, w4, w5, w6, w7 = _eight_weights(b, c0, c1, ZERO_POINT)
    w = tl.join(tl.join(tl.join(w0, w1), tl.join(w2, w3)), tl.join(tl.join(w4, w5), tl.join(w6, w7)))
    w = w.reshape(G, KT, 8, 4, 4, 2, 2, 2)  # n/16, k/64, n%8, lane, k/16%4, k%2, n/8%2, k pair
    w = w.trans(0, 6, 2, 1, 4, 7, 3, 5) if KW == 2 else w.trans(0, 6, 2, 1, 4, 3, 7, 5)
    return w.reshape(BN, BK)


@triton.jit(do_not_specialize=["M", "split"])
def w4a16_kernel(
    X, words, pairs, Y, partials, counters, M, N, K, split, alpha, s_x, s_words, s_pairs, s_y,
    GROUP: tl.constexpr, ZERO_POINT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, KW: tl.constexpr, X_EXP: tl.constexpr,
    now=None, before=None, residual=None, norm_weight=None, s_residual=0, eps=0.0, out_scale=1.0,
    H: tl.constexpr = 0, SILU: tl.constexpr = False,
):  # fmt: skip
    """Grid (N / BN, M / BM, split). X fp16, or bf16, which becomes fp16(x * 2^-X_EXP) here. now ...: epilogue.py."""
    pn = tl.program_id(0)
    pm = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rows = tl.minimum(pn * (BN // 16) + tl.arange(0, BN // 16), N // 16 - 1)  # N need not be a multiple of BN
    in_m = rm < M
    low, high = split_k.share_of_k(K, split, BK, SPLIT)
    acc = tl.zeros([BN, BM], tl.float32)
    for k0 in range(low, high, BK):
        w = _weights(words, pairs, k0, rows, s_words, s_pairs, GROUP, ZERO_POINT, BN, BK, KW)
        x = tl.load(
            X + rm[None, :] * s_x + (k0 + rk)[:, None], mask=in_m[None, :], other=0.0, eviction_policy="evict_last"
        )
        if X.dtype.element_ty == tl.bfloat16:  # costs the overlap of dequantisation and dot: let x be written as fp16
            x = (x.to(tl.float32) * (0.5**X_EXP)).to(tl.float16)
        acc = tl.dot(w, x, acc)
    split_k.store(
        acc, alpha, Y, rn, rm, M, N, s_y, partials, counters, split,
        now, before, residual, norm_weight, s_residual, eps, out_scale, BM, BN, SPLIT, H, SILU,
    )  # fmt: skip


@triton.jit
def dequantise_kernel(
    words, pairs, Y, N, alpha, s_words, s_pairs, s_y,
    GROUP: tl.constexpr, ZERO_POINT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, K / BK)."""
    pn = tl.program_id(0)
    k0 = tl.program_id(1) * BK
    rn = pn * BN + tl.arange(0, BN)
    rows = tl.minimum(pn * (BN // 16) + tl.arange(0, BN // 16), N // 16 - 1)
    w = _weights(words, pairs, k0, rows, s_words, s_pairs, GROUP, ZERO_POINT, BN, BK, KW)
    out = Y + rn[:, None].to(tl.int64) * s_y + (k0 + tl.arange(0, BK))[None, :]
    tl.store(out, (w.to(tl.float32) * alpha).to(Y.dtype.element_ty), mask=(rn < N)[:, None])


def shared_memory(tile: Tile, group: int) -> int:
    """Bytes of shared memory that the pipelined loads of a tile need; what is left of the card's is not touched by the
    kernel."""
    pair_words = tile.block_n * max(1, tile.block_k // group)
    stage = tile.block_n * tile.block_k // 2 + pair_words * 4 + tile.block_m * tile.block_k * 2
    return stage * tile.num_stages


@functools.lru_cache(maxsize=4096)
def config(m: int, n: int, k: int, group: int, x_dtype: torch.dtype, gpu: Gpu) -> Tile | None:
    """The tile for x [m, k] and a weight [n, k]; None: above the cross-over, dequantise and use torch.mm.

    Within a bucket only `split` may depend on m, which is a run-time argument: a batch that grows there compiles
    nothing.
    """
    if m > CROSSOVER:
        return None
    rows = bucket(m)
    large = n * k >= 4 << 20
    if rows <= 32 or (rows == 64 and gpu.capability // 10 == 9):
        block_m, block_n, block_k, warps, stages = rows, 128 if large else 64, 128 if large else 64, 4, 4
    elif gpu.capability // 10 == 9 and large:
        block_m, block_n, block_k, warps, stages = 128, 256 if rows > 128 else 128, 64, 8, 3
    else:
        block_m, block_n, block_k, warps, stages = 64, 128, 64, 4, 3
    if k % block_k or (block_k % group and group % block_k):
        block_k = 64
    tile = Tile(block_m, block_n, block_k, 1, warps, stages)
    tile = split_k.fit(tile, m, n, k, gpu, lambda tile: shared_memory(tile, group))
    return split_k.limited(tuned(gpu, "w4a16", case_name(m, n, k, group, x_dtype), tile), m, n, k, gpu)


def case_name(m: int, n: int, k: int, group: int, x_dtype: torch.dtype) -> str:
    """The name of a case in the tuned JSON."""
    return f"m{bucket(m)} n{n} k{k} g{group} {str(x_dtype).removeprefix('torch.')}"


def w4a16(
    x: torch.Tensor, weight: W4, out: torch.Tensor, workspace: Workspace, *, x_exp: int = 0, tile: Tile | None = None,
    epilogue: Epilogue = PLAIN,
) -> None:  # fmt: skip
    """out [M, N] = x [M, K] @ weight^T * 2^x_exp, and what the epilogue makes of it, in one launch.

    x fp16 (the fast path; the kernel that made it wrote x * 2^-x_exp) or bf16 (scaled by 2^-x_exp here, so that fp16
    holds it), rows contiguous. out fp16, bf16 or float32. tile: instead of `config`'s, e.g. the same one whatever M is
    for batch invariance.
    """
    m, k = x.shape
    assert k == weight.k and out.shape == epilogue.out_shape(m, weight.n), (x.shape, weight.n, weight.k, out.shape)
    assert x.dtype in (torch.float16, torch.bfloat16) and x.stride(1) == 1 and out.stride(1) == 1
    tile = tile or config(m, weight.n, k, weight.group, x.dtype, current_gpu())
    assert tile is not None, f"M = {m} is above the cross-over: dequantise and use torch.mm"
    assert k % tile.block_k == 0 and weight.n % 16 == 0, (weight.n, k, tile)
    grid = split_k.grid_of(tile, m, weight.n, workspace)
    bf16 = x.dtype == torch.bfloat16
    w4a16_kernel[grid](
        x, weight.words, weight.pairs, out, workspace.partials, workspace.counters,
        m, weight.n, k, tile.split, weight.alpha * 2.0**x_exp * epilogue.factor,
        x.stride(0), weight.words.stride(0), weight.pairs.stride(0), out.stride(0),
        weight.group, weight.zero_point, tile.block_m, tile.block_n, tile.block_k, tile.split > 1, weight.kw,
        x_exp if bf16 else 0, **epilogue.arguments(tile.block_n), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def dequant_w4(weight: W4, out: torch.Tensor, *, x_exp: int = 0) -> None:
    """out [N, K] = the weight * 2^x_exp in fp16, bf16 or float32; one launch."""
    assert out.shape == (weight.n, weight.k) and out.stride(1) == 1, out.shape
    block_n = block_k = 64
    dequantise_kernel[(-(-weight.n // block_n), weight.k // block_k)](
        weight.words, weight.pairs, out, weight.n, weight.alpha * 2.0**x_exp,
        weight.words.stride(0), weight.pairs.stride(0), out.stride(0),
        weight.group, weight.zero_point, block_n, block_k, weight.kw, num_warps=4,
    )  # fmt: skip


def bytes_and_flops(m: int, n: int, k: int, group: int, out_bytes: int = 2) -> tuple[int, int]:
    """Bytes that must move (weight, x, out, each once) and floating-point operations of one product."""
    return n * k // 2 + n * (k // group) * 4 + m * k * 2 + m * n * out_bytes, 2 * m * n * k
