"""Y[M, N] = X[M, K] @ W[N, K]^T with weights of 8 bits (int8 or fp8 e4m3), as they lie in the file: row by row.

    w8a16   X fp16 or bf16.  W = q d, or q d + m per group of columns; 5- and 6-bit formats lie in int8 as well
    w8a8    X int8 or fp8 with a scale for each row (`quantise_rows`), W of the same type with a scale for each row

As in linear_w4.py the product is Y^T = W X^T, so that M is the instruction's small side, and K is split at small M.

    w8a16, a scale a row   q becomes a 16-bit float, which holds it exactly; the sums take the scale. No rounding
    w8a16, groups          float32 q d + m, rounded once to fp16 as w * 2^-e: relative error of a layer 2e-4
    w8a8                   whole numbers in int32: exact; fp8: float32 sums, promoted after each tile of K

Scales and minima are float32: d s of a K-quant (11 + 8 bits) is exact, where fp16 would round it.

fp8 without the instructions for it (before sm_89) is read by its bits: s eeee mmm, moved to fp16's place, is the same
number times 2^-8, subnormals too (and NaN, which no weight should be, is 480). fp8 x fp8 needs sm_89.

Roofline: N * K bytes and the scales over the memory bandwidth. An H100 at 3 TB/s can issue 9.7 thread-instructions a
weight, an A100 12. Large M: int8 through torch._int_mm, fp8 through torch._scaled_mm, w8a16 dequantised for torch.mm.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl

from kernels.formats import Weight
from kernels.gpu import split_k
from kernels.gpu.epilogue import PLAIN, Epilogue
from kernels.gpu.fused import Rounded, quantise_rows
from kernels.gpu.split_k import Tile, Workspace
from kernels.gpu.tiles import Gpu, bucket, current_gpu, tuned

CROSSOVER = 800  # rows above which w8a16 dequantises once and calls torch.mm, and
LIBRARY = 512  # rows above which w8a8 is torch's; neither is measured yet
FP8 = torch.float8_e4m3fn
TOP = {torch.int8: 128.0, FP8: 448.0}


@dataclasses.dataclass(frozen=True)
class W8:
    """A weight [n, k]: (q d + m) * alpha.

    q int8 or fp8 [n, k]; d float32 [n, k / group]; m the same or None. per_row: group is k and m None: d is a factor of
    the sums. as_bits: q is int8 that holds fp8, for GPUs without it (d is then 2^8 larger). eight_bit_input: w8a8.
    order: of the columns, as in W4.
    """

    q: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None
    alpha: float
    group: int
    as_bits: bool = False
    eight_bit_input: bool = False
    order: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]

    @property
    def per_row(self) -> bool:
        return self.group == self.k and self.m is None

    @property
    def name(self) -> str:
        return f"{'fp8' if self.as_bits else str(self.q.dtype).removeprefix('torch.')} g{self.group}"

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.d, self.m) if x is not None)


def fits(weight: Weight) -> bool:
    """Whether `pack` takes it: quantised, K a multiple of 32, and groups that tiles of K are multiples or parts of."""
    k = weight.q.shape[1]
    return weight.d is not None and weight.q.itemsize == 1 and bool(_block_ks(k, weight.group))


def takes_eight_bits(weight: Weight, capability: int) -> bool:
    """Whether it is made for 8-bit activations and `w8a8` has it: a scale a row, and fp8 if the GPU multiplies it."""
    per_row = weight.m is None and weight.z is None and weight.order is None and weight.group >= weight.q.shape[1]
    return weight.eight_bit_input and fits(weight) and per_row and (weight.q.dtype != FP8 or capability >= 89)


def _block_ks(k: int, group: int) -> list[int]:
    return [b for b in (128, 64, 32) if k % b == 0 and (b % group == 0 or group % b == 0 or group >= k)]


def pack(weight: Weight, capability: int) -> W8:
    """On weight's device. Products of groups are scaled so that the largest weight is near fp16's end."""
    q, d, m = weight.q.contiguous(), weight.d, weight.minimum()
    assert d is not None and fits(weight), (q.shape, weight.group)
    if q.dtype == torch.uint8:  # of 4 or 5 bits
        q = q.view(torch.int8)
    group, d = min(weight.group, q.shape[1]), d.float()
    per_row = group == q.shape[1] and m is None
    top = 0.0 if per_row else d.abs().max().item() * TOP[q.dtype] + (0.0 if m is None else m.abs().max().item())
    e = math.ceil(math.log2(top)) - 15 if top else 0
    as_bits = q.dtype == FP8 and capability < 89
    d = (d * 2.0 ** ((8 if as_bits else 0) - e)).contiguous()
    m = None if m is None else (m * 2.0**-e).contiguous()
    eight = takes_eight_bits(weight, capability)
    return W8(q.view(torch.int8) if as_bits else q, d, m, 2.0**e, group, as_bits, eight)


@triton.jit
def _weights(
    W, D, MIN, rows, k0, s_w, s_d,
    GROUP: tl.constexpr, SCALED: tl.constexpr, HAS_MIN: tl.constexpr, AS_BITS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W[rows, k0 : k0 + BK] as float32 [BN, BK], with scales and minima if SCALED."""
    w = tl.load(W + rows[:, None] * s_w + (k0 + tl.arange(0, BK))[None, :], eviction_policy="evict_first")
    if AS_BITS:  # the sign goes to bit 15 and, being extended, to 14, which is cleared
        w = ((w.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
    w = w.to(tl.float32)
    if SCALED:
        KO: tl.constexpr = BK // GROUP if BK > GROUP else 1
        at = rows[:, None] * s_d + (k0 // GROUP + tl.arange(0, KO))[None, :]
        d = tl.load(D + at, eviction_policy="evict_first")
        w *= d[:, :, None].broadcast_to(BN, KO, BK // KO).reshape(BN, BK)
        if HAS_MIN:
            m = tl.load(MIN + at, eviction_policy="evict_first")
            w += m[:, :, None].broadcast_to(BN, KO, BK // KO).reshape(BN, BK)
    return w


@triton.jit(do_not_specialize=["M", "split"])
def w8_kernel(
    X, x_scales, W, D, MIN, Y, partials, counters, M, N, K, split, alpha, s_x, s_w, s_d, s_y,
    GROUP: tl.constexpr, PER_ROW: tl.constexpr, HAS_MIN: tl.constexpr, AS_BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, X_EXP: tl.constexpr,
    now=None, before=None, residual=None, norm_weight=None, s_residual=0, eps=0.0, out_scale=1.0,
    H: tl.constexpr = 0, SILU: tl.constexpr = False,
):  # fmt: skip
    """Grid (N / BN, M / BM, split). X fp16 or bf16 (with groups it becomes fp16(x * 2^-X_EXP) here), int8 or fp8; only
    those read x_scales. partials: of the sums' type. now ...: epilogue.py."""
    rm = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)  # w8a8 may have any number of rows
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rows = tl.minimum(rn, N - 1)  # N need not be a multiple of BN
    in_m = rm < M
    EIGHT: tl.constexpr = X.dtype.element_ty.primitive_bitwidth == 8
    low, high = split_k.share_of_k(K, split, BK, SPLIT)
    acc = tl.zeros([BN, BM], partials.dtype.element_ty)
    for k0 in range(low, high, BK):
        x = tl.load(
            X + rm[None, :] * s_x + (k0 + rk)[:, None], mask=in_m[None, :], other=0.0, eviction_policy="evict_last"
        )
        if EIGHT:
            w = tl.load(W + rows[:, None] * s_w + (k0 + rk)[None, :], eviction_policy="evict_first")
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BK, out_dtype=acc.dtype)
        else:
            w = _weights(W, D, MIN, rows, k0, s_w, s_d, GROUP, not PER_ROW, HAS_MIN, AS_BITS, BN, BK)
            if not PER_ROW and x.dtype == tl.bfloat16:
                x = (x.to(tl.float32) * (0.5**X_EXP)).to(tl.float16)
            acc = tl.dot(w.to(x.dtype), x, acc)
    scale = alpha
    if PER_ROW:
        scale = (tl.load(D + rows * s_d) * alpha)[:, None]
    if EIGHT:
        scale = scale * tl.load(x_scales + rm, mask=in_m, other=0.0)[None, :]
    split_k.store(
        acc, scale, Y, rn, rm, M, N, s_y, partials, counters, split,
        now, before, residual, norm_weight, s_residual, eps, out_scale, BM, BN, SPLIT, H, SILU,
    )  # fmt: skip


@triton.jit
def dequantise_kernel(
    W, D, MIN, Y, N, alpha, s_w, s_d, s_y,
    GROUP: tl.constexpr, HAS_MIN: tl.constexpr, AS_BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, K / BK)."""
    k0 = tl.program_id(1) * BK
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    w = _weights(W, D, MIN, tl.minimum(rn, N - 1), k0, s_w, s_d, GROUP, True, HAS_MIN, AS_BITS, BN, BK)
    out = Y + rn[:, None].to(tl.int64) * s_y + (k0 + tl.arange(0, BK))[None, :]
    tl.store(out, (w * alpha).to(Y.dtype.element_ty), mask=(rn < N)[:, None])


def shared_memory(tile: Tile, group: int, x_dtype: torch.dtype) -> int:
    """Bytes of shared memory that the pipelined loads of a tile need."""
    scales = 0 if x_dtype.itemsize == 1 else 8 * tile.block_n * max(1, tile.block_k // group)
    return (tile.block_n * tile.block_k + scales + tile.block_m * tile.block_k * x_dtype.itemsize) * tile.num_stages


@functools.lru_cache(maxsize=4096)
def config(m: int, n: int, k: int, group: int, x_dtype: torch.dtype, gpu: Gpu) -> Tile | None:
    """The tile for x [m, k] and a weight [n, k]; None: above the cross-over. x_dtype of 8 bits: w8a8.

    Within a bucket only `split` may depend on m. ValueError: float8 activations on a GPU that has none.
    """
    eight, hopper = x_dtype.itemsize == 1, gpu.capability // 10 == 9
    if x_dtype == FP8 and gpu.capability < 89:
        raise ValueError(f"{gpu.name} (sm_{gpu.capability}) has no float8 products: multiply fp8 weights by 16-bit x")
    if m > (LIBRARY if eight else CROSSOVER):
        return None
    rows = bucket(m)
    large = n * k >= 4 << 20
    if rows <= 32:
        wanted = Tile(rows, 128 if large else 64, 128 if large or eight else 64, 1, 4, 4)
    elif rows == 64 and (hopper or eight):
        wanted = Tile(64, 128, 128 if eight else 64, 1, 4, 3)
    elif (hopper or eight) and large:
        wanted = Tile(128, 256 if rows > 128 and not eight else 128, 128 if eight else 64, 1, 8, 3)
    else:
        wanted = Tile(64, 128, 64, 1, 4, 3)
    block_k = next(b for b in _block_ks(k, group) if b <= wanted.block_k)
    wanted = dataclasses.replace(wanted, block_k=block_k)
    tile = split_k.fit(wanted, m, n, k, gpu, lambda tile: shared_memory(tile, group, x_dtype))
    tile = tuned(gpu, "w8a8" if eight else "w8a16", case_name(m, n, k, group, x_dtype), tile)
    return split_k.limited(tile, m, n, k, gpu)


def case_name(m: int, n: int, k: int, group: int, x_dtype: torch.dtype) -> str:
    """The name of a case in the tuned JSON."""
    return f"m{bucket(m)} n{n} k{k} g{group} {str(x_dtype).removeprefix('torch.')}"


def _launch(
    x: torch.Tensor, x_scales: torch.Tensor | None, weight: W8, out: torch.Tensor, workspace: Workspace, x_exp: int,
    tile: Tile, epilogue: Epilogue,
) -> None:  # fmt: skip
    m, k = x.shape
    assert k == weight.k and out.shape == epilogue.out_shape(m, weight.n), (x.shape, weight.q.shape, out.shape)
    assert x.stride(1) == out.stride(1) == 1 and k % tile.block_k == 0, (k, tile)
    scaled_here = x.dtype == torch.bfloat16 and not weight.per_row
    out_exp = 0 if x.dtype == torch.bfloat16 and not scaled_here else x_exp
    sums = workspace.partials.view(torch.int32) if x.dtype == torch.int8 else workspace.partials
    w8_kernel[split_k.grid_of(tile, m, weight.n, workspace)](
        x, weight.d if x_scales is None else x_scales, weight.q, weight.d, weight.d if weight.m is None else weight.m,
        out, sums, workspace.counters, m, weight.n, k, tile.split, weight.alpha * 2.0**out_exp * epilogue.factor,
        x.stride(0), weight.q.stride(0), weight.d.stride(0), out.stride(0),
        weight.group, weight.per_row, weight.m is not None, weight.as_bits,
        tile.block_m, tile.block_n, tile.block_k, tile.split > 1, x_exp if scaled_here else 0,
        **epilogue.arguments(tile.block_n), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def w8a16(
    x: torch.Tensor, weight: W8, out: torch.Tensor, workspace: Workspace, *, x_exp: int = 0, tile: Tile | None = None,
    epilogue: Epilogue = PLAIN,
) -> None:  # fmt: skip
    """out [M, N] = x [M, K] @ weight^T, and what the epilogue makes of it, in one launch: fp16 x holds the true x times
    2^-x_exp, out the true product.

    x fp16 or bf16 (which is brought into fp16's range with x_exp where the weight has groups), rows contiguous; out
    fp16, bf16 or float32. tile: instead of `config`'s.
    """
    assert x.dtype in (torch.float16, torch.bfloat16), x.dtype
    tile = tile or config(x.shape[0], weight.n, weight.k, weight.group, x.dtype, current_gpu())
    assert tile is not None, f"M = {x.shape[0]} is above the cross-over: dequantise and use torch.mm"
    _launch(x, None, weight, out, workspace, x_exp, tile, epilogue)


def dequant_w8(weight: W8, out: torch.Tensor, *, x_exp: int = 0) -> None:
    """out [N, K] = the weight * 2^x_exp in fp16, bf16 or float32; one launch."""
    assert out.shape == weight.q.shape and out.stride(1) == 1, out.shape
    block_k = _block_ks(weight.k, weight.group)[-1]
    dequantise_kernel[(-(-weight.n // 64), weight.k // block_k)](
        weight.q, weight.d, weight.d if weight.m is None else weight.m, out, weight.n, weight.alpha * 2.0**x_exp,
        weight.q.stride(0), weight.d.stride(0), out.stride(0),
        weight.group, weight.m is not None, weight.as_bits, 64, block_k, num_warps=4,
    )  # fmt: skip


def w8a8(
    x: torch.Tensor | Rounded, weight: W8, out: torch.Tensor, workspace: Workspace, *, x_exp: int = 0,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """out [M, N] = x [M, K] @ weight^T with x rounded to the weight's type, a row at a time: one launch, and one more
    for what is not rounded yet.

    x Rounded; or fp16 (the true x times 2^-x_exp), bf16 or float32; out any float. weight: per_row. Many rows go
    through torch's own products where their sizes suit them.
    """
    assert weight.per_row and not weight.as_bits, "w8a8 wants a scale for each row of the weight"
    m, n, k = x.shape[0], weight.n, weight.k
    if isinstance(x, Rounded) or x.dtype != torch.float16:
        x_exp = 0
    if not isinstance(x, Rounded):
        given, x = x, Rounded.empty(m, k, weight.q.dtype, x.device)
        quantise_rows(given, x.q, x.scales)
    quantised, scales, factor = x.q, x.scales, 2.0**x_exp
    found = tile or config(m, n, k, k, quantised.dtype, current_gpu())
    if found is None and quantised.dtype == torch.int8 and n % 8 == k % 8 == 0:
        sums = torch._int_mm(quantised, weight.q.t())
        out.copy_(sums.float().mul_(scales * factor).mul_(weight.d.t()))
    elif found is None and out.dtype == torch.bfloat16 and n % 16 == k % 16 == 0:
        rows, columns = scales * factor, weight.d.t()
        torch._scaled_mm(quantised, weight.q.t(), scale_a=rows, scale_b=columns, out_dtype=out.dtype, out=out)
    elif found is None and quantised.dtype == FP8 and n % 16 == k % 16 == 0:  # scales by row give bf16 alone
        one = torch.ones((), device=quantised.device)
        sums = torch._scaled_mm(quantised, weight.q.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        out.copy_(sums.mul_(scales * factor).mul_(weight.d.t()))
    else:
        found = found or config(LIBRARY, n, k, k, quantised.dtype, current_gpu())
        assert found is not None
        unsplit = dataclasses.replace(found, split=1) if m > LIBRARY else found
        _launch(quantised, scales, weight, out, workspace, x_exp, unsplit, PLAIN)


def bytes_and_flops(m: int, weight: W8, x_bytes: int = 2, out_bytes: int = 2) -> tuple[int, int]:
    """Bytes that must move (weight, x, out, each once) and operations of one product."""
    return weight.bytes + m * weight.k * x_bytes + m * weight.n * out_bytes, 2 * m * weight.n * weight.k
