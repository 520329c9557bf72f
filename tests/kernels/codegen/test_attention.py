"""Attention's machine code for three architectures, and its host path: launches, variants, tile choice.

The instruction budgets are what Triton 3.7 makes and a fifth more: a compiler that does worse fails here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_cache
from kernels.gpu import attention, tiles
from kernels.gpu.tiles import A100, H100, L40S, Gpu
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import SHARED_MEMORY, MachineCode, compile_only

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
TYPES = {torch.float16: "fp16", BF16: "bf16", INT8: "i8", FP8: "fp8e4nv"}
KV_HEADS = 8
GPUS = {80: A100, 89: L40S, 90: H100}


def build(kernel: Any, gpu: Gpu, cache: torch.dtype, head_dim: int, group: int, block_size: int, window: int) -> Any:
    """The machine code that the wrapper's own tile and constants lead to, and that tile."""
    q = torch.empty(1, KV_HEADS * group, head_dim, dtype=BF16, device="meta")
    pages = kv_cache.allocate(1, KV_HEADS, block_size, head_dim, cache, "meta")
    constants = attention._constants(q, pages, window)
    shape = (KV_HEADS * group, KV_HEADS, head_dim, block_size, cache, gpu)
    kv = "*" + TYPES[cache]
    if kernel is attention.decode_kernel:
        tile: Any = attention.decode_config(*shape)
        constants |= {"BH": max(16, triton.next_power_of_2(group)), "BN": tile.block_n, "SPLITS": attention.MAX_SPLITS}
    else:
        tile = attention.prefill_config(*shape)
        tma = attention.uses_tma(cache, block_size, tile, gpu)
        constants |= {"BM": tile.block_m, "BN": tile.block_n, "TMA": tma}
        if tma:
            kv = f"tensordesc<{TYPES[cache]}[{tile.block_n},{constants['BD']}]>"
    if not pages.quantized:
        constants |= {"K_SCALE": None, "V_SCALE": None}
    pointers = ("TABLE", "KV_LEN", "CU_Q", "ARRIVED")
    signature = {name: "i32" for name in kernel.arg_names} | {name: "*i32" for name in pointers}
    signature |= {name: "*fp32" for name in ("K_SCALE", "V_SCALE", "PARTIAL", "LSE")}
    signature |= {"Q": "*bf16", "OUT": "*bf16", "K": kv, "V": kv, "scale": "fp32"}
    compiled = compile_only(
        kernel,
        signature,
        constants,
        gpu.capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=("s_q", "s_out"),
    )
    return MachineCode(compiled), tile


def tiles_copied(code: MachineCode, block_n: int, head_dim: int, cache: torch.dtype) -> float:
    """How many tiles of K and V the asynchronous 128-bit copies move (scales and block numbers are narrower).
    Each loop over tiles has two: one ahead of the loop and one in it."""
    copied = code.widths("LDGSTS")["128"] * 16 * 32 * code.num_warps
    return copied / (2 * block_n * triton.next_power_of_2(head_dim) * cache.itemsize)


# Thread-instructions of the main loop for each element of K and V. While it loads one element, an H100 can issue 19 if
# it has 2 bytes and 9 if it has one. Columns: cache, head_dim, group, block size, window, the budget by capability.
DECODE = [
    (BF16, 128, 4, 64, 0, {80: 3.0, 89: 3.2, 90: 3.3}),
    (BF16, 64, 3, 64, 0, {80: 4.5, 89: 4.9, 90: 4.8}),
    (BF16, 96, 7, 64, 0, {90: 4.3}),
    (BF16, 128, 8, 16, 1024, {90: 4.2}),
    (INT8, 128, 4, 64, 0, {80: 6.4, 90: 6.4}),
    (FP8, 128, 4, 64, 0, {89: 4.6, 90: 4.6}),
]


@pytest.mark.parametrize(
    ("capability", "cache", "head_dim", "group", "block_size", "window", "budget"),
    [(capability, *case[:-1], budget) for case in DECODE for capability, budget in case[-1].items()],
)
def test_decode_code(capability, cache, head_dim, group, block_size, window, budget):
    code, tile = build(attention.decode_kernel, GPUS[capability], cache, head_dim, group, block_size, window)
    assert code.spills == 0
    programs = 2 if capability == 89 else 3  # that a multiprocessor holds at once, to keep loads in flight
    assert code.shared_memory * programs <= SHARED_MEMORY[capability]
    assert code.registers * 32 * tile.num_warps * programs <= 65536
    assert code.count["HMMA"] > 0  # 16 rows: too few for Hopper's larger instruction
    assert tiles_copied(code, tile.block_n, head_dim, cache) == 2
    assert code.per_element(2 * tile.block_n * head_dim) <= budget


# Thread-instructions of the main loop for each score (query row x key).
PREFILL = [
    (BF16, 128, 4, 64, 0, {80: 25, 89: 25, 90: 13}),
    (BF16, 64, 3, 64, 0, {80: 13, 90: 12}),
    (BF16, 96, 7, 128, 4096, {90: 13}),
    (BF16, 128, 8, 16, 0, {90: 14}),
    (INT8, 128, 4, 64, 0, {80: 77, 90: 21}),
    (FP8, 64, 3, 64, 0, {89: 25, 90: 15}),
]


@pytest.mark.parametrize(
    ("capability", "cache", "head_dim", "group", "block_size", "window", "budget"),
    [(capability, *case[:-1], budget) for case in PREFILL for capability, budget in case[-1].items()],
)
def test_prefill_code(capability, cache, head_dim, group, block_size, window, budget):
    gpu = GPUS[capability]
    code, tile = build(attention.prefill_kernel, gpu, cache, head_dim, group, block_size, window)
    assert code.spills == 0
    assert code.shared_memory <= SHARED_MEMORY[capability]
    assert code.count["HGMMA" if capability == 90 else "HMMA"] > 0
    if attention.uses_tma(cache, block_size, tile, gpu):
        assert code.count["UTMALDG"] > 0
    else:
        assert tiles_copied(code, tile.block_n, head_dim, cache) == 4  # two loops
    assert code.per_element(tile.block_m * tile.block_n) <= budget


@pytest.fixture(scope="module")
def driver():
    tiles.current_gpu.cache_clear()
    yield fake_driver.install(90)
    tiles.current_gpu.cache_clear()


def test_one_launch_and_one_variant_whatever_the_batch(driver):
    heads, kv_heads, head_dim, max_len = 8, 2, 64, 4096
    cache = kv_cache.allocate(4, kv_heads, 64, head_dim, BF16)
    workspace = attention.decode_workspace(64, heads, kv_heads, head_dim, max_len, torch.device("cpu"))
    batches = (1, 2, 3, 7, 8, 15, 16, 17, 32, 64)
    before = fake_driver.variants(attention.decode_kernel), fake_driver.variants(attention.prefill_kernel)
    driver.launches.clear()
    for batch in batches:
        qkv = torch.zeros(batch, (heads + 2 * kv_heads), head_dim, dtype=BF16)
        q, out = qkv[:, :heads], torch.zeros(batch, heads, head_dim, dtype=BF16)
        table = torch.zeros(batch, max_len // 64, dtype=torch.int32)
        kv_len = torch.ones(batch, dtype=torch.int32)
        attention.decode(q, cache, table, kv_len, out, workspace, scale=0.125)
        cu_q = torch.arange(batch + 1, dtype=torch.int32)
        attention.prefill(q, cache, table[:, : batch + 1], cu_q, kv_len, out, max_q=batch, scale=0.125)
    assert driver.launches == {"decode_kernel": len(batches), "prefill_kernel": len(batches)}
    assert fake_driver.variants(attention.decode_kernel) - before[0] == 1
    assert fake_driver.variants(attention.prefill_kernel) - before[1] == 1


def test_workspace_is_asked_for(driver):
    cache = kv_cache.allocate(4, 2, 64, 64, BF16)
    small = attention.decode_workspace(1, 8, 2, 64, 4096, torch.device("cpu"))
    q, table = torch.zeros(64, 8, 64, dtype=BF16), torch.zeros(64, 64, dtype=torch.int32)
    with pytest.raises(AssertionError, match="workspace"):
        attention.decode(q, cache, table, torch.ones(64, dtype=torch.int32), q.clone(), small, scale=0.125)


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(list(GPUS.values())),
    st.integers(1, 512),
    st.integers(1, 16),
    st.integers(1, 200_000),
)
def test_splits_fill_the_gpu_and_cover_every_length(gpu, batch, kv_heads, max_len):
    splits = attention.decode_splits(batch, kv_heads, max_len, gpu)
    assert 1 <= splits.count <= attention.MAX_SPLITS and splits.min_tokens % 128 == 0
    longest = max(splits.min_tokens, -(-max_len // splits.count))
    assert longest <= attention.LONG_SPLIT or splits.count == attention.MAX_SPLITS
    programs = batch * kv_heads * splits.count
    assert programs >= 3 * gpu.multiprocessors or splits.count in (
        attention.MAX_SPLITS,
        -(-max_len // splits.min_tokens),
    )
    alike = attention.decode_splits(None, kv_heads, max_len, gpu)
    assert 1 <= alike.count <= attention.MAX_SPLITS and alike.min_tokens % 128 == 0


@pytest.mark.parametrize("cache", kv_cache.DTYPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_tiles_are_what_the_kernels_can_run(gpu, cache):
    for head_dim in (64, 96, 128):
        for group in (1, 3, 4, 7, 8, 32):
            for block_size in kv_cache.BLOCK_SIZES:
                shape = (group * 2, 2, head_dim, block_size, cache, gpu)
                if cache is FP8 and gpu.capability < 89:
                    with pytest.raises(ValueError, match="no float8"):
                        attention.decode_config(*shape)
                    continue
                decode, prefill = attention.decode_config(*shape), attention.prefill_config(*shape)
                for block_n in (decode.block_n, prefill.block_n):
                    assert block_n >= 16 and (cache not in kv_cache.QMAX or block_size % block_n == 0)
                    assert 128 % block_n == 0  # so that min_tokens is whole tiles
                assert prefill.block_m >= group


def test_tuned_tiles_override(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    gpu = dataclasses.replace(H100, name="Test GPU (x2)")
    case = '{"tile": {"block_n": 32, "num_warps": 8}, "us": 1.5}'
    (tmp_path / "test_gpu_x2.json").write_text(f'{{"decode": {{"bfloat16 d128 g4 block64": {case}}}}}')
    tile = attention.decode_config(32, 8, 128, 64, BF16, gpu)
    assert tile == attention.DecodeTile(32, 8, attention.decode_config(32, 8, 128, 64, BF16, H100).num_stages)
    assert attention.decode_config(32, 8, 64, 64, BF16, gpu) == attention.decode_config(32, 8, 64, 64, BF16, H100)
    gpu = dataclasses.replace(H100, name="broken")
    (tmp_path / "broken.json").write_text('{"decode": {"bfloat16 d128 g4 block64": {"tile": {"block": 1}, "us": 1}}}')
    with pytest.raises(ValueError, match=r"broken.json: decode: .*: unknown tile fields block"):
        attention.decode_config(32, 8, 128, 64, BF16, gpu)


def test_bytes_and_flops():
    heads, kv_heads, head_dim = 8, 2, 64
    row = 2 * kv_heads * head_dim * 2  # bytes of one token's K and V
    io = 2 * heads * head_dim * 2  # of one query and its output
    count = lambda *args, **kw: attention.bytes_and_flops(*args, heads, kv_heads, head_dim, BF16, BF16, **kw)  # noqa: E731
    assert count([1, 1], [10, 5]) == (2 * io + 15 * row, 4 * 15 * heads * head_dim)
    assert count([3], [3]) == (3 * io + 3 * row, 4 * 6 * heads * head_dim)  # a triangle
    assert count([1], [100], window=16) == (io + 16 * row, 4 * 16 * heads * head_dim)
    assert count([2], [100], window=16) == (2 * io + 17 * row, 4 * 32 * heads * head_dim)
    int8 = attention.bytes_and_flops([1], [10], heads, kv_heads, head_dim, BF16, INT8)[0]
    assert int8 == io + 10 * 2 * kv_heads * (head_dim + 4)
