"""What a matmul of few rows does with its sums besides storing them: a decode layer takes six launches then, not nine.

    silu   out = silu(gate) * up, of a weight whose rows are those of gate and up in turns of eight (`in_turns`): the
           tensor core leaves rows n and n + 8 of its sixteen in one thread
    add    residual += product; out = x of the next matmul, all but a factor of its row
    norm   out = product * that factor

RMSNorm multiplies column k by weight[k] and a whole row by 1 / rms(residual). The second needs the whole row, of which
no program of the matmul before has more than a tile; but being a factor of the row it may come behind the matmul after:

    add    out = fp16(residual * weight / rms(row before the addition) * 2^-EXP)
           squares[row, j] = sum of residual^2 over columns 64 j .. 64 j + 63
    norm   product * rms(row before the addition) / rms(row) * 2^EXP, both from squares

The earlier rms brings every model's rows to about 1; a row may then grow by 65504 * 2^EXP / weight = 4 million in one
addition before fp16 saturates. Numbers below 2^-8 of their row's rms are subnormal and lose bits, which those of the
row's size drown in any product; only a row that shrinks far more than 2^6-fold in one addition would lose what counts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.tiles import Gpu, bucket, tuned

EXP = tl.constexpr(6)
TURN = 8  # rows of gate, then of up
SPAN = tl.constexpr(64)  # columns that share an entry of squares; tiles of the matmuls are multiples
MOST_ROWS = 64  # with an epilogue: beyond, registers are short and launches count little


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMSNorm between two matmuls. residual float32 [M, H]; now, before float32 [M, ceil(H / 64)]: the squares of
    its rows, and those of its rows before the last addition."""

    residual: torch.Tensor
    now: torch.Tensor
    before: torch.Tensor
    eps: float

    def added(self) -> Norm:
        """After a launch with `add`, which has written the new squares over the older ones."""
        return dataclasses.replace(self, now=self.before, before=self.now)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """norm alone: x was scaled by it. norm and weight [H]: add. factor: of the product. out_exp: fp16 out holds the
    true numbers times 2^-out_exp, saturating (silu alone)."""

    norm: Norm | None = None
    weight: torch.Tensor | None = None
    silu: bool = False
    factor: float = 1.0
    out_exp: int = 0

    def out_shape(self, m: int, n: int) -> tuple[int, int]:
        return m, n // 2 if self.silu else n

    def arguments(self, tile_n: int) -> dict[str, Any]:
        """The kernel's, by name."""
        norm, weight = self.norm, self.weight
        adds = weight is not None
        assert not (adds and self.silu) and tile_n % SPAN.value == 0, (self, tile_n)
        assert weight is None or (norm is not None and weight.dtype == torch.float32 and weight.is_contiguous())
        if norm is None:
            return {"SILU": self.silu, "out_scale": 2.0**-self.out_exp}
        assert norm.residual.dtype == torch.float32 and norm.residual.stride(1) == 1
        assert norm.now.shape == norm.before.shape == squares_shape(norm.residual) and norm.now.is_contiguous()
        return {
            "now": norm.now, "before": norm.before, "residual": norm.residual if adds else None, "norm_weight": weight,
            "s_residual": norm.residual.stride(0), "eps": norm.eps, "out_scale": 2.0**-self.out_exp,
            "H": norm.residual.shape[1], "SILU": self.silu,
        }  # fmt: skip


PLAIN = Epilogue()


@dataclasses.dataclass(frozen=True)
class Fusions:
    """Which of a decode layer's launches are epilogues: silu of gate_up's (nine launches become eight); norm and the
    additions of all four matmuls' (seven, with silu six)."""

    silu: bool
    norm: bool


def config(m: int, n: int, k: int, weights: str, gpu: Gpu) -> Fusions:
    """What pays at m rows in a layer whose gate and up are [n, k]; weights: their `name`. None before `fen bench tune`
    has measured it."""
    none = Fusions(silu=False, norm=False)
    return none if m > MOST_ROWS else tuned(gpu, "layer", case_name(m, n, k, weights), none)


def case_name(m: int, n: int, k: int, weights: str) -> str:
    """The name of a case in the tuned JSON."""
    return f"m{bucket(m)} n{n} k{k} {weights}"


def squares_shape(residual: torch.Tensor) -> tuple[int, int]:
    """Of one set of squares."""
    return residual.shape[0], triton.cdiv(residual.shape[1], SPAN.value)


def in_turns(rows: torch.Tensor) -> torch.Tensor:
    """[gate rows, up rows] -> eight of gate, eight of up, and so on. The number of each is a multiple of 8."""
    return rows.view(2, -1, TURN, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


@triton.jit
def _inverse_rms(squares, rm, in_m, eps, H: tl.constexpr):
    """[BM]: 1 / rms of rows rm."""
    SLOTS: tl.constexpr = (H + SPAN - 1) // SPAN
    i = tl.arange(0, triton.next_power_of_2(SLOTS))
    at = squares + rm[:, None] * SLOTS + i[None, :]
    parts = tl.load(at, mask=in_m[:, None] & (i < SLOTS)[None, :], other=0.0)
    return 1.0 / tl.sqrt_rn(tl.sum(parts, 1) / H + eps)


@triton.jit
def finish(
    acc, scale, Y, rn, rm, M, N, s_y, now, before, residual, norm_weight, s_residual, eps, out_scale,
    BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Y = acc [BN, BM] * scale, of rows rn of the weight and rm of x, with what comes behind it."""
    in_m = rm < M
    y = acc.to(tl.float32) * scale
    if residual is not None:
        inside = (rn < N)[:, None] & in_m[None, :]
        earlier = _inverse_rms(now, rm, in_m, eps, H) * (0.5**EXP)
        at = residual + rm[None, :] * s_residual + rn[:, None]
        y += tl.load(at, mask=inside, other=0.0)
        tl.store(at, y, mask=inside)
        w = tl.load(norm_weight + rn, mask=rn < N, other=0.0)
        x = tl.clamp(y * w[:, None] * earlier[None, :], -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(Y + rm[None, :] * s_y + rn[:, None], x.to(Y.dtype.element_ty), mask=inside)
        squares = tl.sum(tl.where(inside, y * y, 0.0).reshape(BN // SPAN, SPAN, BM), 1)
        SLOTS: tl.constexpr = (H + SPAN - 1) // SPAN
        slot = tl.program_id(0) * (BN // SPAN) + tl.arange(0, BN // SPAN)
        tl.store(before + rm[None, :] * SLOTS + slot[:, None], squares, mask=(slot < SLOTS)[:, None] & in_m[None, :])
    else:
        if now is not None:
            ratio = _inverse_rms(now, rm, in_m, eps, H) / (_inverse_rms(before, rm, in_m, eps, H) * (0.5**EXP))
            y *= ratio[None, :]
        if SILU:
            pairs = y.reshape(BN // 16, 2, 8, BM).trans(0, 2, 3, 1)
            gate, up = tl.split(pairs)
            y = (gate / (1.0 + tl.exp(-gate)) * up).reshape(BN // 2, BM)
            if Y.dtype.element_ty == tl.float16:
                y = tl.clamp(y * out_scale, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            rn = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            N = N // 2
        inside = (rn < N)[:, None] & in_m[None, :]
        tl.store(Y + rm[None, :] * s_y + rn[:, None], y.to(Y.dtype.element_ty), mask=inside)
