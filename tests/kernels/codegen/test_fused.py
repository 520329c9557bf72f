"""Fused element-wise kernels: 128-bit accesses, no spills, one launch each, no recompilation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kernels import kv_cache
from kernels.gpu import fused
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import MachineCode, compile_only

GPUS = (80, 89, 90)
NOT_ROUNDED = dict(scales=None, QMAX=0.0)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> MachineCode:
    strides = [name for name in kernel.arg_names if name.startswith("s_")]
    types = types | dict.fromkeys(strides, "i32")
    code = MachineCode(
        compile_only(kernel, types, constants, capability, num_warps=warps, num_stages=3, divisible_by_16=strides)
    )
    assert code.spills == 0
    return code


def only_wide(code: MachineCode, opcode: str) -> bool:
    return code.widths(opcode)["128"] == code.count[opcode] > 0


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("h", "warps", "squares"), ((576, 2, False), (4096, 8, False), (4096, 8, True)))
def test_add_rmsnorm(capability: int, h: int, warps: int, squares: bool) -> None:
    types = dict(X="*fp16", residual="*bf16", weight="*bf16", out="*fp16", eps="fp32", out_scale="fp32")
    types |= dict(squares="*fp32", same_squares="*fp32") if squares else {}
    constants = dict(H=h, BLOCK=1 << (h - 1).bit_length(), ADD=True, SLOTS=h // 64) | NOT_ROUNDED
    constants |= {} if squares else dict.fromkeys(("squares", "same_squares"))
    code = compiled(fused.add_rmsnorm_kernel, types, constants, capability, warps)
    assert only_wide(code, "LDG") and (squares or only_wide(code, "STG")) and code.registers <= 128


@pytest.mark.parametrize("turn", (8, 14336))
@pytest.mark.parametrize("capability", GPUS)
def test_silu_mul(capability: int, turn: int) -> None:
    types = dict(gate_up="*bf16", out="*fp16", out_scale="fp32")
    code = compiled(fused.silu_mul_kernel, types, dict(INNER=14336, BLOCK=1024, TURN=turn) | NOT_ROUNDED, capability, 4)
    assert only_wide(code, "LDG") and only_wide(code, "STG") and code.registers <= 64


@pytest.mark.parametrize(
    ("capability", "out", "qmax"), ((80, "i8", 127.0), (89, "fp8e4nv", 448.0), (90, "fp8e4nv", 448.0))
)
def test_rows_in_eight_bits(capability: int, out: str, qmax: float) -> None:
    """As wide as before; a row of 14336 is one program's."""
    types = dict(
        X="*fp16", residual="*fp32", weight="*fp32", out=f"*{out}", eps="fp32", out_scale="fp32", scales="*fp32"
    )
    constants = dict(H=4096, BLOCK=4096, ADD=True, SLOTS=1, squares=None, same_squares=None, QMAX=qmax)
    code = compiled(fused.add_rmsnorm_kernel, types, constants, capability, 8)
    assert only_wide(code, "LDG") and code.registers <= 128
    types = dict(gate_up="*fp16", out=f"*{out}", out_scale="fp32", scales="*fp32")
    constants = dict(INNER=14336, BLOCK=16384, TURN=8, QMAX=qmax)
    code = compiled(fused.silu_mul_kernel, types, constants, capability, 16)
    assert only_wide(code, "LDG") and code.registers <= 128


@pytest.mark.parametrize(
    ("capability", "cache", "qmax", "norm"),
    (
        (80, "bf16", 0.0, False),
        (80, "i8", 127.0, True),
        (89, "fp8e4nv", 448.0, False),
        (90, "bf16", 0.0, True),
        (90, "fp8e4nv", 448.0, True),
    ),
)
def test_rope_and_cache_write(capability: int, cache: str, qmax: float, norm: bool) -> None:
    types = dict(
        qkv="*bf16", positions="*i32", slots="*i64", cos_sin="*fp32", q_weight="*bf16", k_weight="*bf16", eps="fp32"
    )
    types |= dict(K=f"*{cache}", V=f"*{cache}", K_SCALE="*fp32", V_SCALE="*fp32")
    constants: dict[str, Any] = dict(H=32, HKV=8, D=128, PAGE=64, BH=8, BD=128, NORM=norm, QMAX=qmax)
    if not norm:
        constants |= dict(q_weight=None, k_weight=None)
    if not qmax:
        constants |= dict(K_SCALE=None, V_SCALE=None)
    code = compiled(fused.rope_kernel, types, constants, capability, 4)
    assert code.widths("LDG")["128"] and code.registers <= 128
    if qmax:  # V is stored along its tokens, scales are single numbers
        assert code.widths("STG")["128"] > 0
    else:
        assert only_wide(code, "STG")
    assert not code.count["SHFL"] or norm or qmax  # pairs are neighbours in a thread: no exchange for the rotation


def test_one_launch_each_and_no_recompilation() -> None:
    driver = fake_driver.install(90)
    cache = kv_cache.allocate(4, 3, 64, 64, torch.bfloat16)
    table, weight = torch.zeros(100, 32, 2), torch.zeros(576)
    kernels = (fused.add_rmsnorm_kernel, fused.silu_mul_kernel, fused.rope_kernel)
    before = [fake_driver.variants(k) for k in kernels]
    for calls, m in enumerate((1, 2, 7, 16, 33), 1):
        x = torch.zeros(m, 576, dtype=torch.bfloat16)
        fused.add_rmsnorm(x, x, weight, x.half(), eps=1e-5)
        fused.silu_mul(torch.zeros(m, 3072).bfloat16(), torch.zeros(m, 1536).half(), out_exp=4)
        indices = torch.zeros(m, dtype=torch.int32)
        fused.rope_and_cache_write(torch.zeros(m, 15 * 64).bfloat16(), indices, indices, table, cache, 9)
        assert dict(driver.launches) == dict.fromkeys(("add_rmsnorm_kernel", "silu_mul_kernel", "rope_kernel"), calls)
    assert [fake_driver.variants(k) for k in kernels] == [n + 1 for n in before]


@pytest.mark.parametrize(("heads", "kv_heads", "d"), ((32, 32, 96), (24, 8, 96), (5, 5, 80), (9, 3, 64), (4, 1, 192)))
def test_heads_of_any_size_are_launched(heads: int, kv_heads: int, d: int) -> None:
    """A number of warps that is no power of two is refused by the compiler, but not by the interpreter."""
    driver = fake_driver.install(90)
    fused.rope_kernel.device_caches.clear()
    cache = kv_cache.allocate(4, kv_heads, 64, d, torch.float16)
    indices = torch.zeros(2, dtype=torch.int32)
    qkv = torch.zeros(2, (heads + 2 * kv_heads) * d).half()
    fused.rope_and_cache_write(qkv, indices, indices, torch.zeros(100, d // 2, 2), cache, heads)
    assert dict(driver.launches) == {"rope_kernel": 1}


@pytest.mark.parametrize("capability", GPUS)
def test_saturation_keeps_what_is_not_a_number(capability: int) -> None:
    """A NaN that became 65504 would be a wrong answer instead of a failed request."""
    types = dict(gate_up="*fp16", out="*fp16", out_scale="fp32", s_in="i32", s_out="i32")
    constants = dict(INNER=1024, BLOCK=1024, TURN=8) | NOT_ROUNDED
    ptx = compile_only(fused.silu_mul_kernel, types, constants, capability, num_warps=4, num_stages=3).asm["ptx"]
    assert re.search(r"min\.NaN", ptx) and not re.search(r"\b(min|max)\.(xorsign|f32)", ptx)
