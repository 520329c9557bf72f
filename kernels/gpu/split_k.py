"""What the quantised matmuls share: tiles that are split along K, and how their partial sums become the output.

At small M there are fewer tiles than multiprocessors, so several programs share one along K. Their partial sums go to a
workspace, and the last to finish adds them in order: one launch, and the same bits every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kernels.gpu.epilogue import finish
from kernels.gpu.tiles import BUCKETS, Gpu, bucket


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut. split: programs along K that share one tile of the output."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int


class Workspace:
    """Partial sums and counters for products that are split along K; one serves every layer of a stream of launches.

    Counters start at zero and every launch leaves them at zero.
    """

    def __init__(self, gpu: Gpu, device: torch.device | str) -> None:
        # `fit` splits fewer than 2 tiles a multiprocessor, into fewer than 4 programs of 64 x 128 or 2 of 128 x 256.
        self.partials = torch.empty(gpu.multiprocessors * 65536, dtype=torch.float32, device=device)
        self.counters = torch.zeros(2 * gpu.multiprocessors, dtype=torch.int32, device=device)


def fit(tile: Tile, m: int, n: int, k: int, gpu: Gpu, shared_memory: Callable[[Tile], int]) -> Tile:
    """The tile split along K so that the card is filled, with as many stages as its shared memory holds."""
    tiles = -(-max(m, bucket(m)) // tile.block_m) * -(-n // tile.block_n)
    steps = k // tile.block_k
    programs = (2 if tile.num_warps == 4 else 1) * gpu.multiprocessors  # that run at a time, at least
    split = min(steps, -(-programs // tiles), 16)
    split = -(-steps // -(-steps // split))  # no program without work
    tile = dataclasses.replace(tile, split=split)
    while shared_memory(tile) > gpu.shared_memory - 2048:
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    return tile


def limited(tile: Tile, m: int, n: int, k: int, gpu: Gpu) -> Tile:
    """A measured tile, in the last bucket split no further than `fit` would: it was measured at one of many m there,
    and with more tiles the workspace would not suffice."""
    if bucket(m) < BUCKETS[-1]:
        return tile
    return dataclasses.replace(tile, split=min(tile.split, fit(tile, m, n, k, gpu, lambda _: 0).split))


def grid_of(tile: Tile, m: int, n: int, workspace: Workspace) -> tuple[int, int, int]:
    """(N / block_n, M / block_m, split), after a check that the workspace suffices."""
    grid = (-(-n // tile.block_n), -(-m // tile.block_m), tile.split)
    tiles = grid[0] * grid[1]
    if tile.split > 1:
        assert tiles <= workspace.counters.numel(), (tiles, tile)
        assert tiles * tile.split * tile.block_n * tile.block_m <= workspace.partials.numel(), (tiles, tile)
    return grid


@triton.jit
def share_of_k(K, split, BK: tl.constexpr, SPLIT: tl.constexpr):
    """The columns low .. high of this program."""
    low = 0
    high = K
    if SPLIT:
        share = tl.cdiv(tl.cdiv(K, split), BK) * BK
        low = tl.program_id(2) * share
        high = tl.minimum(low + share, K)
    return low, high


@triton.jit
def store(
    acc, scale, Y, rn, rm, M, N, s_y, partials, counters, split,
    now, before, residual, norm_weight, s_residual, eps, out_scale,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Y [M, N] at rows rm, columns rn = acc [BN, BM] * scale, summed over the programs that share the tile if SPLIT,
    and what comes behind it (epilogue.py)."""
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        offsets = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        parts = partials + tile.to(tl.int64) * split * (BN * BM) + offsets
        tl.store(parts + tl.program_id(2) * (BN * BM), acc)
        tl.debug_barrier()  # every thread's store comes before thread 0's release
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == split - 1:
            acc = tl.zeros([BN, BM], acc.dtype)
            for i in range(split):
                acc += tl.load(parts + i * (BN * BM), cache_modifier=".cg")
            finish(
                acc, scale, Y, rn, rm, M, N, s_y, now, before, residual, norm_weight, s_residual, eps, out_scale,
                BM, BN, H, SILU,
            )  # fmt: skip
            tl.store(counters + tile, 0)  # for the next launch or graph replay
    else:
        finish(
            acc, scale, Y, rn, rm, M, N, s_y, now, before, residual, norm_weight, s_residual, eps, out_scale,
            BM, BN, H, SILU,
        )  # fmt: skip
