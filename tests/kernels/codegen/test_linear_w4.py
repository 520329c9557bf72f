"""4-bit matmul: tile choice, machine code for sm_80, sm_89, sm_90, and launches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from kernels.gpu import linear_w4, split_k, tiles, w4_layout
from kernels.gpu.linear_w4 import Tile
from kernels.gpu.tiles import A100, H100, L40S, Gpu, bucket
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import MachineCode, compile_only, tail_constants, tail_types

LAYERS = (
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
)
ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 500, 800, 801, 4096)
INTEGERS = ("M", "N", "K", "split", "s_x", "s_words", "s_pairs", "s_y")
ALIGNED = ("N", "K", "s_x", "s_words", "s_pairs", "s_y")


@pytest.mark.parametrize("gpu", (A100, L40S, H100), ids=lambda g: g.name)
def test_config_covers_every_product(gpu: Gpu) -> None:
    workspace = linear_w4.Workspace(gpu, "meta")
    for (n, k), m, group in itertools.product(LAYERS, ROWS, (32, 64, 128, "channel")):
        g = k if group == "channel" else group
        if k % g:
            continue
        tile = linear_w4.config(m, n, k, g, torch.float16, gpu)
        assert (tile is None) == (m > linear_w4.CROSSOVER)
        if tile is None:
            continue
        assert k % tile.block_k == 0 and tile.block_k % 64 == 0 and (tile.block_k % g == 0 or g % tile.block_k == 0)
        assert tile.num_stages >= 2 and linear_w4.shared_memory(tile, g) <= gpu.shared_memory
        steps = k // tile.block_k
        assert (tile.split - 1) * -(-steps // tile.split) < steps, "a program without work"
        tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
        if tile.split > 1:
            assert tiles <= workspace.counters.numel()
            assert tiles * tile.split * tile.block_m * tile.block_n <= workspace.partials.numel()
        elif m <= 64 and steps > 1:
            assert tiles >= 2 * gpu.multiprocessors, "the card is not filled"
        same = linear_w4.config(max(1, bucket(m) // 2 + 1), n, k, g, torch.float16, gpu)
        assert m > 128 or tile == same, "one tile for all rows of a bucket"


def test_bytes_and_flops() -> None:
    n = k = 4096
    parts = torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, k // 32), torch.zeros(n, k // 32)
    weight = w4_layout.pack(*parts, kw=2)
    moved, flops = linear_w4.bytes_and_flops(16, n, k, 32)
    assert moved == weight.bytes + 2 * 16 * (n + k) and flops == 2 * 16 * n * k


def compiled(
    tile: Tile, gpu: Gpu, group: int, zero_point: bool = False, x: str = "fp16", tail: str = "", hidden: int = 0
) -> tuple[MachineCode, str]:
    types = dict(X=f"*{x}", words="*u32", pairs="*u32", Y="*bf16", partials="*fp32", counters="*i32", alpha="fp32")
    types |= dict.fromkeys(INTEGERS, "i32") | tail_types(tail)
    constants = tail_constants(tail, hidden) | dict(
        GROUP=group,
        ZERO_POINT=zero_point,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        SPLIT=tile.split > 1,
        KW=w4_layout.lane_order(gpu.capability),
        X_EXP=4 if x == "bf16" else 0,
    )
    kernel = compile_only(
        linear_w4.w4a16_kernel,
        types,
        constants,
        gpu.capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=(*ALIGNED, "s_residual"),
    )
    return MachineCode(kernel), kernel.asm["ttgir"]


# GPU, rows, layer, group, zero points, x -> instructions a weight in the main loop. The budget of an H100 at 3 TB/s is
# 6.2 at 5 bits a weight and 4.9 at 4.5 bits; at 64 rows and more the matrix rate counts.
CASES = (
    (H100, 16, (4096, 4096), 32, False, "fp16", 2.4),
    (H100, 32, (4096, 4096), 32, False, "fp16", 2.45),
    (H100, 64, (4096, 4096), 32, False, "fp16", 2.65),
    (H100, 128, (4096, 4096), 32, False, "fp16", 4.3),
    (H100, 512, (4096, 4096), 32, False, "fp16", 2.9),
    (H100, 16, (576, 576), 32, False, "fp16", 4.3),
    (H100, 16, (4096, 4096), 64, False, "fp16", 2.4),
    (H100, 16, (4096, 4096), 128, False, "fp16", 2.4),
    (H100, 16, (4096, 4096), 4096, False, "fp16", 2.4),
    (H100, 16, (4096, 4096), 128, True, "fp16", 2.9),
    (H100, 16, (4096, 4096), 32, False, "bf16", 2.4),
    (A100, 16, (4096, 4096), 32, False, "fp16", 2.6),
    (A100, 16, (576, 576), 32, False, "fp16", 4.0),
    (A100, 16, (4096, 4096), 128, True, "fp16", 3.1),
    (A100, 64, (4096, 4096), 32, False, "fp16", 6.3),
    (A100, 16, (4096, 4096), 32, False, "bf16", 3.5),
    (L40S, 16, (4096, 4096), 32, False, "fp16", 2.6),
    (L40S, 64, (576, 576), 32, False, "fp16", 6.8),
)


@pytest.mark.parametrize(("gpu", "m", "layer", "group", "zero_point", "x", "budget"), CASES)
def test_machine_code(
    gpu: Gpu, m: int, layer: tuple[int, int], group: int, zero_point: bool, x: str, budget: float
) -> None:
    tile = linear_w4.config(m, *layer, group, torch.float16, gpu)
    assert tile is not None
    code, ttgir = compiled(tile, gpu, group, zero_point, x)
    assert code.spills == 0 and code.shared_memory <= gpu.shared_memory
    assert code.count["HGMMA" if gpu is H100 else "HMMA"] > 0
    assert code.per_element(tile.block_n * tile.block_k) < budget
    copies = code.widths("LDGSTS")
    # Only the scales of a tile may be fewer bytes than threads: one narrow copy a stage.
    assert copies["128"] > 0 and sum(copies.values()) - copies["128"] <= tile.num_stages
    if group == 32 and tile.block_k == 128:
        assert copies["128"] == sum(copies.values()) > 0
    if x == "fp16":
        # No exchange between threads; on Hopper the dot runs on while the next tile is dequantised.
        assert not [op for op in code.loop if op.split(".")[0] in ("SHFL", "STS", "PRMT")]
        assert gpu is not H100 or re.search(r"warp_group_dot_wait .*pendings = [1-9]", ttgir)
    programs = 65536 // (code.registers * tile.num_warps * 32)  # of one multiprocessor's register file
    assert programs >= (2 if m <= 64 else 1)


# What the epilogues cost in registers. Beside Llama-3-8B's layers, one of Yi-34B and SmolLM2's.
TAILS = (
    (H100, 16, (4096, 4096), "norm add", 96),
    (H100, 16, (28672, 4096), "norm silu", 96),
    (H100, 16, (6144, 4096), "norm", 152),
    (H100, 16, (576, 1536), "norm add", 65),
    (H100, 64, (4096, 14336), "norm add", 255),
    (H100, 64, (28672, 4096), "norm silu", 255),
    (H100, 64, (7168, 20480), "norm add", 255),
    (A100, 16, (4096, 4096), "norm add", 146),
    (A100, 64, (28672, 4096), "norm silu", 200),
    (A100, 64, (576, 1536), "norm add", 244),
    (L40S, 32, (4096, 14336), "norm add", 140),
    (L40S, 64, (28672, 4096), "norm silu", 202),
)


@pytest.mark.parametrize(("gpu", "m", "layer", "tail", "registers"), TAILS)
def test_epilogues(gpu: Gpu, m: int, layer: tuple[int, int], tail: str, registers: int) -> None:
    tile = linear_w4.config(m, *layer, 32, torch.float16, gpu)
    assert tile is not None
    hidden = layer[0] if "add" in tail else layer[1]
    code, _ = compiled(tile, gpu, 32, tail=tail, hidden=hidden)
    plain, _ = compiled(tile, gpu, 32)
    assert code.spills == 0 and code.shared_memory <= gpu.shared_memory and code.registers <= registers
    assert len(code.loop) < 1.1 * len(plain.loop), "the main loop is no other"


def test_gate_and_up_meet_in_a_thread() -> None:
    """Where K is not split. Elsewhere the sums of the parts lie in rows, and are exchanged on their way out anyway."""
    tile = linear_w4.config(16, 28672, 4096, 128, torch.float16, A100)
    assert tile is not None and tile.split == 1
    (silu, _), (plain, _) = (compiled(tile, A100, 128, tail=tail) for tail in ("silu", ""))
    for exchange in ("SHFL", "STS", "LDS", "BAR"):
        assert silu.count[exchange] <= plain.count[exchange]


@pytest.mark.parametrize(("gpu", "group", "zero_point"), ((H100, 32, False), (A100, 128, True), (L40S, 64, False)))
def test_dequantise_machine_code(gpu: Gpu, group: int, zero_point: bool) -> None:
    types = dict(words="*u32", pairs="*u32", Y="*fp16", alpha="fp32") | dict.fromkeys(
        ("N", "s_words", "s_pairs", "s_y"), "i32"
    )
    constants = dict(GROUP=group, ZERO_POINT=zero_point, BN=64, BK=64, KW=w4_layout.lane_order(gpu.capability))
    aligned = ("N", "s_words", "s_pairs", "s_y")
    code = MachineCode(
        compile_only(
            linear_w4.dequantise_kernel,
            types,
            constants,
            gpu.capability,
            num_warps=4,
            num_stages=3,
            divisible_by_16=aligned,
        )
    )
    assert code.spills == 0 and code.widths("STG")["128"] == code.count["STG"] > 0


def test_one_launch_and_no_recompilation_within_a_bucket() -> None:
    driver = fake_driver.install(90)
    from kernels.gpu.tiles import current_gpu

    current_gpu.cache_clear()
    parts = torch.zeros(576, 576, dtype=torch.uint8), torch.ones(576, 18), torch.zeros(576, 18)
    weight = w4_layout.pack(*parts, kw=2)
    workspace = linear_w4.Workspace(H100, "cpu")
    linear_w4.w4a16_kernel.device_caches.clear()  # what another test compiled reports its launches to another driver
    before = fake_driver.variants(linear_w4.w4a16_kernel)
    for calls, m in enumerate((1, 2, 3, 7, 8, 15, 16), 1):
        linear_w4.w4a16(torch.zeros(m, 576).half(), weight, torch.empty(m, 576).half(), workspace)
        assert driver.launches["w4a16_kernel"] == calls
    assert fake_driver.variants(linear_w4.w4a16_kernel) == before + 1
    other = w4_layout.pack(torch.zeros(1536, 576, dtype=torch.uint8), torch.ones(1536, 18), torch.zeros(1536, 18), kw=2)
    linear_w4.w4a16(torch.zeros(5, 576).half(), other, torch.empty(5, 1536).half(), workspace)
    assert fake_driver.variants(linear_w4.w4a16_kernel) == before + 1, "layers of one tile share a kernel"


def test_a_measured_tile_suits_every_m_of_its_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was measured at 512 rows; at 800 the same split would need more workspace than there is."""
    n, k = 6144, 4096
    sizes = n, k, 128, torch.float16
    plain = linear_w4.config(512, *sizes, H100)
    assert plain is not None
    name = linear_w4.case_name(512, *sizes)
    entry = {name: {"tile": dataclasses.asdict(plain) | {"num_stages": 2}, "us": 1.0}}
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles.tuned_path(H100.name).write_text(json.dumps({"w4a16": entry}))
    for cache in (tiles._measured, linear_w4.config):
        cache.cache_clear()
    try:
        for m in (129, 300, 512, 700, 800):
            tile = linear_w4.config(m, *sizes, H100)
            assert tile is not None and tile.num_stages == 2
            split_k.grid_of(tile, m, n, split_k.Workspace(H100, "meta"))
    finally:
        for cache in (tiles._measured, linear_w4.config):
            cache.cache_clear()
