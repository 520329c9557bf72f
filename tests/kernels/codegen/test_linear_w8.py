"""8-bit matmul: tile choice, machine code for sm_80, sm_89, sm_90, and launches."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton

from kernels.formats import Weight
from kernels.gpu import fused, linear_w8, split_k
from kernels.gpu.split_k import Tile
from kernels.gpu.tiles import A100, H100, L40S, Gpu, bucket
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import MachineCode, compile_only, tail_constants, tail_types

LAYERS = ((960, 576), (576, 1536), (6144, 4096), (28672, 4096), (4096, 14336), (100, 96))
ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 500, 800, 801, 4096)
INTEGERS = ("M", "N", "K", "split", "s_x", "s_w", "s_d", "s_y")
ALIGNED = ("N", "K", "s_x", "s_w", "s_y")
FP16, INT8, FP8 = torch.float16, torch.int8, torch.float8_e4m3fn
NAMES = {FP16: "*fp16", torch.bfloat16: "*bf16", INT8: "*i8", FP8: "*fp8e4nv"}


@pytest.mark.parametrize("gpu", (A100, L40S, H100), ids=lambda g: g.name)
def test_config_covers_every_product(gpu: Gpu) -> None:
    workspace = split_k.Workspace(gpu, "meta")
    for (n, k), m, group, x_dtype in itertools.product(LAYERS, ROWS, (16, 32, 64, 128, "row"), (FP16, INT8)):
        g = k if group == "row" else int(group)
        if k % g:
            continue
        eight = x_dtype == INT8
        tile = linear_w8.config(m, n, k, g, x_dtype, gpu)
        assert (tile is None) == (m > (linear_w8.LIBRARY if eight else linear_w8.CROSSOVER))
        if tile is None:
            continue
        assert k % tile.block_k == 0 and tile.block_k >= 32 and (tile.block_k % g == 0 or g % tile.block_k == 0)
        assert tile.num_stages >= 2 and linear_w8.shared_memory(tile, g, x_dtype) <= gpu.shared_memory
        split_k.grid_of(tile, m, n, workspace)  # the workspace suffices
        steps = k // tile.block_k
        assert (tile.split - 1) * -(-steps // tile.split) < steps, "a program without work"
        same = linear_w8.config(max(1, bucket(m) // 2 + 1), n, k, g, x_dtype, gpu)
        assert m > 128 or tile == same, "one tile for all rows of a bucket"
    if gpu is A100:
        with pytest.raises(ValueError, match="no float8"):
            linear_w8.config(16, 4096, 4096, 4096, FP8, gpu)


def compiled(
    tile: Tile, gpu: Gpu, group: int, x: torch.dtype, w: torch.dtype, minimum: bool = False, tail: str = ""
) -> tuple[MachineCode, str]:
    as_bits = w == FP8 and gpu.capability < 89
    sums = "*i32" if x == INT8 else "*fp32"
    types = dict(X=NAMES[x], x_scales="*fp32", W="*i8" if as_bits else NAMES[w], D="*fp32", MIN="*fp32", Y="*fp16")
    types |= dict(partials=sums, counters="*i32", alpha="fp32") | dict.fromkeys(INTEGERS, "i32") | tail_types(tail)
    constants = tail_constants(tail, 4096) | dict(
        GROUP=group, PER_ROW=group == 4096 and not minimum, HAS_MIN=minimum, AS_BITS=as_bits, BM=tile.block_m,
        BN=tile.block_n, BK=tile.block_k, SPLIT=tile.split > 1, X_EXP=0,
    )  # fmt: skip
    kernel = compile_only(
        linear_w8.w8_kernel, types, constants, gpu.capability,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        divisible_by_16=ALIGNED if group == 4096 else (*ALIGNED, "s_d"),
    )  # fmt: skip
    return MachineCode(kernel), kernel.asm["ttgir"]


# GPU, rows, group (4096: a row), x, weights, minima -> instructions a weight in the main loop. What the card can issue
# while it loads one: 9.7 on an H100 at 3 TB/s and on an A100 at 2; at 64 rows and more the matrix rate counts.
CASES = (
    (H100, 16, 4096, FP16, INT8, False, 6.3),
    (H100, 16, 4096, torch.bfloat16, INT8, False, 6.6),
    (H100, 16, 4096, FP16, FP8, False, 2.8),
    (H100, 16, 128, FP16, FP8, False, 5.8),
    (H100, 16, 32, FP16, INT8, True, 5.4),
    (H100, 16, 16, FP16, INT8, False, 5.4),
    (H100, 16, 32, torch.bfloat16, INT8, True, 5.3),
    (H100, 64, 128, FP16, INT8, False, 6.1),
    (H100, 64, 32, FP16, INT8, True, 6.2),
    (H100, 128, 4096, FP16, INT8, False, 8.3),
    (H100, 512, 4096, FP16, INT8, False, 7.0),
    (H100, 512, 32, FP16, INT8, True, 6.2),
    (H100, 16, 4096, INT8, INT8, False, 1.0),
    (H100, 64, 4096, INT8, INT8, False, 1.1),
    (H100, 512, 4096, INT8, INT8, False, 1.8),
    (H100, 16, 4096, FP8, FP8, False, 1.3),
    (H100, 512, 4096, FP8, FP8, False, 3.0),
    (A100, 16, 4096, FP16, INT8, False, 4.9),
    (A100, 16, 4096, FP16, FP8, False, 5.5),
    (A100, 16, 128, FP16, FP8, False, 8.8),
    (A100, 16, 32, FP16, INT8, True, 5.8),
    (A100, 64, 32, FP16, INT8, True, 12.8),
    (A100, 16, 4096, INT8, INT8, False, 0.9),
    (A100, 512, 4096, INT8, INT8, False, 2.8),
    (L40S, 16, 16, FP16, INT8, False, 5.9),
    (L40S, 16, 4096, FP8, FP8, False, 1.0),
    (L40S, 512, 4096, FP8, FP8, False, 3.7),
)


@pytest.mark.parametrize(("gpu", "m", "group", "x", "w", "minimum", "budget"), CASES)
def test_machine_code(
    gpu: Gpu, m: int, group: int, x: torch.dtype, w: torch.dtype, minimum: bool, budget: float
) -> None:
    tile = linear_w8.config(m, 4096, 4096, group, x, gpu)
    assert tile is not None
    code, ttgir = compiled(tile, gpu, group, x, w, minimum)
    assert code.spills == 0 and code.shared_memory <= gpu.shared_memory
    if gpu is H100:
        core = {INT8: "IGMMA", FP8: "QGMMA"}.get(x, "HGMMA")
    else:
        core = {INT8: "IMMA", FP8: "QMMA"}.get(x, "HMMA")
    assert code.count[core] > 0
    assert code.per_element(tile.block_n * tile.block_k) < budget
    copies = code.widths("LDGSTS")
    # Hopper keeps 8-bit weights that pass through registers in pieces of 64 bits.
    wide = copies["128"] + (copies["64"] if gpu is H100 and x.itemsize == 2 else 0)
    assert copies["128"] > 0 and sum(copies.values()) - wide <= 2 * tile.num_stages  # scales of a tile may be narrow
    if gpu is H100 and x == FP16:  # the dot runs on while the next tile is made
        assert "warp_group_dot_wait" in ttgir
        assert "pendings = 1" in ttgir or triton.__version__ < "3.7"  # 3.6 waits for each dot
        assert not [op for op in code.loop if op.split(".")[0] in ("SHFL", "STS")]
    programs = 65536 // (code.registers * tile.num_warps * 32)  # of one multiprocessor's register file
    assert programs >= (2 if m <= 64 else 1)


@pytest.mark.parametrize(("gpu", "w", "group"), ((H100, INT8, 32), (A100, FP8, 128), (L40S, FP8, 4096)))
def test_dequantise_machine_code(gpu: Gpu, w: torch.dtype, group: int) -> None:
    as_bits = w == FP8 and gpu.capability < 89
    types = dict(W="*i8" if as_bits else NAMES[w], D="*fp32", MIN="*fp32", Y="*fp16", alpha="fp32")
    types |= dict.fromkeys(("N", "s_w", "s_d", "s_y"), "i32")
    constants = dict(GROUP=group, HAS_MIN=group == 32, AS_BITS=as_bits, BN=64, BK=64)
    kernel = compile_only(
        linear_w8.dequantise_kernel, types, constants, gpu.capability,
        num_warps=4, num_stages=3, divisible_by_16=("N", "s_w", "s_y"),
    )  # fmt: skip
    code = MachineCode(kernel)
    assert code.spills == 0 and code.widths("STG")["128"] == code.count["STG"] > 0
    assert code.widths("LDG")["128"] > 0


@pytest.mark.parametrize(("gpu", "out"), ((A100, INT8), (H100, INT8), (L40S, FP8), (H100, FP8)))
def test_quantise_rows_machine_code(gpu: Gpu, out: torch.dtype) -> None:
    types = dict(X="*fp16", out=NAMES[out], scales="*fp32", s_x="i32", s_out="i32")
    constants = dict(K=14336, BLOCK=16384, QMAX=127.0 if out == INT8 else 448.0)
    aligned = ("s_x", "s_out")
    kernel = fused.quantise_rows_kernel
    code = MachineCode(
        compile_only(kernel, types, constants, gpu.capability, num_warps=16, num_stages=3, divisible_by_16=aligned)
    )
    assert code.spills == 0 and code.widths("LDG")["128"] == code.count["LDG"] > 0
    assert code.registers <= 128  # sixteen warps of it must fit


def test_launches_and_no_recompilation_within_a_bucket() -> None:
    driver = fake_driver.install(90)
    from kernels.gpu.tiles import current_gpu

    current_gpu.cache_clear()
    kernels = linear_w8.w8_kernel, fused.quantise_rows_kernel
    for kernel in kernels:
        kernel.device_caches.clear()  # what another test compiled reports its launches to another driver
    workspace = split_k.Workspace(H100, "cpu")
    rows = Weight(torch.zeros(576, 576, dtype=INT8), torch.ones(576, 1), group=576, bits=8)
    groups = Weight(torch.zeros(576, 576, dtype=INT8), torch.ones(576, 18), group=32, bits=8)
    for calls, m in enumerate((1, 2, 3, 7, 8, 15, 16), 1):
        for weight, multiply in ((rows, linear_w8.w8a16), (groups, linear_w8.w8a16), (rows, linear_w8.w8a8)):
            multiply(torch.zeros(m, 576).half(), linear_w8.pack(weight, 90), torch.empty(m, 576).half(), workspace)
        assert driver.launches == {"w8_kernel": 3 * calls, "quantise_rows_kernel": calls}
    assert [fake_driver.variants(kernel) for kernel in kernels] == [3, 1]
    current_gpu.cache_clear()
